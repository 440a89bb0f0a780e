"""What a comparison of arms amounts to, in sentences that claim no more than was measured."""

import math
from collections.abc import Mapping, Sequence

from sim.reports.families import Questions, compare_families
from sim.reports.power import CONFIDENCE, PRECISION
from sim.reports.runs import RunRecord
from sim.reports.statistics import (
    ENOUGH_SEEDS,
    Difference,
    baseline_of,
    compare_arms,
    corrected,
    is_decided,
    smallest_p,
)


def verdicts(
    runs: Mapping[str, Sequence[RunRecord]],
    baseline: str | None = None,
    precision: float = PRECISION,
) -> tuple[str, ...]:
    """Say of each arm whether it beats the baseline in mean client accuracy at the last round.

    Args:
        runs: of each arm, one a seed.
        baseline: an arm; the first by default.
        precision: the half width of an interval that is wanted, a share.

    Returns:
        A heading, a sentence for each other arm, and a remark where seeds are few; nothing where
        there is a single arm.

    Raises:
        SettingsError: if the baseline is none of the arms.
    """
    runs = {arm: of_arm for arm, of_arm in runs.items() if of_arm}
    reference = baseline_of(runs, baseline)
    differences = compare_arms(runs, "accuracy", "last", baseline)
    if not differences:
        return ()
    p_values = corrected(differences)
    tests = sum(p is not None for p in p_values.values())
    return (
        f"Against {reference}, by {_measure_told(tests)}:",
        *(
            verdict(difference, p_values[arm], arm=arm, baseline=reference, precision=precision)
            for arm, difference in differences.items()
        ),
        *few_seeds(list(differences.values()), comparisons=max(tests, 1)),
    )


MOST_SAID = 16
"""Of more pairs tables say enough."""


def answers(
    runs: Mapping[str, Sequence[RunRecord]], questions: Questions, precision: float = PRECISION
) -> tuple[str, ...]:
    """Say of each pair that a study asks about which arm is ahead.

    Args:
        runs: of each arm, one a seed.
        questions: pairs of arms that have no runs are left out.
        precision: the half width of an interval that is wanted, a share.

    Returns:
        For each question a heading, a sentence for each pair, and a remark where seeds are few;
        nothing where there are no pairs, or more than `MOST_SAID`.
    """
    found = compare_families(runs, questions)
    if not 0 < sum(map(len, found.values())) <= MOST_SAID:
        return ()
    told: list[str] = []
    for name, pairs in found.items():
        tests = sum(p is not None for _, p in pairs.values())
        told.append(f"{_upper(name)}, by {_measure_told(tests)}:")
        told += [
            verdict(difference, p, arm=other, baseline=first, precision=precision)
            for (first, other), (difference, p) in pairs.items()
        ]
        told += few_seeds([value for value, _ in pairs.values()], comparisons=max(tests, 1))
    return tuple(told)


def _upper(name: str) -> str:
    return name[:1].upper() + name[1:]


def _measure_told(tests: int) -> str:
    return (
        "mean client accuracy at the last round"
        + ("; p of the paired t-test" if tests else "")
        + (f", corrected for {tests} comparisons by Holm" if tests > 1 else "")
    )


