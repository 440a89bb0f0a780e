"""A run as its folder tells it while it grows; only what is new is read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sim.keeping.parts import DamagedFileError, chunks
from sim.keeping.plans import holder
from sim.keeping.records import (
    EVENTS_FILE,
    LOCK_FILE,
    METRICS_FILE,
    RESULT_FILE,
    SETTINGS_FILE,
    federated_row,
    read_result,
)
from sim.server.observers import Row

Status = Literal["planned", "running", "finished", "interrupted", "failed", "stopped"]
"""``stopped``: it has begun and has no result, and no process has its folder any more."""

BEGINS_S = 60.0
"""A run folder this young whose run no process has yet is of a run that is about to begin."""

Point = tuple[int, int | float]
"""Of a curve: a round, and the mean accuracy over clients."""

_FEDERATION = b'"federation"'


@dataclass(frozen=True, slots=True)
class Measured:
    """What is watched of a round.

    Attributes:
        round: from 1.
        accuracy: mean over clients, in [0, 1]; None where the round was not judged.
        seconds: wall time of the round.
    """

    round: int
    accuracy: int | float | None
    seconds: int | float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSight:
    """A run at one moment.

    Attributes:
        arm: whose run it is.
        seed: of the run.
        folder: of the run; it need not be there yet.
        status: what becomes of it.
        rounds: how many it has in all.
        measured: of each complete round.
        events: rows of ``events.jsonl``.
        around_s: wall time beside the rounds, of a finished run; 0 where that is not known.
        quiet_s: since when nothing was written, of a run that is running; else 0.
    """

    arm: str
    seed: int
    folder: Path
    status: Status
    rounds: int
    measured: Sequence[Measured] = ()
    events: Sequence[Row] = ()
    around_s: float = 0.0
    quiet_s: float = 0.0

    @property
    def label(self) -> str:
        """Name it among the runs of a study."""
        return f"{self.arm} seed {self.seed}"

    @property
    def done(self) -> int:
        """The last complete round; 0 before the first."""
        return self.measured[-1].round if self.measured else 0

    @property
    def left(self) -> int:
        """Rounds that are to come; none of a run that is finished, be it before its last round."""
        return 0 if self.status == "finished" else self.rounds - self.done

    @property
    def curve(self) -> list[Point]:
        """Every judged round with its accuracy."""
        return [(row.round, row.accuracy) for row in self.measured if row.accuracy is not None]

    @property
    def accuracy(self) -> int | float | None:
        """Of the last judged round."""
        return next((accuracy for _, accuracy in reversed(self.curve)), None)

    @property
    def seconds(self) -> float:
        """Wall time of all complete rounds."""
        return math.fsum(row.seconds for row in self.measured)


class GrowingRows:
    """A file of rows that another process appends to, and cuts back when a run is resumed.

    Args:
        path: of the file; it need not be there yet.
        holding: only lines with these bytes in them are rows that anybody wants.
    """

    def __init__(self, path: Path, holding: bytes = b"") -> None:
        self._path = path
        self._holding = holding
        self._end = 0
        self._last = b""
        self._seen: object = None

    def read(self) -> tuple[list[Row], bool]:
        """Return what rows are new, and whether they replace all that were read before."""
        # What was read last is looked at again, which is dear where it is in a part by now.
        written = _written(self._path)
        if written is not None and written == self._seen:
            return [], False
        rows: list[Row] = []
        anew = False
        try:
            text = chunks(self._path, self._end - len(self._last))
            content = next(text, b"")
            if not content.startswith(self._last):
                anew, self._end, self._last = True, 0, b""
                text = chunks(self._path)
                content = next(text, b"")
            content = content[len(self._last) :]
            while True:
                rows += self._take(content)
                if (following := next(text, None)) is None:
                    break
                content = following
        except FileNotFoundError:
            anew, self._end, self._last = self._end > 0, 0, b""
            return [], anew
        except DamagedFileError:
            # Or it is being cut back at this moment; the next look tells.
            return rows, anew
        self._seen = written
        return rows, anew

    def _take(self, content: bytes) -> list[Row]:
        # A line that is still being written is read the next time.
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.splitlines(keepends=True)
        if lines:
            self._end += len(whole)
            self._last = lines[-1]
        read = (federated_row(self._path.name, line) for line in lines if self._holding in line)
        return [row for row in read if row is not None]


def _written(path: Path) -> tuple[int, int, int] | None:
    """Return what changes with any write to a file of rows; None where there is none."""
    try:
        file = path.stat()
    except OSError:
        return None
    return file.st_ino, file.st_mtime_ns, file.st_size


class RunFollower:
    """Looks at a run's folder again and again.

    Args:
        arm, seed, folder, rounds: of the run; see `RunSight`.
    """

    def __init__(self, *, arm: str, seed: int, folder: Path, rounds: int) -> None:
        self._about = {"arm": arm, "seed": seed, "folder": folder, "rounds": rounds}
        self._folder = folder
        self._metrics = GrowingRows(folder / METRICS_FILE, holding=_FEDERATION)
        self._events = GrowingRows(folder / EVENTS_FILE)
        self._measured: list[Measured] = []
        self._told: list[Row] = []
        self._ended: tuple[tuple[int, int], RunSight] | None = None

    def look(self, now: int | float) -> RunSight:
        """Return what the folder tells.

        Args:
            now: the time, in seconds since the epoch.
        """
        result = _stamp(self._folder / RESULT_FILE)
        if self._ended is not None and result == self._ended[0]:
            return self._ended[1]
        self._read()
        status = self._status(now)
        sight = RunSight(
            **self._about,  # type: ignore[arg-type]
            status=status,
            measured=tuple(self._measured),
            events=tuple(self._told),
            around_s=self._around() if status == "finished" else 0.0,
            quiet_s=self._quiet(now) if status == "running" else 0.0,
        )
        if status == "finished" and result is not None:
            self._ended = result, sight
        return sight

    def _read(self) -> None:
        rows, anew = self._metrics.read()
        if anew:
            self._measured.clear()
        for row in rows:
            if row["scope"] == "federation":
                self._measured.append(Measured(row["round"], row.get("accuracy"), row["seconds"]))
        events, anew = self._events.read()
        if anew:
            self._told.clear()
        self._told += events

    def _status(self, now: int | float) -> Status:
        try:
            ended = read_result(self._folder).get("status")
        except DamagedFileError:
            ended = None
        if ended == "finished":
            return "finished"
        if holder(self._folder / LOCK_FILE) is not None:
            return "running"
        if ended in ("interrupted", "failed"):
            return "interrupted" if ended == "interrupted" else "failed"
        if (self._folder / LOCK_FILE).exists():
            return "stopped"
        # It loads its data, and only then has its folder locked.
        settings = _stamp(self._folder / SETTINGS_FILE)
        begins = settings is not None and now - settings[1] / 1e9 < BEGINS_S
        return "running" if begins else "planned"

    def _around(self) -> float:
        """Return the wall time beside the rounds, of a run that was not stopped in between."""
        begun, ended = (_stamp(self._folder / name) for name in (LOCK_FILE, RESULT_FILE))
        if begun is None or ended is None:
            return 0.0
        return max(
            (ended[1] - begun[1]) / 1e9 - math.fsum(row.seconds for row in self._measured), 0.0
        )

    def _quiet(self, now: int | float) -> float:
        written = [_stamp(self._folder / name) for name in (LOCK_FILE, METRICS_FILE, EVENTS_FILE)]
        last = max((stamp[1] for stamp in written if stamp is not None), default=0)
        return max(now - last / 1e9, 0.0)


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return what changes when a file is replaced or written; None where there is none."""
    try:
        file = path.stat()
    except OSError:
        return None
    return file.st_ino, file.st_mtime_ns
