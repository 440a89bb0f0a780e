"""From runs to numbers: means over seeds with intervals, differences paired by seed.

A seed fixes the data split and the initial weights for every arm, so runs of one seed are pairs
and their difference says more than the difference of two means. Intervals are two-sided 95 %
t-intervals over seeds: they cover what another seed would change, not another data set.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Literal

import numpy as np

from sim.reports.runs import RunRecord, number
from sim.settings import SettingsError

CONFIDENCE = 0.95

ACCURACIES: Mapping[str, str] = MappingProxyType(
    {
        "accuracy": "mean client",
        "worst_accuracy": "worst client",
        "personal_accuracy": "own mix",
        "macro_recall": "macro recall",
        "server_accuracy": "server model",
        "ensemble_accuracy": "ensemble",
    }
)
"""What is measured on the common test split, in [0, 1]: key of a federation row and its title."""

At = Literal["last", "selected"]
"""The last judged round, or the round with the best mean validation accuracy."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: over ``n`` seeds.
        low, high: ends of the 95 % t-interval; None for one seed.
        n: how many seeds had a value.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def half_width(self) -> float | None:
        """Distance from the mean to either end of the interval."""
        return None if self.high is None else self.high - self.mean


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean of the differences other - first over pairs.

    Attributes:
        mean: positive where the other is larger.
        low, high: ends of the 95 % t-interval; None for one pair.
        p_value: of the two-sided paired t-test, not corrected for the number of comparisons;
            None for one pair, or where all pairs differ by the same amount other than 0.
        n: pairs.
    """

    mean: float
    low: float | None
    high: float | None
    p_value: float | None
    n: int

    @property
    def half_width(self) -> float | None:
        """Distance from the mean to either end of the interval."""
        return None if self.high is None else self.high - self.mean


@dataclass(frozen=True, kw_only=True)
class ArmSummary:
    """The runs of one arm, averaged over seeds.

    Attributes:
        arm: its name.
        seeds: of the runs that count.
        left_out: interrupted runs that do not count because others are finished.
        finished: False if the arm has interrupted runs only, which then count as far as they got.
        last_rounds, selected_rounds: of each run that counts, in the order of ``seeds``; None
            where nothing was judged.
        last, selected: by key of `ACCURACIES`, at the last and at the selected round; without
            the keys that no run measured.
        bytes_up, bytes_down: totals over the run, averaged over clients.
        seconds: wall time of the rounds.
    """

    arm: str
    seeds: tuple[int, ...]
    left_out: int
    finished: bool
    last_rounds: tuple[int | None, ...]
    selected_rounds: tuple[int | None, ...]
    last: Mapping[str, Estimate]
    selected: Mapping[str, Estimate]
    bytes_up: Estimate | None
    bytes_down: Estimate | None
    seconds: Estimate | None


def estimate(values: Sequence[float]) -> Estimate | None:
    """Return the mean with its 95 % t-interval, or None without values.

    Equal values have an interval of width 0.
    """
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Estimate(mean, None, None, 1)
    half = _half_width(values)
    return Estimate(mean, mean - half, mean + half, len(values))


def _half_width(values: Sequence[float]) -> float:
    from scipy import stats  # imported late: a single run has no interval and need not wait for it

    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def paired_difference(first: Sequence[float], other: Sequence[float]) -> Difference:
    """Compare two arms over the seeds that both have: other - first.

    Where all pairs differ by the same amount (up to rounding) the t statistic is 0/0 or
    infinite. No difference at all then has p = 1; any other p is None, since a p of 0 would
    claim certainty from a handful of pairs. The interval has width 0.

    Args:
        first: one finite value a seed.
        other: the same of the other arm, in the same order of seeds.

    Raises:
        ValueError: if the lengths differ, there is no pair, or a value is not finite.

    Source:
        Student, 1908; as ``scipy.stats.ttest_rel``.
    """
    if len(first) != len(other) or not first:
        raise ValueError(
            f"need the same number of values >= 1 of both arms, got {len(first)} and {len(other)}"
        )
    one, two = np.asarray(first, np.float64), np.asarray(other, np.float64)
    if not (np.isfinite(one).all() and np.isfinite(two).all()):
        raise ValueError(f"values must be finite, got {list(first)} and {list(other)}")
    differences = two - one
    mean = math.fsum(differences) / len(differences)
    if len(differences) == 1:
        return Difference(mean, None, None, None, 1)
    rounding = 1e-12 * max(np.abs(one).max(), np.abs(two).max())
    if np.ptp(differences) <= rounding:
        p_value = 1.0 if abs(mean) <= rounding else None
        return Difference(mean, mean, mean, p_value, len(differences))
    from scipy import stats

    half = _half_width(differences.tolist())
    p = float(stats.ttest_rel(two, one).pvalue)
    return Difference(mean, mean - half, mean + half, p, len(differences))


def difference_by_seed(first: Mapping[int, float], other: Mapping[int, float]) -> Difference | None:
    """Pair two arms by seed; None if they share no seed."""
    shared = sorted(first.keys() & other.keys())
    if not shared:
        return None
    return paired_difference([first[seed] for seed in shared], [other[seed] for seed in shared])


def counted(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the runs of an arm that its numbers are made of, by seed.

    An interrupted run has learnt for fewer rounds and would pull the mean; it counts only where
    there is nothing else to show.

    Raises:
        SettingsError: if two of them have the same seed.
    """
    finished = [run for run in runs if run.status == "finished"]
    chosen = sorted(finished or runs, key=lambda run: run.seed)
    for run, following in pairwise(chosen):
        if run.seed == following.seed:
            raise SettingsError(
                f"arm {run.arm!r} has two runs with seed {run.seed}: {str(run.folder)!r} and "
                f"{str(following.folder)!r}; an arm takes one run a seed"
            )
    return chosen


