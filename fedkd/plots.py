"""Plots of what `fedkd.metrics` computes, as matplotlib figures that nothing else knows of.

No display and no global list of figures: each function returns a ``Figure`` for the caller to save
(``figure.savefig("reliability.png")``). Importing this module imports matplotlib, so import it
where something is drawn.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Integer, Num
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from fedkd.metrics.calibration import ReliabilityBins
from fedkd.metrics.filtering import ConfidenceHistogram, ThresholdCurve
from fedkd.metrics.flatness import NoisePoint

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours that people with any common colour blindness tell apart.

Source:
    Okabe and Ito, 2008. https://jfly.uni-koeln.de/color/ (without yellow, which white swallows).
"""

MOST_NUMBERED_CELLS = 400
"""A heat map with more cells shows colours only: numbers would overlap."""

_DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))
_STYLE: Any = MappingProxyType(
    {
        "font.family": "DejaVu Sans",
        "font.size": 9.5,
        "text.parse_math": False,  # a name such as a$b is no formula
        "axes.titlesize": 10.5,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#666666",
        "axes.axisbelow": True,
        "grid.color": "#e4e4e4",
        "legend.frameon": False,
        "savefig.dpi": 160,
    }
)


def reliability_diagram(
    bins: ReliabilityBins, *, title: str = "Reliability on the test split"
) -> Figure:
    """Draw accuracy by confidence, with the rows of each interval below it.

    Bars below the diagonal are overconfident. Their errors are in the title, because a bar does
    not show how many rows stand behind it.
    """
    with matplotlib.rc_context(_STYLE):
        figure = _figure(5.2, 5.6)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        widths = np.diff(bins.edges)
        filled = bins.counts > 0
        upper.bar(
            bins.edges[:-1][filled],
            100 * bins.accuracy[filled],
            widths[filled],
            align="edge",
            color=COLORS[0],
            alpha=0.75,
            edgecolor="white",
            label="accuracy",
        )
        upper.plot(
            bins.confidence[filled],
            100 * bins.confidence[filled],
            "o",
            color=COLORS[1],
            markersize=4,
            label="mean confidence",
        )
        upper.plot([0, 1], [0, 100], color="#666666", lw=1, linestyle=(0, (4, 3)))
        upper.set_ylim(0, 102)
        upper.set_xlim(0, 1)
        upper.set_ylabel("accuracy (%)")
        upper.legend(loc="upper left")
        upper.set_title(
            f"{title}\nECE {100 * bins.expected_error():.2f} %, "
            f"RMSCE {100 * bins.root_mean_square_error():.2f} %, "
            f"MCE {100 * bins.maximum_error():.2f} %, {bins.counts.sum():,} rows"
        )
        lower.bar(
            bins.edges[:-1], bins.counts, widths, align="edge", color="#888888", edgecolor="white"
        )
        lower.set_ylabel("rows")
        lower.set_xlabel("confidence (highest probability)")
        _whole_numbers(lower, "y")
    return figure


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


def entropy_curves(
    steps: Sequence[int | float],
    target: Sequence[int | float],
    peers: Mapping[str, Sequence[int | float]] | None = None,
    *,
    num_classes: int | None = None,
    x_label: str = "round",
    title: str = "Entropy of the target",
) -> Figure:
    """Draw how undecided the common target, and each peer, is over time.

    Args:
        steps: where values were taken, such as rounds.
        target: entropy of the target in nats per row at each step.
        peers: the same of each peer on its own; see `fedkd.metrics.ensemble_entropy`.
        num_classes: draws a line at ln(classes), the entropy of knowing nothing.
        x_label: what a step is.
        title: the title.

    Raises:
        ValueError: if a curve does not have one value a step.
    """
    curves = {"target": target, **(peers or {})}
    with matplotlib.rc_context(_STYLE):
        figure = _figure(6.8, 4.0)
        axes = figure.subplots()
        for position, (name, values) in enumerate(curves.items()):
            axes.plot(
                steps,
                _one_per_step(name, values, steps),
                color="#000000" if position == 0 else COLORS[(position - 1) % 6],
                lw=2.4 if position == 0 else 1.3,
                linestyle=_DASHES[0 if position == 0 else (position - 1) // 6 % len(_DASHES)],
                marker="o" if len(steps) <= 25 else "",
                markersize=4,
                label=_visible(name),
            )
        if num_classes is not None:
            axes.axhline(
                np.log(num_classes),
                color="#666666",
                lw=1,
                linestyle=(0, (4, 3)),
                label=f"uniform over {num_classes} classes",
            )
        axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel("entropy (nats per row)")
        axes.set_title(title)
        axes.grid(visible=True)
        _finish_lines(figure, axes, steps)
    return figure


def schedules_in_force(
    steps: Sequence[int | float],
    values: Mapping[str, Sequence[int | float]],
    *,
    x_label: str = "round",
    title: str = "Schedules: the values in force",
) -> Figure:
    """Draw temperatures, weights and the like as they were at each step, one panel for each.

    Panels share the steps and have scales of their own: a temperature and a learning rate in one
    panel would hide the smaller.

    Args:
        steps: where values were in force.
        values: the resolved values by name of the setting, not the settings.
        x_label: what a step is.
        title: the title.

    Raises:
        ValueError: if there is no schedule, or one does not have one value a step.
    """
    if not values:
        raise ValueError("schedules_in_force needs at least 1 schedule, got 0")
    with matplotlib.rc_context(_STYLE):
        figure = _figure(6.8, 0.9 + 1.25 * len(values))
        panels = figure.subplots(len(values), 1, sharex=True, squeeze=False)[:, 0]
        for position, (name, series) in enumerate(values.items()):
            axes = panels[position]
            axes.plot(
                steps,
                _one_per_step(name, series, steps),
                color=COLORS[position % len(COLORS)],
                lw=1.8,
                # A value holds until the next step takes over.
                drawstyle="steps-post",
                marker="o" if len(steps) <= 25 else "",
                markersize=3.5,
            )
            axes.set_title(name)
            axes.grid(visible=True)
            axes.margins(y=0.15)
            axes.yaxis.set_major_locator(MaxNLocator(4))
        panels[-1].set_xlabel(x_label)
        _integer_steps(panels[-1], steps)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11.5)
    return figure


