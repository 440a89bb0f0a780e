"""The client side of a run: carries out one call for one cohort, wherever it runs.

A Ray worker, the inline grid and Flower's own runtimes all hold a `ClientRuntime`. It keeps
data and models at hand but nothing that matters: the clients' states come in and go out.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from fedkd.data import FederatedData
from fedkd.metrics.classification import (
    accuracy,
    confusion_counts,
    macro_recall,
    personal_accuracy,
    worst_class_recall,
)
from fedkd.training import (
    ClientState,
    LoopCohort,
    Member,
    ModelPool,
    Streams,
    TrainingData,
    as_tensor,
)
from sim.settings import Settings
from strategies import STRATEGIES
from strategies.base import DistillationStrategy, StrategySettings
from strategies.knowledge import Knowledge, Predictions
from strategies.plan import Federation

Phase = Literal["query", "train", "evaluate"]


@dataclass(frozen=True, slots=True)
class CohortCall:
    """What a worker is asked to do: one phase of one round for some clients."""

    phase: Phase
    round: int
    clients: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ClientReply:
    """One client's answer.

    Attributes:
        knowledge: what it uploads; None where the algorithm uploads nothing.
        metrics: plain numbers for the record; part of the simulation, not of the exchange.
        test_probabilities: float32 ``[test_rows, classes]`` where the ensemble is measured.
    """

    knowledge: Knowledge | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    test_probabilities: np.ndarray | None = None


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
        num_examples=tuple(len(rows) for rows in data.client_rows),
    )


def build_strategy(
    settings: Settings, federation: Federation
) -> DistillationStrategy[StrategySettings]:
    """Return the algorithm that the settings name."""
    return STRATEGIES[settings.strategy.name](settings.strategy, federation)


def fix_numerics(device: torch.device) -> None:
    """Make this process compute the same bits whatever else the machine is doing."""
    # One thread: how a sum is split over threads changes its last bit, and small models are
    # an order of magnitude slower with two.
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False


class ClientRuntime:
    """Holds a run's data, models and algorithm, and serves any of its clients."""

    def __init__(
        self, settings: Settings, data: FederatedData, device: torch.device | None = None
    ) -> None:
        self._device = device or torch.device("cpu")
        fix_numerics(self._device)
        self._settings = settings
        self._data = data
        self._federation = federation_of(settings, data)
        self._strategy = build_strategy(settings, self._federation)
        self._tensors = TrainingData.from_arrays(data, self._device)
        self._pool = ModelPool(self._tensors, settings.clients.optimizer)
        self._test_inputs = as_tensor(data.test_inputs).to(self._device)
        self._validation_inputs = as_tensor(data.validation_inputs).to(self._device)
        self._label_counts = data.label_counts()

    def run(
        self,
        call: CohortCall,
        received: Knowledge | None,
        states: Sequence[ClientState | None],
    ) -> tuple[list[ClientReply], list[ClientState]]:
        """Carry out a call.

        Args:
            call: phase, round and clients; the clients share one architecture.
            received: what they received: one piece for all, or predictions stacked by client.
            states: each client's state, None before its first training.

        Returns:
            A reply per client, and the states after training (none for other phases).
        """
        match call.phase:
            case "query":
                replies = [ClientReply(metrics={"partition": float(c)}) for c in call.clients]
                return replies, []
            case "train":
                return self._train(call, received, states)
            case "evaluate":
                return self._evaluate(call, received, states), []

    def initial_state(self, client: int) -> ClientState:
        """Return the state that a client starts from."""
        return self._cohort((client,), 1, [None]).states()[0]

    def _cohort(
        self, clients: Sequence[int], round: int, states: Sequence[ClientState | None]
    ) -> LoopCohort:
        members = [
            Member(client, self._strategy.private_rows(client, self._data), state)
            for client, state in zip(clients, states, strict=True)
        ]
        return LoopCohort(
            members,
            model=self._federation.models[clients[0]],
            optimizer=self._settings.clients.optimizer,
            data=self._tensors,
            pool=self._pool,
            streams=Streams(seed=self._settings.seed, round=round, rounds=self._settings.rounds),
        )

    def _train(
        self, call: CohortCall, received: Knowledge | None, states: Sequence[ClientState | None]
    ) -> tuple[list[ClientReply], list[ClientState]]:
        started = time.perf_counter()
        plan = self._federation.plan(call.round)
        cohort = self._cohort(call.clients, call.round, states)
        uploads = self._strategy.client_round(cohort, received, plan)
        new_states = cohort.states()
        seconds = (time.perf_counter() - started) / len(call.clients)
        replies = [
            ClientReply(
                knowledge=uploads[position] if uploads else None,
                metrics={**terms, "seconds": seconds},
            )
            for position, terms in enumerate(cohort.metrics())
        ]
        return replies, new_states

    def _evaluate(
        self, call: CohortCall, received: Knowledge | None, states: Sequence[ClientState | None]
    ) -> list[ClientReply]:
        cohort = self._cohort(call.clients, call.round, states)
        self._strategy.before_evaluation(cohort, received)
        test_logits = cohort.predict(self._test_inputs)
        validation = cohort.predict(self._validation_inputs).argmax(-1)
        replies = []
        for position, client in enumerate(call.clients):
            mix = self._label_counts[client] / max(self._label_counts[client].sum(), 1)
            metrics = judge(self._data, test_logits[position], validation[position], mix)
            probabilities = None
            if self._strategy.uploads == "predictions":
                probabilities = F.softmax(torch.from_numpy(test_logits[position]), -1).numpy()
            replies.append(ClientReply(metrics=metrics, test_probabilities=probabilities))
        return replies


def judge(
    data: FederatedData,
    test_scores: np.ndarray,
    validation_classes: np.ndarray,
    label_mix: np.ndarray | None = None,
) -> dict[str, float]:
    """Return accuracy and recall on the test split, and accuracy on the validation split.

    Args:
        data: the run's data.
        test_scores: logits or probabilities ``[test_rows, classes]``.
        validation_classes: predicted classes of the validation rows.
        label_mix: a client's share of each class, for its accuracy under that mix.
    """
    counts = confusion_counts(data.test_labels, test_scores.argmax(-1), data.num_classes)
    metrics = {
        "accuracy": accuracy(counts),
        "macro_recall": macro_recall(counts),
        "worst_class_recall": worst_class_recall(counts),
        "validation_accuracy": float((validation_classes == data.validation_labels).mean()),
    }
    if label_mix is not None:
        metrics["personal_accuracy"] = personal_accuracy(counts, label_mix)
    return metrics


def stack_received(received: Sequence[Knowledge | None]) -> Knowledge | None:
    """Make one piece of knowledge of what a cohort's members received.

    One object for all is passed on as it is; predictions that differ are stacked by member.
    """
    first = received[0]
    if all(other is first for other in received):
        return first
    predictions = [piece for piece in received if isinstance(piece, Predictions)]
    if len(predictions) < len(received):
        raise ValueError("a cohort's members must receive the same parameters, or predictions")
    return Predictions(
        kind=predictions[0].kind,
        rows=predictions[0].rows,
        values=np.stack([piece.values for piece in predictions]),
        temperature=predictions[0].temperature,
    )
