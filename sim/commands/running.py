"""`run`: one federation from settings to a run folder."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fedkd.data import FederatedData
from fedkd.data.room import FewRowsError
from fedkd.models import models_for, takes_kind
from fedkd.own_code import Permit
from fedkd.trained.beginnings import weights_from
from fedkd.training import initial_model_seed, weights_digest
from sim.commands.interruption import Interruption, interruptible
from sim.engine.data import adversary_of, data_of
from sim.engine.grid import CohortGrid, EngineLostError, StatesLostError
from sim.engine.inline import InlineGrid
from sim.engine.resources import check_engine
from sim.engine.runtime import (
    build_strategy,
    federation_of,
    first_weights_of,
    presence_of,
    server_tools,
)
from sim.keeping.exchange import ExchangeFolder, clients_models, keep_clients
from sim.keeping.identity import check_same_run
from sim.keeping.models import ModelKeeper, check_keep
from sim.keeping.provenance import Changes, check_same_make, provenance_of
from sim.keeping.records import (
    SETTINGS_FILE,
    RunFolder,
    StorageError,
    is_finished,
    new_run_folder,
    read_result,
)
from sim.keeping.resume import Persistence, read_history
from sim.server.audit import audited, check_audit
from sim.server.budgets import plan_of
from sim.server.history import History, summary
from sim.server.observers import Observer, Row
from sim.server.privacy import check_privacy
from sim.server.replies import QuorumError, TooLateError
from sim.server.rounds import RoundLoop
from sim.settings import (
    EngineSettings,
    Settings,
    SettingsError,
    load_settings,
    read_settings,
)
from sim.settings.permission import allow_flags, permit_of, permit_of_settings
from sim.trackers.tracking import check_trackers, tracking_of
from strategies.contract import Strategy
from strategies.contract.trying import check_models

if TYPE_CHECKING:
    import pandas as pd

    from sim.engine.session import RaySession

MOST_RETURNS = 3
"""How often in a row a run goes back because states are lost before it gives up; a round that was
never reached before starts the count anew."""


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
        backends: what trained the clients of each architecture: ``loop``, ``vmap`` or both.
        models: what is kept in ``models/``, by name; see `sim.keeping.models.ModelKeeper.finish`.
        privacy: what was promised and spent, and what an audit proved; empty where nothing is.
    """

    settings: Settings = field(repr=False)
    folder: Path
    status: str
    weights_sha256: str | None
    history: History = field(repr=False)
    seconds: float
    backends: Mapping[str, Sequence[str]] = field(default_factory=dict)
    models: Mapping[str, Row] = field(default_factory=dict)
    privacy: Row = field(default_factory=dict)

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
            "backends": {model: list(names) for model, names in self.backends.items()},
            "models": {name: dict(row) for name, row in self.models.items()},
            "folder": str(self.folder),
            **({"privacy": dict(self.privacy)} if self.privacy else {}),
            **({"adversary": adversary} if (adversary := adversary_of(self.settings)) else {}),
            **summary(
                self.history, self.settings.clients.count, selects=not self.settings.privacy.on
            ),
        }

    def to_pandas(self, rows: str = "rounds") -> "pd.DataFrame":
        """Return what the run's folder holds as a tidy data frame.

        Args:
            rows: what a row is: ``rounds`` (the federation's measures), ``clients`` (each client
                in each round), or ``runs`` (one row: the last and the selected round).

        Returns:
            One observation a row and one measure a column, beginning with ``arm`` and ``seed``;
            accuracies are shares in [0, 1]. Columns in which nothing stands are left out.

        Raises:
            SettingsError: if ``rows`` is none of these, or the folder is gone.
        """
        from sim.publishing.frames import tidy_rows, to_pandas
        from sim.publishing.studies import open_study

        return to_pandas(tidy_rows(open_study(self.folder), rows))

    def _repr_html_(self) -> str:
        """Return a small table for notebooks."""
        from sim.publishing.hypertext import to_html
        from sim.reports.terminal import NOTHING

        last = self.history.federation[-1] if self.history.federation else {}
        accuracy = last.get("accuracy")
        found = [
            ("strategy", self.settings.strategy.name),
            ("seed", str(self.settings.seed)),
            ("status", self.status),
            ("rounds", str(len(self.history.federation))),
            ("mean client accuracy", NOTHING if accuracy is None else f"{100 * accuracy:.1f} %"),
            ("seconds", f"{self.seconds:.1f}"),
        ]
        return to_html(
            [name for name, _ in found], [[value for _, value in found]], [str(self.folder)]
        )


