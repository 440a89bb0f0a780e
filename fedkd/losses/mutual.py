"""Mutual learning: peers that train together and each pull towards the others' predictions."""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fedkd.losses.response import soft_target_loss
from fedkd.schedules import cosine
from fedkd.targets import at_least_float32, check_temperature


def pairwise_kl(
    logits: Float[Tensor, "peers batch classes"],
    *,
    temperature: float = 1.0,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, "peers peers"]:
    """Divergence of every peer from every other: entry [i, j] is KL(p_i || p_j).

    One matrix product instead of peers x (peers - 1) passes. Row i is the target and a constant;
    the gradient of column j reaches only peer j's logits.

    Args:
        logits: unnormalised scores of all peers on the same batch.
        temperature: softening divisor, > 0. No factor ``temperature**2`` is applied here.
        sample_weights: >= 0, one per row, as in `fedkd.losses.response.soft_target_kl`.

    Returns:
        Nats per example, averaged over the batch; zero on the diagonal up to rounding.

    Raises:
        ValueError: if ``temperature`` is not positive and finite.
    """
    check_temperature(temperature)
    log_p = torch.log_softmax(at_least_float32(logits) / temperature, dim=-1)
    target_log_p = log_p.detach()
    target_p = target_log_p.exp()
    divisor: int | Tensor = max(logits.shape[1], 1)
    if sample_weights is not None:
        row_weights = sample_weights.detach().to(log_p.dtype)
        total = row_weights.sum()
        divisor = torch.where(total > 0, total, torch.ones_like(total))
        target_p = target_p * row_weights[:, None]
    negative_entropy = (target_p * target_log_p).sum(dim=(1, 2))
    # Under autocast a matrix product runs in half precision, too coarse for a small difference.
    with torch.autocast(logits.device.type, enabled=False):
        negative_cross_entropy = torch.einsum("ibc,jbc->ij", target_p, log_p)
    return (negative_entropy[:, None] - negative_cross_entropy) / divisor


def mutual_losses(
    logits: Float[Tensor, "peers batch classes"],
    *,
    temperature: float = 1.0,
    peer_reduction: Literal["mean", "sum"] = "mean",
    scale_by_t2: bool = True,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, "peers"]:
    """For each peer, ``temperature**2 * KL(other || self)`` reduced over the OTHER peers.

    The others are constants, so the sum of these losses can be sent back in one backward pass:
    each peer gets the gradient of its own loss only. With the mean, that gradient is the same as
    that of one KL to the others' average probabilities; the values differ by a constant.

    Args:
        logits: unnormalised scores of all peers on the same batch.
        temperature: softening divisor, > 0; the paper uses 1.
        peer_reduction: "mean" is the paper's 1/(peers - 1). "sum" is what the authors' released
            code does; its gradient grows with the number of peers.
        scale_by_t2: False leaves the factor ``temperature**2`` out.
        sample_weights: >= 0, one per row, as in `fedkd.losses.response.soft_target_kl`.

    Returns:
        One loss per peer in nats per example, >= 0 up to rounding; 0 for a peer alone.

    Raises:
        ValueError: if ``temperature`` or ``peer_reduction`` is out of range.

    Source:
        Zhang et al., 2018, Deep Mutual Learning. https://arxiv.org/abs/1706.00384
    """
    if peer_reduction not in ("mean", "sum"):
        raise ValueError(f"unknown peer_reduction {peer_reduction!r}; known: mean, sum")
    num_peers = len(logits)
    divergence = pairwise_kl(logits, temperature=temperature, sample_weights=sample_weights)
    itself = torch.eye(num_peers, dtype=torch.bool, device=logits.device)
    losses = divergence.masked_fill(itself, 0.0).sum(dim=0)
    if peer_reduction == "mean":
        losses = losses / max(num_peers - 1, 1)
    return losses * (temperature**2 if scale_by_t2 else 1.0)


def deep_mutual_losses(
    logits: Float[Tensor, "peers batch classes"],
    labels: Int[Tensor, "batch"],
    *,
    ce_weight: float = 1.0,
    kd_weight: float = 1.0,
    temperature: float = 1.0,
    peer_reduction: Literal["mean", "sum"] = "mean",
    scale_by_t2: bool = True,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, "peers"]:
    """Deep mutual learning: each peer fits the labels and imitates the other peers.

    Computes ``ce_weight * CE + kd_weight * mutual`` for every peer, with `mutual_losses` as the
    second term. The cross-entropy never sees the temperature.

    Args:
        logits: unnormalised scores of all peers on the same batch.
        labels: class of each example, in [0, classes).
        ce_weight: weight of the labels, >= 0.
        kd_weight: weight of the peers, >= 0; 0 trains every peer alone.
        temperature: softening divisor of the mutual term, > 0.
        peer_reduction: "mean" or "sum" over the other peers.
        scale_by_t2: False leaves the factor ``temperature**2`` out of the mutual term.
        sample_weights: >= 0, one per row, for both terms.

    Returns:
        One loss per peer, in nats per example.

    Raises:
        ValueError: if a weight, ``temperature`` or ``peer_reduction`` is out of range.

    Source:
        Zhang et al., 2018, Deep Mutual Learning. https://arxiv.org/abs/1706.00384
    """
    _check_weights(ce_weight=ce_weight, kd_weight=kd_weight)
    mutual = mutual_losses(
        logits,
        temperature=temperature,
        peer_reduction=peer_reduction,
        scale_by_t2=scale_by_t2,
        sample_weights=sample_weights,
    )
    return ce_weight * peer_cross_entropies(logits, labels, sample_weights) + kd_weight * mutual


