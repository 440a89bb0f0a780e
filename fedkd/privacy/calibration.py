"""How much noise a wanted epsilon takes."""

import math

from fedkd.privacy.accounting import gaussian_delta, spent
from fedkd.privacy.events import SampledGaussian

_CLOSE = 1e-6


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
    """
    from scipy.optimize import brentq

    _check(epsilon, delta, count)

    def over(log_mu: float) -> float:
        return gaussian_delta(math.exp(log_mu), epsilon) - delta

    mu = math.exp(brentq(over, math.log(1e-12), math.log(1e6), xtol=1e-14))
    return math.sqrt(count) / mu


def noise_for_sampled_gaussian(
    epsilon: int | float, delta: int | float, *, sample_rate: int | float, steps: int
) -> float:
    """Return the noise multiplier of DP-SGD, to a millionth from above.

    Args:
        epsilon: of all steps together, > 0.
        delta: in (0, 1).
        sample_rate: with which each row is drawn for a step, in (0, 1].
        steps: >= 1.

    Raises:
        ValueError: naming what is out of range.
    """
    from scipy.optimize import brentq

    _check(epsilon, delta, steps)
    if sample_rate == 1:
        return noise_for_gaussian(epsilon, delta, count=steps)

    def costs(noise: float) -> float:
        return spent([SampledGaussian(steps, noise, sample_rate)], delta=delta).epsilon

    low, high = 0.5, 1.0
    while costs(high) > epsilon:
        low, high = high, 2 * high
    while costs(low) <= epsilon:
        low, high = low / 2, low
    # The logarithms of noise and epsilon are close to a line, so that few evaluations are needed.
    found = math.exp(
        brentq(
            lambda log_noise: math.log(costs(math.exp(log_noise)) / epsilon),
            math.log(low),
            math.log(high),
            xtol=_CLOSE / 4,
        )
    )
    while costs(found) > epsilon:
        found *= 1 + _CLOSE / 4
    return found
