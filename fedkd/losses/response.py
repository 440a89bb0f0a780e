"""Distillation losses on a model's response, its logits: pure functions, no state, no I/O.

Conventions of every loss here: the student's logits get the gradient, whatever they are compared
with is a constant; the result is in nats per example (KL, cross-entropy) or squared or absolute
logits, averaged over the batch, in float32 or wider; an empty batch costs 0. All of them work
under ``torch.func.vmap`` and ``torch.func.grad``.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fedkd.targets import at_least_float32, check_temperature, soften


def hard_label_loss(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
    *,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy against class labels, in nats per example.

    Args:
        logits: unnormalised scores; gradients flow through these.
        labels: class of each row, in [0, classes).
        sample_weights: >= 0, one per row, as in `soft_target_kl`.
    """
    if sample_weights is None and not _classes_first(logits):
        return F.cross_entropy(logits, labels)
    log_p = _log_softmax(at_least_float32(logits))
    row_losses = -log_p.gather(1, labels[:, None]).squeeze(1)
    return _row_mean(row_losses, sample_weights)


def soft_target_kl(
    student_logits: Float[Tensor, "batch classes"],
    target_probabilities: Float[Tensor, "batch classes"],
    *,
    temperature: float,
    scale_by_t2: bool = True,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """Pull the student's softened class distribution towards a given one.

    Computes ``temperature**2 * KL(target || softmax(student_logits / temperature))``, averaged
    over the batch. The square keeps the gradient on the scale of a hard-label loss, so one
    learning rate serves every temperature. The gradient with respect to the student's logits is
    ``temperature / batch * (softmax(student_logits / temperature) - target)``.

    Args:
        student_logits: unnormalised scores; gradients flow through these.
        target_probabilities: rows that sum to 1 and are already softened, such as the mean of an
            ensemble; treated as constants. Zeros are allowed.
        temperature: softening divisor of the student, > 0.
        scale_by_t2: False leaves the factor ``temperature**2`` out.
        sample_weights: >= 0, one per row; the loss is then the weighted mean, divided by the SUM
            of the weights. With a 0/1 mask that is the mean over the rows kept, and 0 with a zero
            gradient when none is.

    Returns:
        Loss in nats per example, >= 0.

    Raises:
        ValueError: if ``temperature`` is not positive and finite.

    Source:
        Hinton, Vinyals, Dean, 2015, section 2. https://arxiv.org/abs/1503.02531
    """
    student_log_p = _log_soften(student_logits, temperature)
    target_p = target_probabilities.detach().to(student_log_p.dtype)
    # xlogy: a class the target rules out contributes 0 * log 0 = 0, not NaN.
    row_losses = (torch.xlogy(target_p, target_p) - target_p * student_log_p).sum(dim=-1)
    return _row_mean(row_losses, sample_weights) * _scale(temperature, scale_by_t2)


def soft_target_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    temperature: float,
    teacher_temperature: float | None = None,
    scale_by_t2: bool = True,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """Pull the student's softened class distribution towards the teacher's.

    Computes ``temperature**2 * KL(teacher || student)``, averaged over the batch, with the
    teacher softened by its own temperature T_t and the student by T_s = ``temperature``. The
    scale is T_s**2 also when the two differ, because 1/T_s is what softening the student takes
    off the gradient: it is ``T_s / batch * (student_probabilities - teacher_probabilities)``.
    As T grows, the loss of zero-mean logits tends to half of `logit_mse`.

    Args:
        student_logits: unnormalised scores; gradients flow through these.
        teacher_logits: unnormalised scores; treated as constants.
        temperature: softening divisor of the student, > 0.
        teacher_temperature: softening divisor of the teacher, > 0; None is the student's.
        scale_by_t2: False leaves the factor ``temperature**2`` out.
        sample_weights: >= 0, one per row, as in `soft_target_kl`.

    Returns:
        Loss in nats per example, >= 0.

    Raises:
        ValueError: if a temperature is not positive and finite.

    Source:
        Hinton, Vinyals, Dean, 2015, section 2. https://arxiv.org/abs/1503.02531
    """
    check_temperature(temperature)
    if teacher_temperature is None:
        teacher_temperature = temperature
    check_temperature(teacher_temperature, "teacher_temperature")
    return soft_target_kl(
        student_logits,
        soften(teacher_logits, temperature=teacher_temperature),
        temperature=temperature,
        scale_by_t2=scale_by_t2,
        sample_weights=sample_weights,
    )


def soft_cross_entropy(
    student_logits: Float[Tensor, "batch classes"],
    target_probabilities: Float[Tensor, "batch classes"],
    *,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy against class probabilities instead of labels.

    The gradient is that of `soft_target_kl`; the value is larger by the target's entropy, so it
    does not tend to 0 as the student comes to agree.

    Args:
        student_logits: unnormalised scores; gradients flow through these.
        target_probabilities: rows that sum to 1, already softened; treated as constants.
        temperature: softening divisor of the student, > 0.
        scale_by_t2: False leaves the factor ``temperature**2`` out.
        sample_weights: >= 0, one per row, as in `soft_target_kl`.

    Returns:
        Loss in nats per example, >= 0.

    Raises:
        ValueError: if ``temperature`` is not positive and finite.
    """
    student_log_p = _log_soften(student_logits, temperature)
    target_p = target_probabilities.detach().to(student_log_p.dtype)
    row_losses = -(target_p * student_log_p).sum(dim=-1)
    return _row_mean(row_losses, sample_weights) * _scale(temperature, scale_by_t2)


def logit_mse(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared difference of logits, not of probabilities, over batch and classes.

    Args:
        student_logits: unnormalised scores; gradients flow through these.
        teacher_logits: unnormalised scores; treated as constants.
        sample_weights: >= 0, one per row, as in `soft_target_kl`.

    Source:
        Kim et al., 2021. https://arxiv.org/abs/2105.08919
    """
    return _row_mean(_differences(student_logits, teacher_logits).square().mean(-1), sample_weights)


def logit_l1(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """Mean absolute difference of logits over batch and classes.

    Args:
        student_logits: unnormalised scores; gradients flow through these.
        teacher_logits: unnormalised scores; treated as constants.
        sample_weights: >= 0, one per row, as in `soft_target_kl`.

    Source:
        The digest loss in the published code of FedMD, Li and Wang, 2019.
        https://arxiv.org/abs/1910.03581
    """
    return _row_mean(_differences(student_logits, teacher_logits).abs().mean(-1), sample_weights)


def _log_soften(
    logits: Float[Tensor, "batch classes"], temperature: float
) -> Float[Tensor, "batch classes"]:
    check_temperature(temperature)
    return _log_softmax(at_least_float32(logits) / temperature)


def _log_softmax(logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
    if _classes_first(logits):
        # With the classes as rows torch works on many examples at once, else on one example's
        # few classes: ten times as long for ten of them.
        return torch.log_softmax(logits.t(), dim=0).t()
    return torch.log_softmax(logits, dim=-1)


def _classes_first(logits: Float[Tensor, "batch classes"]) -> bool:
    """Tell whether a class's scores lie side by side in memory, as stacked models leave them."""
    return logits.stride(0) == 1 and logits.stride(1) > 1


def _differences(
    student_logits: Float[Tensor, "batch classes"], teacher_logits: Float[Tensor, "batch classes"]
) -> Float[Tensor, "batch classes"]:
    student = at_least_float32(student_logits)
    return student - teacher_logits.detach().to(student.dtype)


def _scale(temperature: float, scale_by_t2: bool) -> float:
    return temperature**2 if scale_by_t2 else 1.0


def _row_mean(
    row_losses: Float[Tensor, "batch"], sample_weights: Float[Tensor, "batch"] | None
) -> Float[Tensor, ""]:
    if sample_weights is None:
        return row_losses.sum() / max(len(row_losses), 1)
    weights = sample_weights.detach().to(row_losses.dtype)
    total = weights.sum()
    # torch.where, not if: which rows are kept is data, and vmap cannot branch on data.
    return (weights * row_losses).sum() / torch.where(total > 0, total, torch.ones_like(total))
