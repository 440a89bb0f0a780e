"""What a person sees while a run goes on, on standard error: bars that move, or lines in a log."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from fedkd.names import printable
from sim.server.observers import Observer, Row, event_words

if TYPE_CHECKING:
    from fedkd.data import FederatedData
    from sim.settings import Settings

SIGN_OF_LIFE_S = 30.0
"""A log is silent for no longer than this."""


class Signs(AbstractContextManager["Signs"]):
    """Says nothing: what ``--quiet`` shows, and the interface of those that say something.

    Args:
        unit: of what is counted: rounds, epochs.
    """

    def __init__(self, unit: str = "rounds") -> None:
        self._unit = unit
        self._said: set[str] = set()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Show no more."""

    def begin(self, label: str) -> int:
        """Something of unknown length begins; return its number."""
        return 0

    def reached(self, task: int, completed: int, total: int, note: str) -> None:
        """So much of it is done; all of it where both numbers are equal."""

    def doing(self, task: int, what: str) -> None:
        """This goes on in it; how much there is in all nobody knows."""

    def ended(self, task: int) -> None:
        """It is over, wherever it stands."""

    def overall(self, completed: int, total: int, note: str) -> None:
        """So much is done of all that goes on here."""

    def say(self, line: str) -> None:
        """Something happened that is worth a line."""

    def say_once(self, label: str, line: str) -> None:
        """Say it for the first of several runs of which it holds."""
        if line not in self._said:
            self._said.add(line)
            self.say(f"{label}: {line}")


