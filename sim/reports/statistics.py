"""From runs to numbers: means over seeds with intervals, differences paired by seed.

A seed fixes the data split and the initial weights for every arm, so runs of one seed are pairs
and their difference says more than the difference of two means. Intervals are two-sided 95 %
t-intervals over seeds: they cover what another seed would change, not another data set. Where they
would leave what is possible (a share is in [0, 1]) they are cut off there and say so.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from types import MappingProxyType
from typing import Literal, TypeVar

import numpy as np

from fedkd.names import nearest
from sim.reports.power import (
    CONFIDENCE,
    PRECISION,
    SeedsNeeded,
    detectable_effect,
    seeds_needed,
    t_quantile,
)
from sim.reports.runs import RunRecord, number
from sim.settings import SettingsError

ENOUGH_SEEDS = 6
"""With fewer pairs no test that assumes nothing can reach p < 0.05: signs alone reach 2 / 2**n."""

MOST_FLIPPED = 20
"""Up to so many pairs all flips of signs are counted; there are 2**n."""

Bounds = tuple[float, float]
ANYTHING: Bounds = (-math.inf, math.inf)
SHARES: Bounds = (0.0, 1.0)
SHARE_DIFFERENCES: Bounds = (-1.0, 1.0)

Key = TypeVar("Key")

ACCURACIES: Mapping[str, str] = MappingProxyType(
    {
        "accuracy": "mean client",
        "honest_accuracy": "honest clients",
        "worst_accuracy": "worst client",
        "personal_accuracy": "own mix",
        "macro_recall": "macro recall",
        "server_accuracy": "server model",
        "ensemble_accuracy": "ensemble",
        "attack_success": "attack success",
    }
)
"""What is measured on the common test split, in [0, 1]: key of a federation row and its title."""

HONEST = "honest_accuracy"
"""The key of the mean accuracy over honest clients, in rows of runs that have dishonest ones."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A number that some runs have: a column wherever one of the arms has it.

    Attributes:
        title: of the column.
        rank: columns of lower rank find room first in a terminal.
        of: returns that of a run; None where it has none.
        share: whether it is one in [0, 1], which is written in percent with its interval.
        signed: whether that share is a difference, in [-1, 1].
        decimals: of a number that is none.
    """

    title: str
    rank: int
    of: Callable[[RunRecord], float | None]
    share: bool = False
    decimals: int = 1
    signed: bool = False


def _last(title: str, rank: int, key: str, *, signed: bool = False) -> Measure:
    """Return a share in the federation's row of the last judged round."""
    return Measure(title, rank, lambda run: number(run.last, key), share=True, signed=signed)


def _worst_tenth(title: str, rank: int, key: str) -> Measure:
    """Return the mean of the worst clients where a tenth of them are more than the worst one."""
    return Measure(
        title, rank, lambda run: number(run.last, key) if run.num_clients > 10 else None, share=True
    )


MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        "steps": Measure("steps", 8, lambda run: run.effort("steps"), decimals=0),
        "rows": Measure("rows", 9, lambda run: run.effort("rows"), decimals=0),
        "gflops": Measure("GFLOP", 8, lambda run: run.gflops),
        "server_steps": Measure(
            "server steps", 13, lambda run: run.effort("steps", "server"), decimals=0
        ),
        "bits_up": Measure("bits up", 13, lambda run: run.bits.get("up")),
        "bits_down": Measure("bits down", 13, lambda run: run.bits.get("down")),
        "calibration_error": _last("ECE", 14, "calibration_error"),
        "ensemble_gain": _last("ens. gain", 14, "ensemble_gain", signed=True),
        "forgetting": _last("forgetting", 14, "forgetting", signed=True),
        "accuracy_spread": _last("spread", 15, "accuracy_spread"),
        "accuracy_worst_tenth": _worst_tenth("worst 10 %", 15, "accuracy_worst_tenth"),
        "personal_accuracy_spread": _last("own spread", 16, "personal_accuracy_spread"),
        "personal_accuracy_worst_tenth": _worst_tenth(
            "own worst 10 %", 16, "personal_accuracy_worst_tenth"
        ),
        "peer_entropy": Measure(
            "peer entropy", 17, lambda run: number(run.last, "peer_entropy"), decimals=2
        ),
        "peer_diversity": Measure(
            "peer diversity", 17, lambda run: number(run.last, "peer_diversity"), decimals=2
        ),
    }
)
"""What runs may have beside accuracies, by its key in rows of plain values."""

