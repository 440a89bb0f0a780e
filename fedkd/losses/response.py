"""What a student pays for differing from labels or from a teacher's softened distribution.

Conventions: the student's logits get the gradient, whatever they are compared with is a constant;
the result is in nats per example, averaged over the batch, in float32 or wider; an empty batch
costs 0. Everything works under ``torch.func.vmap`` and ``torch.func.grad``. Distances of logits are
in `fedkd.losses.distances`.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fedkd.losses.rows import classes_first, log_soften, log_softmax, row_mean, t2_factor
from fedkd.targets import at_least_float32, check_temperature, soften


def hard_label_loss(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
    *,
    sample_weights: Float[Tensor, "batch"] | None = None,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Cross-entropy against class labels, in nats per example.

    Args:
        logits: unnormalised scores; gradients flow through these.
        labels: class of each row, in [0, classes).
        sample_weights: >= 0, one per row, as in `soft_target_kl`.
        label_smoothing: share of the target's probability that is spread over all classes, in
            [0, 1). Szegedy et al., 2016, section 7. https://arxiv.org/abs/1512.00567

    Examples:
        >>> import torch
        >>> from fedkd.losses.response import hard_label_loss
        >>> hard_label_loss(torch.zeros(3, 2), torch.tensor([0, 1, 1]))  # ln 2
        tensor(0.6931)
    """
    if sample_weights is None and len(logits) > 0 and not classes_first(logits):
        return F.cross_entropy(at_least_float32(logits), labels, label_smoothing=label_smoothing)
    rows = hard_label_rows(logits, labels, label_smoothing=label_smoothing)
    return row_mean(rows, sample_weights)


def hard_label_rows(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
    *,
    label_smoothing: float = 0.0,
) -> Float[Tensor, "batch"]:
    """Return what `hard_label_loss` averages, a number for each row."""
    if not classes_first(logits):
        return F.cross_entropy(
            at_least_float32(logits), labels, label_smoothing=label_smoothing, reduction="none"
        )
    log_p = log_softmax(at_least_float32(logits))
    row_losses = -log_p.gather(1, labels[:, None]).squeeze(1)
    if label_smoothing:
        row_losses = (1 - label_smoothing) * row_losses - label_smoothing * log_p.mean(dim=-1)
    return row_losses


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
    if sample_weights is None:
        # Summed at once: fewer nodes in the graph of every step, and the same gradient.
        student_log_p = log_soften(student_logits, temperature)
        target_p = target_probabilities.detach().to(student_log_p.dtype)
        loss = torch.xlogy(target_p, target_p).sum() - (target_p * student_log_p).sum()
        loss = loss / max(len(student_log_p), 1)
    else:
        rows = soft_target_rows(student_logits, target_probabilities, temperature=temperature)
        loss = row_mean(rows, sample_weights)
    return loss * t2_factor(temperature, True) if scale_by_t2 else loss


def soft_target_rows(
    student_logits: Float[Tensor, "batch classes"],
    target_probabilities: Float[Tensor, "batch classes"],
    *,
    temperature: float,
) -> Float[Tensor, "batch"]:
    """Return what `soft_target_kl` averages, without its factor ``temperature**2``."""
    student_log_p = log_soften(student_logits, temperature)
    target_p = target_probabilities.detach().to(student_log_p.dtype)
    # xlogy: a class the target rules out contributes 0 * log 0 = 0, not NaN.
    return torch.xlogy(target_p, target_p).sum(dim=-1) - (target_p * student_log_p).sum(dim=-1)


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

    Examples:
        >>> import torch
        >>> from fedkd.losses.response import soft_target_loss
        >>> same = torch.tensor([[2.0, 0.0]])
        >>> soft_target_loss(same, same, temperature=4.0)
        tensor(9.5367e-07)
        >>> round(soft_target_loss(torch.zeros(1, 2), same, temperature=1.0).item(), 4)
        0.3278
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

    Examples:
        >>> import torch
        >>> from fedkd.losses.response import soft_cross_entropy
        >>> soft_cross_entropy(torch.zeros(1, 2), torch.tensor([[0.9, 0.1]]))  # ln 2
        tensor(0.6931)
    """
    rows = soft_cross_entropy_rows(student_logits, target_probabilities, temperature=temperature)
    return row_mean(rows, sample_weights) * t2_factor(temperature, scale_by_t2)


def soft_cross_entropy_rows(
    student_logits: Float[Tensor, "batch classes"],
    target_probabilities: Float[Tensor, "batch classes"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "batch"]:
    """Return what `soft_cross_entropy` averages, without its factor ``temperature**2``."""
    student_log_p = log_soften(student_logits, temperature)
    target_p = target_probabilities.detach().to(student_log_p.dtype)
    return -(target_p * student_log_p).sum(dim=-1)
