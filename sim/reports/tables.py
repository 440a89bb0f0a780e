"""The summary for the terminal and for programs."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from sim.reports.runs import RunRecord
from sim.reports.statistics import (
    ACCURACIES,
    ArmSummary,
    Difference,
    Estimate,
    compare_arms,
    summarize,
)

NOTHING = "–"  # noqa: RUF001
"""Stands where an arm has no such number."""


def percent(value: Estimate | Difference | None, *, signed: bool = False) -> str:
    """Write a share as percent with the half width of its interval: ``91.3 ±0.4``."""
    if value is None:
        return NOTHING
    # Adding 0 turns -0.0, which would read as a loss, into 0.0.
    mean = round(100 * value.mean, 1) + 0.0
    text = f"{mean:+.1f}" if signed else f"{mean:.1f}"
    half = value.half_width
    return text if half is None else f"{text} ±{100 * half:.1f}"


def kilobytes(value: Estimate | None) -> str:
    """Write bytes as kB of 1000 bytes."""
    return NOTHING if value is None else f"{value.mean / 1e3:,.1f}"


def p_text(difference: Difference | None) -> str:
    """Write a p-value as reports do."""
    if difference is None or difference.p_value is None:
        return NOTHING
    return "<0.001" if difference.p_value < 0.001 else f"{difference.p_value:.3f}"


def summary_table(runs: Mapping[str, Sequence[RunRecord]]) -> Table:
    """Return one line an arm for the terminal: the last round, and accuracy at the selected one.

    Columns that no arm fills are left out, so that the table fits on 100 to 120 columns.
    """
    summaries = _summaries(runs)
    differences = compare_arms(runs, "accuracy", "last")
    first = summaries[0].arm if summaries else ""
    rows = [_cells(summary, differences, first) for summary in summaries]
    table = Table(
        title="test split, % at the last round; mean over seeds ± 95 % t-interval",
        title_justify="left",
        title_style="",
        caption=_caption(summaries),
        caption_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        header_style="bold",
    )
    headers = list(rows[0]) if rows else ["arm"]
    shown = [
        header
        for header in headers
        if header == "arm" or any(row[header] not in (NOTHING, "") for row in rows)
    ]
    for header in shown:
        left = header == "arm"
        table.add_column(
            Text(header),
            justify="left" if left else "right",
            overflow="fold",
            no_wrap=not left,
            min_width=8 if left else None,
        )
    for row in rows:
        # Text: a name such as [red] is no markup.
        table.add_row(*(Text(row[header]) for header in shown))
    return table


def _cells(
    summary: ArmSummary, differences: Mapping[str, Difference | None], first: str
) -> dict[str, str]:
    difference = differences.get(summary.arm)
    marks = "" if summary.finished else " (interrupted)"
    last = {
        title.replace(" ", "\n", 1): percent(_mean_only(summary.last.get(key)))
        for key, title in ACCURACIES.items()
        if key != "accuracy"
    }
    return {
        "arm": summary.arm + marks,
        "mean\nclient": percent(summary.last.get("accuracy")),
        "at best\nvalid.": percent(_mean_only(summary.selected.get("accuracy"))),
        **last,
        "kB\nup": kilobytes(summary.bytes_up),
        "kB\ndown": kilobytes(summary.bytes_down),
        "s": NOTHING if summary.seconds is None else f"{summary.seconds.mean:.1f}",
        "minus\nfirst arm": "" if summary.arm == first else percent(difference, signed=True),
        "p": "" if summary.arm == first else p_text(difference),
    }


def _mean_only(value: Estimate | None) -> Estimate | None:
    return None if value is None else Estimate(value.mean, None, None, value.n)


def _caption(summaries: Sequence[ArmSummary]) -> str:
    seeds = {summary.seeds for summary in summaries}
    parts = [
        f"{len(next(iter(seeds)))} seed(s)" if len(seeds) == 1 else "seeds differ between arms",
        "kB per client over the run; s: seconds of the rounds, without start-up",
    ]
    if len(summaries) > 1:
        parts.append("differences to the first arm are paired by seed, p of the paired t-test")
    left_out = sum(summary.left_out for summary in summaries)
    if left_out:
        parts.append(f"{left_out} interrupted run(s) left out")
    return "; ".join(parts)


def summary_rows(runs: Mapping[str, Sequence[RunRecord]]) -> list[dict[str, Any]]:
    """Return one flat row an arm, plain values, None where there is nothing.

    Accuracies are in [0, 1]. ``<key>`` is the mean over seeds at the last round, ``<key>_low``
    and ``<key>_high`` its 95 % t-interval; ``<key>_selected...`` the same at the round with the
    best validation accuracy; ``difference...`` is mean client accuracy at the last round minus
    the first arm's, paired by seed.
    """
    differences = compare_arms(runs, "accuracy", "last")
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
            row.update(_flat(key, summary.last.get(key)))
            row.update(_flat(f"{key}_selected", summary.selected.get(key)))
        row.update(_flat("bytes_up_per_client", summary.bytes_up))
        row.update(_flat("bytes_down_per_client", summary.bytes_down))
        row.update(_flat("seconds", summary.seconds))
        difference = differences.get(summary.arm)
        row.update(_flat("difference", difference))
        row["difference_p_value"] = None if difference is None else difference.p_value
        row["difference_pairs"] = 0 if difference is None else difference.n
        rows.append(row)
    return rows


def _flat(key: str, value: Estimate | Difference | None) -> dict[str, float | None]:
    return {
        key: None if value is None else value.mean,
        f"{key}_low": None if value is None else value.low,
        f"{key}_high": None if value is None else value.high,
    }


def _summaries(runs: Mapping[str, Sequence[RunRecord]]) -> list[ArmSummary]:
    return [summarize(arm, of_arm) for arm, of_arm in runs.items() if of_arm]
