"""Events that cost privacy: what an accountant has to know of a release, and nothing else.

Every event states its noise per unit of sensitivity, and the sensitivity is that of the neighbour
relation that whoever releases has stated (add or remove a row, replace a client, ...). Accountants
have relations of their own, which mean different things in different ones; here they are never
asked for one.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

ORDERS: Sequence[int | float] = (
    *(1 + step / 10 for step in range(1, 100)),
    *range(11, 64),
    *(80, 96, 128, 192, 256, 384, 512, 1024),
)
"""Orders at which Renyi divergences are added up."""


_STEPS, _TAIL = 24, 14
"""Grid points in a standard deviation, and how many of these lie on either side of the bells."""

_LITTLE = 0.05
"""Noise multiplier below which the moments of a sampled Gaussian are bounded, not added up."""

_ROUNDING = 1e-13
"""More than floating point loses of a logarithm of a moment; it is added, so that bounds hold."""

_LEAST, _MOST = 1e-100, 1e100
"""Between these, squares and their reciprocals are numbers."""


@dataclass(frozen=True, slots=True)
class Event(ABC):
    """Releases of one kind.

    Attributes:
        count: how many there are, >= 1.
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be >= 1, got {self.count}")

    @abstractmethod
    def renyi(self, order: int | float) -> float:
        """Return the Renyi divergence of all of them, an order > 1; infinite where not bounded."""

    @property
    @abstractmethod
    def pure(self) -> float:
        """The sum of their pure epsilons (delta 0); infinite where there is none."""


def _check_positive(name: str, value: int | float) -> None:
    if not _LEAST <= value <= _MOST:
        raise ValueError(f"{name} must be between {_LEAST:g} and {_MOST:g}, got {value}")


def _divergence(log_moment: int | float, order: int | float) -> float:
    """Return ``log_moment / (order - 1)``, rounded up."""
    return (max(float(log_moment), 0.0) * (1 + _ROUNDING) + _ROUNDING) / (order - 1)


@dataclass(frozen=True, slots=True)
class Gaussian(Event):
    """Gaussian noise on something of bounded L2 sensitivity.

    Attributes:
        noise_multiplier: standard deviation over L2 sensitivity.

    Source:
        Mironov, 2017, proposition 7, for its Renyi divergence. https://arxiv.org/abs/1702.07476
    """

    noise_multiplier: int | float

    def __post_init__(self) -> None:
        super(Gaussian, self).__post_init__()
        _check_positive("noise_multiplier", self.noise_multiplier)

    def renyi(self, order: int | float) -> float:
        """``order / (2 sigma^2)`` each."""
        return self.count * order / (2 * self.noise_multiplier**2)

    @property
    def pure(self) -> float:
        """There is none."""
        return math.inf


@dataclass(frozen=True, slots=True)
class SampledGaussian(Event):
    """A step of DP-SGD: rows by lot (Poisson), clipped gradients, Gaussian noise on their sum.

    For neighbours that differ by one row more or less.

    Attributes:
        noise_multiplier: standard deviation over clipping norm.
        sample_rate: with which each row is drawn, in (0, 1].

    Source:
        Mironov, Talwar, Zhang, 2019, Renyi differential privacy of the sampled Gaussian mechanism.
        https://arxiv.org/abs/1908.10530
    """

    noise_multiplier: int | float
    sample_rate: int | float

    def __post_init__(self) -> None:
        super(SampledGaussian, self).__post_init__()
        _check_positive("noise_multiplier", self.noise_multiplier)
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate must be in (0, 1], got {self.sample_rate}")

    def renyi(self, order: int | float) -> float:
        """``log E[((1 - q) + q e^((2z - 1) / (2 sigma^2)))^a] / (a - 1)`` each, z ~ N(0, sigma^2).

        Summed over a fine grid, which is exact to rounding for a smooth bell; for whole orders it
        is the series of the paper. With hardly any noise the grid would be long, and the moment is
        bounded instead, by convexity: ``(1 - q) + q e^(a (a - 1) / (2 sigma^2))``.
        """
        return self.count * _sampled_divergence(self.noise_multiplier, self.sample_rate, order)

    @property
    def pure(self) -> float:
        """There is none."""
        return math.inf


