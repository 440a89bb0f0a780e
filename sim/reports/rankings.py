"""`ranks`: studies, or the values of a sweep, as data sets over which arms are ranked."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from fedkd.names import nearest
from sim.reports.grids import Axis, Grid
from sim.reports.power import CONFIDENCE
from sim.reports.ranks import PairOfArms, Ranking
from sim.reports.runs import LoadedArms, RunRecord, load_arms
from sim.reports.statistics import ACCURACIES, counted, values_by_seed
from sim.reports.tables import p_text
from sim.reports.terminal import Column, FittedTable
from sim.server.observers import Row
from sim.settings import SettingsError

DATA = "data."
"""Settings that begin so make data sets of a sweep by themselves."""

Runs = Mapping[str, Sequence[RunRecord]]


def ranks(paths: Sequence[Path], *, over: Sequence[str] = (), measure: str = "accuracy") -> Ranking:
    """Rank arms over data sets: their mean over seeds at the last judged round.

    A study is a data set. One that sweeps over settings of the data is a data set for each
    combination of their values, and its arms are the combinations of the others.

    Args:
        paths: of study folders.
        over: settings of a sweep that make data sets, instead of all that begin with ``data.``.
        measure: whose accuracy, a key of `ACCURACIES`.

    Raises:
        SettingsError: names the folder or the setting, if there are no two data sets with two arms
            that both have, or a seed that those have in common.
    """
    if measure not in ACCURACIES:
        raise SettingsError(
            f"measure must be one of {', '.join(ACCURACIES)}, got {measure!r}"
            + nearest(measure, ACCURACIES)
        )
    unique = list({path.resolve(): path for path in paths}.values())
    found: dict[str, dict[str, dict[int, float]]] = {}
    dealt: dict[str, Path] = {}
    for path in unique:
        for name, runs in _data_sets(load_arms(path), over, several=len(unique) > 1).items():
            _check_other_data(path, runs, dealt)
            while name in found:
                name += "'"
            found[name] = {arm: _finished(of_arm, measure) for arm, of_arm in runs.items()}
    every = list(dict.fromkeys(arm for arms in found.values() for arm in arms))
    common = [arm for arm in every if all(arms.get(arm) for arms in found.values())]
    if len(found) < 2 or len(common) < 2:
        raise SettingsError(
            f"ranks need at least two data sets with two arms that all have, got {len(found)} "
            f"({', '.join(found)}) with {len(common)} ({', '.join(common) or 'none'}); a data set "
            "is a study, or a value of data.* in a sweep"
        )
    scores, seeds = [], []
    for name, arms in found.items():
        shared = set.intersection(*(set(arms[arm]) for arm in common))
        if not shared:
            raise SettingsError(f"arms have no seed in common on {name}, so they are no pairs")
        seeds.append(len(shared))
        scores.append(
            [math.fsum(arms[arm][seed] for seed in shared) / len(shared) for arm in common]
        )
    return Ranking(
        arms=tuple(common),
        sets=tuple(found),
        scores=np.array(scores),
        seeds=tuple(seeds),
        left_out=tuple(arm for arm in every if arm not in common),
    )


def _check_other_data(path: Path, runs: Runs, dealt: dict[str, Path]) -> None:
    """Refuse data that another study has as well: ranks over copies of one data set prove nothing.

    Args:
        path: of the study.
        runs: of a data set of it.
        dealt: the study of each way that data were dealt so far; gets this one's.
    """
    first = next((of_arm[0] for of_arm in runs.values() if of_arm), None)
    if first is None:
        return
    count = first.settings.get("clients", {}).get("count")
    key = json.dumps([first.settings.get("data"), count], sort_keys=True, default=str)
    if dealt.setdefault(key, path) != path:
        raise SettingsError(
            f"{str(dealt[key])!r} and {str(path)!r} deal the same data to as many clients: they "
            "are one data set; give studies that differ in data, or sweep over data.*"
        )


def _finished(runs: Sequence[RunRecord], measure: str) -> dict[int, float]:
    """Return what finished runs measured, by seed; one that stopped was given less."""
    finished = [run for run in runs if run.status == "finished"]
    return values_by_seed(counted(finished), measure, "last")


def _data_sets(loaded: LoadedArms, over: Sequence[str], *, several: bool) -> Mapping[str, Runs]:
    """Return the data sets of a study by name, each with the runs of its arms."""
    axes = loaded.grid.axes if loaded.grid is not None else ()
    names = [axis.name for axis in axes]
    for setting in over:
        if setting not in names and not several:
            raise SettingsError(
                f"{setting!r} is not swept over in {loaded.name!r}, which has "
                f"{', '.join(names) or 'no sweep'}{nearest(setting, names)}"
            )
    chosen = [
        place
        for place, name in enumerate(names)
        if (name in over if over else name.startswith(DATA)) and len(axes[place].values) > 1
    ]
    if loaded.grid is None or not chosen:
        return {loaded.name: loaded.runs}
    return _of_sweep(loaded, loaded.grid, chosen, several=several)


def _of_sweep(
    loaded: LoadedArms, grid: Grid, chosen: Sequence[int], *, several: bool
) -> Mapping[str, Runs]:
    others = [
        place
        for place, axis in enumerate(grid.axes)
        if place not in chosen and len(axis.values) > 1
    ]
    sets: dict[str, dict[str, Sequence[RunRecord]]] = {}
    for places, arm in zip(
        itertools.product(*(range(len(axis.values)) for axis in grid.axes)), grid.arms, strict=True
    ):
        data = " ".join(_told(grid.axes[place], places[place]) for place in chosen)
        label = " ".join(grid.axes[place].labels[places[place]] for place in others)
        runs = loaded.runs.get(arm, ())
        if runs:
            name = f"{loaded.name} {data}" if several else data
            sets.setdefault(name, {})[label or loaded.name] = runs
    return sets


def _told(axis: Axis, place: int) -> str:
    return f"{axis.title} {axis.labels[place]}"


def ranks_row(ranking: Ranking) -> Row:
    """Return a ranking as plain values; a statistic that is infinite is None."""
    test = ranking.friedman
    return {
        "sets": list(ranking.sets),
        "seeds": list(ranking.seeds),
        "arms": [
            {
                "arm": arm,
                "mean_rank": mean,
                "accuracy": ranking.scores[:, ranking.arms.index(arm)].tolist(),
                "ranks": ranking.ranks[:, ranking.arms.index(arm)].tolist(),
            }
            for arm, mean in ranking.mean_ranks.items()
        ],
        "left_out": list(ranking.left_out),
        "friedman": {
            "chi_square": test.chi_square,
            "f": test.f if math.isfinite(test.f) else None,
            "freedom": list(test.freedom),
            "p_value": test.p_value,
        },
        "critical_difference": ranking.critical_difference,
        "alike": [list(group) for group in ranking.cliques],
        "pairs": [asdict(pair) for pair in ranking.pairs],
        "p_smallest": ranking.p_smallest,
        "verdicts": list(ranks_words(ranking)),
    }


def ranks_table(ranking: Ranking) -> FittedTable:
    """Return arms by their mean rank, with the accuracy on each data set."""
    order = [ranking.arms.index(arm) for arm in ranking.mean_ranks]
    best = ranking.scores.max(1)
    return FittedTable(
        label="arm",
        labels=[ranking.arms[arm] for arm in order],
        columns=[
            Column(
                title="mean rank",
                cells=[f"{mean:.2f}" for mean in ranking.mean_ranks.values()],
                rank=0,
            ),
            *(
                Column(
                    title=name,
                    cells=[f"{100 * of_set[arm]:.1f} ({rank[arm]:g})" for arm in order],
                    rank=1 + place,
                    emphasized=[
                        row
                        for row, arm in enumerate(order)
                        if math.isclose(of_set[arm], best[place], abs_tol=1e-12)
                    ],
                )
                for place, (name, of_set, rank) in enumerate(
                    zip(ranking.sets, ranking.scores, ranking.ranks, strict=True)
                )
            ),
        ],
        title="accuracy in %, mean over seeds, and rank on each data set",
        caption=f"{len(ranking.sets)} data sets; seeds: {_counts(ranking.seeds)}"
        + (
            f"; left out, since a data set lacks them: {', '.join(ranking.left_out)}"
            if ranking.left_out
            else ""
        ),
    )


def pairs_table(ranking: Ranking) -> FittedTable:
    """Return every pair of arms with Wilcoxon's test over data sets."""
    pairs = ranking.pairs
    cells = {
        "wins": [_wins(pair, len(ranking.sets)) for pair in pairs],
        "p (Holm)": [p_text(pair.p_holm) for pair in pairs],
        "p": [p_text(pair.p_value) for pair in pairs],
        "ranks apart": [f"{pair.rank_difference:+.2f}" for pair in pairs],
    }
    count = len(pairs)
    return FittedTable(
        label="pair",
        labels=[f"{pair.other} - {pair.first}" for pair in pairs],
        columns=[
            Column(title=title, cells=own, rank=rank)
            for rank, (title, own) in enumerate(cells.items())
        ],
        title="pairs, by Wilcoxon's signed-rank test over data sets",
        caption=(f"p corrected for {count} pairs by Holm; " if count > 1 else "")
        + f"p is at least {ranking.p_smallest:.3g}; ranks apart: positive where the former is "
        "better",
    )