class Bars(Signs):
    """One bar for what goes on, on a terminal; a line for what is over, above it."""

    def __init__(self, console: Console, unit: str) -> None:
        super().__init__(unit)
        self._console = console
        self._overall: TaskID | None = None
        self._progress = Progress(*_columns(console.width, unit), console=console)

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave a line of all that ended well, and the bar of what was interrupted."""
        if kind is None:
            for task in self._progress.task_ids:
                self.ended(task)
        self._progress.stop()

    def begin(self, label: str) -> int:
        """Show a bar that says that it starts."""
        return self._progress.add_task(printable(label), total=None, note="starting")

    def reached(self, task: int, completed: int, total: int, note: str) -> None:
        """Move the bar, or put a line in its place."""
        self._progress.update(TaskID(task), completed=completed, total=total, note=note)
        if completed >= total:
            self.ended(task)

    def doing(self, task: int, what: str) -> None:
        """Write it beside the bar."""
        self._progress.update(TaskID(task), note=printable(what))

    def ended(self, task: int) -> None:
        """Put a line in place of the bar: a terminal is only so high."""
        found = [each for each in self._progress.tasks if each.id == task]
        for each in found:
            self._progress.remove_task(each.id)
            # Or the line would stand above a bar that shows the step before.
            self._progress.refresh()
            if each.total is not None:
                state = _state(int(each.completed), int(each.total), self._unit)
                seconds = each.finished_time if each.finished_time is not None else each.elapsed
                self.say(_line(each.description, state, each.fields["note"], seconds or 0.0))

    def overall(self, completed: int, total: int, note: str) -> None:
        """Move a bar that stands above the others until all is over."""
        if self._overall is None:
            self._overall = self._progress.add_task("all", total=total, note=note)
        self._progress.update(self._overall, completed=completed, total=total, note=note)

    def say(self, line: str) -> None:
        """Print above the bars."""
        self._console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


class Lines(Signs):
    """Lines for a log: the first step, the end of everything, and every half minute in between.

    Args:
        console: where they go.
        unit: of what is counted.
        patient: to say nothing in the first half minute, for programs that want one object.
        clock: in seconds.
    """

    def __init__(
        self,
        console: Console,
        unit: str,
        *,
        patient: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(unit)
        self._console = console
        self._clock = clock
        self._patient = patient
        self._tasks: dict[int, _LogTask] = {}
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._begun = self._spoke = clock()
        self._silent = True
        self._all = ""
        self._thread = threading.Thread(target=self._keep_alive, name="signs of life", daemon=True)

    def __enter__(self) -> "Lines":
        self._begun = self._spoke = self._clock()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Say no more; nothing is said of what was interrupted."""
        if kind is None:
            for task in list(self._tasks):
                self.ended(task)
        self._over.set()
        self._thread.join()

    def begin(self, label: str) -> int:
        """Something begins: of that alone no line is written."""
        with self._lock:
            number = max(self._tasks, default=-1) + 1
            self._tasks[number] = _LogTask(label, self._clock())
            return number

    def reached(self, task: int, completed: int, total: int, note: str) -> None:
        """Write a line where it is the first, the last, or where the log was silent for long."""
        with self._lock:
            found = self._tasks[task]
            found.state, found.note = _state(completed, total, self._unit), note
            found.told = False
            if completed >= total:
                self.ended(task)
            elif (self._silent and not self._patient) or self._silence() >= SIGN_OF_LIFE_S:
                self._tell(found)

    def doing(self, task: int, what: str) -> None:
        """Write a line where it is the first, or where the log was silent for long."""
        with self._lock:
            found = self._tasks[task]
            found.state, found.note, found.told = what, "", False
            if (self._silent and not self._patient) or self._silence() >= SIGN_OF_LIFE_S:
                self._tell(found)

    def ended(self, task: int) -> None:
        """Write where it ended, unless that was the line before."""
        with self._lock:
            found = self._tasks.pop(task, None)
            long = not self._patient or self._clock() - self._begun >= SIGN_OF_LIFE_S
            if found is not None and found.state and not found.told and long:
                self._tell(found)

    def overall(self, completed: int, total: int, note: str) -> None:
        """Let the lines that follow say so as well."""
        with self._lock:
            self._all = f"; all: {_state(completed, total, self._unit)}, {note}"

    def say(self, line: str) -> None:
        """Write a line."""
        with self._lock:
            self._spoke, self._silent = self._clock(), False
            self._console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    def beat(self) -> None:
        """Write that the newest task still goes on, where the log was silent for long."""
        with self._lock:
            if self._silence() < SIGN_OF_LIFE_S or self._over.is_set():
                return
            newest = self._tasks[max(self._tasks)] if self._tasks else _LogTask("", self._begun)
            self._tell(newest, " so far")

    def _tell(self, task: "_LogTask", so_far: str = "") -> None:
        task.told = not so_far
        seconds = self._clock() - task.begun
        line = _line(task.label, task.state or "starting", task.note, seconds)
        self.say(f"{line}{so_far}{self._all}")

    def _silence(self) -> float:
        return self._clock() - self._spoke

    def _keep_alive(self) -> None:
        while not self._over.wait(1.0):
            self.beat()


class _LogTask:
    """Where something stands: its label, the last state and whether a line said so."""

    def __init__(self, label: str, begun: float) -> None:
        self.label = label
        self.begun = begun
        self.state = self.note = ""
        self.told = False


def signs_of_life(console: Console, *, quiet: bool, unit: str = "rounds", json: bool) -> Signs:
    """Return what shows how far it is: bars to a person, lines to a log, nothing if asked.

    Args:
        console: of standard error.
        quiet: to say nothing at all.
        unit: of what is counted.
        json: whether a program reads standard output; it is told only of what takes long.
    """
    if quiet:
        return Signs(unit)
    if console.is_interactive and not json:
        return Bars(console, unit)
    return Lines(console, unit, patient=json)


