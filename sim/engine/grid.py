"""A Flower `Grid` that packs messages into calls for whole cohorts.

Flower's own grid carries one message per client and polls for replies. Here the messages of a
phase are grouped by architecture, cut into cohorts, and each cohort is one call; replies come
back as Flower messages, in client order, as soon as that order allows.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast, get_args

from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedkd.training import ClientState
from sim.engine.flower import Run, empty_run, identify_process, set_message_id
from sim.engine.runtime import ClientReply, CohortCall, Phase
from sim.settings import Settings
from strategies.knowledge import (
    Knowledge,
    from_array_record,
    read_knowledge,
    to_array_record,
    write_knowledge,
)

FIRST_NODE_ID = 2
"""Node ids are partition ids from here on; 1 is the server's."""


@dataclass(frozen=True, slots=True)
class PackedCall:
    """A call for one cohort, with the knowledge that each of its members receives."""

    call: CohortCall
    received: tuple[Knowledge | None, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a packed call: a reply per client, or the reason why there is none."""

    replies: Sequence[ClientReply] = ()
    failure: str | None = None


class CohortGrid(Grid, ABC):
    """The part of a grid that does not depend on where calls are carried out."""

    def __init__(self, settings: Settings, run_id: int = 1) -> None:
        self._settings = settings
        self._run = empty_run(run_id)
        self._architectures = [
            settings.model_of(client).key for client in range(settings.clients.count)
        ]
        self._ids = itertools.count(1)
        self._pushed: dict[str, Message] = {}
        identify_process(run_id)

    # -- where calls are carried out -------------------------------------------------------

    @abstractmethod
    def _execute(self, calls: Sequence[PackedCall]) -> Iterator[tuple[int, Outcome]]:
        """Carry out the calls and yield (position, outcome) as each is done.

        Keeps the states that training calls return, for `client_states` and later calls.
        """

    @abstractmethod
    def client_states(self, clients: Iterable[int]) -> Iterator[ClientState | None]:
        """Yield each client's state, None for a client that has not trained yet."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the grid holds."""

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
        return range(FIRST_NODE_ID, FIRST_NODE_ID + len(self._architectures))

    def partitions(self) -> dict[int, int]:
        """Return the node id of each partition; known here, so nobody has to be asked."""
        return dict(enumerate(self.get_node_ids()))

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
        """
        queue = sorted(messages, key=lambda message: message.metadata.dst_node_id)
        calls = self._pack(queue)
        by_client = {message.metadata.dst_node_id - FIRST_NODE_ID: message for message in queue}
        order = iter(sorted(by_client))
        ready: dict[int, ClientReply | str] = {}
        next_client = next(order, None)
        for position, outcome in self._execute(calls):
            clients = calls[position].call.clients
            if outcome.failure is not None:
                ready.update(dict.fromkeys(clients, outcome.failure))
            else:
                ready.update(zip(clients, outcome.replies, strict=True))
            while next_client is not None and next_client in ready:
                yield _reply_message(by_client[next_client], ready.pop(next_client))
                next_client = next(order, None)

    def _register(self, message: Message) -> str:
        message_id = str(next(self._ids))
        set_message_id(message, message_id)
        self._pushed[message_id] = message
        return message_id

    def _pack(self, queue: Sequence[Message]) -> list[PackedCall]:
        """Cut the sorted messages into calls, in a way that does not depend on the workers."""
        groups: dict[tuple[str, bool], list[Message]] = {}
        decoded: dict[int, Knowledge | None] = {}
        for message in queue:
            set_message_id(message, str(next(self._ids)))
            content = message.content
            # Clients that receive the same object receive it decoded once and sent once.
            if id(content) not in decoded:
                decoded[id(content)] = read_knowledge(content)
            client = message.metadata.dst_node_id - FIRST_NODE_ID
            key = self._architectures[client], decoded[id(content)] is None
            groups.setdefault(key, []).append(message)
        size = self._settings.engine.cohort_size
        return [
            PackedCall(
                call=CohortCall(
                    phase=_phase(cohort[0]),
                    round=instruction_round(cohort[0].content),
                    clients=tuple(m.metadata.dst_node_id - FIRST_NODE_ID for m in cohort),
                ),
                received=tuple(decoded[id(message.content)] for message in cohort),
            )
            for group in groups.values()
            for cohort in (group[i : i + size] for i in range(0, len(group), size))
        ]


def _phase(message: Message) -> Phase:
    phase = message.metadata.message_type
    if phase not in get_args(Phase):
        raise ValueError(f"unknown message type {phase!r}; known: {', '.join(get_args(Phase))}")
    return cast(Phase, phase)


# -- what messages carry ---------------------------------------------------------------------


def instruction(round: int, knowledge: Knowledge | None) -> RecordDict:
    """Return the content of a message to a client; clients that receive the same may share it."""
    content = RecordDict({"plan": ConfigRecord({"round": round})})
    write_knowledge(content, knowledge)
    return content


def instruction_round(content: RecordDict) -> int:
    """Return the round that an instruction belongs to."""
    return int(content.config_records["plan"]["round"])  # type: ignore[arg-type]


def reply_content(reply: ClientReply) -> RecordDict:
    """Return the content of a reply."""
    content = RecordDict({"metrics": MetricRecord(dict(reply.metrics))})
    write_knowledge(content, reply.knowledge)
    if reply.test_probabilities is not None:
        content["test"] = to_array_record({"probabilities": reply.test_probabilities})
    return content


def read_reply(content: RecordDict) -> ClientReply:
    """Return the reply in a message's content."""
    test = content.array_records.get("test")
    return ClientReply(
        knowledge=read_knowledge(content),
        metrics={name: float(value) for name, value in content.metric_records["metrics"].items()},  # type: ignore[arg-type]
        test_probabilities=None if test is None else from_array_record(test)["probabilities"],
    )


def _reply_message(message: Message, reply: ClientReply | str) -> Message:
    if isinstance(reply, str):
        error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reply)
        return Message(error, reply_to=message)
    return Message(reply_content(reply), reply_to=message)