At = Literal["last", "selected"]
"""The last judged round, or the round with the best mean validation accuracy."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: over ``n`` seeds.
        low, high: ends of the 95 % t-interval, cut off at what is possible; None for one seed.
        n: how many seeds had a value.
        clipped: whether the interval was cut off, and is therefore not centred on the mean.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    clipped: bool = False

    @property
    def half_width(self) -> float | None:
        """Distance from the mean to either end of the interval; None where they differ."""
        return None if self.high is None or self.clipped else self.high - self.mean

    @property
    def few(self) -> bool:
        """Whether its interval rests on few seeds, see `ENOUGH_SEEDS`."""
        return self.n < ENOUGH_SEEDS


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean of the differences other - first over pairs.

    Attributes:
        mean: positive where the other is larger.
        low, high: ends of the 95 % t-interval, cut off at what is possible; None for one pair.
        p_value: of the two-sided paired t-test, not corrected for the number of comparisons;
            None for one pair, or where all pairs differ by the same amount other than 0.
        n: pairs.
        clipped: whether the interval was cut off, and is therefore not centred on the mean.
        pairs: other - first of each pair.
    """

    mean: float
    low: float | None
    high: float | None
    p_value: float | None
    n: int
    clipped: bool = False
    pairs: tuple[float, ...] = ()

    @property
    def half_width(self) -> float | None:
        """Distance from the mean to either end of the interval; None where they differ."""
        return None if self.high is None or self.clipped else self.high - self.mean

    @property
    def few(self) -> bool:
        """Whether interval and test rest on few pairs, see `ENOUGH_SEEDS`."""
        return self.n < ENOUGH_SEEDS

    @property
    def ahead(self) -> int:
        """In how many pairs the other is larger."""
        return sum(difference > 0 for difference in self.pairs)

    @property
    def p_sign_flip(self) -> float | None:
        """The p-value of the exact sign-flip test; None beyond `MOST_FLIPPED` pairs."""
        return sign_flip_p(self.pairs) if 1 < len(self.pairs) <= MOST_FLIPPED else None

    @property
    def p_smallest(self) -> float | None:
        """The smallest p-value that the sign-flip test can reach; None as there.

        Pairs without a difference have no sign that could be another, and count for nothing.
        """
        if self.p_sign_flip is None:
            return None
        return smallest_p(sum(difference != 0 for difference in self.pairs))

    @property
    def sd(self) -> float | None:
        """Standard deviation of the pairs; None for one pair, or where all differ by the same."""
        if len(self.pairs) < 2 or self.low == self.high:
            return None
        return float(np.std(self.pairs, ddof=1))

    @property
    def detectable(self) -> float | None:
        """The smallest effect that so many pairs find in 80 % of studies; None without `sd`."""
        return None if self.sd is None else detectable_effect(self.sd, self.n)

    def seeds_needed(self, precision: float = PRECISION) -> SeedsNeeded | None:
        """Return how many pairs an interval of this half width needs; None without `sd`."""
        return None if self.sd is None else seeds_needed(precision, self.sd, self.n)


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
        simulated_s: what the simulated clock showed at the end.
        to_target: what it showed when the mean client first had the target accuracy, of the runs
            that had it.
        targets: the target accuracies of the runs that have a clock and a target.
        measures: by key of `MEASURES`, without those that no run has.
        epsilon: the largest that a client of any of the runs has spent; None where a run promises
            nothing.
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
    simulated_s: Estimate | None = None
    to_target: Estimate | None = None
    targets: tuple[float, ...] = ()
    measures: Mapping[str, Estimate] = field(default_factory=dict)
    epsilon: float | None = None


def estimate(values: Sequence[float], bounds: Bounds = ANYTHING) -> Estimate | None:
    """Return the mean with its 95 % t-interval, or None without values.

    Equal values have an interval of width 0.

    Args:
        values: one a seed.
        bounds: the smallest and the largest value that is possible; the interval ends there.
    """
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Estimate(mean, None, None, 1)
    low, high, clipped = _interval(mean, _half_width(values), bounds)
    return Estimate(mean, low, high, len(values), clipped)


def _half_width(values: Sequence[float]) -> float:
    return t_quantile(len(values)) * _standard_error(values)


def _standard_error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def _interval(mean: float, half: float, bounds: Bounds) -> tuple[float, float, bool]:
    low, high = max(mean - half, bounds[0]), min(mean + half, bounds[1])
    # Rounding may carry a mean of exactly 1 over the edge; nothing is lost there.
    clipped = low - (mean - half) > 1e-12 or (mean + half) - high > 1e-12
    return low, high, clipped


