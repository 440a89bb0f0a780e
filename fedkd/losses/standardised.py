"""Distillation of logits that were standardised row by row.

Conventions: the student's logits get the gradient, whatever they are compared with is a constant;
the result is averaged over the batch, in float32 or wider; an empty batch costs 0. Everything works
under ``torch.func.vmap`` and ``torch.func.grad``.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from fedkd.losses.response import soft_target_rows
from fedkd.losses.rows import centre_rows, row_mean, t2_factor
from fedkd.targets import at_least_float32, soften


def standardise_logits(
    logits: Float[Tensor, "batch classes"],
) -> Float[Tensor, "batch classes"]:
    """Shift and scale each row of logits to mean 0 and standard deviation 1.

    Divides by the unbiased standard deviation plus 1e-7. A row of equal logits becomes zeros,
    through which no gradient flows.

    Args:
        logits: unnormalised scores; gradients flow through these.

    Returns:
        Float32 or wider.

    Raises:
        ValueError: with fewer than 2 classes.

    Source:
        Sun et al., 2024, Logit Standardization in Knowledge Distillation, algorithm 1.
        https://arxiv.org/abs/2403.01427
    """
    if logits.shape[-1] < 2:
        raise ValueError(f"standardise_logits needs at least 2 classes, got {logits.shape[-1]}")
    wide = at_least_float32(logits)
    centred = centre_rows(wide, wide.new_ones(1, wide.shape[1]))
    deviation: Tensor = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / math.sqrt(
        logits.shape[-1] - 1
    )
    return centred / (deviation + 1e-7)


def standardised_kd(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    temperature: float = 2.0,
    scale_by_t2: bool = True,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """`soft_target_loss` of logits that were standardised row by row.

    The student need not match the size of the teacher's logits, only their pattern. The published
    weights are 9 for this loss and 0.1 for the labels.

    Args:
        student_logits: unnormalised scores; gradients flow through these.
        teacher_logits: unnormalised scores; treated as constants.
        temperature: softening divisor of both once they are standardised, > 0.
        scale_by_t2: False leaves the factor ``temperature**2`` out.
        sample_weights: >= 0, one per row, as in `fedkd.losses.response.soft_target_kl`.

    Returns:
        Loss in nats per example, >= 0.

    Raises:
        ValueError: with fewer than 2 classes, or if ``temperature`` is not positive and finite.

    Source:
        Sun et al., 2024, Logit Standardization in Knowledge Distillation, algorithm 1.
        https://arxiv.org/abs/2403.01427
    """
    rows = standardised_rows(student_logits, teacher_logits, temperature=temperature)
    return row_mean(rows, sample_weights) * t2_factor(temperature, scale_by_t2)


def standardised_rows(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    temperature: float = 2.0,
) -> Float[Tensor, "batch"]:
    """Return what `standardised_kd` averages, without its factor ``temperature**2``."""
    return soft_target_rows(
        standardise_logits(student_logits),
        soften(standardise_logits(teacher_logits.detach()), temperature=temperature),
        temperature=temperature,
    )
