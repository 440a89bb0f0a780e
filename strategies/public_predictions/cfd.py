"""CFD: soft labels in a few bits; server and clients distil each other's, clients from scratch.

Source: Sattler, Marban, Rischke, Samek, 2022, Communication-Efficient Federated Distillation.
https://arxiv.org/abs/2012.00632
This is the dual distillation. How few bits labels have is a matter of the codecs ``cfd`` and
``cfd_delta`` (``exchange.up``, ``exchange.down``); by the paper's names, float32 on both sides is
CFD-32-32. All rounds have the public rows of the first one, in one order, as delta coding needs.
Differs from the paper: clients of each architecture have common initial weights of their own, and
what is judged of a client is its model as it last trained.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch

from fedkd.bounds import Count
from fedkd.exchange.payload import Asked, Payload
from fedkd.exchange.payloads import Predictions
from fedkd.exchange.values import Value
from fedkd.exchange.views import Weighting
from fedkd.inputs import Shape
from fedkd.models import ModelSettings, build_model
from fedkd.training import (
    Arrays,
    Cohort,
    as_tensor,
    initial_model_seed,
    supervised,
    towards_targets,
)
from fedkd.training.state import to_arrays
from strategies.contract import (
    CLIENTS,
    Call,
    Card,
    Federation,
    Received,
    Round,
    ServerModel,
    ServerModelSettings,
    ServerTools,
    Step,
    StrategySettings,
    Upload,
    payloads_of,
)
from strategies.public_predictions.dsfl import SERVER, soft_labels
from strategies.shared.lessons import Lesson, SharedLesson
from strategies.shared.robust import Consensus, TrustingSettings


class CFDSettings(TrustingSettings):
    """Settings under ``strategy:`` when ``name: cfd``.

    Attributes:
        distil_epochs: passes over the public rows with the server's soft labels, from the common
            initial weights, before a client trains at home.
        server_model: learns from the clients' soft labels, goes on from round to round, and is
            judged.
        server_epochs: its passes over the public rows in a round.
    """

    name: Literal["cfd"] = "cfd"
    distil_epochs: Count = 10
    server_model: ModelSettings = ModelSettings(name="mlp")
    server_epochs: Count = 10


@dataclass(frozen=True, kw_only=True)
class Labels(Lesson):
    """What the server remembers: its soft labels of the public rows, and its model."""

    model: ServerModel


@lru_cache(maxsize=64)
def common_start(model: ModelSettings, input_shape: Shape, num_classes: int, seed: int) -> Arrays:
    """Return the initial weights that all clients of an architecture have in common, theta_0."""
    module = build_model(model, input_shape=input_shape, num_classes=num_classes, seed=seed)
    return to_arrays(module.state_dict())


class CFD(SharedLesson[CFDSettings, Labels]):
    """Begin anew, distil the server's labels, train at home; the server distils all clients'."""

    card = Card(
        learns="clients from the server's model, the server from the clients' mean",
        up="n x C probabilities; b bits each with exchange.up=cfd, of changed rows with cfd_delta",
        down="n x C probabilities; b bits each with exchange.down=cfd, likewise",
        equation=(
            "from theta_0: KL(Q_b(server) || client) on public rows, then CE on private rows; "
            "server: KL(mean_k Q_b(p_k) || server)"
        ),
    )
    Settings: ClassVar[type[StrategySettings]] = CFDSettings
    State: ClassVar[type[Value]] = Labels
    directions: ClassVar[Mapping[str, str]] = {
        CLIENTS: "from the server",
        SERVER: "from the clients; without it their mean goes down as it is",
    }

    def __init__(self, settings: CFDSettings, federation: Federation) -> None:
        super().__init__(settings, federation)
        self.rows = federation.round(1).public_rows

    @property
    def sums(self) -> Weighting | None:
        """A mean is all that is needed; other rules look at each client."""
        return self.settings.sums()

    @property
    def learns_alone(self) -> bool:
        """Whether clients go on from where they were, and distil nothing."""
        return not self.learns(CLIENTS)

    def smallest_steps(self) -> Iterator[Step]:
        """Public rows have steps of their own, at the clients and at the server."""
        yield from super().smallest_steps()
        rows = len(self.rows)
        if self.learns(CLIENTS):
            yield from self.clients_public_steps(rows)
        if self.learns(SERVER):
            yield from self.public_steps("strategy.server_model", self.settings.server_model, rows)

    def client(self, cohort: Cohort, received: Received, call: Call) -> Sequence[Payload]:
        """Begin from theta_0, distil, train on private rows, predict the public ones."""
        if self.learns(CLIENTS):
            cohort.load_weights(self._common_start(cohort.clients[0]))
            cohort.reset_optimizers()
            if received:
                lesson = call.lesson(received, epochs=self.settings.distil_epochs)
                cohort.fit(towards_targets, public=lesson)
        cohort.fit(supervised, private=call.local)
        return soft_labels(cohort, self.rows)

    def _common_start(self, client: int) -> Arrays:
        """Return what clients of this one's architecture begin every round from."""
        federation = self.federation
        first = federation.first_clients[federation.architectures[client]]
        seed = initial_model_seed(federation.seed, first)
        model = federation.models[first]
        return common_start(model, federation.input_shape, federation.num_classes, seed)

    def server_models(self) -> Mapping[str, ServerModelSettings]:
        """The server's model."""
        return {SERVER: ServerModelSettings(self.settings.server_model)}

    def begin(self, server: ServerTools) -> Labels:
        """There are no labels yet."""
        return Labels(model=server.new(SERVER))

    def asks(self, state: Labels, client: int, round: Round, server: ServerTools) -> Asked:
        """Probabilities of the public rows, the same in every round."""
        return Predictions.asked(self.rows, self.federation.num_classes, scale="probabilities")

    def aggregate(
        self, state: Labels, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Labels:
        """Let the server's model distil the clients' mean, and label the public rows by it."""
        clients = self.federation.num_clients
        with Consensus(
            self.settings, scale="probabilities", trust=state.trust, clients=clients
        ) as consensus:
            for upload, sent in payloads_of(uploads, Predictions):
                consensus.add(upload.client, sent.values, upload.weight("equal"))
            if not consensus.clients:
                return state
            values, trust = consensus.pop_of_all().numpy(), consensus.trust
        target = Predictions(rows=self.rows, values=values, scale="probabilities", averaged=True)
        if not self.learns(SERVER):
            return Labels(predictions=target, model=state.model, trust=trust)
        lesson = round.lesson(target, epochs=self.settings.server_epochs)
        model = server.fit(state.model, towards_targets, round=round, public=lesson).model
        own = torch.softmax(as_tensor(server.predict_public(model, self.rows)), -1).numpy()
        labels = Predictions(rows=self.rows, values=own, scale="probabilities")
        return Labels(predictions=labels, model=model, trust=trust)

    def judged_models(self, state: Labels) -> Mapping[str, ServerModel]:
        """The server's model."""
        return {SERVER: state.model}