def load_data(settings: Settings, *, nodes: bool = False) -> FederatedData:
    """Load the run's data and check everything that can be checked before a worker starts.

    Args:
        settings: of the run.
        nodes: whether clients are nodes of Flower's own runtimes.

    Raises:
        SettingsError: names the setting that cannot work.
    """
    check_engine(settings.engine)
    try:
        check_trackers(settings, nodes=nodes)
        data = data_of(settings)
        strategy = build_strategy(settings, federation_of(settings, data))
        if strategy.needs_public and not len(data.public_inputs):
            raise ValueError(
                f"data.public.size must be > 0 for strategy {settings.strategy.name!r}, which "
                "learns from predictions on public rows, got 0"
            )
        check_models(
            strategy,
            data,
            optimizer=settings.clients.optimizer,
            stacked=settings.engine.vectorize == "vmap",
            keeps_states=settings.engine.address is None,
        )
        strategy.check(data.input_shape)
        check_keep(settings, strategy, nodes=nodes)
        if nodes and settings.keeps_exchange:
            named = "exchange.keep" if settings.exchange.keep else "attacks"
            raise SettingsError(
                f"{named} needs fedkd run: in Flower's own runtimes clients keep their models to "
                "themselves, which attacks look at"
            )
        _check_counterfactual(settings, strategy, data, nodes=nodes)
        _check_brought(settings, strategy, data, nodes=nodes)
        check_privacy(settings, strategy, data, nodes=nodes)
        check_audit(settings, nodes=nodes)
        settings.stages.check(up=strategy.up, down=strategy.down, sums=strategy.sums)
        if settings.engine.vectorize == "vmap":
            _check_stacking(strategy, data)
        if settings.exchange.budget_kb is not None:
            plan_of(settings, strategy, server_tools(settings, strategy, data))
    except FewRowsError as error:
        raise SettingsError(str(_with_models(error, settings))) from error
    except ValueError as error:
        raise SettingsError(str(error)) from error
    return data


def _with_models(error: FewRowsError, settings: Settings) -> FewRowsError:
    """Add the models that have to change as well, since a line that works is typed once."""
    kind, models = error.kind, settings.clients.models
    if not error.words or kind is None or all(takes_kind(model, kind) for model in models):
        return error
    fitting = [model.name for model in models if takes_kind(model, kind)] or models_for(kind)[:1]
    words = {**error.words, "clients.models": f"[{','.join(fitting)}]"}
    return FewRowsError(error.problem, words)


def _check_counterfactual(
    settings: Settings, strategy: Strategy[Any, Any], data: FederatedData, *, nodes: bool
) -> None:
    """Refuse to leave out whom nobody can."""
    if not settings.counterfactual.on:
        return
    if nodes:
        raise SettingsError(
            "counterfactual needs fedkd run: in Flower's own runtimes clients are other people's "
            "machines, and who shall not take part is not asked"
        )
    learning = set(strategy.federation.first_clients.values())
    for client in sorted(learning.intersection(settings.counterfactual.without)):
        if len(strategy.private_rows(client, data)) > len(data.client_rows[client]):
            raise SettingsError(
                f"counterfactual.without: under strategy {settings.strategy.name} client {client} "
                "trains the model of its architecture on everybody's rows, for all of them: leave "
                f"out others than {', '.join(map(str, sorted(learning)))}"
            )


def _check_brought(
    settings: Settings, strategy: Strategy[Any, Any], data: FederatedData, *, nodes: bool
) -> None:
    """Try every file of weights that were trained elsewhere."""
    if any(settings.clients.first_weights) and (nodes or settings.engine.address):
        where = "nodes of Flower's own runtimes" if nodes else "a joined cluster (engine.address)"
        raise ValueError(
            f"clients.first_weights is read where clients are, and {where} need not have the "
            "files: run on this machine, or start clients from clients.models: package.module:"
            "callable, which builds a trained model wherever it is called"
        )
    for view in range(1 + len(data.views)):
        first_weights_of(settings, data, view)
    for setting, brought in strategy.brought.items():
        weights_from(
            brought.path,
            brought.model,
            input_shape=data.input_shape,
            class_names=data.class_names,
            setting=setting,
        )


