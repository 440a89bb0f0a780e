"""Trials: the first two rounds of a run, in this process and without a trace on the disk.

The first round carries what happens before the others, such as a teacher's training; the second
stands for all that follow. Bytes and optimizer steps are counted, so they are exact where an
algorithm's payloads and batches do not change with the rounds.
"""

import heapq
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from sim.commands.running import load_data
from sim.engine.grid import Outcome, PackedCall
from sim.engine.inline import InlineGrid
from sim.server.judging import MOST_OF_TIME
from sim.server.observers import Observer, Row
from sim.server.rounds import RoundLoop
from sim.settings import Settings


@dataclass(frozen=True, slots=True)
class Work:
    """What something took: a part that only this process can do, and calls that workers share.

    Attributes:
        serial_s: seconds of the server's half and of all around the calls.
        calls_s: seconds of each cohort's call, in the order in which they are handed out.
    """

    serial_s: float = 0.0
    calls_s: tuple[float, ...] = ()

    def seconds(self, workers: int) -> float:
        """Return how long it takes with so many workers; each takes the next call when free.

        Args:
            workers: >= 1.
        """
        free = [0.0] * max(workers, 1)
        for call_s in self.calls_s:
            heapq.heapreplace(free, free[0] + call_s)
        return self.serial_s + max(free)


@dataclass(frozen=True, slots=True)
class Trial:
    """What the first rounds of a run took and moved.

    Attributes:
        load: reading data and building models.
        first: the first round, and what came before it.
        further: each round after it.
        judging: one evaluation.
        first_bytes, further_bytes: bytes up and down of the first round, and of each after it.
        first_steps, further_steps: optimizer steps of clients and server together, likewise.
    """

    load: Work
    first: Work
    further: Work
    judging: Work
    first_bytes: tuple[int, int]
    further_bytes: tuple[int, int]
    first_steps: int = 0
    further_steps: int = 0

    def cost(self, *, rounds: int, every: int | Literal["auto"], workers: int = 1) -> "RunCost":
        """Extrapolate to a whole run.

        Args:
            rounds: of the run, >= 1.
            every: ``evaluation.every``; the last round is always judged.
            workers: that share the calls.
        """
        further, judging = self.further.seconds(workers), self.judging.seconds(workers)
        learning = self.first.seconds(workers) + (rounds - 1) * further
        if every == "auto":
            # At least the first, the second and the last; rounded up, so that all rounds are many.
            within = MOST_OF_TIME / (1 - MOST_OF_TIME) * rounds * further
            judged = min(rounds, 3 + math.ceil(within / judging)) if judging else rounds
        else:
            judged = math.ceil(rounds / every)
        seconds = self.load.seconds(workers) + learning + judged * judging
        up, down = (
            first + (rounds - 1) * later
            for first, later in zip(self.first_bytes, self.further_bytes, strict=True)
        )
        return RunCost(seconds, up, down)


@dataclass(frozen=True, slots=True)
class RunCost:
    """What one run takes and moves.

    Attributes:
        seconds: wall time.
        bytes_up, bytes_down: of all clients together; a mean over several runs is a fraction.
    """

    seconds: int | float
    bytes_up: int | float
    bytes_down: int | float

    @classmethod
    def mean(cls, costs: Sequence["RunCost"]) -> "RunCost":
        """Return the mean of one or more."""
        return cls(
            fmean(cost.seconds for cost in costs),
            fmean(cost.bytes_up for cost in costs),
            fmean(cost.bytes_down for cost in costs),
        )


class _EnoughError(Exception):
    """The rounds that a trial needs are over."""


class _TimedGrid(InlineGrid):
    """Takes the time of every call."""

    def __init__(self, settings: Settings, data: Any) -> None:
        super().__init__(settings, data)
        self._times: dict[str, list[float]] = {}

    def _execute(self, calls: Sequence[PackedCall]) -> Iterator[tuple[int, Outcome]]:
        for position, packed in enumerate(calls):
            started = time.perf_counter()
            # One at a time: what the server does in between is not the client's.
            ((_, outcome),) = super()._execute([packed])
            spent = time.perf_counter() - started
            self._times.setdefault(packed.call.phase, []).append(spent)
            yield position, outcome

    def take(self, phase: str) -> tuple[float, ...]:
        """Return, once, what the calls of a phase took."""
        return tuple(self._times.pop(phase, ()))


class _Rows(Observer):
    """Keeps the last round's row of the federation."""

    def __init__(self) -> None:
        self.last: Row = {}

    def metrics(self, rows: Sequence[Row]) -> None:
        """A round is over."""
        self.last = next(row for row in rows if row["scope"] == "federation")


def try_out(settings: Settings) -> Trial:
    """Run the first two rounds in this process, and leave nothing behind.

    Schedules and progress are those of the whole run.

    Raises:
        SettingsError: names the setting that cannot work.
        AuthorError: an algorithm's or a model's own code is wrong.
        QuorumError: too few clients gave a usable answer.
    """
    settings = _for_trial(settings)
    rows, found, moved, steps = _Rows(), [], [], []
    started = time.perf_counter()
    data = load_data(settings)
    grid = _TimedGrid(settings, data)
    loop = RoundLoop(grid, settings, data, [rows])
    load = Work(time.perf_counter() - started)
    begun = time.perf_counter()
    judging = Work()

    def after_round() -> None:
        nonlocal begun, judging
        row, now = rows.last, time.perf_counter()
        train, evaluate = grid.take("train"), grid.take("evaluate")
        judged_s = row["seconds"] - row["train_seconds"]
        if evaluate:
            judging = Work(max(judged_s - sum(evaluate), 0.0), evaluate)
        found.append(Work(max(now - begun - judged_s - sum(train), 0.0), train))
        moved.append((row["bytes_up"], row["bytes_down"]))
        steps.append(row.get("client_steps", 0) + row.get("server_steps", 0))
        begun = time.perf_counter()
        if len(found) == 2:
            raise _EnoughError

    try:
        loop.run(after_round)
    except _EnoughError:
        pass
    finally:
        grid.close()
    return Trial(load, found[0], found[-1], judging, moved[0], moved[-1], steps[0], steps[-1])


def _for_trial(settings: Settings) -> Settings:
    """Return settings that run in this process, and judge in one of the first two rounds."""
    engine = settings.engine.model_copy(
        update={"backend": "inline", "address": None, "gpus_per_worker": 0.0}
    )
    evaluation = settings.evaluation
    if evaluation.every == "auto" or evaluation.every > 2:
        evaluation = evaluation.model_copy(update={"every": 2})
    # Others take time or the whole process, which would be this one.
    faults = tuple(rule for rule in settings.faults if rule.kind == "dropout")
    return settings.model_copy(
        update={"engine": engine, "evaluation": evaluation, "faults": faults}
    )
