"""Objectives: what one client minimises in one step, as pure functions of outputs and batch.

An objective is written for a single client and knows nothing of cohorts, devices or rounds;
whoever trains (a loop, or a vectorised cohort) applies it. It returns named terms, already
weighted, whose sum is minimised; the names appear in the metrics.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedkd.losses.response import hard_label_loss, soft_target_kl
from fedkd.objectives.view import NO_FEATURES
from fedkd.targets import Targets, confidence_mask


class Batch(NamedTuple):
    """What a step knows besides the model's outputs.

    Attributes:
        labels: classes of the private rows, or None in a step without private rows.
        targets: what to learn about the public rows; asked for logits, or for probabilities at a
            temperature. None in a step without.
        public_labels: classes of the public rows where the public set is labelled, or None.
        private_counted: 1 for each private row that counts, 0 for padding; None: all count. A
            mean over private rows is a mean over those that count.
        public_counted: the same for public rows.
        private_rows: ids of the private rows: where they are among all clients' training rows.
        public_rows: ids of the public rows: their positions in the public set.
        tables: what was handed to the fit beside its rows, by name; see `Table`.
    """

    labels: Int[Tensor, " private"] | None = None
    targets: Targets | None = None
    public_labels: Int[Tensor, " public"] | None = None
    private_counted: Float[Tensor, " private"] | None = None
    public_counted: Float[Tensor, " public"] | None = None
    private_rows: Int[Tensor, " private"] | None = None
    public_rows: Int[Tensor, " public"] | None = None
    tables: Mapping[str, Tensor] = NO_FEATURES


class Outputs(NamedTuple):
    """What a model says about the rows of a step.

    Attributes:
        private: its logits for the private rows, None in a step without any.
        public: the same for the public rows.
        features: what its tapped layers put out, by layer, for all rows, private ones first.
    """

    private: Float[Tensor, "private classes"] | None = None
    public: Float[Tensor, "public classes"] | None = None
    features: Mapping[str, Tensor] = NO_FEATURES

    @classmethod
    def split(
        cls,
        logits: Float[Tensor, "rows classes"],
        num_private: int,
        features: Mapping[str, Tensor],
    ) -> "Outputs":
        """Tell the private rows, which come first, from the public ones."""
        return cls(
            private=logits[:num_private] if num_private else None,
            public=logits[num_private:] if num_private < len(logits) else None,
            features=features,
        )

    @classmethod
    def of_passes(
        cls,
        private: tuple[Float[Tensor, "private classes"], Mapping[str, Tensor]],
        public: tuple[Float[Tensor, "public classes"], Mapping[str, Tensor]],
    ) -> "Outputs":
        """Join two forward passes: the logits of each, and what the tapped layers put out."""
        features = {
            name: torch.cat([tensor, public[1][name]]) for name, tensor in private[1].items()
        }
        return cls(private=private[0], public=public[0], features=features)


Losses = dict[str, Float[Tensor, ""]]
Objective = Callable[[Outputs, Batch], Losses]
JointObjective = Callable[[Mapping[str, Outputs], Batch], Losses]
"""What a client minimises that trains several models in one step: outputs by model name."""


def supervised(outputs: Outputs, batch: Batch, *, weight: float = 1.0) -> Losses:
    """``weight`` times the cross-entropy on the client's own labelled rows."""
    if outputs.private is None or batch.labels is None:
        raise ValueError("supervised learning needs private rows with labels")
    return {"ce": _weighted(weight, _private_loss(outputs.private, batch.labels, batch))}


def supervised_public(outputs: Outputs, batch: Batch) -> Losses:
    """Cross-entropy on a labelled public set."""
    if outputs.public is None or batch.public_labels is None:
        raise ValueError("supervised learning on public rows needs data.public.labelled: true")
    loss = hard_label_loss(outputs.public, batch.public_labels, sample_weights=batch.public_counted)
    return {"ce_public": loss}


def distilled(
    outputs: Outputs,
    batch: Batch,
    *,
    temperature: float,
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
        temperature: softens the student and the targets; > 0.
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
        losses["ce"] = _weighted(ce_weight, _private_loss(outputs.private, batch.labels, batch))
    if outputs.public is not None and batch.targets is not None:
        targets = batch.targets.probabilities(temperature)
        counted = batch.public_counted
        if confidence_threshold:
            kept = confidence_mask(targets, confidence_threshold)
            counted = kept if counted is None else kept * counted
        divergence = soft_target_kl(
            outputs.public,
            targets,
            temperature=temperature,
            scale_by_t2=scale_by_t2,
            sample_weights=counted,
        )
        losses["kd"] = _weighted(kd_weight, divergence)
    return losses


def _private_loss(
    logits: Float[Tensor, "private classes"], labels: Int[Tensor, " private"], batch: Batch
) -> Float[Tensor, ""]:
    return hard_label_loss(logits, labels, sample_weights=batch.private_counted)


def _weighted(weight: float, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    # A product with 1 changes no bit and costs two nodes of the graph in every step.
    return loss if weight == 1 else weight * loss


def total(losses: dict[str, Float[Tensor, "*members"]]) -> Float[Tensor, "*members"]:
    """Sum the named terms: one client's, or those of stacked clients."""
    first, *others = losses.values()
    for loss in others:
        first = first + loss
    return first
