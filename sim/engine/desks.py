"""The workers of a Ray grid, each at a desk with the parcels that it was sent."""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from fedkd.data import FederatedData
from sim.engine.session import RaySession
from sim.settings import Settings, SettingsError
from sim.settings.permission import folders_of_code

Ref = Any
"""A Ray object reference; Ray's own class is generic in what it refers to, which varies here."""

STARTING_S = 120.0
"""How long a new worker may take to start, imports included, on a busy machine."""


@dataclass(slots=True)
class Flight:
    """A parcel at a worker."""

    positions: tuple[int, ...]
    answers: Ref
    states: Ref | None
    limit_s: float


@dataclass(slots=True, eq=False)
class Desk:
    """A worker and the parcels it was sent, in order; it works on the first."""

    worker: Any
    configured: Ref
    ready: bool = False
    flights: deque[Flight] = field(default_factory=deque)
    since: float = 0.0
    stale: bool = False

    def next_sign(self) -> Ref:
        """Return what the worker gives next: a sign that it has started, or its first parcel."""
        return self.flights[0].answers if self.ready else self.configured

    def overdue_at(self) -> float:
        """Return the moment at which that should have come."""
        return self.since + (self.flights[0].limit_s if self.ready else STARTING_S)


class Desks:
    """All desks of a run.

    Args:
        session: has the workers.
        settings: of the run.
        data: of the run; put into the object store once.

    Raises:
        SettingsError: no worker could start.
    """

    def __init__(self, session: RaySession, settings: Settings, data: FederatedData) -> None:
        self._session = session
        self._configuration: tuple[Mapping[str, Any], Ref, Sequence[str]] = (
            settings.to_table(),
            ray.put(data),
            folders_of_code(settings),
        )
        self._desks = [
            Desk(worker, worker.configure.remote(*self._configuration))
            for worker in session.workers(settings.clients.count)
        ]
        for desk in tuple(self._desks):
            try:
                ray.get(desk.configured, timeout=STARTING_S)
            except RayTaskError as error:
                if isinstance(error.cause, SettingsError):
                    # Such as a package of one's own that is not installed on its machine.
                    raise SettingsError(f"on a worker: {error.cause}") from None
                raise
            except RayActorError:
                # It died since the session's last run.
                self.renew(desk)
            except GetTimeoutError:
                # Somebody else has the place that it waits for.
                self.drop(desk)
            else:
                desk.ready = True
        if not self._desks:
            raise SettingsError(
                f"engine.cpus_per_worker = {settings.engine.cpus_per_worker:g}: no worker could "
                f"start within {STARTING_S:g} s; is the cluster busy with other programs?"
            )

    def __iter__(self) -> Iterator[Desk]:
        return iter(tuple(self._desks))

    def __len__(self) -> int:
        return len(self._desks)

    @property
    def surplus(self) -> int:
        """How many desks there are for which the cluster has no room; none where <= 0."""
        return len(self._desks) - self._session.worker_limit()

    def renew(self, desk: Desk) -> None:
        """Replace a dead or hung worker; the new one starts while the others go on."""
        self._session.check()
        desk.flights.clear()
        fresh = self._session.replace(desk.worker)
        if fresh is None:
            self._desks.remove(desk)
            return
        desk.worker = fresh
        desk.stale = desk.ready = False
        desk.since = time.monotonic()
        desk.configured = fresh.configure.remote(*self._configuration)

    def unplaced(self) -> list[Desk]:
        """Return the desks whose worker has not started yet, where that can take for ever."""
        if not self._session.joined:
            return []
        return [desk for desk in self._desks if not desk.ready]

    def drop(self, desk: Desk) -> None:
        """Do without a worker."""
        self._session.drop(desk.worker)
        self._desks.remove(desk)
