"""Schedules: values that change over a run, as pure functions of its progress.

Progress runs from 0 (first round) to 1 (last round) and is the only input, so a resumed run finds
the same values again. In a settings file a schedule is a plain number, which is a constant, or a
table with a kind::

    temperature: 2.0
    temperature: {kind: cosine, start: 4.0, end: 1.0}
    kd_weight: {kind: step, values: [0.0, 1.0], milestones: [0.2]}   # burn in, then distil
    kd_weight: {kind: ramp_up, end: 1.0, until: 0.25}

A settings model declares such a field as `PositiveSchedule`, `NonNegativeSchedule` or `Schedule`,
with a `ConstantSchedule` as its default, and asks ``.at(progress)``.
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from fedkd.bounds import LIMITS_OF_TEMPERATURES, LIMITS_OF_WEIGHTS, PositiveShare, Real, shown


def constant(progress: float, *, value: float) -> float:
    """Return ``value`` whatever the progress, which still has to lie in [0, 1]."""
    _check_progress(progress)
    return value


def linear(progress: float, *, start: float, end: float) -> float:
    """Go from ``start`` to ``end`` along a straight line.

    Raises:
        ValueError: if ``progress`` is outside [0, 1].

    Examples:
        >>> from fedkd.schedules import linear
        >>> linear(0.25, start=4.0, end=0.0)
        3.0
    """
    _check_progress(progress)
    return _between(start, end, progress)


def cosine(progress: float, *, start: float, end: float) -> float:
    """Go from ``start`` to ``end`` along half a cosine wave: slow, fast, slow.

    Raises:
        ValueError: if ``progress`` is outside [0, 1].

    Source:
        Loshchilov and Hutter, 2017, equation 5, without restarts.
        https://arxiv.org/abs/1608.03983

    Examples:
        >>> from fedkd.schedules import cosine
        >>> [cosine(progress, start=4.0, end=1.0) for progress in (0.0, 0.5, 1.0)]
        [4.0, 2.5, 1.0]
    """
    _check_progress(progress)
    return _between(start, end, (1 - math.cos(math.pi * progress)) / 2)


def exponential(progress: float, *, start: float, end: float) -> float:
    """Go from ``start`` to ``end`` by equal ratios; halfway is their geometric mean.

    Raises:
        ValueError: if ``progress`` is outside [0, 1], or ``start`` or ``end`` is not positive.

    Examples:
        >>> from fedkd.schedules import exponential
        >>> exponential(0.5, start=4.0, end=1.0)
        2.0
    """
    _check_progress(progress)
    for name, value in (("start", start), ("end", end)):
        if not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")
    return _clamp(start ** (1 - progress) * end**progress, start, end)


def step(progress: float, *, values: Sequence[float], milestones: Sequence[float]) -> float:
    """Hold each of ``values`` in turn; the next one takes over at its milestone.

    Args:
        progress: in [0, 1].
        values: one more than there are milestones.
        milestones: points of progress, increasing, in (0, 1].

    Raises:
        ValueError: if ``progress`` is outside [0, 1], or ``values`` and ``milestones`` do not fit.

    Examples:
        >>> from fedkd.schedules import step
        >>> step(0.6, values=[4.0, 1.0], milestones=[0.5])
        1.0
    """
    _check_progress(progress)
    _check_steps(values, milestones)
    return values[bisect_right(milestones, progress)]


def ramp_up(progress: float, *, start: float = 0.0, end: float, until: float = 1.0) -> float:
    """Rise from about ``start`` to ``end`` along a Gaussian, then stay there.

    ``start + (end - start) * exp(-5 * (1 - progress / until)**2)``; at progress 0 that is 0.7 %
    of the way, as published, not exactly ``start``.

    Args:
        progress: in [0, 1].
        start: value that the Gaussian rises from.
        end: value from ``until`` on.
        until: progress at which the rise ends, in (0, 1].

    Raises:
        ValueError: if ``progress`` is outside [0, 1] or ``until`` outside (0, 1].

    Source:
        Laine and Aila, 2017, section 2.1. https://arxiv.org/abs/1610.02242; used as the weight
        of distillation by Lan et al., 2018 (ONE). https://arxiv.org/abs/1806.04606

    Examples:
        >>> from fedkd.schedules import ramp_up
        >>> ramp_up(1.0, end=2.0)
        2.0
    """
    _check_progress(progress)
    if not 0 < until <= 1:
        raise ValueError(f"until must be in (0, 1], got {until}")
    share = 1.0 if progress >= until else math.exp(-5 * (1 - progress / until) ** 2)
    return _between(start, end, share)


def _check_progress(progress: float) -> None:
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must be in [0, 1], got {progress}")


def _check_steps(values: Sequence[float], milestones: Sequence[float]) -> None:
    if len(values) != len(milestones) + 1:
        raise ValueError(
            f"step needs one more value than milestones, "
            f"got {len(values)} values and {len(milestones)} milestones"
        )
    increasing = all(a < b for a, b in pairwise(milestones))
    if not (increasing and all(0 < milestone <= 1 for milestone in milestones)):
        raise ValueError(f"milestones must increase within (0, 1], got {list(milestones)}")


def _between(start: float, end: float, share: float) -> float:
    # Exact at both ends; clamped, because 0.9 * v + 0.1 * v can miss v by one rounding.
    return _clamp((1 - share) * start + share * end, start, end)


def _clamp(value: float, start: float, end: float) -> float:
    return min(max(value, min(start, end)), max(start, end))


_LARGEST = 1e6

_Number: TypeAlias = Annotated[Real, Field(ge=-_LARGEST, le=_LARGEST)]


class _ScheduleSettings(BaseModel, ABC):
    """What every kind of schedule answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @abstractmethod
    def at(self, progress: float) -> float:
        """Return the value in force at ``progress`` in [0, 1]; ValueError outside."""

    def range(self) -> tuple[float, float]:
        """Return the smallest and the largest value over the whole run."""
        # Every kind but `step` is monotone, so its extremes are its ends.
        low, high = sorted((self.at(0.0), self.at(1.0)))
        return low, high


