"""Arm against arm, paired by seed: the answer on top, and every other comparison as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sim.reports.families import Questions, compare_families
from sim.reports.html.drawings import Scale, interval_bar, interval_text
from sim.reports.html.tables import Table
from sim.reports.runs import RunRecord
from sim.reports.statistics import (
    ACCURACIES,
    ArmSummary,
    At,
    Difference,
    baseline_of,
    compare_arms,
    compare_pairs,
    corrected,
)
from sim.reports.tables import FEW, p_text, percent, points
from sim.reports.terminal import NOTHING
from sim.reports.verdicts import answers, verdicts

COMPARED: Sequence[tuple[str, At, str]] = (
    ("accuracy", "last", "mean client, last round"),
    ("accuracy", "selected", "mean client, selected round"),
    ("worst_accuracy", "last", "worst client, last round"),
    ("personal_accuracy", "last", "own mix, last round"),
    ("macro_recall", "last", "macro recall, last round"),
)
"""What arms are compared in: key, round and title."""

HEADER = (
    "points",
    "95 % interval",
    "p",
    "p (Holm)",
    "p (sign-flip)",
    "ahead in",
    "detectable (points)",
)

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True, slots=True)
class Answer:
    """What stands on top of a report.

    Attributes:
        question: what was compared with what, and by which test.
        sentences: one for each arm that is compared; what there is to say of a single one.
        remarks: what so few seeds cannot show.
        effects: each difference with its interval drawn; None without a comparison.
    """

    question: str
    sentences: Sequence[str]
    remarks: Sequence[str]
    effects: Table | None


def answer(
    runs: Mapping[str, Sequence[RunRecord]],
    summaries: Sequence[ArmSummary],
    baseline: str | None,
    precision: float,
    questions: Questions,
) -> Answer:
    """Say what came out, as sentences and as intervals drawn to one scale."""
    asked = answers(runs, questions, precision) if len(questions) == 1 else ()
    said = asked or verdicts(runs, baseline, precision)
    if not said:
        return Answer("", [_reached(summary) for summary in summaries], (), None)
    remarks = [sentence for sentence in said if sentence.startswith(FEW)]
    question, *sentences = (sentence for sentence in said if sentence not in remarks)
    differences = compare_arms(runs, "accuracy", "last", baseline)
    if asked:
        (pairs,) = compare_families(runs, questions).values()
        differences = {f"{other} - {first}": value for (first, other), (value, _) in pairs.items()}
    counts = {value.n for value in differences.values() if value is not None}
    if counts == {1}:
        remarks.insert(0, "One seed says nothing of another: there is no interval and no test.")
    return Answer(question.removesuffix(":") + ".", sentences, remarks, _effects(differences))


def _reached(summary: ArmSummary) -> str:
    seeds = len(summary.seeds)
    told = f"{_NUMBERS[seeds] if seeds < len(_NUMBERS) else seeds} seed{'s' * (seeds != 1)}"
    found = summary.last.get("accuracy")
    if found is None:
        return f"{summary.arm}: no client was judged ({told})."
    others = [
        f"{ACCURACIES[key]} {percent(summary.last[key])} %"
        for key in ("personal_accuracy", "worst_accuracy", "server_accuracy")
        if key in summary.last
    ]
    state = "" if summary.finished else ", interrupted"
    return (
        f"{summary.arm}: {percent(found)} % mean client accuracy on the test split in the last "
        f"round ({told}{state})" + (f"; {', '.join(others)}" if others else "") + "."
    )


def _effects(differences: Mapping[str, Difference | None]) -> Table | None:
    """Draw each difference; with one seed there is a point and no interval."""
    known = {arm: value for arm, value in differences.items() if value is not None}
    if not known:
        return None
    scale = Scale.of(known.values())
    p_holm = corrected(differences)
    rows = [
        [
            arm,
            points(value.mean),
            interval_text(value),
            interval_bar(value, scale),
            p_text(p_holm[arm], few=value.few),
            f"{value.ahead} of {value.n}",
        ]
        for arm, value in known.items()
    ]
    header = ["arm", "points", "95 % interval", scale.text, "p (Holm)", "ahead in"]
    return Table(header, rows, caption="Difference in mean client accuracy, last round")


def difference_table(
    runs: Mapping[str, Sequence[RunRecord]], baseline: str | None, precision: float
) -> Table | None:
    """Compare every arm with the baseline in every measure."""
    if len(runs) < 2:
        return None
    rows = []
    for key, at, title in COMPARED:
        differences = compare_arms(runs, key, at, baseline)
        if at == "selected" and not any(differences.values()):
            continue
        p_holm = corrected(differences)
        rows += [
            [title, arm, *_cells(difference, p_holm[arm], precision)]
            for arm, difference in differences.items()
        ]
    against = baseline_of(runs, baseline)
    return Table(
        _header("accuracy", "arm", precision=precision),
        rows,
        left=2,
        title=against,
        caption=f"Arms minus {against}",
    )


def pair_table(runs: Mapping[str, Sequence[RunRecord]], precision: float) -> Table | None:
    """Compare every arm with every other; two arms have one pair, which stands above already."""
    if len(runs) < 3:
        return None
    differences = compare_pairs(runs, "accuracy", "last")
    p_holm = corrected(differences)
    rows = [
        [other, first, *_cells(difference, p_holm[first, other], precision)]
        for (first, other), difference in differences.items()
    ]
    return Table(
        _header("arm", "minus", precision=precision), rows, left=2, caption="Every pair of arms"
    )


def family_tables(
    runs: Mapping[str, Sequence[RunRecord]], questions: Questions, precision: float
) -> list[Table]:
    """Compare the pairs of each question."""
    return [
        Table(
            _header("arm", "minus", precision=precision),
            [
                [other, first, *_cells(difference, p_holm, precision)]
                for (first, other), (difference, p_holm) in pairs.items()
            ],
            left=2,
            title=name,
            caption=f"Pairs that belong together: {name}",
        )
        for name, pairs in compare_families(runs, questions).items()
    ]


def _header(*first: str, precision: float) -> list[str]:
    return [*first, *HEADER, f"seeds for ±{100 * precision:g}"]


def _cells(difference: Difference | None, p_holm: float | None, precision: float) -> list[str]:
    if difference is None:
        return [*[NOTHING] * 5, "0 of 0", NOTHING, NOTHING]
    few, detectable = difference.few, difference.detectable
    needed = difference.seeds_needed(precision)
    return [
        points(difference.mean),
        interval_text(difference),
        p_text(difference.p_value, few=few),
        p_text(p_holm, few=few),
        p_text(difference.p_sign_flip),
        f"{difference.ahead} of {difference.n}",
        NOTHING if detectable is None else points(detectable, signed=False),
        NOTHING if needed is None else f"{needed.seeds:,}",
    ]
