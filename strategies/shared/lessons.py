"""Algorithms whose clients send predictions and all receive the same lesson on public rows."""

from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import numpy as np

from fedkd.exchange.payload import Asked
from fedkd.exchange.payloads import Predictions
from fedkd.exchange.values import Value
from fedkd.training import Batch, Losses, Outputs, supervised, towards_targets
from strategies.contract import Round, ServerTools, Strategy, StrategySettings


@dataclass(frozen=True)
class Distilling:
    """``weight * temperature**2 * KL(target || model)`` on public rows, in nats.

    Attributes:
        weight: of the divergence.
        temperature: softens the model; the target is taken at it.
        labels: whether the cross-entropy on private rows is in the same step.
    """

    weight: float = 1.0
    temperature: float = 1.0
    labels: bool = False

    def __call__(self, outputs: Outputs, batch: Batch) -> Losses:
        """Return the losses of a step's rows."""
        taught = towards_targets(outputs, batch, temperature=self.temperature)
        own = supervised(outputs, batch) if self.labels else {}
        return {**own, **{name: self.weight * loss for name, loss in taught.items()}}


SettingsT = TypeVar("SettingsT", bound=StrategySettings)


@dataclass(frozen=True)
class Lesson(Value):
    """What the server remembers.

    Attributes:
        predictions: what all clients learn next; None before anybody has sent anything.
        trust: float64 ``[clients]`` that sums to 1, how much each client is trusted; None while all
            are trusted alike.
    """

    predictions: Predictions | None = None
    trust: np.ndarray | None = field(default=None, kw_only=True)


LessonT = TypeVar("LessonT", bound=Lesson)


class SharedLesson(Strategy[SettingsT, LessonT]):
    """Logits of the round's public rows go up; one lesson comes down to everybody.

    A subclass says what clients do with the lesson, and what the lesson is made of.
    """

    State: ClassVar[type[Value]] = Lesson
    up = (Predictions,)
    down = (Predictions,)
    needs_public = True
    has_ensemble = True

    def receives(self, state: LessonT, client: int, round: Round) -> str | None:
        """The lesson, once there is one, where clients learn from it."""
        return None if state.predictions is None or self.learns_alone else "lesson"

    def payload(self, state: LessonT, key: str) -> Predictions:
        """The lesson."""
        assert state.predictions is not None  # noqa: S101
        return state.predictions

    def asks(self, state: LessonT, client: int, round: Round, server: ServerTools) -> Asked:
        """Logits of the round's rows."""
        return round.asked_logits
