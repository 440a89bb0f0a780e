"""Gradient rules: what becomes of the losses of a step before an optimizer sees a gradient.

A rule belongs to a fit (`Cohort.fit`). It works the same for one client and for stacked ones, whose
tensors have the members as first dimension.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class GradientRule:
    """How the gradient of a step is made of its losses."""


@dataclass(frozen=True, slots=True)
class Plain(GradientRule):
    """The gradient of the sum of the losses, each a mean over its rows."""


PLAIN = Plain()


@dataclass(frozen=True, slots=True)
class Proximal(GradientRule):
    """Plain, and ``mu / 2 * ||w - w0||^2`` towards the weights from which the fit began.

    It holds the models that learn, and nothing that is trained beside them. The penalty is among
    the metrics as ``loss/proximal``.

    Attributes:
        mu: >= 0; 0 is `Plain`.

    Raises:
        ValueError: if ``mu`` is negative or not finite.

    Source:
        Li et al., 2020, Federated Optimization in Heterogeneous Networks (FedProx), equation 2.
        https://arxiv.org/abs/1812.06127
    """

    mu: float

    def __post_init__(self) -> None:
        if not 0 <= self.mu < math.inf:
            raise ValueError(f"mu must be >= 0 and finite, got {self.mu}")


class Anchor:
    """The weights from which a fit began, and the pull towards them.

    Args:
        rule: how strong it is.
        weights: of one client, or ``[members, ...]`` each.
    """

    def __init__(self, rule: Proximal, weights: Sequence[Tensor]) -> None:
        self._mu = rule.mu
        self._start = [each.detach().clone() for each in weights]

    @classmethod
    def of(cls, rule: GradientRule, weights: Sequence[Tensor]) -> "Anchor | None":
        """Return an anchor where the rule has one."""
        return cls(rule, weights) if isinstance(rule, Proximal) and rule.mu else None

    def of_members(self, here: slice) -> "Anchor":
        """Return the anchor of some of the members."""
        own = object.__new__(Anchor)
        own._mu, own._start = self._mu, [each[here] for each in self._start]
        return own

    def penalty(self, weights: Sequence[Tensor], *, stacked: bool) -> Float[Tensor, "*members"]:
        """Return ``mu / 2 * ||w - w0||^2``, for each member where they are stacked."""
        squares = [
            difference.square().flatten(1).sum(1) if stacked else difference.square().sum()
            for difference in self._differences(weights)
        ]
        return self._mu / 2 * torch.stack(squares).sum(0)

    def pulled(
        self, gradients: Sequence[Tensor | None], weights: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Return gradients with ``mu * (w - w0)`` added; what has none did not move."""
        return [
            None if gradient is None else gradient + self._mu * difference
            for gradient, difference in zip(gradients, self._differences(weights), strict=True)
        ]

    def _differences(self, weights: Sequence[Tensor]) -> list[Tensor]:
        return [now.detach() - start for now, start in zip(weights, self._start, strict=True)]
