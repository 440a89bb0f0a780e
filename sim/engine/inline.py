"""The inline grid: clients run in this process, one cohort after the other. For debugging."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedkd.data import FederatedData
from fedkd.training import ClientState
from sim.engine.grid import CohortGrid, Outcome, PackedCall
from sim.engine.runtime import ClientRuntime
from sim.settings import Settings


class InlineGrid(CohortGrid[ClientState]):
    """Carries out calls where it stands; a debugger sees everything."""

    def __init__(self, settings: Settings, data: FederatedData) -> None:
        super().__init__(settings, data)
        self._runtime = ClientRuntime(settings, data)

    def _execute(self, calls: Sequence[PackedCall]) -> Iterator[tuple[int, Outcome]]:
        for position, packed in enumerate(calls):
            states = [self.state_of(client) for client in packed.call.clients]
            served = self._runtime.serve(packed.call, packed.received, states)
            self._pending.update(served.states)
            self.tell_split(packed.call, served.split)
            yield position, Outcome(served.answers)

    def _fetch(self, handle: ClientState) -> ClientState:
        return handle

    def _store(self, states: Sequence[ClientState]) -> list[ClientState]:
        return list(states)

    def _measure(self, clients: Sequence[int]) -> Mapping[str, Any]:
        return self._runtime.measure(clients)

    def close(self) -> None:
        """Nothing to give back."""
