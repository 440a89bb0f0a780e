"""Pairs of arms by the question that they belong to: those are compared, and no others.

A study of many arms has more pairs than anybody asked about, and a correction for all of them hides
what was asked. p is corrected for the pairs of a question.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from sim.reports.grids import Grid
from sim.reports.power import PRECISION
from sim.reports.runs import RunRecord
from sim.reports.statistics import Difference, compare_pairs, corrected, smallest_p
from sim.reports.tables import difference_row, p_text, percent, points
from sim.reports.terminal import NOTHING, Column, FittedTable

Families = Mapping[str, Sequence[str]]
"""The arms of each family, by its name."""

Questions = Mapping[str, Sequence[tuple[str, str]]]
"""The pairs that a study asks about, (first, other), by the name of the question."""


def questions_of(
    families: Families, grid: Grid | None = None, baseline: str | None = None
) -> dict[str, list[tuple[str, str]]]:
    """Return the pairs that a study asks about.

    They are those of its families. A study without, which sweeps over several arms, asks how these
    compare at every combination of values: with the arm that the baseline is made of, in a question
    of all these pairs.

    Args:
        families: every pair of each is asked about.
        grid: how the arms of a sweep lie side by side.
        baseline: an arm of the study.

    Returns:
        Nothing where the study asks about its arms against the baseline, as any other does.
    """
    by_base = grid.by_base if grid is not None else {}
    if families or not by_base:
        return {name: list(combinations(arms, 2)) for name, arms in families.items()}
    reference = next(
        (base for base, arms in by_base.items() if baseline in arms), next(iter(by_base))
    )
    pairs = [
        (first, other)
        for base, arms in by_base.items()
        if base != reference
        for first, other in zip(by_base[reference], arms, strict=True)
        if first and other and first != other
    ]
    return {f"against {reference}": list(dict.fromkeys(pairs))} if pairs else {}


def compare_families(
    runs: Mapping[str, Sequence[RunRecord]], questions: Questions
) -> dict[str, dict[tuple[str, str], tuple[Difference | None, float | None]]]:
    """Compare the pairs of each question: mean client accuracy at the last round.

    Args:
        runs: of each arm, one a seed.
        questions: pairs of arms that have no runs are left out.

    Returns:
        By question and (first, other): other - first, and its p corrected by Holm for the pairs of
        the question.
    """
    found = {}
    for name, pairs in questions.items():
        asked = [pair for pair in pairs if all(runs.get(arm) for arm in pair)]
        differences = compare_pairs(runs, "accuracy", "last", asked)
        p_holm = corrected(differences)
        found[name] = {pair: (value, p_holm[pair]) for pair, value in differences.items()}
    return {name: pairs for name, pairs in found.items() if pairs}


def family_tables(
    runs: Mapping[str, Sequence[RunRecord]], questions: Questions, precision: float = PRECISION
) -> list[FittedTable]:
    """Return a table of its pairs for each question, for the terminal.

    Args:
        runs: of each arm, one a seed.
        questions: pairs of arms that have no runs are left out.
        precision: the half width of an interval that is wanted, a share.
    """
    tables = []
    for name, pairs in compare_families(runs, questions).items():
        values = list(pairs.values())
        few = [value is not None and value.few for value, _ in values]

        cells = {
            "points": [percent(value, signed=True) for value, _ in values],
            "p (Holm)": _p_cells([p for _, p in values], few),
            "p": _p_cells([None if v is None else v.p_value for v, _ in values], few),
            "sign-flip": _p_cells([None if v is None else v.p_sign_flip for v, _ in values], few),
            "ahead": [NOTHING if v is None else f"{v.ahead} of {v.n}" for v, _ in values],
            "would find": [_would_find(value) for value, _ in values],
            f"seeds for ±{100 * precision:g}": [_seeds(value, precision) for value, _ in values],
        }
        tables.append(
            FittedTable(
                label="pair",
                labels=[f"{other} - {first}" for first, other in pairs],
                columns=[
                    Column(title=title, cells=own, rank=rank)
                    for rank, (title, own) in enumerate(cells.items())
                ],
                title=f"{name}: mean client, last round, paired by seed",
                caption=_smallest([value for value, _ in values]),
            )
        )
    return tables


def _p_cells(given: Sequence[float | None], few: Sequence[bool]) -> list[str]:
    return [p_text(p, few=each) for p, each in zip(given, few, strict=True)]


def _would_find(value: Difference | None) -> str:
    """Write the smallest effect that so many pairs could have seen."""
    if value is None or value.detectable is None:
        return NOTHING
    return points(value.detectable, signed=False)


def _seeds(value: Difference | None, precision: float) -> str:
    """Write how many pairs an interval as wanted takes."""
    needed = None if value is None else value.seeds_needed(precision)
    return NOTHING if needed is None else f"{needed.seeds:,}"


def _smallest(differences: Sequence[Difference | None]) -> str:
    """Say what the fewest pairs among these can show."""
    fewest = min((value.n for value in differences if value is not None), default=0)
    count = len(differences)
    told = f"p corrected for {count} pairs by Holm" if count > 1 else "p of 1 pair"
    if fewest < 2:
        return told
    two = "two seeds, no verdict; " if fewest == 2 else ""
    return (
        f"{two}{told}; sign-flip is at least {smallest_p(fewest):.3g}; would find: points that so "
        "many seeds see in 4 of 5 studies"
    )


def family_rows(
    runs: Mapping[str, Sequence[RunRecord]], questions: Questions, precision: float = PRECISION
) -> list[dict[str, Any]]:
    """Return one flat row for every pair of every question, see `pair_rows`."""
    return [
        {
            "family": name,
            "first": first,
            "other": other,
            **difference_row("difference", value, p, precision),
        }
        for name, pairs in compare_families(runs, questions).items()
        for (first, other), (value, p) in pairs.items()
    ]
