"""What the server and a client say to each other, and how it travels in Flower messages."""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fedkd.training.backends import Backend
from sim.engine.flower import LazyRecords
from strategies.knowledge import (
    Knowledge,
    from_array_record,
    read_knowledge,
    to_array_record,
    write_knowledge,
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
    """

    phase: Phase
    round: int
    clients: tuple[int, ...]
    backend: Backend = "loop"
    attempt: int = 1
    deaths: int = 0


@dataclass(frozen=True, slots=True)
class ClientReply:
    """One client's answer.

    Attributes:
        knowledge: what it uploads; None where the algorithm uploads nothing.
        metrics: plain numbers for the record; part of the simulation, not of the exchange.
        test_probabilities: float32 ``[test_rows, classes]`` where the ensemble is measured.
        round: the round that is answered; an answer to another round is refused.
    """

    knowledge: Knowledge | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    test_probabilities: np.ndarray | None = None
    round: int | None = None


@dataclass(frozen=True, slots=True)
class Instruction:
    """What a client is told.

    Attributes:
        round: 1-based.
        knowledge: what it receives; None where it receives nothing.
        attempt: how often the same was asked in this round, this time included.
    """

    round: int
    knowledge: Knowledge | None = None
    attempt: int = 1


def instruction(round: int, knowledge: Knowledge | None, attempt: int = 1) -> RecordDict:
    """Return the content of a message to a client; clients that receive the same may share it."""
    told = Instruction(round, knowledge, attempt)
    return LazyRecords(told, partial(_write_instruction, told))


def _write_instruction(told: Instruction) -> RecordDict:
    plan = {"round": told.round, "attempt": told.attempt}
    content = RecordDict({"plan": ConfigRecord(plan)})  # type: ignore[arg-type]
    write_knowledge(content, told.knowledge)
    return content


def read_instruction(content: RecordDict) -> Instruction:
    """Return what a message tells a client."""
    told = content.original if isinstance(content, LazyRecords) else None
    if isinstance(told, Instruction):
        return told
    plan = content.config_records["plan"]
    return Instruction(int(plan["round"]), read_knowledge(content), int(plan.get("attempt", 1)))  # type: ignore[arg-type]


def reply_content(reply: ClientReply) -> RecordDict:
    """Return the content of a reply."""
    return LazyRecords(reply, partial(_write_reply, reply))


def _write_reply(reply: ClientReply) -> RecordDict:
    content = RecordDict({"metrics": MetricRecord(dict(reply.metrics))})
    if reply.round is not None:
        content["plan"] = ConfigRecord({"round": reply.round})
    write_knowledge(content, reply.knowledge)
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
    plan = content.config_records.get("plan")
    return ClientReply(
        knowledge=read_knowledge(content),
        metrics={name: float(value) for name, value in content.metric_records["metrics"].items()},  # type: ignore[arg-type]
        test_probabilities=None if test is None else from_array_record(test)["probabilities"],
        round=None if plan is None else int(plan["round"]),  # type: ignore[arg-type]
    )
