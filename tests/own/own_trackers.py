"""A tracker as people bring it: a list in memory."""

from collections.abc import Mapping, Sequence
from typing import Any

from sim.trackers.base import Tracked, Tracker, TrackerRun

TOLD: list[tuple[Any, ...]] = []


class Memory(Tracker):
    fails_in: int = 0

    def open(self, run: Tracked) -> TrackerRun:
        TOLD.append(("open", run.title, run.known_as))
        return _Run(self.fails_in)


class Closed(Tracker):
    def open(self, run: Tracked) -> TrackerRun:
        raise OSError("the door\nis closed")


class _Run(TrackerRun):
    known_as = "mine"

    def __init__(self, fails_in: int) -> None:
        self._fails_in = fails_in

    def log(self, round: int, values: Mapping[str, float]) -> None:
        if round == self._fails_in:
            raise RuntimeError("out of ink")
        TOLD.append(("log", round, sorted(values)))

    def note(self, round: int, lines: Sequence[str]) -> None:
        TOLD.append(("note", round, *lines))

    def finish(self, status: str, result: Mapping[str, Any]) -> None:
        TOLD.append(("finish", status, result["rounds"]))
