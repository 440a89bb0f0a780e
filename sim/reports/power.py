"""How much so many seeds can see, and how many a wanted precision needs.

Both go by the standard deviation of the differences that were seen, which few seeds tell badly: the
chi-square interval of it stands beside what is made of it. Nothing here is a normal approximation:
at three seeds that is wrong by half.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

CONFIDENCE = 0.95
"""Of every interval, and 1 minus the level of every test."""

POWER = 0.8
"""An effect counts as one that seeds could have seen where the test finds it so often."""

PRECISION = 0.01
"""The half width of an interval that is wanted by default: one point."""


@dataclass(frozen=True, slots=True)
class SeedsNeeded:
    """How many seeds give an interval of a wanted half width.

    Attributes:
        seeds: if the standard deviation is as it was seen.
        low, high: if it is at the lower or the upper end of its own 95 % interval.
    """

    seeds: int
    low: int
    high: int


def power_of(effect: float, sd: float, count: int) -> float:
    """Return how often the two-sided paired t-test at 5 % finds an effect.

    Args:
        effect: the true mean of differences.
        sd: their true standard deviation, > 0.
        count: pairs, >= 2.

    Returns:
        A probability: 0.05 without an effect.

    Source:
        Student's t with the noncentrality ``effect * sqrt(count) / sd``; Johnson, Kotz and
        Balakrishnan, 1995, Continuous Univariate Distributions 2, chapter 31.
    """
    return _power(abs(effect) * math.sqrt(count) / sd, count)


def detectable_effect(sd: float, count: int) -> float:
    """Return the smallest effect that the paired t-test at 5 % finds in 80 % of studies.

    Args:
        sd: standard deviation of differences, >= 0.
        count: pairs, >= 2.
    """
    return _detectable_noncentrality(count) * sd / math.sqrt(count)


def seeds_for(half_width: float, sd: float) -> int:
    """Return the fewest pairs whose 95 % t-interval is at most so wide to either side.

    Args:
        half_width: that is wanted, > 0.
        sd: standard deviation of differences, >= 0.
    """

    def enough(count: int) -> bool:
        return t_quantile(count) * sd / math.sqrt(count) <= half_width

    few, many = 1, 2
    while not enough(many):
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if enough(middle) else (middle, many)
    return many


def seeds_needed(half_width: float, sd: float, count: int) -> SeedsNeeded:
    """Return `seeds_for` with what the doubt about the standard deviation makes of it.

    Args:
        half_width: that is wanted, > 0.
        sd: as ``count`` pairs showed it.
        count: pairs, >= 2.
    """
    low, high = sd_interval(sd, count)
    return SeedsNeeded(*(seeds_for(half_width, each) for each in (sd, low, high)))


def sd_interval(sd: float, count: int) -> tuple[float, float]:
    """Return the 95 % chi-square interval of a standard deviation, of normal values.

    Args:
        sd: with ``count - 1`` in the denominator.
        count: values, >= 2.
    """
    from scipy import special

    freedom, tail = count - 1, (1 - CONFIDENCE) / 2
    # chdtri takes the probability above.
    high, low = (float(special.chdtri(freedom, above)) for above in (1 - tail, tail))
    return sd * math.sqrt(freedom / low), sd * math.sqrt(freedom / high)


def t_quantile(count: int) -> float:
    """Return how many standard errors of ``count`` values a 95 % t-interval reaches."""
    from scipy import special  # imported late: a single run has no interval

    return float(special.stdtrit(count - 1, (1 + CONFIDENCE) / 2))


@lru_cache(maxsize=1024)
def _detectable_noncentrality(count: int) -> float:
    from scipy import optimize

    # Power at the upper end is at least P(chi <= 2 sqrt(freedom)) * P(Z >= -2) > 0.93.
    found = optimize.brentq(
        lambda shift: _power(shift, count) - POWER, 0, 2 * t_quantile(count) + 2, xtol=1e-13
    )
    return float(found)


def _power(shift: float, count: int) -> float:
    from scipy import special

    quantile = t_quantile(count)
    above = 1 - special.nctdtr(count - 1, shift, quantile)
    # SciPy has no number where this tail is below anything that could be seen.
    below = np.nan_to_num(special.nctdtr(count - 1, shift, -quantile))
    return float(above + below)
