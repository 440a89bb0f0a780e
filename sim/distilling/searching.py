"""`search`: a grid of temperatures and weights, judged on validation rows, kept cell by cell."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fedkd.distillation.search import Cell, Outcome, SearchResult, Trial, searched_term
from fedkd.distillation.search import search as search_grid
from fedkd.distillation.settings import DistillSettings
from fedkd.distillation.workshop import Observer
from fedkd.objectives.basic import HardLabels
from fedkd.objectives.terms import SoftenedTerm
from sim.distilling.folder import DistillFolder
from sim.distilling.running import computing, nobody, prepare, settings_at_fault
from sim.identity import fingerprint
from sim.interruption import Interruption, interruptible
from sim.observers import Row
from sim.records import make_folder, storing, to_json, write_text
from sim.reports.distillation import SEARCH_FILE


@dataclass(frozen=True, slots=True)
class Search:
    """A search that is over.

    Attributes:
        settings: of the search.
        folder: holds ``search.json``.
        result: the grid.
    """

    settings: DistillSettings
    folder: Path
    result: SearchResult

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
            "cells": [_cell_row(cell) for cell in self.result.cells],
            "best": _cell_row(self.result.best),
            "words": list(self.words),
        }

    def table(self) -> Table:
        """Return the grid for a terminal: a row a temperature, a column a weight."""
        seeds = self.settings.search.seeds
        name = searched_term(self.settings.objective)
        table = Table(
            title=f"validation accuracy (%) / loss (nats) on {self.result.validation_rows} rows"
            + (f", mean over {seeds} seeds" if seeds > 1 else ""),
            caption=f"columns: weight of {name}, cross-entropy has the rest up to 1; "
            "* highest accuracy, of equals the lowest loss",
            title_justify="left",
            title_style="",
            caption_justify="left",
            box=None,
            header_style="bold",
        )
        table.add_column("temperature", justify="right")
        for weight in self.settings.search.weights:
            table.add_column(f"{weight:g}", justify="right")
        for temperature in self.settings.search.temperatures:
            cells = [cell for cell in self.result.cells if cell.temperature == temperature]
            table.add_row(f"{temperature:g}", *(self._text(cell) for cell in cells))
        return table

    def _text(self, cell: Cell) -> Text:
        if not math.isfinite(cell.accuracy):
            return Text("diverged  ")
        text = f"{100 * cell.accuracy:.1f} / {cell.loss:.3f}"
        if cell == self.result.best:
            return Text(f"{text} *", style="bold")
        return Text(f"{text}  ")


def search(
    settings: DistillSettings | None = None,
    *,
    observer_of: Callable[[Trial], Observer] | None = None,
) -> Search:
    """Search the grid ``settings.search``.

    The folder is named after the settings without the grid: the same command goes on after an
    interruption, and a larger grid trains the new cells only.

    Args:
        settings: what to distil, and the grid.
        observer_of: returns who is told about the epochs of a trial.

    Raises:
        SettingsError: names the setting that cannot work.
        FolderBusyError: another process searches in the folder.
        StorageError: the folder cannot be written.
        KeyboardInterrupt: SIGINT or SIGTERM; the cells that are done are in the folder.
    """
    settings = settings or DistillSettings()
    rows = prepare(settings)
    with settings_at_fault():
        searched_term(settings.objective)
    folder = make_folder(
        settings.output, settings.output / settings.name / f"search-{fingerprint(settings)[:8]}"
    )
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
            folder, settings, device=rows.device.type, goes_on=goes_on, anew=not done
        ) as recorder,
        computing(settings),
    ):

        def watcher(trial: Trial) -> Observer:
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
            raise Interruption.of_run(stop, folder) from None
        found = Search(settings, folder, result)
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
