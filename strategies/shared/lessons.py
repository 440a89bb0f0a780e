"""Algorithms whose clients send predictions and all receive the same lesson on public rows."""

from dataclasses import dataclass
from typing import ClassVar, TypeVar

from fedkd.exchange.payload import Asked
from fedkd.exchange.payloads import Predictions
from fedkd.exchange.values import Value
from strategies.contract import Round, ServerTools, Strategy, StrategySettings

SettingsT = TypeVar("SettingsT", bound=StrategySettings)


@dataclass(frozen=True)
class Lesson(Value):
    """What the server remembers.

    Attributes:
        predictions: what all clients learn next; None before anybody has sent anything.
    """

    predictions: Predictions | None = None


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
        """The lesson, once there is one."""
        return None if state.predictions is None else "lesson"

    def payload(self, state: LessonT, key: str) -> Predictions:
        """The lesson."""
        assert state.predictions is not None  # noqa: S101
        return state.predictions

    def asks(self, state: LessonT, client: int, round: Round, server: ServerTools) -> Asked:
        """Logits of the round's rows."""
        return round.asked_logits
