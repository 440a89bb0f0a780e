"""DS-FL: clients agree on sharpened soft labels of unlabelled public rows, and distil them.

Source: Itahara, Nishio, Koda, Morikura, Yamamoto, 2021, Algorithm 1. https://arxiv.org/abs/2008.06180
Order of a round as in the code of SCARLET (Azuma et al., 2025): distil the last target, train at
home, predict. Differs from the paper: the loss is KL(target || client), whose gradient is that of
the paper's cross-entropy; a client distils and trains by one optimizer.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedkd.bounds import Count, Real, Temperature
from fedkd.exchange.payload import Asked, Payload
from fedkd.exchange.payloads import Predictions
from fedkd.exchange.values import Value
from fedkd.exchange.views import Weighting
from fedkd.models import ModelSettings
from fedkd.targets import entropy_reduction, entropy_reduction_by_power
from fedkd.training import Cohort, as_tensor, supervised, towards_targets
from strategies.contract import (
    CLIENTS,
    Call,
    Card,
    Received,
    Round,
    ServerModel,
    ServerModelSettings,
    ServerTools,
    Step,
    Strategy,
    StrategySettings,
    Upload,
    payloads_of,
)
from strategies.shared.lessons import Lesson, SharedLesson
from strategies.shared.robust import Consensus, TrustingSettings

SERVER = "server"
"""The name of the server's model."""


class DistilSettings(StrategySettings):
    """Who learns on public rows, and how long.

    Attributes:
        distil_epochs: passes over the target's public rows before a client trains at home.
        server_model: a model of the server's own, which learns the target as the clients do and
            is judged; null: none.
        server_epochs: its passes over the target's rows.
    """

    distil_epochs: Count = 1
    server_model: ModelSettings | None = None
    server_epochs: Count = 1

    @property
    def server_models(self) -> dict[str, ServerModelSettings]:
        """The server's model by its name, if there is one."""
        return {SERVER: ServerModelSettings(self.server_model)} if self.server_model else {}

    def taught(
        self, model: ServerModel | None, target: Predictions, round: Round, server: ServerTools
    ) -> ServerModel | None:
        """Return the server's model after it has distilled the target; None where there is none."""
        if model is None:
            return None
        lesson = round.lesson(target, epochs=self.server_epochs)
        return server.fit(model, towards_targets, round=round, public=lesson).model


class SoftLabelSettings(DistilSettings, TrustingSettings):
    """How soft labels are made of the clients' predictions, and who learns them how long.

    Attributes:
        sharpening: ``sa`` is the clients' mean probability as it is; ``era`` a softmax of it over
            ``era_temperature``, as in DS-FL; ``enhanced_era`` its ``power``, made to sum to 1
            again, as in SCARLET.
        era_temperature: of ``era``; the lower, the sharper.
        power: of ``enhanced_era``; 1 is ``sa``, more is sharper.
    """

    sharpening: Literal["sa", "era", "enhanced_era"] = "era"
    era_temperature: Temperature = 0.1
    power: Real = Field(2.0, ge=0.01, le=100)

    def sharpened(self, mean_probability: Tensor) -> np.ndarray:
        """Return float32 soft labels of the clients' mean probability."""
        match self.sharpening:
            case "sa":
                target = mean_probability
            case "era":
                target = entropy_reduction(mean_probability, temperature=self.era_temperature)
            case "enhanced_era":
                target = entropy_reduction_by_power(mean_probability, power=self.power)
        labels: np.ndarray = target.float().numpy()
        return labels


def steps_on_public_rows(strategy: Strategy[Any, Any], settings: DistilSettings) -> Iterator[Step]:
    """Yield the steps of clients, and of the server's model, on a target's rows."""
    rows = strategy.federation.rows_per_round
    yield from strategy.clients_public_steps(rows)
    if settings.server_model is not None:
        yield from strategy.public_steps("strategy.server_model", settings.server_model, rows)


def soft_labels(cohort: Cohort, rows: np.ndarray) -> list[Predictions]:
    """Let each member predict these public rows and send the probabilities."""
    return [
        Predictions(
            rows=rows, values=torch.softmax(as_tensor(own), -1).numpy(), scale="probabilities"
        )
        for own in cohort.predict_public(rows)
    ]


class DSFLSettings(SoftLabelSettings):
    """Settings under ``strategy:`` when ``name: dsfl``."""

    name: Literal["dsfl"] = "dsfl"


@dataclass(frozen=True)
class Target(Lesson):
    """What the server remembers: the target, and its own model where it has one."""

    model: ServerModel | None = None


class DSFL(SharedLesson[DSFLSettings, Target]):
    """Distil the target, train at home, predict; the server averages and sharpens."""

    card = Card(
        learns="clients, and a server model if there is one, from the clients' sharpened mean",
        up="n x C probabilities",
        down="n x C probabilities",
        equation=(
            "target = softmax(mean_k p_k / T_era); KL(target || own) on public rows, then CE "
            "on private rows"
        ),
    )
    Settings: ClassVar[type[StrategySettings]] = DSFLSettings
    takes_views = True
    State: ClassVar[type[Value]] = Target
    directions: ClassVar[Mapping[str, str]] = {
        CLIENTS: "from the clients' mean",
        SERVER: "its model, if there is one, from the clients' mean",
    }

    @property
    def learns_alone(self) -> bool:
        """Whether clients learn nothing of what the others say."""
        return not self.learns(CLIENTS)

    @property
    def sums(self) -> Weighting | None:
        """A mean is all that is needed; other rules look at each client."""
        return self.settings.sums()

    def client(self, cohort: Cohort, received: Received, call: Call) -> Sequence[Payload]:
        """Distil the last target, train on private rows, predict the round's public rows."""
        if received:
            lesson = call.lesson(received, epochs=self.settings.distil_epochs)
            cohort.fit(towards_targets, public=lesson)
        cohort.fit(supervised, private=call.local)
        return soft_labels(cohort, call.public_rows)

    def begin(self, server: ServerTools) -> Target:
        """There is no target yet."""
        return Target(model=server.new(SERVER) if self.settings.server_model else None)

    def asks(self, state: Target, client: int, round: Round, server: ServerTools) -> Asked:
        """Probabilities of the round's rows."""
        classes = self.federation.num_classes
        return Predictions.asked(round.public_rows, classes, scale="probabilities")

    def aggregate(
        self, state: Target, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Target:
        """Average the clients' probabilities, sharpen them, and let the server's model distil."""
        clients = self.federation.num_clients
        with Consensus(
            self.settings, scale="probabilities", trust=state.trust, clients=clients
        ) as consensus:
            for upload, sent in payloads_of(uploads, Predictions):
                consensus.add(upload.client, sent.values, upload.weight("equal"))
            if not consensus.clients:
                return Target(model=state.model, trust=state.trust)
            labels, trust = self.settings.sharpened(consensus.of_all()), consensus.trust
        target = Predictions(
            rows=round.public_rows, values=labels, scale="probabilities", averaged=True
        )
        model = state.model
        if self.learns(SERVER):
            model = self.settings.taught(model, target, round, server)
        return Target(target, model, trust=trust)

    def smallest_steps(self) -> Iterator[Step]:
        """Public rows have steps of their own."""
        yield from super().smallest_steps()
        yield from steps_on_public_rows(self, self.settings)

    def server_models(self) -> Mapping[str, ServerModelSettings]:
        """The server's model, if there is one."""
        return self.settings.server_models

    def judged_models(self, state: Target) -> Mapping[str, ServerModel]:
        """The server's model, if there is one."""
        return {} if state.model is None else {SERVER: state.model}
