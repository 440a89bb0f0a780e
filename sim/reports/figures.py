"""Figures of a report, drawn with matplotlib's objects: no display, no global figure list.

One run draws like a study: each function takes the runs of each arm, even of one arm with one
seed, and returns None where the runs hold nothing to draw. Colours and markers are given out by
the position of an arm, so an arm looks the same in every figure.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from fedkd.figures.saving import Style
from fedkd.figures.style import STYLE as HOUSE_STYLE
from fedkd.figures.style import color, dash, visible
from sim.reports.runs import RunRecord, number
from sim.reports.statistics import SHARES, counted, epsilon_of, estimate, values_by_seed

Runs = Mapping[str, Sequence[RunRecord]]

WIDE, NARROW = 2, 1
"""Panels side by side, and by that the width of a figure: for a screen, and for a phone."""

PANEL_WIDTH = 4.1
"""Inches: text of 9 points is 11 pixels on a phone of 400, and 12 on a report's 820."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE: Any = MappingProxyType(
    {
        **HOUSE_STYLE,
        "axes.grid": True,
        "grid.linewidth": 0.8,
        "xtick.color": "#333333",
        "ytick.color": "#333333",
    }
)
"""A report's figures are read off, not only looked at: they have a grid."""


@dataclass(frozen=True, slots=True)
class _Look:
    color: str
    marker: str
    dash: Any


def _looks(runs: Runs) -> dict[str, _Look]:
    return {
        arm: _Look(
            color(position),
            MARKERS[position % len(MARKERS)],
            dash(position),
        )
        for position, arm in enumerate(runs)
    }


@dataclass(frozen=True, slots=True)
class Curve:
    """A measure by round, averaged over the seeds of an arm.

    Attributes:
        rounds: in which every run that counts has a value.
        mean: over seeds.
        low, high: the band; equal to the mean for one seed.
        seeds: how many.
    """

    rounds: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    seeds: int


def curve_of(runs: Sequence[RunRecord], key: str) -> Curve | None:
    """Average a federation measure over the runs that count, round by round.

    The band is a 95 % t-interval from three seeds on. With two seeds that interval is several
    times wider than their distance, so the band then shows the two values themselves.
    """
    chosen = counted(runs)
    of_runs = [
        {row["round"]: value for row in run.federation if (value := number(row, key)) is not None}
        for run in chosen
    ]
    rounds = sorted(set.intersection(*(set(values) for values in of_runs))) if of_runs else []
    if not rounds:
        return None
    means, lows, highs = [], [], []
    for round in rounds:
        values = [of_run[round] for of_run in of_runs]
        of_round = estimate(values)
        assert of_round is not None  # noqa: S101
        means.append(of_round.mean)
        if len(values) < 3 or of_round.low is None or of_round.high is None:
            lows.append(min(values))
            highs.append(max(values))
        else:
            lows.append(of_round.low)
            highs.append(of_round.high)
    return Curve(np.array(rounds), np.array(means), np.array(lows), np.array(highs), len(chosen))


def band_note(curves: Sequence[Curve]) -> str:
    """Say what lines and bands are, for the figure itself."""
    seeds = {curve.seeds for curve in curves}
    if seeds == {1}:
        return "one seed each"
    parts = ["line: mean over seeds"]
    if any(count >= 3 for count in seeds):
        parts.append("band: 95 % t-interval")
    if 2 in seeds:
        parts.append("band of two seeds: from the lower to the higher")
    if 1 in seeds:
        parts.append("no band: one seed")
    return "; ".join(parts)


def accuracy_by_round(runs: Runs, columns: int = WIDE) -> Figure | None:
    """Draw mean client accuracy by round."""
    curves = _curves(runs, "accuracy")
    if not curves:
        return None
    figure, (axes,) = new_figure(1, height=4.4, columns=columns)
    _draw_curves(axes, runs, curves, percent=True)
    title_axes(
        axes,
        "Mean client accuracy on the common test split (%) by round",
        band_note([*curves.values()]),
    )
    axes.set_xlabel("round")
    axes.set_ylabel("mean client accuracy (%)")
    _legend(figure, runs, list(curves))
    return figure


