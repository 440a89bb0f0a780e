"""The client side of a run: carries out one call for one cohort, wherever it runs.

A Ray worker, the inline grid and Flower's own runtimes all hold a `ClientRuntime`. It keeps
data and models at hand but nothing that matters: the clients' states come in and go out.
"""

import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fedkd.data import FederatedData
from fedkd.exchange.adversaries import Goal
from fedkd.exchange.budget import NO_BUDGET
from fedkd.exchange.mechanisms import DPSGD
from fedkd.exchange.payload import Payload
from fedkd.exchange.pipeline import PREFIX, ClientTurn, MemoryLostError, Standing
from fedkd.metrics.calibration import calibration_error_of_logits
from fedkd.metrics.classification import (
    accuracy,
    confusion_counts,
    macro_recall,
    personal_accuracy,
    worst_class_recall,
)
from fedkd.trained.beginnings import weights_from
from fedkd.training import (
    Arrays,
    ClientState,
    Cohort,
    Member,
    ModelPool,
    PrivateLearning,
    Streams,
    TrainingData,
    Work,
    as_tensor,
)
from fedkd.training.backends import measure_backends, open_cohort
from sim.adversity.bad_replies import BAD_REPLIES
from sim.adversity.faults import FaultPlan
from sim.devices.clock import Clock
from sim.devices.effort import Effort, networks_of
from sim.devices.presence import Presence
from sim.engine.data import goal_of
from sim.engine.deadline import DeadlineError, deadline
from sim.engine.mistakes import NotFiniteError, author_traceback, is_misfortune
from sim.server.privacy import PrivacyPlan
from sim.server.validation import ATTACK_SUCCESS, CALIBRATION_ERROR
from sim.settings import Settings, SettingsError
from sim.settings.schema import UnreadStrategy
from sim.wire.messages import ClientReply, CohortCall, MemoryLost, Mistake
from strategies import strategy_class
from strategies.contract import Call, Federation, Received, ServerTools, Strategy


@dataclass(frozen=True, slots=True)
class Served:
    """What became of a call.

    Attributes:
        answers: for each client its reply, or why there is none.
        states: new states of those that trained, by client.
        seconds: how long it took.
        split: why members of a stack had to train one by one; empty if they did not.
    """

    answers: list[ClientReply | str]
    states: dict[int, ClientState] = field(default_factory=dict)
    seconds: float = 0.0
    split: str = ""


def federation_of(settings: Settings, data: FederatedData) -> Federation:
    """Return what both halves of an algorithm know about the run."""
    public = data.public_inputs.shape[0]
    rows = settings.exchange.rows_per_round
    return Federation(
        seed=settings.seed,
        rounds=settings.rounds,
        participation=settings.participation,
        models=tuple(settings.model_of(client) for client in range(settings.clients.count)),
        local=settings.local,
        public_size=public,
        rows_per_round=public if rows is None else rows,
        public_labelled=data.public_labels is not None,
        num_classes=data.num_classes,
        input_shape=data.input_shape,
        num_examples=tuple(len(rows) for rows in data.client_rows),
        other_classes=data.other_classes,
        view_shapes=tuple(view.input_shape for view in data.views),
    )


def clock_of(settings: Settings, data: FederatedData) -> Clock | None:
    """Return the run's simulated clock; None where it has none."""
    if not settings.clock.on:
        return None
    return Clock(
        settings.clock,
        clients=settings.clients.count,
        seed=settings.seed,
        num_classes=data.num_classes,
    )


def presence_of(settings: Settings) -> Presence | None:
    """Return who is there when; None where everybody always is.

    Raises:
        SettingsError: the trace cannot be read.
    """
    if not settings.presence.on:
        return None
    try:
        return Presence(settings.presence, clients=settings.clients.count, seed=settings.seed)
    except ValueError as error:
        raise SettingsError(str(error)) from None


