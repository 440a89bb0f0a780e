"""Objectives: what one client minimises in one step, as pure functions of outputs and batch.

An objective is written for a single client and knows nothing of cohorts, devices or rounds;
whoever trains (a loop, or a vectorised cohort) applies it. It returns named terms, already
weighted, whose sum is minimised; the names appear in the metrics.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fedkd.losses.response import soft_target_kl
from fedkd.targets import confidence_mask


class Batch(NamedTuple):
    """What a step knows besides the model's outputs.

    Attributes:
        labels: classes of the private rows, or None in a step without private rows.
        targets: what to learn about the public rows (probabilities or logits, as the objective
            expects), or None.
        public_labels: classes of the public rows where the public set is labelled, or None.
    """

    labels: Int[Tensor, " private"] | None = None
    targets: Float[Tensor, "public classes"] | None = None
    public_labels: Int[Tensor, " public"] | None = None


class Outputs(NamedTuple):
    """The model's logits for the private and for the public rows of a step."""

    private: Float[Tensor, "private classes"] | None = None
    public: Float[Tensor, "public classes"] | None = None


Losses = dict[str, Float[Tensor, ""]]
Objective = Callable[[Outputs, Batch], Losses]


def supervised(outputs: Outputs, batch: Batch, *, weight: float = 1.0) -> Losses:
    """``weight`` times the cross-entropy on the client's own labelled rows."""
    if outputs.private is None or batch.labels is None:
        raise ValueError("supervised learning needs private rows with labels")
    return {"ce": weight * F.cross_entropy(outputs.private, batch.labels)}


def supervised_public(outputs: Outputs, batch: Batch) -> Losses:
    """Cross-entropy on a labelled public set."""
    if outputs.public is None or batch.public_labels is None:
        raise ValueError("supervised learning on public rows needs data.public.labelled: true")
    return {"ce_public": F.cross_entropy(outputs.public, batch.public_labels)}


def distilled(
    outputs: Outputs,
    batch: Batch,
    *,
    temperature: float,
    targets_are_logits: bool = False,
    ce_weight: float = 1.0,
    kd_weight: float = 1.0,
    scale_by_t2: bool = True,
    confidence_threshold: float = 0.0,
) -> Losses:
    """Cross-entropy on private rows plus soft-target distillation on public rows.

    ``ce_weight * CE(private) + kd_weight * T^2 * KL(target || softmax(student / T))``, each
    term the mean over its own rows; a step without private rows has the second term only.

    Args:
        outputs: the student's logits.
        batch: labels of the private rows, targets of the public rows.
        temperature: softens the student, and the targets where they are logits; > 0.
        targets_are_logits: False takes targets as probabilities that are softened already.
        ce_weight: weight of the private term, >= 0.
        kd_weight: weight of the public term, >= 0.
        scale_by_t2: multiply the public term by ``temperature**2``.
        confidence_threshold: public rows whose largest target probability is below it do not
            count; the mean is over the rows that are kept.

    Source:
        Hinton, Vinyals, Dean, 2015, section 2. https://arxiv.org/abs/1503.02531
    """
    losses: Losses = {}
    if outputs.private is not None and batch.labels is not None:
        losses["ce"] = ce_weight * F.cross_entropy(outputs.private, batch.labels)
    if outputs.public is not None and batch.targets is not None:
        targets = batch.targets
        if targets_are_logits:
            targets = F.softmax(targets / temperature, dim=-1)
        kept = confidence_mask(targets, confidence_threshold) if confidence_threshold else None
        losses["kd"] = kd_weight * soft_target_kl(
            outputs.public,
            targets,
            temperature=temperature,
            scale_by_t2=scale_by_t2,
            sample_weights=kept,
        )
    return losses


def total(losses: Losses) -> Float[Tensor, ""]:
    """Sum the named terms."""
    first, *others = losses.values()
    for loss in others:
        first = first + loss
    return first
