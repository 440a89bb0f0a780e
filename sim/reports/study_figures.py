"""Figures of a study: what accuracy costs, seed by seed, and client by client."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from types import MappingProxyType

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from fedkd.figures.saving import Style
from fedkd.figures.style import color, dash, visible
from sim.reports.figures import (
    LONGEST_TICK,
    MARKERS,
    STYLE,
    WIDE,
    Runs,
    is_leftmost,
    new_figure,
    place_legend,
    plain_number,
    shortened,
    title_axes,
)
from sim.reports.runs import RunRecord, number
from sim.reports.statistics import counted, epsilon_of, measured, values_by_seed

MOST_ARMS = 24
"""With more of them points have no colours, and only those on the front have names."""

MOST_PANELS = 9
"""Arms that have a panel each."""

_FAR = 20
"""Costs that lie so far apart need a logarithmic axis."""


def pareto_front(points: Mapping[str, tuple[int | float, int | float]]) -> list[str]:
    """Return who is beaten by nobody: no other costs no more and has more, or costs less.

    Args:
        points: by name, cost and accuracy.

    Returns:
        The names by cost; of equal points all.

    Source:
        Pareto, 1906, Manuale di economia politica, chapter 6.
    """
    front = [
        name
        for name, (cost, value) in points.items()
        if not any(
            other_cost <= cost and other >= value and (other_cost, other) != (cost, value)
            for other_cost, other in points.values()
        )
    ]
    return sorted(front, key=lambda name: points[name])


def pareto_fronts(runs: Runs, columns: int = WIDE) -> Figure | None:
    """Draw accuracy in the last round against each cost in which arms differ, a panel a cost."""
    reached = {arm: found for arm, of_arm in runs.items() if (found := measured(of_arm))}
    panels = {}
    for title, cost in _COSTS.items():
        spent = {arm: value for arm in reached if (value := cost(counted(runs[arm]))) is not None}
        if len(spent) > 1 and max(spent.values()) > min(spent.values()):
            panels[title] = spent
    if "simulated seconds" in panels:
        # What a clock counts is the same on any machine.
        panels.pop("seconds of the rounds", None)
    if not panels:
        return None
    figure, all_axes = new_figure(len(panels), height=3.4, columns=columns, most=3)
    places = {arm: place for place, arm in enumerate(runs)}
    crowded = len(runs) > MOST_ARMS
    for axes, (title, spent) in zip(all_axes, panels.items(), strict=True):
        points = {arm: (value, 100 * reached[arm].mean) for arm, value in spent.items()}
        front = pareto_front(points)
        axes.plot(*_stairs([points[arm] for arm in front]), color="#999999", lw=1.2, zorder=1)
        for arm, point in points.items():
            axes.plot(
                *([each] for each in point),
                color="#999999" if crowded else color(places[arm]),
                marker="o" if crowded else MARKERS[places[arm] % len(MARKERS)],
                markersize=7 if arm in front else 5,
                linestyle="none",
                clip_on=False,  # who spends nothing stands on the edge
                label=visible(arm) if not crowded or arm in front else "_other",
            )
        _scale(axes, list(spent.values()))
        # A panel of several is narrow; the whole name stands at its axis.
        short = title.partition(" of ")[0]
        told = (
            f"Against {short}" if len(panels) > 1 else f"Mean client accuracy (%) against {title}"
        )
        title_axes(axes, told, "")
        axes.set_xlabel(title)
        if is_leftmost(axes):
            axes.set_ylabel("accuracy (%)")
    if not crowded:
        handles = [
            Line2D(
                [],
                [],
                color=color(places[arm]),
                marker=MARKERS[places[arm] % len(MARKERS)],
                linestyle="none",
            )
            for arm in reached
        ]
        place_legend(figure, handles, shortened(reached))
    return figure


def _mean_kilobytes(runs: Sequence[RunRecord]) -> float | None:
    return fmean(
        (sum(run.bytes_up.values()) + sum(run.bytes_down.values())) / run.num_clients / 1e3
        for run in runs
    )


def _mean(of: Callable[[RunRecord], float | None]) -> Callable[[Sequence[RunRecord]], float | None]:
    def mean(runs: Sequence[RunRecord]) -> float | None:
        values = [value for run in runs if (value := of(run)) is not None]
        return fmean(values) if len(values) == len(runs) else None

    return mean


_COSTS: Mapping[str, Callable[[Sequence[RunRecord]], float | None]] = MappingProxyType(
    {
        "kB per client": _mean_kilobytes,
        "GFLOP of learning": _mean(lambda run: run.gflops),
        "epsilon": epsilon_of,
        "simulated seconds": _mean(lambda run: run.simulated_s),
        "seconds of the rounds": _mean(lambda run: run.seconds),
    }
)
"""What accuracy may cost: smaller is better."""


def _stairs(points: Sequence[tuple[int | float, int | float]]) -> tuple[list[float], list[float]]:
    """Return the steps of a front: what so much buys at best."""
    x, y = [points[0][0]], [points[0][1]]
    for (_, before), (cost, value) in pairwise(points):
        x += [cost, cost]
        y += [before, value]
    return x, y


def _scale(axes: Axes, costs: Sequence[int | float]) -> None:
    least = min((cost for cost in costs if cost > 0), default=1.0)
    if max(costs) / least >= _FAR:
        # Who sends nothing has a place at 0.
        axes.set_xscale("symlog", linthresh=least) if min(costs) <= 0 else axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    elif min(costs) >= 0:
        axes.set_xlim(left=0 if min(costs) == 0 or max(costs) / min(costs) > 2 else None)
    axes.xaxis.set_major_formatter(FuncFormatter(plain_number))


def accuracy_by_seed(runs: Runs, columns: int = WIDE) -> Figure | None:
    """Draw the accuracy of every run: a line a seed through all arms, which are its pairs."""
    values = {arm: values_by_seed(of_arm, "accuracy", "last") for arm, of_arm in runs.items()}
    values = {arm: of_arm for arm, of_arm in values.items() if of_arm}
    seeds = sorted({seed for of_arm in values.values() for seed in of_arm})
    if not 2 <= len(values) <= MOST_ARMS // 2 or len(seeds) < 2:
        return None
    figure, (axes,) = new_figure(1, height=1.1 + 0.42 * len(values), columns=columns)
    for seed in seeds:
        line = [
            (100 * of_arm[seed], place)
            for place, of_arm in enumerate(values.values())
            if seed in of_arm
        ]
        axes.plot(*zip(*line, strict=True), color="#999999", lw=0.9, zorder=1)
    places = {arm: place for place, arm in enumerate(runs)}
    for place, (arm, of_arm) in enumerate(values.items()):
        axes.plot(
            [100 * value for value in of_arm.values()],
            [place] * len(of_arm),
            color=color(places[arm]),
            marker=MARKERS[places[arm] % len(MARKERS)],
            markersize=6,
            alpha=0.9,
            linestyle="none",
        )
    axes.set_yticks(range(len(values)), shortened(values, LONGEST_TICK[columns]))
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("mean client accuracy (%)")
    title_axes(
        axes, "Mean client accuracy of every run (%), last round", "a mark a run, a line a seed"
    )
    figure.set_label(
        "; ".join(
            f"{arm}: " + ", ".join(f"{100 * of_arm[seed]:.1f}" for seed in sorted(of_arm))
            for arm, of_arm in values.items()
        )
    )
    return figure


def clients_by_round(runs: Runs, columns: int = WIDE) -> Figure | None:
    """Draw the accuracy of every client by round, a panel an arm, of the first seed that counts."""
    curves = {arm: _client_curves(counted(of_arm)[0]) for arm, of_arm in runs.items()}
    curves = {arm: of_arm for arm, of_arm in curves.items() if of_arm}
    longest = max((len(x) for of_arm in curves.values() for x, _ in of_arm), default=0)
    if not curves or len(curves) > MOST_PANELS or longest < 2:
        return None
    figure, panels = new_figure(
        len(curves), height=2.4, columns=columns, share=True, most=min(3, len(curves))
    )
    places = {arm: place for place, arm in enumerate(runs)}
    for axes, (arm, of_arm) in zip(panels, curves.items(), strict=True):
        by_round: dict[float, list[float]] = {}
        for x, y in of_arm:
            axes.plot(x, y, color="#999999", lw=0.9, alpha=0.8)
            for round, value in zip(x, y, strict=True):
                by_round.setdefault(round, []).append(value)
        axes.plot(
            [*sorted(by_round)],
            [fmean(by_round[round]) for round in sorted(by_round)],
            color=color(places[arm]),
            linestyle=dash(places[arm]),
            lw=2.2,
            label=visible(arm),
        )
        if len(curves) > 1:
            (name,) = shortened([arm], LONGEST_TICK[columns])
            axes.set_title(name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("round")
        if is_leftmost(axes):
            axes.set_ylabel("accuracy (%)")
    return figure


def _client_curves(run: RunRecord) -> list[tuple[list[float], list[float]]]:
    found: dict[int, tuple[list[float], list[float]]] = {}
    for row in run.clients:
        value = number(row, "accuracy")
        if value is not None and not math.isnan(value):
            rounds, values = found.setdefault(row["client"], ([], []))
            rounds.append(float(row["round"]))
            values.append(100 * value)
    return list(found.values())


STUDY_FIGURES: Mapping[str, Callable[[Runs, int], Figure | None]] = MappingProxyType(
    {
        "accuracy_by_seed": accuracy_by_seed,
        "clients_by_round": clients_by_round,
        "pareto_fronts": pareto_fronts,
    }
)
"""What a report draws of a study, by file name."""


def draw_study(runs: Runs, style: Style = STYLE, columns: int = WIDE) -> dict[str, Figure]:
    """Draw all figures of a study that there is something to show in, by name."""
    with matplotlib.rc_context(style):
        drawn = {name: draw(runs, columns) for name, draw in STUDY_FIGURES.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}