def accuracy_by_exchange(runs: Runs, columns: int = WIDE) -> Figure | None:
    """Draw mean client accuracy against the bytes that a client had exchanged by then.

    Arms without any exchange have no place on the axis: a dashed line shows where they end.
    """
    curves = _curves(runs, "accuracy")
    if not curves:
        return None
    exchanged = {arm: _kilobytes_by_round(runs[arm], curve.rounds) for arm, curve in curves.items()}
    silent = [arm for arm, spent in exchanged.items() if spent[-1] == 0]
    if len(silent) == len(curves):
        return None
    figure, (axes,) = new_figure(1, height=4.4, columns=columns)
    looks = _looks(runs)
    totals = [spent[-1] for arm, spent in exchanged.items() if arm not in silent]
    logarithmic = max(totals) / min(totals) >= 5
    if logarithmic:
        axes.set_xscale("log")
    for arm, curve in curves.items():
        look = looks[arm]
        if arm in silent:
            axes.axhline(
                100 * curve.mean[-1],
                color=look.color,
                linestyle=(0, (6, 3)),
                lw=1.6,
                label=visible(arm),
            )
            continue
        begun = exchanged[arm] > 0
        kilobytes = exchanged[arm][begun]
        axes.plot(
            kilobytes,
            100 * curve.mean[begun],
            label=visible(arm),
            color=look.color,
            linestyle=look.dash,
            marker=look.marker,
            markersize=_marker_size(len(kilobytes)),
            lw=1.8,
        )
        low, high = (100 * np.clip(edge[begun], 0, 1) for edge in (curve.low, curve.high))
        _draw_band(axes, kilobytes, low, high, curve.seeds, look)
    if not logarithmic:
        axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(plain_number))
    title_axes(
        axes,
        "Mean client accuracy (%) against kB sent and received per client until then",
        band_note([*curves.values()]) + ("; dashed: last round, no exchange" if silent else ""),
    )
    axes.set_xlabel("kB per client" + (" (logarithmic)" if logarithmic else ""))
    axes.set_ylabel("mean client accuracy (%)")
    _legend(figure, runs, list(curves), dashed=silent)
    return figure


def accuracy_by_time(runs: Runs, columns: int = WIDE) -> Figure | None:
    """Draw mean client accuracy against what the simulated clock showed, where there is one."""
    curves = _curves(runs, "accuracy")
    clocked = {
        arm: times
        for arm, curve in curves.items()
        if (times := _clock_by_round(runs[arm], curve.rounds)) is not None
    }
    if not clocked:
        return None
    figure, (axes,) = new_figure(1, height=4.4, columns=columns)
    looks = _looks(runs)
    for arm, seconds in clocked.items():
        look, curve = looks[arm], curves[arm]
        axes.plot(
            seconds,
            100 * curve.mean,
            label=visible(arm),
            color=look.color,
            linestyle=look.dash,
            marker=look.marker,
            markersize=_marker_size(len(seconds)),
            lw=1.8,
        )
        low, high = (100 * np.clip(edge, 0, 1) for edge in (curve.low, curve.high))
        _draw_band(axes, seconds, low, high, curve.seeds, look)
    totals = [float(seconds[-1]) for seconds in clocked.values() if seconds[-1] > 0]
    logarithmic = bool(totals) and max(totals) / min(totals) >= 5
    if logarithmic:
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    title_axes(
        axes,
        "Mean client accuracy (%) against simulated seconds",
        band_note([curves[arm] for arm in clocked]),
    )
    axes.set_xlabel("simulated seconds" + (" (logarithmic)" if logarithmic else ""))
    axes.set_ylabel("mean client accuracy (%)")
    _legend(figure, runs, list(clocked))
    return figure