def _check_stacking(strategy: Strategy[Any, Any], data: FederatedData) -> None:
    """Refuse to stack clients whose objective cannot be."""
    for stacking in strategy.stackings(data.input_shape).values():
        if stacking.obstacle:
            raise ValueError(
                f"engine.vectorize: vmap cannot stack these clients: {stacking.obstacle}; use auto "
                "or loop"
            )


def open_session(engine: EngineSettings) -> "RaySession":
    """Start or join Ray; it takes a second to import, which a run in this process need not do."""
    from sim.engine.session import RaySession

    return RaySession(engine)


@contextmanager
def open_grid(
    settings: Settings, data: FederatedData, session: "RaySession | None" = None
) -> Iterator[CohortGrid[Any]]:
    """Open the grid that the settings ask for; a given Ray session is used and left open."""
    if not settings.engine.on_ray:
        yield InlineGrid(settings, data)
        return
    own = open_session(settings.engine) if session is None else None
    from sim.engine.ray_grid import RayGrid  # imported late, as in `open_session`

    try:
        grid = RayGrid(session or own, settings, data)  # type: ignore[arg-type]
        try:
            yield grid
        finally:
            grid.close()
    finally:
        if own is not None:
            own.close()


# While data is loaded and Ray starts as well; what comes then is told by its number.
@interruptible()
def run(
    settings: Settings | None = None,
    *,
    folder: Path | None = None,
    resume: Path | None = None,
    accept_code: bool = False,
    observers: Sequence[Observer] = (),
    session: "RaySession | None" = None,
    lost: str = "",
    progress: bool | None = None,
) -> RunResult:
    """Run a federation, or go on with one that was stopped.

    A resumed run ends with the bits of an uninterrupted one.

    Args:
        settings: what to run; the digits default if None. With ``resume``: the run's own if
            None; they may differ from those in what changes no number.
        folder: where to write; by default a new folder ``<output>/<name>/<time>-<id>``.
        resume: the folder of the run to go on with; a finished one is only read.
        accept_code: go on with a run although its code, or a library, has changed since.
        observers: told about every round while it happens.
        session: a Ray session to run in; by default one is started and stopped.
        lost: what became of the process that made this run before, told as an event; empty if
            nothing did.
        progress: show how far it is: in a notebook a line that changes in its place, elsewhere as
            the command line does, on standard error. By default in a notebook only.

    Returns:
        The result; the same is on disk in ``result.json``.

    Raises:
        SettingsError: before anything starts, names the setting that cannot work.
        AuthorError: an algorithm's or a model's own code is wrong; the text has its traceback.
        FolderBusyError: another process runs in the folder.
        CheckpointError: the run to be resumed has no checkpoint that can be used.
        QuorumError: too few clients gave a usable answer.
        StatesLostError: clients' states went with lost machines again and again.
        EngineLostError: Ray's own processes on this machine ended.
        StorageError: the folder cannot be written.
        KeyboardInterrupt: SIGINT or SIGTERM. After this and the errors above the run can be
            resumed from its last complete round.

    Examples:
        >>> import fedkd
        >>> words = ["rounds=1", "clients.count=2", "clients.models=[mlp]", "engine.backend=inline"]
        >>> result = fedkd.run(fedkd.load_settings(None, words))  # leaves runs/default/...
        >>> result.status, len(result.history.federation)
        ('finished', 1)
        >>> fedkd.run(resume=result.folder).weights_sha256 == result.weights_sha256  # only read
        True
    """
    from sim.commands.notebooks import shown  # imported late: it brings rich

    with shown(progress) as signs:
        if signs is not None:
            from sim.commands.progress import ProgressObserver

            label = resume.name if resume else (settings or Settings()).strategy.name
            observers = [*observers, ProgressObserver(signs, label)]
        return _run(settings, folder, resume, accept_code, observers, session, lost)


