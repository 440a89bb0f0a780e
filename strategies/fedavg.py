"""FedAvg: clients train the global model on their own rows; the server averages the weights.

Source: McMahan, Moore, Ramage, Hampson, Aguera y Arcas, 2017, Algorithm 1.
https://arxiv.org/abs/1602.05629
Differs from the paper: where clients have different architectures, each architecture has a
global model of its own, averaged over the clients that share it, since weights of different
shapes have no mean. BatchNorm statistics are averaged like parameters.
"""

from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

import numpy as np

from fedkd.training import Arrays, Cohort, supervised
from strategies.base import DistillationStrategy, StrategySettings
from strategies.knowledge import Broadcast, ClientUpload, Knowledge, Parameters
from strategies.memory import Memory, recall_table, remember_table
from strategies.plan import Federation, RoundPlan
from strategies.server import Server


class FedAvgSettings(StrategySettings):
    """Settings under ``strategy:`` when ``name: fedavg``.

    Attributes:
        weighting: ``examples`` weights a client by its private rows, as the paper does;
            ``equal`` counts every client once.
    """

    name: Literal["fedavg"] = "fedavg"
    weighting: Literal["examples", "equal"] = "examples"


class WeightedMean:
    """A running weighted mean of models: memory of one model, whatever the number of clients."""

    def __init__(self) -> None:
        self._sums: Arrays = {}
        self._dtypes: dict[str, np.dtype] = {}
        self._weight = 0.0

    def add(self, arrays: Arrays, weight: int | float) -> None:
        """Fold one client's model in; ``weight`` > 0."""
        if not weight > 0:
            raise ValueError(f"weight must be > 0, got {weight}")
        for name, array in arrays.items():
            # Of an array without dimensions NumPy's products are scalars, which torch refuses.
            term = np.asarray(weight * array.astype(np.float64))
            self._sums[name] = self._sums[name] + term if name in self._sums else term
            self._dtypes[name] = array.dtype
        self._weight += weight

    def mean(self) -> Arrays:
        """Return the mean in the models' own types; counters and flags are rounded."""
        means: Arrays = {}
        for name, total in self._sums.items():
            mean = np.asarray(total / self._weight)
            if self._dtypes[name].kind in "iub":
                mean = np.rint(mean)
            means[name] = np.asarray(mean, self._dtypes[name])
        return means


class FedAvg(DistillationStrategy[FedAvgSettings]):
    """Weights down, local training, weights up, weighted mean."""

    Settings: ClassVar[type[StrategySettings]] = FedAvgSettings
    uploads = "parameters"
    judges_received = True

    def __init__(self, settings: FedAvgSettings, federation: Federation) -> None:
        super().__init__(settings, federation)
        self._global: dict[str, Knowledge] = {}

    def client_round(
        self, cohort: Cohort, received: Knowledge | None, plan: RoundPlan
    ) -> Sequence[Knowledge]:
        """Start from the global model, without memory of earlier rounds; train; send weights."""
        self.before_evaluation(cohort, received)
        cohort.reset_optimizers()
        cohort.fit(supervised, private=plan.local)
        return [Parameters(arrays) for arrays in cohort.weights()]

    def before_evaluation(self, cohort: Cohort, received: Knowledge | None) -> None:
        """Judge the global model."""
        if isinstance(received, Parameters):
            cohort.load_weights(received.arrays)

    def prepare(self, server: Server) -> Broadcast:
        """Start every architecture from the first weights of its first client."""
        for client, architecture in enumerate(self.federation.architectures):
            if architecture not in self._global:
                self._global[architecture] = Parameters(server.initial_weights(client))
        return self._broadcast()

    def aggregate(
        self, uploads: Iterable[ClientUpload], plan: RoundPlan, server: Server
    ) -> Broadcast:
        """Average each architecture's uploads; one without uploads keeps its global model."""
        means: dict[str, WeightedMean] = {}
        for upload in uploads:
            if not isinstance(upload.knowledge, Parameters):
                raise TypeError(f"expected parameters from client {upload.client}")
            weight = upload.num_examples if self.settings.weighting == "examples" else 1
            architecture = self.federation.architectures[upload.client]
            means.setdefault(architecture, WeightedMean()).add(upload.knowledge.arrays, weight)
        for architecture, mean in means.items():
            self._global[architecture] = Parameters(mean.mean())
        return self._broadcast()

    def _broadcast(self) -> Broadcast:
        return Broadcast(
            by_architecture=dict(self._global), architectures=self.federation.architectures
        )

    def memory(self) -> Memory:
        """Remember the global models."""
        return remember_table(self._global)

    def recall(self, memory: Memory, server: Server) -> None:
        """Take the global models back."""
        self._global = recall_table(memory)