def _clock_by_round(runs: Sequence[RunRecord], rounds: np.ndarray) -> np.ndarray | None:
    """Return what the clock showed after each of these rounds: mean over runs; None without one."""
    of_runs = []
    for run in counted(runs):
        shown = {row["round"]: number(row, "simulated_s") for row in run.federation}
        times = [shown.get(round) for round in rounds.tolist()]
        if None in times:
            return None
        of_runs.append(times)
    return np.asarray(np.mean(np.array(of_runs, np.float64), axis=0))


def accuracy_by_epsilon(runs: Runs, columns: int = WIDE) -> Figure | None:
    """Draw mean client accuracy in the last judged round against epsilon, and bytes beside it.

    Arms that promise nothing have no place on the axis: a line shows their accuracy. Arms that
    differ in nothing but their epsilon are joined.
    """
    measured = {
        arm: found
        for arm, of_arm in runs.items()
        if (found := estimate([*values_by_seed(of_arm, "accuracy", "last").values()], SHARES))
    }
    spent = {arm: epsilon_of(counted(runs[arm])) for arm in measured}
    # Who released nothing spent nothing, and has no place on a logarithmic axis either.
    private = {arm: value for arm, value in spent.items() if value}
    if not private:
        return None
    looks = _looks(runs)
    height = max(4.4, 1.9 + 0.3 * len(measured))
    figure, (axes, beside) = new_figure(2, height=height, columns=columns)
    if max(private.values()) / min(private.values()) >= 5:
        axes.set_xscale("log")
    families: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    taken: list[float] = []
    for arm, found in measured.items():
        look, mean = looks[arm], 100 * found.mean
        low, high = (100 * (found.mean if end is None else end) for end in (found.low, found.high))
        if arm not in private:
            axes.axhline(mean, color=look.color, linestyle=(0, (6, 3)), lw=1.6, label=visible(arm))
            continue
        families.setdefault(_family(runs[arm][0]), []).append((private[arm], mean))
        # Arms of one epsilon stand side by side, or their bars would hide each other.
        company = sum(math.isclose(other, private[arm], rel_tol=0.03) for other in taken)
        taken.append(private[arm])
        beside_others = ScaledTranslation(company * 8 / 72, 0, figure.dpi_scale_trans)
        axes.errorbar(
            [private[arm]],
            [mean],
            yerr=[[mean - low], [high - mean]],
            label=visible(arm),
            color=look.color,
            marker=look.marker,
            markersize=6,
            capsize=3,
            lw=1.4,
            transform=axes.transData + beside_others,
        )
        # What is moved aside is not looked at when the axes are scaled.
        axes.update_datalim([(private[arm], low), (private[arm], high)])
    for joined in families.values():
        axes.plot(*zip(*sorted(joined), strict=True), color="#999999", lw=1, zorder=1)
    axes.autoscale_view()
    axes.xaxis.set_major_formatter(FuncFormatter(plain_number))
    axes.xaxis.set_minor_formatter(NullFormatter())
    several = any(found.n > 1 for found in measured.values())
    title_axes(
        axes,
        "Mean client accuracy (%) against epsilon",
        ("bars: 95 % t-interval over seeds" if several else "one seed each")
        + ("; dashed: no guarantee" if None in spent.values() else "")
        + ("; dashed: nothing spent" if 0 in spent.values() else ""),
    )
    axes.set_xlabel("epsilon" + (" (logarithmic)" if axes.get_xscale() == "log" else ""))
    axes.set_ylabel("mean client accuracy (%)")
    totals = [_kilobytes_of_run(runs[arm]) for arm in measured]
    beside.barh(range(len(measured)), totals, color=[looks[arm].color for arm in measured])
    beside.set_yticks(range(len(measured)), shortened(measured, LONGEST_TICK[columns]))
    beside.set_ylim(len(measured) - 0.5, -0.5)
    beside.grid(visible=False, axis="y")
    title_axes(beside, "kB sent and received per client", "over the whole run; mean over seeds")
    beside.set_xlabel("kB per client")
    _legend(figure, runs, list(measured), dashed=[arm for arm in measured if arm not in private])
    return figure


