"""The round loop: what a Flower server does with any algorithm of the table.

Plan, send, validate, aggregate, judge, record; see `strategies.base` for the two halves that an
algorithm adds. Runs over any Flower `Grid`.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedkd.data import FederatedData
from fedkd.metrics.classification import accuracy, confusion_counts
from fedkd.metrics.diversity import target_entropy
from fedkd.models import ignores_seed
from fedkd.randomness import Purpose, generator_for
from fedkd.targets import StreamingMean
from fedkd.training import Arrays, as_tensor
from sim.commands.interruption import uninterrupted
from sim.engine.grid import FIRST_NODE_ID, CohortGrid
from sim.engine.nodes import Nodes
from sim.engine.runtime import build_strategy, federation_of, fix_numerics, judge
from sim.server.history import History
from sim.server.observers import Observer, Row
from sim.server.replies import Quorum, QuorumError, Replies
from sim.server.validation import (
    Expected,
    Layout,
    RejectedReplyError,
    check_arrays,
    check_parameters,
    check_predictions,
    not_finite,
    valid_answer,
)
from sim.settings import Settings
from sim.wire.messages import Phase, instruction
from strategies.knowledge import Broadcast, Parameters, Predictions
from strategies.memory import Memory
from strategies.plan import RoundPlan
from strategies.server import Server


@dataclass(frozen=True, slots=True)
class Boundary:
    """Where a run stands between two rounds, beside what the grid and the records hold.

    Attributes:
        round: the last complete round; 0 before the first.
        broadcast: what the clients receive in the next one.
        memory: what the algorithm's server half remembers.
    """

    round: int
    broadcast: Broadcast
    memory: Memory


class RoundLoop:
    """Runs an algorithm's rounds over a grid.

    A round counts once it is complete: only then do the clients' states, the boundary and the
    observers' `completed` move on, all at once. Whatever ends a round before leaves the run
    at the boundary before it.
    """

    def __init__(
        self, grid: Grid, settings: Settings, data: FederatedData, observers: Sequence[Observer]
    ) -> None:
        # The server's model computes in this process.
        fix_numerics(torch.device("cpu"))
        self._grid = grid
        self._settings = settings
        self._data = data
        self._observers = observers
        self._nodes = (
            None if isinstance(grid, CohortGrid) else Nodes(grid, settings, data, self.tell)
        )
        self._federation = federation_of(settings, data)
        self._strategy = build_strategy(settings, self._federation)
        self._server = Server(
            federation=self._federation,
            data=data,
            optimizer=settings.clients.optimizer,
            device=torch.device("cpu"),
        )
        self._layouts: dict[str, tuple[Layout, Arrays]] = {}
        self._observers_know = False
        self.history = History()
        self.boundary: Boundary | None = None

    def start(self) -> None:
        """Stand before the first round."""
        self._strategy = build_strategy(self._settings, self._federation)
        broadcast = self._strategy.prepare(self._server)
        self.history = History()
        self.boundary = Boundary(0, broadcast, self._strategy.memory())

    def go_back(self, boundary: Boundary, history: History) -> None:
        """Stand at a boundary that was reached before, here or in another process.

        The grid has to hold the clients' states of that moment.
        """
        self._strategy = build_strategy(self._settings, self._federation)
        self._strategy.recall(boundary.memory, self._server)
        self.history = history
        self.boundary = boundary

    def try_recall(self, broadcast: Broadcast, memory: Memory) -> None:
        """See whether these can be of a boundary of this run, on objects that are thrown away.

        Raises:
            ValueError: for arrays that do not fit, and whatever else an algorithm says.
        """
        strategy = build_strategy(self._settings, self._federation)
        strategy.recall(memory, self._server)
        layouts: dict[str, Layout] = {}
        for client, architecture in enumerate(self._federation.architectures):
            if architecture not in layouts:
                weights = strategy.uploaded_weights(client, self._server)
                layouts[architecture] = {n: (a.shape, a.dtype) for n, a in weights.items()}
        if strategy.uploads == "parameters":
            check_arrays(memory.arrays, layouts.values())
        if any(client >= self._federation.num_clients for client in broadcast.personal):
            raise ValueError("what clients receive whom there are not")
        # Also what nobody receives as yet.
        for piece in broadcast:
            if isinstance(piece, Predictions):
                check_predictions(piece, self._federation)
        looked_at: set[tuple[int, str]] = set()
        for client, architecture in enumerate(self._federation.architectures):
            received = broadcast.to(client)
            if isinstance(received, Parameters) and (id(received), architecture) not in looked_at:
                looked_at.add((id(received), architecture))
                check_parameters(received.arrays, layouts[architecture])

    def run(self, after_round: Callable[[], None] = lambda: None) -> History:
        """Run the rounds that are left and return what all of them measured.

        Args:
            after_round: called between rounds and after the last, at each new boundary.

        Raises:
            QuorumError: too few clients gave a usable answer.
            StatesLostError: clients' states are gone; `go_back` or `start`, then run again.
        """
        if not self._observers_know:
            self._observers_know = True
            for observer in self._observers:
                observer.started(self._settings, self._data)
        if self.boundary is None:
            self._tell_of_models()
            self.start()
        elif self.boundary.round:
            for observer in self._observers:
                observer.returned(self.boundary.round)
        while self._standing.round < self._settings.rounds:
            self._round(self._standing)
            after_round()
        return self.history

    @property
    def architectures(self) -> Sequence[str]:
        """Each client's, by partition id."""
        return self._federation.architectures

    @property
    def _standing(self) -> Boundary:
        if self.boundary is None:
            raise RuntimeError("the loop was not started")
        return self.boundary

    def _round(self, before: Boundary) -> None:
        plan = self._federation.plan(before.round + 1)
        clients = self._strategy.participants(plan)
        if self._nodes is not None:
            self._nodes.begin(plan.round, clients)
        started = time.perf_counter()
        replies = Replies(
            plan=plan,
            clients=clients,
            broadcast=before.broadcast,
            ask=lambda asked, attempt: self._ask("train", plan, asked, before.broadcast, attempt),
            expected=self._expectations(plan),
            num_examples=self._federation.num_examples,
            engine=self._settings.engine,
            event=self.tell,
        )
        skipped = False
        try:
            broadcast = self._strategy.aggregate(replies, plan, self._server)
            replies.drain()
        except QuorumError as error:
            if self._settings.engine.below_quorum != "skip":
                raise
            broadcast, skipped = before.broadcast, True
            self._skip(before, plan, str(error))
        finally:
            self._pass_events_on()
        trained = time.perf_counter()
        evaluated: dict[int, Row] = {}
        federation: Row = {}
        server: Row | None = None
        every = self._settings.evaluation.every
        if plan.round % every == 0 or plan.round == self._settings.rounds:
            evaluated, federation = self._evaluate(plan, self._judged(clients), broadcast)
            server = self._evaluate_server(plan)
            if server is not None:
                federation["server_accuracy"] = server["accuracy"]
        entropies = [
            target_entropy(knowledge.probabilities())
            for knowledge in broadcast.received(self._settings.clients.count)
            if isinstance(knowledge, Predictions)
        ]
        federation = {
            "round": plan.round,
            "scope": "federation",
            "participants": len(clients),
            "replies": replies.valid,
            **({"skipped": True} if skipped else {}),
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
        if plan.round == self._settings.rounds:
            self._check_that_anybody_was_judged(federation)
        rows = [federation, *_client_rows(plan, replies.metrics, evaluated)]
        if server is not None:
            rows.append(server)
        after = Boundary(plan.round, broadcast, self._strategy.memory())
        with uninterrupted():
            self._complete(after, rows, replies.exchanged)

    def _complete(self, after: Boundary, rows: Sequence[Row], exchanged: Sequence[Row]) -> None:
        for observer in self._observers:
            observer.metrics(rows)
            observer.exchange(exchanged)
        if isinstance(self._grid, CohortGrid):
            # If this fails halfway, clients are at no round's end and must not be saved as such.
            self.boundary = None
            self._grid.commit()
        self.history.add_metrics(rows)
        self.history.add_exchange(exchanged)
        self.boundary = after
        for observer in self._observers:
            observer.completed(after.round)

    def _skip(self, before: Boundary, plan: RoundPlan, reason: str) -> None:
        """Leave a round out: server and clients are as they were before it."""
        self._strategy.recall(before.memory, self._server)
        if isinstance(self._grid, CohortGrid):
            self._grid.rollback()
        self.tell({"round": plan.round, "event": "round skipped", "reason": reason})

    def _ask(
        self,
        phase: Phase,
        plan: RoundPlan,
        clients: Iterable[int],
        broadcast: Broadcast,
        attempt: int = 1,
    ) -> Iterator[tuple[int, Message]]:
        """Send one message a client and yield (client, reply) in client order."""
        pieces = [(client, broadcast.to(client)) for client in clients]
        if self._nodes is not None:
            yield from self._nodes.ask(phase, plan.round, attempt, pieces)
            return
        contents: dict[int, RecordDict] = {}
        messages = []
        for client, knowledge in pieces:
            # Clients that receive one object share one record: it is encoded and sent once.
            if id(knowledge) not in contents:
                contents[id(knowledge)] = instruction(plan.round, knowledge, attempt)
            node = FIRST_NODE_ID + client
            messages.append(Message(contents[id(knowledge)], node, phase, group_id=str(plan.round)))
        for reply in self._grid.send_and_receive(messages):
            yield reply.metadata.src_node_id - FIRST_NODE_ID, reply

    # -- judging ---------------------------------------------------------------------------

    def _judged(self, participants: Sequence[int]) -> Sequence[int]:
        """Return whose models are judged in a round: ``evaluation.clients``."""
        match self._settings.evaluation.clients:
            case "all":
                return range(self._settings.clients.count)
            case "participants":
                return participants
            case _:
                return self._panel

    @cached_property
    def _panel(self) -> Sequence[int]:
        """The clients that are judged in every round where their number is set."""
        rng = generator_for(self._settings.seed, Purpose.EVALUATION)
        drawn = rng.permutation(self._settings.clients.count)[: self._settings.evaluation.clients]
        return sorted(int(client) for client in drawn)

    def _evaluate(
        self, plan: RoundPlan, clients: Sequence[int], broadcast: Broadcast
    ) -> tuple[dict[int, Row], Row]:
        """Judge clients' models and their ensemble."""
        if not self._strategy.judges_received:
            broadcast = Broadcast()
        rows: dict[int, Row] = {}
        ensemble = StreamingMean()
        test_rows = len(self._data.test_labels)
        expected = Expected.evaluation(plan, self._strategy.uploads, test_rows)
        quorum = Quorum(plan.round, len(clients), "could be judged", self._settings.engine)
        failed: dict[int, str] = {}
        waiting = list(clients)
        for attempt in quorum.attempts():
            if attempt > 1:
                self.tell(quorum.retry(len(rows), attempt))
            for client, message in self._ask("evaluate", plan, waiting, broadcast, attempt):
                try:
                    reply = valid_answer(message, expected, again=client in rows)
                except RejectedReplyError as error:
                    failed[client] = error.told
                    self._client_event(plan, client, "evaluation failed", error.told)
                    continue
                rows[client] = reply.metrics
                if reply.test_probabilities is not None:
                    ensemble.add(reply.test_probabilities)
            self._pass_events_on()
            waiting = [client for client in clients if client not in rows]
            if quorum.is_reached(len(rows)):
                break
        else:
            too_few = quorum.error(len(rows), failed)
            if self._settings.engine.below_quorum != "skip":
                raise too_few
            event = "evaluation skipped"
            self.tell({"round": plan.round, "event": event, "reason": str(too_few)})
            return {}, {}
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
        return rows, federation

    def _check_that_anybody_was_judged(self, federation: Row) -> None:
        """Refuse to end a run that says nothing about any client's model."""
        if not any("accuracy" in row for row in (*self.history.federation, federation)):
            raise QuorumError(
                f"round {federation['round']}: no client could be judged in any round; "
                "the events say why"
            )

    def _evaluate_server(self, plan: RoundPlan) -> Row | None:
        """Judge the server's model, where there is one."""
        model = self._strategy.server_model()
        if model is None:
            return None
        scores = model.predict(as_tensor(self._data.test_inputs))
        validation = model.predict(as_tensor(self._data.validation_inputs))
        try:
            judged = judge(self._data, scores, validation)
        except ValueError as error:
            reason = f"the server's model: {error}"
            self.tell({"round": plan.round, "event": "evaluation failed", "reason": reason})
            return None
        return {"round": plan.round, "scope": "server", **judged}

    # -- telling ---------------------------------------------------------------------------

    def _tell_of_models(self) -> None:
        """Say which models of the user's own begin alike everywhere; it may be what is wanted."""
        models = {step.model: step.setting for step in self._strategy.smallest_steps()}
        for model, setting in models.items():
            if model.is_own and ignores_seed(
                model, input_shape=self._data.input_shape, num_classes=self._data.num_classes
            ):
                reason = (
                    f"{setting}: {model.label} has the same first weights on every client and for "
                    "every seed"
                )
                self.tell({"round": 0, "event": "seed without effect", "reason": reason})

    def tell(self, row: Row) -> None:
        """Let the observers know of an event."""
        for observer in self._observers:
            observer.event(row)

    def tell_of_loss(self, reason: str) -> None:
        """Let the observers know that the engine is gone."""
        round = 0 if self.boundary is None else self.boundary.round
        self.tell({"round": round, "event": "engine lost", "reason": reason})

    def _client_event(self, plan: RoundPlan, client: int, kind: str, reason: str) -> None:
        self.tell({"round": plan.round, "client": client, "event": kind, "reason": reason})

    def _pass_events_on(self) -> None:
        """Tell what happened to workers and clients meanwhile."""
        if isinstance(self._grid, CohortGrid):
            for row in self._grid.take_events():
                self.tell(row)

    def _expectations(self, plan: RoundPlan) -> Callable[[int], Expected]:
        """Return what says what a client that trained in this round answers."""
        by_architecture: dict[str, Expected] = {}

        def expected(client: int) -> Expected:
            architecture = self._federation.architectures[client]
            if architecture not in by_architecture:
                layout, constants = None, None
                if self._strategy.uploads == "parameters":
                    layout, constants = self._layout(client)
                by_architecture[architecture] = Expected.training(
                    plan, self._strategy.uploads, layout, constants
                )
            return by_architecture[architecture]

        return expected

    def _layout(self, client: int) -> tuple[Layout, Arrays]:
        """Return the layout of what a client uploads, and its arrays that are never finite."""
        architecture = self._federation.architectures[client]
        if architecture not in self._layouts:
            weights = self._strategy.uploaded_weights(client, self._server)
            layout = {n: (a.shape, a.dtype) for n, a in weights.items()}
            self._layouts[architecture] = layout, not_finite(weights)
        return self._layouts[architecture]


def _client_rows(
    plan: RoundPlan, trained: Mapping[int, Row], judged: Mapping[int, Row]
) -> Iterator[Row]:
    for client in sorted({*trained, *judged}):
        yield {
            "round": plan.round,
            "scope": "client",
            "client": client,
            **trained.get(client, {}),
            **judged.get(client, {}),
        }
