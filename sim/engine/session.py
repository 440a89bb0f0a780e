"""A Ray session with its workers: the processes that serve clients.

A worker is a process with one computing thread and, if asked for, a share of a GPU. It holds
nothing that matters: clients' states come in with a call and go out with its results.
"""

import gc
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from subprocess import Popen
from typing import Any

import ray
import torch
from ray._private import ray_constants
from ray._private import worker as ray_worker
from ray.job_config import JobConfig

from fedkd.data import FederatedData
from fedkd.exchange.payload import Payload
from fedkd.training import ClientState
from fedkd_start import find_last
from sim.commands.interruption import call_off, keeping_handlers, signals_waiting
from sim.engine.grid import EngineLostError
from sim.engine.resources import available_cpus, check_engine
from sim.engine.runtime import ClientRuntime
from sim.engine.temporary import PrivateFolder
from sim.settings import EngineSettings, SettingsError, settings_from_table
from sim.wire.messages import ClientReply, CohortCall

NOTHING = -1
"""Stands where there is no payload or no state."""

LOOK_S = 0.5
"""How often we look whether Ray's own processes are there; Ray itself takes half a minute."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """Several calls that travel together, and where each client finds what it needs.

    Attributes:
        calls: to be carried out one after the other.
        received: for each call and client, the number of a piece in ``own``, or of a shared
            object, counted on from there; `NOTHING` where it receives nothing.
        states: for each call and client, (shared object, place in it); `NOTHING` twice for a
            client without a state.
        own: payloads that only this parcel needs.
    """

    calls: tuple[CohortCall, ...]
    received: tuple[tuple[int, ...], ...]
    states: tuple[tuple[tuple[int, int], ...], ...]
    own: tuple[Payload, ...]


@dataclass(frozen=True, slots=True)
class Answered:
    """A call of a parcel, done; see `sim.engine.runtime.Served`."""

    answers: list[ClientReply | str]
    seconds: float
    split: str = ""


class Worker:
    """The process that serves any client of the run it was last configured for."""

    def __init__(self, folder: str) -> None:
        """Get ready.

        Args:
            folder: where the driver was started; models of one's own may lie there.
        """
        find_last(folder)
        # Before anything is computed in this process.
        torch.set_num_threads(1)
        self._runtime: ClientRuntime | None = None

    def configure(
        self, settings: dict[str, Any], data: FederatedData, folders: Sequence[str] = ()
    ) -> None:
        """Take on a run.

        Args:
            settings: of the run.
            data: of the run.
            folders: where the driver found the code of one's own that the settings name.
        """
        for folder in folders:
            find_last(folder)
        self._runtime = ClientRuntime(settings_from_table(settings), data, _device())
        # What is here now stays: the collector need not look at it after every call.
        gc.collect()
        gc.freeze()

    def run(self, parcel: Parcel, *shared: Any) -> tuple[list[Answered], list[ClientState]]:
        """Carry out the calls of a parcel; the states of those that trained, in their order."""
        runtime = self._configured()
        answered = []
        new_states: list[ClientState] = []
        pieces = (*parcel.own, *shared)
        for call, received, states in zip(
            parcel.calls, parcel.received, parcel.states, strict=True
        ):
            served = runtime.serve(
                call,
                [None if piece == NOTHING else pieces[piece] for piece in received],
                [None if bundle == NOTHING else shared[bundle][place] for bundle, place in states],
            )
            answered.append(Answered(served.answers, served.seconds, served.split))
            new_states.extend(served.states[c] for c in call.clients if c in served.states)
        return answered, new_states

    def measure(self, clients: Sequence[int]) -> dict[str, Any]:
        """Time both backends on these clients."""
        return self._configured().measure(clients)

    def _configured(self) -> ClientRuntime:
        if self._runtime is None:
            raise RuntimeError("the worker was not configured")
        return self._runtime

    def device(self) -> str:
        """Return the device that this worker trains on."""
        return str(_device())

    def node(self) -> str:
        """Return the id of the machine that this worker is on."""
        return str(ray.get_runtime_context().get_node_id())

    def threads(self) -> int:
        """Return how many threads this worker computes with."""
        return torch.get_num_threads()


def _device() -> torch.device:
    return torch.device("cuda" if ray.get_gpu_ids() else "cpu")


class RaySession:
    """Ray with its workers; a study keeps one session for all of its runs.

    Ray is started on this machine, for the loopback only, or joined where ``engine.address``
    names a cluster; a Ray that this process has started already is used as it is.

    Attributes:
        note: what is to be told about where it keeps its files; empty if nothing is.
    """

    def __init__(self, engine: EngineSettings) -> None:
        check_engine(engine)
        self._engine = engine
        self._owns_ray = not ray.is_initialized()
        self._cluster_allowed = ray_constants.ENABLE_RAY_CLUSTER
        self._workers: list[Any] = []
        self._folder: PrivateFolder | None = None
        self._watch: _Watch | None = None
        self.note = ""
        if not self._owns_ray:
            return
        try:
            if engine.address is None:
                self._folder = PrivateFolder()
                self.note = self._folder.note
                _start_ray(self._folder)
                self._watch = _Watch(_ray_processes())
            else:
                _join_ray(engine.address)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RaySession":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def worker_limit(self) -> int:
        """Return how many workers there is room for."""
        engine = self._engine
        if engine.address is None:
            cpus, gpus = float(available_cpus()), float(torch.cuda.device_count())
        else:
            there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
            cpus, gpus = there.get("CPU", 0.0), there.get("GPU", 0.0)
        limit = math.floor(cpus / engine.cpus_per_worker)
        if engine.gpus_per_worker:
            limit = min(limit, math.floor(gpus / engine.gpus_per_worker))
        return max(1, limit)

    def workers(self, count: int) -> list[Any]:
        """Return ``count`` workers, or as many as fit; started on first use and kept."""
        while len(self._workers) < min(count, self.worker_limit()):
            self._workers.append(self._start_worker())
        return self._workers[:count]

    def replace(self, worker: Any) -> Any | None:
        """Kill a worker that hangs or died and start another in its place.

        Returns:
            The new worker, which may still be starting; None where a lost machine has left no
            room for it.
        """
        if len(self._workers) > self.worker_limit():
            self.drop(worker)
            return None
        ray.kill(worker)
        place = self._workers.index(worker)
        self._workers[place] = self._start_worker()
        return self._workers[place]

    @property
    def joined(self) -> bool:
        """Whether this is a cluster that others started, whose machines may come and go."""
        return self._engine.address is not None

    def drop(self, worker: Any) -> None:
        """Do without a worker for which there is no room any more."""
        ray.kill(worker)
        self._workers.remove(worker)

    def _start_worker(self) -> Any:
        return (
            ray.remote(Worker)
            .options(num_cpus=self._engine.cpus_per_worker, num_gpus=self._engine.gpus_per_worker)
            .remote(os.getcwd())
        )

    def check(self) -> None:
        """See whether Ray is still there.

        Raises:
            EngineLostError: with what ended.
        """
        if self._watch is not None and self._watch.lost is not None:
            raise self._watch.lost

    def close(self) -> None:
        """Stop the workers, and leave Ray, which stops it where this session started it."""
        there = self._watch is None or self._watch.lost is None
        if self._watch is not None:
            self._watch.stop()
        if there:
            for worker in self._workers:
                ray.kill(worker)
        self._workers.clear()
        if self._owns_ray:
            with keeping_handlers():
                ray.shutdown()
            ray_constants.ENABLE_RAY_CLUSTER = self._cluster_allowed
        if self._folder is not None:
            self._folder.remove()
            self._folder = None


def _plain_job() -> JobConfig:
    """Return what keeps Ray from putting the current folder first on its workers' path.

    A folder `datasets` there would hide the library on every worker. Ray has no switch but this
    one, which it has for jobs that come from a client elsewhere; it says nothing else about a job.
    """
    return JobConfig(_client_job=True)


class _Watch:
    """Calls the run off when one of Ray's own processes ends: Ray would end this one, in silence.

    Attributes:
        lost: the error that the run ends with, once one of them has ended.
    """

    def __init__(self, processes: Mapping[str, "Popen[bytes]"]) -> None:
        self.lost: EngineLostError | None = None
        self._processes = processes
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, name="ray-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stopped.wait(LOOK_S):
            for name, process in self._processes.items():
                status = process.poll()
                if status is not None:
                    how = _signal_name(-status) if status < 0 else f"with status {status}"
                    self.lost = EngineLostError(
                        f"Ray's {name} (process {process.pid}) ended {how}, and every worker with "
                        "it; was there too little memory?"
                    )
                    call_off(self.lost)
                    return


def _signal_name(number: int) -> str:
    try:
        return f"by {signal.Signals(number).name}"
    except ValueError:
        return f"by signal {number}"


def _ray_processes() -> "dict[str, Popen[bytes]]":
    """Return the processes without which a Ray of our own cannot go on."""
    node = ray_worker._global_node
    table: Mapping[str, Any] = {} if node is None else node.all_processes
    return {
        name: started[0].process
        for name, started in table.items()
        if name in (ray_constants.PROCESS_TYPE_RAYLET, ray_constants.PROCESS_TYPE_GCS_SERVER)
    }


@contextmanager
def _ray_starts() -> Iterator[None]:
    """Keep our handlers of signals while Ray starts.

    Ray installs its own, in Python and in C, where any of its threads may take a signal and end
    the process with a dump. So signals wait until it has started, which takes seconds.
    """
    # Else the last twenty lines of its log appear where a process of Ray's ends.
    ray_worker._worker_logs_enabled = False
    with signals_waiting(), keeping_handlers():
        yield


def _start_ray(folder: PrivateFolder) -> None:
    with _ray_starts():
        try:
            ray.init(
                # Without it Ray would join whatever cluster happens to run here.
                address="local",
                num_cpus=available_cpus(),
                num_gpus=torch.cuda.device_count(),
                include_dashboard=False,
                job_config=_plain_job(),
                log_to_driver=False,
                configure_logging=False,
                logging_level=logging.ERROR,
                object_spilling_directory=folder.spill and str(folder.spill),
                _temp_dir=str(folder.folder),
            )
        except Exception as error:
            raise SettingsError(
                f"engine.backend: Ray cannot start here ({_first_line(error)}); "
                "engine.backend=inline runs in this process"
            ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _join_ray(address: str) -> None:
    if address != "auto":
        _knock(address)
    if address.split(":")[0] not in ("127.0.0.1", "localhost"):
        # What keeps a Ray of our own on the loopback would keep us from a cluster's machines.
        ray_constants.ENABLE_RAY_CLUSTER = True
    try:
        with _ray_starts():
            ray.init(
                address=address,
                job_config=_plain_job(),
                log_to_driver=False,
                configure_logging=False,
                logging_level=logging.ERROR,
            )
    except ConnectionError as error:
        raise _nobody_at(address, str(error).splitlines()[0]) from None


def _knock(address: str) -> None:
    """See whether anybody listens: Ray itself would go on trying for minutes."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        raise SettingsError(f"engine.address must be auto or HOST:PORT, got {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise _nobody_at(address, error.strerror or str(error)) from None


def _nobody_at(address: str, why: str) -> SettingsError:
    return SettingsError(
        f"engine.address: no Ray cluster answers at {address!r} ({why}); start one with "
        "'ray start --head', or leave the setting out to use this machine"
    )
