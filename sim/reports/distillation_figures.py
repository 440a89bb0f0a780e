"""Figures of a distillation's report: how models learned, and what the finished ones do."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fedkd.distillation.judging.figures import draw
from fedkd.figures.style import color, dash, visible
from sim.reports.figures import (
    STYLE,
    WIDE,
    is_leftmost,
    new_figure,
    place_legend,
    title_axes,
)
from sim.reports.runs import number
from sim.server.observers import Row

Epochs = Mapping[int, Sequence[Row]]
"""The rows of every model's epochs, by seed."""

CURVES = ("validation_by_epoch", "losses_by_epoch")
"""Figures whose panels stand below each other on a phone."""

Drawn = dict[str, tuple[Figure, str]]
"""By file name: a figure, and a text for those who cannot see it."""


def draw_distillation(epochs: Epochs, diagnostics: Mapping[str, Any], columns: int = WIDE) -> Drawn:
    """Draw all figures that there is something to show in.

    Args:
        epochs: as ``metrics.jsonl`` has them.
        diagnostics: as ``diagnostics.json`` has them; may be empty.
        columns: panels side by side.
    """
    drawn: Drawn = {}
    with matplotlib.rc_context(STYLE):
        figure = validation_by_epoch(epochs, columns)
        if figure is not None:
            drawn["validation_by_epoch"] = figure, "Validation accuracy and loss by epoch and model"
        figure = losses_by_epoch(epochs, columns)
        if figure is not None:
            drawn["losses_by_epoch"] = figure, "Each term of the loss by epoch, for every model"
    # The others are as wide as what they show.
    finished = draw(diagnostics) if diagnostics and columns == WIDE else {}
    # Every one has a title that says more.
    return drawn | {name: (figure, name.replace("_", " ")) for name, figure in finished.items()}


def validation_by_epoch(epochs: Epochs, columns: int = WIDE) -> Figure | None:
    """Draw validation accuracy and loss of every model; a line a model, the mean over seeds."""
    panels = [
        ("validation_accuracy", "Accuracy on the validation split (%) by epoch", "accuracy (%)"),
        ("validation_loss", "Cross-entropy on the validation split by epoch", "loss (nats)"),
    ]
    validated = {
        row["model"] for rows in epochs.values() for row in rows if "validation_loss" in row
    }
    models = [model for model in _models(epochs) if model in validated]
    if not models:
        return None
    figure, all_axes = new_figure(2, height=3.9, columns=columns)
    note = "line: mean over seeds; band: lowest to highest" if len(epochs) > 1 else "one seed"
    for axes, (key, title, label) in zip(all_axes, panels, strict=True):
        factor = 100.0 if key == "validation_accuracy" else 1.0
        for position, model in enumerate(models):
            _draw(axes, epochs, model, key, position, factor)
        title_axes(axes, title, note if axes is all_axes[0] else "")
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    place_legend(figure, _handles(len(models)), models)
    return figure


def losses_by_epoch(epochs: Epochs, columns: int = WIDE) -> Figure | None:
    """Draw the weighted terms of each model's loss; a panel a model, a line a term."""
    terms = {
        model: list(
            dict.fromkeys(
                key
                for rows in epochs.values()
                for row in rows
                if row["model"] == model
                for key in row
                if key.startswith("loss/")
            )
        )
        for model in _models(epochs)
    }
    terms = {model: of_model for model, of_model in terms.items() if of_model}
    if not terms:
        return None
    names = list(dict.fromkeys(name for of_model in terms.values() for name in of_model))
    figure, panels = new_figure(len(terms), height=2.9, columns=columns, most=3)
    for axes, (model, of_model) in zip(panels, terms.items(), strict=True):
        for name in of_model:
            _draw(axes, epochs, model, name, names.index(name), 1.0)
        axes.set_title(model)
        axes.set_xlabel("epoch")
        if is_leftmost(axes):
            axes.set_ylabel("loss, weighted")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    place_legend(figure, _handles(len(names)), [name.removeprefix("loss/") for name in names])
    return figure


def _models(epochs: Epochs) -> list[str]:
    return list(dict.fromkeys(row["model"] for rows in epochs.values() for row in rows))


def _handles(count: int) -> list[Line2D]:
    return [Line2D([], [], lw=1.8, **_look(position)) for position in range(count)]


def _look(position: int) -> dict[str, Any]:
    return {
        "color": color(position),
        "linestyle": dash(position),
    }


def _draw(axes: Axes, epochs: Epochs, model: str, key: str, position: int, factor: float) -> None:
    by_epoch: dict[int, list[float]] = {}
    for rows in epochs.values():
        for row in rows:
            value = number(row, key)
            if row["model"] == model and value is not None:
                by_epoch.setdefault(row["epoch"], []).append(factor * value)
    if not by_epoch:
        return
    steps = sorted(by_epoch)
    means = [float(np.mean(by_epoch[step])) for step in steps]
    axes.plot(
        steps,
        means,
        lw=1.8,
        marker="o" if len(steps) == 1 else "",
        label=visible(key.removeprefix("loss/") if key.startswith("loss/") else model),
        **_look(position),
    )
    if any(len(values) > 1 for values in by_epoch.values()):
        axes.fill_between(
            steps,
            [min(by_epoch[step]) for step in steps],
            [max(by_epoch[step]) for step in steps],
            color=color(position),
            alpha=0.12,
            lw=0,
        )