def paired_difference(
    first: Sequence[float], other: Sequence[float], bounds: Bounds = ANYTHING
) -> Difference:
    """Compare two arms over the seeds that both have: other - first.

    Where all pairs differ by the same amount (up to rounding) the t statistic is 0/0 or
    infinite. No difference at all then has p = 1; any other p is None, since a p of 0 would
    claim certainty from a handful of pairs. The interval has width 0.

    Args:
        first: one finite value a seed.
        other: the same of the other arm, in the same order of seeds.
        bounds: the smallest and the largest difference that is possible; the interval ends there.

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
    rounding = 1e-12 * max(np.abs(one).max(), np.abs(two).max())
    # What differs by rounding only is a tie, and nobody is ahead.
    differences = tuple(
        0.0 if abs(difference) <= rounding else difference for difference in (two - one).tolist()
    )
    mean, count = math.fsum(differences) / len(differences), len(differences)
    if count == 1:
        return Difference(mean, None, None, None, 1, pairs=differences)
    if max(differences) - min(differences) <= rounding:
        p_value = 1.0 if mean == 0 else None
        return Difference(mean, mean, mean, p_value, count, pairs=differences)
    low, high, clipped = _interval(mean, _half_width(differences), bounds)
    from scipy import special

    # The two tails beyond t; scipy.stats has the same numbers and takes a second to load.
    p = 2 * float(special.stdtr(count - 1, -abs(mean) / _standard_error(differences)))
    return Difference(mean, low, high, p, count, clipped, differences)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of the exact sign-flip test of paired differences.

    If arms did not differ, each difference could as well have had the other sign. Of all 2**n
    choices of signs this is the share whose mean is at least as far from 0 as the one seen. Nothing
    is assumed of how differences are distributed; with n pairs it is 2 / 2**n at least.

    Raises:
        ValueError: without differences, or with more than can be counted.

    Source:
        Fisher, 1935, The Design of Experiments, section 21.
    """
    if not 0 < len(differences) <= MOST_FLIPPED:
        raise ValueError(f"need 1 to {MOST_FLIPPED} differences, got {len(differences)}")
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    seen = abs(math.fsum(differences))
    rounding = 1e-9 * float(np.abs(differences).sum())
    return float((np.abs(sums) >= seen - rounding).mean())


def smallest_p(count: int) -> float:
    """Return the smallest p-value that the sign-flip test of so many differences can reach.

    They all have one sign then, and of the 2**n choices of signs two are as far from 0: 0.5 for two
    differences, 0.25 for three, 0.0625 for five.
    """
    return min(1.0, 2.0 ** (1 - count))


def holm(p_values: Mapping[Key, float | None]) -> dict[Key, float | None]:
    """Correct p-values of several comparisons, so that one false finding among all is as rare.

    Comparisons that have no p-value stay without and do not count.

    Source:
        Holm, 1979, A simple sequentially rejective multiple test procedure.
    """
    known = {key: p for key, p in p_values.items() if p is not None}
    result: dict[Key, float | None] = dict.fromkeys(p_values)
    largest = 0.0
    for rank, key in enumerate(sorted(known, key=lambda key: known[key])):
        largest = max(largest, min(1.0, (len(known) - rank) * known[key]))
        result[key] = largest
    return result


def corrected(differences: Mapping[Key, Difference | None]) -> dict[Key, float | None]:
    """Return Holm's p-values of comparisons that belong together."""
    return holm(
        {key: None if value is None else value.p_value for key, value in differences.items()}
    )


def is_decided(difference: Difference, corrected_p: float | None) -> bool:
    """Say whether one arm can be said to beat the other.

    It can where the p-value, corrected for the number of comparisons, is below 0.05; never on two
    seeds, whose spread is one number.
    """
    return difference.n > 2 and corrected_p is not None and corrected_p < 1 - CONFIDENCE


def difference_by_seed(
    first: Mapping[int, float], other: Mapping[int, float], bounds: Bounds = SHARE_DIFFERENCES
) -> Difference | None:
    """Pair two arms by seed, by default of shares; None if they share no seed."""
    shared = sorted(first.keys() & other.keys())
    if not shared:
        return None
    return paired_difference(
        [first[seed] for seed in shared], [other[seed] for seed in shared], bounds
    )


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


