"""How much noise a wanted epsilon takes."""

import math
from collections.abc import Callable
from functools import cache

from fedkd.privacy.accounting import GRID, gaussian_delta, renyi_epsilon, spent
from fedkd.privacy.events import Laplace, RandomizedResponse, SampledGaussian

_CLOSE = 1e-6
"""How close to the least noise a search ends, with the finest bins; wider ones need no more."""

_LEAST = 0.1
"""Noise multiplier below which none is looked for: one step whose rows are all drawn costs 92."""


def _check(epsilon: int | float, delta: int | float, count: int) -> None:
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be > 0 and finite, got {epsilon}")
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), got {delta}")
    if count < 1:
        raise ValueError(f"count must be >= 1, got {count}")


def noise_for_gaussian(epsilon: int | float, delta: int | float, *, count: int = 1) -> float:
    """Return the standard deviation, over L2 sensitivity, of each of so many releases.

    Exact, unlike ``sqrt(2 log(1.25 / delta)) / epsilon``, which is proven for an epsilon up to 1
    alone and gives 10.39 where 10 is wanted.

    Args:
        epsilon: of all releases together, > 0.
        delta: in (0, 1).
        count: releases, >= 1.

    Raises:
        ValueError: naming what is out of range.

    Source:
        Balle and Wang, 2018, algorithm 1. https://arxiv.org/abs/1805.06530

    Examples:
        >>> from fedkd.privacy import noise_for_gaussian
        >>> once = noise_for_gaussian(1.0, 1e-5)
        >>> round(noise_for_gaussian(1.0, 1e-5, count=4) / once, 6)  # Gaussians add up as squares
        2.0
    """
    from scipy.optimize import brentq

    _check(epsilon, delta, count)

    def over(log_mu: float) -> float:
        return gaussian_delta(math.exp(log_mu), epsilon) - delta

    # The search may stop a rounding off, on either side: a little more noise than found is enough.
    mu = math.exp(brentq(over, math.log(1e-100), math.log(1e100), xtol=1e-14))
    return math.sqrt(count) / mu * (1 + 1e-13)


def noise_for_sampled_gaussian(
    epsilon: int | float,
    delta: int | float,
    *,
    sample_rate: int | float,
    steps: int,
    grid: int | float = GRID,
) -> float:
    """Return the noise multiplier of DP-SGD, to a millionth from above.

    Args:
        epsilon: of all steps together, > 0.
        delta: in (0, 1).
        sample_rate: with which each row is drawn for a step, in (0, 1].
        steps: >= 1.
        grid: width of the bins that losses are rounded up to, in (0, 1]. With 1e-3 the search takes
            a tenth of the time, and finds a little more noise, never less.

    Returns:
        At least 0.1: where delta is so large, or epsilon, that less would do, that.

    Raises:
        ValueError: naming what is out of range.
    """
    from scipy.optimize import brentq

    _check(epsilon, delta, steps)
    if sample_rate == 1:
        return noise_for_gaussian(epsilon, delta, count=steps)

    @cache
    def costs(noise: float) -> float:
        return spent([SampledGaussian(steps, noise, sample_rate)], delta=delta, grid=grid).epsilon

    low, high = _bracket(epsilon, delta, sample_rate, steps)
    while costs(high) > epsilon:
        low, high = high, 2 * high
    while high > _LEAST and costs(low) <= epsilon:
        low, high = max(low / 1.25, _LEAST), low
    if high <= _LEAST:
        return high
    close = _CLOSE / 4 * max(1.0, grid / GRID) ** 2
    # The logarithms of noise and epsilon are close to a line, so that few evaluations are needed.
    found = math.exp(
        brentq(
            # Where delta alone is enough, epsilon is 0.
            lambda log_noise: math.log(max(costs(math.exp(log_noise)) / epsilon, 1e-3)),
            math.log(low),
            math.log(high),
            xtol=close,
        )
    )
    while costs(found) > epsilon:
        found *= 1 + close
    return found


def _bracket(
    epsilon: int | float, delta: int | float, sample_rate: int | float, steps: int
) -> tuple[float, float]:
    """Return a noise that may be too little and one that is enough, by Renyi divergences alone.

    These take a hundredth of the time of loss distributions, which allow some tenth less noise.
    """

    def enough(noise: float) -> bool:
        event = SampledGaussian(steps, noise, sample_rate)
        return renyi_epsilon([event], delta=delta) <= epsilon

    # Rows that are all drawn need as much: no more is looked at, since Renyi's bound does not fall
    # to 0 however much noise there is.
    most = max(noise_for_gaussian(epsilon, delta, count=steps), _LEAST)
    high = min(1.0, most)
    while high < most and not enough(high):
        high = min(2 * high, most)
    low = max(high / 2, _LEAST)
    while low > _LEAST and enough(low):
        low, high = max(low / 2, _LEAST), low
    while high > 1.05 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return max(high / 1.15, _LEAST), high


def noise_for_laplace(
    epsilon: int | float, delta: int | float, *, count: int = 1, grid: int | float = GRID
) -> float:
    """Return the scale, over L1 sensitivity, of each of so many Laplace releases.

    Args:
        epsilon: of all releases together, > 0.
        delta: in (0, 1).
        count: releases, >= 1.
        grid: width of the bins that losses are rounded up to, in (0, 1]: that by which the releases
            are accounted for, or else they seem to cost a little more than is wanted.

    Raises:
        ValueError: naming what is out of range.

    Examples:
        >>> from fedkd.privacy import noise_for_laplace
        >>> 0 < noise_for_laplace(2.0, 1e-5) < noise_for_laplace(1.0, 1e-5)
        True
    """
    _check(epsilon, delta, count)

    def costs(scale: float) -> float:
        return spent([Laplace(count, scale)], delta=delta, grid=grid).epsilon

    # Pure composition is always enough; less noise may be.
    enough = count / epsilon
    low = enough
    while costs(low / 2) <= epsilon:
        low /= 2
    return _least(costs, epsilon, low / 2, enough)


def epsilon_for_randomized_response(
    epsilon: int | float, delta: int | float, *, count: int, classes: int
) -> float:
    """Return the epsilon of each of so many answers.

    Args:
        epsilon: of all answers together, > 0.
        delta: in (0, 1).
        count: answers, >= 1.
        classes: to choose from, >= 2.

    Raises:
        ValueError: naming what is out of range.
    """
    _check(epsilon, delta, count)

    def costs(inverse: float) -> float:
        return spent([RandomizedResponse(count, 1 / inverse, classes)], delta=delta).epsilon

    enough = count / epsilon
    low = enough
    while costs(low / 2) <= epsilon:
        low /= 2
    return 1 / _least(costs, epsilon, low / 2, enough)


def _least(
    costs: Callable[[float], float], epsilon: int | float, low: float, enough: float
) -> float:
    """Return the least noise that costs no more than epsilon, to a millionth from above."""
    while enough > low * (1 + _CLOSE):
        middle = math.sqrt(low * enough)
        if costs(middle) <= epsilon:
            enough = middle
        else:
            low = middle
    return enough
