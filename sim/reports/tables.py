"""The summary for the terminal and for programs."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sim.reports.grids import Grid
from sim.reports.power import PRECISION
from sim.reports.runs import RunRecord, number
from sim.reports.statistics import (
    ACCURACIES,
    MEASURES,
    ArmSummary,
    Difference,
    Estimate,
    baseline_of,
    compare_arms,
    compare_pairs,
    corrected,
    is_decided,
    measured,
    measured_title,
    summarize,
)
from sim.reports.terminal import NOTHING, Column, FittedTable

FEW = "*"
"""Marks intervals and p-values that rest on few seeds."""


def percent(value: Estimate | Difference | None, *, signed: bool = False) -> str:
    """Write a share as percent with the half width of its interval: ``91.3 ±0.4``.

    An interval that is cut off at what is possible has two ends instead, ``91.3 [80.2, 100]``; one
    that rests on few seeds is marked, ``91.3 ±0.4*``.
    """
    if value is None:
        return NOTHING
    text = points(value.mean, signed=signed)
    if value.low is None or value.high is None:
        return text
    half = value.half_width
    interval = (
        f"[{_end(value.low, signed=signed)}, {_end(value.high, signed=signed)}]"
        if half is None
        else f"±{100 * half:.1f}"
    )
    return f"{text} {interval}{FEW if value.few else ''}"


def points(share: float, *, signed: bool = True) -> str:
    """Write a share, or a difference of shares, in percentage points."""
    # Adding 0 turns -0.0, which would read as a loss, into 0.0.
    value = round(100 * share, 1) + 0.0
    return f"{value:+.1f}" if signed else f"{value:.1f}"


def _end(share: float, *, signed: bool) -> str:
    return points(share, signed=signed).removesuffix(".0")


def kilobytes(value: Estimate | int | float | None) -> str:
    """Write bytes as kB of 1000 bytes; few bytes are not written as none."""
    if value is None:
        return NOTHING
    amount = (value.mean if isinstance(value, Estimate) else value) / 1e3
    return f"{amount:.2g}" if 0 < amount < 0.1 else f"{amount:,.1f}"


def simulated_seconds(value: Estimate | None) -> str:
    """Write simulated seconds, of which there may be very few."""
    if value is None:
        return NOTHING
    return f"{value.mean:,.1f}" if value.mean >= 10 else f"{value.mean:.3g}"


def seconds_to_target(summary: ArmSummary) -> str:
    """Write when the mean client first had the target accuracy, and how many runs had it."""
    asked = len(summary.targets)
    if not asked:
        return NOTHING
    if summary.to_target is None:
        return "never"
    reached = summary.to_target.n
    some = "" if reached == asked else f" ({reached} of {asked})"
    return simulated_seconds(summary.to_target) + some


def target_title(summaries: Sequence[ArmSummary]) -> str:
    """Name the column of `seconds_to_target`."""
    targets = {target for summary in summaries for target in summary.targets}
    return f"s to {100 * targets.pop():g} %" if len(targets) == 1 else "s to target"


def measure_text(key: str, summary: ArmSummary) -> str:
    """Write one of `MEASURES`."""
    value = summary.measures.get(key)
    if MEASURES[key].share:
        return percent(value)
    return NOTHING if value is None else f"{value.mean:,.{MEASURES[key].decimals}f}"


def epsilon_text(value: float | None) -> str:
    """Write what of privacy was spent."""
    return NOTHING if value is None else f"{value:.4g}"


def audit_text(audit: Mapping[str, Any]) -> str:
    """Write what an audit proved of a client, and whether it contradicts what was claimed."""
    keys = ("client", "right", "guesses", "epsilon_lower", "confidence")
    client, right, guesses, lower, confidence = (number(audit, key) or 0 for key in keys)
    claimed = number(audit, "claimed")
    said = "nothing was claimed" if claimed is None else f"claimed {epsilon_text(claimed)}"
    verdict = ", CONTRADICTED" if audit.get("contradicted") is True else ""
    proven = f"so epsilon > {epsilon_text(lower)}" if lower else "which proves nothing"
    return (
        f"audit of client {client:.0f}: {right:,.0f} of {guesses:,.0f} guesses right, {proven} "
        f"({confidence:.0%}); {said}{verdict}"
    )


def p_text(p_value: float | None, *, few: bool = False) -> str:
    """Write a p-value as reports do, marked where it rests on few seeds."""
    if p_value is None:
        return NOTHING
    return ("<0.001" if p_value < 0.001 else f"{p_value:.3f}") + (FEW if few else "")


def summary_table(
    runs: Mapping[str, Sequence[RunRecord]],
    baseline: str | None = None,
    refused: Collection[str] = (),
) -> FittedTable:
    """Return one line an arm for the terminal: the last round, and accuracy at the selected one.

    Args:
        runs: of each arm, one a seed.
        baseline: the arm that the others are compared with; the first by default.
        refused: arms that could not run; each has a line without numbers.

    Raises:
        SettingsError: if the baseline is none of the arms.
    """
    summaries = _summaries(runs)
    reference = baseline_of({summary.arm: None for summary in summaries}, baseline)
    differences = compare_arms(runs, "accuracy", "last", baseline)
    p_holm = corrected(differences)

    def column(title: str, rank: int, cells: Sequence[str], needs: str = "") -> Column:
        return Column(title=title, cells=cells, rank=rank, needs=needs)

    def against(text: str, arm: str) -> str:
        return "" if arm == reference else text

    arms = [summary.arm for summary in summaries]
    few = {arm: value is not None and value.few for arm, value in differences.items()}
    minus = f"minus {reference}"
    several = sum(p is not None for p in p_holm.values()) > 1
    columns = [
        column("mean client", 1, [percent(summary.last.get("accuracy")) for summary in summaries]),
        column(
            "at best valid.",
            7,
            [percent(_mean_only(summary.selected.get("accuracy"))) for summary in summaries],
        ),
        *(
            column(
                title,
                _RANKS[key],
                [percent(_mean_only(summary.last.get(key))) for summary in summaries],
            )
            for key, title in ACCURACIES.items()
            if key != "accuracy"
        ),
        # Of runs that promise something.
        column("epsilon", 4, [epsilon_text(summary.epsilon) for summary in summaries]),
        column(target_title(summaries), 5, [seconds_to_target(summary) for summary in summaries]),
        column("sim. s", 6, [simulated_seconds(summary.simulated_s) for summary in summaries]),
        column("kB up", 6, [kilobytes(summary.bytes_up) for summary in summaries]),
        column("kB down", 6, [kilobytes(summary.bytes_down) for summary in summaries]),
        # Without any number a column is left out.
        *(
            column(measure.title, measure.rank, [measure_text(key, each) for each in summaries])
            for key, measure in MEASURES.items()
        ),
        column(
            "s",
            11,
            [
                NOTHING if summary.seconds is None else f"{summary.seconds.mean:.1f}"
                for summary in summaries
            ],
        ),
        column(
            minus, 2, [against(percent(differences.get(arm), signed=True), arm) for arm in arms]
        ),
        column(
            "p",
            3,
            [
                against(p_text(_p_value(differences.get(arm)), few=few.get(arm, False)), arm)
                for arm in arms
            ],
            needs=minus,
        ),
    ]
    if several:
        cells = [against(p_text(p_holm.get(arm), few=few.get(arm, False)), arm) for arm in arms]
        columns.append(column("p (Holm)", 4, cells, needs="p"))
    labels = {
        summary.arm: summary.arm + ("" if summary.finished else " (interrupted)")
        for summary in summaries
    }
    shown = [arm for arm in runs if arm in labels or arm in refused]
    return FittedTable(
        label="arm",
        labels=[labels.get(arm, f"{arm} (refused)") for arm in shown],
        columns=[
            replace(each, cells=_in_places(dict(zip(arms, each.cells, strict=True)), shown))
            for each in columns
        ],
        title="test split, % at the last round; mean over seeds ± 95 % t-interval",
        caption=_caption(summaries, several=several),
    )


def _in_places(cells: Mapping[str, str], arms: Sequence[str]) -> list[str]:
    return [cells.get(arm, NOTHING) for arm in arms]


def plane_tables(
    runs: Mapping[str, Sequence[RunRecord]], grid: Grid, refused: Collection[str] = ()
) -> list[FittedTable]:
    """Return the accuracies of a sweep as tables: rows x columns, one for each third value.

    Args:
        runs: of each arm, one a seed.
        grid: of the sweep.
        refused: arms that could not run.

    Returns:
        Nothing where more than three settings are swept over.
    """
    title = f"{measured_title(runs)}, last round, %"

    def cell(arm: str) -> str:
        return "refused" if arm in refused else percent(measured(runs.get(arm, ())))

    return [
        FittedTable(
            label=plane.rows.title,
            labels=plane.rows.labels,
            columns=[
                Column(
                    title=f"{plane.columns.title} {label}",
                    cells=[cell(line[place]) for line in plane.arms],
                    rank=place,
                )
                for place, label in enumerate(plane.columns.labels)
            ],
            title=f"{plane.title} ({title})" if plane.title else title,
        )
        for plane in grid.planes
    ]


_RANKS = {
    # Of runs with an adversary alone.
    "honest_accuracy": 4,
    "attack_success": 4,
    "worst_accuracy": 5,
    "server_accuracy": 8,
    "ensemble_accuracy": 9,
    "personal_accuracy": 10,
    "macro_recall": 12,
}


def _p_value(difference: Difference | None) -> float | None:
    return None if difference is None else difference.p_value


def _mean_only(value: Estimate | None) -> Estimate | None:
    return None if value is None else Estimate(value.mean, None, None, value.n)


def _caption(summaries: Sequence[ArmSummary], *, several: bool) -> str:
    seeds = {summary.seeds for summary in summaries}
    count = len(next(iter(seeds))) if len(seeds) == 1 else 0
    parts = [
        (f"{count} seed{'s' * (count != 1)}" if count else "seeds differ between arms")
        + (f", {FEW} few: intervals and p assume normal differences" if _marked(summaries) else ""),
        "kB per client over the run; s: seconds of the rounds, without start-up",
    ]
    if any("steps" in summary.measures for summary in summaries):
        parts.append("steps, rows and GFLOP: of learning, all clients and the server together")
    if any(summary.epsilon is not None for summary in summaries):
        parts.append("epsilon: the largest of any client, over the whole run")
    if any(summary.simulated_s is not None for summary in summaries):
        parts.append("sim. s: by the simulated clock, as is the time to a target accuracy")
    if len(summaries) > 1:
        parts.append(
            "differences are paired by seed, p of the paired t-test"
            + (", (Holm) corrected for the number of comparisons" if several else "")
        )
    left_out = sum(summary.left_out for summary in summaries)
    if left_out:
        parts.append(f"{left_out} interrupted run(s) left out")
    return "; ".join(parts)


def _marked(summaries: Sequence[ArmSummary]) -> bool:
    return any(
        value.few and value.low is not None
        for summary in summaries
        for value in summary.last.values()
    )


def summary_rows(
    runs: Mapping[str, Sequence[RunRecord]],
    baseline: str | None = None,
    precision: float = PRECISION,
) -> list[dict[str, Any]]:
    """Return one flat row an arm, plain values, None where there is nothing.

    Accuracies are in [0, 1]. ``<key>`` is the mean over seeds at the last round, ``<key>_low``
    and ``<key>_high`` its 95 % t-interval, cut off at 0 and 1; ``<key>_selected...`` the same at
    the round with the best validation accuracy; ``difference...`` is mean client accuracy at the
    last round minus the baseline's (by default the first arm), paired by seed.
    ``difference_p_holm`` is corrected for all rows, ``difference_p_sign_flip`` that of the exact
    sign-flip test; for the others see `difference_row`, where ``precision`` is the half width of
    an interval that is wanted. ``epsilon`` is the largest that any client of any seed has spent;
    None where nothing is promised. ``simulated_s`` is what the simulated clock showed at the end,
    ``simulated_s_to_target`` when the mean client first had ``clock.target_accuracy``, which
    ``reached_target`` runs had. ``steps``, ``rows`` and ``gflops`` are what learning took, of all
    clients and the server together; ``server_steps`` are the server's.
    """
    differences = compare_arms(runs, "accuracy", "last", baseline)
    p_holm = corrected(differences)
    rows = []
    for summary in _summaries(runs):
        row: dict[str, Any] = {
            "arm": summary.arm,
            "seeds": list(summary.seeds),
            "finished": summary.finished,
            "left_out": summary.left_out,
            "last_rounds": list(summary.last_rounds),
            "selected_rounds": list(summary.selected_rounds),
        }
        for key in ACCURACIES:
            row.update(flat(key, summary.last.get(key)))
            row.update(flat(f"{key}_selected", summary.selected.get(key)))
        row.update(flat("bytes_up_per_client", summary.bytes_up))
        row.update(flat("bytes_down_per_client", summary.bytes_down))
        for key in MEASURES:
            row.update(flat(key, summary.measures.get(key)))
        row["epsilon"] = summary.epsilon
        row.update(flat("seconds", summary.seconds))
        row.update(flat("simulated_s", summary.simulated_s))
        row.update(flat("simulated_s_to_target", summary.to_target))
        reached = 0 if summary.to_target is None else summary.to_target.n
        row["reached_target"] = reached if summary.targets else None
        difference = differences.get(summary.arm)
        row.update(difference_row("difference", difference, p_holm.get(summary.arm), precision))
        rows.append(row)
    return rows


def pair_rows(
    runs: Mapping[str, Sequence[RunRecord]], precision: float = PRECISION
) -> list[dict[str, Any]]:
    """Return one flat row for every pair of arms: mean client accuracy at the last round.

    ``difference`` is ``other`` minus ``first``; ``difference_p_holm`` is corrected for all pairs;
    for the others see `difference_row`.
    """
    differences = compare_pairs(runs, "accuracy", "last")
    p_holm = corrected(differences)
    return [
        {
            "first": first,
            "other": other,
            **difference_row("difference", value, p_holm[first, other], precision),
        }
        for (first, other), value in differences.items()
    ]


def difference_row(
    key: str,
    value: Difference | None,
    p_holm: float | None,
    precision: float = PRECISION,
) -> dict[str, Any]:
    """Return a difference as flat plain values whose names begin with ``key``.

    ``_p_smallest`` is the smallest p that the sign-flip test of so many pairs can reach,
    ``_decided`` whether one arm is said to beat the other, ``_sd`` the standard deviation of the
    pairs, ``_detectable`` the smallest effect that the t-test of so many finds in 80 % of studies,
    ``_seeds_needed`` how many pairs an interval with the half width ``precision`` needs, and
    ``_seeds_needed_low`` and ``_high`` what that is at the ends of the 95 % interval of the
    standard deviation. All None where they cannot be said.
    """
    needed = None if value is None else value.seeds_needed(precision)
    return {
        **flat(key, value),
        f"{key}_p_value": _p_value(value),
        f"{key}_p_holm": p_holm,
        f"{key}_p_sign_flip": None if value is None else value.p_sign_flip,
        f"{key}_p_smallest": None if value is None else value.p_smallest,
        f"{key}_decided": value is not None and is_decided(value, p_holm),
        f"{key}_ahead": 0 if value is None else value.ahead,
        f"{key}_pairs": 0 if value is None else value.n,
        f"{key}_sd": None if value is None else value.sd,
        f"{key}_detectable": None if value is None else value.detectable,
        f"{key}_seeds_needed": None if needed is None else needed.seeds,
        f"{key}_seeds_needed_low": None if needed is None else needed.low,
        f"{key}_seeds_needed_high": None if needed is None else needed.high,
        f"{key}_precision": precision,
    }


def flat(key: str, value: Estimate | Difference | None) -> dict[str, float | None]:
    """Return a mean and the ends of its interval as plain values whose names begin with ``key``."""
    return {
        key: None if value is None else value.mean,
        f"{key}_low": None if value is None else value.low,
        f"{key}_high": None if value is None else value.high,
    }


def _summaries(runs: Mapping[str, Sequence[RunRecord]]) -> list[ArmSummary]:
    return [summarize(arm, of_arm) for arm, of_arm in runs.items() if of_arm]
