"""The round loop: what a Flower server does with any algorithm of the table.

Plan, send, validate, aggregate, judge, record; see `strategies.base` for the two halves that an
algorithm adds. Runs over any Flower `Grid`.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedkd.data import FederatedData
from fedkd.metrics.classification import accuracy, confusion_counts
from fedkd.metrics.diversity import VoteCounter, target_entropy
from fedkd.targets import StreamingMean
from fedkd.training import as_tensor
from sim.engine.grid import CohortGrid, instruction, read_reply
from sim.engine.runtime import build_strategy, federation_of, fix_numerics, judge
from sim.records import Row
from sim.settings import Settings
from sim.validation import Layout, rejection
from strategies.knowledge import Broadcast, ClientUpload, Knowledge, Predictions
from strategies.plan import RoundPlan
from strategies.server import Server


class QuorumError(RuntimeError):
    """Too few clients answered to go on."""


class Observer:
    """Is told what happens in a run; override what you care about."""

    def started(self, settings: Settings, data: FederatedData) -> None:
        """The data is loaded and the first round is about to start."""

    def metrics(self, rows: Sequence[Row]) -> None:
        """A round's metrics, one row for each scope."""

    def exchange(self, rows: Sequence[Row]) -> None:
        """A round's bytes, one row for each client and direction."""

    def event(self, row: Row) -> None:
        """Something worth knowing, such as a rejected reply."""


@dataclass
class History:
    """What a run's rounds measured, in memory.

    Attributes:
        federation: a row for each round.
        clients: each client's rows of the rounds in which it was judged.
        server: rows of the server's model, where there is one.
        bytes_up, bytes_down: totals by client.
    """

    federation: list[Row] = field(default_factory=list)
    clients: dict[int, list[Row]] = field(default_factory=dict)
    server: list[Row] = field(default_factory=list)
    bytes_up: dict[int, int] = field(default_factory=dict)
    bytes_down: dict[int, int] = field(default_factory=dict)


