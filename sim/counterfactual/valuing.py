"""`value`: what each client of a finished run is worth to the others.

A coalition is who teaches: the whole federation runs, and everybody else is left out, so goes on
learning and receiving, and sends nothing that counts. What a coalition achieves is the mean
accuracy of all clients' models (or that of the server's), so that every coalition is judged by
one panel; without anybody who teaches clients learn alone.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedkd.metrics.valuation import (
    Coalition,
    coalitions_of,
    drawn_permutations,
    sampled_shapley,
)
from sim.attacks.settings import AttackSettings
from sim.commands.interruption import Interruption
from sim.commands.running import load_data, open_session, run
from sim.counterfactual.replaying import repeatable
from sim.keeping.identity import fingerprint
from sim.keeping.provenance import Provenance, check_same_make, provenance_of
from sim.keeping.records import (
    SETTINGS_FILE,
    is_finished,
    make_folder,
    only_one,
    read_result,
    storing,
    to_json,
    write_text,
)
from sim.keeping.resume import CHECKPOINTS_FOLDER
from sim.reports.runs import VALUE_FILE, number
from sim.server.observers import Observer, Row
from sim.settings import Settings, SettingsError
from sim.settings.schema import CounterfactualSettings, StudySettings

if TYPE_CHECKING:
    from sim.engine.session import RaySession

VALUE_FOLDER = "value"
"""Inside a run's folder: what coalitions achieved, a run's folder each without its models."""

Method = Literal["loo", "shapley", "both"]
Judge = Literal["clients", "server"]
Split = Literal["test", "validation"]
METHODS: tuple[Method, ...] = ("loo", "shapley", "both")
JUDGES: tuple[Judge, ...] = ("clients", "server")
SPLITS: tuple[Split, ...] = ("test", "validation")
MOST_PERMUTATIONS = 100_000

Reached = Callable[[int, int, str], None]
"""Is told ``(coalitions that are done, of how many, what goes on)``."""


@dataclass(frozen=True)
class Asked:
    """What is asked for.

    Attributes:
        method: ``loo``, ``shapley`` or ``both``.
        permutations: orders in which clients join, for Shapley values.
        seed: draws them; the run's draws are its own.
        of: whose accuracy is what a coalition achieves: the mean client's, or the server model's.
        split: rows that it is measured on. Who is to be chosen by it is chosen on ``validation``.
        tolerance: accuracy, in [0, 1]; once a coalition is so close to all, who joins later counts
            as adding nothing; None: every order is gone through.
        antithetic: whether every second order is the one before backwards.
    """

    method: Method = "loo"
    permutations: int = 20
    seed: int = 0
    of: Judge = "clients"
    split: Split = "test"
    tolerance: float | None = None
    antithetic: bool = True

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            SettingsError: naming the option and what it got.
        """
        choices: tuple[tuple[str, str, Sequence[str]], ...] = (
            ("--method", self.method, METHODS),
            ("--of", self.of, JUDGES),
            ("--split", self.split, SPLITS),
        )
        for option, got, known in choices:
            if got not in known:
                raise SettingsError(f"{option} must be one of {', '.join(known)}, got {got!r}")
        if not 1 <= self.permutations <= MOST_PERMUTATIONS:
            raise SettingsError(
                f"--permutations must be 1 to {MOST_PERMUTATIONS}, got {self.permutations}"
            )
        if self.tolerance is not None and not 0 <= self.tolerance <= 1:
            raise SettingsError(f"--truncate must be 0 to 1, got {self.tolerance}")


@dataclass(frozen=True)
class Achieved:
    """How a coalition's run ended.

    Attributes:
        weights_sha256: of all clients' models.
        clients: ``test`` and ``validation`` accuracy of each client, by its number.
        server: the same of the server's model; empty where there is none.
    """

    weights_sha256: str
    clients: dict[int, dict[str, float]]
    server: dict[str, float] = field(default_factory=dict)

    def mean(self, split: Split, clients: Iterable[int] | None = None) -> float:
        """Return the mean accuracy of these clients; of all by default."""
        chosen = self.clients if clients is None else clients
        return fmean(self.clients[client][split] for client in chosen)


@dataclass(frozen=True)
class ValueResult:
    """What clients are worth.

    Attributes:
        folder: of the run.
        row: plain values, the content of ``value.json``.
    """

    folder: Path
    row: Row

    @property
    def path(self) -> Path:
        """The file of the figures."""
        return self.folder / VALUE_FILE


