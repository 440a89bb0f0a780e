"""Distillation with a temperature for each row, and the rules that choose it: FLSW and CWSM.

Conventions: the student's logits get the gradient, whatever they are compared with is a constant;
the result is averaged over the batch, in float32 or wider; an empty batch costs 0. Everything works
under ``torch.func.vmap`` and ``torch.func.grad``.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from fedkd.losses.rows import check_weights, cosine_similarity, row_mean
from fedkd.targets import at_least_float32, check_temperature, soften


def row_temperature_kl(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    temperatures: Float[Tensor, "batch"],
    *,
    scale_by_t2: bool = True,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """`soft_target_loss` with a temperature, and its square, for every row.

    Args:
        student_logits: unnormalised scores; gradients flow through these.
        teacher_logits: unnormalised scores; treated as constants.
        temperatures: softening divisor of each row, > 0, treated as constants; as
            `disagreement_temperatures` or `confidence_temperatures` give them.
        scale_by_t2: False leaves the factors ``temperatures**2`` out.
        sample_weights: >= 0, one per row, as in `fedkd.losses.response.soft_target_kl`.

    Returns:
        Loss in nats per example, >= 0.
    """
    student = at_least_float32(student_logits)
    divisors = temperatures.detach().to(student.dtype)
    student_log_p = torch.log_softmax(student / divisors[:, None], dim=-1)
    teacher = at_least_float32(teacher_logits.detach()).to(student.dtype)
    teacher_log_p = torch.log_softmax(teacher / divisors[:, None], dim=-1)
    row_losses = (teacher_log_p.exp() * (teacher_log_p - student_log_p)).sum(dim=-1)
    return row_mean(row_losses * divisors**2 if scale_by_t2 else row_losses, sample_weights)


def disagreement_temperatures(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    temperature: float,
    beta: float = 1.0,
    gamma: float = 1.0,
    min_temperature: float = 0.5,
) -> Float[Tensor, "batch"]:
    """Lower the temperature of the rows on which student and teacher differ most (FLSW).

    ``temperature + beta * (mean w - w)`` with ``w = (1 - cosine(student, teacher))**gamma``.

    Args:
        student_logits: unnormalised scores; a constant here, like the teacher's.
        teacher_logits: unnormalised scores.
        temperature: what a row of average disagreement gets, > 0.
        beta: how far temperatures spread, >= 0; 0 gives every row the same.
        gamma: exponent of the disagreement, > 0.
        min_temperature: no row gets less, > 0. TextBrewer has no such bound, and there a row's
            temperature can fall below 0.

    Returns:
        One temperature per row, without gradient, for `row_temperature_kl`.

    Raises:
        ValueError: if a setting is out of range.

    Source:
        Wen et al., 2019, Preparing Lessons: Improve Knowledge Distillation with Better
        Supervision. https://arxiv.org/abs/1911.07471. Equations as in TextBrewer's code,
        https://arxiv.org/abs/2002.12620
    """
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma must be > 0 and finite, got {gamma}")
    student = at_least_float32(student_logits.detach())
    teacher = at_least_float32(teacher_logits.detach()).to(student.dtype)
    disagreement = (1 - cosine_similarity(student, teacher)).clamp(min=0) ** gamma
    return _spread(disagreement, temperature, beta, min_temperature)


def confidence_temperatures(
    student_logits: Float[Tensor, "batch classes"],
    *,
    temperature: float,
    beta: float = 1.0,
    min_temperature: float = 0.5,
) -> Float[Tensor, "batch"]:
    """Lower the temperature of the rows on which the student is least sure (CWSM).

    ``temperature + beta * (mean w - w)`` with ``w = 1 / (largest student probability + 0.001)``.

    Args:
        student_logits: unnormalised scores; a constant here.
        temperature: what a row of average confidence gets, > 0.
        beta: how far temperatures spread, >= 0; 0 gives every row the same.
        min_temperature: no row gets less, > 0. TextBrewer has no such bound, and there a row's
            temperature can fall below 0.

    Returns:
        One temperature per row, without gradient, for `row_temperature_kl`.

    Raises:
        ValueError: if a setting is out of range.

    Source:
        Wen et al., 2019, Preparing Lessons: Improve Knowledge Distillation with Better
        Supervision. https://arxiv.org/abs/1911.07471. Equations as in TextBrewer's code,
        https://arxiv.org/abs/2002.12620
    """
    confidence = soften(student_logits.detach(), temperature=1.0).amax(dim=-1)
    return _spread(1 / (confidence + 1e-3), temperature, beta, min_temperature)


def _spread(
    row_weights: Float[Tensor, "batch"], temperature: float, beta: float, min_temperature: float
) -> Float[Tensor, "batch"]:
    check_temperature(temperature)
    check_temperature(min_temperature, "min_temperature")
    check_weights(beta=beta)
    mean = row_weights.sum() / max(len(row_weights), 1)
    return (temperature + beta * (mean - row_weights)).clamp(min=min_temperature)