class TwoWayWeights(NamedTuple):
    """How much each side of a pair learns from the other.

    Attributes:
        teacher_to_student: weight of what the student learns from the teacher, >= 0.
        student_to_teacher: weight of what the teacher learns from the student, >= 0.
    """

    teacher_to_student: float
    student_to_teacher: float


def progressive_weights(
    progress: float, *, kd_weight: float = 1.0, final_share: float = 0.5
) -> TwoWayWeights:
    """Let the teacher lead first and the student's influence grow.

    The student's share of ``kd_weight`` rises from 0 to ``final_share`` along half a cosine wave;
    the rest is the teacher's. So training begins as one-way distillation and, with a final share
    of one half, ends as mutual learning between equals.

    Args:
        progress: how much of the training is done, in [0, 1].
        kd_weight: sum of both weights, >= 0.
        final_share: the student's share at progress 1, in [0, 1]; 0 stays one-way.

    Raises:
        ValueError: if an argument is out of range.
    """
    _check_weights(kd_weight=kd_weight)
    if not 0 <= final_share <= 1:
        raise ValueError(f"final_share must be in [0, 1], got {final_share}")
    share = cosine(progress, start=0.0, end=final_share)
    return TwoWayWeights(kd_weight * (1 - share), kd_weight * share)


def two_way_losses(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"] | None,
    *,
    weights: TwoWayWeights,
    ce_weight: float = 1.0,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Mutual learning of a teacher and a student, with a weight for each direction.

    With both weights equal this is `deep_mutual_losses` of the two. Each KL sends its gradient
    to the side that learns only, so the sum can go back in one backward pass.

    Args:
        student_logits: unnormalised scores; gradients flow through these.
        teacher_logits: unnormalised scores on the same batch; gradients flow through these too.
        labels: class of each example, in [0, classes); None leaves the cross-entropies out.
        weights: what each side learns from the other, such as `progressive_weights`.
        ce_weight: weight of the labels for both sides, >= 0.
        temperature: softening divisor of both directions, > 0.
        scale_by_t2: False leaves the factor ``temperature**2`` out of both.
        sample_weights: >= 0, one per row, for all terms.

    Returns:
        The weighted terms by name, in nats per example: ``ce_student``, ``ce_teacher``,
        ``kd_student`` (what the student learns from the teacher) and ``kd_teacher``.

    Raises:
        ValueError: if a weight or ``temperature`` is out of range.

    Source:
        Zhang et al., 2018, Deep Mutual Learning, equations 3-6, with weights of their own.
        https://arxiv.org/abs/1706.00384
    """
    _check_weights(ce_weight=ce_weight, **weights._asdict())

    def learn(own: Tensor, other: Tensor) -> Tensor:
        return soft_target_loss(
            own,
            other,
            temperature=temperature,
            scale_by_t2=scale_by_t2,
            sample_weights=sample_weights,
        )

    terms = {
        "kd_student": weights.teacher_to_student * learn(student_logits, teacher_logits),
        "kd_teacher": weights.student_to_teacher * learn(teacher_logits, student_logits),
    }
    if labels is None:
        return terms
    ce_student, ce_teacher = peer_cross_entropies(
        torch.stack([at_least_float32(student_logits), at_least_float32(teacher_logits)]),
        labels,
        sample_weights,
    )
    return {"ce_student": ce_weight * ce_student, "ce_teacher": ce_weight * ce_teacher, **terms}


def peer_cross_entropies(
    logits: Float[Tensor, "peers batch classes"],
    labels: Int[Tensor, "batch"],
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, "peers"]:
    """Return every peer's cross-entropy, in nats per example.

    Args:
        logits: unnormalised scores of all peers on the same batch.
        labels: class of each example, in [0, classes).
        sample_weights: >= 0, one per row, as in `fedkd.losses.response.soft_target_kl`.
    """
    num_peers, batch_size, _ = logits.shape
    row_losses = F.cross_entropy(
        at_least_float32(logits).flatten(0, 1), labels.long().repeat(num_peers), reduction="none"
    )
    return peer_means(row_losses.reshape(num_peers, batch_size), sample_weights)


def peer_means(
    row_losses: Float[Tensor, "peers batch"], sample_weights: Float[Tensor, "batch"] | None
) -> Float[Tensor, "peers"]:
    """Average each peer's row losses as `fedkd.losses.response.row_mean` does one model's."""
    if sample_weights is None:
        return row_losses.sum(dim=1) / max(row_losses.shape[1], 1)
    weights = sample_weights.detach().to(row_losses.dtype)
    total = weights.sum()
    return (row_losses * weights).sum(dim=1) / torch.where(total > 0, total, torch.ones_like(total))


def _check_weights(**weights: float) -> None:
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be >= 0 and finite, got {weight}")