def values_by_seed(runs: Sequence[RunRecord], key: str, at: At) -> dict[int, float]:
    """Return what the runs that count measured; seeds without a finite value are left out."""
    return {
        run.seed: value
        for run in counted(runs)
        if (value := number(run.last if at == "last" else run.selected, key)) is not None
    }


def compare_arms(
    runs: Mapping[str, Sequence[RunRecord]], key: str, at: At
) -> dict[str, Difference | None]:
    """Compare each arm but the first with the first; None where there is nothing to pair.

    An arm that has interrupted runs only is compared with nothing: it stopped at another round.
    """
    runs = {arm: of_arm for arm, of_arm in runs.items() if of_arm}
    names = list(runs)
    values = {
        arm: values_by_seed(of_arm, key, at) if _is_finished(of_arm) else {}
        for arm, of_arm in runs.items()
    }
    return {arm: difference_by_seed(values[names[0]], values[arm]) for arm in names[1:]}


def _is_finished(runs: Sequence[RunRecord]) -> bool:
    return any(run.status == "finished" for run in runs)


def summarize(arm: str, runs: Sequence[RunRecord]) -> ArmSummary:
    """Average the runs of an arm over seeds."""
    chosen = counted(runs)

    def accuracies(at: At) -> dict[str, Estimate]:
        found = {key: estimate(list(values_by_seed(runs, key, at).values())) for key in ACCURACIES}
        return {key: value for key, value in found.items() if value is not None}

    return ArmSummary(
        arm=arm,
        seeds=tuple(run.seed for run in chosen),
        left_out=len(runs) - len(chosen),
        finished=_is_finished(runs),
        last_rounds=tuple(run.last.get("round") for run in chosen),
        selected_rounds=tuple(run.selected.get("round") for run in chosen),
        last=accuracies("last"),
        selected=accuracies("selected"),
        bytes_up=estimate([sum(run.bytes_up.values()) / run.num_clients for run in chosen]),
        bytes_down=estimate([sum(run.bytes_down.values()) / run.num_clients for run in chosen]),
        seconds=estimate([run.seconds for run in chosen if run.seconds is not None]),
    )
