"""Figures of how clients' models compare at the end: reliability, and who agrees with whom."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from fedkd.figures.saving import Style
from fedkd.figures.style import color, dash, readable_on, visible
from fedkd.metrics.calibration import ReliabilityBins
from sim.reports.figures import (
    LONGEST_TICK,
    MARKERS,
    STYLE,
    WIDE,
    Runs,
    new_figure,
    place_legend,
    shortened,
    title_axes,
)
from sim.reports.runs import RunRecord
from sim.reports.statistics import counted

MOST_PANELS = 6
"""Arms whose agreement is drawn; a sweep has more than anybody would compare by eye."""

MOST_NUMBERS = 10
"""Clients up to which cells have numbers."""

LEAST_SHARE = 0.01
"""Of all rows: an interval of confidence with fewer says little of what that is worth."""


def reliability_of(runs: Sequence[RunRecord]) -> ReliabilityBins | None:
    """Return what the last round's answers were worth, of all clients of all runs that count.

    Returns:
        None where no run recorded it, or not in the intervals that are counted now.
    """
    bins = ReliabilityBins()
    found = False
    for run in counted(runs):
        told = run.peers.get("reliability", {})
        parts = [np.asarray(told.get(name, ()), np.float64) for name in _PARTS]
        if any(part.shape != bins.counts.shape for part in parts):
            continue
        rows, correct, confidence = parts
        bins.counts += rows.astype(np.int64)
        bins.correct_counts += correct.astype(np.int64)
        bins.confidence_sums += confidence
        found = True
    return bins if found and bins.counts.sum() else None


_PARTS = ("rows", "correct", "confidence")


def reliability_by_arm(runs: Runs, columns: int = WIDE) -> Figure | None:
    """Draw accuracy against confidence, a line an arm; on the diagonal confidence is right."""
    found = {arm: bins for arm in runs if (bins := reliability_of(runs[arm])) is not None}
    if not found:
        return None
    figure, (axes,) = new_figure(1, height=4.4, columns=columns)
    places = {arm: place for place, arm in enumerate(runs)}
    for arm, bins in found.items():
        enough = bins.counts >= LEAST_SHARE * bins.counts.sum()
        place = places[arm]
        axes.plot(
            100 * bins.confidence[enough],
            100 * bins.accuracy[enough],
            color=color(place),
            linestyle=dash(place),
            marker=MARKERS[place % len(MARKERS)],
            markersize=5,
            lw=1.8,
            label=visible(arm),
        )
    axes.plot([0, 100], [0, 100], color="#666666", lw=1, linestyle=(0, (4, 3)), label="_")
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 102)
    axes.set_xlabel("confidence (%)")
    axes.set_ylabel("accuracy (%)")
    lines = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    place_legend(figure, lines, list(found))
    title_axes(
        axes,
        "What clients' confidence is worth, last round",
        "dashed: right; below it: overconfident; intervals with 1 % of the rows and more",
    )
    return figure


def agreement_by_arm(runs: Runs, columns: int = WIDE) -> Figure | None:
    """Draw on how many test rows two clients rank the same class first, a panel an arm.

    Of the first seed that counts: which client is which differs between seeds.
    """
    found = {
        arm: told
        for arm, of_arm in runs.items()
        if (told := _agreement(counted(of_arm)[0])) is not None
    }
    if not found or len(found) > MOST_PANELS:
        return None
    most = max(len(matrix) for matrix, _ in found.values())
    figure, panels = new_figure(
        len(found), height=3.2 if columns == WIDE else 3.6, columns=columns, most=3
    )
    colors = matplotlib.colormaps["viridis"]
    known = np.concatenate(
        [matrix[~np.eye(len(matrix), dtype=bool)] for matrix, _ in found.values()]
    )
    low, high = float(known.min()), max(float(known.max()), float(known.min()) + 1)
    for axes, (arm, (matrix, clients)) in zip(panels, found.items(), strict=True):
        image = axes.pcolormesh(matrix, cmap=colors, vmin=low, vmax=high, edgecolors="none")
        if most <= MOST_NUMBERS:
            shades = np.asarray(image.to_rgba(matrix))
            for (row, column), value in np.ndenumerate(matrix):
                if row != column:
                    axes.text(
                        column + 0.5,
                        row + 0.5,
                        f"{value:.0f}",
                        ha="center",
                        va="center",
                        fontsize=8 if most <= 7 else 7,
                        color=readable_on(shades[row, column]),
                    )
        step = max(1, math.ceil(len(clients) / MOST_NUMBERS))
        ticks = np.arange(0, len(clients), step)
        names = [str(clients[place]) for place in ticks]
        axes.set_xticks(ticks + 0.5, names)
        axes.set_yticks(ticks + 0.5, names)
        axes.set_ylim(len(clients), 0)
        axes.set_aspect("equal")
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        (name,) = shortened([arm], LONGEST_TICK[columns])
        axes.set_title(name)
        axes.set_xlabel("client")
    mean = {arm: matrix[~np.eye(len(matrix), dtype=bool)] for arm, (matrix, _) in found.items()}
    judged = max(counted(runs[arm])[0].peers.get("judged", 0) for arm in found)
    some = f"; the first {most} of {judged} clients" if judged > most else ""
    figure.suptitle(
        "Test rows on which two clients answer alike (%), last round, first seed\n"
        f"the lighter, the more{some}",
        x=0.01,
        ha="left",
        fontsize=10.5,
    )
    figure.set_label(
        "; ".join(
            f"{arm}: from {values.min():.0f} to {values.max():.0f}, on average {values.mean():.1f}"
            for arm, values in mean.items()
        )
    )
    return figure


def _agreement(run: RunRecord) -> tuple[np.ndarray, list[int]] | None:
    """Return percent by pair, and which clients they are; None where there are fewer than two."""
    clients = run.peers.get("clients", [])
    matrix = 100 * np.asarray(run.peers.get("agreement", ()), np.float64)
    if len(clients) < 2 or matrix.shape != (len(clients), len(clients)):
        return None
    return matrix, [int(client) for client in clients]


PEER_FIGURES: Mapping[str, Callable[[Runs, int], Figure | None]] = MappingProxyType(
    {"reliability_by_arm": reliability_by_arm, "agreement_by_arm": agreement_by_arm}
)
"""What a report draws of clients beside each other, by file name."""


def draw_peers(runs: Runs, style: Style = STYLE, columns: int = WIDE) -> dict[str, Figure]:
    """Draw all figures of clients' answers that there is something to show in, by name."""
    with matplotlib.rc_context(style):
        drawn = {name: draw(runs, columns) for name, draw in PEER_FIGURES.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}
