"""What events cost together: by privacy loss distributions, by Renyi divergences, and as a sum.

The distributions are those of ``dp-accounting``; they are composed here, since its accountant
counts many uses of randomised response as one (0.6.0: 20 uses of 0.5 come to 0.49994; they cost
4.99270).
"""

import importlib
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fedkd.privacy.events import (
    ORDERS,
    Event,
    Gaussian,
    Laplace,
    RandomizedResponse,
    SampledGaussian,
)

GRID = 1e-4
"""Width of the bins that privacy losses are rounded up to."""

COARSE = 1e-3
"""The same for runs, which look for noise and add up what was spent: never too little."""

_MOST_BINS = 10**6
"""In an epsilon: a larger one gets wider bins, or memory would end."""

_ROUNDING = 4 * sys.float_info.epsilon
"""What rounding may take from delta each time that a distribution is convolved with another.

Fourier transforms err by so much in a tail, either way: of 1e5 steps 5e-13 was missing from delta.
"""

_CLOSE = 1e-13
"""How far from a root a search may stop; it is added to what is found."""

_TAIL = 1e-15
"""Mass of the upper tail that is counted as delta, and of the lower that is rounded up."""


class Spent(NamedTuple):
    """What was spent; each number is an upper bound on epsilon by itself.

    Attributes:
        epsilon: by privacy loss distributions, and no more than the others: what is reported.
        renyi: by Renyi divergences.
        pure: with delta 0, the sum of all; infinite where an event has none.
    """

    epsilon: int | float
    renyi: float
    pure: float


def spent(events: Iterable[Event], *, delta: int | float, grid: int | float = GRID) -> Spent:
    """Add events up.

    Args:
        events: what was released of one row or client, by the relation that the releases state.
        delta: in (0, 1). Below some 1e-15 for each step of DP-SGD, Renyi's bound is what is left.
        grid: width of the bins that losses are rounded up to, in (0, 1]. Wider ones take less time,
            and give an epsilon that is higher, never lower.

    Raises:
        ValueError: if ``delta`` or ``grid`` is out of range, or ``dp-accounting`` is not there.

    Examples:
        >>> from fedkd.privacy import Gaussian, spent
        >>> once, twice = [Gaussian(1, 5.0)], [Gaussian(2, 5.0)]
        >>> spent(once, delta=1e-5).epsilon < spent(twice, delta=1e-5).epsilon
        True
    """
    _check_delta(delta)
    if not 0 < grid <= 1:
        raise ValueError(f"grid must be in (0, 1], got {grid}")
    together = merged(events)
    if not together:
        return Spent(0.0, 0.0, 0.0)
    pure = sum((event.pure for event in together), start=0.0)
    renyi = renyi_epsilon(together, delta=delta)
    most = min(renyi, pure)
    by_loss = _by_loss(together, delta, max(grid, most / _MOST_BINS))
    return Spent(min(by_loss, most), most, pure)


def bound(events: Iterable[Event], *, delta: int | float) -> float:
    """Return a bound on epsilon that takes no loss distributions, so milliseconds.

    By Renyi divergences and the pure sum; exact where all events are Gaussian, or all randomised
    response.

    Args:
        events: as for `spent`.
        delta: in (0, 1).

    Raises:
        ValueError: if ``delta`` is out of range.
    """
    _check_delta(delta)
    together = merged(events)
    if not together:
        return 0.0
    exact = _exactly(together, delta)
    if exact is not None:
        return exact
    pure = sum((event.pure for event in together), start=0.0)
    return min(renyi_epsilon(together, delta=delta), pure)


def _check_delta(delta: int | float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), got {delta}")


def merged(events: Iterable[Event]) -> tuple[Event, ...]:
    """Count events of one kind and noise as one, and Gaussians of any noise as one Gaussian.

    ``n`` Gaussians of noise ``s_i`` are exactly one of noise ``1 / sqrt(sum 1 / s_i^2)``.
    """
    counts: dict[Event, int] = {}
    precision = 0.0
    for event in events:
        if isinstance(event, SampledGaussian) and event.sample_rate == 1:
            event = Gaussian(event.count, event.noise_multiplier)
        if isinstance(event, Gaussian):
            precision += event.count / event.noise_multiplier**2
            continue
        one = replace(event, count=1)
        counts[one] = counts.get(one, 0) + event.count
    rest = (replace(one, count=count) for one, count in counts.items())
    gaussian = (Gaussian(1, 1 / math.sqrt(precision)),) if precision else ()
    return (*gaussian, *rest)


