"""The server's side of a simulation: what it may see, and models of its own."""

from collections.abc import Mapping

import numpy as np
import torch

from fedkd.data import FederatedData
from fedkd.models import ModelSettings
from fedkd.randomness import Purpose
from fedkd.training import (
    MODEL,
    PARTS,
    Arrays,
    ClientState,
    ComposedObjective,
    LoopCohort,
    Member,
    ModelPool,
    Objective,
    OptimizerSettings,
    Passes,
    PublicLesson,
    Streams,
    TrainingData,
    check_state,
    initial_model_seed,
)
from strategies.plan import Federation, RoundPlan

_ROWS = "train_rows"


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

    def model_from(
        self, settings: ModelSettings, arrays: Mapping[str, np.ndarray]
    ) -> "ServerModel":
        """Return the model that `ServerModel.to_arrays` flattened.

        Raises:
            ValueError: for arrays that are not those of this model, or no rows of this data.
        """
        rows = arrays[_ROWS]
        inside = rows.size == 0 or bool(
            rows.min() >= 0 and rows.max() < len(self.data.train_labels)
        )
        if rows.ndim != 1 or rows.dtype.kind != "i" or not inside:
            raise ValueError("a server's model trains on rows that are not private rows")
        trained = {name: array for name, array in arrays.items() if name != _ROWS}
        state = ClientState.from_arrays(trained) if trained else None
        if state is not None:
            like = self._pool.initial_state(settings, seed=0)
            check_state(state, like, self._optimizer.remembers, made_later=PARTS)
        return ServerModel(self, settings, rows, state)

    def initial_weights(self, client: int) -> Arrays:
        """Return the weights that a client starts from."""
        seed = initial_model_seed(self.federation.seed, client)
        state = self._pool.initial_state(self.federation.models[client], seed)
        return state.models[MODEL].weights


class ServerModel:
    """A model that the server trains: a cohort of one that lives as long as the run."""

    def __init__(
        self,
        server: Server,
        settings: ModelSettings,
        train_rows: np.ndarray,
        state: ClientState | None = None,
    ) -> None:
        self._server = server
        self._settings = settings
        self._member = Member(Server.ID, train_rows, state)

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
        objective: Objective | ComposedObjective,
        *,
        plan: RoundPlan | None,
        private: Passes | None = None,
        public: PublicLesson | None = None,
    ) -> None:
        """Train in place; ``plan`` is None before the first round."""
        cohort = self._cohort(plan)
        cohort.fit(objective, private=private, public=public)
        self._member = Member(Server.ID, self._member.rows, cohort.states()[0])

    def weights(self) -> Arrays:
        """Return a copy of parameters and buffers."""
        return self._cohort(None).weights()[0]

    def load_weights(self, weights: Mapping[str, np.ndarray]) -> None:
        """Put these parameters and buffers in place, and forget the optimizer's memory."""
        cohort = self._cohort(None)
        cohort.load_weights(weights)
        cohort.reset_optimizers()
        self._member = Member(Server.ID, self._member.rows, cohort.states()[0])

    def to_arrays(self) -> Arrays:
        """Flatten the model, its optimizer and the rows it trains on; see `Server.model_from`."""
        state = self._member.state
        return {_ROWS: self._member.rows, **({} if state is None else state.to_arrays())}

    def predict(self, inputs: torch.Tensor) -> np.ndarray:
        """Return float32 logits ``[rows, classes]``."""
        logits: np.ndarray = self._cohort(None).predict(inputs)[0]
        return logits

    def predict_public(self, rows: np.ndarray) -> np.ndarray:
        """Return float32 logits ``[rows, classes]`` on positions of the public set."""
        logits: np.ndarray = self._cohort(None).predict_public(rows)[0]
        return logits