def _family(run: RunRecord) -> tuple[str, ...]:
    """Return what arms have in common whose points are joined."""
    told = run.privacy
    return str(run.settings["strategy"]), *(str(told.get(key)) for key in ("mechanism", "where"))


def _kilobytes_of_run(runs: Sequence[RunRecord]) -> float:
    totals = [
        (sum(run.bytes_up.values()) + sum(run.bytes_down.values())) / run.num_clients / 1e3
        for run in counted(runs)
    ]
    return sum(totals) / len(totals)


def accuracy_by_client(runs: Runs, columns: int = WIDE) -> Figure | None:
    """Draw each client's accuracy in the last judged round, in a lane for each architecture."""
    points = {
        arm: [
            (run.model_labels[row["client"]], 100 * row["accuracy"])
            for run in counted(of_arm)
            for row in run.last_clients
            if row["client"] < run.num_clients
        ]
        for arm, of_arm in runs.items()
    }
    points = {arm: of_arm for arm, of_arm in points.items() if of_arm}
    if not points:
        return None
    models = list(dict.fromkeys(model for of_arm in points.values() for model, _ in of_arm))
    looks = _looks(runs)
    height = 1.7 + len(points) * max(0.55, 0.16 * len(models))
    figure, (axes,) = new_figure(1, height=height, columns=columns)
    for position, (arm, of_arm) in enumerate(points.items()):
        values = np.array([value for _, value in of_arm])
        _draw_box(axes, position, values, looks[arm].color)
        for lane, model in enumerate(models):
            of_model = np.array([value for name, value in of_arm if name == model])
            height = position + 0.62 * ((lane + 0.5) / len(models) - 0.5)
            axes.plot(
                of_model,
                np.full(len(of_model), height),
                linestyle="none",
                marker=MARKERS[lane % len(MARKERS)],
                markersize=5 if len(values) <= 120 else 3.2,
                color=SHADES[lane % len(SHADES)],
                markeredgecolor="white",
                markeredgewidth=0.4,
                alpha=0.9,
            )
    axes.set_yticks(range(len(points)), shortened(points, LONGEST_TICK[columns]))
    axes.set_ylim(len(points) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    seeds = max(len(counted(of_arm)) for of_arm in runs.values() if of_arm)
    title_axes(
        axes,
        "Accuracy of each client on the common test split (%), last round, by model",
        ("one mark a client and seed" if seeds > 1 else "one mark a client")
        + "; box: quartiles and median; whiskers: lowest and highest",
    )
    axes.set_xlabel("accuracy (%)")
    figure.set_label(
        "; ".join(_spread(arm, [value for _, value in of_arm]) for arm, of_arm in points.items())
    )
    handles = [
        Line2D(
            [],
            [],
            linestyle="none",
            marker=MARKERS[lane % len(MARKERS)],
            color=SHADES[lane % len(SHADES)],
        )
        for lane in range(len(models))
    ]
    place_legend(figure, handles, shortened(models))
    return figure


def targets_by_round(runs: Runs, columns: int = WIDE) -> Figure | None:
    """Draw the entropy of the shared targets and the peers' disagreement, where arms have them."""
    panels = [
        (
            "target_entropy",
            "Entropy of the shared targets (nats) by round",
            "entropy (nats)",
            False,
        ),
        (
            "peer_disagreement",
            "Peer disagreement on public rows (%) by round",
            "pairs with different top classes (%)",
            True,
        ),
    ]
    filled = [
        (curves, title, label, percent)
        for key, title, label, percent in panels
        if (curves := _curves(runs, key))
    ]
    if not filled:
        return None
    figure, all_axes = new_figure(len(filled), height=3.9, columns=columns)
    note = band_note([curve for curves, *_ in filled for curve in curves.values()])
    shown: list[str] = []
    for axes, (curves, title, label, percent) in zip(all_axes, filled, strict=True):
        _draw_curves(axes, runs, curves, percent=percent)
        # One note for both panels: it runs on over the second.
        title_axes(axes, title, note if axes is all_axes[0] else "")
        axes.set_xlabel("round")
        axes.set_ylabel(label)
        shown += [arm for arm in curves if arm not in shown]
    _legend(figure, runs, [arm for arm in runs if arm in shown])
    return figure


FIGURES: Mapping[str, Callable[[Runs, int], Figure | None]] = MappingProxyType(
    {
        "accuracy_by_round": accuracy_by_round,
        "accuracy_by_exchange": accuracy_by_exchange,
        "accuracy_by_time": accuracy_by_time,
        "accuracy_by_epsilon": accuracy_by_epsilon,
        "accuracy_by_client": accuracy_by_client,
        "targets_by_round": targets_by_round,
    }
)
"""What a report draws, by file name."""


def draw_figures(runs: Runs, style: Style = STYLE, columns: int = WIDE) -> dict[str, Figure]:
    """Draw all figures that the runs have something to show in, by name."""
    figures = {}
    with matplotlib.rc_context(style):
        for name, draw in FIGURES.items():
            figure = draw(runs, columns)
            if figure is not None:
                figures[name] = figure
    return figures


def new_figure(
    panels: int,
    *,
    height: int | float,
    columns: int = WIDE,
    share: bool = False,
    most: int | None = None,
) -> tuple[Figure, list[Axes]]:
    """Return a figure with its panels: side by side for a screen, below each other for a phone.

    Args:
        panels: how many.
        height: of each line of panels, in inches.
        columns: `WIDE` or `NARROW`.
        share: whether all panels have one scale.
        most: panels side by side on a screen; all by default.
    """
    beside = 1 if columns == NARROW else min(panels, most or panels)
    lines = math.ceil(panels / beside)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    figure = Figure(figsize=(PANEL_WIDTH * columns, height * lines), layout=layout)
    FigureCanvasAgg(figure)
    axes: list[Axes] = []
    for place in range(panels):
        first = axes[0] if axes and share else None
        axes.append(figure.add_subplot(lines, beside, place + 1, sharex=first, sharey=first))
    return figure, axes


def is_leftmost(axes: Axes) -> bool:
    """Tell whether a panel has none to its left, which would share the name of its axis."""
    place = axes.get_subplotspec()
    return place is None or place.is_first_col()


def _curves(runs: Runs, key: str) -> dict[str, Curve]:
    curves = {arm: curve_of(of_arm, key) for arm, of_arm in runs.items()}
    return {arm: curve for arm, curve in curves.items() if curve is not None}


def _draw_curves(axes: Axes, runs: Runs, curves: Mapping[str, Curve], *, percent: bool) -> None:
    looks = _looks(runs)
    factor = 100.0 if percent else 1.0
    highest = 1.0 if percent else math.inf
    for arm, curve in curves.items():
        look = looks[arm]
        axes.plot(
            curve.rounds,
            factor * curve.mean,
            label=visible(arm),
            color=look.color,
            linestyle=look.dash,
            marker=look.marker,
            markersize=_marker_size(len(curve.rounds)),
            lw=1.8,
        )
        # A t-interval knows no bounds, a share does.
        low, high = (factor * np.clip(edge, 0, highest) for edge in (curve.low, curve.high))
        _draw_band(axes, curve.rounds, low, high, curve.seeds, look)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _draw_band(
    axes: Axes, x: np.ndarray, low: np.ndarray, high: np.ndarray, seeds: int, look: _Look
) -> None:
    if seeds == 1:
        return
    axes.fill_between(x, low, high, color=look.color, alpha=0.1, lw=0)
    for edge in (low, high):
        # Bands overlap; their edges keep them apart.
        axes.plot(x, edge, color=look.color, alpha=0.45, lw=0.7)


def title_axes(axes: Axes, title: str, note: str) -> None:
    """Write what a panel shows, and below it, smaller, how to read it."""
    axes.set_title(title, pad=19)
    written = axes.annotate(
        note,
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 6),
        textcoords="offset points",
        fontsize=8.5,
        color="#555555",
        gid="note",  # a page takes it out and writes it itself
    )
    written.set_in_layout(False)