def _run(
    settings: Settings | None,
    folder: Path | None,
    resume: Path | None,
    accept_code: bool,
    observers: Sequence[Observer],
    session: "RaySession | None",
    lost: str,
) -> RunResult:
    if resume is not None:
        # What was handed over in Python is allowed by that; what only the folder says is not.
        own = (
            settings_of_run(resume)
            if settings is None
            else _saved_settings(resume, permit_of_settings(settings))
        )
        settings = settings or own
        check_same_run(own, settings)
        if is_finished(resume):
            _check_kept(own, settings)
            return _attacked(_finished_result(resume, settings), observers)
        made_of, accepted = check_same_make(
            resume, provenance_of(settings), accept_code=accept_code
        )
        data = load_data(settings)
    else:
        settings = settings or Settings()
        check_engine(settings.engine)
        folder = folder or new_run_folder(settings.output, settings.name, settings.to_yaml())
        with _removed_if_empty(folder):
            presence_of(settings)
            made_of = provenance_of(settings)
            data = load_data(settings)
            accepted = Changes()
    place: Path = resume or folder  # type: ignore[assignment]
    status, digest = "failed", None
    loop: RoundLoop | None = None
    backends: Mapping[str, Sequence[str]] = {}
    models: Mapping[str, Row] = {}
    privacy: Row = {}
    kept_exchange = [ExchangeFolder(place)] if settings.keeps_exchange else []
    with RunFolder(place, settings, made_of.to_row()) as recorder:
        recorder.split(data)
        trackers = tracking_of(place, settings, recorder.event)
        try:
            with interruptible(), open_grid(settings, data, session) as grid:
                loop = RoundLoop(
                    grid, settings, data, [recorder, *kept_exchange, *trackers, *observers]
                )
                keeper = Persistence(recorder, settings, data, grid, loop)
                shelf = ModelKeeper(place, settings, data, loop, grid)
                try:
                    if resume is not None:
                        keeper.restore()
                    for event, reason in (("process lost", lost), ("code changed", str(accepted))):
                        if reason:
                            reached = 0 if loop.boundary is None else loop.boundary.round
                            loop.tell({"round": reached, "event": event, "reason": reason})
                    digest = _run_rounds(loop, keeper, shelf, grid, settings)
                    backends = grid.backends()
                    models = shelf.finish()
                    privacy = _spent_and_proven(loop, grid, settings, data)
                    if settings.keeps_exchange:
                        keep_clients(place, clients_models(loop, grid))
                except BaseException:
                    # Whatever the last of it was, what is complete shall not be lost. Where even
                    # this fails, what happened first is what matters.
                    with suppress(StorageError, StatesLostError, EngineLostError):
                        keeper.save()
                    raise
            status = "finished"
        except KeyboardInterrupt as stop:
            status = "interrupted"
            raise Interruption.of(stop, place) from None
        except (QuorumError, StatesLostError, EngineLostError) as error:
            if isinstance(error, EngineLostError) and loop is not None:
                loop.tell_of_loss(str(error))
            if isinstance(error, TooLateError):
                raise  # a run that is gone on with has the same clock
            again = f"fedkd run --resume {place}{allow_flags(settings)}"
            error.add_note(f"{again} goes on after the last complete round")
            raise
        finally:
            history = loop.history if loop is not None else History()
            if status != "finished" and loop is not None and loop.boundary is not None:
                # What has left has left, also of a round that was broken off.
                with suppress(Exception):
                    privacy = loop.spent()
            result = run_result(
                settings,
                place,
                history,
                status=status,
                digest=digest,
                backends=backends,
                models=models,
                privacy=privacy,
            )
            with suppress(StorageError) if status != "finished" else nullcontext():
                try:
                    # What fails there is an event, and the result seals events.
                    for tracking in trackers:
                        tracking.close(result.to_row())
                finally:
                    recorder.result(result.to_row())
    return _attacked(result, observers)


def _attacked(result: RunResult, observers: Sequence[Observer]) -> RunResult:
    """Make the attacks that the settings ask for on a finished run, unless they were made."""
    wanted = result.settings.attacks
    if wanted.kinds:
        # What attackers compute with takes a while to import.
        from sim.attacks.running import attack, is_attacked

        def tell(what: str) -> None:
            for observer in observers:
                observer.attacking(what)

        if not is_attacked(result.folder, wanted):
            attack(result.folder, result.settings, wanted, tell=tell)
            for observer in observers:
                observer.attacked()
    return result


