"""The tables of mutual-vs-one-way.md, from the studies that were run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from sim.reports.families import compare_families, questions_of
from sim.reports.runs import RunRecord, load_study, study_families
from sim.reports.statistics import MEASURES, ArmSummary, summarize
from sim.reports.tables import kilobytes, p_text, percent
from sim.reports.terminal import NOTHING

ALPHAS = ("0.1", "1")
"""The values of the sweep, the last word of each arm's name."""

Runs = Mapping[str, Sequence[RunRecord]]


def table(study: Path, kind: str) -> str:
    """Return one of a study's tables: ``arms`` or ``pairs``."""
    runs = load_study(study)
    return arms_table(runs) if kind == "arms" else pairs_table(runs, study_families(study))


def arms_table(runs: Runs) -> str:
    """Return a line for each arm: accuracies for both splits, then what it was given."""
    head = [
        *(f"clients, {alpha}" for alpha in ALPHAS),
        *(f"server, {alpha}" for alpha in ALPHAS),
        "steps",
        "of them the server's",
        "rows",
        "GFLOP",
        "kB up",
        "kB down",
    ]
    lines = [f"| arm | {' | '.join(head)} |", "|---|" + "---:|" * len(head)]
    for base in dict.fromkeys(arm.rpartition("-")[0] for arm in runs):
        found = [summarize(f"{base}-{alpha}", runs[f"{base}-{alpha}"]) for alpha in ALPHAS]
        cells = [
            percent(each.last.get(key)) for key in ("accuracy", "server_accuracy") for each in found
        ]
        cells += [_both(found, name) for name in ("steps", "server_steps", "rows", "gflops")]
        cells += [kilobytes(found[-1].bytes_up), kilobytes(found[-1].bytes_down)]
        lines.append(f"| `{base}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _both(found: Sequence[ArmSummary], name: str) -> str:
    """Return a number of effort: one for both splits where it is the same."""
    texts = dict.fromkeys(
        NOTHING
        if (value := each.measures.get(name)) is None
        else f"{value.mean:,.{MEASURES[name].decimals}f}"
        for each in found
    )
    return " / ".join(texts)


def pairs_table(runs: Runs, families: Mapping[str, Sequence[str]]) -> str:
    """Return a line for each pair of each family, with the differences for both splits."""
    found = compare_families(runs, questions_of(families))
    head = [f"{what}, {alpha}" for alpha in ALPHAS for what in ("points", "p (Holm)", "sign-flip")]
    lines = [f"| family | pair | {' | '.join(head)} |", "|---|---|" + "---:|" * len(head)]
    for family in dict.fromkeys(name.rpartition("-")[0] for name in found):
        for first, other in found[f"{family}-{ALPHAS[0]}"]:
            pair = [name.rpartition("-")[0] for name in (first, other)]
            cells = []
            for alpha in ALPHAS:
                value, p = found[f"{family}-{alpha}"][f"{pair[0]}-{alpha}", f"{pair[1]}-{alpha}"]
                flip = None if value is None else value.p_sign_flip
                cells += [percent(value, signed=True), p_text(p), p_text(flip)]
            lines.append(f"| {family} | `{pair[1]}` - `{pair[0]}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
