"""What a person sees while a run goes on: one line that moves, on standard error."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fedkd.data import FederatedData
from sim.observers import Observer, Row
from sim.settings import Settings


class ProgressObserver(Observer):
    """Moves a bar by a step each round and shows the latest accuracy beside it."""

    def __init__(self, progress: Progress, label: str, total: int | None = None) -> None:
        self._progress = progress
        self._label = label
        self._task = progress.add_task(label, total=total, note="starting")

    def started(self, settings: Settings, data: FederatedData) -> None:
        """The first round is about to start."""
        self._progress.update(self._task, total=settings.rounds, note="")

    def returned(self, round: int) -> None:
        """The run goes on after this round."""
        self._progress.update(self._task, completed=round)

    def metrics(self, rows: Sequence[Row]) -> None:
        """A round is over."""
        accuracy = rows[0].get("accuracy")
        note = "" if accuracy is None else f"accuracy {100 * accuracy:5.1f} %"
        self._progress.update(self._task, advance=1, note=note)

    def event(self, row: Row) -> None:
        """Name what happened, such as a rejected reply, above the bar."""
        where = f"round {row['round']}"
        if "client" in row:
            where += f", client {row['client']}"
        last_line = str(row.get("reason", "")).strip().splitlines()[-1:] or [""]
        self._progress.console.print(
            f"{self._label}: {where}: {row['event']}: {last_line[0]}",
            markup=False,
            highlight=False,
        )


class FitProgress:
    """Moves a bar for every model by a step each epoch; an `fedkd.distillation.workshop.Observer`.

    Args:
        progress: where the bars are.
        label: stands before the model's name, such as the seed of one of several runs.
    """

    def __init__(self, progress: Progress, label: str = "") -> None:
        self._progress = progress
        self._label = label
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, model: str, row: Mapping[str, Any]) -> None:
        """Show an epoch of a model."""
        if model not in self._tasks:
            name = f"{self._label} {model}".strip()
            self._tasks[model] = self._progress.add_task(name, total=None, note="")
        # What is no classifier, such as a generator's images, has no accuracy.
        accuracy = row.get("validation_accuracy")
        note = "" if accuracy is None else f"validation accuracy {100 * accuracy:5.1f} %"
        self._progress.update(
            self._tasks[model], completed=row["epoch"], total=row["epochs"], note=note
        )


def progress_bars(console: Console, *, quiet: bool, unit: str = "rounds") -> Progress:
    """Return bars that show themselves only where a person is looking; ``unit`` is a step."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn(f"{{task.completed:.0f}}/{{task.total}} {unit}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=quiet or not console.is_terminal,
    )
