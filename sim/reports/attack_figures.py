"""Figures of what attacks on runs found."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from fedkd.figures.saving import Style
from fedkd.figures.style import DASHES, color, visible
from sim.reports.attacks import ATTACKS, LEADING, LEAKS, PLACES, leak_estimate
from sim.reports.figures import (
    MARKERS,
    STYLE,
    WIDE,
    Runs,
    new_figure,
    place_legend,
    title_axes,
)
from sim.reports.runs import RunRecord
from sim.reports.statistics import SHARES, counted, estimate, values_by_seed
from sim.server.observers import Row

MOST_CURVES = 8
"""More arms than these have no ROC curves: nobody could tell them apart."""


def membership_roc(runs: Runs, columns: int = WIDE) -> Figure | None:
    """Draw true against false positives of membership from each place, on logarithmic axes.

    Of one arm all attacks, of several the leading one; of the first seed that counts.
    """
    first = {
        arm: _places(chosen[0])
        for arm, of_arm in runs.items()
        if (chosen := [run for run in counted(of_arm) if _places(run)])
    }
    if not first or len(first) > MOST_CURVES:
        return None
    places = [
        place
        for place in PLACES
        if any(found.get(place, {}).get("figures") for found in first.values())
    ]
    if not places:
        return None
    figure, panels = new_figure(len(places), height=3.9, columns=columns)
    alone = len(first) == 1
    handles: dict[str, Line2D] = {}
    for axes, place in zip(panels, places, strict=True):
        least = 1.0
        for position, (arm, found) in enumerate(first.items()):
            of_place = found.get(place, {}).get("figures", ())
            chosen = of_place if alone else [f for f in of_place if f["attack"] == LEADING]
            for number, figures in enumerate(chosen):
                name = ATTACKS[figures["attack"]] if alone else arm
                look = number if alone else position
                curve = figures["curve"]
                least = min(least, 1 / max(figures["others"], 1))
                (line,) = axes.plot(
                    curve["false"],
                    curve["true"],
                    color=color(look),
                    linestyle=DASHES[look % len(DASHES)],
                    lw=1.7,
                    drawstyle="steps-post",
                    label=visible(name),
                )
                handles.setdefault(name, line)
        axes.plot([least, 1], [least, 1], color="#999999", lw=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlim(least, 1)
        axes.set_ylim(least, 1.1)
        axes.set_xlabel("false-positive rate")
        title_axes(axes, PLACES[place], "" if axes is not panels[0] else "grey: guessing")
    panels[0].set_ylabel("true-positive rate")
    place_legend(figure, list(handles.values()), list(handles))
    return figure


def _places(run: RunRecord) -> Row:
    """Return what membership attacks on a run found, by place; empty where none was made."""
    places: Row = run.attacks.get("membership", {}).get("places", {})
    return places


def accuracy_by_leak(runs: Runs, columns: int = WIDE) -> Figure | None:
    """Draw mean client accuracy against each leak.

    Algorithms differ in colours, defences in markers.
    """
    measured = {
        arm: found
        for arm, of_arm in runs.items()
        if (found := estimate([*values_by_seed(of_arm, "accuracy", "last").values()], SHARES))
        and any(run.attacks for run in counted(of_arm))
    }
    if len(measured) < 2:
        return None
    leaks = {
        leak: own
        for leak in LEAKS
        if (own := {a: v for a in measured if (v := leak_estimate(runs[a], leak)) is not None})
    }
    if not leaks:
        return None
    kinds = {arm: (_algorithm(runs[arm][0]), defence_of(runs[arm][0])) for arm in measured}
    algorithms = list(dict.fromkeys(algorithm for algorithm, _ in kinds.values()))
    defences = list(dict.fromkeys(defence for _, defence in kinds.values()))
    figure, panels = new_figure(len(leaks), height=3.2, columns=columns, most=3)
    for axes, (leak, by_arm) in zip(panels, leaks.items(), strict=True):
        for arm, value in by_arm.items():
            algorithm, defence = kinds[arm]
            factor = 100 if leak in ("inversion", "stealing") else 1
            axes.plot(
                100 * measured[arm].mean,
                factor * value.mean,
                color=color(algorithms.index(algorithm)),
                marker=MARKERS[defences.index(defence) % len(MARKERS)],
                markersize=6.5,
                alpha=0.85,
                linestyle="",
                label=visible(arm),
            )
        if leak in PLACES:
            axes.axhline(0.5, color="#999999", lw=1, linestyle=(0, (4, 3)))
        title_axes(axes, _TITLES[leak], _NOTES.get(leak, ""))
        axes.set_xlabel("mean client accuracy (%)")
    handles = [
        *(_mark(color(n), "o") for n in range(len(algorithms))),
        *(_mark("#444444", MARKERS[n % len(MARKERS)]) for n in range(len(defences))),
    ]
    place_legend(figure, handles, [*algorithms, *defences])
    return figure


_TITLES: Mapping[str, str] = {
    "model": "Members, client's model",
    "upload": "Members, its upload",
    "consensus": "Members, consensus",
    "labels": "Labels, first upload",
    "inversion": "Inverted beyond control (%)",
    "stealing": "Stolen model agrees (%)",
}
_NOTES: Mapping[str, str] = {
    **dict.fromkeys(PLACES, "AUC of LiRA; dashed: guessing"),
    "labels": "KL (nats); lower tells more",
}


def _mark(color: str, marker: str) -> Line2D:
    return Line2D([], [], color=color, marker=marker, linestyle="")


def _algorithm(run: RunRecord) -> str:
    return str(run.settings["strategy"]["name"])


def defence_of(run: RunRecord) -> str:
    """Return what a run's settings do about what leaks, in a few words."""
    privacy, up = run.settings.get("privacy", {}), run.settings.get("exchange", {}).get("up", {})
    mechanism: Any = privacy.get("mechanism", {})
    words = []
    if mechanism.get("kind", "none") != "none":
        epsilon = mechanism.get("epsilon")
        where = " at the server" if privacy.get("where") == "server" else ""
        words.append(f"{mechanism['kind']}{'' if epsilon is None else f' {epsilon:g}'}{where}")
    if up.get("kind", "float32") != "float32":
        words.append(" ".join(str(up[key]) for key in ("kind", "k") if key in up))
    return ", ".join(words) or "no defence"


ATTACK_FIGURES: Mapping[str, Callable[[Runs, int], Figure | None]] = MappingProxyType(
    {"membership_roc": membership_roc, "accuracy_by_leak": accuracy_by_leak}
)
"""What a report draws of attacks, by file name."""


def draw_attacks(
    runs: Mapping[str, Sequence[RunRecord]], style: Style = STYLE, columns: int = WIDE
) -> dict[str, Figure]:
    """Draw all figures that attacks have something to show in, by name."""
    with matplotlib.rc_context(style):
        drawn = {name: draw(runs, columns) for name, draw in ATTACK_FIGURES.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}
