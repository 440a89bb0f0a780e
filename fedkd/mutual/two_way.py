"""A teacher and a student that learn from each other, with a weight for each direction."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedkd.losses.response import soft_target_loss
from fedkd.losses.rows import check_weights
from fedkd.mutual.peers import peer_cross_entropies
from fedkd.schedules import cosine
from fedkd.targets import at_least_float32


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
    check_weights(kd_weight=kd_weight)
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
    check_weights(ce_weight=ce_weight, **weights._asdict())

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
