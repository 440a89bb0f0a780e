"""Pooled: one model per architecture trained on everybody's private rows together.

The upper bound for any exchange. No federation could do this; the bytes that are counted are
those of the models that the training clients send and receive, not of the rows that would have
to move.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np

from fedkd.data import FederatedData
from fedkd.exchange.payload import Asked, Payload
from fedkd.exchange.payloads import Weights
from fedkd.exchange.values import Value
from fedkd.training import Cohort, supervised
from strategies.baselines.fedavg import GlobalModels, finished_averages
from strategies.contract import (
    Call,
    Card,
    FinishedModel,
    PrivateUse,
    Received,
    Round,
    ServerTools,
    Step,
    Strategy,
    StrategySettings,
    Upload,
    payloads_of,
)
from strategies.shared.means import received_weights


class PooledSettings(StrategySettings):
    """Settings under ``strategy:`` when ``name: pooled``: none."""

    name: Literal["pooled"] = "pooled"


class Pooled(Strategy[PooledSettings, GlobalModels]):
    """The first client of each architecture trains on all private rows for the others."""

    card = Card(
        learns="one model of each architecture, from all private rows",
        up="P of the clients that train",
        down="P of the clients that train",
        equation="CE on everybody's private rows",
    )
    Settings: ClassVar[type[StrategySettings]] = PooledSettings
    State: ClassVar[type[Value]] = GlobalModels
    up = (Weights,)
    down = (Weights,)
    judges_received = True

    @property
    def private_use(self) -> PrivateUse:
        """There is nothing private in it."""
        return super().private_use._replace(
            pooled="one client learns from the rows of all",
        )

    def begin(self, server: ServerTools) -> GlobalModels:
        """No model yet."""
        return GlobalModels({})

    def participants(self, state: GlobalModels, round: Round) -> tuple[int, ...]:
        """One client of each architecture."""
        return tuple(sorted(self.federation.first_clients.values()))

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

    def client(self, cohort: Cohort, received: Received, call: Call) -> Sequence[Payload]:
        """Go on training on the pool."""
        cohort.fit(supervised, private=call.local)
        return [Weights(arrays=arrays) for arrays in cohort.weights()]

    def before_evaluation(self, cohort: Cohort, received: Received, call: Call) -> None:
        """Judge the pooled model."""
        if received:
            cohort.load_weights(received_weights(received))

    def receives(self, state: GlobalModels, client: int, round: Round) -> str | None:
        """The pooled model of the client's architecture, once there is one."""
        architecture = self.federation.architectures[client]
        return architecture if architecture in state.models else None

    def payload(self, state: GlobalModels, key: str) -> Weights:
        """The pooled model of an architecture."""
        return state.models[key]

    def asks(self, state: GlobalModels, client: int, round: Round, server: ServerTools) -> Asked:
        """Weights of the client's model."""
        return server.asked_weights(self.federation.models[client])

    def aggregate(
        self, state: GlobalModels, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> GlobalModels:
        """Hand each architecture's model to its clients; one without an upload stays as it was."""
        trained = {
            self.federation.architectures[upload.client]: sent
            for upload, sent in payloads_of(uploads, Weights)
        }
        return GlobalModels({**state.models, **trained})

    @property
    def has_server_models(self) -> bool:
        """Those of the pool."""
        return True

    def finished_models(self, state: GlobalModels) -> Mapping[str, FinishedModel]:
        """The pooled ones."""
        return finished_averages(state, self.federation)
