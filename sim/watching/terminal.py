"""What a terminal or a log shows of a study that is watched."""

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedkd.names import printable
from sim.reports.terminal import NOTHING, Column, FittedTable
from sim.server.observers import Row, event_words
from sim.watching.runs import Point, RunSight
from sim.watching.studies import Sight, duration, mean_accuracy, mean_curve

CURVE_WIDTH = 16
"""Characters of a small curve; they stand for all rounds of a run."""

QUIET_S = 60.0
"""A run that wrote nothing for so long, and for five of its rounds, is said to be quiet."""

_LEVELS = "▁▂▃▄▅▆▇█"


def sparkline(
    curve: Sequence[Point],
    *,
    rounds: int,
    low: int | float,
    high: int | float,
    width: int = CURVE_WIDTH,
) -> str:
    """Draw a curve in a line of text; what is to come is left blank.

    Args:
        curve: points by round, from 1.
        rounds: that the width stands for, >= 1.
        low: what the lowest step stands for.
        high: what the highest step stands for.
        width: in characters.
    """
    text = ""
    reached = curve[-1][0] if curve else 0
    for place in range(width):
        # The last point until the end of this character's share of the rounds.
        until = (place + 1) * rounds / width
        before = [value for round, value in curve if round <= max(until, 1)]
        if not before or until - rounds / width >= reached:
            break
        share = (before[-1] - low) / (high - low) if high > low else 0.5
        text += _LEVELS[min(max(int(share * len(_LEVELS)), 0), len(_LEVELS) - 1)]
    return text.ljust(width)


def view(sight: Sight, *, height: int | None = None) -> RenderableType:
    """Return all that a terminal shows.

    Args:
        sight: of the study or run.
        height: lines that there are; arms that find no room are counted. None: all of them.
    """
    head = Table.grid(padding=(0, 1), expand=True)
    head.add_column(ratio=1, no_wrap=False)
    head.add_row(Text(f"{printable(sight.name)}: {sight.told()}"))
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        ProgressBar(total=max(sight.rounds, 1), completed=sight.done, width=40),
        Text(f"{sight.done} of {sight.rounds} rounds"),
    )
    events = sight.events
    shown = events[-(5 if height is not None else 20) :]
    room = None if height is None else max(height - 12 - len(shown), 3)
    parts: list[RenderableType] = [head, bar, Text(""), _arms_table(sight, room)]
    if events:
        parts.append(Text(f"{len(events)} event{'s' * (len(events) > 1)}, the last:"))
        parts += [Text(f"  {printable(line)}", no_wrap=True, overflow="ellipsis") for line in shown]
    parts += [
        Text(f"refused: {printable(arm)}: {printable(why)}") for arm, why in sight.refused.items()
    ]
    return Group(*parts)


def _arms_table(sight: Sight, room: int | None) -> RenderableType:
    """A row for each arm, those that are at work first where there is no room for all."""
    arms = sight.arms
    names = list(arms)
    if room is not None and len(names) > room:
        names.sort(key=lambda arm: -_interest(arms[arm]))
        names = names[: room - 1]
        names.sort(key=list(arms).index)
    curves = {arm: mean_curve(runs) for arm, runs in arms.items()}
    values = [value for curve in curves.values() for _, value in curve]
    low, high = min(values, default=0.0), max(values, default=1.0)
    accuracies = {arm: mean_accuracy(arms[arm]) for arm in names}
    columns = {
        "runs": [_count_of_runs(arms[arm]) for arm in names] if sight.is_study else [],
        "accuracy": [
            NOTHING if value is None else f"{100 * value:.1f} %" for value in accuracies.values()
        ],
        "now": [_now(arms[arm]) for arm in names],
        "curve": [
            sparkline(
                curves[arm],
                rounds=max(run.rounds for run in arms[arm]),
                low=low,
                high=high,
            )
            for arm in names
        ],
    }
    hidden = len(arms) - len(names)
    scale = f"curves: mean client accuracy from {100 * low:.0f} to {100 * high:.0f} %"
    return FittedTable(
        label="arm",
        labels=names,
        columns=[
            Column(title=title, cells=cells, rank=rank)
            for rank, (title, cells) in enumerate(columns.items())
            if cells
        ],
        caption=(f"and {hidden} more arms; " if hidden else "") + (scale if values else ""),
    )


def _interest(runs: Sequence[RunSight]) -> int:
    """Order arms by what a watcher wants to see: at work, then begun, then others."""
    if any(run.status == "running" for run in runs):
        return 2
    return int(any(run.status not in ("planned", "finished") for run in runs))


def _count_of_runs(runs: Sequence[RunSight]) -> str:
    return f"{sum(run.status == 'finished' for run in runs)} of {len(runs)}"


def _now(runs: Sequence[RunSight]) -> str:
    """Say what goes on in an arm."""
    running = [run for run in runs if run.status == "running"]
    if running:
        run = running[0]
        more = f" and {len(running) - 1} more" if len(running) > 1 else ""
        return f"seed {run.seed}: {run.done} of {run.rounds}{more}{_quiet(run)}"
    odd = [run for run in runs if run.status not in ("planned", "finished")]
    if odd:
        return f"seed {odd[0].seed}: {odd[0].status}, {odd[0].done} of {odd[0].rounds}"
    if all(run.status == "finished" for run in runs):
        return "finished"
    return "waits"


def _quiet(run: RunSight) -> str:
    a_round = run.seconds / len(run.measured) if run.measured else 0.0
    if run.quiet_s < max(QUIET_S, 5 * a_round):
        return ""
    return f", quiet for {duration(run.quiet_s)}"


# -- changes, a line each ------------------------------------------------------------------------


def changes(before: Sight | None, now: Sight) -> Iterator[Row]:
    """Yield what has happened between two looks, as plain values.

    Args:
        before: None: nothing was known, and what is there already is no change.
        now: what is known.
    """
    earlier = {run.folder: run for run in (before or now).runs}
    for run in now.runs:
        was = earlier.get(run.folder)
        about = {"arm": run.arm, "seed": run.seed, "round": run.done, "rounds": run.rounds}
        begun, done, known = (
            ("planned", 0, 0) if was is None else (was.status, was.done, len(was.events))
        )
        for row in run.events[known:]:
            yield {"change": "event", **about, **row}
        if run.status != begun:
            yield {"change": run.status, **about, "accuracy": run.accuracy}
        elif run.done != done:
            yield {"change": "round", **about, "accuracy": run.accuracy}


def change_words(row: Row) -> str:
    """Say a change in a line."""
    label = f"{row['arm']} seed {row['seed']}"
    if row["change"] == "event":
        return printable(f"{label}: {event_words(row)}")
    parts = [] if row["change"] == "round" else [str(row["change"])]
    parts.append(f"{row['round']} of {row['rounds']} rounds")
    if row["accuracy"] is not None:
        parts.append(f"accuracy {100 * row['accuracy']:.1f} %")
    return printable(f"{label}: {', '.join(parts)}")