class ConstantSchedule(_ScheduleSettings):
    """The same value all the time; a plain number in a settings file means this."""

    kind: Literal["constant"] = "constant"
    value: _Number = Field(description="the value, finite")

    def at(self, progress: float) -> float:
        """Return the value in force at ``progress`` in [0, 1]; ValueError outside."""
        return constant(progress, value=self.value)


class LinearSchedule(_ScheduleSettings):
    """A straight line; see `linear`."""

    kind: Literal["linear"] = "linear"
    start: _Number = Field(description="value at progress 0, finite")
    end: _Number = Field(description="value at progress 1, finite")

    def at(self, progress: float) -> float:
        """Return the value in force at ``progress`` in [0, 1]; ValueError outside."""
        return linear(progress, start=self.start, end=self.end)


class CosineSchedule(_ScheduleSettings):
    """Half a cosine wave; see `cosine`."""

    kind: Literal["cosine"] = "cosine"
    start: _Number = Field(description="value at progress 0, finite")
    end: _Number = Field(description="value at progress 1, finite")

    def at(self, progress: float) -> float:
        """Return the value in force at ``progress`` in [0, 1]; ValueError outside."""
        return cosine(progress, start=self.start, end=self.end)


class ExponentialSchedule(_ScheduleSettings):
    """Equal ratios; see `exponential`."""

    kind: Literal["exponential"] = "exponential"
    start: Real = Field(ge=1e-6, le=_LARGEST, description="value at progress 0, > 0")
    end: Real = Field(ge=1e-6, le=_LARGEST, description="value at progress 1, > 0")

    def at(self, progress: float) -> float:
        """Return the value in force at ``progress`` in [0, 1]; ValueError outside."""
        return exponential(progress, start=self.start, end=self.end)


