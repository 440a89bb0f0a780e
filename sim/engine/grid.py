"""A Flower `Grid` that packs messages into calls for whole cohorts.

Flower's own grid carries one message per client and polls for replies. Here the messages of a
phase are grouped by architecture, cut into cohorts, and each cohort is one call; replies come
back as Flower messages, in client order, as soon as that order allows.
"""

import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast, get_args

from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from pydantic import BaseModel, ConfigDict

from fedkd.data import FederatedData
from fedkd.exchange.budget import NO_BUDGET, Levels
from fedkd.exchange.payload import Payload
from fedkd.exchange.payloads import Orders
from fedkd.training import ClientState
from fedkd.training.backends import Backend
from sim.adversity.faults import FaultPlan
from sim.engine.cohorts import CohortCutter
from sim.engine.runtime import build_strategy, federation_of
from sim.settings import Settings
from sim.wire.flower import Run, empty_run, identify_process, reply_to, set_message_id
from sim.wire.messages import (
    MEMORY_LOST,
    MISTAKE,
    ClientReply,
    CohortCall,
    Instruction,
    MemoryLost,
    Mistake,
    Phase,
    read_instruction,
    reply_content,
)

FIRST_NODE_ID = 2
"""Node ids are partition ids from here on; 1 is the server's."""

Handle = TypeVar("Handle")
"""What a grid keeps of a client's state: the state itself, or where it is."""

Event = dict[str, Any]


class NotAsked(str):
    """Why a client was not asked at all: it received nothing."""

    __slots__ = ()


class EngineLostError(RuntimeError):
    """What carries out calls is gone as a whole, with the clients' states; nothing to go on in."""


class StatesLostError(RuntimeError):
    """Clients' states are gone together with the machine that held them."""


