"""Small runs of a study are packed over the CPUs: each is made whole by one of several processes.

The processes (`sim.commands.warm`) have everything loaded, compute with one thread each, and make
one run after the other, so that nothing is started, and nothing but rows is sent, for a single run.
A run's bits are those that it has alone.
"""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import InitVar, dataclass, field, replace
from multiprocessing.connection import Connection, wait
from types import TracebackType

import torch

from fedkd.data import FederatedData
from fedkd.trained.exporting import ExportError
from sim.adversity.faults import PROCESS_FAULTS
from sim.commands.interruption import (
    Interruption,
    begin_anew,
    interruptible,
    signals_waiting,
)
from sim.commands.planned import ObserverOf, PlannedRun, make_run, nobody
from sim.engine.data import data_of
from sim.engine.grid import EngineLostError, StatesLostError
from sim.engine.resources import available_cpus
from sim.keeping.checkpoints import CheckpointError
from sim.keeping.parts import DamagedFileError
from sim.keeping.records import FolderBusyError, StorageError
from sim.server.observers import Observer, Row
from sim.server.replies import QuorumError
from sim.server.validation import AuthorError
from sim.settings import Settings, SettingsError
from sim.settings.permission import folders_of_code

MOST_CLIENTS = 200
"""A run of more is not small: one process would hold all of its clients' states."""

START_S = 4.0
"""CPU seconds until warm processes are there: they import what a run needs."""

STOP: Row = {"stop": True}
"""The order to drop the round in progress, save the run, and end."""

GOODBYE_S = 1.0
"""A nursery that still imports, or waits for a process that hangs, is not waited for longer."""

MOST_LOSSES = 3
"""A run that has taken so many processes with it is not tried again."""

NAMED = {
    kind.__name__: kind
    for kind in (
        AuthorError,
        CheckpointError,
        DamagedFileError,
        EngineLostError,
        ExportError,
        FolderBusyError,
        QuorumError,
        SettingsError,
        StatesLostError,
        StorageError,
    )
}
"""Errors of a run that speak for themselves; they are raised here as they were there."""