class ProgressObserver(Observer):
    """Counts the rounds of a run and shows the latest accuracy beside them."""

    def __init__(self, signs: Signs, label: str) -> None:
        self._signs = signs
        self._label = label
        self._task = signs.begin(label)
        self._completed, self._total = 0, 1
        self._note = ""
        self._attacks: AttackProgress | None = None

    def started(self, settings: "Settings", data: "FederatedData") -> None:
        """The first round is about to start."""
        self._total = settings.rounds
        privacy = settings.privacy
        if privacy.on:
            self._signs.say_once(
                self._label,
                f"privacy of each {privacy.promised}, delta {privacy.delta:g}: "
                f"{privacy.mechanism.told(privacy.where)}",
            )
        # Imported late: the command line shows its help without any of that.
        from sim.engine.data import adversary_of
        from sim.server.audit import audit_told

        if told := audit_told(settings):
            self._signs.say_once(self._label, told)
        adversary = adversary_of(settings)
        if adversary:
            controlled = adversary["controlled"]
            whom = ", ".join(map(str, controlled[:20])) + ", ..." * (len(controlled) > 20)
            self._signs.say_once(
                self._label,
                f"adversary {adversary['kind']} controls {len(controlled)} of "
                f"{settings.clients.count} clients: {whom or 'none'}",
            )

    def returned(self, round: int) -> None:
        """The run goes on after this round, if need be after its last one was shown as over."""
        if self._completed >= self._total:
            self._task = self._signs.begin(self._label)
        self._completed = round

    def metrics(self, rows: Sequence[Row]) -> None:
        """A round is over; where it was not judged, the last accuracy stays."""
        accuracy = rows[0].get("accuracy")
        if accuracy is not None:
            self._note = f"accuracy {100 * accuracy:.1f} %"
        self._completed += 1
        self._signs.reached(self._task, self._completed, self._total, self._note)

    def attacking(self, what: str) -> None:
        """The run is finished and is attacked."""
        if self._attacks is None:
            self._attacks = AttackProgress(self._signs, self._label)
        self._attacks(what)

    def attacked(self) -> None:
        """All attacks on it are over."""
        if self._attacks is not None:
            self._attacks.ended()

    def event(self, row: Row) -> None:
        """Name what happened, such as a rejected reply, above the bar."""
        self._signs.say(f"{self._label}: {event_words(row)}")


class StudyProgress:
    """Counts the runs and rounds of a whole study beside those of each run.

    Args:
        signs: where they are shown.
        clock: in seconds.
    """

    def __init__(self, signs: Signs, clock: Callable[[], float] = time.monotonic) -> None:
        self._signs = signs
        self._clock = clock
        self._begun = clock()
        self._runs = self._rounds = 0
        self._made = 0
        self._reached: dict[tuple[str, int], int] = {}
        self._over = 0

    def planned(self, rounds: Sequence[int]) -> None:
        """So many rounds each of the runs has that are left."""
        self._begun = self._clock()
        self._runs, self._rounds = len(rounds), sum(rounds)

    def observers(self, arm: str, seed: int) -> list[Observer]:
        """Return who is told about one of the runs."""
        # This one first: the line on a run's last round counts it among those that are done.
        part = _PartObserver(self, (arm, seed))
        return [part, ProgressObserver(self._signs, f"{arm} seed {seed}")]

    def reached(self, run: tuple[str, int], at: int, total: int, *, made: int) -> None:
        """A run stands at the end of a round, and made so many since it was told of last."""
        was = self._reached.get(run, 0)
        self._over += (at >= total) - (was >= total)
        self._reached[run] = at
        self._made += made
        if self._runs < 2:
            return
        done = sum(self._reached.values())
        running = len(self._reached) - self._over
        parts = [f"{self._over}/{self._runs} runs", *([f"{running} running"] if running else [])]
        if self._made and done < self._rounds:
            left_s = (self._clock() - self._begun) / self._made * (self._rounds - done)
            parts.append(f"{timedelta(seconds=round(left_s))} left")
        self._signs.overall(done, self._rounds, ", ".join(parts))


