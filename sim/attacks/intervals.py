"""Figures of attacks with their intervals, as plain values: ``[value, low, high]``."""

from collections.abc import Sequence

from fedkd.privacy.attacks.figures import clopper_pearson
from sim.reports.statistics import ANYTHING, Bounds, estimate


def share(hits: int, trials: int) -> list[float]:
    """Return a share with Clopper-Pearson's 95 % interval."""
    return [hits / trials, *clopper_pearson(hits, trials)]


def mean(values: Sequence[float], bounds: Bounds = ANYTHING) -> list[float | None]:
    """Return the mean of one value or more with a 95 % t-interval, of one value without."""
    found = estimate(values, bounds)
    assert found is not None  # noqa: S101
    return [found.mean, found.low, found.high]
