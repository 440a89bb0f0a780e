"""What every federated algorithm is made of: a plan for each round, a client half, a server half.

An algorithm is one file. Its client half runs on workers over a cohort of clients; its server
half runs once, beside the round loop. Both are built from the same settings, so the only thing
that travels in a round is its number, what a client receives and what it uploads.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from fedkd.data import FederatedData
from fedkd.models import ModelSettings
from fedkd.randomness import Purpose, generator_for
from fedkd.training import (
    MODEL,
    Arrays,
    Cohort,
    LoopCohort,
    Member,
    ModelPool,
    Objective,
    OptimizerSettings,
    Passes,
    PublicLesson,
    Streams,
    TrainingData,
    initial_model_seed,
)
from strategies.knowledge import Broadcast, ClientUpload, Knowledge, Predictions


class StrategySettings(BaseModel):
    """Settings under ``strategy:``; each algorithm adds its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Federation:
    """The constants of a run that every algorithm needs; same on the server and on workers.

    Attributes:
        models: each client's model, by partition id.
        public_size: rows of the public set.
        rows_per_round: public rows exchanged in a round; ``public_size`` exchanges all of them.
        public_labelled: whether the public set has labels.
        num_examples: private rows of each client.
    """

    seed: int
    rounds: int
    participation: float
    models: tuple[ModelSettings, ...]
    local: Passes
    public_size: int
    rows_per_round: int
    public_labelled: bool
    num_classes: int
    num_examples: tuple[int, ...]

    @property
    def num_clients(self) -> int:
        """Registered clients."""
        return len(self.models)

    @property
    def architectures(self) -> tuple[str, ...]:
        """A key for each client's architecture; clients with equal keys can exchange weights."""
        return tuple(model.key for model in self.models)

    def plan(self, round: int) -> "RoundPlan":
        """Return what round ``round`` (1-based) is: pure, so both sides agree without a message."""
        return RoundPlan(self, round)


@dataclass(frozen=True)
class RoundPlan:
    """One round as both halves see it."""

    federation: Federation
    round: int

    @property
    def progress(self) -> float:
        """0 in the first round, 1 in the last: where schedules are read."""
        return (self.round - 1) / max(self.federation.rounds - 1, 1)

    @property
    def local(self) -> Passes:
        """The round's training on private rows: ``clients.local``."""
        return self.federation.local

    @property
    def public_rows(self) -> np.ndarray:
        """The public rows of this round: sorted int64 positions, the same for every client."""
        size, take = self.federation.public_size, self.federation.rows_per_round
        if take >= size:
            return np.arange(size)
        rng = generator_for(self.federation.seed, Purpose.PUBLIC_ROWS, self.round)
        return np.sort(rng.choice(size, take, replace=False))

    def next(self) -> "RoundPlan":
        """The plan of the round in which this round's aggregate is learnt from."""
        return self.federation.plan(min(self.round + 1, self.federation.rounds))

    def public(self, received: Predictions, *, epochs: int = 1) -> PublicLesson:
        """The lesson of what was received: its public rows and targets."""
        passes = Passes(batch_size=self.local.batch_size, epochs=epochs)
        return PublicLesson(rows=received.rows, targets=received.values, passes=passes)

    def labelled_public(self, *, epochs: int) -> PublicLesson:
        """The whole labelled public set, for pre-training."""
        passes = Passes(batch_size=self.local.batch_size, epochs=epochs)
        return PublicLesson(
            rows=np.arange(self.federation.public_size), targets=None, passes=passes
        )

    def participants(self) -> tuple[int, ...]:
        """Draw the round's clients by partition id: sorted, at least one."""
        total = self.federation.num_clients
        take = max(1, round(self.federation.participation * total))
        if take == total:
            return tuple(range(total))
        rng = generator_for(self.federation.seed, Purpose.PARTICIPANTS, self.round)
        return tuple(int(client) for client in np.sort(rng.choice(total, take, replace=False)))


class Server:
    """What the server half may use: the public set, and models of its own trained in place.

    In a simulation the server can also reach private rows. Only upper bounds and teachers that
    say so in their settings do (`train_rows`).
    """

    ID = 2**31
    """Stands for the server where streams and states are keyed by client."""

    def __init__(
        self,
        *,
        federation: Federation,
        data: FederatedData,
        optimizer: OptimizerSettings,
        device: torch.device,
    ) -> None:
        self.federation = federation
        self.data = data
        self._optimizer = optimizer
        self._tensors = TrainingData.from_arrays(data, device)
        self._pool = ModelPool(self._tensors, optimizer)

    def model(
        self, settings: ModelSettings, *, train_rows: np.ndarray | None = None
    ) -> "ServerModel":
        """Return a new model on the server, with initial weights from the run's seed."""
        rows = np.empty(0, np.int64) if train_rows is None else train_rows
        return ServerModel(self, settings, rows)

    def initial_weights(self, client: int) -> Arrays:
        """Return the weights that a client starts from."""
        seed = initial_model_seed(self.federation.seed, client)
        state = self._pool.initial_state(self.federation.models[client], seed)
        return state.models[MODEL].weights


