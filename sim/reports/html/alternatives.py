"""What a figure shows, for those who cannot see it: read off the figure itself.

So words and numbers cannot say anything else than what is drawn: labelled lines and points, and the
cells of a heat map. A figure of other things says in its own label what it shows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D

from sim.reports.html.tables import Table

_MOST_SERIES = 12
"""So many lines of a panel are told one by one; of more the extremes."""

_MOST_ROWS = 60
"""Of a table of numbers; who wants more has the run's own files."""


@dataclass(frozen=True, slots=True)
class Series:
    """What a label in a figure stands for.

    Attributes:
        name: its label.
        points: by their place along the axis.
        level: whether it is a line from edge to edge, which has no place along the axis.
    """

    name: str
    points: tuple[tuple[int | float, int | float], ...]
    level: bool = False

    @property
    def text(self) -> str:
        """Its first and its last point, or the only one."""
        (x, y), (last_x, last_y) = self.points[0], self.points[-1]
        if self.level:
            return f"{self.name} {_number(y)} throughout"
        if len(self.points) == 1:
            return f"{self.name} {_number(y)} at {_number(x)}"
        return f"{self.name} {_number(y)} at {_number(x)} to {_number(last_y)} at {_number(last_x)}"


def alternative(figure: Figure, title: str) -> str:
    """Return in one text what a figure shows.

    Args:
        figure: that was drawn.
        title: what stands above it.
    """
    parts = [title.rstrip(".")]
    if figure.get_label():
        parts.append(str(figure.get_label()))
    else:
        parts += [text for axes in figure.axes if (text := _panel(axes))]
    return ". ".join(part for part in parts if part) + "."


def number_tables(figure: Figure) -> list[Table]:
    """Return the numbers of a figure's lines and points, a table a panel."""
    tables = []
    for axes in figure.axes:
        series = [each for each in _series(axes) if not each.level]
        if not series or sum(len(each.points) for each in series) > 20 * _MOST_ROWS:
            continue
        x_name, y_name = _words(axes.get_xlabel()) or "x", _words(axes.get_ylabel()) or "y"
        title = _title(axes)
        places = [tuple(x for x, _ in each.points) for each in series]
        if len(set(places)) == 1 and len(places[0]) > 1:
            header = [x_name, *(each.name for each in series)]
            rows = [
                [_number(x), *(_number(each.points[row][1]) for each in series)]
                for row, x in enumerate(places[0])
            ]
        else:
            header = ["", x_name, y_name]
            rows = [[each.name, _number(x), _number(y)] for each in series for x, y in each.points]
        if len(rows) <= _MOST_ROWS:
            caption = f"{title}: {y_name}" if title else f"{y_name} by {x_name}"
            tables.append(Table(header, rows, title=title, caption=caption))
    return tables


def _panel(axes: Axes) -> str:
    series = _series(axes)
    if series:
        told = [each.text for each in series]
        if len(told) > _MOST_SERIES:
            by_end = sorted(series, key=lambda each: each.points[-1][1])
            told = [
                f"{len(series)} lines",
                f"lowest at the end: {by_end[0].text}",
                f"highest at the end: {by_end[-1].text}",
            ]
        between = f"{_words(axes.get_ylabel())} against {_words(axes.get_xlabel())}"
        return f"{_title(axes) or between}: {'; '.join(told)}"
    cells = [
        (float(text.get_text()), place)
        for text in axes.texts
        if (place := _cell_name(axes, text.get_position())) and _is_number(text.get_text())
    ]
    if not cells:
        return ""
    low, high = min(cells), max(cells)
    head = f"{_title(axes)}: " if _title(axes) else ""
    return (
        f"{head}{len(cells)} cells, lowest {_number(low[0])} ({low[1]}), highest "
        f"{_number(high[0])} ({high[1]})"
    )


def _series(axes: Axes) -> list[Series]:
    """Return what has a label: lines, and points with their bars."""
    bars = [each for each in axes.containers if isinstance(each, ErrorbarContainer)]
    inside = {id(each.lines[0]): str(each.get_label()) for each in bars}
    found = []
    for line in axes.lines:
        name = inside.get(id(line), str(line.get_label()))
        if name.startswith("_"):
            continue
        points = _points(line)
        if points:
            level = line.get_transform() == axes.get_yaxis_transform(which="grid")
            found.append(Series(_words(name), points, level))
    return found


def _points(line: Line2D) -> tuple[tuple[float, float], ...]:
    x, y = (np.asarray(each, np.float64) for each in line.get_data(orig=False))
    known = np.isfinite(x) & np.isfinite(y)
    return tuple(zip(x[known].tolist(), y[known].tolist(), strict=True))


def _cell_name(axes: Axes, position: Sequence[int | float]) -> str:
    """Return the row and the column of a cell's text in a heat map; empty in other figures."""
    drawn = (AxesImage, QuadMesh)
    if not any(isinstance(each, drawn) for each in (*axes.images, *axes.collections)):
        return ""
    column, row = (round(float(each)) for each in position)
    names = []
    for place, ticks, labels in (
        (row, axes.get_yticks(), axes.get_yticklabels()),
        (column, axes.get_xticks(), axes.get_xticklabels()),
    ):
        found = [
            label.get_text()
            for tick, label in zip(ticks, labels, strict=False)
            if round(float(tick)) == place
        ]
        names.append(found[0] if found else str(place))
    return ", ".join(names)


def _title(axes: Axes) -> str:
    return _words(axes.get_title(loc="left") or axes.get_title())


def _words(text: str) -> str:
    return " ".join(text.replace("\u200b", "").split())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(value: int | float) -> str:
    if value == round(value):
        return f"{value:,.0f}"
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"