# -- Renyi -------------------------------------------------------------------------------------


def renyi_epsilon(events: Sequence[Event], *, delta: int | float) -> float:
    """Return the smallest bound that Renyi divergences give.

    ``min over a of R(a) + log1p(-1 / a) - log(delta a) / (a - 1)``.

    Source:
        Canonne, Kamath, Steinke, 2020, proposition 12. https://arxiv.org/abs/2004.00010
    """
    return max(
        0.0,
        min(
            sum(event.renyi(order) for event in events)
            + math.log1p(-1 / order)
            - math.log(delta * order) / (order - 1)
            for order in ORDERS
        ),
    )


# -- privacy loss distributions ----------------------------------------------------------------


def _by_loss(events: Sequence[Event], delta: int | float, grid: int | float) -> float:
    """Return epsilon by the distribution of the loss of all events; exactly where that is known."""
    exact = _exactly(events, delta)
    if exact is not None:
        return exact
    if grid > 1:
        return math.inf  # Of a million and more, nobody asks how much exactly.
    made, *others = (_distribution(event, grid) for event in events)
    for other in others:
        made = made.compose(other, tail_mass_truncation=_TAIL)
    # Answers are counted exactly, and convolved with others once.
    convolved = sum(1 if isinstance(event, RandomizedResponse) else event.count for event in events)
    left = delta - _ROUNDING * (convolved + len(others))
    if left <= 0:
        return math.inf
    epsilon, step = float(made.get_epsilon_for_delta(left)), 1e-12
    # The library walks down a million losses by subtraction, whose rounding adds up.
    while epsilon < math.inf and made.get_delta_for_epsilon(epsilon) > delta:
        epsilon, step = epsilon + step, 2 * step
    return epsilon


def _exactly(events: Sequence[Event], delta: int | float) -> float | None:
    """Return epsilon where it is known in closed form: of one kind of Gaussian or of answers."""
    match events:
        case [Gaussian(count, noise)]:
            return gaussian_epsilon(math.sqrt(count) / noise, delta=delta)
        case [RandomizedResponse() as event]:
            return randomized_epsilon(event, delta=delta)
    return None


@lru_cache(maxsize=16)
def _distribution(event: Event, grid: int | float) -> Any:
    """Return the loss of all its releases, rounded up."""
    pld = _library("dp_accounting.pld.privacy_loss_distribution")
    match event:
        case Gaussian(count, noise):
            # Exact: so many releases are one with less noise.
            return pld.from_gaussian_mechanism(
                noise / math.sqrt(count), value_discretization_interval=grid
            )
        case SampledGaussian(count, noise, rate):
            one = pld.from_gaussian_mechanism(
                noise, value_discretization_interval=grid, sampling_prob=rate
            )
            return one.self_compose(count, tail_mass_truncation=_TAIL)
        case Laplace(count, scale):
            one = pld.from_laplace_mechanism(scale, value_discretization_interval=grid)
            return one.self_compose(count, tail_mass_truncation=_TAIL)
        case RandomizedResponse():
            return _randomized_distribution(event, grid)
    raise TypeError(f"nothing is known of {type(event).__name__}")


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"privacy is accounted for with dp-accounting (pip install dp-accounting): {error}"
        ) from error


# -- Gaussian, exactly -------------------------------------------------------------------------


def gaussian_delta(mu: int | float, epsilon: int | float) -> float:
    """Return ``Phi(mu / 2 - eps / mu) - e^eps Phi(-mu / 2 - eps / mu)``.

    Args:
        mu: L2 sensitivity over standard deviation; ``sqrt(n)`` times that for n releases.
        epsilon: >= 0.

    Source:
        Balle and Wang, 2018, theorem 8. https://arxiv.org/abs/1805.06530
    """
    from scipy.special import log_ndtr

    first, second = log_ndtr(mu / 2 - epsilon / mu), epsilon + log_ndtr(-mu / 2 - epsilon / mu)
    # The difference of two close numbers: of their logarithms, so that no digit is lost.
    return float(math.exp(first) * -math.expm1(min(second - first, 0.0)))


