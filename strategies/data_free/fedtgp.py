"""FedTGP: the server trains prototypes that keep away from each other; clients draw to them.

Source: Zhang, Liu, Hua, Cao, 2024, FedTGP: Trainable Global Prototypes with
Adaptive-Margin-Enhanced Contrastive Learning for Data and Model Heterogeneity in Federated
Learning. https://arxiv.org/abs/2401.03230
FedProto, whose server does not average what clients send. A small network makes a prototype of each
class; each client's own are data, which it learns to tell apart by their distances, with a margin
that is the widest gap between a class's mean and the next.

Differs from the published code: distances are roots of sums of squares, never of a difference that
rounding makes negative, and have no infinite gradient at 0. A class that nobody has ever sent has
no prototype; theirs draws one from nowhere. Where only one class is there, the margin is 0.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fedkd.bounds import Count, LearningRate, PositiveWeight
from fedkd.exchange.payloads import Prototypes
from fedkd.exchange.values import Arrays, Value
from fedkd.training import Passes, as_tensor
from fedkd.training.steps import FixedRate, Steps
from strategies.contract import (
    Card,
    Round,
    ServerTools,
    StrategySettings,
    Upload,
    payloads_of,
)
from strategies.data_free.fedproto import mean_over_holders
from strategies.shared.class_means import Collect
from strategies.shared.prototypes import PrototypeSettings, SharedPrototypes

SMALLEST_SQUARE = 1e-12
"""Squared distances below count as that, without a gradient: a root's is infinite at 0."""


class FedTGPSettings(PrototypeSettings):
    """Settings under ``strategy:`` when ``name: fedtgp``.

    Attributes:
        margin: the most that prototypes are kept apart by, tau in the paper; less where classes are
            nearer to each other.
        server_epochs: the server's passes over the prototypes of a round.
        server_lr: learning rate of its SGD; the published code takes that of its clients.
    """

    name: Literal["fedtgp"] = "fedtgp"
    collect: Collect = "evaluation"
    margin: PositiveWeight = 100.0
    server_epochs: Count = 100
    server_lr: LearningRate = 0.01


@dataclass(frozen=True)
class TrainedPrototypes(Value):
    """What the server remembers.

    Attributes:
        network: of the network that makes prototypes: the ``embedding`` of each class, and two
            layers, ``hidden`` and ``out``.
        known: its prototypes of all classes that anybody has sent.
    """

    network: Mapping[str, np.ndarray]
    known: Prototypes


# -- arithmetic ----------------------------------------------------------------------------------


def distances(
    sent: Float[Tensor, "rows features"], prototypes: Float[Tensor, "classes features"]
) -> Float[Tensor, "rows classes"]:
    """Return how far each row is from each prototype; at 0 the gradient is 0."""
    squares = (sent[:, None] - prototypes).square().sum(-1)
    return squares.clamp(min=SMALLEST_SQUARE).sqrt()


def margin_of(means: Prototypes, largest: float) -> float:
    """Return the widest gap between a class's mean and the one nearest to it, at most ``largest``.

    0 where there are no two classes.
    """
    if len(means.classes) < 2:
        return 0.0
    values = as_tensor(means.values).double()
    apart = torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist")
    gaps = apart.fill_diagonal_(torch.inf).min(0).values
    return min(gaps.max().item(), largest)


def separation_loss(
    sent: Float[Tensor, "rows features"],
    labels: Int[Tensor, " rows"],
    prototypes: Float[Tensor, "classes features"],
    *,
    margin: float,
) -> Float[Tensor, ""]:
    """Tell by distances of which class each row is, though its own counts as ``margin`` farther."""
    apart = distances(sent, prototypes) + margin * F.one_hot(labels, len(prototypes))
    return F.cross_entropy(-apart, labels)


def new_network(classes: int, width: int, rng: np.random.Generator) -> Arrays:
    """Draw a network as torch would: normal embeddings, uniform layers."""
    bound = width**-0.5
    layers = {
        f"{layer}/{part}": rng.uniform(-bound, bound, shape).astype(np.float32)
        for layer in ("hidden", "out")
        for part, shape in (("weight", (width, width)), ("bias", (width,)))
    }
    return {"embedding": rng.normal(size=(classes, width)).astype(np.float32), **layers}


def made_by(network: Mapping[str, Tensor]) -> Float[Tensor, "classes features"]:
    """Return the prototypes of all classes: ``out(relu(hidden(embedding)))``."""
    hidden = F.linear(network["embedding"], network["hidden/weight"], network["hidden/bias"])
    return F.linear(F.relu(hidden), network["out/weight"], network["out/bias"])


class FedTGP(SharedPrototypes[FedTGPSettings, TrainedPrototypes]):
    """Class means of features up; prototypes that the server has trained on them down."""

    card = Card(
        learns="each client from the server's prototypes; these from all clients' class means",
        up="at most C x d",
        down="at most C x d",
        equation=(
            "server: CE(-(||p_k - P_c|| + margin [c = y]), y), P = f(embedding), margin = min(tau, "
            "max_c gap_c); clients: CE + lambda * mean square of (feature - P_y)"
        ),
    )
    Settings: ClassVar[type[StrategySettings]] = FedTGPSettings
    State: ClassVar[type[Value]] = TrainedPrototypes

    def prototypes(self, state: TrainedPrototypes) -> Prototypes:
        """Those of all classes that anybody has sent."""
        return state.known

    def begin(self, server: ServerTools) -> TrainedPrototypes:
        """A network that nobody has trained, and no prototype yet."""
        none = self.no_prototypes(server)
        rng = self.federation.round(1).random()
        return TrainedPrototypes(new_network(none.num_classes, none.values.shape[1], rng), none)

    def aggregate(
        self,
        state: TrainedPrototypes,
        uploads: Iterable[Upload],
        round: Round,
        server: ServerTools,
    ) -> TrainedPrototypes:
        """Train the network on all that clients sent; without anything it stays as it is."""
        sent = [own for _, own in payloads_of(uploads, Prototypes) if len(own.classes)]
        if not sent:
            return state
        # What was sent in earlier rounds has no say in the gaps.
        none = replace(state.known, classes=state.known.classes[:0], values=state.known.values[:0])
        margin = margin_of(mean_over_holders(sent, none), self.settings.margin)
        network = self._trained(state.network, sent, margin, round)
        known = np.union1d(state.known.classes, np.concatenate([own.classes for own in sent]))
        with torch.no_grad():
            values = made_by({name: as_tensor(array) for name, array in network.items()})
        return TrainedPrototypes(
            network, replace(state.known, classes=known, values=values.numpy()[known])
        )

    def _trained(
        self,
        network: Mapping[str, np.ndarray],
        sent: Sequence[Prototypes],
        margin: float,
        round: Round,
    ) -> Arrays:
        values = as_tensor(np.concatenate([own.values for own in sent]))
        labels = as_tensor(np.concatenate([own.classes for own in sent]))
        weights = {
            name: as_tensor(np.array(array)).requires_grad_() for name, array in network.items()
        }
        optimizer = torch.optim.SGD(weights.values(), lr=self.settings.server_lr)
        passes = Passes(batch_size=round.local.batch_size, epochs=self.settings.server_epochs)
        batches = passes.batches(len(labels), round.random(1))
        training = Steps([FixedRate(optimizer)], len(batches))
        for step in training:
            rows, prototypes = batches[step.number], made_by(weights)
            loss = separation_loss(values[rows], labels[rows], prototypes, margin=margin)
            training.descend({"separation": loss})
        return {name: tensor.detach().numpy() for name, tensor in weights.items()}
