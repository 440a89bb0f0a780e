"""Keeping a run: what goes into a checkpoint, when one is written, how a run goes on from it."""

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedkd.data import FederatedData
from fedkd.exchange.pipeline import ExchangeState
from fedkd.exchange.values import Value, flatten, read_only, unflatten
from fedkd.training import PARTS, Arrays, ClientState, check_state
from sim.engine.grid import CohortGrid, GridMemory
from sim.engine.runtime import ClientRuntime
from sim.keeping.checkpoints import (
    STATE_FILE,
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    Table,
    first_problem,
    one_line,
)
from sim.keeping.identity import data_digest, fingerprint
from sim.keeping.records import (
    EXCHANGE_FILE,
    METRICS_FILE,
    ROW_FILES,
    RunFolder,
    federated_row,
    is_charge,
    iterate_rows,
    package_versions,
    storing,
)
from sim.server.history import History
from sim.server.rounds import Boundary, RoundLoop
from sim.settings import Settings

CHECKPOINTS_FOLDER = "checkpoints"
DEAREST = 0.05
"""The fraction of a run's time that checkpoints may take where the settings leave it open."""
LEAST_S = 2.0
"""There, seconds of rounds that are made again rather than saved: most of a tiny run."""

_CLIENT = "client-"
_STATE = "state"
_EXCHANGE = "exchange"