def epsilon_of(runs: Sequence[RunRecord]) -> float | None:
    """Return the largest epsilon of some runs: no mean, since a promise is kept by the worst.

    None where one of them has none: an arm promises nothing that one of its runs does not.
    """
    spent = [run.epsilon for run in runs]
    known = [epsilon for epsilon in spent if epsilon is not None]
    return max(known) if known and len(known) == len(spent) else None


def values_by_seed(runs: Sequence[RunRecord], key: str, at: At) -> dict[int, float]:
    """Return what the runs that count measured; seeds without a finite value are left out."""
    return {
        run.seed: value
        for run in counted(runs)
        if (value := number(run.last if at == "last" else run.selected, key)) is not None
    }


def compare_arms(
    runs: Mapping[str, Sequence[RunRecord]], key: str, at: At, baseline: str | None = None
) -> dict[str, Difference | None]:
    """Compare each arm with the baseline, by default the first; None where nothing can be paired.

    An arm that has interrupted runs only is compared with nothing: it stopped at another round.
    """
    values = _values_by_arm(runs, key, at)
    reference = baseline_of(values, baseline)
    return {
        arm: difference_by_seed(values[reference], of_arm)
        for arm, of_arm in values.items()
        if arm != reference
    }


def compare_pairs(
    runs: Mapping[str, Sequence[RunRecord]],
    key: str,
    at: At,
    pairs: Sequence[tuple[str, str]] | None = None,
) -> dict[tuple[str, str], Difference | None]:
    """Compare pairs of arms: by (first, other), other - first.

    Args:
        runs: of each arm, one a seed.
        key: of `ACCURACIES`.
        at: which round.
        pairs: of arms that have runs; by default every arm with every other.
    """
    values = _values_by_arm(runs, key, at)
    return {
        (first, other): difference_by_seed(values[first], values[other])
        for first, other in (combinations(values, 2) if pairs is None else pairs)
    }


def baseline_of(arms: Mapping[str, object], baseline: str | None) -> str:
    """Return the arm that the others are compared with; ``""`` where there are no arms.

    Args:
        arms: in their order; the first is the default.
        baseline: the arm asked for.

    Raises:
        SettingsError: if the arm asked for is not there.
    """
    if baseline is None:
        return next(iter(arms), "")
    if baseline not in arms:
        raise SettingsError(
            f"the baseline must be one of the arms ({', '.join(arms)}), got {baseline!r}"
            + nearest(baseline, arms)
        )
    return baseline


def _values_by_arm(
    runs: Mapping[str, Sequence[RunRecord]], key: str, at: At
) -> dict[str, dict[int, float]]:
    return {
        arm: values_by_seed(of_arm, key, at) if _is_finished(of_arm) else {}
        for arm, of_arm in runs.items()
        if of_arm
    }


def _is_finished(runs: Sequence[RunRecord]) -> bool:
    return any(run.status == "finished" for run in runs)


def summarize(arm: str, runs: Sequence[RunRecord]) -> ArmSummary:
    """Average the runs of an arm over seeds."""
    chosen = counted(runs)

    def accuracies(at: At) -> dict[str, Estimate]:
        found = {
            key: estimate(list(values_by_seed(runs, key, at).values()), SHARES)
            for key in ACCURACIES
        }
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
        simulated_s=estimate([run.simulated_s for run in chosen if run.simulated_s is not None]),
        to_target=estimate(
            [run.simulated_s_to_target for run in chosen if run.simulated_s_to_target is not None]
        ),
        targets=tuple(run.target_accuracy for run in chosen if run.target_accuracy is not None),
        measures={key: found for key in MEASURES if (found := _measure(key, chosen)) is not None},
        epsilon=epsilon_of(chosen),
    )


def _measure(key: str, runs: Sequence[RunRecord]) -> Estimate | None:
    measure = MEASURES[key]
    values = [value for run in runs if (value := measure.of(run)) is not None]
    shares = SHARE_DIFFERENCES if measure.signed else SHARES
    return estimate(values, shares if measure.share else ANYTHING)


def measured(runs: Sequence[RunRecord]) -> Estimate | None:
    """Return the mean accuracy of honest clients at the last judged round, over seeds.

    Of all clients where nobody is dishonest; None where nothing was measured.
    """
    values = values_by_seed(runs, HONEST, "last") or values_by_seed(runs, "accuracy", "last")
    return estimate([*values.values()], SHARES)


def measured_title(runs: Mapping[str, Sequence[RunRecord]]) -> str:
    """Say whose accuracy `measured` is."""
    honest = any(values_by_seed(of_arm, HONEST, "last") for of_arm in runs.values())
    return "Mean accuracy of honest clients" if honest else "Mean client accuracy"