def first_weights_of(settings: Settings, data: FederatedData, view: int = 0) -> dict[str, Arrays]:
    """Return what clients' models start from in the place of random weights, by the model's key.

    Args:
        settings: of the run.
        data: of the run.
        view: of whose clients; 0: of those with inputs of ``data.source``.

    Raises:
        ValueError: naming ``clients.first_weights``, the file, and what does not fit the model.
    """
    clients = settings.clients
    parts, own = 1 + len(data.views), (data, *data.views)[view]
    dealt = {i % len(clients.models) for i in range(clients.count) if i % parts == view}
    return {
        model.key: weights_from(
            path,
            model,
            input_shape=own.input_shape,
            class_names=data.class_names,
            setting="clients.first_weights",
        )
        for place, (model, path) in enumerate(zip(clients.models, clients.beginnings, strict=True))
        if path is not None and place in dealt
    }


MOST_ANSWERS = 20_000_000
"""Clients times test rows times classes up to which clients without an ensemble are compared."""


def has_ensemble(strategy: Strategy[Any, Any], data: FederatedData) -> bool:
    """Tell whether clients' predictions of test rows have a mean: all are of the same rows."""
    return strategy.has_ensemble and not data.views


def sends_answers(
    strategy: Strategy[Any, Any], data: FederatedData, settings: Settings, round: int
) -> bool:
    """Tell whether judged clients send what their models say of the test rows.

    Those that have an ensemble do in every judged round, and all of a federation that is not large
    in the last one, where they are compared.
    """
    judged = settings.evaluation.clients
    clients = judged if isinstance(judged, int) else settings.clients.count
    return has_ensemble(strategy, data) or (
        round == settings.rounds
        and strategy.scores_are_logits
        and not data.views
        and clients * len(data.test_labels) * data.num_classes <= MOST_ANSWERS
    )


def build_strategy(settings: Settings, federation: Federation) -> Strategy[Any, Any]:
    """Return the algorithm that the settings name.

    Raises:
        ValueError: its settings were only looked at, so nobody knows what they are.
    """
    kind = strategy_class(settings.strategy.name)
    if isinstance(settings.strategy, UnreadStrategy):
        raise ValueError(
            f"strategy.name {settings.strategy.name!r}: these settings were read for a look only; "
            "load_settings(..., allow=[...]) reads those of a run"
        )
    return kind(settings.strategy, federation)


def server_tools(
    settings: Settings, strategy: Strategy[Any, Any], data: FederatedData
) -> ServerTools:
    """Return what an algorithm's server half may use.

    No private row where these are protected, and none of a client that is left out.
    """
    seen = data.without_rows_of(settings.counterfactual.without)
    return ServerTools(
        federation=strategy.federation,
        data=seen.without_private_rows() if settings.privacy.on else seen,
        optimizer=settings.clients.optimizer,
        device=torch.device("cpu"),
        models=strategy.server_models(),
        first_weights=first_weights_of(settings, data),
    )


def fix_numerics(device: torch.device) -> None:
    """Make this process compute the same bits whatever else the machine is doing."""
    # One thread: how a sum is split over threads changes its last bit, and small models are
    # an order of magnitude slower with two.
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False


def _reason(error: Exception) -> str:
    """Return why there is no answer, and by its type whose fault that is."""
    if isinstance(error, MemoryLostError):
        return MemoryLost(traceback.format_exc())
    if is_misfortune(error):
        return traceback.format_exc()
    return Mistake(author_traceback(error))


@dataclass(frozen=True, slots=True)
class _Place:
    """What clients with inputs of one kind learn from and are judged on."""

    data: FederatedData
    tensors: TrainingData
    pool: ModelPool
    test_inputs: torch.Tensor
    validation_inputs: torch.Tensor
    goal: Goal | None

    @classmethod
    def of(
        cls,
        data: FederatedData,
        settings: Settings,
        device: torch.device,
        first_weights: Mapping[str, Arrays],
    ) -> "_Place":
        tensors = TrainingData.from_arrays(data, device)
        return cls(
            data,
            tensors,
            ModelPool(tensors, settings.clients.optimizer, first_weights),
            as_tensor(data.test_inputs).to(device),
            as_tensor(data.validation_inputs).to(device),
            goal_of(data, settings),
        )


