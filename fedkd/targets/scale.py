"""Targets that know what their numbers are: logits, or probabilities softened with a temperature.

A loss says what it wants, probabilities at its own temperature or logits, and gets that. Handed
bare numbers, a loss that softens would soften soft labels once more: a target of 0.991 among ten
classes then teaches 0.230, and nothing fails.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedkd.targets.softening import check_temperature, soften
from fedkd.tensors import as_tensor

Scale = Literal["logits", "probabilities"]
"""What predictions are: unnormalised scores, or shares that sum to 1 in each row."""

FEWEST_ROWS = 4
"""Rows that must all be distributions before logits are taken for soft labels: honest ones are some
by chance only, which a few rows rule out."""

ROUNDING = 1e-3
"""How far from 1 the probabilities of a row may sum up; half precision needs most of it."""


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """What is to be learnt about some rows, as logits or as soft labels; constants.

    Attributes:
        values: ``[rows, classes]``, any number of dimensions before them.
        scale: what the values are.
        temperature: what probabilities were softened with, > 0; logits have none but 1.

    Raises:
        ValueError: for logits that are soft labels, probabilities that are none, a temperature
            beside logits; with what to write instead.
    """

    values: np.ndarray | Tensor
    scale: Scale = "logits"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.scale not in ("logits", "probabilities"):
            raise ValueError(f"scale must be logits or probabilities, got {self.scale!r}")
        if self.values.ndim < 2:
            raise ValueError(
                f"targets must be [rows, classes], got shape {list(self.values.shape)}"
            )
        check_temperature(self.temperature)
        if self.scale == "probabilities":
            _check_probabilities(self.tensor)
            return
        if self.temperature != 1:
            raise ValueError(
                f"temperature={self.temperature} has no say beside scale='logits': whoever learns "
                "softens logits; soft labels need scale='probabilities'"
            )
        if pass_for_soft_labels(self.tensor):
            raise ValueError(
                "every row of these logits is >= 0 and sums to 1, as soft labels do, which "
                "would be softened once more: hand them in with scale='probabilities' and the "
                "temperature that they were softened with"
            )

    def probabilities(self, temperature: float) -> Float[Tensor, "*rows classes"]:
        """Return the targets as they are at a temperature.

        Probabilities that were softened with it are handed out as they are, bit for bit.

        Raises:
            ValueError: if ``temperature`` is not positive and finite.
        """
        if self.scale == "probabilities" and temperature == self.temperature:
            return self.tensor
        return soften(self.logits(), temperature=temperature)

    def logits(self) -> Float[Tensor, "*rows classes"]:
        """Return logits whose softmax at the targets' temperature are the probabilities.

        A class that is ruled out gets the logarithm of the smallest normal float32, not minus
        infinity.
        """
        values = self.tensor
        if self.scale == "logits":
            return values
        floor = torch.finfo(torch.float32).tiny
        return self.temperature * values.float().clamp_min(floor).log()

    def of(self, values: np.ndarray | Tensor) -> "Targets":
        """Return other numbers of the same scale, such as some of these rows; not looked at.

        Whoever picks rows out of targets in every step, or inside of ``torch.vmap``, cannot
        look at them.
        """
        return self._made(values, self.scale, self.temperature)

    @classmethod
    def from_model(cls, logits: Float[Tensor, "*rows classes"]) -> "Targets":
        """Return what a model has just put out, which nobody has to look at."""
        return cls._made(logits, "logits", 1.0)

    @classmethod
    def softened(
        cls, probabilities: Float[Tensor, "*rows classes"], *, temperature: float
    ) -> "Targets":
        """Return what `soften`, or a mean of what it returns, has just put out; not looked at."""
        return cls._made(probabilities, "probabilities", temperature)

    @classmethod
    def _made(cls, values: np.ndarray | Tensor, scale: Scale, temperature: float) -> "Targets":
        new = object.__new__(cls)
        for name, value in (("values", values), ("scale", scale), ("temperature", temperature)):
            object.__setattr__(new, name, value)
        return new

    @property
    def tensor(self) -> Float[Tensor, "*rows classes"]:
        """The numbers as they are, for whoever moves them; a loss does not ask for these."""
        values = self.values
        return as_tensor(values) if isinstance(values, np.ndarray) else values.detach()


def _check_probabilities(values: Tensor) -> None:
    if not values.numel():
        return
    low, high = map(float, values.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        # Whoever sent them is told of NaN and infinity elsewhere; the others are looked at.
        finite = values[torch.isfinite(values)]
        if not len(finite):
            return
        low, high = map(float, finite.aminmax())
    if low < -ROUNDING or high > 1 + ROUNDING:
        odd = low if low < -ROUNDING else high
        raise ValueError(
            f"probabilities must be in [0, 1], got {odd:.4g}: hand in logits with scale='logits'"
        )


def are_distributions(values: np.ndarray | Tensor) -> bool:
    """Tell whether every row is a distribution over classes, up to `ROUNDING`."""
    table = as_tensor(values) if isinstance(values, np.ndarray) else values
    # Nearly always the first rows tell.
    return all(
        bool((part >= 0).all() and ((part.double().sum(-1) - 1).abs() <= ROUNDING).all())
        for part in (table[:FEWEST_ROWS], table)
    )


def pass_for_soft_labels(values: np.ndarray | Tensor) -> bool:
    """Tell whether numbers that should be logits are soft labels; False where rows are few."""
    classes = values.shape[-1]
    rows = math.prod(values.shape[:-1])
    return classes > 1 and rows >= FEWEST_ROWS and are_distributions(values)