class RoundLoop:
    """Runs an algorithm's rounds over a grid."""

    def __init__(
        self, grid: Grid, settings: Settings, data: FederatedData, observers: Sequence[Observer]
    ) -> None:
        # The server's model computes in this process.
        fix_numerics(torch.device("cpu"))
        self._grid = grid
        self._settings = settings
        self._data = data
        self._observers = observers
        self._federation = federation_of(settings, data)
        self._strategy = build_strategy(settings, self._federation)
        self._server = Server(
            federation=self._federation,
            data=data,
            optimizer=settings.clients.optimizer,
            device=torch.device("cpu"),
        )
        self._layouts: dict[str, Layout] = {}
        self.history = History()

    def run(self) -> History:
        """Run all rounds and return what they measured."""
        node_of = node_ids(self._grid, self._settings.clients.count)
        for observer in self._observers:
            observer.started(self._settings, self._data)
        broadcast = self._strategy.prepare(self._server)
        for round in range(1, self._settings.rounds + 1):
            broadcast = self._round(round, broadcast, node_of)
        return self.history

    def _round(self, round: int, broadcast: Broadcast, node_of: Mapping[int, int]) -> Broadcast:
        started = time.perf_counter()
        plan = self._federation.plan(round)
        clients = self._strategy.participants(plan)
        replies = Replies(
            self, plan, broadcast, self._ask("train", plan, clients, broadcast, node_of)
        )
        aggregated = self._strategy.aggregate(replies, plan, self._server)
        replies.drain()
        self._check_quorum(plan, len(clients), replies)
        trained = time.perf_counter()
        evaluated: dict[int, Row] = {}
        federation: Row = {}
        if round % self._settings.evaluation.every == 0 or round == self._settings.rounds:
            evaluated, federation = self._evaluate(plan, aggregated, node_of)
        entropies = [
            target_entropy(knowledge.probabilities())
            for knowledge in aggregated
            if isinstance(knowledge, Predictions)
        ]
        federation = {
            "round": round,
            "scope": "federation",
            "participants": len(clients),
            "replies": replies.valid,
            **federation,
            "peer_disagreement": replies.disagreement(),
            "target_entropy": fmean(entropies) if entropies else None,
            "bytes_up": sum(row["bytes"] for row in replies.exchanged if row["direction"] == "up"),
            "bytes_down": sum(
                row["bytes"] for row in replies.exchanged if row["direction"] == "down"
            ),
            "train_seconds": trained - started,
            "seconds": time.perf_counter() - started,
        }
        self._record(plan, federation, replies, evaluated)
        return aggregated

    def _ask(
        self,
        phase: str,
        plan: RoundPlan,
        clients: Iterable[int],
        broadcast: Broadcast,
        node_of: Mapping[int, int],
    ) -> Iterator[tuple[int, Message]]:
        """Send one message a client and yield (client, reply) in client order."""
        contents: dict[int, RecordDict] = {}
        client_of = {}
        messages = []
        for client in clients:
            knowledge = broadcast.to(client)
            # Clients that receive one object share one record: it is encoded and sent once.
            if id(knowledge) not in contents:
                contents[id(knowledge)] = instruction(plan.round, knowledge)
            node = node_of[client]
            client_of[node] = client
            messages.append(Message(contents[id(knowledge)], node, phase, group_id=str(plan.round)))
        replies = self._grid.send_and_receive(messages)
        if not isinstance(self._grid, CohortGrid):
            # Other runtimes answer in any order; floating-point sums depend on it.
            replies = sorted(replies, key=lambda reply: client_of[reply.metadata.src_node_id])
        for reply in replies:
            yield client_of[reply.metadata.src_node_id], reply

    def _check_quorum(self, plan: RoundPlan, asked: int, replies: "Replies") -> None:
        quorum = self._settings.engine.quorum
        if replies.valid < quorum * asked:
            reasons = "; ".join(
                f"client {client}: {_last_line(reason)}"
                for client, reason in list(replies.rejected.items())[:3]
            )
            raise QuorumError(
                f"round {plan.round}: {replies.valid} of {asked} clients gave a usable answer, "
                f"engine.quorum = {quorum:g} asks for more ({reasons or 'no answer'})"
            )

    def _evaluate(
        self, plan: RoundPlan, broadcast: Broadcast, node_of: Mapping[int, int]
    ) -> tuple[dict[int, Row], Row]:
        """Judge every client's model, the ensemble and the server's model."""
        if not self._strategy.judges_received:
            broadcast = Broadcast()
        rows: dict[int, Row] = {}
        ensemble = StreamingMean()
        for client, message in self._ask("evaluate", plan, range(len(node_of)), broadcast, node_of):
            if message.has_error():
                self._event(plan, client, "evaluation failed", message.error.reason or "")
                continue
            reply = read_reply(message.content)
            rows[client] = reply.metrics
            if reply.test_probabilities is not None:
                ensemble.add(reply.test_probabilities)
        federation: Row = {}
        for name in ("accuracy", "personal_accuracy", "macro_recall", "validation_accuracy"):
            values = [row[name] for row in rows.values()]
            if values:
                federation[name] = fmean(values)
        if rows:
            federation["worst_accuracy"] = min(row["accuracy"] for row in rows.values())
        if ensemble.count:
            classes = ensemble.mean().numpy().argmax(-1)
            counts = confusion_counts(self._data.test_labels, classes, self._data.num_classes)
            federation["ensemble_accuracy"] = accuracy(counts)
        model = self._strategy.server_model()
        if model is not None:
            scores = model.predict(as_tensor(self._data.test_inputs))
            validation = model.predict(as_tensor(self._data.validation_inputs)).argmax(-1)
            row = {"round": plan.round, "scope": "server", **judge(self._data, scores, validation)}
            self.history.server.append(row)
            federation["server_accuracy"] = row["accuracy"]
        return rows, federation

    def _record(
        self, plan: RoundPlan, federation: Row, replies: "Replies", evaluated: dict[int, Row]
    ) -> None:
        history = self.history
        history.federation.append(federation)
        rows = [federation]
        for client in sorted({*replies.metrics, *evaluated}):
            row = {
                "round": plan.round,
                "scope": "client",
                "client": client,
                **replies.metrics.get(client, {}),
                **evaluated.get(client, {}),
            }
            rows.append(row)
            if client in evaluated:
                history.clients.setdefault(client, []).append(row)
        if history.server and history.server[-1]["round"] == plan.round:
            rows.append(history.server[-1])
        for row in replies.exchanged:
            totals = history.bytes_up if row["direction"] == "up" else history.bytes_down
            totals[row["client"]] = totals.get(row["client"], 0) + row["bytes"]
        for observer in self._observers:
            observer.metrics(rows)
            observer.exchange(replies.exchanged)

    def _event(self, plan: RoundPlan, client: int, kind: str, reason: str) -> None:
        row = {"round": plan.round, "client": client, "event": kind, "reason": reason}
        for observer in self._observers:
            observer.event(row)

    def reject(self, plan: RoundPlan, client: int, reason: str) -> None:
        """Name a reply that is left out."""
        self._event(plan, client, "rejected", reason)

    def reason_to_reject(
        self, client: int, knowledge: Knowledge | None, plan: RoundPlan
    ) -> str | None:
        """Return why an answer cannot be used, or None."""
        expected = self._strategy.uploads
        if knowledge is None:
            return None if expected == "nothing" else f"expected {expected}, got nothing"
        if expected == "nothing":
            return f"expected nothing, got {knowledge.kind}"
        layout = None
        if expected == "parameters":
            architecture = self._federation.architectures[client]
            if architecture not in self._layouts:
                weights = self._server.initial_weights(client)
                self._layouts[architecture] = {n: (a.shape, a.dtype) for n, a in weights.items()}
            layout = self._layouts[architecture]
        return rejection(knowledge, plan, layout)

    @property
    def num_examples(self) -> tuple[int, ...]:
        """Private rows of each client."""
        return self._federation.num_examples