def value(
    folder: Path,
    asked: Asked = Asked(),
    *,
    workers: int = 1,
    accept_code: bool = False,
    allow: Sequence[str] = (),
    reached: Reached | None = None,
    tell: Callable[[str], None] | None = None,
) -> ValueResult:
    """Say what each client of a finished run is worth.

    What a coalition achieved is kept beside the run, and counts again for equal settings, data,
    code and libraries; so what was stopped goes on, and more permutations cost only new coalitions.

    Args:
        folder: of the run.
        asked: what is asked for.
        workers: processes, each of which runs one coalition after the other in itself; 1: here, by
            the run's engine.
        accept_code: do so although the run's code, or a library, has changed since.
        allow: packages whose code the folder may name.
        reached: is told how many coalitions are done.
        tell: is told what is to be done.

    Raises:
        SettingsError: the run cannot be repeated, or not so; names what and why.
        StorageError: the folder cannot be written.
        KeyboardInterrupt: what is done is kept.
    """
    asked.check()
    reached, tell = reached or _nobody, tell or _nobody
    started = time.perf_counter()
    own = repeatable(folder, allow)
    check_same_make(folder, provenance_of(own), accept_code=accept_code)
    count = own.clients.count
    if count < 2:
        raise SettingsError(f"clients.count must be at least 2 for values of clients, got {count}")
    data = load_data(_settings_of(folder, own, frozenset()))
    everybody = frozenset(range(count))
    orders = drawn_permutations(
        count, asked.permutations, np.random.default_rng(asked.seed), antithetic=asked.antithetic
    )
    alone = [everybody - {client} for client in range(count)] if asked.method != "shapley" else []
    joined = coalitions_of(orders) if asked.method != "loo" else []
    with storing(folder, goes_on="repeat the command"):
        make_folder(folder, folder / VALUE_FOLDER)
    with only_one(folder / VALUE_FOLDER):
        runs = _Coalitions(folder, own, workers=workers, allow=allow, reached=reached)
        whole = runs.one(everybody)
        _check_bits(folder, whole)
        if asked.of == "server" and not whole.server:
            raise SettingsError(
                f"--of server: the server of {own.strategy.name} has no model that is judged, use "
                "clients"
            )
        # With a tolerance some of them need not be run: they are asked for one by one.
        ahead = list(dict.fromkeys([*alone, *(joined if asked.tolerance is None else ())]))
        known = sum(runs.is_known(each) for each in ahead)
        tell(
            f"{len(ahead)} runs of coalitions, {known} of them known, beside the whole federation's"
        )
        runs.all(ahead)
        row: Row = {
            "run": whole.weights_sha256,
            "asked": {
                "method": asked.method,
                "permutations": asked.permutations,
                "seed": asked.seed,
                "of": asked.of,
                "split": asked.split,
                "tolerance": asked.tolerance,
                "antithetic": asked.antithetic,
            },
            "all": _utility(whole, asked),
        }
        clients: list[Row] = [
            {
                "client": client,
                "rows": int(own_counts.sum()),
                "classes": np.flatnonzero(own_counts).tolist(),
                "accuracy": whole.clients[client][asked.split],
            }
            for client, own_counts in enumerate(data.label_counts(true=True))
        ]
        if asked.method != "shapley":
            for client, each in enumerate(clients):
                each["leave_one_out"] = _left_out(runs, client, asked, everybody)
        if asked.method != "loo":
            found = sampled_shapley(
                lambda coalition: _utility(runs.one(coalition), asked),
                orders,
                antithetic=asked.antithetic,
                tolerance=asked.tolerance,
            )
            for each, worth, error in zip(
                clients, found.values, found.standard_errors, strict=True
            ):
                each["shapley"] = float(worth)
                each["standard_error"] = None if np.isnan(error) else float(error)
            row["nobody"] = _utility(runs.one(frozenset()), asked)
            row["truncated"] = found.truncated
        row["coalitions"] = len(runs.known)
        row["clients"] = clients
        row["seconds"] = time.perf_counter() - started
    with storing(folder, goes_on="the same command writes it again"):
        write_text(folder / VALUE_FILE, to_json(row, indent=1) + "\n")
    return ValueResult(folder, row)


def _nobody(*_: object) -> None:
    """Tell nobody."""


