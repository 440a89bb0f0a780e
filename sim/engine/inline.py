"""The inline grid: clients run in this process, one cohort after the other. For debugging."""

import traceback
from collections.abc import Iterable, Iterator, Sequence

from fedkd.data import FederatedData
from fedkd.training import ClientState
from sim.engine.grid import CohortGrid, Outcome, PackedCall
from sim.engine.runtime import ClientRuntime, stack_received
from sim.settings import Settings


class InlineGrid(CohortGrid):
    """Carries out calls where it stands; a debugger sees everything."""

    def __init__(self, settings: Settings, data: FederatedData) -> None:
        super().__init__(settings)
        self._runtime = ClientRuntime(settings, data)
        self._states: dict[int, ClientState] = {}

    def _execute(self, calls: Sequence[PackedCall]) -> Iterator[tuple[int, Outcome]]:
        for position, packed in enumerate(calls):
            clients = packed.call.clients
            try:
                replies, states = self._runtime.run(
                    packed.call,
                    stack_received(packed.received),
                    [self._states.get(client) for client in clients],
                )
            except Exception:
                yield position, Outcome(failure=traceback.format_exc())
                continue
            self._states.update(zip(clients, states, strict=False))
            yield position, Outcome(replies)

    def client_states(self, clients: Iterable[int]) -> Iterator[ClientState | None]:
        """Yield each client's state."""
        for client in clients:
            yield self._states.get(client)

    def close(self) -> None:
        """Nothing to give back."""
