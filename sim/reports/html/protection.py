"""What is promised, what leaks, and what clients are worth: tables of the chapters on harm."""

from collections.abc import Mapping, Sequence
from typing import Any

from sim.reports.attacks import LEAKAGE_CAPTION, attack_tables, is_attacked, leakage_cells
from sim.reports.counterfactual import is_of_run, value_table
from sim.reports.html.settings import value_text
from sim.reports.html.tables import Table, table_of
from sim.reports.runs import RunRecord, number
from sim.reports.statistics import counted, epsilon_of
from sim.reports.tables import audit_text, epsilon_text
from sim.reports.terminal import NOTHING


def privacy_table(runs: Mapping[str, Sequence[RunRecord]]) -> Table | None:
    """Say what each arm promises; None where none does."""
    promised = (run.privacy.get("mechanism") for own in runs.values() for run in counted(own))
    if not any(promised):
        return None
    rows = []
    for arm, of_arm in runs.items():
        chosen = counted(of_arm)
        told = [run.privacy for run in chosen]
        words = [_told(told, key) for key in ("mechanism", "where", "unit")]
        bound = [value for each in told if (value := number(each, "renyi")) is not None]
        rows.append(
            [
                arm,
                *words,
                epsilon_text(epsilon_of(chosen)),
                epsilon_text(max(bound, default=None)),
                *(_told(told, key) for key in ("delta", "budget")),
            ]
        )
    header = ["arm", "mechanism", "where", "unit", "epsilon", "Renyi bound", "delta", "budget"]
    return Table(header, rows, left=4, caption="What each arm promises")


def _told(tables: Sequence[Mapping[str, Any]], key: str) -> str:
    found = dict.fromkeys(
        NOTHING if (value := table.get(key)) is None else value_text(value) for table in tables
    )
    return " | ".join(found)


def audits_of(runs: Mapping[str, Sequence[RunRecord]]) -> list[str]:
    """Return a sentence for each audited run: what its canaries proved."""
    return [
        f"{arm}, seed {run.seed}: {audit_text(audit)}."
        for arm, of_arm in runs.items()
        for run in counted(of_arm)
        if isinstance(audit := run.privacy.get("audit"), dict)
    ]


def promises_of(runs: Mapping[str, Sequence[RunRecord]]) -> list[str]:
    """Return the sentences of what is promised to whom, each once."""
    said = (run.privacy.get("promise") for of_arm in runs.values() for run in counted(of_arm))
    return list(dict.fromkeys(text for text in said if isinstance(text, str)))


def leakage_table(runs: Mapping[str, Sequence[RunRecord]]) -> Table | None:
    """Put accuracy and cost of each arm beside what leaks; None where nothing was attacked."""
    if not is_attacked(runs) or len(runs) < 2:
        return None
    cells = leakage_cells(runs)
    rows = [list(row) for row in zip(runs, *cells.values(), strict=True)]
    return Table(["arm", *cells], rows, caption="What leaks", note=f"{LEAKAGE_CAPTION}.")


def found_tables(runs: Mapping[str, Sequence[RunRecord]]) -> list[Table]:
    """Return what was found of a single run, table by table; of several there is one table."""
    found = [run.attacks for of_arm in runs.values() for run in of_arm if run.attacks]
    if len(found) != 1:
        return []
    return [
        table_of(fitted, note=f"{fitted.title}: {fitted.caption}.")
        for fitted in attack_tables(found[0])
    ]


def worth_tables(runs: Mapping[str, Sequence[RunRecord]]) -> list[Table]:
    """Return what clients of each run are worth, as far as somebody asked and it is of that run."""
    tables = []
    for arm, of_arm in runs.items():
        for run in of_arm:
            if is_of_run(run.value, run.result.get("weights_sha256")):
                fitted = value_table(run.value)
                note = f"{arm}, seed {run.seed}: {fitted.caption}."
                tables.append(table_of(fitted, note=note))
    return tables
