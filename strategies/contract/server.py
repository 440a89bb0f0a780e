"""The server's side of a simulation: what it may see, and models of its own."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fedkd.data import FederatedData
from fedkd.exchange.payload import Asked
from fedkd.exchange.payloads import Weights
from fedkd.exchange.values import Value
from fedkd.inputs import Shape
from fedkd.losses.response import hard_label_loss
from fedkd.models import ModelSettings
from fedkd.randomness import Purpose
from fedkd.trained.beginnings import weights_from
from fedkd.training import (
    MODEL,
    PARTS,
    Arrays,
    ClientState,
    ComposedObjective,
    LoopCohort,
    Member,
    ModelPool,
    ObjectiveFunction,
    OptimizerSettings,
    Passes,
    PublicLesson,
    RowOutputs,
    Streams,
    Table,
    TrainingData,
    Work,
    as_tensor,
    check_state,
    initial_model_seed,
)
from fedkd.training.pool import NO_WEIGHTS
from strategies.contract.round import Federation, Round

SERVER_ID = 2**31
"""Stands for the server's first model where streams and states are keyed by client; its second
model is the next number, and so on."""


class ServerModelSettings(NamedTuple):
    """What one of the server's models is.

    Attributes:
        model: its architecture.
        optimizer: of its own; None: that of the clients.
        input_shape: of one row, where it does not learn from images of the run but from features.
    """

    model: ModelSettings
    optimizer: OptimizerSettings | None = None
    input_shape: Shape | None = None


@dataclass(frozen=True)
class ServerModel(Value):
    """One of the server's models at one moment; training returns another.

    Attributes:
        name: which of `Strategy.server_models` it is.
        arrays: its weights, and what its optimizer remembers.
    """

    name: str
    arrays: Mapping[str, np.ndarray]

    @property
    def weights(self) -> Arrays:
        """Parameters and buffers by name."""
        return ClientState.from_arrays(self.arrays).models[MODEL].weights


class Brought(NamedTuple):
    """Weights that were trained elsewhere.

    Attributes:
        path: of a safetensors file.
        model: whose weights they are to be.
    """

    path: Path
    model: ModelSettings


class FinishedModel(NamedTuple):
    """A model of the server's that a run may keep as a file.

    Attributes:
        model: its architecture; it takes the run's inputs.
        weights: parameters and buffers by name.
    """

    model: ModelSettings
    weights: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class GivenRows:
    """Rows that the server was given, and that are no images of the run.

    Attributes:
        inputs: float32 ``[rows, *shape]``.
        labels: int64 ``[rows]``.
    """

    inputs: np.ndarray
    labels: np.ndarray


@dataclass
class Trained:
    """What training on the server came to.

    Attributes:
        model: as it is now.
        outputs: what it put out for the rows while it trained, where they were kept.
    """

    model: ServerModel
    outputs: RowOutputs | None = None


class ServerTools:
    """What the server half may use: the public set, validation rows, and models of its own.

    In a simulation the server can also reach private rows. Only upper bounds and teachers that
    say so in their settings do.
    """

    def __init__(
        self,
        *,
        federation: Federation,
        data: FederatedData,
        optimizer: OptimizerSettings,
        device: torch.device,
        models: Mapping[str, ServerModelSettings] | None = None,
        first_weights: Mapping[str, Arrays] = NO_WEIGHTS,
    ) -> None:
        self.federation = federation
        self.data = data
        self._models = dict(models or {})
        self._optimizer = optimizer
        self._device = device
        self._tensors = TrainingData.from_arrays(data, device)
        self._pool = ModelPool(self._tensors, optimizer)
        self._clients_pool = ModelPool(self._tensors, optimizer, first_weights)
        self._pools: dict[str, ModelPool] = {}
        self._asked: dict[str, Asked] = {}
        self._work = Work()

    def take_work(self) -> Work:
        """Return what went through models on the server since this was asked last."""
        work, self._work = self._work, Work()
        return work

    # -- models ----------------------------------------------------------------------------

    def new(self, name: str, weights: Mapping[str, np.ndarray] | None = None) -> ServerModel:
        """Return one of the server's models with first weights from the run's seed, or with these.

        Its optimizer remembers nothing.
        """
        state = self._first_state(name)
        model = ServerModel(name, state.to_arrays())
        return model if weights is None else self.with_weights(model, weights)

    def with_weights(self, model: ServerModel, weights: Mapping[str, np.ndarray]) -> ServerModel:
        """Return the model with other parameters and buffers; its optimizer remembers nothing.

        Raises:
            ValueError: for weights of another architecture.
        """
        cohort = self._cohort(model, None)
        cohort.load_weights(weights)
        cohort.reset_optimizers()
        return self._after(model, cohort)

    def fit(
        self,
        model: ServerModel,
        objective: ObjectiveFunction | ComposedObjective,
        *,
        round: Round | None,
        private: Passes | None = None,
        rows: np.ndarray | GivenRows | None = None,
        public: PublicLesson | None = None,
        tables: Mapping[str, Table] | None = None,
        keep_outputs: bool = False,
    ) -> Trained:
        """Train, and return the model as it is then; the one that was given stays as it was.

        Args:
            model: to begin with.
            objective: what is minimised.
            round: in which this is; None: before the first.
            private: how to walk through ``rows``.
            rows: ids of training rows, or rows that were given.
            public: public rows and what to learn about them.
            tables: handed into the objective.
            keep_outputs: return what the model put out for the rows while it trained.
        """
        given, ids = (None, rows) if not isinstance(rows, GivenRows) else (rows, None)
        if given is not None:
            ids = np.arange(len(given.labels))
        cohort = self._cohort(model, round, ids, given)
        kept = cohort.fit(
            objective, private=private, public=public, tables=tables, keep_outputs=keep_outputs
        )
        return Trained(self._after(model, cohort), kept[0] if kept else None)

    def fit_while_better(
        self,
        model: ServerModel,
        objective: ObjectiveFunction | ComposedObjective,
        *,
        round: Round,
        public: PublicLesson,
        patience: int,
        every: int,
    ) -> Trained:
        """Train on public rows for as long as accuracy on validation rows gets better.

        Args:
            model: to begin with.
            objective: what is minimised.
            round: in which this is.
            public: public rows; their passes say after how many steps to stop in any case.
            patience: steps without a better accuracy after which to stop, >= 1.
            every: steps between two looks at the validation rows, >= 1.

        Returns:
            The model that was best, which may be the one to begin with.
        """
        cohort = self._cohort(model, round)
        best, best_model = self._accuracy(cohort), model
        left = public.passes.count(len(public.rows))
        since = 0
        while left and since < patience:
            steps = min(every, left)
            passes = replace(public.passes, steps=steps)
            cohort.fit(objective, public=replace(public, passes=passes))
            left, since = left - steps, since + steps
            accuracy = self._accuracy(cohort)
            if accuracy > best:
                best, best_model, since = accuracy, self._after(model, cohort), 0
        return Trained(best_model)

    def predict(self, model: ServerModel, inputs: torch.Tensor) -> np.ndarray:
        """Return float32 logits ``[rows, classes]``, in evaluation mode."""
        logits: np.ndarray = self._cohort(model, None).predict(inputs)[0]
        return logits

    def predict_public(self, model: ServerModel, rows: np.ndarray) -> np.ndarray:
        """Return float32 logits ``[rows, classes]`` on positions of the public set."""
        logits: np.ndarray = self._cohort(model, None).predict_public(rows)[0]
        return logits

    def validation_accuracy(self, model: ServerModel) -> float:
        """Return the share of validation rows that the model gets right: what may select it."""
        return self._accuracy(self._cohort(model, None))

    def read(self, brought: Brought, setting: str) -> Arrays:
        """Return weights that were trained elsewhere.

        Raises:
            ValueError: naming the setting, the file and what does not fit.
        """
        return weights_from(
            brought.path,
            brought.model,
            input_shape=self.data.input_shape,
            class_names=self.data.class_names,
            setting=setting,
        )

    # -- clients' models -------------------------------------------------------------------

    def initial_weights(self, client: int, model: str | None = None) -> Arrays:
        """Return the weights that a client starts from; without a name its only model's."""
        seed = initial_model_seed(self.federation.seed, client)
        state = self._clients_pool.initial_state(self.federation.models[client], seed)
        return state.models[model or MODEL].weights

    def asked_weights(self, model: ModelSettings) -> Asked:
        """Describe an upload of the weights of a model."""
        if model.key not in self._asked:
            state = self._pool.initial_state(model, seed=0)
            self._asked[model.key] = Weights.asked(state.models[MODEL].weights)
        return self._asked[model.key]

    def predict_with(
        self, model: ModelSettings, weights: Mapping[str, np.ndarray], rows: np.ndarray
    ) -> np.ndarray:
        """Return the logits on public rows of a model that somebody sent, in evaluation mode."""
        logits: np.ndarray = self._sent(model, weights).predict_public(rows)[0]
        return logits

    def accuracy_with(self, model: ModelSettings, weights: Mapping[str, np.ndarray]) -> float:
        """Return the share of validation rows that a model gets right that somebody sent."""
        return self._accuracy(self._sent(model, weights))

    def loss_with(self, model: ModelSettings, weights: Mapping[str, np.ndarray]) -> float:
        """Return the mean cross-entropy on validation rows of a model that somebody sent."""
        logits = as_tensor(self._validated(self._sent(model, weights)))
        return hard_label_loss(logits, as_tensor(self.data.validation_labels)).item()

    # -- what was kept ---------------------------------------------------------------------

    def check_kept(self, model: ServerModel) -> None:
        """Refuse a model that the server of this run cannot have; its numbers may be any.

        Raises:
            ValueError: naming the model and the array.
        """
        settings = self._settings(model.name)
        like = self._first_state(model.name)
        optimizer = settings.optimizer or self._optimizer
        state = ClientState.from_arrays(model.arrays)
        check_state(state, like, optimizer.remembers, made_later=PARTS)

    # -- inside ----------------------------------------------------------------------------

    def _sent(self, model: ModelSettings, weights: Mapping[str, np.ndarray]) -> LoopCohort:
        """Return a model that somebody sent."""
        state = self._pool.initial_state(model, seed=0)
        member = Member(SERVER_ID, np.empty(0, np.int64), state)
        cohort = self._open(member, model, self._optimizer, self._tensors, self._pool, None)
        cohort.load_weights(weights)
        return cohort

    def _accuracy(self, cohort: LoopCohort) -> float:
        right: np.ndarray = self._validated(cohort).argmax(-1) == self.data.validation_labels
        return float(right.mean())

    def _validated(self, cohort: LoopCohort) -> np.ndarray:
        """Return the logits of the validation rows."""
        inputs = as_tensor(self.data.validation_inputs).to(self._device)
        logits: np.ndarray = cohort.predict(inputs)[0]
        return logits

    def _settings(self, name: str) -> ServerModelSettings:
        if name not in self._models:
            raise ValueError(f"the server has no model {name!r}; it has {sorted(self._models)}")
        return self._models[name]

    def _number(self, name: str) -> int:
        return SERVER_ID + list(self._models).index(name)

    def _first_state(self, name: str) -> ClientState:
        settings = self._settings(name)
        seed = initial_model_seed(self.federation.seed, self._number(name))
        return self._pool_of(name).initial_state(settings.model, seed)

    def _pool_of(self, name: str) -> ModelPool:
        """Return where models of one name are built: for images of the run, or for features."""
        settings = self._settings(name)
        if settings.input_shape is None and settings.optimizer is None:
            return self._pool
        if name not in self._pools:
            optimizer = settings.optimizer or self._optimizer
            self._pools[name] = ModelPool(self._seen_by(settings), optimizer)
        return self._pools[name]

    def _seen_by(self, settings: ServerModelSettings) -> TrainingData:
        """Return what a model reads: the run's rows, or nothing but the shape of its features."""
        if settings.input_shape is None:
            return self._tensors
        none = torch.zeros(2, *settings.input_shape, device=self._device)
        return self._given(none, torch.zeros(2, dtype=torch.int64))

    def _given(self, inputs: torch.Tensor, labels: torch.Tensor) -> TrainingData:
        return TrainingData(
            train_inputs=inputs.to(self._device),
            train_labels=labels.to(self._device),
            public_inputs=inputs[:0].to(self._device),
            public_labels=None,
            num_classes=self.federation.num_classes,
        )

    def _cohort(
        self,
        model: ServerModel,
        round: Round | None,
        rows: np.ndarray | None = None,
        given: GivenRows | None = None,
    ) -> LoopCohort:
        settings = self._settings(model.name)
        if given is None:
            tensors = self._seen_by(settings)
        else:
            tensors = self._given(as_tensor(given.inputs), as_tensor(given.labels))
        member = Member(
            self._number(model.name),
            np.empty(0, np.int64) if rows is None else rows,
            ClientState.from_arrays(model.arrays),
        )
        optimizer = settings.optimizer or self._optimizer
        return self._open(
            member, settings.model, optimizer, tensors, self._pool_of(model.name), round
        )

    def _open(
        self,
        member: Member,
        model: ModelSettings,
        optimizer: OptimizerSettings,
        tensors: TrainingData,
        pool: ModelPool,
        round: Round | None,
    ) -> LoopCohort:
        federation = self.federation
        cohort = LoopCohort(
            [member],
            model=model,
            optimizer=optimizer,
            data=tensors,
            pool=pool,
            streams=Streams(
                seed=federation.seed,
                purpose=Purpose.TEACHER if round is None else Purpose.SERVER,
                round=1 if round is None else round.number,
                rounds=1 if round is None else federation.rounds,
            ),
        )
        cohort.work = [self._work]
        return cohort

    def _after(self, model: ServerModel, cohort: LoopCohort) -> ServerModel:
        return ServerModel(model.name, cohort.states()[0].to_arrays())
