"""Pooled: one model per architecture trained on everybody's private rows together.

The upper bound for any exchange. No federation could do this; the bytes that are counted are
those of the models that the training clients send and receive, not of the rows that would have
to move.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, Literal

import numpy as np

from fedkd.data import FederatedData
from fedkd.training import Cohort, supervised
from strategies.base import DistillationStrategy, Step, StrategySettings
from strategies.knowledge import Broadcast, ClientUpload, Knowledge, Parameters
from strategies.memory import Memory, recall_table, remember_table
from strategies.plan import Federation, RoundPlan
from strategies.server import Server


class PooledSettings(StrategySettings):
    """Settings under ``strategy:`` when ``name: pooled``: none."""

    name: Literal["pooled"] = "pooled"


class Pooled(DistillationStrategy[PooledSettings]):
    """The first client of each architecture trains on all private rows for the others."""

    Settings: ClassVar[type[StrategySettings]] = PooledSettings
    uploads = "parameters"
    judges_received = True

    def __init__(self, settings: PooledSettings, federation: Federation) -> None:
        super().__init__(settings, federation)
        self._representative = {
            architecture: federation.architectures.index(architecture)
            for architecture in federation.architectures
        }
        self._trained: dict[str, Knowledge] = {}

    def participants(self, plan: RoundPlan) -> tuple[int, ...]:
        """One client of each architecture."""
        return tuple(sorted(self._representative.values()))

    def smallest_steps(self) -> Iterator[Step]:
        """Everybody's rows are one client's."""
        rows = self.federation.local.smallest(sum(self.federation.num_examples))
        for model in dict.fromkeys(self.federation.models):
            yield Step(
                "clients.models",
                model,
                rows,
                "the pool would; use norm: group or a larger clients.batch_size",
            )

    def private_rows(self, client: int, data: FederatedData) -> np.ndarray:
        """Everybody's rows."""
        return np.sort(np.concatenate(data.client_rows))

    def client_round(
        self, cohort: Cohort, received: Knowledge | None, plan: RoundPlan
    ) -> Sequence[Knowledge]:
        """Go on training on the pool."""
        cohort.fit(supervised, private=plan.local)
        return [Parameters(arrays) for arrays in cohort.weights()]

    def aggregate(
        self, uploads: Iterable[ClientUpload], plan: RoundPlan, server: Server
    ) -> Broadcast:
        """Hand each architecture's model to its clients; one without an upload stays as it was."""
        for upload in uploads:
            self._trained[self.federation.architectures[upload.client]] = upload.knowledge
        return Broadcast(
            by_architecture=dict(self._trained), architectures=self.federation.architectures
        )

    def memory(self) -> Memory:
        """Remember the pooled models."""
        return remember_table(self._trained)

    def recall(self, memory: Memory, server: Server) -> None:
        """Take the pooled models back."""
        self._trained = recall_table(memory)

    def before_evaluation(self, cohort: Cohort, received: Knowledge | None) -> None:
        """Judge the pooled model."""
        if isinstance(received, Parameters):
            cohort.load_weights(received.arrays)