def _utility(achieved: Achieved, asked: Asked) -> float:
    if asked.of == "server":
        return achieved.server[asked.split]
    return achieved.mean(asked.split)


def _left_out(runs: "_Coalitions", client: int, asked: Asked, everybody: Coalition) -> float:
    """Return by how much the others, or the server's model, are better with a client than without.

    Its own model is no part of it: what it is worth to itself is no reason for others to have it.
    """
    whole, without = runs.one(everybody), runs.one(everybody - {client})
    if asked.of == "server":
        return whole.server[asked.split] - without.server[asked.split]
    others = sorted(everybody - {client})
    return whole.mean(asked.split, others) - without.mean(asked.split, others)


def _check_bits(folder: Path, whole: Achieved) -> None:
    """Refuse to compare with runs of another machine or code."""
    before = str(read_result(folder).get("weights_sha256"))
    if whole.weights_sha256 != before:
        raise SettingsError(
            f"{folder}: repeated from its seed the run ends with other weights "
            f"({whole.weights_sha256[:16]}, it had {before[:16]}): code, libraries or the type of "
            "processor have changed since, so differences would not be clients' alone. Run it "
            "again here, and value that"
        )


# -- runs of coalitions ------------------------------------------------------------------------


def _settings_of(folder: Path, own: Settings, coalition: Coalition) -> Settings:
    """Return the settings of the run in which a coalition teaches."""
    left_out = tuple(client for client in range(own.clients.count) if client not in coalition)
    return own.model_copy(
        update={
            "output": folder / VALUE_FOLDER,
            "counterfactual": CounterfactualSettings(without=left_out),
            # All are judged, once; models are of no use afterwards.
            "evaluation": own.evaluation.model_copy(update={"every": own.rounds, "clients": "all"}),
            "exchange": own.exchange.model_copy(update={"keep": False}),
            "keep_models": "none",
            "attacks": AttackSettings(),
            "study": StudySettings(),
        }
    )


class _Coalitions:
    """Runs coalitions, each once, and remembers what they achieved.

    Args:
        folder: of the run that they are coalitions of.
        own: settings of that run.
        workers: processes.
        allow: packages whose code the folder may name.
        reached: is told how many are done.

    Attributes:
        known: what they achieved.
    """

    def __init__(
        self,
        folder: Path,
        own: Settings,
        *,
        workers: int,
        allow: Sequence[str],
        reached: Reached,
    ) -> None:
        self._folder = folder
        self._own = own
        self._workers = workers
        self._allow = tuple(allow)
        self._reached = reached
        self._made_of = provenance_of(own)
        self.known: dict[Coalition, Achieved] = {}

    def is_known(self, coalition: Coalition) -> bool:
        """Tell whether a coalition was run before, here or by another command."""
        return coalition in self.known or self._read(coalition) is not None

    def one(self, coalition: Coalition) -> Achieved:
        """Return what a coalition achieved, and run it if nobody knows."""
        if coalition not in self.known:
            self.all([coalition], alone=True)
        return self.known[coalition]

    def all(self, coalitions: Sequence[Coalition], *, alone: bool = False) -> None:
        """Run coalitions that nobody has run yet.

        Args:
            coalitions: that will be asked for.
            alone: whether it is one of which more may follow.
        """
        for coalition in coalitions:
            found = None if coalition in self.known else self._read(coalition)
            if found is not None:
                self.known[coalition] = found
        missing = [each for each in coalitions if each not in self.known]
        if not missing:
            return
        if self._workers > 1 and len(missing) > 1:
            self._packed(missing)
        else:
            self._one_by_one(missing, total=0 if alone else len(missing))

    def _read(self, coalition: Coalition) -> Achieved | None:
        settings = _settings_of(self._folder, self._own, coalition)
        place = self._place(settings)
        return _achieved(place) if is_finished(place) else None

    def _place(self, settings: Settings) -> Path:
        """Return a run's folder: the one that was begun, if it was made of what there is now."""
        return coalition_place(self._folder, settings, self._made_of)

    def _one_by_one(self, missing: Sequence[Coalition], total: int) -> None:
        with _session(self._own) as session:
            known = len(self.known)
            for done, coalition in enumerate(missing):
                settings = _settings_of(self._folder, self._own, coalition)
                # Where each run decides about the next one nobody knows how many there will be.
                step = (done, total) if total else (known, known + 1)
                observer = _Telling(self._reached, *step, settings.rounds)
                place = self._place(settings)
                run_coalition(settings, place, observers=[observer], session=session)
                self.known[coalition] = _achieved(place)
                if total:
                    self._reached(done + 1, total, "")

    def _packed(self, missing: Sequence[Coalition]) -> None:
        """Run them in several processes, each in itself: bits do not depend on where."""
        context = get_context("spawn")
        pool = ProcessPoolExecutor(min(self._workers, len(missing)), mp_context=context)
        try:
            waiting = {
                pool.submit(
                    run_elsewhere, str(self._folder), sorted(coalition), self._allow
                ): coalition
                for coalition in missing
            }
            for done, future in enumerate(as_completed(waiting), start=1):
                future.result()
                settings = _settings_of(self._folder, self._own, waiting[future])
                self.known[waiting[future]] = _achieved(self._place(settings))
                self._reached(done, len(missing), "")
        finally:
            # Those that run end at the signal that ended this; what they had is kept.
            pool.shutdown(wait=True, cancel_futures=True)


