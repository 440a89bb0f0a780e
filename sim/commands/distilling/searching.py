"""`search`: a grid of temperatures and weights, judged on validation rows, kept cell by cell."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkd.distillation.fit.workshop import EpochListener
from fedkd.distillation.run.search import Cell, Outcome, SearchResult, Trial, searched_term
from fedkd.distillation.run.search import search as search_grid
from fedkd.distillation.settings import DistillSettings
from fedkd.objectives.basic import HardLabels
from fedkd.objectives.terms import SoftenedTerm
from fedkd.threads import computing_threads
from sim.commands.distilling.folder import DistillFolder
from sim.commands.distilling.running import nobody, prepare, settings_at_fault
from sim.commands.interruption import Interruption, interruptible
from sim.keeping.identity import fingerprint
from sim.keeping.provenance import Provenance, notes_on, place_run, provenance_of
from sim.keeping.records import make_folder, storing, to_json, write_text
from sim.reports.distillation import SEARCH_FILE
from sim.reports.terminal import Column, FittedTable
from sim.server.observers import Row
from sim.settings import check_seeds


@dataclass(frozen=True, slots=True)
class Search:
    """A search that is over.

    Attributes:
        settings: of the search.
        folder: holds ``search.json``.
        result: the grid.
        notes: what a reader has to know about an earlier search of the same settings.
    """

    settings: DistillSettings
    folder: Path
    result: SearchResult
    notes: Sequence[str] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """The ``key=value`` words that turn the settings into the best cell's."""
        best = self.result.best
        first = searched_term(self.settings.objective)
        words = []
        for name, term in self.settings.objective.terms.items():
            if isinstance(term, HardLabels):
                words.append(f"objective.{name}.weight={1 - best.weight:g}")
            if name == first:
                words.append(f"objective.{name}.weight={best.weight:g}")
            if isinstance(term, SoftenedTerm):
                words.append(f"objective.{name}.temperature={best.temperature:g}")
        return tuple(words)

    def to_row(self) -> Row:
        """Return the grid as plain values."""
        return {
            "folder": str(self.folder),
            "validation_rows": self.result.validation_rows,
            "resolution": self.resolution,
            "as_good": self.as_good,
            "cells": [_cell_row(cell) for cell in self.result.cells],
            "best": _cell_row(self.result.best),
            "words": list(self.words),
            "notes": list(self.notes),
        }

    @property
    def resolution(self) -> float:
        """The smallest difference in accuracy that the validation rows of one seed can show."""
        return 1 / self.result.validation_rows

    @property
    def as_good(self) -> int:
        """How many other cells are within one validation row of the best."""
        best = self.result.best
        edge = best.accuracy - self.resolution * (1 + 1e-9)
        return sum(cell is not best and cell.accuracy >= edge for cell in self.result.cells)

    def remark(self) -> str:
        """Say how many rows chose, and how finely they can."""
        rows, seeds = self.result.validation_rows, self.settings.search.seeds
        lie = "lies" if self.as_good == 1 else "lie"
        text = (
            f"chosen by {rows} validation rows{f' a seed, {seeds} seeds' if seeds > 1 else ''}: "
            f"one row is {100 * self.resolution:.1f} points of accuracy; {self.as_good} of the "
            f"{len(self.result.cells) - 1} other cells {lie} within one row of the best"
        )
        if self.as_good:
            text += (
                ", so that the choice is little more than chance; a larger "
                "data.validation_fraction or search.seeds decides between them"
            )
        return text

    def table(self) -> FittedTable:
        """Return the grid for a terminal: a row a temperature, a column a weight."""
        search = self.settings.search
        name = searched_term(self.settings.objective)
        by_place = {(cell.temperature, cell.weight): cell for cell in self.result.cells}
        columns = {
            weight: [by_place[temperature, weight] for temperature in search.temperatures]
            for weight in search.weights
        }
        # Where room is short, the weights with the best cells stay.
        order = sorted(columns, key=lambda weight: max(map(self._rank, columns[weight])))[::-1]
        return FittedTable(
            label="temperature",
            labels=[f"{temperature:g}" for temperature in search.temperatures],
            columns=[
                Column(
                    title=f"{weight:g}",
                    cells=[self._text(cell) for cell in cells],
                    rank=order.index(weight),
                    emphasized=[row for row, cell in enumerate(cells) if cell is self.result.best],
                )
                for weight, cells in columns.items()
            ],
            title=f"validation accuracy (%) / loss (nats) on {self.result.validation_rows} rows"
            + (f", mean over {search.seeds} seeds" if search.seeds > 1 else "")
            + f"; one row is {100 * self.resolution:.1f} points",
            caption=f"columns: weight of {name}, cross-entropy has the rest up to 1; "
            "* highest accuracy, of equals the lowest loss",
        )

    def _rank(self, cell: Cell) -> tuple[bool, float]:
        return cell is self.result.best, cell.accuracy if math.isfinite(cell.accuracy) else -1.0

    def _text(self, cell: Cell) -> str:
        if not math.isfinite(cell.accuracy):
            return "diverged  "
        mark = " *" if cell is self.result.best else "  "
        return f"{100 * cell.accuracy:.1f} / {cell.loss:.3f}{mark}"