def _marker_size(points: int) -> float:
    return 5.0 if points <= 25 else 0.0


def _draw_box(axes: Axes, position: int, values: np.ndarray, color: str) -> None:
    low, lower, median, upper, high = np.percentile(values, (0, 25, 50, 75, 100))
    axes.add_patch(
        Rectangle((lower, position - 0.36), upper - lower, 0.72, facecolor=color, alpha=0.16, lw=0)
    )
    axes.plot([median, median], [position - 0.36, position + 0.36], color=color, lw=2)
    for start, end in ((low, lower), (upper, high)):
        axes.plot([start, end], [position, position], color=color, lw=1, alpha=0.7)


SHADES = ("#222222", "#666666", "#999999")
"""Hues stand for arms, so architectures get shapes and shades."""


def _spread(arm: str, values: Sequence[float]) -> str:
    """Say in words what a box shows."""
    low, median, high = np.percentile(values, (0, 50, 100))
    return f"{arm}: median client {median:.1f} %, from {low:.1f} to {high:.1f}"


def _kilobytes_by_round(runs: Sequence[RunRecord], rounds: np.ndarray) -> np.ndarray:
    """Return kB per client, up and down, until the end of each round; mean over seeds."""
    of_runs = []
    for run in counted(runs):
        spent = np.array(
            [
                (number(row, "bytes_up") or 0.0) + (number(row, "bytes_down") or 0.0)
                for row in run.federation
            ]
        )
        until = {
            row["round"]: total for row, total in zip(run.federation, np.cumsum(spent), strict=True)
        }
        of_runs.append([until[round] / run.num_clients / 1e3 for round in rounds.tolist()])
    return np.asarray(np.mean(of_runs, axis=0))