class ClientRuntime:
    """Holds a run's data, models and algorithm, and serves any of its clients."""

    def __init__(
        self, settings: Settings, data: FederatedData, device: torch.device | None = None
    ) -> None:
        self._device = device or torch.device("cpu")
        fix_numerics(self._device)
        self._settings = settings
        self._data = data
        self._left_out = frozenset(settings.counterfactual.without)
        self._others_data = data.without_rows_of(self._left_out)
        self._federation = federation_of(settings, data)
        self._strategy = build_strategy(settings, self._federation)
        self._stages = settings.stages
        self._plan = PrivacyPlan(settings, self._strategy)
        self._places = [
            _Place.of(each, settings, self._device, first_weights_of(settings, data, view))
            for view, each in enumerate((data, *data.views))
        ]
        self._label_counts = data.label_counts(true=True)
        self._clock = clock_of(settings, data)
        self._networks = networks_of(self._strategy)
        self._faults = FaultPlan(settings.faults, settings.seed, simulated=self._clock is not None)

    def serve(
        self,
        call: CohortCall,
        received: Sequence[Payload | None],
        states: Sequence[ClientState | None],
    ) -> Served:
        """Carry out a call whatever happens: who fails is named, the others are served.

        Where a cohort fails as a whole its members are tried one by one.

        Args:
            call: phase, round and clients.
            received: what each client received.
            states: each client's state, None before its first training.
        """
        started = time.perf_counter()
        answers: dict[int, ClientReply | str] = {}
        new_states: dict[int, ClientState] = {}
        allowed = self._settings.engine.deadline_s
        split = ""
        groups = [self._standing(call, answers)]
        while groups:
            group = groups.pop(0)
            if not group:
                continue
            clients = tuple(call.clients[position] for position in group)
            try:
                # A client alone has one deadline for all that it does.
                spent = time.perf_counter() - started if len(call.clients) == 1 else 0.0
                with deadline(max(allowed - spent, 1e-6), allowed):
                    replies, trained = self.run(
                        call.of(group),
                        Received([received[position] for position in group]),
                        [states[position] for position in group],
                    )
            except Exception as error:
                if len(group) > 1 and not isinstance(error, DeadlineError):
                    groups[:0] = [[position] for position in group]
                    split = f"{type(error).__name__}: {error}"
                else:
                    reason = _reason(error)
                    answers.update(dict.fromkeys(clients, reason))
                continue
            new_states.update(zip(clients, trained, strict=False))
            for client, reply in zip(clients, replies, strict=True):
                late = self._too_late(reply)
                if late is not None:
                    answers[client] = late
                    new_states.pop(client, None)
                    continue
                answers[client] = self._sent(call, client, reply)
        in_order = [answers[client] for client in call.clients]
        return Served(in_order, new_states, time.perf_counter() - started, split)

    def _standing(self, call: CohortCall, answers: dict[int, ClientReply | str]) -> list[int]:
        """Return the positions of the clients that no planned fault keeps from answering."""
        standing = []
        for position, client in enumerate(call.clients):
            try:
                with deadline(self._settings.engine.deadline_s):
                    self._faults.strike(call.phase, call.round, client, call.attempt, call.deaths)
            except Exception:
                answers[client] = traceback.format_exc()
            else:
                standing.append(position)
        return standing

    def _too_late(self, reply: ClientReply) -> str | None:
        """Return why an answer comes too late by the simulated clock, or None."""
        if self._clock is None or "simulated_s" not in reply.metrics:
            return None
        return self._clock.too_late(reply.metrics["simulated_s"])

    def _sent(self, call: CohortCall, client: int, reply: ClientReply) -> ClientReply:
        """Return the reply as it leaves the client, spoilt where that is planned."""
        for name, rng in self._faults.spoilers(call.phase, call.round, client, call.attempt):
            reply = BAD_REPLIES[name](reply, rng)
        return reply

    def run(
        self,
        call: CohortCall,
        received: Received,
        states: Sequence[ClientState | None],
    ) -> tuple[list[ClientReply], list[ClientState]]:
        """Carry out a call.

        Args:
            call: phase, round and clients; the clients share one architecture.
            received: what each of them received.
            states: each client's state, None before its first training.

        Returns:
            A reply per client, and the states after training (none for other phases).
        """
        match call.phase:
            case "query":
                replies = [
                    ClientReply(metrics={"partition": float(client)}, round=call.round)
                    for client in call.clients
                ]
                return replies, []
            case "train":
                return self._train(call, received, states)
            case "evaluate":
                return self._evaluate(call, received, states), []

    def initial_state(self, client: int) -> ClientState:
        """Return the state that a client starts from."""
        return self._cohort(CohortCall("train", 1, (client,)), [None]).states()[0]

    def measure(self, clients: Sequence[int]) -> dict[str, Any]:
        """Time both backends on the first steps of these clients; see `measure_backends`."""
        place = self._place(clients)
        times = measure_backends(
            self._members(clients, [None] * len(clients)),
            model=self._strategy.architecture(clients[0]),
            optimizer=self._settings.clients.optimizer,
            data=place.tensors,
            pool=place.pool,
            passes=self._federation.local,
            seed=self._settings.seed,
            objective=self._strategy.composed(),
        )
        model = self._federation.models[clients[0]]
        return {"model": model.label, "members": len(clients), **asdict(times)}

    def _members(
        self, clients: Sequence[int], states: Sequence[ClientState | None]
    ) -> list[Member]:
        return [
            Member(client, self._strategy.private_rows(client, self._seen_by(client)), state)
            for client, state in zip(clients, states, strict=True)
        ]

    def _seen_by(self, client: int) -> FederatedData:
        """Return the data that a client may choose its rows from.

        An upper bound may give a client more than its own; those of one that is left out only it
        learns from.
        """
        return self._data if client in self._left_out else self._others_data

    def _place(self, clients: Sequence[int]) -> "_Place":
        """Return what clients of one architecture, and so of one view, learn from."""
        return self._places[self._federation.view_of(clients[0])]

    def _cohort(self, call: CohortCall, states: Sequence[ClientState | None]) -> Cohort:
        place = self._place(call.clients)
        return open_cohort(
            self._members(call.clients, states),
            backend=call.backend,
            model=self._strategy.architecture(call.clients[0]),
            optimizer=self._settings.clients.optimizer,
            data=place.tensors,
            pool=place.pool,
            streams=Streams(
                seed=self._settings.seed, round=call.round, rounds=self._settings.rounds
            ),
            private=self._private_learning(call, states) if call.phase == "train" else None,
        )

    def _private_learning(
        self, call: CohortCall, states: Sequence[ClientState | None]
    ) -> PrivateLearning | None:
        """Return how the members learn by DP-SGD, where that protects them."""
        rule = self._stages.release
        if not isinstance(rule, DPSGD):
            return None
        plan = self._plan
        steps = [
            plan.learning(client, first=state is None)
            for client, state in zip(call.clients, states, strict=True)
        ]
        return PrivateLearning(
            clip=rule.clip,
            batch_size=self._federation.local.batch_size,
            noise_multipliers=tuple(plan.noise(client) for client in call.clients),
            most_steps=tuple(each.steps for each in steps),
            attempt=call.attempt,
        )

    def _call(self, call: CohortCall, states: Sequence[ClientState | None]) -> Call:
        fresh = tuple(state is None for state in states)
        return Call(self._federation, call.round, call.orders, fresh)

    def _turn(self, call: CohortCall, states: Sequence[ClientState | None]) -> ClientTurn:
        """Return the exchange of a call."""
        since = call.since or (0,) * len(call.clients)
        levels = call.levels or (NO_BUDGET,) * len(call.clients)
        return ClientTurn(
            self._stages,
            seed=self._settings.seed,
            round=call.round,
            attempt=call.attempt,
            clients={
                client: Standing(
                    {} if state is None else state.arrays, own, chosen, self._plan.releases(client)
                )
                for client, state, own, chosen in zip(
                    call.clients, states, since, levels, strict=True
                )
            },
        )

    def _train(
        self, call: CohortCall, received: Received, states: Sequence[ClientState | None]
    ) -> tuple[list[ClientReply], list[ClientState]]:
        started = time.perf_counter()
        turn = self._turn(call, states)
        came = received
        received = _opened(turn, call, received)
        cohort = self._cohort(call, states)
        answers = self._strategy.client(cohort, received, self._call(call, states))
        if answers and len(answers) != len(call.clients):
            raise ValueError(
                f"{type(self._strategy).__name__}.client answered {len(answers)} payloads for "
                f"{len(call.clients)} clients: return one for each, or none at all"
            )
        odd = [type(answer).__name__ for answer in answers if not isinstance(answer, Payload)]
        if odd:
            raise TypeError(
                f"{type(self._strategy).__name__}.client answered a {odd[0]}, expected a payload "
                "for each client"
            )
        sent = turn.send(dict(zip(call.clients, answers, strict=True)) if answers else {})
        new_states = cohort.states()
        for client, arrays in turn.kept().items():
            position = call.clients.index(client)
            new_states[position] = with_exchange(new_states[position], arrays)
        seconds = (time.perf_counter() - started) / len(call.clients)
        replies = [
            ClientReply(
                payload=sent.get(client),
                metrics={
                    **terms,
                    "seconds": seconds,
                    **Effort.of(cohort.work[position], self._networks).metrics,
                    **self._clocked(call, position, came, cohort.work[position], sent.get(client)),
                },
                round=call.round,
            )
            for position, (client, terms) in enumerate(
                zip(call.clients, cohort.metrics(), strict=True)
            )
        ]
        return replies, new_states

    def _clocked(
        self,
        call: CohortCall,
        position: int,
        came: Received,
        work: Work,
        sent: Payload | None,
    ) -> dict[str, float]:
        """Return what a client's round took by the simulated clock; nothing where there is none.

        Args:
            call: of the round.
            position: of the client in it.
            came: what the members received, encoded.
            work: what the client's models did.
            sent: what it sends, encoded.
        """
        if self._clock is None:
            return {}
        client = call.clients[position]
        down = (came[position], call.orders[position] if call.orders else None)
        spent = self._clock.spent(
            client,
            work,
            bytes_down=sum(piece.payload_bytes for piece in down if piece is not None),
            bytes_up=0 if sent is None else sent.payload_bytes,
            delay_s=self._faults.delay_s(call.phase, call.round, client, call.attempt),
        )
        return spent.metrics

    def _evaluate(
        self, call: CohortCall, received: Received, states: Sequence[ClientState | None]
    ) -> list[ClientReply]:
        received = _opened(self._turn(call, states), call, received)
        cohort = self._cohort(call, states)
        strategy = self._strategy
        strategy.before_evaluation(cohort, received, self._call(call, states))
        place = self._place(call.clients)
        test_scores = strategy.scores(cohort, received, place.test_inputs)
        validation_scores = strategy.scores(cohort, received, place.validation_inputs)
        own_scores = self._own_scores(cohort, received, call.clients)
        goal, aimed = place.goal, None
        if goal is not None:
            inputs = as_tensor(goal.inputs).to(self._device)
            aimed = strategy.scores(cohort, received, inputs)
        replies = []
        for position, client in enumerate(call.clients):
            mix = self._label_counts[client] / max(self._label_counts[client].sum(), 1)
            metrics = judge(
                place.data,
                test_scores[position],
                validation_scores[position],
                mix,
                own_scores.get(position),
                are_logits=strategy.scores_are_logits,
            )
            if goal is not None and aimed is not None:
                metrics[ATTACK_SUCCESS] = goal.success(aimed[position])
            probabilities = None
            if sends_answers(strategy, self._data, self._settings, call.round):
                probabilities = F.softmax(torch.from_numpy(test_scores[position]), -1).numpy()
            replies.append(ClientReply(None, metrics, probabilities, call.round))
        return replies

    def _own_scores(
        self, cohort: Cohort, received: Received, clients: Sequence[int]
    ) -> dict[int, np.ndarray]:
        """Return the scores of members, by position, on test rows under their own shift."""
        shifts = self._data.client_shifts
        if shifts is None:
            return {}
        found: dict[int, np.ndarray] = {}
        places = shifts.of_client[list(clients)]
        for place in np.unique(places):
            inputs = shifts.test_inputs[place]
            if inputs is None:
                continue
            scores = self._strategy.scores(cohort, received, as_tensor(inputs).to(self._device))
            found |= {int(at): scores[at] for at in np.flatnonzero(places == place)}
        return found


