"""Figures of a sweep over two or three settings: a heat map, and curves over a number.

Each is drawn twice: panels side by side for a screen, and below each other for a phone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from fedkd.figures.saving import Style
from fedkd.figures.style import DASHES, color, readable_on, visible
from sim.reports.figures import MARKERS, PANEL_WIDTH, STYLE, WIDE, Runs
from sim.reports.grids import Grid, Plane
from sim.reports.statistics import Estimate, measured, measured_title

_ENOUGH = 3
"""Seeds; the t-interval of two is several times wider than their distance."""

_FAR = 20
"""Values that lie so far apart, as learning rates do, need a logarithmic axis."""

_LOST = "#dddddd"
"""The colour of a cell without a number."""


def accuracy_in_grid(runs: Runs, grid: Grid, columns: int = WIDE) -> Figure | None:
    """Draw accuracy in the last round in colours: rows x columns, a panel for each third value.

    Args:
        runs: of each arm.
        grid: of a sweep.
        columns: panels side by side.

    Returns:
        None where a sweep has fewer than two settings, or more than three.
    """
    planes = [plane for plane in grid.planes if plane.rows.name]
    tables = [_values(runs, plane) for plane in planes]
    known = [value for table in tables for value in table[~np.isnan(table)].tolist()]
    if not known:
        return None
    height = 0.75 + 0.3 * len(planes[0].rows.values)
    figure, panels = _panels(planes, columns, height=height, more=1.1)
    colors = matplotlib.colormaps["viridis"].with_extremes(bad=_LOST)
    # A hair's breadth of colours where all cells are equal.
    low, high = min(known), max(max(known), min(known) + 1)
    for place, (plane, table, axes) in enumerate(zip(planes, tables, panels, strict=True)):
        # Cells are drawn, not painted: they stay sharp at any size.
        image = axes.pcolormesh(
            np.ma.masked_invalid(table), cmap=colors, vmin=low, vmax=high, edgecolors="none"
        )
        shades = np.asarray(image.to_rgba(np.ma.masked_invalid(table)))
        for (row, column), value in np.ndenumerate(table):
            lost = math.isnan(value)
            axes.text(
                column + 0.5,
                row + 0.5,
                "–" if lost else f"{value:.1f}",  # noqa: RUF001
                ha="center",
                va="center",
                fontsize=9 if len(plane.columns.values) <= 6 else 7,
                color="black" if lost else readable_on(shades[row, column]),
            )
        axes.set_xticks(np.arange(len(plane.columns.values)) + 0.5, plane.columns.labels)
        axes.set_yticks(np.arange(len(plane.rows.values)) + 0.5, plane.rows.labels)
        axes.set_ylim(len(plane.rows.values), 0)
        # Panels side by side share the names of their rows.
        axes.tick_params(length=0, labelleft=place % columns == 0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.set_title(plane.title)
        axes.set_xlabel(plane.columns.title)
    _head(figure, f"{measured_title(runs)} (%), last round", "the lighter, the higher")
    return figure


def accuracy_by_value(runs: Runs, grid: Grid, columns: int = WIDE) -> Figure | None:
    """Draw accuracy in the last round against a number that is swept over.

    A line for each value of the second setting, a panel for each value of the third.

    Args:
        runs: of each arm.
        grid: of a sweep.
        columns: panels side by side.

    Returns:
        None where no setting of the sweep is a number, or where there are more than three.
    """
    planes = [plane for plane in grid.planes if plane.columns.numeric]
    lines = [[[_estimate(runs, arm) for arm in line] for line in plane.arms] for plane in planes]
    if not any(value for plane in lines for line in plane for value in line):
        return None
    figure, panels = _panels(planes, columns, height=2.9, more=0.9)
    for place, (plane, axes) in enumerate(zip(planes, panels, strict=True)):
        order = np.argsort(np.asarray(plane.columns.values, np.float64))
        for number, line in enumerate(lines[place]):
            found = [
                (float(plane.columns.values[column]), value)
                for column in order.tolist()
                if (value := line[column]) is not None
            ]
            _draw_line(axes, number, found)
        ticks = plane.columns.values
        if min(ticks) > 0 and max(ticks) / min(ticks) >= _FAR:
            axes.set_xscale("log")
        axes.set_xticks(ticks, plane.columns.labels)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(plane.title)
        axes.set_xlabel(plane.columns.title)
        if place % columns == 0:
            axes.set_ylabel("accuracy (%)")
    _head(
        figure,
        f"{measured_title(runs)}, last round",
        _bars_note([value for plane in lines for line in plane for value in line if value]),
    )
    labels = [visible(label) for label in planes[0].rows.labels]
    if planes[0].rows.name:
        handles = [_handle(number) for number in range(len(labels))]
        longest = max(map(len, labels))
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=max(1, min(len(labels), 48 * columns // (longest + 9))),
            handlelength=3,
        )
    return figure


GRID_FIGURES: Mapping[str, Callable[[Runs, Grid, int], Figure | None]] = MappingProxyType(
    {"accuracy_in_grid": accuracy_in_grid, "accuracy_by_value": accuracy_by_value}
)
"""What a report on a sweep draws besides, by file name."""


def draw_grid(
    runs: Runs, grid: Grid, columns: int = WIDE, style: Style = STYLE
) -> dict[str, Figure]:
    """Draw all figures of a sweep that there is something to show in, by name."""
    with matplotlib.rc_context(style):
        drawn = {name: draw(runs, grid, columns) for name, draw in GRID_FIGURES.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _estimate(runs: Runs, arm: str) -> Estimate | None:
    return measured(runs[arm]) if runs.get(arm) else None


def _values(runs: Runs, plane: Plane) -> np.ndarray:
    """Return percent by row and column; NaN where there is no number."""
    found = [[_estimate(runs, arm) for arm in line] for line in plane.arms]
    return np.array(
        [[math.nan if value is None else 100 * value.mean for value in line] for line in found]
    )


def _panels(
    planes: Sequence[Plane], columns: int, *, height: float, more: float
) -> tuple[Figure, list[Axes]]:
    """Return a figure with a panel for each plane, all to one scale."""
    lines = math.ceil(len(planes) / columns)
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06)
    figure = Figure(figsize=(PANEL_WIDTH * columns, height * lines + more), layout=layout)
    FigureCanvasAgg(figure)
    panels: list[Axes] = []
    for place in range(len(planes)):
        shared = panels[0] if panels else None
        # A single panel has the whole width.
        width = columns if len(planes) > 1 else 1
        panels.append(figure.add_subplot(lines, width, place + 1, sharex=shared, sharey=shared))
    return figure, panels


def _head(figure: Figure, title: str, note: str) -> None:
    """Write what all panels show, and how to read it."""
    text = f"{title}\n{note}" if note else title
    figure.suptitle(text, x=0.01, ha="left", fontsize=10.5)


def _bars_note(values: Sequence[Estimate]) -> str:
    if any(value.n >= _ENOUGH for value in values):
        return "mean over seeds; bars: 95 % t-interval"
    if any(value.n > 1 for value in values):
        return "mean over two seeds"
    return "one seed each"


def _draw_line(axes: Axes, number: int, found: Sequence[tuple[float, Estimate]]) -> None:
    mean = np.array([value.mean for _, value in found])
    # Where seeds are too few for an interval the bar has no length.
    low, high = (
        np.array([getattr(value, end if value.n >= _ENOUGH else "mean") for _, value in found])
        for end in ("low", "high")
    )
    axes.errorbar(
        [place for place, _ in found],
        100 * mean,
        yerr=(100 * (mean - low), 100 * (high - mean)),
        lw=1.6,
        elinewidth=0.9,
        capsize=2,
        markersize=4.5,
        **_look(number),
    )


def _look(number: int) -> dict[str, Any]:
    return {
        "color": color(number),
        "marker": MARKERS[number % len(MARKERS)],
        # Lines lie on each other where an attack does nothing.
        "linestyle": DASHES[number % len(DASHES)],
    }


def _handle(number: int) -> Line2D:
    return Line2D([], [], lw=1.6, **_look(number))