@dataclass(frozen=True, slots=True)
class PackedCall:
    """A call for one cohort, with the payload that each of its members receives."""

    call: CohortCall
    received: tuple[Payload | None, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a packed call: for each client a reply, or the reason why there is none."""

    replies: Sequence[ClientReply | str]

    @classmethod
    def failed(cls, packed: PackedCall, reason: str) -> "Outcome":
        """Return the outcome of a call that nobody answered."""
        return cls([reason] * len(packed.call.clients))


class GridMemory(BaseModel):
    """What `CohortGrid.memory` returns, as a checkpoint keeps it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    excluded: dict[str, str]
    backends: dict[str, Backend]
    trained_by: dict[str, list[Backend]]


class CohortGrid(Grid, ABC, Generic[Handle]):
    """The part of a grid that does not depend on where calls are carried out.

    States that training returns are kept apart until `commit` says that their round is over;
    `rollback` forgets them, and the clients are again what they were at the last commit.
    """

    def __init__(self, settings: Settings, data: FederatedData, run_id: int = 1) -> None:
        self._settings = settings
        self._run = empty_run(run_id)
        strategy = build_strategy(settings, federation_of(settings, data))
        self._cutter = CohortCutter(settings, data, strategy)
        self._faults = FaultPlan(settings.faults, settings.seed)
        self._ids = itertools.count(1)
        self._pushed: dict[str, Message] = {}
        self._committed: dict[int, Handle] = {}
        self._pending: dict[int, Handle] = {}
        self._excluded: dict[int, str] = {}
        self._events: list[Event] = []
        identify_process(run_id)

    # -- where calls are carried out -------------------------------------------------------

    @abstractmethod
    def _execute(self, calls: Sequence[PackedCall]) -> Iterator[tuple[int, Outcome]]:
        """Carry out the calls and yield (position, outcome) as each is done.

        Puts handles of the states that training calls return into ``_pending``.
        """

    @abstractmethod
    def _fetch(self, handle: Handle) -> ClientState:
        """Return the state behind a handle."""

    @abstractmethod
    def _store(self, states: Sequence[ClientState]) -> list[Handle]:
        """Take states that come from elsewhere; return a handle for each."""

    @abstractmethod
    def _measure(self, clients: Sequence[int]) -> Mapping[str, Any]:
        """Time both backends on the first of these clients; see `fedkd.training.backends`."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the grid holds."""

    # -- clients' states -------------------------------------------------------------------

    def commit(self) -> None:
        """The round is over: what was trained since the last commit is the clients' state now."""
        self._committed.update(self._pending)
        self._pending.clear()

    def rollback(self) -> None:
        """Forget what was trained since the last commit."""
        self._pending.clear()

    def trained_clients(self) -> list[int]:
        """Return the clients that have a state, sorted; the seed still decides the others."""
        return sorted(self._committed.keys() | self._pending.keys())

    def client_states(self, clients: Iterable[int]) -> Iterator[ClientState | None]:
        """Yield each client's latest state, None for a client that has not trained yet."""
        for client in clients:
            handle = self.state_of(client)
            yield None if handle is None else self._fetch(handle)

    def load_states(self, states: Iterable[tuple[int, ClientState]]) -> None:
        """Put these clients' states in the place of all that there were."""
        self._pending.clear()
        self._committed.clear()
        for some in _batches(states, self._settings.engine.cohort_size):
            handles = self._store([state for _, state in some])
            self._committed.update(zip((client for client, _ in some), handles, strict=True))

    def memory(self) -> dict[str, Any]:
        """Return, as plain values, what a resumed run has to know besides the states.

        See `GridMemory`.
        """
        return {
            "excluded": {str(client): reason for client, reason in self._excluded.items()},
            "backends": self._cutter.choices(),
            "trained_by": self._cutter.trained_by(),
        }

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Take back what `memory` returned."""
        self._excluded = {int(client): reason for client, reason in memory["excluded"].items()}
        self._cutter.recall(memory["backends"], memory["trained_by"])

    def backends(self) -> dict[str, list[Backend]]:
        """Return which backends have trained each model so far, by what the model is called."""
        return self._cutter.trained_by()

    def take_events(self) -> list[Event]:
        """Return, once, what happened to workers and clients: retries, exclusions, choices."""
        events, self._events = self._events, []
        return events

    def state_of(self, client: int) -> Handle | None:
        """Return what is kept of a client's latest state; None before its first training."""
        return self._pending.get(client) or self._committed.get(client)

    def exclude(self, call: CohortCall, reason: str) -> None:
        """Never ask these clients again."""
        for client in call.clients:
            self._excluded[client] = f"excluded since round {call.round}: {reason}"
        self.tell("excluded", call, reason)

    def tell(self, event: str, call: CohortCall, reason: str) -> None:
        """Write down what happened to the clients of a call."""
        self._events.extend(
            {"round": call.round, "client": client, "event": event, "reason": reason}
            for client in call.clients
        )

    def note(self, row: Mapping[str, Any]) -> None:
        """Write down an event."""
        self._events.append(dict(row))

    def tell_split(self, call: CohortCall, reason: str) -> None:
        """Write down that members of a stack had to train one by one."""
        if reason:
            self.tell("stack split", call, f"trained one by one because of {reason}")

    # -- Flower's Grid ---------------------------------------------------------------------

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._run = run
        identify_process(run.run_id)

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message to a client."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the node id of every registered client, by partition id."""
        return range(FIRST_NODE_ID, FIRST_NODE_ID + self._settings.clients.count)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages; `pull_messages` carries them out."""
        return [self._register(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Carry out pushed messages and return their replies, in client order."""
        wanted = [self._pushed.pop(key) for key in message_ids if key in self._pushed]
        return list(self.send_and_receive(wanted))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Send messages and yield the replies in client order.

        Args:
            messages: at most one for each client, all of one phase.
            timeout: not used; ``engine.deadline_s`` bounds every call.

        Raises:
            StatesLostError: states that are needed went with a lost machine.
        """
        by_client: dict[int, Message] = {}
        for message in sorted(messages, key=lambda message: message.metadata.dst_node_id):
            set_message_id(message, str(next(self._ids)))
            by_client[message.metadata.dst_node_id - FIRST_NODE_ID] = message
        ready: dict[int, ClientReply | str] = {}
        calls = self._pack(by_client, ready)
        order = deque(by_client)

        def in_order() -> Iterator[Message]:
            while order and order[0] in ready:
                client = order.popleft()
                yield reply_message(by_client[client], ready.pop(client))

        yield from in_order()
        for position, outcome in self._execute(calls):
            ready.update(zip(calls[position].call.clients, outcome.replies, strict=True))
            yield from in_order()

    def _register(self, message: Message) -> str:
        message_id = str(next(self._ids))
        set_message_id(message, message_id)
        self._pushed[message_id] = message
        return message_id

    def _pack(
        self, messages: Mapping[int, Message], ready: dict[int, ClientReply | str]
    ) -> list[PackedCall]:
        """Cut the clients into calls, in a way that does not depend on the workers.

        Who is not to be asked at all has the reason put into ``ready``.
        """
        # Clients that receive the same content have it decoded once and sent once.
        decoded: dict[int, Instruction] = {}
        received: dict[int, Payload | None] = {}
        orders: dict[int, Orders] = {}
        since: dict[int, int] = {}
        levels: dict[int, Levels] = {}
        for client, message in messages.items():
            content = message.content
            if id(content) not in decoded:
                decoded[id(content)] = read_instruction(content)
            told = decoded[id(content)]
            reason = self._reason_not_to_ask(client, _phase(message), told)
            if reason is None:
                received[client] = told.payload
                if told.orders is not None:
                    orders[client] = told.orders
                if told.since:
                    since[client] = told.since
                if told.levels != NO_BUDGET:
                    levels[client] = told.levels
            else:
                ready[client] = reason
        if not received:
            return []
        phase = _phase(message)
        if phase == "train":
            # Who is asked again starts from where the round began.
            for client in received:
                self._pending.pop(client, None)
            self._settle_backends(received, told.round)
        calls = []
        # Members of a cohort all receive something or nothing.
        for nothing in (True, False):
            clients = [client for client, piece in received.items() if (piece is None) is nothing]
            for cohort, backend in self._cutter.cut(clients, phase):
                call = CohortCall(
                    phase,
                    told.round,
                    cohort,
                    backend,
                    told.attempt,
                    orders=tuple(map(orders.get, cohort)) if orders else (),
                    since=tuple(since.get(client, 0) for client in cohort) if since else (),
                    levels=tuple(levels.get(client, NO_BUDGET) for client in cohort)
                    if levels
                    else (),
                )
                calls.append(PackedCall(call, tuple(received[client] for client in cohort)))
        return calls

    def _reason_not_to_ask(self, client: int, phase: Phase, told: Instruction) -> str | None:
        if client in self._excluded:
            return NotAsked(self._excluded[client])
        if self._faults and self._faults.drops_out(phase, told.round, client, told.attempt):
            return NotAsked("dropped out (faults)")
        return None

    def _settle_backends(self, clients: Iterable[int], round: int) -> None:
        """Choose by the stop-watch where the settings ask for it, once for each kind of cohort."""
        for cohort in self._cutter.unsettled(clients):
            times = self._measure(cohort)
            self._cutter.settle(cohort, times["choice"])
            self._events.append({"round": round, "event": "backend measured", **times})


def _batches(
    items: Iterable[tuple[int, ClientState]], size: int
) -> Iterator[list[tuple[int, ClientState]]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _phase(message: Message) -> Phase:
    phase = message.metadata.message_type
    if phase not in get_args(Phase):
        raise ValueError(f"unknown message type {phase!r}; known: {', '.join(get_args(Phase))}")
    return cast(Phase, phase)


def reply_message(message: Message, reply: ClientReply | str) -> Message:
    """Return the Flower message that answers another one."""
    if isinstance(reply, str):
        code: int = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        if isinstance(reply, NotAsked):
            code = ErrorCode.NODE_UNAVAILABLE
        elif isinstance(reply, Mistake):
            code = MISTAKE
        elif isinstance(reply, MemoryLost):
            code = MEMORY_LOST
        error = Error(code, str(reply))
        return Message(error, reply_to=message)
    return reply_to(message, reply_content(reply))
