"""Tables of numbers drawn in colours: what models confuse, and how far they agree."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Float, Integer, Num
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedkd.figures.style import STYLE, check_names, new_figure, readable_on

MOST_NUMBERED_CELLS = 400
"""A heat map with more cells shows colours only: numbers would overlap."""


def confusion_heat_map(
    counts: Integer[np.ndarray, "classes classes"],
    class_names: Sequence[str] | None = None,
    *,
    title: str = "Confusion on the test split",
) -> Figure:
    """Draw confusion counts; colour is the share of the true class's rows, numbers are rows.

    Args:
        counts: true class on the first axis, see `fedkd.metrics.confusion_counts`.
        class_names: one for each class; None numbers them.
        title: first line of the title.

    Raises:
        ValueError: if there are not as many names as classes.
    """
    names = [str(index) for index in range(len(counts))] if class_names is None else class_names
    rows = counts.sum(axis=1, keepdims=True)
    shares = np.full(counts.shape, np.nan)
    np.divide(100.0 * counts, rows, out=shares, where=rows > 0)
    return _heat_map(
        shares,
        names,
        names,
        title=f"{title}\nrows of each true class by predicted class",
        row_label="true class",
        column_label="predicted class",
        color_label="rows of the true class (%)",
        limits=(0, 100),
        numbers=[[f"{count:,}" if count else "" for count in line] for line in counts.tolist()],
    )


def agreement_heat_map(
    matrix: Float[np.ndarray, "models models"],
    names: Sequence[str],
    *,
    title: str = "Agreement between models",
) -> Figure:
    """Draw the share of rows on which two models rank the same class first.

    Args:
        matrix: see `fedkd.metrics.agreement_matrix`.
        names: one for each model.
        title: first line of the title.

    Raises:
        ValueError: if there are not as many names as models.
    """
    return _heat_map(
        100 * matrix,
        names,
        names,
        title=f"{title}\nrows with the same top class",
        row_label="",
        column_label="",
        color_label="rows (%)",
        limits=(None, 100),
        decimals=1,
    )


def kl_heat_map(
    matrix: Float[np.ndarray, "models models"],
    names: Sequence[str],
    *,
    title: str = "Divergence between models",
) -> Figure:
    """Draw KL(p || q) of every two models.

    Args:
        matrix: see `fedkd.metrics.kl_matrix`; p on the first axis.
        names: one for each model.
        title: first line of the title.

    Raises:
        ValueError: if there are not as many names as models.
    """
    return _heat_map(
        matrix,
        names,
        names,
        title=f"{title}\nKL(p || q), mean over rows",
        row_label="p",
        column_label="q",
        color_label="nats per row",
        limits=(0, None),
        decimals=2,
    )


def error_correlation_heat_map(
    matrix: Float[np.ndarray, "models models"],
    names: Sequence[str],
    *,
    title: str = "Errors that models share",
) -> Figure:
    """Draw how far every two models err on the same rows.

    Args:
        matrix: `fedkd.metrics.error_correlation` of each pair, in [-1, 1].
        names: one for each model.
        title: first line of the title.

    Raises:
        ValueError: if there are not as many names as models.
    """
    return _heat_map(
        matrix,
        names,
        names,
        title=f"{title}\ncorrelation of errors (0: independent, 1: the same rows)",
        row_label="",
        column_label="",
        color_label="correlation",
        limits=(-1, 1),
        decimals=2,
        color_map="RdBu_r",
    )


def cka_heat_map(
    matrix: Float[np.ndarray, "first_layers second_layers"],
    first_layers: Sequence[str],
    second_layers: Sequence[str],
    *,
    first_name: str = "teacher",
    second_name: str = "student",
    title: str = "Similarity of layers",
) -> Figure:
    """Draw the linear CKA of every layer of one network with every layer of another.

    Args:
        matrix: see `fedkd.metrics.cka_matrix` and `fedkd.metrics.MinibatchCKA`.
        first_layers: a name for each row, from input to output; the input is drawn below.
        second_layers: a name for each column.
        first_name: label of the first network.
        second_name: label of the second network.
        title: first line of the title.

    Raises:
        ValueError: if there are not as many names as layers.
    """
    return _heat_map(
        # The unbiased estimate may be just below 0 for unrelated layers.
        matrix[::-1],
        first_layers[::-1],
        second_layers,
        title=f"{title}\nlinear CKA (1: equal up to rotation)",
        row_label=f"layers of the {first_name}",
        column_label=f"layers of the {second_name}",
        color_label="linear CKA",
        limits=(0, 1),
        decimals=2,
    )


def correlation_difference_heat_map(
    matrix: Float[np.ndarray, "classes classes"],
    class_names: Sequence[str] | None = None,
    *,
    model: str = "student",
    title: str = "Which classes are taken for alike",
) -> Figure:
    """Draw by how much a model's class correlations differ from the teacher's.

    Args:
        matrix: see `fedkd.metrics.class_correlation_difference`.
        class_names: one for each class; None numbers them.
        model: what the matrix is of.
        title: first line of the title.

    Raises:
        ValueError: if there are not as many names as classes.
    """
    names = [str(index) for index in range(len(matrix))] if class_names is None else class_names
    known = np.abs(matrix[~np.isnan(matrix)])
    highest = max(float(known.max(initial=0.0)), 0.01)
    return _heat_map(
        matrix,
        names,
        names,
        title=f"{title}\ncorrelation of two classes' logits, {model} minus teacher",
        row_label="class",
        column_label="class",
        color_label="difference of correlations",
        limits=(-highest, highest),
        decimals=2,
        color_map="RdBu_r",
    )


def _heat_map(
    values: Num[np.ndarray, "rows columns"],
    row_names: Sequence[str],
    column_names: Sequence[str],
    *,
    title: str,
    row_label: str,
    column_label: str,
    color_label: str,
    limits: tuple[int | float | None, int | float | None],
    decimals: int = 0,
    numbers: Sequence[Sequence[str]] | None = None,
    color_map: str = "viridis",
) -> Figure:
    """Draw a table in colours, with its numbers where they fit; NaN is grey."""
    num_rows, num_columns = values.shape
    check_names(row_names, num_rows)
    check_names(column_names, num_columns)
    numbered = values.size <= MOST_NUMBERED_CELLS
    cell = 0.46 if numbered else 0.14
    with matplotlib.rc_context(STYLE):
        longest_row = max((len(name) for name in row_names), default=0)
        longest_column = max((len(name) for name in column_names), default=0)
        upright = longest_column * 0.08 > cell
        # Neither the colour bar nor the title starts left of the cells.
        longest_title = max(len(line) for line in title.splitlines())
        figure = new_figure(
            0.5 + 0.08 * longest_row + max(1.4 + cell * num_columns, 0.083 * longest_title),
            max(3.2, 1.5 + cell * num_rows + (0.08 * longest_column if upright else 0.0)),
        )
        axes = figure.subplots()
        colors = matplotlib.colormaps[color_map].with_extremes(bad="#dddddd")
        low, high = limits
        image = axes.imshow(values, cmap=colors, vmin=low, vmax=high, aspect="auto")
        _name_ticks(axes, "x", column_names, rotation=90 if upright else 0)
        _name_ticks(axes, "y", row_names, rotation=0)
        axes.tick_params(length=0)
        axes.set_xlabel(column_label)
        axes.set_ylabel(row_label)
        axes.set_title(title)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if numbered:
            shades = np.asarray(image.to_rgba(np.ma.masked_invalid(values)))
            for row in range(num_rows):
                for column in range(num_columns):
                    value = float(values[row, column])
                    text = (
                        numbers[row][column]
                        if numbers
                        else f"{round(value, decimals) + 0.0:.{decimals}f}"
                    )
                    axes.text(
                        column,
                        row,
                        "" if np.isnan(value) else text,
                        ha="center",
                        va="center",
                        fontsize=8 if len(text) <= 5 else 6.5,
                        color=readable_on(shades[row, column]),
                    )
        figure.colorbar(image, ax=axes, label=color_label, shrink=0.9)
    return figure


def _name_ticks(axes: Axes, axis: str, names: Sequence[str], *, rotation: int) -> None:
    # Every n-th name where all would overlap.
    every = -(-len(names) // 40)
    positions = list(range(0, len(names), every))
    shown = [names[position] for position in positions]
    if axis == "x":
        axes.set_xticks(positions, shown, rotation=rotation)
    else:
        axes.set_yticks(positions, shown)