def _opened(turn: ClientTurn, call: CohortCall, received: Received) -> Received:
    """Return what the members received, decoded."""
    if not received:
        return received
    opened = turn.open(dict(zip(call.clients, received, strict=True)))
    return Received([opened[client] for client in call.clients])


def with_exchange(state: ClientState, arrays: Mapping[str, np.ndarray]) -> ClientState:
    """Return a client's state with what its codecs keep from now on."""
    others = {name: a for name, a in state.arrays.items() if not name.startswith(PREFIX)}
    return replace(state, arrays={**others, **arrays})


def judge(
    data: FederatedData,
    test_scores: np.ndarray,
    validation_scores: np.ndarray,
    label_mix: np.ndarray | None = None,
    own_scores: np.ndarray | None = None,
    *,
    are_logits: bool = True,
) -> dict[str, float]:
    """Return accuracy, recall and calibration error on the test split, and validation accuracy.

    Args:
        data: the run's data.
        test_scores: logits or probabilities ``[test_rows, classes]``.
        validation_scores: the same ``[validation_rows, classes]``.
        label_mix: a client's share of each class, for its accuracy under that mix.
        own_scores: scores on the test rows as that client sees them, for the same; ``None``: as
            everybody does.
        are_logits: whether the scores are; of others there is no calibration error.

    Raises:
        NotFiniteError: if a score is NaN: the largest of a row would be the first that is none.
    """
    for split, scores in (
        ("test", test_scores),
        ("validation", validation_scores),
        ("test", own_scores),
    ):
        if scores is not None and np.isnan(scores).any():
            raise NotFiniteError(f"the model predicts NaN for rows of the {split} split")
    counts = confusion_counts(data.test_labels, test_scores.argmax(-1), data.num_classes)
    metrics = {
        "accuracy": accuracy(counts),
        "macro_recall": macro_recall(counts),
        "worst_class_recall": worst_class_recall(counts),
        "validation_accuracy": float(
            (validation_scores.argmax(-1) == data.validation_labels).mean()
        ),
    }
    if are_logits:
        metrics[CALIBRATION_ERROR] = calibration_error_of_logits(test_scores, data.test_labels)
    if label_mix is not None:
        if own_scores is not None:
            counts = confusion_counts(data.test_labels, own_scores.argmax(-1), data.num_classes)
        metrics["personal_accuracy"] = personal_accuracy(counts, label_mix)
    return metrics