def plain_number(value: int | float, _: int | None = None) -> str:
    """Write a number along an axis: whole ones without a point, powers of ten written out."""
    return f"{value:,.0f}" if value >= 10 or value == round(value) else f"{value:g}"


LONGEST_TICK: Mapping[int, int] = {WIDE: 36, NARROW: 18}
"""Letters of an arm's name beside an axis."""


def shortened(names: Iterable[str], longest: int = 36) -> list[str]:
    """Shorten names in their middle, as arms often differ at either end; if they do not, don't."""
    full = list(names)
    half = (longest - 1) // 2
    short = [name if len(name) <= longest else f"{name[:half]}…{name[-half:]}" for name in full]
    return short if len(set(short)) == len(set(full)) else full


def _legend(figure: Figure, runs: Runs, arms: Sequence[str], dashed: Sequence[str] = ()) -> None:
    looks = _looks(runs)
    handles = [
        Line2D([], [], color=looks[arm].color, linestyle=(0, (6, 3)), lw=1.6)
        if arm in dashed
        else Line2D(
            [],
            [],
            color=looks[arm].color,
            linestyle=looks[arm].dash,
            marker=looks[arm].marker,
            lw=1.8,
        )
        for arm in arms
    ]
    place_legend(figure, handles, shortened(arms))


def place_legend(figure: Figure, handles: Sequence[Line2D], labels: Sequence[str]) -> None:
    """Put a legend of all panels below them."""
    longest = max(len(label) for label in labels)
    # A legend of many lines grows the figure, not shrinks the axes.
    width, height = figure.get_size_inches()
    columns = max(1, min(len(labels), int(96 * width / (WIDE * PANEL_WIDTH)) // (longest + 9)))
    shown = [visible(label) for label in labels]
    figure.set_size_inches(width, height + 0.2 * (math.ceil(len(labels) / columns) - 1))
    figure.legend(handles, shown, loc="outside lower center", ncols=columns, handlelength=3)