class _Mark(BaseModel):
    """How long a file of rows was, and what its digest was."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class _Values(BaseModel):
    """The plain values of a checkpoint; see `Persistence._values`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    marks: dict[Literal["metrics.jsonl", "exchange.jsonl", "events.jsonl"], _Mark] = Field(
        min_length=len(ROW_FILES)
    )
    grid: GridMemory
    clients: int = Field(ge=0)
    simulated_s: float = Field(ge=0, allow_inf_nan=False)
    state: dict[str, Any]
    exchange: dict[str, Any]


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
        self._saved_at = time.monotonic()
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
        self._folder.pack()
        self._saved_round = boundary.round
        self._saved_at = time.monotonic()
        self._seconds = self._saved_at - started

    def _is_due(self, round: int) -> bool:
        every = self._settings.checkpoints.every
        if round == self._settings.rounds:
            return True
        if every is not None:
            return round % every == 0
        return time.monotonic() - self._saved_at >= max(LEAST_S, self._seconds / DEAREST)

    def _values(self, boundary: Boundary) -> dict[str, Any]:
        return {
            "marks": self._folder.marks,
            "grid": self._grid.memory(),
            "clients": len(self._grid.trained_clients()),
            "simulated_s": boundary.simulated_s,
            _STATE: flatten(boundary.state).plain,
            _EXCHANGE: flatten(boundary.exchange).plain,
        }

    def _tables(self, boundary: Boundary) -> Iterator[Table]:
        yield _STATE, flatten(boundary.state).arrays
        yield _EXCHANGE, flatten(boundary.exchange).arrays
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
        # After the last round nothing is written that would do so.
        with suppress(OSError):
            self._store.remove_leftovers()
        checkpoint, problems = self._store.newest(self._reason_against)
        lost: list[str] = []
        if checkpoint is None and problems:
            # Rows cannot be had again, but they are no reason to train again either.
            checkpoint, others = self._store.newest(self._reason_against_content)
            if checkpoint is not None:
                problems = others
                lost = self._folder.mend(checkpoint.values["marks"], checkpoint.round)
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
        for reason in lost:
            self._tell("rows damaged", reason)
        changed = _changes(checkpoint.packages, package_versions())
        if changed:
            self._tell("environment changed", f"bits may differ from here on: {changed}")

    def recover(self, reason: str) -> None:
        """Go back because clients' states are gone; see `restore`."""
        self.restore()
        self._tell("states lost", f"{reason}; went back to the end of round {self._round}")

    def _reason_against(self, checkpoint: Checkpoint) -> str | None:
        return self._reason_against_content(checkpoint) or self._folder.reason_not_to_rewind(
            checkpoint.values["marks"]
        )

    def _reason_against_content(self, checkpoint: Checkpoint) -> str | None:
        """Return why what a checkpoint holds cannot be what this run saved, or None.

        Its digests say that it is as it was written, not that a run of ours wrote it. All of it is
        tried here, on objects that are thrown away, before anything of the run is touched.
        """
        try:
            values = _Values.model_validate(checkpoint.values)
            server = self._check_clients(checkpoint, values)
            self._check_server(values, server)
        except CheckpointError as error:
            return str(error).removeprefix(f"checkpoint {checkpoint.folder}: ")
        except ValidationError as error:
            return f"{STATE_FILE}: {first_problem(error)}"
        except Exception as error:
            return f"its content is not what a run writes: {one_line(error)}"
        return None

    def _check_clients(self, checkpoint: Checkpoint, values: "_Values") -> dict[str, Arrays]:
        """Look at every client's state; return the server's tables.

        Raises:
            ValueError: for what is not the state of a client of this run.
        """
        count = self._settings.clients.count
        if any(not (key.isdigit() and int(key) < count) for key in values.grid.excluded):
            raise ValueError(f"clients that the run does not have: {list(values.grid.excluded)}")
        seen: set[int] = set()
        server: dict[str, Arrays] = {}
        for table, arrays in checkpoint.tables():
            if not table.startswith(_CLIENT):
                if table not in (_STATE, _EXCHANGE):
                    raise ValueError(f"a table {table[:40]!r}")
                server.setdefault(table, {}).update(arrays)
                continue
            client = int(table.removeprefix(_CLIENT))
            if not 0 <= client < count or client in seen:
                raise ValueError(f"a state of client {client}, of whom there is none or a second")
            seen.add(client)
            check_state(
                ClientState.from_arrays(arrays),
                self._first_states[self._loop.architectures[client]],
                self._settings.clients.optimizer.remembers,
                made_later=PARTS,
            )
        if len(seen) != values.clients:
            raise ValueError(f"{len(seen)} clients' states, expected {values.clients}")
        return server

    @cached_property
    def _first_states(self) -> dict[str, ClientState]:
        """What clients of each architecture start from."""
        runtime = ClientRuntime(self._settings, self._data)
        architectures = self._loop.architectures
        return {
            architecture: runtime.initial_state(architectures.index(architecture))
            for architecture in architectures
        }

    def _check_server(self, values: "_Values", server: Mapping[str, Arrays]) -> None:
        """Try what the server remembers.

        Raises:
            ValueError, and whatever else an algorithm says to what is not its own.
        """
        self._loop.check_boundary(
            unflatten(server.get(_STATE, {}), values.state),
            unflatten(server.get(_EXCHANGE, {}), values.exchange),
        )

    def _recall(self, checkpoint: Checkpoint) -> None:
        values = checkpoint.values
        server: dict[str, Arrays] = {}

        def clients() -> Iterator[tuple[int, ClientState]]:
            for table, arrays in checkpoint.tables():
                if table.startswith(_CLIENT):
                    yield int(table.removeprefix(_CLIENT)), ClientState.from_arrays(arrays)
                else:
                    server.setdefault(table, {}).update(arrays)

        self._grid.load_states(clients())
        self._grid.recall(values["grid"])
        self._folder.rewind(values["marks"])
        self._saved_round = checkpoint.round
        self._saved_at = time.monotonic()
        state: Value = unflatten(server.get(_STATE, {}), values[_STATE])
        exchange: ExchangeState = unflatten(server.get(_EXCHANGE, {}), values[_EXCHANGE])
        self._loop.go_back(
            Boundary(checkpoint.round, read_only(state), exchange, values["simulated_s"]),
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
    history.add_metrics(iterate_rows(folder / METRICS_FILE, federated_row))
    exchange = iterate_rows(folder / EXCHANGE_FILE, federated_row)
    history.add_exchange(row for row in exchange if not is_charge(row))
    return history


def _changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    return ", ".join(
        f"{package} {before.get(package)} then, {version} now"
        for package, version in now.items()
        if before.get(package) != version
    )
