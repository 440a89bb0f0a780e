"""`run`: one federation from settings to a run folder."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedkd.data import FederatedData, build_federated_data
from fedkd.models import build_model, uses_batch_norm
from fedkd.training import weights_digest
from sim.engine.grid import CohortGrid
from sim.engine.inline import InlineGrid
from sim.engine.ray_grid import RayGrid, RaySession, check_engine
from sim.engine.runtime import ClientRuntime, build_strategy, federation_of
from sim.records import Row, RunFolder, new_run_folder
from sim.rounds import History, Observer, RoundLoop, summary
from sim.settings import Settings, SettingsError


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run leaves behind.

    Attributes:
        settings: as resolved.
        folder: where everything is written.
        status: ``finished``, ``interrupted`` or ``failed``.
        weights_sha256: digest of all clients' weights, in client order; None unless finished.
        history: what each round measured.
        seconds: wall time of the rounds, without loading data and starting workers.
    """

    settings: Settings
    folder: Path
    status: str
    weights_sha256: str | None
    history: History
    seconds: float

    def to_row(self) -> Row:
        """Return the result as plain values: the content of ``result.json``."""
        return {
            "status": self.status,
            "name": self.settings.name,
            "strategy": self.settings.strategy.name,
            "seed": self.settings.seed,
            "rounds": len(self.history.federation),
            "weights_sha256": self.weights_sha256,
            "seconds": self.seconds,
            "folder": str(self.folder),
            **summary(self.history, self.settings.clients.count),
        }


def load_data(settings: Settings) -> FederatedData:
    """Load the run's data and check everything that can be checked before a worker starts.

    Raises:
        SettingsError: names the setting that cannot work.
    """
    check_engine(settings.engine)
    try:
        data = build_federated_data(
            settings.data, num_clients=settings.clients.count, seed=settings.seed
        )
        strategy = build_strategy(settings, federation_of(settings, data))
        _check_models(settings, data)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    if strategy.needs_public and not len(data.public_inputs):
        raise SettingsError(
            f"data.public.size must be > 0 for strategy {settings.strategy.name!r}, which learns "
            "from predictions on public rows, got 0"
        )
    return data


def _check_models(settings: Settings, data: FederatedData) -> None:
    """Build each architecture once: a model of the user's own may not fit the data."""
    for position, model in enumerate(settings.clients.models[: settings.clients.count]):
        module = build_model(
            model, input_shape=data.input_shape, num_classes=data.num_classes, seed=0
        )
        if not uses_batch_norm(module):
            continue
        for client in range(position, settings.clients.count, len(settings.clients.models)):
            if len(data.client_rows[client]) < 2 or settings.clients.batch_size < 2:
                raise ValueError(
                    f"clients.models: {model.label} has BatchNorm, which cannot train on a single "
                    f"row, but client {client} would; use norm: group, a larger "
                    "clients.batch_size or data.partition.min_rows"
                )


@contextmanager
def open_grid(
    settings: Settings, data: FederatedData, session: RaySession | None = None
) -> Iterator[CohortGrid]:
    """Open the grid that the settings ask for; a given Ray session is used and left open."""
    if settings.engine.backend == "inline":
        yield InlineGrid(settings, data)
        return
    own = RaySession(settings.engine) if session is None else None
    try:
        grid = RayGrid(session or own, settings, data)  # type: ignore[arg-type]
        try:
            yield grid
        finally:
            grid.close()
    finally:
        if own is not None:
            own.close()


def run(
    settings: Settings | None = None,
    *,
    folder: Path | None = None,
    observers: Sequence[Observer] = (),
    session: RaySession | None = None,
) -> RunResult:
    """Run a federation.

    Args:
        settings: what to run; the digits default if None.
        folder: where to write; by default a new folder ``<output>/<name>/<time>-<id>``.
        observers: told about every round while it happens.
        session: a Ray session to run in; by default one is started and stopped.

    Returns:
        The result; the same is on disk in ``result.json``.

    Raises:
        SettingsError: before anything starts, names the setting that cannot work.
        QuorumError: too few clients gave a usable answer.
        KeyboardInterrupt: after the folder was completed with what had been measured.
    """
    settings = settings or Settings()
    check_engine(settings.engine)
    folder = folder or new_run_folder(settings.output, settings.name)
    data = load_data(settings)
    recorder = RunFolder(folder, settings)
    status, digest = "failed", None
    loop: RoundLoop | None = None
    with recorder:
        try:
            with open_grid(settings, data, session) as grid:
                loop = RoundLoop(grid, settings, data, [RecordingObserver(recorder), *observers])
                loop.run()
                digest = _digest(grid, settings, data)
            status = "finished"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            history = loop.history if loop is not None else History()
            result = run_result(settings, folder, history, status=status, digest=digest)
            recorder.result(result.to_row())
    return result


def run_result(
    settings: Settings,
    folder: Path,
    history: History,
    *,
    status: str = "finished",
    digest: str | None = None,
) -> RunResult:
    """Gather what a run measured."""
    seconds = math.fsum(row["seconds"] for row in history.federation)
    return RunResult(settings, folder, status, digest, history, seconds)


def _digest(grid: CohortGrid, settings: Settings, data: FederatedData) -> str:
    runtime: ClientRuntime | None = None
    states = []
    for client, state in enumerate(grid.client_states(range(settings.clients.count))):
        if state is None:
            # It has not trained: its weights are those that the seed gives it.
            runtime = runtime or ClientRuntime(settings, data)
            state = runtime.initial_state(client)
        states.append(state)
    return weights_digest(states)


class RecordingObserver(Observer):
    """Passes what happens on to the run's folder."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def metrics(self, rows: Sequence[Row]) -> None:
        """Write a round's metrics."""
        self._folder.metrics(rows)

    def exchange(self, rows: Sequence[Row]) -> None:
        """Write a round's bytes."""
        self._folder.exchange(rows)

    def event(self, row: Row) -> None:
        """Write an event."""
        self._folder.event(row)