class Replies:
    """A round's replies as the aggregator sees them: validated uploads, one after the other.

    Iterating pulls replies from the grid, so aggregation overlaps with training; what else the
    replies say is noted in passing.
    """

    def __init__(
        self,
        loop: RoundLoop,
        plan: RoundPlan,
        broadcast: Broadcast,
        messages: Iterator[tuple[int, Message]],
    ) -> None:
        self._loop = loop
        self._plan = plan
        self._broadcast = broadcast
        self._messages = messages
        self._votes: VoteCounter | None = None
        self.valid = 0
        self.rejected: dict[int, str] = {}
        self.metrics: dict[int, dict[str, float]] = {}
        self.exchanged: list[Row] = []

    def __iter__(self) -> Iterator[ClientUpload]:
        for client, message in self._messages:
            received = self._broadcast.to(client)
            if received is not None:
                self._count(client, "down", received.kind, received.payload_bytes)
            if message.has_error():
                self._reject(client, message.error.reason or "unknown error")
                continue
            try:
                reply = read_reply(message.content)
            except (KeyError, ValueError, TypeError) as error:
                self._reject(client, f"unreadable reply: {type(error).__name__}: {error}")
                continue
            knowledge = reply.knowledge
            if knowledge is not None:
                self._count(client, "up", knowledge.kind, knowledge.payload_bytes)
            reason = self._loop.reason_to_reject(client, knowledge, self._plan)
            if reason is not None:
                self._reject(client, reason)
                continue
            self.valid += 1
            self.metrics[client] = reply.metrics
            if knowledge is not None:
                self._vote(knowledge)
                yield ClientUpload(client, knowledge, self._loop.num_examples[client])

    def drain(self) -> None:
        """Take in what the aggregator did not ask for."""
        for _ in self:
            pass

    def disagreement(self) -> float | None:
        """Return how often two peers' top classes differ on public rows, in [0, 1]."""
        return None if self._votes is None else self._votes.disagreement()

    def _vote(self, knowledge: Knowledge) -> None:
        if isinstance(knowledge, Predictions):
            values = knowledge.values
            if self._votes is None:
                self._votes = VoteCounter(*values.shape)
            self._votes.add(values.argmax(-1))

    def _reject(self, client: int, reason: str) -> None:
        self.rejected[client] = reason
        self._loop.reject(self._plan, client, reason)

    def _count(self, client: int, direction: str, kind: str, payload_bytes: int) -> None:
        self.exchanged.append(
            {
                "round": self._plan.round,
                "client": client,
                "direction": direction,
                "kind": kind,
                "bytes": payload_bytes,
            }
        )


def registered_nodes(grid: Grid) -> list[int]:
    """Return the nodes' ids, once their number has stopped growing; runtimes register them late."""
    nodes = sorted(grid.get_node_ids())
    for _ in range(300):
        time.sleep(0.2)
        before, nodes = nodes, sorted(grid.get_node_ids())
        if nodes and nodes == before:
            break
    return nodes


def node_ids(grid: Grid, count: int) -> dict[int, int]:
    """Return the node id of each partition, asking the nodes where the grid does not know.

    Raises:
        ValueError: if the grid's nodes are not the partitions 0 to count - 1.
    """
    if isinstance(grid, CohortGrid):
        return grid.partitions()
    nodes = registered_nodes(grid)
    messages = [Message(instruction(0, None), node, "query") for node in nodes]
    found: dict[int, int] = {}
    for reply in grid.send_and_receive(messages):
        if reply.has_error():
            raise ValueError(f"a node does not answer: {reply.error.reason}")
        partition = int(read_reply(reply.content).metrics["partition"])
        found[partition] = reply.metadata.src_node_id
    if sorted(found) != list(range(count)):
        raise ValueError(
            f"clients.count is {count}, but the runtime has {len(nodes)} nodes with partition ids "
            f"{sorted(found)}"
        )
    return found


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def selected_round(history: History) -> Row:
    """Return the federation's row of the round with the best mean validation accuracy.

    The earliest of equals; the test split has no say in it.
    """
    judged = [row for row in history.federation if "validation_accuracy" in row]
    if not judged:
        return {}
    best = int(np.argmax([row["validation_accuracy"] for row in judged]))
    return judged[best]


def summary(history: History, num_clients: int) -> dict[str, Any]:
    """Return the last round, the selected round, each client's last row and bytes by client."""
    judged = [row for row in history.federation if "accuracy" in row]
    return {
        "last": judged[-1] if judged else {},
        "selected": selected_round(history),
        "clients": [rows[-1] for _, rows in sorted(history.clients.items())],
        "server": history.server[-1] if history.server else None,
        "bytes_up": [history.bytes_up.get(client, 0) for client in range(num_clients)],
        "bytes_down": [history.bytes_down.get(client, 0) for client in range(num_clients)],
    }