class StepSchedule(_ScheduleSettings):
    """Values held in turn; see `step`."""

    kind: Literal["step"] = "step"
    values: tuple[_Number, ...] = Field(description="held in turn, one more than milestones")
    milestones: tuple[_Number, ...] = Field(
        description="progress at which the next value takes over, increasing, in (0, 1]"
    )

    @model_validator(mode="after")
    def _fit(self) -> "StepSchedule":
        try:
            _check_steps(self.values, self.milestones)
        except ValueError as error:
            raise _error(str(error)) from None
        return self

    def at(self, progress: float) -> float:
        """Return the value in force at ``progress`` in [0, 1]; ValueError outside."""
        return step(progress, values=self.values, milestones=self.milestones)

    def range(self) -> tuple[float, float]:
        """Return the smallest and the largest value over the whole run."""
        return min(self.values), max(self.values)


class RampUpSchedule(_ScheduleSettings):
    """A Gaussian rise, then flat; see `ramp_up`."""

    kind: Literal["ramp_up"] = "ramp_up"
    start: _Number = Field(default=0.0, description="value that the rise sets out from, finite")
    end: _Number = Field(description="value from `until` on, finite")
    until: PositiveShare = Field(
        default=1.0, description="progress at which the rise ends, in (0, 1]"
    )

    def at(self, progress: float) -> float:
        """Return the value in force at ``progress`` in [0, 1]; ValueError outside."""
        return ramp_up(progress, start=self.start, end=self.end, until=self.until)


_AnySchedule: TypeAlias = (
    ConstantSchedule
    | LinearSchedule
    | CosineSchedule
    | ExponentialSchedule
    | StepSchedule
    | RampUpSchedule
)
_KINDS: dict[str, type[_AnySchedule]] = {
    "constant": ConstantSchedule,
    "linear": LinearSchedule,
    "cosine": CosineSchedule,
    "exponential": ExponentialSchedule,
    "step": StepSchedule,
    "ramp_up": RampUpSchedule,
}


def _error(reason: str) -> PydanticCustomError:
    # Unlike a ValueError, it reaches the reader without "Value error, " in front.
    return PydanticCustomError("schedule", "{reason}", {"reason": reason})


def _read(value: object, _union: Callable[[object], object]) -> _AnySchedule:
    # Chosen by hand: a union that tries every kind would answer one slip with six errors.
    if isinstance(value, _AnySchedule):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not -_LARGEST <= value <= _LARGEST:
            raise _error(f"must be a number up to {_LARGEST:g}, got {shown(value)}")
        return ConstantSchedule(value=value)
    known = ", ".join(_KINDS)
    if not isinstance(value, Mapping):
        raise _error(f"must be a number or a table with a kind ({known}), got {shown(value)}")
    if "kind" not in value:
        raise _error(f"a schedule needs a kind; known: {known}")
    kind = value["kind"]
    if not isinstance(kind, str) or kind not in _KINDS:
        raise _error(f"unknown kind of schedule {shown(kind)}; known: {known}")
    return _KINDS[kind].model_validate(value)


@dataclass(frozen=True, slots=True)
class Between:
    """Refuses a schedule that ever leaves two bounds; a validator of pydantic's `Annotated`."""

    low: float
    high: float

    def __call__(self, schedule: _AnySchedule) -> _AnySchedule:
        """Return the schedule."""
        smallest, largest = schedule.range()
        for value, which, fits in (
            (smallest, "smallest", smallest >= self.low),
            (largest, "largest", largest <= self.high),
        ):
            if not fits:
                kind = schedule.kind
                where = (
                    "" if kind == "constant" else f" (the {which} value of this {kind} schedule)"
                )
                raise _error(f"must be {self}, got {value}{where}")
        return schedule

    def __str__(self) -> str:
        return f">= {self.low:g} and <= {self.high:g}"


# The types that settings models use for their fields.
Schedule: TypeAlias = Annotated[_AnySchedule, WrapValidator(_read)]
PositiveSchedule: TypeAlias = Annotated[Schedule, AfterValidator(Between(*LIMITS_OF_TEMPERATURES))]
"""For what is divided by: temperatures."""
NonNegativeSchedule: TypeAlias = Annotated[Schedule, AfterValidator(Between(*LIMITS_OF_WEIGHTS))]
"""For factors: weights of losses, a decay."""