def verdict(
    difference: Difference | None,
    corrected_p: float | None,
    *,
    arm: str,
    baseline: str,
    precision: float = PRECISION,
) -> str:
    """Say whether an arm beats another, by how much, and how sure that is.

    What is undecided is told what so many seeds could have seen, and how many would do. Two seeds
    are called two seeds, and decide nothing.

    Args:
        difference: arm - baseline, a share.
        corrected_p: after Holm; None where nothing can be tested.
        arm: its name.
        baseline: the name of the other.
        precision: the half width of an interval that is wanted, a share.
    """
    if difference is None:
        return f"{arm} and {baseline} cannot be compared: no seed is finished in both."
    points = _points(difference.mean)
    size = f"{abs(points):.1f} points"
    if difference.n == 1:
        return f"{arm} is {_place(points, size, baseline)} with one seed: no interval, no test."
    if difference.n == 2:
        each = " and ".join(f"{_points(pair):+.1f}" for pair in difference.pairs)
        return f"{arm} is {_place(points, size, baseline)} with two seeds ({each}): no verdict."
    evidence = f"{_interval(difference)}; {_test(difference, corrected_p)}"
    if is_decided(difference, corrected_p):
        beats = f"{arm} beats {baseline}" if points > 0 else f"{arm} falls behind {baseline}"
        return f"{beats} by {size} ({evidence})."
    undecided = f"It is undecided whether {arm} beats {baseline}"
    said = f"{undecided}: {_place(points, size, '')} ({evidence})."
    return f"{said} {_what_would_do(difference, precision)}".rstrip()


def _what_would_do(difference: Difference, precision: float) -> str:
    """Say what so many seeds could have seen, and how many give an interval as wanted."""
    needed = difference.seeds_needed(precision)
    if needed is None or difference.detectable is None:
        return ""
    seen = (
        f"{100 * difference.detectable:.1f} points"
        if difference.detectable < 1
        else "no difference that is possible"
    )
    return (
        f"{difference.n} such seeds find {seen} in 4 of 5 studies; an interval of "
        f"±{100 * precision:g} takes about {needed.seeds:,}."
    )


def few_seeds(differences: Sequence[Difference | None], *, comparisons: int = 1) -> tuple[str, ...]:
    """Say what tests on few pairs cannot show, where there are some.

    Args:
        differences: that are told of.
        comparisons: for how many their p is corrected.
    """
    fewest = min((each.n for each in differences if each is not None and each.n > 1), default=0)
    enough = _enough_for_signs(comparisons)
    if not fewest or fewest >= enough:
        return ()
    corrected = f" corrected for {comparisons} comparisons" if comparisons > 1 else ""
    least = min(1.0, comparisons * smallest_p(fewest))
    exact = (
        f"The exact sign-flip test, which assumes nothing, cannot go below {least:.3g}{corrected} "
        f"with {fewest} pairs, nor below 0.05 with fewer than {enough} (--seeds {enough})."
    )
    if fewest >= ENOUGH_SEEDS:
        return (exact,)
    return (
        f"* {'two' if fewest == 2 else fewest} seeds are few: intervals and p assume normal "
        f"differences, which so few cannot show. {exact}",
    )


def _enough_for_signs(comparisons: int) -> int:
    """Return with how many pairs the exact test can reach 0.05, corrected for so many by Holm."""
    return 1 + math.ceil(math.log2(comparisons / (1 - CONFIDENCE)))


def _points(share: float) -> float:
    # Adding 0 turns -0.0, which would read as a loss, into 0.0.
    return round(100 * share, 1) + 0.0


def _place(points: float, size: str, baseline: str) -> str:
    if points == 0:
        return f"level with {baseline}".rstrip() if baseline else "level"
    ahead = "ahead of" if baseline else "ahead"
    return f"{size} {ahead if points > 0 else 'behind'} {baseline}".rstrip()


def _interval(difference: Difference) -> str:
    if difference.low is None or difference.high is None:
        return "no interval"
    low, high = _points(difference.low), _points(difference.high)
    edge = ", cut off at what is possible" if difference.clipped else ""
    return f"95 % interval {low:+.1f} to {high:+.1f}{edge}"


def _test(difference: Difference, corrected_p: float | None) -> str:
    ahead = f"ahead in {difference.ahead} of {difference.n} seeds"
    if difference.p_value is None:
        return f"no test: all seeds differ by the same; {ahead}"
    text = f"p {_p(difference.p_value)}"
    if corrected_p is not None and corrected_p != difference.p_value:
        text += f", corrected {_p(corrected_p)}"
    return f"{text}; {ahead}"


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"
