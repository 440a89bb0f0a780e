"""Squared and absolute distances between the scores of a student and those of a teacher.

Conventions: the student's logits get the gradient, whatever they are compared with is a constant;
the result is averaged over the batch, in float32 or wider; an empty batch costs 0. Everything works
under ``torch.func.vmap`` and ``torch.func.grad``.
"""

import math

from jaxtyping import Float
from torch import Tensor

from fedkd.losses.rows import row_mean
from fedkd.targets import at_least_float32, soften


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
        sample_weights: >= 0, one per row, as in `fedkd.losses.response.soft_target_kl`.

    Source:
        Kim et al., 2021. https://arxiv.org/abs/2105.08919

    Examples:
        >>> import torch
        >>> from fedkd.losses.distances import logit_mse
        >>> logit_mse(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]))
        tensor(5.)
    """
    return row_mean(logit_mse_rows(student_logits, teacher_logits), sample_weights)


def logit_mse_rows(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
) -> Float[Tensor, "batch"]:
    """Return what `logit_mse` averages, a number for each row."""
    return _differences(student_logits, teacher_logits).square().mean(-1)


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
        sample_weights: >= 0, one per row, as in `fedkd.losses.response.soft_target_kl`.

    Source:
        The digest loss in the published code of FedMD, Li and Wang, 2019.
        https://arxiv.org/abs/1910.03581

    Examples:
        >>> import torch
        >>> from fedkd.losses.distances import logit_l1
        >>> logit_l1(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]))
        tensor(2.)
    """
    return row_mean(logit_l1_rows(student_logits, teacher_logits), sample_weights)


def logit_l1_rows(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
) -> Float[Tensor, "batch"]:
    """Return what `logit_l1` averages, a number for each row."""
    return _differences(student_logits, teacher_logits).abs().mean(-1)


def probability_mse(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    temperature: float = 1.0,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared difference of softened probabilities, over batch and classes.

    Not `logit_mse`: the softmax flattens its gradient, and no factor makes up for the
    temperature, so at 20 next to nothing is learned from it.

    Args:
        student_logits: unnormalised scores; gradients flow through these.
        teacher_logits: unnormalised scores; treated as constants.
        temperature: softening divisor of both, > 0.
        sample_weights: >= 0, one per row, as in `fedkd.losses.response.soft_target_kl`.

    Returns:
        Squared probability, in [0, 2 / classes].

    Raises:
        ValueError: if ``temperature`` is not positive and finite.
    """
    teacher_p = soften(teacher_logits, temperature=temperature)
    rows = probability_mse_rows(student_logits, teacher_p, temperature=temperature)
    return row_mean(rows, sample_weights)


def probability_mse_rows(
    student_logits: Float[Tensor, "batch classes"],
    target_probabilities: Float[Tensor, "batch classes"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "batch"]:
    """Return what `probability_mse` averages; the target is softened already."""
    student_p = soften(student_logits, temperature=temperature)
    return (student_p - target_probabilities.detach().to(student_p.dtype)).square().mean(-1)


def annealing_kd(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    progress: float,
    max_temperature: float = 10.0,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared distance to the teacher's logits, which grow to their full size.

    The teacher's logits are multiplied by ``1 - (T - 1) / max_temperature``, where T falls
    linearly from ``max_temperature`` to 1. This is the first of two stages: afterwards the
    student learns from the labels alone.

    Args:
        student_logits: unnormalised scores; gradients flow through these.
        teacher_logits: unnormalised scores; treated as constants.
        progress: how much of the stage is done, in [0, 1].
        max_temperature: T at the start, >= 1; 1 is `logit_mse`.
        sample_weights: >= 0, one per row, as in `fedkd.losses.response.soft_target_kl`.

    Returns:
        Squared logits, >= 0.

    Raises:
        ValueError: if ``progress`` or ``max_temperature`` is out of range.

    Source:
        Jafari et al., 2021, Annealing Knowledge Distillation, stage I.
        https://arxiv.org/abs/2104.07163. The mean over classes is taken where the paper sums.
    """
    rows = annealing_rows(
        student_logits, teacher_logits, progress=progress, max_temperature=max_temperature
    )
    return row_mean(rows, sample_weights)


def annealing_rows(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    progress: float,
    max_temperature: float = 10.0,
) -> Float[Tensor, "batch"]:
    """Return what `annealing_kd` averages, a number for each row."""
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must be in [0, 1], got {progress}")
    if not 1 <= max_temperature < math.inf:
        raise ValueError(f"max_temperature must be >= 1 and finite, got {max_temperature}")
    shrink = 1 - (max_temperature - 1) * (1 - progress) / max_temperature
    return logit_mse_rows(student_logits, shrink * at_least_float32(teacher_logits))


def _differences(
    student_logits: Float[Tensor, "batch classes"], teacher_logits: Float[Tensor, "batch classes"]
) -> Float[Tensor, "batch classes"]:
    student = at_least_float32(student_logits)
    return student - teacher_logits.detach().to(student.dtype)
