"""What the losses share: means over rows, softened logarithms, cosines, checks of weights."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from fedkd.targets import at_least_float32, check_temperature


def cosine_similarity(
    first: Float[Tensor, "rows width"], second: Float[Tensor, "rows width"]
) -> Float[Tensor, "rows"]:
    """Cosine of the angle between two rows, in [-1, 1].

    A row of zeros has no direction: its cosine is 0, without gradient, where the library
    function divides by 1e-8 and hands back a gradient of that size. A row with NaN has a cosine
    of NaN.
    """
    norms = torch.linalg.vector_norm(first, dim=-1) * torch.linalg.vector_norm(second, dim=-1)
    # Not `> 0`, which NaN fails: it would be taken for a row of zeros.
    defined = norms != 0
    cosines = (first * second).sum(dim=-1) / torch.where(defined, norms, torch.ones_like(norms))
    return torch.where(defined, cosines, torch.zeros_like(cosines))


def log_soften(
    logits: Float[Tensor, "batch classes"], temperature: float
) -> Float[Tensor, "batch classes"]:
    """Return the logarithms of softened probabilities, in float32 or wider."""
    check_temperature(temperature)
    return log_softmax(at_least_float32(logits) / temperature)


def log_softmax(logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
    """Return ``log_softmax`` over the classes, along the axis that lies well in memory."""
    if classes_first(logits):
        # With the classes as rows torch works on many examples at once, else on one example's
        # few classes: ten times as long for ten of them.
        return torch.log_softmax(logits.t(), dim=0).t()
    return torch.log_softmax(logits, dim=-1)


def classes_first(logits: Float[Tensor, "batch classes"]) -> bool:
    """Tell whether a class's scores lie side by side in memory, as stacked models leave them."""
    return logits.stride(0) == 1 and logits.stride(1) > 1


def t2_factor(temperature: float, scale_by_t2: bool) -> float:
    """Return ``temperature**2``, or 1 where it was switched off by name."""
    return temperature**2 if scale_by_t2 else 1.0


def row_mean(
    row_losses: Float[Tensor, "batch"], sample_weights: Float[Tensor, "batch"] | None
) -> Float[Tensor, ""]:
    """Average over rows, weighted or not; 0 where no row counts.

    Args:
        row_losses: one per row.
        sample_weights: >= 0, one per row, as in `fedkd.losses.response.soft_target_kl`.
    """
    if sample_weights is None:
        return row_losses.sum() / max(len(row_losses), 1)
    weights = sample_weights.detach().to(row_losses.dtype)
    total = weights.sum()
    # torch.where, not if: which rows are kept is data, and vmap cannot branch on data.
    return (weights * row_losses).sum() / torch.where(total > 0, total, torch.ones_like(total))


def centre_rows(
    values: Float[Tensor, "rows width"], weights: Float[Tensor, "1 width"]
) -> Float[Tensor, "rows width"]:
    """Take the weighted mean of each row off it, so that a cosine becomes a correlation.

    What is left of a constant row is rounding; it becomes exactly 0.
    """
    total = weights.sum()
    mean = (values * weights).sum(dim=-1, keepdim=True) / torch.where(
        total > 0, total, torch.ones_like(total)
    )
    centred = (values - mean) * weights.sqrt()
    size = torch.linalg.vector_norm(values * weights.sqrt(), dim=-1, keepdim=True)
    rounding = 8 * torch.finfo(values.dtype).eps * size
    # Not `> rounding`, which NaN fails: it would be taken for a constant row.
    constant = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) <= rounding
    return torch.where(constant, torch.zeros_like(centred), centred)


def check_weights(**weights: float) -> None:
    """Refuse weights of terms, given by name, that are negative or not finite."""
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be >= 0 and finite, got {weight}")