class ServerModel:
    """A model that the server trains: a cohort of one that lives as long as the run."""

    def __init__(self, server: Server, settings: ModelSettings, train_rows: np.ndarray) -> None:
        self._server = server
        self._settings = settings
        self._member = Member(Server.ID, train_rows)

    def _cohort(self, plan: RoundPlan | None) -> LoopCohort:
        federation = self._server.federation
        return LoopCohort(
            [self._member],
            model=self._settings,
            optimizer=self._server._optimizer,
            data=self._server._tensors,
            pool=self._server._pool,
            streams=Streams(
                seed=federation.seed,
                purpose=Purpose.TEACHER if plan is None else Purpose.SERVER,
                round=1 if plan is None else plan.round,
                rounds=1 if plan is None else federation.rounds,
            ),
        )

    def fit(
        self,
        objective: Objective,
        *,
        plan: RoundPlan | None,
        private: Passes | None = None,
        public: PublicLesson | None = None,
    ) -> None:
        """Train in place; ``plan`` is None before the first round."""
        cohort = self._cohort(plan)
        cohort.fit(objective, private=private, public=public)
        self._member = Member(Server.ID, self._member.rows, cohort.states()[0])

    def predict(self, inputs: torch.Tensor) -> np.ndarray:
        """Return float32 logits ``[rows, classes]``."""
        logits: np.ndarray = self._cohort(None).predict(inputs)[0]
        return logits

    def predict_public(self, rows: np.ndarray) -> np.ndarray:
        """Return float32 logits ``[rows, classes]`` on positions of the public set."""
        logits: np.ndarray = self._cohort(None).predict_public(rows)[0]
        return logits


UploadKind = Literal["nothing", "predictions", "parameters"]

SettingsT = TypeVar("SettingsT", bound=StrategySettings)


class DistillationStrategy(ABC, Generic[SettingsT]):
    """One federated algorithm.

    Subclasses name their settings class, say what clients upload, and implement both halves.
    """

    Settings: ClassVar[type[StrategySettings]]
    uploads: UploadKind = "nothing"
    """What clients send; where they send predictions, the ensemble's accuracy is measured."""

    judges_received: ClassVar[bool] = False
    """Whether `before_evaluation` needs what the server last sent."""
    needs_public: ClassVar[bool] = False
    """Whether the algorithm cannot run without a public set."""

    def __init__(self, settings: SettingsT, federation: Federation) -> None:
        self.settings = settings
        self.federation = federation

    # -- server half ---------------------------------------------------------------------

    def participants(self, plan: RoundPlan) -> tuple[int, ...]:
        """Choose who takes part in a round."""
        return plan.participants()

    def prepare(self, server: Server) -> Broadcast:
        """Do what comes before the first round and say what clients receive in it."""
        return Broadcast()

    @abstractmethod
    def aggregate(
        self, uploads: Iterable[ClientUpload], plan: RoundPlan, server: Server
    ) -> Broadcast:
        """Fold a round's uploads, in client order, into what the next round receives."""

    def server_model(self) -> ServerModel | None:
        """Return the server's own model, where the algorithm has one to evaluate."""
        return None

    # -- client half ---------------------------------------------------------------------

    def private_rows(self, client: int, data: FederatedData) -> np.ndarray:
        """Return the row ids that this client trains on."""
        return data.client_rows[client]

    @abstractmethod
    def client_round(
        self, cohort: Cohort, received: Knowledge | None, plan: RoundPlan
    ) -> Sequence[Knowledge]:
        """Learn and answer: one piece of knowledge a member, or an empty sequence."""

    def before_evaluation(self, cohort: Cohort, received: Knowledge | None) -> None:
        """Put the model to be judged in place; by default it is the client's own."""


def upload_logits(cohort: Cohort, rows: np.ndarray) -> list[Knowledge]:
    """Let each member predict public rows and send the logits."""
    return [
        Predictions(kind="logits", rows=rows, values=values)
        for values in cohort.predict_public(rows)
    ]


def predictions_of(uploads: Iterable[ClientUpload]) -> Iterable[tuple[ClientUpload, Predictions]]:
    """Pass on uploads that must be predictions."""
    for upload in uploads:
        if not isinstance(upload.knowledge, Predictions):
            raise TypeError(f"expected predictions from client {upload.client}")
        yield upload, upload.knowledge
