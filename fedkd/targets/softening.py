"""Softened class probabilities, what every loss and every target begins with."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def check_temperature(temperature: float, name: str = "temperature") -> None:
    """Refuse a softening divisor that is not a positive finite number.

    Raises:
        ValueError: naming the setting ``name`` and the value it got.
    """
    if not temperature > 0:
        raise ValueError(f"{name} must be > 0, got {temperature}")
    if math.isinf(temperature):
        raise ValueError(f"{name} must be finite, got {temperature}")


def at_least_float32(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Widen half precision: logarithms and sums of float16 are too coarse for a loss."""
    if values.dtype is torch.float32:
        # Nearly always, and every loss asks for every tensor.
        return values
    return values.to(torch.promote_types(values.dtype, torch.float32))


def soften(
    logits: Float[Tensor, "*batch classes"], *, temperature: float
) -> Float[Tensor, "*batch classes"]:
    """Turn logits into class probabilities, ``softmax(logits / temperature)``.

    Args:
        logits: unnormalised scores.
        temperature: softening divisor, > 0; above 1 flattens, below 1 sharpens.

    Raises:
        ValueError: if ``temperature`` is not positive and finite.

    Examples:
        >>> import torch
        >>> from fedkd.targets import soften
        >>> logits = torch.tensor([[4.0, 0.0]])
        >>> soften(logits, temperature=1.0).round(decimals=2)
        tensor([[0.9800, 0.0200]])
        >>> soften(logits, temperature=4.0).round(decimals=2)
        tensor([[0.7300, 0.2700]])
    """
    check_temperature(temperature)
    return torch.softmax(at_least_float32(logits) / temperature, dim=-1)
