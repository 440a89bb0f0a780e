"""What a comparison of arms amounts to, in sentences that claim no more than was measured."""

from collections.abc import Mapping, Sequence

from sim.reports.runs import RunRecord
from sim.reports.statistics import (
    CONFIDENCE,
    ENOUGH_SEEDS,
    Difference,
    baseline_of,
    compare_arms,
    corrected,
)


def verdicts(
    runs: Mapping[str, Sequence[RunRecord]], baseline: str | None = None
) -> tuple[str, ...]:
    """Say of each arm whether it beats the baseline in mean client accuracy at the last round.

    Args:
        runs: of each arm, one a seed.
        baseline: an arm; the first by default.

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
        f"Against {reference}, by mean client accuracy at the last round"
        + ("; p of the paired t-test" if tests else "")
        + (f", corrected for {tests} comparisons by Holm" if tests > 1 else "")
        + ":",
        *(
            verdict(difference, p_values[arm], arm=arm, baseline=reference)
            for arm, difference in differences.items()
        ),
        *few_seeds(list(differences.values())),
    )


def verdict(
    difference: Difference | None, corrected_p: float | None, *, arm: str, baseline: str
) -> str:
    """Say whether an arm beats another, by how much, and how sure that is.

    It is said to be decided where the p-value, corrected for the number of comparisons, is below
    0.05.

    Args:
        difference: arm - baseline, a share.
        corrected_p: after Holm; None where nothing can be tested.
        arm: its name.
        baseline: the name of the other.
    """
    if difference is None:
        return f"{arm} and {baseline} cannot be compared: no seed is finished in both."
    points = round(100 * difference.mean, 1) + 0.0
    size = f"{abs(points):.1f} points"
    if difference.n == 1:
        return f"{arm} is {_place(points, size, baseline)} with one seed: no interval, no test."
    evidence = f"{_interval(difference)}; {_test(difference, corrected_p)}"
    if corrected_p is not None and corrected_p < 1 - CONFIDENCE:
        beats = f"{arm} beats {baseline}" if points > 0 else f"{arm} falls behind {baseline}"
        return f"{beats} by {size} ({evidence})."
    undecided = f"It is undecided whether {arm} beats {baseline}"
    return f"{undecided}: {_place(points, size, '')} ({evidence})."


def few_seeds(differences: Sequence[Difference | None]) -> tuple[str, ...]:
    """Say what tests on few pairs cannot show, where there are some."""
    counts = [value.n for value in differences if value is not None and value.few and value.n > 1]
    if not counts:
        return ()
    fewest = min(counts)
    return (
        f"* {fewest} seeds are few: intervals and p assume normal differences, which so few cannot "
        f"show. The exact sign-flip test, which assumes nothing, cannot go below "
        f"{2 / 2**fewest:.3g} with {fewest} pairs, nor below 0.05 with fewer than {ENOUGH_SEEDS} "
        f"(--seeds {ENOUGH_SEEDS}).",
    )


def _place(points: float, size: str, baseline: str) -> str:
    if points == 0:
        return f"level with {baseline}".rstrip() if baseline else "level"
    ahead = "ahead of" if baseline else "ahead"
    return f"{size} {ahead if points > 0 else 'behind'} {baseline}".rstrip()


def _interval(difference: Difference) -> str:
    if difference.low is None or difference.high is None:
        return "no interval"
    low, high = (round(100 * end, 1) + 0.0 for end in (difference.low, difference.high))
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
