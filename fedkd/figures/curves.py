"""Curves over rounds, epochs or the size of noise."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedkd.figures.style import (
    COLORS,
    DASHES,
    STYLE,
    integer_steps,
    new_figure,
    one_per_step,
    visible,
)
from fedkd.metrics.flatness import NoisePoint


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
    with matplotlib.rc_context(STYLE):
        figure = new_figure(6.8, 4.0)
        axes = figure.subplots()
        for position, (name, values) in enumerate(curves.items()):
            axes.plot(
                steps,
                one_per_step(name, values, steps),
                color="#000000" if position == 0 else COLORS[(position - 1) % 6],
                lw=2.4 if position == 0 else 1.3,
                linestyle=DASHES[0 if position == 0 else (position - 1) // 6 % len(DASHES)],
                marker="o" if len(steps) <= 25 else "",
                markersize=4,
                label=visible(name),
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
    with matplotlib.rc_context(STYLE):
        figure = new_figure(6.8, 0.9 + 1.25 * len(values))
        panels = figure.subplots(len(values), 1, sharex=True, squeeze=False)[:, 0]
        for position, (name, series) in enumerate(values.items()):
            axes = panels[position]
            axes.plot(
                steps,
                one_per_step(name, series, steps),
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
        integer_steps(panels[-1], steps)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11.5)
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
    with matplotlib.rc_context(STYLE):
        figure = new_figure(6.8, 4.0)
        axes = figure.subplots()
        for position, (name, points) in enumerate(curves.items()):
            sigmas = [point.sigma for point in points]
            mean = 100 * np.array([point.accuracy for point in points])
            spread = 100 * np.array([point.accuracy_std for point in points])
            color = COLORS[position % len(COLORS)]
            dash = DASHES[position // len(COLORS) % len(DASHES)]
            axes.plot(sigmas, mean, "o", linestyle=dash, color=color, lw=1.8, label=visible(name))
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
    with matplotlib.rc_context(STYLE):
        figure = new_figure(6.8, 5.0)
        all_axes = figure.subplots(2, 1, sharex=True)
        for axes, (curves, reference, label) in zip(all_axes, panels, strict=True):
            axes.axhline(reference, color="#666666", lw=1, linestyle=(0, (4, 3)))
            for position, (name, values) in enumerate(curves.items()):
                axes.plot(
                    steps,
                    one_per_step(name, values, steps),
                    color=COLORS[position % len(COLORS)],
                    linestyle=DASHES[position // len(COLORS) % len(DASHES)],
                    lw=1.8,
                    marker="o" if len(steps) <= 25 else "",
                    markersize=4,
                    label=visible(name),
                )
            axes.set_ylabel(label)
            axes.grid(visible=True)
        all_axes[0].set_title(title)
        # Ratios, also those of a loss that vanishes, differ by orders of magnitude.
        all_axes[0].set_yscale("log")
        all_axes[1].set_ylim(-1.02, 1.02)
        all_axes[1].set_xlabel(x_label)
        integer_steps(all_axes[1], steps)
        figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def _finish_lines(figure: Figure, axes: Axes, steps: Sequence[int | float]) -> None:
    integer_steps(axes, steps)
    figure.legend(loc="outside right center")
