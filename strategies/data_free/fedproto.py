"""FedProto: clients share the mean feature of each class and draw their features to all means.

Source: Tan, Long, Liu, Zhou, Lu, Jiang, Zhang, 2022, Algorithm 1. https://arxiv.org/abs/2105.00243
A feature is what a model's last linear layer reads. As in the published code the server's mean is
over the clients that hold a class, the distance is the mean square over a feature's numbers, and
features are collected as they are put out in the last local epoch. (The paper's equation 6, read
literally, would also divide by the number of holders and so shrink every prototype.)
Differs from the paper: models may differ in the number of their features, which are then pooled to
the number of the narrowest. A class that no client of a round holds keeps its prototype.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from fedkd.bounds import Width
from fedkd.exchange.payload import Asked, Payload
from fedkd.exchange.payloads import Prototypes
from fedkd.exchange.values import Value
from fedkd.losses.reduction import PerRow
from fedkd.models.options import ImageShape
from fedkd.objectives.taps import PENULTIMATE
from fedkd.schedules import ConstantSchedule, NonNegativeSchedule
from fedkd.training import Batch, Cohort, Losses, Outputs, Table, supervised
from strategies.contract import (
    Call,
    Card,
    Received,
    Round,
    ServerTools,
    Strategy,
    StrategySettings,
    Upload,
    payloads_of,
)
from strategies.shared.class_means import Collect, class_means, fit_and_collect
from strategies.shared.features import feature_widths, features_of, nearness, pooled


class FedProtoSettings(StrategySettings):
    """Settings under ``strategy:`` when ``name: fedproto``.

    Attributes:
        prototype_weight: weight of the distance to the prototype of a row's class, lambda in the
            paper; a number or a schedule.
        features: numbers of a prototype; models with more features have neighbours averaged. None:
            as many as the narrowest of ``clients.models`` has.
        collect: which of its own features a client averages. ``last_epoch``: those that its model
            puts out in the round's last pass, as in the published code; ``round``: in all of it;
            ``evaluation``: those of the trained model, in evaluation mode.
        weighting: ``equal`` counts every client that holds a class once; ``count`` weights it by
            how many features its mean is of, which travel then.
        judge: ``prototype`` takes the class of the nearest prototype, as in the paper; ``head``
            takes the model's own scores.
    """

    name: Literal["fedproto"] = "fedproto"
    prototype_weight: NonNegativeSchedule = ConstantSchedule(value=1.0)
    features: Width | None = None
    collect: Collect = "last_epoch"
    weighting: Literal["equal", "count"] = "equal"
    judge: Literal["prototype", "head"] = "prototype"


def mean_over_holders(sent: Iterable[Prototypes], before: Prototypes) -> Prototypes:
    """Average, for each class, what the clients that hold it sent; by counts where there are any.

    Args:
        sent: each client's prototypes.
        before: whose prototypes remain where nobody sent any.
    """
    means, held = before.by_class()
    total, weight = np.zeros(means.shape), np.zeros(len(means))
    for own in sent:
        counts = np.ones(len(own.classes)) if own.counts is None else own.counts.astype(np.float64)
        total[own.classes] += counts[:, None] * own.values
        weight[own.classes] += counts
    new = weight > 0
    means[new] = total[new] / weight[new, None]
    classes = np.flatnonzero(held | new)
    return Prototypes(classes=classes, values=means[classes], num_classes=len(means))


class FedProto(Strategy[FedProtoSettings, Prototypes]):
    """Class means of features up, their means over the holders down."""

    card = Card(
        learns="each client from all clients' mean feature of a row's class",
        up="at most C x d, 4 bytes a class id",
        down="at most C x d, 4 bytes a class id",
        equation="CE + proto_weight * mean square of (feature - mean feature of the class)",
    )
    Settings: ClassVar[type[StrategySettings]] = FedProtoSettings
    State: ClassVar[type[Value]] = Prototypes
    up = (Prototypes,)
    down = (Prototypes,)
    judges_received = True

    def check(self, input_shape: ImageShape) -> None:
        """Refuse models without features, and prototypes that are wider than some model's."""
        widths = feature_widths(self.federation, input_shape)
        label, width = min(widths.items(), key=lambda item: item[1])
        if self.settings.features is not None and self.settings.features > width:
            raise ValueError(
                f"strategy.features must be at most {width}, which is what {label} of "
                f"clients.models has, got {self.settings.features}"
            )

    def client(self, cohort: Cohort, received: Received, call: Call) -> Sequence[Payload]:
        """Learn from labels while features are drawn to the prototypes; send one's own."""
        known = [prototypes.by_class() for prototypes in received.all(Prototypes)]
        tables = {
            "prototypes": Table([values for values, _ in known]),
            "known": Table([held.astype(np.float32) for _, held in known]),
        }
        learn = partial(self._learn, weight=self.settings.prototype_weight.at(call.progress))
        collect, width = self.settings.collect, known[0][0].shape[1]
        seen = fit_and_collect(cohort, learn, call, collect, layers=[PENULTIMATE], tables=tables)
        return [self._sent(features_of(own, width), own.labels) for own in seen]

    def _learn(self, outputs: Outputs, batch: Batch, *, weight: float) -> Losses:
        """Cross-entropy, and the distance to the class's prototype; 0 where it has none."""
        assert batch.labels is not None  # noqa: S101
        prototypes = batch.tables["prototypes"]
        features = pooled(outputs.features[PENULTIMATE], prototypes.shape[1])
        distances = (features - prototypes[batch.labels]).square().mean(-1)
        rows = batch.tables["known"][batch.labels] * distances
        return {**supervised(outputs, batch), "prototype": weight * PerRow(rows, of="private")}

    def _sent(self, features: Tensor, labels: np.ndarray | None) -> Prototypes:
        classes = self.federation.num_classes
        means, counts = class_means(features.numpy(), labels, classes)
        held = np.flatnonzero(counts)
        weights = counts[held] if self.settings.weighting == "count" else None
        return Prototypes(classes=held, values=means[held], num_classes=classes, counts=weights)

    def scores(self, cohort: Cohort, received: Received, inputs: Tensor) -> np.ndarray:
        """Judge by the nearest prototype, or by the model's own scores."""
        known = received.all(Prototypes)
        if self.settings.judge == "head" or not all(len(own.classes) for own in known):
            return cohort.predict(inputs)
        seen = cohort.outputs(on=inputs, layers=[PENULTIMATE])
        return np.stack([nearness(own, of) for own, of in zip(seen, known, strict=True)])

    def begin(self, server: ServerTools) -> Prototypes:
        """No prototype yet, but how many numbers one will have."""
        widths = feature_widths(self.federation, server.data.input_shape)
        width = self.settings.features or min(widths.values())
        return Prototypes(
            classes=np.zeros(0, np.int64),
            values=np.zeros((0, width), np.float32),
            num_classes=self.federation.num_classes,
        )

    def receives(self, state: Prototypes, client: int, round: Round) -> str:
        """The prototypes, for everybody; from the first round on they say how wide one is."""
        return "prototypes"

    def payload(self, state: Prototypes, key: str) -> Prototypes:
        """The prototypes."""
        return state

    def asks(self, state: Prototypes, client: int, round: Round, server: ServerTools) -> Asked:
        """Prototypes of some classes, with counts where they weight."""
        counts = self.settings.weighting == "count"
        return Prototypes.asked(state.num_classes, state.values.shape[1], counts=counts)

    def aggregate(
        self, state: Prototypes, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Prototypes:
        """Average over the holders of each class."""
        return mean_over_holders((own for _, own in payloads_of(uploads, Prototypes)), state)