def search(
    settings: DistillSettings | None = None,
    *,
    accept_code: bool = False,
    observer_of: Callable[[Trial], EpochListener] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Search:
    """Search the grid ``settings.search``.

    The folder is named after the settings without the grid: the same command goes on after an
    interruption, and a larger grid trains the new cells only. Where data, code or libraries have
    changed since, the earlier search is kept and all cells are trained anew beside it.

    Args:
        settings: what to distil, and the grid.
        accept_code: go on with a search although its code or libraries have changed.
        observer_of: returns who is told about the epochs of a trial.
        tell: is told, before anything runs, what the notes say about an earlier search.

    Raises:
        SettingsError: names the setting that cannot work.
        FolderBusyError: another process searches in the folder.
        StorageError: the folder cannot be written.
        KeyboardInterrupt: SIGINT or SIGTERM; the cells that are done are in the folder.
    """
    settings = settings or DistillSettings()
    check_seeds(settings.seed, settings.search.seeds)
    rows = prepare(settings)
    with settings_at_fault():
        searched_term(settings.objective)
    now = provenance_of(settings)
    named = settings.output / settings.name / f"search-{fingerprint(settings)[:8]}"
    place = place_run(
        named, now, accept_code=accept_code, begun=lambda at: (at / SEARCH_FILE).is_file()
    )
    notes = notes_on({"search": place})
    for note in notes:
        if tell is not None:
            tell(note)
    folder = make_folder(settings.output, place.folder)
    if place.changes and place.kept is None:
        # Some cells are of other code from here on, which the next search has to know.
        now = (Provenance.read(folder) or now).mixed_with(now)
    path = folder / SEARCH_FILE
    goes_on = f"the same command goes on in {folder}"
    done = read_trials(path)

    def keep(status: str, more: Mapping[str, Any] | None = None) -> None:
        with storing(folder, goes_on=goes_on):
            row = {"status": status, "trials": _trial_rows(done), **(more or {})}
            write_text(path, to_json(row, indent=2) + "\n")

    def finished(trial: Trial, outcome: Outcome) -> None:
        done[trial] = outcome
        keep("searching")

    with (
        DistillFolder(
            folder,
            settings,
            device=rows.device.type,
            goes_on=goes_on,
            identity=now.to_row(),
            anew=not done,
        ) as recorder,
        computing_threads(settings.threads),
    ):

        def watcher(trial: Trial) -> EpochListener:
            tell = nobody if observer_of is None else observer_of(trial)

            def watch(name: str, epoch: Mapping[str, Any]) -> None:
                recorder.epoch(name, {**trial._asdict(), **epoch})
                tell(name, epoch)

            return watch

        try:
            with interruptible(), settings_at_fault():
                result = search_grid(settings, done=dict(done), finished=finished, observe=watcher)
        except KeyboardInterrupt as stop:
            keep("interrupted")
            raise Interruption.of(stop, folder) from None
        found = Search(settings, folder, result, notes)
        keep("finished", found.to_row())
    return found


def read_trials(path: Path) -> dict[Trial, Outcome]:
    """Return the trials that a search has finished; none where there is no such file."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["trials"]
    except FileNotFoundError:
        return {}
    return {
        Trial(row["temperature"], row["weight"], row["seed"]): Outcome(
            # What is not finite is written as null.
            *(math.nan if row[name] is None else row[name] for name in ("accuracy", "loss"))
        )
        for row in rows
    }


def _trial_rows(trials: Mapping[Trial, Outcome]) -> Sequence[Row]:
    return [{**trial._asdict(), **outcome._asdict()} for trial, outcome in trials.items()]


def _cell_row(cell: Cell) -> Row:
    return {
        "temperature": cell.temperature,
        "weight": cell.weight,
        "accuracy": cell.accuracy,
        "loss": cell.loss,
        "seeds": len(cell.outcomes),
    }