class _Telling(Observer):
    """Tells of a coalition's rounds while it runs."""

    def __init__(self, reached: Reached, done: int, total: int, rounds: int) -> None:
        self._reached = reached
        self._done = done
        self._total = total
        self._rounds = rounds

    def completed(self, round: int) -> None:
        if round < self._rounds:
            self._reached(self._done, self._total, f"round {round} of {self._rounds}")


@contextmanager
def _session(own: Settings) -> "Iterator[RaySession | None]":
    """Open one Ray session for all runs, where the run was on Ray."""
    if not own.engine.on_ray:
        yield None
        return
    session = open_session(own.engine)
    try:
        yield session
    finally:
        session.close()


def coalition_place(folder: Path, settings: Settings, made_of: Provenance) -> Path:
    """Return the folder of a coalition's run: the one that was begun, if made of the same."""
    named = fingerprint(settings)[:16]
    number_ = 1
    while True:
        place = folder / VALUE_FOLDER / (named if number_ == 1 else f"{named}-{number_}")
        if not (place / SETTINGS_FILE).is_file():
            return place
        before = Provenance.read(place)
        if before is not None and before.latest().to_row() == made_of.to_row():
            return place
        number_ += 1


def run_coalition(
    settings: Settings,
    place: Path,
    *,
    observers: Sequence[Observer] = (),
    session: "RaySession | None" = None,
) -> None:
    """Run a coalition, or go on with it; of its checkpoints nothing stays once it is finished."""
    begun = (place / SETTINGS_FILE).is_file()
    make_folder(settings.output, place)
    run(
        settings,
        folder=place,
        resume=place if begun else None,
        observers=observers,
        session=session,
        progress=False,
    )
    # All clients' models, of every coalition, would fill the disk.
    with suppress(OSError):
        shutil.rmtree(place / CHECKPOINTS_FOLDER)


def run_elsewhere(folder: str, coalition: Sequence[int], allow: Sequence[str]) -> None:
    """Run a coalition in a process of its own."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    own = repeatable(Path(folder), allow)
    settings = _settings_of(Path(folder), own, frozenset(coalition))
    place = coalition_place(Path(folder), settings, provenance_of(own))
    inline = settings.engine.model_copy(update={"backend": "inline"})
    try:
        run_coalition(settings.model_copy(update={"engine": inline}), place)
    except Interruption:
        # Whoever sent the signal has told the parent as well.
        raise SystemExit(1) from None


def _achieved(place: Path) -> Achieved:
    """Read how a coalition's run ended.

    Raises:
        DamagedFileError: it is not as it was written.
        SettingsError: somebody could not be judged.
    """
    result = read_result(place)
    splits = (("test", "accuracy"), ("validation", "validation_accuracy"))

    def accuracies(row: Row) -> dict[str, float]:
        return {split: value for split, name in splits if (value := number(row, name)) is not None}

    clients = {int(row["client"]): accuracies(row) for row in result.get("clients", ())}
    missing = [c for c in range(_count(result)) if len(clients.get(c, {})) < len(splits)]
    if missing:
        raise SettingsError(
            f"{place}: client {missing[0]} could not be judged after the last round, so what this "
            "coalition achieves is not known; its events.jsonl says why"
        )
    return Achieved(
        str(result.get("weights_sha256")), clients, accuracies(result.get("server") or {})
    )


def _count(result: dict[str, Any]) -> int:
    return len(result.get("bytes_up", ()))
