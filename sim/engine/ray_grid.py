"""`RayGrid`: calls are carried out by long-lived Ray workers.

A client's state is a value that a training call returns into Ray's object store, that this process
owns, and that the next call passes back in.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayError

from fedkd.data import FederatedData
from fedkd.training import ClientState
from sim.engine.bundles import Bundle, StatePlace
from sim.engine.costs import Costs
from sim.engine.desks import STARTING_S, Desks
from sim.engine.dispatch import Dispatcher, first_line
from sim.engine.grid import CohortGrid, Outcome, PackedCall, StatesLostError
from sim.engine.session import RaySession
from sim.settings import Settings

OPEN_BUNDLES = 32
"""Bundles of states that stay open while states are read one after the other."""


class RayGrid(CohortGrid[StatePlace]):
    """Sends parcels of calls to workers.

    Payloads are put into the object store once and shared by all calls of the phase; the data
    of the run is put once.
    """

    def __init__(self, session: RaySession, settings: Settings, data: FederatedData) -> None:
        super().__init__(settings, data)
        self._session = session
        session.check()
        if session.note:
            self._events.append({"round": 0, "event": "temporary folder", "reason": session.note})
        self._costs = Costs(settings, data)
        self._read: OrderedDict[int, tuple[Bundle, list[ClientState]]] = OrderedDict()
        self._desks = Desks(session, settings, data)

    # -- phases ----------------------------------------------------------------------------

    def _execute(self, calls: Sequence[PackedCall]) -> Iterator[tuple[int, Outcome]]:
        dispatcher = Dispatcher(
            self._desks,
            calls,
            engine=self._settings.engine,
            costs=self._costs,
            faults=self._faults,
            books=self,
        )
        try:
            yield from dispatcher.outcomes()
        finally:
            # Whoever asked may have had enough; what is under way must not come back later.
            dispatcher.abandon()

    def keep(self, client: int, place: StatePlace) -> None:
        """Take a state that training returned."""
        self._pending[client] = place

    # -- states ----------------------------------------------------------------------------

    def _fetch(self, handle: StatePlace) -> ClientState:
        key = id(handle.bundle)
        self._session.check()
        try:
            # Neighbours are mostly in one bundle, which is read once.
            if key not in self._read:
                self._read[key] = handle.bundle, ray.get(handle.bundle.reference)
                if len(self._read) > OPEN_BUNDLES:
                    self._read.popitem(last=False)
            return self._read[key][1][handle.place]
        except ObjectLostError as error:
            raise StatesLostError(f"clients' states were lost: {first_line(error)}") from None

    def _store(self, states: Sequence[ClientState]) -> list[StatePlace]:
        bundle = Bundle(ray.put(list(states)), len(states))
        return [StatePlace(bundle, place) for place in range(len(states))]

    def commit(self) -> None:
        """The round is over; bundles of which little is still needed are packed anew."""
        thinned: dict[int, Bundle] = {}
        for client in self._pending:
            old = self._committed.get(client)
            if old is not None:
                old.bundle.live -= 1
                thinned[id(old.bundle)] = old.bundle
        super().commit()
        self._read.clear()
        sparse = {key for key, bundle in thinned.items() if 0 < bundle.live <= bundle.size // 2}
        if sparse:
            # It saves memory and nothing depends on it.
            with suppress(RayError, StatesLostError):
                self._repack(sparse)

    def _repack(self, sparse: set[int]) -> None:
        clients = [
            client for client, handle in self._committed.items() if id(handle.bundle) in sparse
        ]
        fresh = self._store([self._fetch(self._committed[client]) for client in clients])
        self._committed.update(zip(clients, fresh, strict=True))
        self._read.clear()

    def _measure(self, clients: Sequence[int]) -> Mapping[str, Any]:
        desk = next(iter(self._desks))
        try:
            ray.get(desk.configured, timeout=STARTING_S)
            limit = self._settings.engine.deadline_s
            times: Mapping[str, Any] = ray.get(desk.worker.measure.remote(clients), timeout=limit)
        except RayError as error:
            self._desks.renew(desk)
            return {"choice": "loop", "reason": f"could not be measured: {first_line(error)}"}
        return times

    def close(self) -> None:
        """Forget the clients' states; the session keeps the workers."""
        self._read.clear()
        self._pending.clear()
        self._committed.clear()
