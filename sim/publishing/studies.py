"""The study, or the single run, that something is published of."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sim.keeping.records import SETTINGS_FILE
from sim.reports.grids import Grid, value_label
from sim.reports.runs import (
    STUDY_FILE,
    RunRecord,
    load_run,
    load_study,
    study_baseline,
    study_grid,
    study_matched,
    study_refused,
)
from sim.settings import SettingsError
from sim.settings.combinations import ARM
from sim.settings.tables import dotted


@dataclass(frozen=True, slots=True)
class Study:
    """What is published.

    Attributes:
        folder: of the study, or of the run.
        runs: of each arm that has any, one a seed.
        baseline: the arm that others are compared with.
        grid: how arms that come from a sweep lie side by side.
        refused: arms that could not run, each with the reason.
        whole: False where ``folder`` is that of a single run.
        matched: what arms were made equal in, and to which of them: ``("steps", "dml")``.
    """

    folder: Path
    runs: Mapping[str, Sequence[RunRecord]]
    baseline: str
    grid: Grid | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    whole: bool = True
    matched: tuple[str, str] | None = None

    @property
    def name(self) -> str:
        """What the settings call it."""
        return str(next(self.records).settings.get("name", self.folder.name))

    @property
    def records(self) -> Iterator[RunRecord]:
        """Every run, arm by arm."""
        return (run for of_arm in self.runs.values() for run in of_arm)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Every seed of any arm, in their order."""
        return tuple(sorted({run.seed for run in self.records}))


def open_study(folder: Path) -> Study:
    """Read a study folder, or a run folder as a study of one arm and one seed.

    Raises:
        SettingsError: if the folder is neither, or a file in it is damaged.
    """
    if (folder / STUDY_FILE).is_file():
        runs = {arm: of_arm for arm, of_arm in load_study(folder).items() if of_arm}
        if not runs:
            raise SettingsError(f"the study {str(folder)!r} has no run")
        baseline = study_baseline(folder)
        return Study(
            folder,
            runs,
            baseline if baseline in runs else next(iter(runs)),
            study_grid(folder),
            study_refused(folder),
            matched=study_matched(folder),
        )
    if (folder / SETTINGS_FILE).is_file():
        run = load_run(folder)
        return Study(folder, {run.arm: [run]}, run.arm, whole=False)
    raise SettingsError(
        f"{str(folder)!r} is neither a study folder, which has a {STUDY_FILE} once all its runs "
        f"are finished, nor a run folder, which has a {SETTINGS_FILE}"
    )


def common(runs: Iterable[RunRecord], path: str) -> Any:
    """Return a setting that all runs share, by its dotted path; None where they differ."""
    found = [_at(run.settings, path) for run in runs]
    texts = {json.dumps(value, sort_keys=True, default=str) for value in found}
    return found[0] if len(texts) == 1 else None


def _at(settings: Mapping[str, Any], path: str) -> Any:
    value: Any = settings
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def varied(study: Study) -> dict[str, dict[str, Any]]:
    """Return the settings that tell arms apart, by their dotted paths: the value of each arm.

    Those that a sweep is over, and those outside ``strategy`` in which arms differ. What only some
    strategies have is none of them: every strategy has settings of its own.
    """
    first = {arm: of_arm[0] for arm, of_arm in study.runs.items()}
    tables = {
        arm: dotted({k: v for k, v in run.settings.items() if k not in _NOT_COMPARED})
        for arm, run in first.items()
    }
    swept = [axis.name for axis in study.grid.axes if axis.name != ARM] if study.grid else []
    keys = dict.fromkeys(key for table in tables.values() for key in table)
    differing = [
        key for key in keys if len({repr(table.get(key)) for table in tables.values()}) > 1
    ]
    paths = dict.fromkeys(
        [
            *(["strategy.name"] if len(first) > 1 else []),
            *swept,
            *(key for key in differing if not any(f"{key}.".startswith(f"{s}.") for s in swept)),
        ]
    )
    return {
        path: {arm: _plain(_at(run.settings, path)) for arm, run in first.items()} for path in paths
    }


def _plain(value: Any) -> Any:
    """Return a value as a cell of a table: a constant schedule is its number."""
    if isinstance(value, Mapping) and value.get("kind") == "constant":
        return value.get("value")
    return value if value is None or isinstance(value, str | int | float) else value_label(value)


_NOT_COMPARED = ("name", "output", "seed", "study", "engine", "strategy")
