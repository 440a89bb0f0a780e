"""Keeping a run: what goes into a checkpoint, when one is written, how a run goes on from it."""

import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from fedkd.data import FederatedData
from fedkd.training import Arrays, ClientState
from sim.checkpoints import Checkpoint, CheckpointError, CheckpointStore, Table
from sim.engine.grid import CohortGrid
from sim.history import History
from sim.identity import data_digest, fingerprint
from sim.records import (
    EXCHANGE_FILE,
    METRICS_FILE,
    RunFolder,
    iterate_rows,
    package_versions,
    storing,
)
from sim.rounds import Boundary, RoundLoop
from sim.settings import Settings
from strategies.memory import Memory, recall_broadcast, remember_broadcast

CHECKPOINTS_FOLDER = "checkpoints"
DEAREST = 0.05
"""The fraction of a run's time that checkpoints may take where the settings leave it open."""

_CLIENT = "client-"
_STRATEGY = "strategy"
_BROADCAST = "broadcast"


class Persistence:
    """Saves where a run stands, and puts it back there.

    Args:
        folder: the run's.
        settings: of the run.
        data: of the run.
        grid: holds the clients' states.
        loop: runs the rounds.
    """

    def __init__(
        self,
        folder: RunFolder,
        settings: Settings,
        data: FederatedData,
        grid: CohortGrid[Any],
        loop: RoundLoop,
    ) -> None:
        self._folder = folder
        self._settings = settings
        self._data = data
        self._grid = grid
        self._loop = loop
        self._saved_round: int | None = None
        self._saved_at = 0.0
        self._seconds = 0.0

    @cached_property
    def _store(self) -> CheckpointStore:
        return CheckpointStore(
            self._folder.folder / CHECKPOINTS_FOLDER,
            identity={"settings": fingerprint(self._settings), "data": data_digest(self._data)},
            packages=package_versions(),
            keep=self._settings.checkpoints.keep,
        )

    # -- saving ----------------------------------------------------------------------------

    def after_round(self) -> None:
        """Save the boundary that was just reached, if it is time.

        Raises:
            StorageError: it cannot be written; earlier checkpoints are as they were.
            StatesLostError: clients' states are gone.
        """
        if self._loop.boundary is not None and self._is_due(self._loop.boundary.round):
            self.save()

    def save(self) -> None:
        """Save the last boundary, unless that is done; see `after_round`."""
        boundary = self._loop.boundary
        if boundary is None or boundary.round in (0, self._saved_round):
            return
        # What was trained since belongs to a round that is not complete.
        self._grid.rollback()
        started = time.monotonic()
        # The rows first: a checkpoint says how long their files were.
        self._folder.sync()
        with storing(self._folder.folder):
            self._store.write(boundary.round, self._values(boundary), self._tables(boundary))
        self._saved_round = boundary.round
        self._saved_at = time.monotonic()
        self._seconds = self._saved_at - started

    def _is_due(self, round: int) -> bool:
        every = self._settings.checkpoints.every
        if round == self._settings.rounds:
            return True
        if every is not None:
            return round % every == 0
        return (
            self._saved_round is None
            or time.monotonic() - self._saved_at >= self._seconds / DEAREST
        )

    def _values(self, boundary: Boundary) -> dict[str, Any]:
        return {
            "marks": self._folder.marks,
            "grid": self._grid.memory(),
            "clients": len(self._grid.trained_clients()),
            _STRATEGY: boundary.memory.values,
            _BROADCAST: remember_broadcast(boundary.broadcast).values,
        }

    def _tables(self, boundary: Boundary) -> Iterator[Table]:
        yield _STRATEGY, boundary.memory.arrays
        yield _BROADCAST, remember_broadcast(boundary.broadcast).arrays
        clients = self._grid.trained_clients()
        for client, state in zip(clients, self._grid.client_states(clients), strict=True):
            if state is not None:
                yield f"{_CLIENT}{client}", state.to_arrays()

    # -- going on --------------------------------------------------------------------------

    def restore(self) -> None:
        """Go back to the newest usable checkpoint, or to the start if there never was one.

        Clients' states, the server's, and the rows on disk all become what they were. What is
        passed over and what is different from then is told as events.

        Raises:
            CheckpointError: there are checkpoints, but none can be used.
        """
        # From here until it is done, the loop and the grid do not fit together.
        self._loop.boundary = None
        checkpoint, problems = self._store.newest(self._reason_against)
        if checkpoint is None:
            if problems:
                raise CheckpointError(f"no checkpoint can be used: {'; '.join(problems)}")
            self._folder.rewind(None)
            self._grid.load_states([])
            self._grid.recall({**self._grid.memory(), "excluded": {}, "trained_by": {}})
            self._saved_round = None
            self._loop.start()
            return
        self._recall(checkpoint)
        for problem in problems:
            self._tell("checkpoint unusable", f"{problem}; went back to {checkpoint.folder.name}")
        changed = _changes(checkpoint.packages, package_versions())
        if changed:
            self._tell("environment changed", f"bits may differ from here on: {changed}")

    def recover(self, reason: str) -> None:
        """Go back because clients' states are gone; see `restore`."""
        self.restore()
        self._tell("states lost", f"{reason}; went back to the end of round {self._round}")

    def _reason_against(self, checkpoint: Checkpoint) -> str | None:
        return self._folder.reason_not_to_rewind(checkpoint.values["marks"])

    def _recall(self, checkpoint: Checkpoint) -> None:
        values = checkpoint.values
        server: dict[str, Arrays] = {}

        def clients() -> Iterator[tuple[int, ClientState]]:
            for table, arrays in checkpoint.tables():
                if table.startswith(_CLIENT):
                    yield int(table.removeprefix(_CLIENT)), ClientState.from_arrays(arrays)
                else:
                    server[table] = arrays

        self._grid.load_states(clients())
        self._grid.recall(values["grid"])
        self._folder.rewind(values["marks"])
        self._saved_round = checkpoint.round
        self._saved_at = time.monotonic()
        broadcast = Memory(server.get(_BROADCAST, {}), values[_BROADCAST])
        self._loop.go_back(
            Boundary(
                checkpoint.round,
                recall_broadcast(broadcast, self._loop.architectures),
                Memory(server.get(_STRATEGY, {}), values[_STRATEGY]),
            ),
            read_history(self._folder.folder),
        )

    @property
    def _round(self) -> int:
        return 0 if self._loop.boundary is None else self._loop.boundary.round

    def _tell(self, event: str, reason: str) -> None:
        self._loop.tell({"round": self._round, "event": event, "reason": reason})


def read_history(folder: Path) -> History:
    """Rebuild from the rows in a run folder what the rounds measured."""
    history = History()
    history.add_metrics(iterate_rows(folder / METRICS_FILE))
    history.add_exchange(iterate_rows(folder / EXCHANGE_FILE))
    return history


def _changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    return ", ".join(
        f"{package} {before.get(package)} then, {version} now"
        for package, version in now.items()
        if before.get(package) != version
    )
