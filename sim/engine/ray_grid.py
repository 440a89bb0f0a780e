"""`RayGrid`: calls are carried out by long-lived Ray workers.

A worker is a process with one computing thread and, if asked for, a share of a GPU. It holds
nothing that matters: a client's state is a value that a training call returns into Ray's object
store, that this process owns, and that the next call passes back in.
"""

import logging
import math
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from fedkd.data import FederatedData
from fedkd.training import ClientState
from sim.engine.grid import CohortGrid, Outcome, PackedCall
from sim.engine.runtime import ClientReply, ClientRuntime, CohortCall, stack_received
from sim.settings import EngineSettings, Settings, SettingsError, settings_from_table
from strategies.knowledge import Knowledge

Ref = Any
"""A Ray object reference; Ray's own class is generic in what it refers to, which varies here."""


class Worker:
    """The process that serves any client of the run it was last configured for."""

    def __init__(self) -> None:
        # Before anything is computed in this process.
        torch.set_num_threads(1)
        self._runtime: ClientRuntime | None = None

    def configure(self, settings: dict[str, Any], data: FederatedData) -> None:
        """Take on a run."""
        device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        self._runtime = ClientRuntime(settings_from_table(settings), data, device)

    def run(
        self, call: CohortCall, received: Knowledge | None, *states: ClientState | None
    ) -> tuple[list[ClientReply], *tuple[ClientState, ...]] | list[ClientReply]:
        """Carry out a call; a training call returns replies and states as separate objects."""
        if self._runtime is None:
            raise RuntimeError("the worker was not configured")
        replies, new_states = self._runtime.run(call, received, states)
        return (replies, *new_states) if new_states else replies

    def device(self) -> str:
        """Return the device that this worker trains on."""
        return str(torch.device("cuda" if ray.get_gpu_ids() else "cpu"))

    def threads(self) -> int:
        """Return how many threads this worker computes with."""
        return torch.get_num_threads()