# Ledgers ask for the same steps again and again, as their number grows.
@lru_cache(maxsize=2**16)
def _sampled_divergence(sigma: int | float, rate: int | float, order: int | float) -> float:
    """Return the Renyi divergence of one step, see `SampledGaussian.renyi`."""
    if rate == 1:
        return order / (2 * sigma**2)
    if sigma < _LITTLE:
        bound = np.logaddexp(
            math.log1p(-rate), math.log(rate) + order * (order - 1) / (2 * sigma**2)
        )
        return _divergence(bound, order)
    step = sigma / _STEPS
    z = np.arange(-_TAIL * sigma, order + _TAIL * sigma, step)
    ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * z - 1) / (2 * sigma**2))
    bell = order * ratio - z**2 / (2 * sigma**2)
    moment = float(np.logaddexp.reduce(bell)) + math.log(step / (sigma * math.sqrt(2 * math.pi)))
    return _divergence(moment, order)


@dataclass(frozen=True, slots=True)
class Laplace(Event):
    """Laplace noise on something of bounded L1 sensitivity.

    Attributes:
        scale: of the noise over L1 sensitivity; each release costs ``1 / scale``.

    Source:
        Mironov, 2017, proposition 6. https://arxiv.org/abs/1702.07476
    """

    scale: int | float

    def __post_init__(self) -> None:
        super(Laplace, self).__post_init__()
        _check_positive("scale", self.scale)

    def renyi(self, order: int | float) -> float:
        """``log(a / (2a - 1) e^((a - 1) / b) + (a - 1) / (2a - 1) e^(-a / b)) / (a - 1)`` each."""
        first = math.log(order / (2 * order - 1)) + (order - 1) / self.scale
        second = math.log((order - 1) / (2 * order - 1)) - order / self.scale
        return self.count * _divergence(np.logaddexp(first, second), order)

    @property
    def pure(self) -> float:
        """``1 / scale`` each."""
        return self.count / self.scale


@dataclass(frozen=True, slots=True)
class RandomizedResponse(Event):
    """A class that is told truly with the probability ``e^eps / (e^eps + classes - 1)``.

    For neighbours whose true classes differ.

    Attributes:
        epsilon: of each answer, > 0.
        classes: to choose from, >= 2.

    Source:
        Kairouz, Oh, Viswanath, 2016, section 4 (k-ary randomized response).
        https://arxiv.org/abs/1407.1338
    """

    epsilon: int | float
    classes: int

    def __post_init__(self) -> None:
        super(RandomizedResponse, self).__post_init__()
        _check_positive("epsilon", self.epsilon)
        if self.classes < 2:
            raise ValueError(f"classes must be >= 2, got {self.classes}")

    @property
    def keep(self) -> float:
        """With which probability the true class is told."""
        return math.exp(self._log_keep)

    @property
    def other(self) -> float:
        """With which probability any one other class is told."""
        # Not from 1 - keep, of which rounding leaves nothing where epsilon is large.
        return math.exp(self._log_keep - self.epsilon)

    @property
    def _log_keep(self) -> float:
        return -math.log1p((self.classes - 1) * math.exp(-self.epsilon))

    def renyi(self, order: int | float) -> float:
        """``log(p^a q^(1 - a) + q^a p^(1 - a) + (classes - 2) q) / (a - 1)`` each."""
        p, q = self._log_keep, self._log_keep - self.epsilon
        terms = [order * p + (1 - order) * q, order * q + (1 - order) * p]
        if self.classes > 2:
            terms.append(math.log(self.classes - 2) + q)
        return self.count * _divergence(np.logaddexp.reduce(terms), order)

    @property
    def pure(self) -> float:
        """``epsilon`` each."""
        return float(self.count * self.epsilon)