class _PartObserver(Observer):
    """Tells a `StudyProgress` of one run."""

    def __init__(self, study: StudyProgress, run: tuple[str, int]) -> None:
        self._study = study
        self._run = run
        self._total = 1
        self._round = 0

    def started(self, settings: "Settings", data: "FederatedData") -> None:
        """The first round is about to start."""
        self._total = settings.rounds
        self._study.reached(self._run, self._round, self._total, made=0)

    def returned(self, round: int) -> None:
        """The run goes on after this round."""
        self._round = round
        self._study.reached(self._run, round, self._total, made=0)

    def metrics(self, rows: Sequence[Row]) -> None:
        """A round is over."""
        self._round += 1
        self._study.reached(self._run, self._round, self._total, made=1)


class AttackProgress:
    """Says what goes on in attacks; to a log a line every half minute.

    Args:
        signs: where it is shown.
        label: of the run.
    """

    def __init__(self, signs: Signs, label: str) -> None:
        self._signs = signs
        self._task = signs.begin(f"{label}: attacks")

    def __call__(self, what: str) -> None:
        """Something begins, or goes on."""
        self._signs.doing(self._task, what)

    def ended(self) -> None:
        """All attacks are over."""
        self._signs.doing(self._task, "over")
        self._signs.ended(self._task)


class CoalitionProgress:
    """Counts the runs of coalitions; see `sim.counterfactual.valuing`.

    Args:
        signs: where they are shown.
    """

    def __init__(self, signs: Signs) -> None:
        self._signs = signs
        self._task: int | None = None

    def __call__(self, done: int, total: int, doing: str) -> None:
        """Show how many of how many are done, and what goes on; several lots may follow."""
        if self._task is None:
            self._task = self._signs.begin("value")
        self._signs.reached(self._task, done, total, doing)
        if done >= total:
            self._task = None


class FitProgress:
    """Counts the epochs of every model; an `fedkd.distillation.fit.workshop.EpochListener`.

    Args:
        signs: where they are shown.
        label: stands before the model's name, such as the seed of one of several runs.
    """

    def __init__(self, signs: Signs, label: str = "") -> None:
        self._signs = signs
        self._label = label
        self._tasks: dict[str, int] = {}

    def __call__(self, model: str, row: Mapping[str, Any]) -> None:
        """Show an epoch of a model."""
        if model not in self._tasks:
            self._tasks[model] = self._signs.begin(f"{self._label} {model}".strip())
        # What is no classifier, such as a generator's images, has no accuracy.
        accuracy = row.get("validation_accuracy")
        note = "" if accuracy is None else f"validation {100 * accuracy:.1f} %"
        self._signs.reached(self._tasks[model], row["epoch"], row["epochs"], note)


def _state(completed: int, total: int, unit: str) -> str:
    return f"{completed}/{total} {unit}"


def _line(label: str, state: str, note: str, seconds: float) -> str:
    parts = [state, *([note] if note else []), str(timedelta(seconds=round(seconds)))]
    return f"{label}: {', '.join(parts)}" if label else ", ".join(parts)


class _StepsColumn(ProgressColumn):
    """How many of how many; nothing while that is not known."""

    def __init__(self, unit: str) -> None:
        super().__init__(Column(no_wrap=True, justify="right"))
        self._unit = unit

    def render(self, task: Task) -> Text:
        """Write the numbers."""
        if task.total is None:
            return Text("")
        return Text(_state(int(task.completed), int(task.total), self._unit))


def _columns(width: int, unit: str) -> list[ProgressColumn]:
    """Return what finds room on a terminal: names may be folded, numbers may not be cut."""
    label = TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold"))
    note = TextColumn("{task.fields[note]}", markup=False)
    steps = _StepsColumn(unit)
    if width < 60:
        return [label, steps, note]
    if width < 100:
        return [label, BarColumn(12), steps, TimeElapsedColumn(), note]
    return [label, BarColumn(30), steps, TimeElapsedColumn(), TimeRemainingColumn(), note]