def ranks_words(ranking: Ranking) -> tuple[str, ...]:
    """Say what ranks over these data sets show, and what so few could not."""
    test, sets, arms = ranking.friedman, len(ranking.sets), len(ranking.arms)
    statistic = (
        f"F({test.freedom[0]}, {test.freedom[1]}) = {test.f:.2f}, "
        if math.isfinite(test.f)
        else "all data sets rank alike, "
    )
    differ = "differ" if test.p_value < 1 - CONFIDENCE else "cannot be said to differ"
    said = [
        f"Over {_two(sets)} data sets the {arms} arms {differ} (Friedman's test: {statistic}"
        f"p {p_text(test.p_value)})."
    ]
    groups = "; ".join(", ".join(group) for group in ranking.cliques)
    said.append(
        f"Nemenyi's critical difference is {ranking.critical_difference:.2f} mean ranks at 5 %"
        + (f"; not told apart: {groups}." if groups else "; all arms are told apart.")
    )
    least = min(1.0, len(ranking.pairs) * ranking.p_smallest)
    if least >= 1 - CONFIDENCE:
        said.append(
            f"{_two(sets).capitalize()} data sets are few: no pair can have a corrected p below "
            f"{least:.3g}."
        )
    return tuple(said)


def _two(count: int) -> str:
    return "two" if count == 2 else str(count)


def _wins(pair: PairOfArms, sets: int) -> str:
    ties = f", {pair.ties} tied" if pair.ties else ""
    return f"{pair.wins} of {sets}{ties}"


def _counts(seeds: Sequence[int]) -> str:
    low, high = min(seeds), max(seeds)
    return str(low) if low == high else f"{low} to {high}"
