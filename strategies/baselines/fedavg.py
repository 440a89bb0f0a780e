"""FedAvg: clients train the global model on their own rows; the server averages the weights.

Source: McMahan, Moore, Ramage, Hampson, Aguera y Arcas, 2017, Algorithm 1.
https://arxiv.org/abs/1602.05629
Differs from the paper: where clients have different architectures, each architecture has a
global model of its own, averaged over the clients that share it, since weights of different
shapes have no mean. BatchNorm statistics are averaged like parameters.
"""

from abc import abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

from fedkd.exchange.payload import Asked, Payload
from fedkd.exchange.payloads import Weights
from fedkd.exchange.values import Value
from fedkd.exchange.views import Weighting
from fedkd.training import Cohort, supervised
from strategies.contract import (
    Call,
    Card,
    Federation,
    FinishedModel,
    Received,
    Round,
    ServerTools,
    Strategy,
    StrategySettings,
    Upload,
)
from strategies.shared.means import mean_weights, received_weights


class AveragingSettings(StrategySettings):
    """Settings of every algorithm whose server averages weights.

    Attributes:
        weighting: ``examples`` weights a client by its private rows, as the paper does;
            ``equal`` counts every client once.
    """

    weighting: Literal["examples", "equal"] = "examples"


class FedAvgSettings(AveragingSettings):
    """Settings under ``strategy:`` when ``name: fedavg``: those of averaging."""

    name: Literal["fedavg"] = "fedavg"


AveragingT = TypeVar("AveragingT", bound=AveragingSettings)


@dataclass(frozen=True)
class GlobalModels(Value):
    """What averaging servers remember.

    Attributes:
        models: the global model of each architecture.
    """

    models: Mapping[str, Weights]


ModelsT = TypeVar("ModelsT", bound=GlobalModels)


def finished_averages(state: GlobalModels, federation: Federation) -> dict[str, FinishedModel]:
    """Return the global models, by their architectures, in the order of their first clients."""
    return {
        architecture: FinishedModel(federation.models[client], state.models[architecture].arrays)
        for architecture, client in federation.first_clients.items()
        if architecture in state.models
    }


class GlobalModelsServer(Strategy[AveragingT, ModelsT]):
    """The server half of averaging: a global model of each architecture, and clients judged by it.

    A subclass says what clients do, and may remember more than the models.
    """

    State: ClassVar[type[Value]] = GlobalModels
    up: tuple[type[Payload], ...] = (Weights,)
    down: tuple[type[Payload], ...] = (Weights,)
    judges_received = True

    def before_evaluation(self, cohort: Cohort, received: Received, call: Call) -> None:
        """Judge the global model."""
        cohort.load_weights(received_weights(received))

    def begin(self, server: ServerTools) -> ModelsT:
        """Start every architecture from the first weights of its first client."""
        kind: Any = self.State
        state: ModelsT = kind(
            models={
                architecture: Weights(arrays=server.initial_weights(client))
                for architecture, client in self.federation.first_clients.items()
            }
        )
        return state

    def receives(self, state: ModelsT, client: int, round: Round) -> Hashable:
        """The global model of the client's architecture."""
        return self.federation.architectures[client]

    def payload(self, state: ModelsT, key: Any) -> Payload:
        """The global model of an architecture."""
        return state.models[key]

    def asks(self, state: ModelsT, client: int, round: Round, server: ServerTools) -> Asked:
        """Weights of the client's model."""
        return server.asked_weights(self.federation.models[client])

    def aggregate(
        self, state: ModelsT, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> ModelsT:
        """Average each architecture's uploads; one without uploads keeps its global model."""
        architectures = self.federation.architectures
        means = mean_weights(uploads, self.settings.weighting, architectures.__getitem__)
        models = {**state.models, **{str(key): mean for key, mean in means.items()}}
        return replace(state, models=models)

    @property
    def has_server_models(self) -> bool:
        """The global ones."""
        return True

    def finished_models(self, state: ModelsT) -> Mapping[str, FinishedModel]:
        """The server's own, if it has any, then the global ones."""
        return {**super().finished_models(state), **finished_averages(state, self.federation)}


class Averaging(GlobalModelsServer[AveragingT, ModelsT]):
    """Weights down, local training, weights up, weighted mean.

    A subclass says how clients train.
    """

    @property
    def sums(self) -> Weighting | None:
        """The server needs the mean only."""
        return self.settings.weighting

    def client(self, cohort: Cohort, received: Received, call: Call) -> Sequence[Payload]:
        """Start from the global model, without memory of earlier rounds; train; send weights."""
        self.before_evaluation(cohort, received, call)
        cohort.reset_optimizers()
        self.learn(cohort, received, call)
        return [Weights(arrays=arrays) for arrays in cohort.weights()]

    @abstractmethod
    def learn(self, cohort: Cohort, received: Received, call: Call) -> None:
        """Train models that are the global one; it is what was received."""


class FedAvg(Averaging[FedAvgSettings, GlobalModels]):
    """Clients train the global model on their own rows, and nothing else."""

    card = Card(
        learns="each client starts from the average of all",
        up="P",
        down="P",
        equation="w = sum_k n_k w_k / sum_k n_k; clients minimise CE",
    )
    Settings: ClassVar[type[StrategySettings]] = FedAvgSettings

    def learn(self, cohort: Cohort, received: Received, call: Call) -> None:
        """Train on private rows."""
        cohort.fit(supervised, private=call.local)
