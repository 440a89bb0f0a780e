"""Losses that keep the label and the other classes apart: DKD, NKD and NTD.

Conventions: the student's logits get the gradient, whatever they are compared with is a constant;
the result is averaged over the batch, in float32 or wider; an empty batch costs 0. Everything works
under ``torch.func.vmap`` and ``torch.func.grad``.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedkd.losses.rows import check_weights, log_softmax, row_mean, t2_factor
from fedkd.targets import at_least_float32, check_temperature


def decoupled_kd(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    scale_by_t2: bool = True,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """Distil "is it the label?" and "which of the others?" with a weight each (DKD).

    Computes ``temperature**2 * (alpha * TCKD + beta * NCKD)``: TCKD is the divergence of the pair
    (label, any other class), NCKD that of the other classes among themselves. In
    `soft_target_loss` NCKD has the weight ``1 - teacher's probability of the label``, which
    silences it wherever the teacher is sure; here it is the same for every row.

    Args:
        student_logits: unnormalised scores; gradients flow through these.
        teacher_logits: unnormalised scores; treated as constants.
        labels: class of each row, in [0, classes).
        alpha: weight of TCKD, >= 0.
        beta: weight of NCKD, >= 0; the paper tunes it from 0.5 to 10 to the teacher.
        temperature: softening divisor of both, > 0.
        scale_by_t2: False leaves the factor ``temperature**2`` out.
        sample_weights: >= 0, one per row, as in `fedkd.losses.response.soft_target_kl`.

    Returns:
        Loss in nats per example, >= 0.

    Raises:
        ValueError: with fewer than 3 classes, or if a weight or ``temperature`` is out of range.

    Source:
        Zhao et al., 2022, Decoupled Knowledge Distillation, section 3.3.
        https://arxiv.org/abs/2203.08679
    """
    rows = decoupled_rows(
        student_logits, teacher_logits, labels, alpha=alpha, beta=beta, temperature=temperature
    )
    return row_mean(rows, sample_weights) * t2_factor(temperature, scale_by_t2)


def decoupled_rows(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Float[Tensor, "batch"]:
    """Return what `decoupled_kd` averages, without its factor ``temperature**2``."""
    _check_other_classes(student_logits, "decoupled_kd")
    check_weights(alpha=alpha, beta=beta)
    check_temperature(temperature)
    student = at_least_float32(student_logits) / temperature
    teacher = at_least_float32(teacher_logits.detach()).to(student.dtype) / temperature
    student_pair, teacher_pair = (_label_or_not(logits, labels) for logits in (student, teacher))
    label_losses = (teacher_pair.exp() * (teacher_pair - student_pair)).sum(dim=-1)
    return alpha * label_losses + beta * _other_class_kl(student, teacher, labels)


def normalised_kd(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy of the label, as sure as the teacher is, plus that of the others (NKD).

    Computes ``-t_y log s_y - gamma * temperature**2 * sum_j t'_j log s'_j``, averaged over the
    batch. The first term takes both probabilities of the label at temperature 1; t' and s' are
    the softened probabilities of the other classes, divided by their sum.

    Both are cross-entropies, so a student that equals the teacher pays more than 0, and is still
    pulled towards the label.

    Args:
        student_logits: unnormalised scores; gradients flow through these.
        teacher_logits: unnormalised scores; treated as constants.
        labels: class of each row, in [0, classes).
        gamma: weight of the other classes, >= 0.
        temperature: softening divisor of the other classes, > 0.
        scale_by_t2: False leaves the factor ``temperature**2`` out.
        sample_weights: >= 0, one per row, as in `fedkd.losses.response.soft_target_kl`.

    Returns:
        Loss in nats per example, >= 0.

    Raises:
        ValueError: with fewer than 3 classes, or if ``gamma`` or ``temperature`` is out of range.

    Source:
        Yang et al., 2023, From Knowledge Distillation to Self-Knowledge Distillation.
        https://arxiv.org/abs/2303.13005
    """
    rows = normalised_rows(
        student_logits,
        teacher_logits,
        labels,
        gamma=gamma,
        temperature=temperature,
        scale_by_t2=scale_by_t2,
    )
    return row_mean(rows, sample_weights)


