"""What the server and a client say to each other, and how it travels in Flower messages."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fedkd.exchange.budget import NO_BUDGET, Levels
from fedkd.exchange.payload import Payload
from fedkd.exchange.payloads import Orders
from fedkd.training.backends import Backend
from sim.wire.flower import LazyRecords
from sim.wire.records import (
    from_array_record,
    read_payload,
    to_array_record,
    write_payload,
)

Phase = Literal["query", "train", "evaluate"]


@dataclass(frozen=True, slots=True)
class CohortCall:
    """What a worker is asked to do: one phase of one round for some clients.

    Attributes:
        phase: what to do.
        round: 1-based.
        clients: partition ids; all of one architecture.
        backend: how the clients train; more than one client only with ``vmap``.
        attempt: 1, and one more for every time that the same was asked before in this round.
        deaths: workers that died over this call before.
        orders: what the server decided for each client; empty where it decided nothing.
        since: the round that each client's codecs go on from; empty where they remember nothing.
        levels: that were chosen for each client; empty where there is no budget.
    """

    phase: Phase
    round: int
    clients: tuple[int, ...]
    backend: Backend = "loop"
    attempt: int = 1
    deaths: int = 0
    orders: tuple[Orders | None, ...] = ()
    since: tuple[int, ...] = ()
    levels: tuple[Levels, ...] = ()

    def of(self, positions: Sequence[int]) -> "CohortCall":
        """Return the call for some of its clients."""
        return replace(
            self,
            clients=tuple(self.clients[position] for position in positions),
            orders=tuple(self.orders[position] for position in positions) if self.orders else (),
            since=tuple(self.since[position] for position in positions) if self.since else (),
            levels=tuple(self.levels[position] for position in positions) if self.levels else (),
        )


class Told(NamedTuple):
    """What one client is told in a round, besides which it is."""

    payload: Payload | None = None
    orders: Orders | None = None
    since: int = 0
    levels: Levels = NO_BUDGET


MISTAKE = 1001
"""The code of Flower's errors for it; Flower's own are smaller."""


class Mistake(str):
    """Why a client has no answer: the code of an algorithm or of a model failed, as it says."""

    __slots__ = ()


MEMORY_LOST = 1002
"""The code of the errors of a client that no longer knows what it needs to decode what came."""


class MemoryLost(str):
    """Why a client has no answer: it lost what its codecs remembered."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class ClientReply:
    """One client's answer.

    Attributes:
        payload: what it uploads; None where the algorithm uploads nothing.
        metrics: plain numbers for the record; part of the simulation, not of the exchange.
        test_probabilities: float32 ``[test_rows, classes]`` where the ensemble is measured.
        round: the round that is answered; an answer to another round is refused.
    """

    payload: Payload | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    test_probabilities: np.ndarray | None = None
    round: int | None = None


@dataclass(frozen=True, slots=True)
class Instruction:
    """What a client is told.

    Attributes:
        round: 1-based.
        payload: what it receives; None where it receives nothing.
        attempt: how often the same was asked in this round, this time included.
        orders: what the server decided for it alone.
        since: the round that its codecs go on from; 0: from nothing.
        levels: that were chosen for it under a budget.
    """

    round: int
    payload: Payload | None = None
    attempt: int = 1
    orders: Orders | None = None
    since: int = 0
    levels: Levels = NO_BUDGET


_PAYLOAD, _ORDERS, _PLAN = "payload", "orders", "plan"


def instruction(round: int, told: Told, attempt: int = 1) -> RecordDict:
    """Return the content of a message to a client; clients that are told the same may share it."""
    instruction = Instruction(round, told.payload, attempt, told.orders, told.since, told.levels)
    return LazyRecords(instruction, partial(_write_instruction, instruction))


def _write_instruction(told: Instruction) -> RecordDict:
    content = RecordDict({_PLAN: _plan(told.round, told.attempt, told.since, told.levels)})
    write_payload(content, _PAYLOAD, told.payload)
    write_payload(content, _ORDERS, told.orders)
    return content


def _plan(round: int, attempt: int, since: int, levels: Levels) -> ConfigRecord:
    plan: dict[str, Any] = {"round": round, "attempt": attempt, "since": since}
    if levels.down is not None and levels.up is not None:
        plan["levels"] = [levels.down, levels.up, levels.most_bytes]
    return ConfigRecord(plan)


def read_instruction(content: RecordDict) -> Instruction:
    """Return what a message tells a client."""
    told = content.original if isinstance(content, LazyRecords) else None
    if isinstance(told, Instruction):
        return told
    plan = content.config_records[_PLAN]
    orders = read_payload(content, _ORDERS)
    if not isinstance(orders, Orders | None):
        raise ValueError(f"expected orders, got {orders.kind}")
    return Instruction(
        int(plan["round"]),  # type: ignore[arg-type]
        read_payload(content, _PAYLOAD),
        int(plan.get("attempt", 1)),  # type: ignore[arg-type]
        orders,
        int(plan.get("since", 0)),  # type: ignore[arg-type]
        Levels(*map(int, plan["levels"])) if "levels" in plan else NO_BUDGET,  # type: ignore[arg-type]
    )