def gaussian_epsilon(mu: int | float, *, delta: int | float) -> float:
    """Return the smallest epsilon of Gaussian releases: see `gaussian_delta`.

    Examples:
        >>> epsilon = gaussian_epsilon(1.0, delta=1e-5)
        >>> round(gaussian_delta(1.0, epsilon) / 1e-5, 6)  # the one is the other's inverse
        1.0
    """
    from scipy.optimize import brentq

    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    high = 1.0
    while gaussian_delta(mu, high) > delta:
        high *= 2
    root = brentq(lambda epsilon: gaussian_delta(mu, epsilon) - delta, 0, high, xtol=_CLOSE)
    return float(root) + _CLOSE


# -- randomised response, exactly --------------------------------------------------------------


def _randomized_losses(event: RandomizedResponse) -> np.ndarray:
    """Return the probability that the losses of all answers sum to ``-n .. n`` times epsilon.

    One answer's loss is epsilon with p, minus epsilon with q, else 0: what is wanted are the
    coefficients of ``(p + m x + q x^2)^n``. They follow from one another by sums of positive terms
    alone, so that the smallest has all its digits; Fourier transforms would leave it none.
    """
    n = event.count
    fall = math.exp(-event.epsilon)
    middle = (event.classes - 2) * fall
    # From the largest loss down to 0, over the first; made smaller when they grow too large.
    made, shifts, before, last, shift = [1.0], [0], 0.0, 1.0, 0
    for k in range(1, n + 1):
        before, last = last, ((n - k + 1) * middle * last + (2 * n - k + 2) * fall * before) / k
        if last > 2.0**500:
            before, last, shift = before * 2.0**-500, last * 2.0**-500, shift + 500
        made.append(last)
        shifts.append(shift)
    upper = np.ldexp(made, np.array(shifts) - shift)
    # A loss is e^L times as likely as its opposite.
    lower = (upper * np.exp(-event.epsilon * np.arange(n, -1, -1)))[:-1]
    chances = np.concatenate([lower, upper[::-1]])
    return np.asarray(chances / chances.sum())


def randomized_epsilon(event: RandomizedResponse, *, delta: int | float) -> float:
    """Return the smallest epsilon of n answers.

    ``delta(eps) = sum over losses L > eps of P(L) (1 - e^(eps - L))`` falls with eps.
    """
    from scipy.optimize import brentq

    chances = _randomized_losses(event)
    losses = np.arange(-event.count, event.count + 1) * event.epsilon
    use = losses > 0
    chances, losses = chances[use], losses[use]

    def over(epsilon: int | float) -> float:
        return float(-(chances * np.expm1(np.minimum(epsilon - losses, 0))).sum()) - delta

    if over(0.0) <= 0:
        return 0.0
    return min(float(brentq(over, 0, event.pure, xtol=_CLOSE)) + _CLOSE, event.pure)


def _randomized_distribution(event: RandomizedResponse, grid: int | float) -> Any:
    """Return the losses of all answers, each sum rounded up once."""
    module = _library("dp_accounting.pld.pld_pmf")
    pld = _library("dp_accounting.pld.privacy_loss_distribution")
    chances = _randomized_losses(event)
    # Of the tails, the largest losses count as infinite and the smallest as the least one kept.
    first = int(np.searchsorted(np.cumsum(chances), _TAIL, side="right"))
    above = np.cumsum(chances[::-1])[::-1]
    last = int(np.flatnonzero(above > _TAIL)[-1])
    rounded: dict[int, float] = {}
    for step in range(first, last + 1):
        place = math.ceil((step - event.count) * event.epsilon / grid)
        rounded[place] = rounded.get(place, 0.0) + float(chances[step])
    rounded[min(rounded)] += float(chances[:first].sum())
    beyond = float(chances[last + 1 :].sum())
    return pld.PrivacyLossDistribution(
        module.create_pmf(rounded, grid, infinity_mass=beyond, pessimistic_estimate=True)
    )