def normalised_rows(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
) -> Float[Tensor, "batch"]:
    """Return what `normalised_kd` averages, a number for each row."""
    _check_other_classes(student_logits, "normalised_kd")
    check_weights(gamma=gamma)
    check_temperature(temperature)
    student = at_least_float32(student_logits)
    teacher = at_least_float32(teacher_logits.detach()).to(student.dtype)
    label_log_p = log_softmax(student).gather(1, labels[:, None]).squeeze(1)
    label_target_p = torch.softmax(teacher, dim=-1).gather(1, labels[:, None]).squeeze(1)
    other_target_p = _log_softmax_of_others(teacher / temperature, labels)[0]
    other_log_p = _log_softmax_of_others(student / temperature, labels)[1]
    other_losses = -(other_target_p * other_log_p).sum(dim=-1)
    factor = gamma * t2_factor(temperature, scale_by_t2)
    return factor * other_losses - label_target_p * label_log_p


def not_true_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
    *,
    temperature: float = 3.0,
    scale_by_t2: bool = False,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """Keep the teacher's view of the classes that are NOT the label (NTD).

    ``KL(teacher || student)`` of the softened distributions over the other classes. The published
    code multiplies it by ``temperature**2`` as it is now, and did not at first; at its temperature
    of 1 that is the same, and here ``scale_by_t2`` says which. The label's own score gets no
    gradient: what a row's label teaches is left to the cross-entropy.

    Args:
        student_logits: unnormalised scores; gradients flow through these.
        teacher_logits: unnormalised scores, such as the global model's; treated as constants.
        labels: class of each row, in [0, classes).
        temperature: softening divisor of both, > 0.
        scale_by_t2: True multiplies by ``temperature**2``.
        sample_weights: >= 0, one per row, as in `fedkd.losses.response.soft_target_kl`.

    Returns:
        Loss in nats per example, >= 0.

    Raises:
        ValueError: with fewer than 3 classes, or if ``temperature`` is not positive and finite.

    Source:
        Lee et al., 2022, Preservation of the Global Knowledge by Not-True Distillation (FedNTD).
        https://arxiv.org/abs/2106.03097
    """
    rows = not_true_rows(student_logits, teacher_logits, labels, temperature=temperature)
    return row_mean(rows, sample_weights) * t2_factor(temperature, scale_by_t2)


def not_true_rows(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
    *,
    temperature: float = 3.0,
) -> Float[Tensor, "batch"]:
    """Return what `not_true_loss` averages, without its factor ``temperature**2``."""
    _check_other_classes(student_logits, "not_true_loss")
    check_temperature(temperature)
    student = at_least_float32(student_logits) / temperature
    teacher = at_least_float32(teacher_logits.detach()).to(student.dtype) / temperature
    return _other_class_kl(student, teacher, labels)


def _label_mask(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, "batch"]
) -> Bool[Tensor, "batch classes"]:
    return torch.arange(logits.shape[1], device=logits.device) == labels[:, None]


def _label_or_not(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, "batch"]
) -> Float[Tensor, "batch 2"]:
    """Log-probabilities of the label and of all other classes together.

    The second is a sum of logarithms, never the logarithm of 1 - p, which is -inf for a model
    that is sure.
    """
    total = torch.logsumexp(logits, dim=-1)
    label = logits.gather(1, labels[:, None]).squeeze(1)
    others = torch.logsumexp(logits.masked_fill(_label_mask(logits, labels), -math.inf), dim=-1)
    return torch.stack([label - total, others - total], dim=-1)


def _log_softmax_of_others(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, "batch"]
) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch classes"]]:
    """Probabilities of the classes that are not the label, and their logarithms.

    Each row of probabilities sums to 1; both are 0 at the label, so it adds nothing to a sum.
    """
    is_label = _label_mask(logits, labels)
    log_p = log_softmax(logits.masked_fill(is_label, -math.inf))
    return log_p.exp().masked_fill(is_label, 0.0), log_p.masked_fill(is_label, 0.0)


def _other_class_kl(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
) -> Float[Tensor, "batch"]:
    teacher_p, teacher_log_p = _log_softmax_of_others(teacher, labels)
    _, student_log_p = _log_softmax_of_others(student, labels)
    return (teacher_p * (teacher_log_p - student_log_p)).sum(dim=-1)


def _check_other_classes(logits: Float[Tensor, "batch classes"], loss: str) -> None:
    if logits.shape[1] < 3:
        raise ValueError(
            f"{loss} needs at least 3 classes, got {logits.shape[1]}: next to the label there is "
            "no distribution over the other classes; use soft_target_loss"
        )
