"""Prototypes: what clients do where class means of features travel, however they are joined."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Literal, TypeVar

import numpy as np
from torch import Tensor

from fedkd.bounds import Width
from fedkd.exchange.payload import Asked, Payload
from fedkd.exchange.payloads import Prototypes
from fedkd.exchange.values import Value
from fedkd.inputs import Shape
from fedkd.losses.reduction import PerRow
from fedkd.objectives.taps import PENULTIMATE
from fedkd.schedules import ConstantSchedule, NonNegativeSchedule
from fedkd.training import Batch, Cohort, Losses, Outputs, Table, supervised
from strategies.contract import (
    Call,
    PrivateUse,
    Received,
    Round,
    ServerTools,
    Strategy,
    StrategySettings,
)
from strategies.shared.class_means import Collect, class_means, fit_and_collect
from strategies.shared.features import feature_widths, features_of, nearness, pooled


class PrototypeSettings(StrategySettings):
    """Settings of every algorithm whose clients draw features to prototypes.

    Attributes:
        prototype_weight: weight of the distance to the prototype of a row's class, lambda in the
            paper; a number or a schedule.
        features: numbers of a prototype; models with more features have neighbours averaged. None:
            as many as the narrowest of ``clients.models`` has.
        collect: which of its own features a client averages. ``last_epoch``: those that its model
            puts out in the round's last pass; ``round``: in all of it; ``evaluation``: those of the
            trained model, in evaluation mode.
        judge: ``prototype`` takes the class of the nearest prototype, as in the paper; ``head``
            takes the model's own scores.
    """

    prototype_weight: NonNegativeSchedule = ConstantSchedule(value=1.0)
    features: Width | None = None
    collect: Collect = "last_epoch"
    judge: Literal["prototype", "head"] = "prototype"


SettingsT = TypeVar("SettingsT", bound=PrototypeSettings)
StateT = TypeVar("StateT", bound=Value)


class SharedPrototypes(Strategy[SettingsT, StateT]):
    """Class means of features up; prototypes down, to which clients draw their features.

    A subclass says how the server makes prototypes of what clients sent.
    """

    up = (Prototypes,)
    down = (Prototypes,)
    judges_received = True

    @property
    def private_use(self) -> PrivateUse:
        """Class means are made of private rows."""
        return super().private_use._replace(
            sent="mean features of the private rows of each class",
        )

    @property
    def counted(self) -> bool:
        """Whether clients say how many features their means are of."""
        return False

    @property
    def scores_are_logits(self) -> bool:
        """Not where they say how near a prototype is."""
        return self.settings.judge == "head"

    @abstractmethod
    def prototypes(self, state: StateT) -> Prototypes:
        """Return the prototypes that clients receive; none before there are any."""

    def check(self, input_shape: Shape) -> None:
        """Refuse models without features, and prototypes that are wider than some model's."""
        super().check(input_shape)
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
        weights = counts[held] if self.counted else None
        return Prototypes(classes=held, values=means[held], num_classes=classes, counts=weights)

    def scores(self, cohort: Cohort, received: Received, inputs: Tensor) -> np.ndarray:
        """Judge by the nearest prototype, or by the model's own scores."""
        known = received.all(Prototypes)
        if self.settings.judge == "head" or not all(len(own.classes) for own in known):
            return cohort.predict(inputs)
        seen = cohort.outputs(on=inputs, layers=[PENULTIMATE])
        return np.stack([nearness(own, of) for own, of in zip(seen, known, strict=True)])

    def no_prototypes(self, server: ServerTools) -> Prototypes:
        """Return none, which say all the same how many numbers one will have."""
        widths = feature_widths(self.federation, server.data.input_shape)
        width = self.settings.features or min(widths.values())
        return Prototypes(
            classes=np.zeros(0, np.int64),
            values=np.zeros((0, width), np.float32),
            num_classes=self.federation.num_classes,
        )

    def receives(self, state: StateT, client: int, round: Round) -> str:
        """The prototypes, for everybody; from the first round on they say how wide one is."""
        return "prototypes"

    def payload(self, state: StateT, key: str) -> Prototypes:
        """The prototypes."""
        return self.prototypes(state)

    def asks(self, state: StateT, client: int, round: Round, server: ServerTools) -> Asked:
        """Prototypes of some classes, with counts where they weight."""
        known = self.prototypes(state)
        return Prototypes.asked(known.num_classes, known.values.shape[1], counts=self.counted)
