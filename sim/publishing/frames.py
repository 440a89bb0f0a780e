"""Tidy rows: what other programs read, one observation a row and one measure a column."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from sim.publishing.studies import Study, varied
from sim.reports.runs import RunRecord
from sim.reports.statistics import ACCURACIES, MEASURES
from sim.reports.tables import summary_rows
from sim.server.observers import Row
from sim.settings import SettingsError

if TYPE_CHECKING:
    import pandas as pd

Rows = Literal["arms", "runs", "rounds", "clients"]
"""What a row is: an arm, a run, a round of a run, or a client in a round of a run."""


def tidy_rows(study: Study, rows: str) -> list[Row]:
    """Return the numbers of a study as flat rows that all have the same columns.

    Every row begins with ``arm`` and the settings in which arms differ, by their dotted paths.
    Accuracies are shares in [0, 1]; what is missing is None.

    Args:
        study: whose numbers.
        rows: ``arms``: means over seeds with their intervals, as ``fedkd compare --json`` has them;
            ``runs``: the last and the selected round of every seed, and what the run took;
            ``rounds``: the federation's row of every round; ``clients``: every client's.

    Raises:
        SettingsError: if ``rows`` is none of these.
    """
    if rows not in get_args(Rows):
        raise SettingsError(f"rows must be one of {', '.join(get_args(Rows))}, got {rows!r}")
    differing = varied(study)
    if rows == "arms":
        found = [
            {**_head(row["arm"], differing), **_counted(row)}
            for row in summary_rows(study.runs, study.baseline)
        ]
    else:
        found = [
            {**_head(arm, differing), "seed": run.seed, **row}
            for arm, of_arm in study.runs.items()
            for run in of_arm
            for row in _OF_RUN[rows](run)
        ]
    return aligned(found)


def aligned(rows: Sequence[Row]) -> list[Row]:
    """Give all rows the same columns, in the order in which they come up."""
    columns = dict.fromkeys(key for row in rows for key in row)
    return [{column: row.get(column) for column in columns} for row in rows]


def _head(arm: str, differing: Mapping[str, Mapping[str, Any]]) -> Row:
    return {"arm": arm, **{path: values[arm] for path, values in differing.items()}}


def _counted(row: Mapping[str, Any]) -> Row:
    """Return an arm's row without what is a list: a table has no room for lists."""
    return {"seeds": len(row["seeds"])} | {
        key: value for key, value in row.items() if not isinstance(value, list) and key != "arm"
    }


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float) else json.dumps(value)


def _of_run(run: RunRecord) -> list[Row]:
    last, selected = run.last, run.selected
    return [
        {
            "status": run.status,
            "round": last.get("round"),
            **{key: last.get(key) for key in ACCURACIES},
            "selected_round": selected.get("round"),
            **{f"{key}_selected": selected.get(key) for key in ACCURACIES},
            "bytes_up_per_client": sum(run.bytes_up.values()) / run.num_clients,
            "bytes_down_per_client": sum(run.bytes_down.values()) / run.num_clients,
            **{key: measure.of(run) for key, measure in MEASURES.items()},
            "epsilon": run.epsilon,
            "seconds": run.seconds,
            "simulated_s": run.simulated_s,
            "weights_sha256": run.result.get("weights_sha256"),
        }
    ]


def _flat_rows(rows: Sequence[Row]) -> list[Row]:
    return [{key: _plain(value) for key, value in row.items() if key != "scope"} for row in rows]


_OF_RUN: Mapping[str, Callable[[RunRecord], list[Row]]] = {
    "runs": _of_run,
    "rounds": lambda run: _flat_rows(run.federation),
    "clients": lambda run: _flat_rows(run.clients),
}


def to_pandas(rows: Sequence[Row]) -> "pd.DataFrame":
    """Return rows as a data frame; columns in which nothing stands are left out."""
    import pandas as pd  # imported late: it takes half a second

    return pd.DataFrame(rows).dropna(axis="columns", how="all")