# -- what is said besides where a client is a node of its own ---------------------------------

_NODE = "node"


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a node is told besides the instruction; it may have been started a moment ago.

    Attributes:
        settings: of the run, as JSON. A node has no file of settings of its own.
        trained: the last round in which this client's training came back; 0 if none did.
    """

    settings: str
    trained: int = 0


@dataclass(frozen=True, slots=True)
class Introduction:
    """What a node says of itself before it is asked for anything.

    Attributes:
        partition: its client.
        partitions: how many clients it takes the run to have.
        data: digest of what it has loaded.
        code: digests of the files of code that make its numbers, by name, as JSON.
        versions: of the packages that decide bits.
    """

    partition: int
    partitions: int
    data: str
    code: str
    versions: str


def payload_records(payload: Payload | None) -> RecordDict:
    """Return the part of an instruction that clients which receive the same can share."""
    records = RecordDict()
    write_payload(records, _PAYLOAD, payload)
    return records


def node_instruction(
    round: int,
    attempt: int,
    received: Mapping[str, Any],
    told: Told,
    assignment: Assignment,
) -> RecordDict:
    """Return the content of a message to a node; `read_instruction` reads all but the last.

    Args:
        round: 1-based.
        attempt: how often this was asked in this round, this time included.
        received: the records of what it receives.
        told: all else.
        assignment: see there.
    """
    plan = _plan(round, attempt, told.since, told.levels)
    records = RecordDict({_PLAN: plan, _NODE: ConfigRecord(asdict(assignment)), **received})
    write_payload(records, _ORDERS, told.orders)
    return records


def read_assignment(content: RecordDict) -> Assignment:
    """Return what a message tells a node besides the instruction."""
    record = content.config_records[_NODE]
    return Assignment(str(record["settings"]), int(record["trained"]))  # type: ignore[arg-type]


def introduction_content(introduction: Introduction) -> RecordDict:
    """Return the content of a node's first reply."""
    return RecordDict({_NODE: ConfigRecord(asdict(introduction))})


def read_introduction(content: RecordDict) -> Introduction:
    """Return what a node says of itself.

    Raises:
        ValueError: it says something else.
    """
    said = dict(content.config_records.get(_NODE, {}))
    numbers, texts = ("partition", "partitions"), ("data", "code", "versions")
    expected = {**dict.fromkeys(numbers, int), **dict.fromkeys(texts, str)}
    if {key: type(value) for key, value in said.items()} != expected:
        raise ValueError(
            f"it introduces itself as {str(said)[:200]}, which is not a node of this version"
        )
    return Introduction(**said)  # type: ignore[arg-type]


def say_state_was_lost(content: RecordDict) -> None:
    """Add to a reply that the node no longer had the state that the server counted on."""
    content[_NODE] = ConfigRecord({"state_lost": True})


def take_word_of_lost_state(content: RecordDict) -> bool:
    """Take out of a reply, and return, whether its node no longer had the client's state."""
    if _NODE not in content.config_records:
        return False
    del content[_NODE]
    return True


def reply_content(reply: ClientReply) -> RecordDict:
    """Return the content of a reply."""
    return LazyRecords(reply, partial(_write_reply, reply))


def _write_reply(reply: ClientReply) -> RecordDict:
    content = RecordDict({"metrics": MetricRecord(dict(reply.metrics))})
    if reply.round is not None:
        content[_PLAN] = ConfigRecord({"round": reply.round})
    write_payload(content, _PAYLOAD, reply.payload)
    if reply.test_probabilities is not None:
        content["test"] = to_array_record({"probabilities": reply.test_probabilities})
    return content


def is_unencoded(content: RecordDict) -> bool:
    """Tell whether a message's content still is the object that it stands for."""
    return isinstance(content, LazyRecords) and content.original is not None


def read_reply(content: RecordDict) -> ClientReply:
    """Return the reply in a message's content."""
    reply = content.original if isinstance(content, LazyRecords) else None
    if isinstance(reply, ClientReply):
        return reply
    test = content.array_records.get("test")
    plan = content.config_records.get(_PLAN)
    return ClientReply(
        payload=read_payload(content, _PAYLOAD),
        metrics={name: float(value) for name, value in content.metric_records["metrics"].items()},  # type: ignore[arg-type]
        test_probabilities=None if test is None else from_array_record(test)["probabilities"],
        round=None if plan is None else int(plan["round"]),  # type: ignore[arg-type]
    )