def available_cpus() -> int:
    """Return the CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_engine(engine: EngineSettings) -> None:
    """Refuse, before Ray starts, resources that this machine does not have.

    Raises:
        SettingsError: names the setting and what there is.
    """
    cpus = available_cpus()
    if engine.backend == "ray" and engine.cpus_per_worker > cpus:
        raise SettingsError(
            f"engine.cpus_per_worker must be at most the {cpus} CPUs of this machine, "
            f"got {engine.cpus_per_worker:g}"
        )
    gpus = torch.cuda.device_count()
    if engine.gpus_per_worker > gpus:
        raise SettingsError(
            f"engine.gpus_per_worker must be at most the {gpus} GPUs that PyTorch sees here, "
            f"got {engine.gpus_per_worker:g}"
        )
    if engine.gpus_per_worker and engine.backend == "inline":
        raise SettingsError(
            f"engine.gpus_per_worker needs engine.backend: ray, got {engine.gpus_per_worker:g} "
            "with inline"
        )


class RaySession:
    """A local Ray with its workers; a study keeps one session for all of its runs."""

    def __init__(self, engine: EngineSettings) -> None:
        check_engine(engine)
        self._engine = engine
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            ray.init(
                num_cpus=available_cpus(),
                num_gpus=torch.cuda.device_count(),
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                logging_level=logging.ERROR,
            )
        self._workers: list[Any] = []

    def __enter__(self) -> "RaySession":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def worker_limit(self) -> int:
        """Return how many workers fit on the machine."""
        engine = self._engine
        limit = math.floor(available_cpus() / engine.cpus_per_worker)
        if engine.gpus_per_worker:
            limit = min(limit, math.floor(torch.cuda.device_count() / engine.gpus_per_worker))
        return max(1, limit)

    def workers(self, count: int) -> list[Any]:
        """Return ``count`` workers, or as many as fit; started on first use and kept."""
        while len(self._workers) < min(count, self.worker_limit()):
            self._workers.append(self._start_worker())
        return self._workers[:count]

    def replace(self, worker: Any) -> Any:
        """Kill a worker that hangs or died and start another in its place."""
        ray.kill(worker)
        fresh = self._start_worker()
        self._workers[self._workers.index(worker)] = fresh
        return fresh

    def _start_worker(self) -> Any:
        return (
            ray.remote(Worker)
            .options(num_cpus=self._engine.cpus_per_worker, num_gpus=self._engine.gpus_per_worker)
            .remote()
        )

    def close(self) -> None:
        """Stop the workers, and Ray if this session started it."""
        for worker in self._workers:
            ray.kill(worker)
        self._workers.clear()
        if self._owns_ray:
            ray.shutdown()


class RayGrid(CohortGrid):
    """Sends each cohort's call to the next free worker.

    Payloads are put into the object store once and shared by all calls of the phase; the data
    of the run is put once.
    """

    def __init__(self, session: RaySession, settings: Settings, data: FederatedData) -> None:
        super().__init__(settings)
        self._session = session
        self._states: dict[int, Ref] = {}
        cohorts = sum(
            math.ceil(self._architectures.count(key) / settings.engine.cohort_size)
            for key in set(self._architectures)
        )
        self._configuration = settings.to_table(), ray.put(data)
        self._workers = session.workers(cohorts)
        configured = [worker.configure.remote(*self._configuration) for worker in self._workers]
        for worker, reference in zip(tuple(self._workers), configured, strict=True):
            try:
                ray.get(reference)
            except RayActorError:
                # It died since the session's last run.
                self._renew(worker)

    def _execute(self, calls: Sequence[PackedCall]) -> Iterator[tuple[int, Outcome]]:
        waiting = deque(range(len(calls)))
        idle = deque(self._workers)
        in_flight: dict[Ref, tuple[int, Any, list[Ref], float]] = {}
        payloads: dict[int, Ref] = {}
        retried: set[int] = set()
        finished: list[tuple[int, Outcome]] = []
        while waiting or in_flight:
            while waiting and idle:
                position, worker = waiting.popleft(), idle.popleft()
                replies, *states = self._submit(worker, calls[position], payloads)
                in_flight[replies] = position, worker, states, time.monotonic()
            # Only now that every worker is busy again: whoever takes the outcomes works on them
            # before asking for more, and that should not keep a worker waiting.
            yield from finished
            finished.clear()
            oldest = min(started for *_, started in in_flight.values())
            left = oldest + self._settings.engine.deadline_s - time.monotonic()
            done, _ = ray.wait(list(in_flight), timeout=max(left, 0.0))
            for reference in done or self._overdue(in_flight):
                position, worker, states, _ = in_flight.pop(reference)
                outcome, alive = self._outcome(reference, timed_out=not done)
                idle.append(worker if alive else self._renew(worker))
                if not alive and done and position not in retried:
                    # The worker died, perhaps by no fault of this call: it may try once more.
                    retried.add(position)
                    waiting.append(position)
                    continue
                if outcome.failure is None:
                    self._states.update(zip(calls[position].call.clients, states, strict=False))
                finished.append((position, outcome))
        yield from finished

    def _submit(self, worker: Any, packed: PackedCall, payloads: dict[int, Ref]) -> list[Ref]:
        call = packed.call
        if all(piece is packed.received[0] for piece in packed.received):
            shared = packed.received[0]
            if id(shared) not in payloads:
                payloads[id(shared)] = ray.put(shared)
            payload = payloads[id(shared)]
        else:
            payload = ray.put(stack_received(packed.received))
        states: list[Any] = []
        if call.phase != "query":
            states = [self._states.get(client) for client in call.clients]
        returned = 1 + (len(call.clients) if call.phase == "train" else 0)
        reference = worker.run.options(num_returns=returned).remote(call, payload, *states)
        return [reference] if returned == 1 else list(reference)

    def _overdue(self, in_flight: dict[Ref, Any]) -> list[Ref]:
        deadline = time.monotonic() - self._settings.engine.deadline_s
        return [reference for reference, (*_, started) in in_flight.items() if started <= deadline]

    def _outcome(self, reference: Ref, *, timed_out: bool) -> tuple[Outcome, bool]:
        """Return what became of a call, and whether its worker can go on."""
        try:
            return Outcome(ray.get(reference, timeout=0.0 if timed_out else None)), True
        except GetTimeoutError:
            deadline = self._settings.engine.deadline_s
            return Outcome(failure=f"no answer within engine.deadline_s = {deadline:g}"), False
        except RayTaskError as error:
            return Outcome(failure=str(error)), True
        except (RayActorError, RayError) as error:
            return Outcome(failure=f"the worker died: {error}"), False

    def _renew(self, worker: Any) -> Any:
        fresh = self._session.replace(worker)
        self._workers[self._workers.index(worker)] = fresh
        ray.get(fresh.configure.remote(*self._configuration))
        return fresh

    def client_states(self, clients: Iterable[int]) -> Iterator[ClientState | None]:
        """Yield each client's state, fetched one at a time."""
        for client in clients:
            reference = self._states.get(client)
            yield None if reference is None else cast(ClientState, ray.get(reference))

    def close(self) -> None:
        """Forget the clients' states; the session keeps the workers."""
        self._states.clear()