def threshold_plot(
    curve: ThresholdCurve,
    class_names: Sequence[str] | None = None,
    *,
    title: str = "What a confidence threshold keeps",
) -> Figure:
    """Draw kept share and accuracy by threshold, and the kept share of each class beside it.

    Args:
        curve: see `fedkd.metrics.threshold_curve`; needs two thresholds or more to be a curve.
        class_names: one for each class; None numbers them.
        title: the title.

    Raises:
        ValueError: if there are not as many names as classes.
    """
    num_classes = curve.kept_by_class.shape[1]
    names = [str(index) for index in range(num_classes)] if class_names is None else class_names
    _check_names(names, num_classes)
    with matplotlib.rc_context(_STYLE):
        figure = _figure(8.6, 4.2)
        left, right = figure.subplots(1, 2, sharey=True)
        left.plot(curve.thresholds, 100 * curve.kept, color=COLORS[0], lw=1.8, label="rows kept")
        if not np.isnan(curve.accuracy).all():
            left.plot(
                curve.thresholds,
                100 * curve.accuracy,
                color=COLORS[1],
                lw=1.8,
                linestyle=_DASHES[1],
                label="accuracy of the rows kept",
            )
        left.set_title(title)
        left.set_ylabel("share (%)")
        left.set_ylim(0, 102)
        for index, name in enumerate(names):
            shares = curve.kept_by_class[:, index]
            if np.isnan(shares).all():
                continue
            right.plot(
                curve.thresholds,
                100 * shares,
                color=COLORS[index % len(COLORS)],
                linestyle=_DASHES[index // len(COLORS) % len(_DASHES)],
                lw=1.3,
                label=_visible(name),
            )
        right.set_title("rows kept of each class")
        for axes in (left, right):
            axes.set_xlabel("least confidence")
            axes.grid(visible=True)
        left.legend(loc="lower left")
        if num_classes <= 28:
            figure.legend(
                *right.get_legend_handles_labels(),
                loc="outside right center",
                ncols=1 + (num_classes - 1) // 14,
                title="class",
            )
    return figure


def confidence_plot(
    histogram: ConfidenceHistogram, *, title: str = "Confidence of the target"
) -> Figure:
    """Draw how many rows have which confidence, see `fedkd.metrics.confidence_histogram`."""
    with matplotlib.rc_context(_STYLE):
        figure = _figure(6.0, 3.4)
        axes = figure.subplots()
        axes.bar(
            histogram.edges[:-1],
            histogram.counts,
            np.diff(histogram.edges),
            align="edge",
            color=COLORS[0],
            edgecolor="white",
        )
        axes.set_xlim(0, 1)
        axes.set_xlabel("confidence (highest probability)")
        axes.set_ylabel("rows")
        axes.set_title(f"{title}, {histogram.counts.sum():,} rows")
        _whole_numbers(axes, "y")
    return figure


def flatness_plot(
    curves: Mapping[str, Sequence[NoisePoint]],
    *,
    title: str = "Accuracy under Gaussian weight noise",
) -> Figure:
    """Draw each model's accuracy by size of weight noise; bands are a standard deviation of draws.

    Args:
        curves: see `fedkd.metrics.weight_noise_curve`, by name of the model.
        title: the title.
    """
    with matplotlib.rc_context(_STYLE):
        figure = _figure(6.8, 4.0)
        axes = figure.subplots()
        for position, (name, points) in enumerate(curves.items()):
            sigmas = [point.sigma for point in points]
            mean = 100 * np.array([point.accuracy for point in points])
            spread = 100 * np.array([point.accuracy_std for point in points])
            color = COLORS[position % len(COLORS)]
            dash = _DASHES[position // len(COLORS) % len(_DASHES)]
            axes.plot(sigmas, mean, "o", linestyle=dash, color=color, lw=1.8, label=_visible(name))
            low, high = (np.clip(mean + sign * spread, 0, 100) for sign in (-1, 1))
            axes.fill_between(sigmas, low, high, color=color, alpha=0.15, lw=0)
        axes.set_xlabel("standard deviation of the noise (sigma)")
        axes.set_ylabel("accuracy (%)")
        axes.set_title(title)
        axes.grid(visible=True)
        figure.legend(loc="outside right center")
    return figure


def gradient_plot(
    steps: Sequence[int | float],
    norm_ratios: Mapping[str, Sequence[int | float]],
    cosines: Mapping[str, Sequence[int | float]],
    *,
    x_label: str = "epoch",
    title: str = "Gradients of the terms beside that of the labels",
) -> Figure:
    """Draw how hard each term pulls a model, and whether the same way as the labels.

    Args:
        steps: where gradients were compared.
        norm_ratios: by term, norm of its gradient over that of the labels' gradient.
        cosines: by term, of the angle between the two, in [-1, 1]; see
            `fedkd.metrics.compare_gradients`.
        x_label: what a step is.
        title: the title.

    Raises:
        ValueError: if a curve does not have one value a step.
    """
    panels = ((norm_ratios, 1.0, "norm, labels' = 1"), (cosines, 0.0, "cosine"))
    with matplotlib.rc_context(_STYLE):
        figure = _figure(6.8, 5.0)
        all_axes = figure.subplots(2, 1, sharex=True)
        for axes, (curves, reference, label) in zip(all_axes, panels, strict=True):
            axes.axhline(reference, color="#666666", lw=1, linestyle=(0, (4, 3)))
            for position, (name, values) in enumerate(curves.items()):
                axes.plot(
                    steps,
                    _one_per_step(name, values, steps),
                    color=COLORS[position % len(COLORS)],
                    linestyle=_DASHES[position // len(COLORS) % len(_DASHES)],
                    lw=1.8,
                    marker="o" if len(steps) <= 25 else "",
                    markersize=4,
                    label=_visible(name),
                )
            axes.set_ylabel(label)
            axes.grid(visible=True)
        all_axes[0].set_title(title)
        # Ratios, also those of a loss that vanishes, differ by orders of magnitude.
        all_axes[0].set_yscale("log")
        all_axes[1].set_ylim(-1.02, 1.02)
        all_axes[1].set_xlabel(x_label)
        _integer_steps(all_axes[1], steps)
        figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    FigureCanvasAgg(figure)
    return figure


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
    _check_names(row_names, num_rows)
    _check_names(column_names, num_columns)
    numbered = values.size <= MOST_NUMBERED_CELLS
    cell = 0.46 if numbered else 0.14
    with matplotlib.rc_context(_STYLE):
        longest_row = max((len(name) for name in row_names), default=0)
        longest_column = max((len(name) for name in column_names), default=0)
        upright = longest_column * 0.08 > cell
        # Neither the colour bar nor the title starts left of the cells.
        longest_title = max(len(line) for line in title.splitlines())
        figure = _figure(
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
                        color=_readable_on(shades[row, column]),
                    )
        figure.colorbar(image, ax=axes, label=color_label, shrink=0.9)
    return figure


def _readable_on(background: Float[np.ndarray, "4"]) -> str:
    """Return black or white, whichever stands out from a colour."""
    red, green, blue = background[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def _name_ticks(axes: Axes, axis: str, names: Sequence[str], *, rotation: int) -> None:
    # Every n-th name where all would overlap.
    every = -(-len(names) // 40)
    positions = list(range(0, len(names), every))
    shown = [names[position] for position in positions]
    if axis == "x":
        axes.set_xticks(positions, shown, rotation=rotation)
    else:
        axes.set_yticks(positions, shown)


def _check_names(names: Sequence[str], wanted: int) -> None:
    if len(names) != wanted:
        raise ValueError(f"names must be {wanted}, one for each row or column, got {len(names)}")


def _one_per_step(
    name: str, values: Sequence[int | float], steps: Sequence[int | float]
) -> Sequence[int | float]:
    if len(values) != len(steps):
        raise ValueError(
            f"{name!r} must have one value for each of {len(steps)} steps, got {len(values)}"
        )
    return values


def _visible(name: str) -> str:
    # A label that starts with _ would be left out of the legend; a zero-width space is not seen.
    return f"\u200b{name}" if name.startswith("_") else name


def _finish_lines(figure: Figure, axes: Axes, steps: Sequence[int | float]) -> None:
    _integer_steps(axes, steps)
    figure.legend(loc="outside right center")


def _integer_steps(axes: Axes, steps: Sequence[int | float]) -> None:
    if all(float(step).is_integer() for step in steps):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _whole_numbers(axes: Axes, axis: str) -> None:
    getattr(axes, f"{axis}axis").set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