NURSERY = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
import fedkd_start
fedkd_start.pin()
from sim.commands.warm import nursery
nursery(int(sys.argv[2]))
"""


# -- which runs --------------------------------------------------------------------------------


def why_alone(settings: Settings) -> str:
    """Return the setting that keeps a run from being made whole by one process; empty if none."""
    engine = settings.engine
    faults = [rule.kind for rule in settings.faults if rule.kind in PROCESS_FAULTS]
    if engine.backend == "ray":
        return "engine.backend is ray"
    if engine.address is not None:
        return "engine.address is set"
    if engine.gpus_per_worker:
        return "engine.gpus_per_worker is set"
    if faults:
        return f"faults of kind {faults[0]} need Ray"
    if settings.clients.count > MOST_CLIENTS:
        return f"more than {MOST_CLIENTS} clients"
    return ""


@dataclass(frozen=True, slots=True)
class Division:
    """How the runs of a study are made.

    Attributes:
        packed: runs that are made whole by one process each, in the order in which they begin.
        alone: runs that are made one after the other, each as if it were the only one.
        processes: how many runs are made at a time, >= 2; 1 where none is packed.
        waits: whether processes are started only once they are seen to save time.
        reason: why runs are made alone, for the first of them; empty where all are packed.
    """

    packed: Sequence[PlannedRun]
    alone: Sequence[PlannedRun]
    processes: int
    waits: bool
    reason: str

    def told(self) -> str:
        """Say in a few words how many runs are made at a time; empty where there is one at most."""
        if len(self.packed) + len(self.alone) < 2:
            return ""
        parts = []
        if self.packed:
            most = "up to " if self.waits else ""
            parts.append(f"{most}{self.processes} at a time, each whole in a process")
        if self.alone:
            some = f"{len(self.alone)} " if self.packed else ""
            parts.append(f"{some}one after the other ({self.reason})")
        return ", ".join(parts)


def divide(runs: Sequence[PlannedRun], parallel: int | str, *, cpus: int | None = None) -> Division:
    """Decide how the runs of a study are made.

    Args:
        runs: those that are left.
        parallel: ``study.parallel``.
        cpus: of this machine; None asks it.
    """
    reasons = {id(run): why_alone(run.settings) for run in runs}
    small = [run for run in runs if not reasons[id(run)]]
    waits = parallel == "auto"
    if isinstance(parallel, int):
        most, reason = parallel, f"study.parallel is {parallel}"
    else:
        there = available_cpus() if cpus is None else cpus
        most = min(_room(run.settings, there) for run in small) if small else 1
        reason = "there is room for one process only"
        if len(small) * 2 < most:
            # Ray would share out the clients of a run, and leave no CPU idle.
            most, reason = 1, f"they are fewer than half of {there} CPUs"
    processes = min(most, len(small))
    if processes < 2:
        told = next(filter(None, reasons.values()), reason)
        return Division((), tuple(runs), 1, waits, told if len(small) < len(runs) else reason)
    alone = tuple(run for run in runs if reasons[id(run)])
    told = reasons[id(alone[0])] if alone else ""
    return Division(tuple(map(_inline, small)), alone, processes, waits, told)


def _room(settings: Settings, cpus: int) -> int:
    """Return how many processes there is room for, if each has the CPUs that a worker has."""
    return max(1, math.floor(cpus / max(settings.engine.cpus_per_worker, 1.0)))


def _inline(run: PlannedRun) -> PlannedRun:
    """Return a run that is made whole by the process that makes it."""
    engine = run.settings.engine.model_copy(update={"backend": "inline"})
    return replace(run, settings=run.settings.model_copy(update={"engine": engine}))


# -- processes ---------------------------------------------------------------------------------


class Nursery:
    """A process that has imported what runs need, and is forked for each that is asked for.

    It is no child of ``multiprocessing``, which would run the caller's script anew in it.

    Args:
        forked: from this process, which has imported most of that already: only where nothing but
            our command runs in it, and nothing is computed or locked yet.
    """

    def __init__(self, *, forked: bool = False) -> None:
        self._requests, theirs = socket.socketpair()
        with theirs:
            if forked:
                self._process: _Forked | subprocess.Popen[bytes] = _Forked(self._requests, theirs)
            else:
                self._process = _imported_anew(theirs)

    def process(self) -> Connection:
        """Let a process be forked; return the way to it, which it may take a while to be there.

        Raises:
            OSError: the nursery has ended.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._requests, [b"+"], [theirs.fileno()])
            except OSError:
                ours.close()
                raise
        return Connection(ours.detach())

    def close(self) -> None:
        """End it; processes that were forked go on until they are told to stop."""
        self._requests.close()
        try:
            self._process.wait(timeout=GOODBYE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _imported_anew(requests: socket.socket) -> "subprocess.Popen[bytes]":
    """Start a nursery that knows nothing of this process but where its code lies."""
    # Ctrl-C reaches all processes of a terminal, and here it is this one that passes it on.
    with signals_waiting():
        return subprocess.Popen(  # noqa: S603
            [sys.executable, "-P", "-c", NURSERY, json.dumps(sys.path), str(requests.fileno())],
            pass_fds=[requests.fileno()],
            stdin=subprocess.DEVNULL,
            # What code of one's own prints is not what a program reads.
            stdout=2,
        )


class _Forked:
    """A nursery that was forked from this process."""

    def __init__(self, ours: socket.socket, theirs: socket.socket) -> None:
        # What they need is imported before, so that all share it.
        from sim.commands.warm import nursery

        sys.stdout.flush()
        sys.stderr.flush()
        self._ended = False
        self._pid = os.fork()
        if self._pid:
            return
        try:
            begin_anew()
            ours.close()
            nothing = os.open(os.devnull, os.O_RDONLY)
            os.dup2(nothing, 0)
            os.dup2(2, 1)
            nursery(theirs.detach())
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(0)

    def wait(self, timeout: float | None = None) -> None:
        """Wait until it has ended; `subprocess.Popen.wait` says how."""
        until = None if timeout is None else time.monotonic() + timeout
        while not self._ended:
            self._ended = bool(os.waitpid(self._pid, 0 if until is None else os.WNOHANG)[0])
            if not self._ended and until is not None:
                if time.monotonic() > until:
                    raise subprocess.TimeoutExpired("nursery", GOODBYE_S)
                time.sleep(0.005)

    def kill(self) -> None:
        """End it at once."""
        if not self._ended:
            os.kill(self._pid, signal.SIGKILL)


@contextmanager
def forked_nursery() -> Iterator[Nursery | None]:
    """Fork a nursery from this process for the block; None where that is not safe.

    It is in a command that has just begun. Where there are other threads, such as in a notebook or
    under a test runner, one of them may hold a lock that nobody releases in the fork.
    """
    if threading.active_count() > 1 or torch.cuda.is_initialized():
        yield None
        return
    nursery = Nursery(forked=True)
    try:
        yield nursery
    finally:
        nursery.close()


@dataclass(slots=True)
class _Job:
    """A run, and what became of it so far."""

    run: PlannedRun
    observers: Sequence[Observer] | None = None
    losses: int = 0
    lost: str = ""
    waits: bool = False


@dataclass(eq=False, slots=True)
class _Process:
    """One of the processes, and the run that it makes."""

    connection: Connection
    job: _Job | None = None
    pid: int | None = None

    def send(self, order: Row) -> None:
        # Whether it has ended shows when it is read from.
        with suppress(OSError):
            self.connection.send_bytes(json.dumps(order).encode())


@dataclass(slots=True)
class Pack(AbstractContextManager["Pack"]):
    """Hands runs to processes and passes on what they tell.

    Left in any way but at the end, it lets every process save its run and end. A second signal
    while that takes its time ends them at once.

    Attributes:
        waiting: runs that nobody makes yet.
        observer_of: see `sim.commands.study.compare`.
        accept_code: see `sim.commands.study.compare`.
        tell: is told what is worth a line.
        nursery: whose processes make the runs; None: one that lives as long as this.
    """

    waiting: deque[PlannedRun]
    observer_of: ObserverOf
    accept_code: bool
    tell: Callable[[str], None]
    nursery: InitVar[Nursery | None] = None
    _again: deque[_Job] = field(default_factory=deque)
    _elsewhere: deque[_Job] = field(default_factory=deque)
    _processes: list[_Process] = field(default_factory=list)
    _nursery: Nursery | None = None
    _borrowed: bool = False

    def __post_init__(self, nursery: Nursery | None) -> None:
        self._nursery, self._borrowed = nursery, nursery is not None

    @property
    def begun(self) -> bool:
        """Whether processes are there."""
        return self._nursery is not None

    def open(self, count: int) -> None:
        """Start processes until there are so many, or one for each run that waits."""
        while len(self._processes) < count and (job := self.next()) is not None:
            process = _Process(self._fork())
            self._processes.append(process)
            self._give(process, job)

    def finish(self) -> None:
        """Wait until all runs are made."""
        while any(process.job is not None for process in self._processes):
            self.turn(None)

    def turn(self, timeout_s: float | None = 0.0) -> None:
        """Pass on what the processes have told, and hand out runs to those that are free.

        Args:
            timeout_s: how long to wait for the first word; None: for ever.

        Raises:
            AuthorError, SettingsError, and the other errors of a run.
            EngineLostError: a run takes every process with it that makes it.
        """
        there = {process.connection: process for process in self._processes}
        for connection in wait(list(there), timeout_s):
            process = there[connection]  # type: ignore[index]
            try:
                message = json.loads(process.connection.recv_bytes())
            except (EOFError, OSError):
                self._lost(process)
                continue
            self._heard(process, message)

    def _heard(self, process: _Process, message: Row) -> None:
        if "pid" in message:
            process.pid = message["pid"]
            return
        job = process.job
        if job is None:
            raise RuntimeError(f"process {process.pid} tells of a run that it was not given")
        if "told" in message:
            self._pass_on(job, message["told"], message["values"])
            return
        process.job = None
        match message["ended"]:
            case "failed":
                raise _error_of(message)
            case "stopped":
                raise Interruption(signal.SIGTERM)
            case "busy":
                self.put_off(job)
        following = self.next()
        if following is not None:
            self._give(process, following)

    def _pass_on(self, job: _Job, what: str, values: Sequence[object]) -> None:
        """Tell observers what happens in a run; they are made when it begins."""
        if what == "note":
            self.tell(str(values[0]))
            return
        settings = job.run.settings
        if what == "begun":
            if job.observers is None:
                job.observers = self.observer_of(job.run.arm, settings.seed)
            return
        observers = job.observers or ()
        if what == "started":
            if observers:
                data = data_of(settings)
                for observer in observers:
                    observer.started(settings, data)
            return
        for observer in observers:
            getattr(observer, what)(*values)

    def next(self) -> _Job | None:
        """Take the run to be made next: those that others are making come last."""
        if self._again:
            return self._again.popleft()
        if self.waiting:
            return _Job(self.waiting.popleft())
        if self._elsewhere:
            job = self._elsewhere.popleft()
            job.waits = True
            return job
        return None

    def put_off(self, job: _Job) -> None:
        """Come back to a run that another command is making, when nothing else is left."""
        self._elsewhere.append(job)

    def _give(self, process: _Process, job: _Job) -> None:
        process.job = job
        settings = job.run.settings
        process.send(
            {
                "arm": job.run.arm,
                "settings": settings.to_table(),
                "folder": str(job.run.folder),
                "accept_code": self.accept_code,
                "code": folders_of_code(settings),
                "waits": job.waits,
                "lost": job.lost,
            }
        )

    def _fork(self) -> Connection:
        if self._nursery is not None:
            try:
                return self._nursery.process()
            except OSError:
                self._nursery.close()
        self._nursery, self._borrowed = Nursery(), False
        return self._nursery.process()

    def _lost(self, process: _Process) -> None:
        """Put another process in the place of one that ended; its run is gone on with."""
        self._processes.remove(process)
        process.connection.close()
        job = process.job
        if job is None:
            return
        job.losses += 1
        who = "the process" if process.pid is None else f"process {process.pid}"
        job.lost = f"{who} that made this run has ended; was there too little memory?"
        if job.losses >= MOST_LOSSES:
            raise EngineLostError(
                f"{job.run.label}: {job.losses} processes have ended while they made this run; was "
                "there too little memory? study.parallel=1 makes one run at a time"
            )
        self._again.appendleft(job)
        self.open(len(self._processes) + 1)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop all processes; runs that they are making are saved first."""
        left = self._processes
        try:
            for process in left:
                process.send(STOP)
            for process in left:
                # What they still tell is of rounds that are made again, or on the disk.
                with suppress(EOFError, OSError):
                    while True:
                        process.connection.recv_bytes()
        except BaseException:
            for process in left:
                if process.pid is not None:
                    with suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGKILL)
            raise
        finally:
            for process in left:
                process.connection.close()
            left.clear()
            if self._nursery is not None and not self._borrowed:
                self._nursery.close()


def _error_of(message: Row) -> Exception:
    """Return the error that a run ended with in another process."""
    kind = NAMED.get(message["kind"])
    if kind is None:
        return RuntimeError(f"in a process of the study:\n{message['trace']}")
    # By its text alone: some are made of more than that.
    error = kind.__new__(kind)
    error.args = (message["text"],)
    for note in message["notes"]:
        error.add_note(note)
    return error


# -- all of it ---------------------------------------------------------------------------------


class _Pays(Observer):
    """Starts processes once a run that this process makes shows that they would save time."""

    def __init__(self, pack: Pack, processes: int) -> None:
        self._pack = pack
        self._processes = processes
        self._begun = time.perf_counter()
        self._rounds = 0

    def started(self, settings: Settings, data: FederatedData) -> None:
        """The first round is about to start."""
        self._begun = time.perf_counter()

    def completed(self, round: int) -> None:
        """Look how long the rounds took, and what there is to be told."""
        self._rounds += 1
        per_round = (time.perf_counter() - self._begun) / self._rounds
        rounds = sum(run.settings.rounds for run in self._pack.waiting)
        if not self._pack.begun and saved_s(per_round * rounds, self._processes) > 0:
            # This process is one of them until its run is over.
            self._pack.open(self._processes - 1)
        self._pack.turn()


def saved_s(seconds: float, processes: int) -> float:
    """Return the seconds that processes save of work that takes so long in one; may be negative.

    Args:
        seconds: of the work, in one process.
        processes: that share it, >= 1.
    """
    return seconds * (1 - 1 / processes) - START_S


@interruptible()
def run_packed(
    division: Division,
    observer_of: ObserverOf = nobody,
    *,
    accept_code: bool = False,
    tell: Callable[[str], None] = lambda _: None,
    nursery: Nursery | None = None,
) -> None:
    """Make the packed runs of a study.

    Args:
        division: says which, and by how many processes.
        observer_of: see `sim.commands.study.compare`; observers are told in this process, of all
            but what travels (`Observer.travelled`).
        accept_code: see `sim.commands.study.compare`.
        tell: is told what is worth a line.
        nursery: whose processes make the runs; None: one for these runs alone.

    Raises:
        KeyboardInterrupt: a signal; every run was saved at its last complete round.
        Exception: as from `sim.commands.running.run`: the first that any of the runs ended with.
        EngineLostError: a run takes every process with it that makes it.
    """
    count = division.processes
    with Pack(deque(division.packed), observer_of, accept_code, tell, nursery) as pack:

        def observers(arm: str, seed: int) -> Sequence[Observer]:
            return [*observer_of(arm, seed), _Pays(pack, count)]

        # Processes that are there cost nothing, so nobody need see first whether they pay.
        waits = division.waits and nursery is None
        while waits and not pack.begun and (job := pack.next()) is not None:
            made = make_run(job.run, observers, accept_code=accept_code, waits=job.waits, tell=tell)
            if not made:
                pack.put_off(job)
        pack.open(count)
        pack.finish()
