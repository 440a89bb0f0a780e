"""The round loop: what a Flower server does with any algorithm of the table.

Plan, send, validate, aggregate, judge, record; see `strategies.contract` for the two halves that an
algorithm adds. Runs over any Flower `Grid`.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean

import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedkd.data import FederatedData
from fedkd.exchange.adversaries import NoAdversary
from fedkd.exchange.budget import BudgetError, Levels, Plan, Purse
from fedkd.exchange.ledger import Ledger
from fedkd.exchange.mechanisms import WantedNoise
from fedkd.exchange.pipeline import ExchangeState, ServerTurn
from fedkd.exchange.spending import PrivacyBudgetError, bounds_by_client, spent_by_client
from fedkd.exchange.values import Value, read_only
from fedkd.metrics.calibration import expected_calibration_error
from fedkd.metrics.classification import accuracy, confusion_counts
from fedkd.metrics.fairness import spread, worst_mean
from fedkd.models import ignores_seed
from fedkd.randomness import Purpose, generator_for
from fedkd.targets import StreamingMean
from fedkd.training import Architecture, as_tensor
from sim.commands.interruption import uninterrupted
from sim.devices.effort import Effort, network_rows, networks_of
from sim.engine.data import goal_of
from sim.engine.grid import FIRST_NODE_ID, CohortGrid
from sim.engine.nodes import Nodes
from sim.engine.runtime import (
    build_strategy,
    clock_of,
    federation_of,
    fix_numerics,
    has_ensemble,
    judge,
    presence_of,
    sends_answers,
    server_tools,
)
from sim.server.asking import check_asked
from sim.server.budgets import plan_of
from sim.server.exchanged import Exchanged, Noting
from sim.server.history import History
from sim.server.judging import COUNTED_ROUND, rounds_between
from sim.server.kept import check_clients, check_exchange, check_kept
from sim.server.observers import Observer, Row
from sim.server.outbox import Outbox
from sim.server.peers import Peers
from sim.server.privacy import PrivacyPlan
from sim.server.replies import Quorum, QuorumError, Replies
from sim.server.validation import (
    ATTACK_SUCCESS,
    CALIBRATION_ERROR,
    Expected,
    RejectedReplyError,
    authors_code,
    valid_answer,
)
from sim.settings import Settings, SettingsError
from sim.wire.messages import Phase, instruction
from strategies.contract import FinishedModel, Round


@dataclass(frozen=True, slots=True)
class Boundary:
    """Where a run stands between two rounds, beside what the grid and the records hold.

    Attributes:
        round: the last complete round; 0 before the first.
        state: what the algorithm's server half remembers; nobody writes into it.
        exchange: what codecs remember of clients, and what was released so far.
        simulated_s: what the simulated clock shows; it goes on only where there is one.
    """

    round: int
    state: Value
    exchange: ExchangeState = field(default_factory=ExchangeState)
    simulated_s: float = 0.0


LEFT_OUT = "left_out"
"""Marks the rows of clients that are left out: they are part of no mean."""


class NobodyThereError(Exception):
    """A round has nobody who could be asked."""


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
        self._server = server_tools(settings, self._strategy, data)
        self._stages = settings.stages
        self._goal = goal_of(data, settings)
        self._privacy = PrivacyPlan(settings, self._strategy)
        self._clock = clock_of(settings, data)
        self._networks = networks_of(self._strategy)
        self._prepared = Effort()
        self._presence = presence_of(settings)
        self._left_out = frozenset(settings.counterfactual.without)
        self._observers_know = False
        self.history = History()
        self.boundary: Boundary | None = None
        self._opened: ServerTurn | None = None

    def start(self) -> None:
        """Stand before the first round.

        Raises:
            SettingsError: this goes on from a later round, whose checkpoint is not there.
        """
        since = self._settings.counterfactual.from_round
        if since:
            raise SettingsError(
                f"counterfactual.from_round: this goes on from the checkpoint of round {since} of "
                "another run, which is not in its folder: fedkd replay RUN --from-round "
                f"{since} makes it anew"
            )
        # Of a round that was broken off nothing counts.
        self._server.take_work()
        with authors_code("before round 1, the server's half"):
            state = self._checked(self._strategy.begin(self._server), "begin")
        check_asked(self._stages, self._strategy, state, self._server)
        self.history = self._new(History())
        seconds, self._prepared = self._server_took()
        self.boundary = Boundary(0, state, simulated_s=seconds)

    def _new(self, history: History) -> History:
        """Return a history that says which networks the rows of its efforts went through."""
        history.networks = network_rows(self._networks, self._federation.num_classes)
        return history

    def _server_took(self) -> tuple[float, Effort]:
        """Return what the server did since this was asked last: simulated seconds, and effort."""
        work = self._server.take_work()
        seconds = 0.0 if self._clock is None else self._clock.server_seconds(work)
        return seconds, Effort.of(work, self._networks)

    def go_back(self, boundary: Boundary, history: History) -> None:
        """Stand at a boundary that was reached before, here or in another process.

        The grid has to hold the clients' states of that moment.
        """
        self.history = self._new(history)
        self.boundary = boundary

    def check_boundary(self, state: Value, exchange: Value) -> None:
        """See whether these can be of a boundary of this run.

        Raises:
            TypeError, ValueError: for what does not fit.
        """
        if not isinstance(exchange, ExchangeState):
            raise TypeError(f"what the exchange remembers is a {type(exchange).__name__}")
        check_exchange(exchange, self._federation.num_clients)
        check_kept(self._checked(state, "a checkpoint"), self._strategy, self._server)

    def _checked(self, state: object, whose: str) -> Value:
        """Return the state, which nobody can write into from here on.

        Raises:
            TypeError, ValueError: it is none of this algorithm, or none of this federation.
        """
        expected = self._strategy.State
        if not isinstance(state, expected):
            raise TypeError(
                f"{type(self._strategy).__name__}: {whose} gave a {type(state).__name__}, expected "
                f"its State, {expected.__name__}"
            )
        check_clients(state, self._federation.num_clients)
        return read_only(state)

    def run(self, after_round: Callable[[], None] = lambda: None) -> History:
        """Run the rounds that are left and return what all of them measured.

        Args:
            after_round: called between rounds and after the last, at each new boundary.

        Raises:
            AuthorError: an algorithm's or a model's own code is wrong.
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
            before = self._standing
            goes_on = self._round(before)
            if self.boundary is not before:
                after_round()
            if not goes_on:
                break
        return self.history

    def spent(self) -> Row:
        """Return what was promised, and what the releases so far have spent of it.

        Those of a round that was broken off have left as well.
        """
        privacy = self._settings.privacy
        if not privacy.on:
            return {}
        try:
            opened = self._opened
            ledger = (self._standing.exchange if opened is None else opened.skipped()).ledger
            by_client = spent_by_client(ledger, delta=privacy.delta)
        except ValueError as error:
            # A mechanism of one's own costs what its author knows.
            return {"mechanism": privacy.mechanism.kind, "unknown": str(error)}
        most = [max(own, default=0.0) for own in zip(*by_client.values(), strict=True)] or [0.0] * 3
        return {
            "mechanism": privacy.mechanism.kind,
            "where": privacy.where,
            "unit": privacy.promised,
            "delta": privacy.delta,
            "budget": None if privacy.limit is None else privacy.limit.epsilon,
            "promise": privacy.mechanism.told(privacy.where),
            **dict(zip(("epsilon", "renyi", "pure"), most, strict=True)),
            "clients": {str(client): own.epsilon for client, own in by_client.items()},
        }

    @property
    def architectures(self) -> Sequence[str]:
        """Each client's, by partition id."""
        return self._federation.architectures

    def architecture(self, client: int) -> Architecture:
        """Return what a client trains."""
        return self._strategy.architecture(client)

    def finished_models(self) -> Mapping[str, FinishedModel]:
        """Return the server's models at the last boundary that take the run's inputs, by name."""
        with authors_code("after the rounds, the server's half"):
            return self._strategy.finished_models(self._standing.state)

    @property
    def _standing(self) -> Boundary:
        if self.boundary is None:
            raise RuntimeError("the loop was not started")
        return self.boundary

    def _round(self, before: Boundary) -> bool:
        """Go on to the next boundary; False: the privacy budget ends the run."""
        round = self._begun(before)
        strategy = self._strategy
        where = f"round {round.number}, the server's half"
        with authors_code(where):
            clients = strategy.participants(before.state, round)
        if round.present is not None:
            there = set(round.present)
            clients = tuple(client for client in clients if client in there)
        if self._nodes is not None:
            self._nodes.begin(round.number, clients)
        started = time.perf_counter()
        # What was done to judge the last round takes no time.
        self._server.take_work()
        purse = self._purse(round, clients, before.exchange) if clients else None
        turn = self._opened = self._turn(before.exchange, round, purse)
        outbox = Outbox(strategy, before.state, round, turn, server=self._server)
        if self._is_spent(before, round, clients, turn, outbox):
            return False
        replies = Replies(
            round=round,
            clients=clients,
            outbox=outbox,
            turn=turn,
            ask=lambda asked, attempt: self._ask("train", round, asked, outbox, attempt),
            num_examples=self._federation.num_examples,
            engine=self._settings.engine,
            deadline_s=self._settings.clock.deadline_s,
            event=self.tell,
            purse=purse,
            delays_vary=bool(self._settings.faults),
            left_out=self._left_out,
        )
        self._tell_of_left_out(round)
        noting = Noting(round.number) if self._settings.keeps_exchange else None
        skipped = spent_up = False
        try:
            if not clients:
                raise NobodyThereError
            uploads = turn.view(
                replies if noting is None else noting.coming(replies),
                sums=strategy.sums,
                group=self._federation.architectures.__getitem__,
                leaves_one_out=strategy.leaves_one_out,
            )
            with authors_code(where, lambda: replies.failure):
                state = strategy.aggregate(before.state, uploads, round, self._server)
            replies.drain()
            with authors_code(where):
                state = self._checked(state, "aggregate")
        except PrivacyBudgetError as error:
            # What has left has left and is accounted for; nothing is made of it.
            state, skipped, spent_up = before.state, True, True
            self._skip(round, str(error))
        except QuorumError as error:
            if self._settings.engine.below_quorum != "skip":
                raise
            state, skipped = before.state, True
            self._skip(round, str(error))
        except NobodyThereError:
            state, skipped = before.state, True
            self._skip(round, "nobody is there (presence)")
        finally:
            self._pass_events_on()
        state = self._forgotten(state, where)
        exchange = turn.skipped() if skipped else turn.committed()
        spent = sum(row["bytes"] for row in replies.exchanged) + replies.unseen_bytes
        exchange = replace(exchange, spent=exchange.spent + spent)
        simulated_s = before.simulated_s
        seconds, effort = self._server_took()
        if before.round == 0:
            # What a teacher took before the first round belongs to the run as well.
            effort = effort.plus(self._prepared)
        if self._clock is not None:
            taken = replies.simulated_s if clients else self._settings.presence.round_s
            simulated_s += taken + seconds
        trained = time.perf_counter()
        evaluated: dict[int, Row] = {}
        federation: Row = {}
        servers: list[Row] = []
        if self._is_judged(round.number, clients):
            judging = self._turn(exchange, round.next())
            evaluated, federation = self._evaluate(round, self._judged(clients), state, judging)
            exchange = judging.skipped()
            state = self._forgotten(state, where)
            servers = self._evaluate_server(round, state)
            if servers:
                for name in ("accuracy", CALIBRATION_ERROR, ATTACK_SUCCESS):
                    if name in servers[0]:
                        federation[f"server_{name}"] = servers[0][name]
        federation = {
            "round": round.number,
            "scope": "federation",
            **({} if round.present is None else {"present": len(round.present)}),
            "participants": len(set(clients) - self._left_out),
            "replies": len(replies.metrics.keys() - self._left_out),
            **({"skipped": True} if skipped else {}),
            **federation,
            **replies.of_peers(),
            "target_entropy": outbox.entropy(),
            "bytes_up": sum(row["bytes"] for row in replies.exchanged if row["direction"] == "up"),
            "bytes_down": sum(
                row["bytes"] for row in replies.exchanged if row["direction"] == "down"
            ),
            **replies.effort.row("client"),
            **effort.row("server"),
            **replies.effort.plus(effort).by_network,
            **({} if self._clock is None else {"simulated_s": simulated_s}),
            **self._bound(exchange.ledger),
            "train_seconds": trained - started,
            "seconds": time.perf_counter() - started,
        }
        if round.number == self._settings.rounds:
            self._check_that_anybody_was_judged(federation)
        named = {view: each.name for view, each in enumerate((self._data, *self._data.views))}
        rows = [federation, *_client_rows(round, replies.metrics, evaluated, named), *servers]
        after = Boundary(round.number, state, exchange, simulated_s)
        with uninterrupted():
            charged = len(before.exchange.ledger.charges)
            travelled = None if noting is None else _exchanged(noting, outbox, turn)
            self._complete(after, rows, replies.exchanged, charged, travelled)
        return not spent_up

    def _bound(self, ledger: Ledger) -> Row:
        """Return a bound on what any client has spent, where that is known."""
        if not isinstance(self._stages.release, WantedNoise):
            return {}
        bounds = bounds_by_client(ledger, delta=self._stages.delta)
        return {"epsilon_bound": max(bounds.values(), default=0.0)}

    def _is_spent(
        self,
        before: Boundary,
        round: Round,
        clients: Sequence[int],
        turn: ServerTurn,
        outbox: Outbox,
    ) -> bool:
        """Tell whether a round would exceed ``privacy.budget``; nothing of it has left yet."""
        budget = self._stages.budget
        if budget is None:
            return False
        costs = {client: turn.cost(client, outbox.asked(client)) for client in clients}
        reason = budget.room_for(before.exchange.ledger, round.number, costs)
        if reason is None:
            return False
        if before.round == 0:
            raise SettingsError(
                f"privacy.budget: {reason}; nothing was released. A larger budget, fewer rounds or "
                "more noise would work"
            )
        self.tell({"round": before.round, "event": "privacy budget spent", "reason": reason})
        return True

    def _forgotten(self, state: Value, where: str) -> Value:
        """Let the algorithm know whose nodes have lost what they kept."""
        lost = () if self._nodes is None else self._nodes.take_lost()
        if not lost:
            return state
        with authors_code(where):
            return self._checked(self._strategy.forget(state, lost), "forget")

    def _begun(self, before: Boundary) -> Round:
        """Return the next round, with those who are there when it begins."""
        round = self._federation.round(before.round + 1)
        if self._presence is None:
            return round
        clock = before.simulated_s
        if self._clock is None:
            clock = before.round * self._settings.presence.round_s
        return replace(round, present=self._presence.there(round.number, clock))

    def _turn(self, before: ExchangeState, round: Round, purse: Purse | None = None) -> ServerTurn:
        return ServerTurn(
            self._stages,
            before,
            seed=self._settings.seed,
            round=round.number,
            plan=self._privacy.after(before.ledger),
            shares=None if purse is None else purse.shares,
        )

    def _purse(self, round: Round, clients: Sequence[int], before: ExchangeState) -> Purse | None:
        """Return what the round may spend; None without a budget."""
        if self._plan is None:
            return None
        try:
            return self._plan.purse(round.number, clients, before.spent)
        except BudgetError as error:
            raise SettingsError(f"round {round.number}: exchange.budget_kb: {error}") from error

    @cached_property
    def _plan(self) -> Plan | None:
        return plan_of(self._settings, self._strategy, self._server)

    def _complete(
        self,
        after: Boundary,
        rows: Sequence[Row],
        exchanged: Sequence[Row],
        charged: int,
        travelled: Exchanged | None,
    ) -> None:
        """Move on to a boundary; the first ``charged`` entries of its ledger were told before."""
        charges = [
            {"round": after.round, "direction": "release", **row}
            for row in after.exchange.ledger.rows(since=charged)
        ]
        for observer in self._observers:
            observer.metrics(rows)
            observer.exchange(exchanged)
            observer.charges(charges)
            if travelled is not None:
                observer.travelled(travelled)
        if isinstance(self._grid, CohortGrid):
            # If this fails halfway, clients are at no round's end and must not be saved as such.
            self.boundary = None
            self._grid.commit()
        self.history.add_metrics(rows)
        self.history.add_exchange(exchanged)
        self.boundary = after
        self._opened = None
        for observer in self._observers:
            observer.completed(after.round)

    def _skip(self, round: Round, reason: str) -> None:
        """Leave a round out: server and clients are as they were before it."""
        if isinstance(self._grid, CohortGrid):
            self._grid.rollback()
        self.tell({"round": round.number, "event": "round skipped", "reason": reason})

    def _ask(
        self, phase: Phase, round: Round, clients: Iterable[int], outbox: Outbox, attempt: int = 1
    ) -> Iterator[tuple[int, Message]]:
        """Send one message a client and yield (client, reply) in client order."""
        told = [(client, outbox.tell(client, attempt)) for client in clients]
        if self._nodes is not None:
            yield from self._nodes.ask(phase, round.number, attempt, told)
            return
        contents: dict[tuple[int, Levels], RecordDict] = {}
        messages = []
        for client, own in told:
            # Clients that receive one object share one record: it is encoded and sent once.
            alone = own.orders is not None or own.since > 0
            content = None if alone else contents.get((id(own.payload), own.levels))
            if content is None:
                content = instruction(round.number, own, attempt)
                if not alone:
                    contents[id(own.payload), own.levels] = content
            node = FIRST_NODE_ID + client
            messages.append(Message(content, node, phase, group_id=str(round.number)))
        for reply in self._grid.send_and_receive(messages):
            yield reply.metadata.src_node_id - FIRST_NODE_ID, reply

    # -- judging ---------------------------------------------------------------------------

    def _is_judged(self, round: int, participants: Sequence[int]) -> bool:
        """Tell whether models are judged in a round; in the last they always are."""
        every = self._settings.evaluation.every
        if every == "auto":
            rows = len(self._data.test_labels) + len(self._data.validation_labels)
            judged = rows * len(self._judged(participants))
            every = rounds_between(self.history.federation, judged)
            if round == COUNTED_ROUND + 1 and every > 1:
                reason = f"evaluation.every: auto; every {every} rounds, and in the last"
                self.tell({"round": round, "event": "judging", "reason": reason})
        return round % every == 0 or round == self._settings.rounds

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
        self, round: Round, clients: Sequence[int], state: Value, turn: ServerTurn
    ) -> tuple[dict[int, Row], Row]:
        """Judge clients' models and their ensemble; who is left out is no part of any mean."""
        silent = not self._strategy.judges_received
        outbox = Outbox(self._strategy, state, round.next(), turn, silent=silent)
        rows: dict[int, Row] = {}
        apart: dict[int, Row] = {}
        ensemble = StreamingMean()
        is_last = round.number == self._settings.rounds
        peers = Peers(clients if is_last else (), self._data.test_labels)
        test_rows = len(self._data.test_labels)
        expected = Expected.evaluation(
            round.number,
            test_rows,
            self._data.num_classes,
            answers=sends_answers(self._strategy, self._data, self._settings, round.number),
        )
        counted = [client for client in clients if client not in self._left_out]
        quorum = Quorum(round.number, len(counted), "could be judged", self._settings.engine)
        failed: dict[int, str] = {}
        waiting = list(clients)
        for attempt in quorum.attempts():
            if attempt > 1:
                self.tell(quorum.retry(len(rows), attempt))
            for client, message in self._ask("evaluate", round, waiting, outbox, attempt):
                try:
                    reply = valid_answer(message, expected, again=client in rows)
                except RejectedReplyError as error:
                    if client not in self._left_out:
                        failed[client] = error.told
                        self._client_event(round, client, "evaluation failed", error.told)
                    continue
                if client in self._left_out:
                    apart[client] = dict(reply.metrics)
                    continue
                rows[client] = dict(reply.metrics)
                if reply.test_probabilities is not None:
                    if has_ensemble(self._strategy, self._data):
                        ensemble.add(reply.test_probabilities)
                    if is_last:
                        peers.add(client, reply.test_probabilities)
            self._pass_events_on()
            waiting = [client for client in counted if client not in rows]
            if quorum.is_reached(len(rows)):
                break
        else:
            too_few = quorum.error(len(rows), failed)
            # Where something is promised no model's failure, which tells of private rows, ends it.
            if self._settings.engine.below_quorum != "skip" and not self._settings.privacy.on:
                raise too_few
            event = "evaluation skipped"
            self.tell({"round": round.number, "event": event, "reason": str(too_few)})
            return {}, {}
        for client, row in (*rows.items(), *apart.items()):
            row.update(self.history.forgotten(client, row))
        federation = of_clients(list(rows.values())) if rows else {}
        if not isinstance(self._stages.adversary, NoAdversary):
            federation |= self._of_honest(rows)
        if ensemble.count:
            labels, mean = self._data.test_labels, ensemble.mean().numpy()
            counts = confusion_counts(labels, mean.argmax(-1), self._data.num_classes)
            federation["ensemble_accuracy"] = accuracy(counts)
            federation["ensemble_gain"] = accuracy(counts) - federation["accuracy"]
            federation["ensemble_calibration_error"] = expected_calibration_error(mean, labels)
        if is_last and (found := peers.row(round.number)):
            for observer in self._observers:
                observer.compared(found)
        return rows | {client: {**row, LEFT_OUT: True} for client, row in apart.items()}, federation

    def _of_honest(self, rows: Mapping[int, Row]) -> Row:
        """Return what honest clients' models show, and how many fell for what is wanted of them."""
        honest = [row for client, row in rows.items() if client not in self._stages.controlled]
        means = {"accuracy": "honest_accuracy", ATTACK_SUCCESS: ATTACK_SUCCESS}
        return {
            title: fmean(row[name] for row in honest)
            for name, title in means.items()
            if honest and name in honest[0]
        }

    def _tell_of_left_out(self, round: Round) -> None:
        """Say once, at the first round of all that are run, who is left out of them."""
        counterfactual = self._settings.counterfactual
        if round.number == counterfactual.from_round + 1:
            for client in sorted(self._left_out):
                reason = "counterfactual.without: it goes on learning, and nothing it sends counts"
                self._client_event(round, client, "left out", reason)

    def _check_that_anybody_was_judged(self, federation: Row) -> None:
        """Refuse to end a run that says nothing about any client's model."""
        everybody = len(self._left_out) == self._federation.num_clients
        if not everybody and not any(
            "accuracy" in row for row in (*self.history.federation, federation)
        ):
            raise QuorumError(
                f"round {federation['round']}: no client could be judged in any round; "
                "the events say why"
            )

    def _evaluate_server(self, round: Round, state: Value) -> list[Row]:
        """Judge the server's own models, where there are any."""
        rows: list[Row] = []
        with authors_code(f"round {round.number}, the server's half"):
            models = self._strategy.judged_models(state)
        for name, model in models.items():
            scores = self._server.predict(model, as_tensor(self._data.test_inputs))
            validation = self._server.predict(model, as_tensor(self._data.validation_inputs))
            try:
                judged = judge(self._data, scores, validation)
            except ValueError as error:
                reason = f"the server's model: {error}"
                event = {"round": round.number, "event": "evaluation failed", "reason": reason}
                self.tell(event)
                continue
            if self._goal is not None:
                aimed = self._server.predict(model, as_tensor(self._goal.inputs))
                judged[ATTACK_SUCCESS] = self._goal.success(aimed)
            # The first of them leads; where there are several, each says which it is.
            more = {"model": name} if rows else {}
            rows.append({"round": round.number, "scope": "server", **more, **judged})
        return rows

    # -- telling ---------------------------------------------------------------------------

    def _tell_of_models(self) -> None:
        """Say which models of the user's own begin alike everywhere; it may be what is wanted."""
        models = {step.model: step for step in self._strategy.smallest_steps()}
        for model, step in models.items():
            own = self._data.views[step.view - 1] if step.view else self._data
            shape = step.input_shape or own.input_shape
            if model.is_own and ignores_seed(
                model, input_shape=shape, num_classes=self._data.num_classes
            ):
                reason = (
                    f"{step.setting}: {model.label} has the same first weights on every client "
                    "and for every seed"
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

    def _client_event(self, round: Round, client: int, kind: str, reason: str) -> None:
        self.tell({"round": round.number, "client": client, "event": kind, "reason": reason})

    def _pass_events_on(self) -> None:
        """Tell what happened to workers and clients meanwhile."""
        if isinstance(self._grid, CohortGrid):
            for row in self._grid.take_events():
                self.tell(row)


def of_clients(rows: Sequence[Row]) -> Row:
    """Return what the rows of judged clients make of a federation.

    Args:
        rows: of at least one client.

    Returns:
        Means over clients; of calibration and forgetting over those that have any. How evenly they
        fare on the common test split and on their own label mixes, side by side.
    """
    values = {
        name: [row[name] for row in rows]
        for name in ("accuracy", "personal_accuracy", "macro_recall", "validation_accuracy")
    }
    federation: Row = {name: fmean(own) for name, own in values.items()}
    federation["worst_accuracy"] = min(values["accuracy"])
    for name in ("accuracy", "personal_accuracy"):
        federation[f"{name}_spread"] = spread(values[name])
        federation[f"{name}_worst_tenth"] = worst_mean(values[name])
    for name in (CALIBRATION_ERROR, "forgetting"):
        known = [row[name] for row in rows if not math.isnan(row.get(name, math.nan))]
        if known:
            federation[name] = fmean(known)
    return federation


def _exchanged(noting: Noting, outbox: Outbox, turn: ServerTurn) -> Exchanged:
    """Return what travelled, once it is known what each client was told."""
    for client, told in outbox.told.items():
        if told.payload is not None:
            noting.going(client, turn.opened(client, told.payload))
    return noting.exchanged()


def _client_rows(
    round: Round,
    trained: Mapping[int, Row],
    judged: Mapping[int, Row],
    views: Mapping[int, str],
) -> Iterator[Row]:
    for client in sorted({*trained, *judged}):
        yield {
            "round": round.number,
            "scope": "client",
            "client": client,
            # What its inputs are, where clients differ in that.
            **({"view": views[round.federation.view_of(client)]} if len(views) > 1 else {}),
            **trained.get(client, {}),
            **judged.get(client, {}),
        }