def _spent_and_proven(
    loop: RoundLoop, grid: CohortGrid[Any], settings: Settings, data: FederatedData
) -> Row:
    """Return what a run has spent of privacy, and what an audit says of that."""
    spent = loop.spent()
    if data.canaries is None:
        return spent
    client = data.canaries.client
    (state,) = grid.client_states([client])
    audit = audited(settings, data, loop.architecture(client), state, spent)
    return {**spent, "audit": audit}


def _run_rounds(
    loop: RoundLoop,
    keeper: Persistence,
    shelf: ModelKeeper,
    grid: CohortGrid[Any],
    settings: Settings,
) -> str:
    """Run the rounds that are left, if need be several times over; return the weights' digest."""

    def after_round() -> None:
        # The models first: where there is a checkpoint of a round, its models are there as well.
        shelf.after_round()
        keeper.after_round()

    furthest = returns = 0
    while True:
        try:
            loop.run(after_round)
            return clients_digest(grid, settings)
        except StatesLostError as error:
            reached = 0 if loop.boundary is None else loop.boundary.round
            returns = 1 if reached > furthest else returns + 1
            furthest = max(furthest, reached)
            if returns > MOST_RETURNS:
                raise
            keeper.recover(str(error))


def settings_of_run(
    folder: Path, overrides: Sequence[str] = (), *, allow: Sequence[str] = ()
) -> Settings:
    """Read the settings that a run was started with, and override some.

    Args:
        folder: of the run.
        overrides: ``key=value``.
        allow: packages, or ``package.module:callable``, whose code the folder may name.

    Raises:
        SettingsError: it is not a run folder, an override would change its numbers, or it names
            code that nobody allowed.
    """
    try:
        permit = permit_of(overrides, allow)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    saved = _saved_settings(folder, permit)
    settings = load_settings(folder / SETTINGS_FILE, overrides, allow=allow)
    check_same_run(saved, settings)
    return settings


def _saved_settings(folder: Path, permit: Permit) -> Settings:
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise SettingsError(
            f"{str(folder)!r} is not the folder of a run: it has no {SETTINGS_FILE}"
        )
    try:
        return read_settings(path, permit=permit)
    except SettingsError as error:
        # Whoever resumes has not written it, and looks for the mistake in the command.
        raise SettingsError(f"{path}: {error}") from None


def _check_kept(ours: Settings, wanted: Settings) -> None:
    """Refuse to keep other models of a run that is finished: its clients are gone."""
    for name in ("keep_models", "keep_round"):
        old, new = getattr(ours, name), getattr(wanted, name)
        if old != new:
            raise SettingsError(
                f"{name}: a finished run keeps what it kept (it has {old!r}, got {new!r}); a new "
                "run of the same settings has the same models"
            )


def _finished_result(folder: Path, settings: Settings) -> RunResult:
    result = read_result(folder, rows=True)
    history = read_history(folder)
    history.networks = result.get("networks", [])
    return run_result(
        settings,
        folder,
        history,
        digest=result.get("weights_sha256"),
        backends=result.get("backends", {}),
        models=result.get("models", {}),
        privacy=result.get("privacy", {}),
    )


@contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    """Leave no folder behind where the block fails: nothing was run there."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            if [path.name for path in folder.iterdir()] == [SETTINGS_FILE]:
                (folder / SETTINGS_FILE).unlink()
            folder.rmdir()
            folder.parent.rmdir()
            folder.parent.parent.rmdir()
        raise


def run_result(
    settings: Settings,
    folder: Path,
    history: History,
    *,
    status: str = "finished",
    digest: str | None = None,
    backends: Mapping[str, Sequence[str]] = MappingProxyType({}),
    models: Mapping[str, Row] = MappingProxyType({}),
    privacy: Row | None = None,
) -> RunResult:
    """Gather what a run measured."""
    seconds = math.fsum(row["seconds"] for row in history.federation)
    return RunResult(
        settings, folder, status, digest, history, seconds, backends, models, privacy or {}
    )


def clients_digest(grid: CohortGrid[Any], settings: Settings) -> str:
    """Return the digest of all clients' weights, in client order."""
    clients = range(settings.clients.count)
    return weights_digest(
        # Who has not trained has the weights that the seed gives it; no need to make them.
        initial_model_seed(settings.seed, client) if state is None else state
        for client, state in zip(clients, grid.client_states(clients), strict=True)
    )
