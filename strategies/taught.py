"""What clients do in every algorithm that teaches them on public rows while they learn at home."""

from functools import partial

from pydantic import Field

from fedkd.schedules import (
    ConstantSchedule,
    CosineSchedule,
    NonNegativeSchedule,
    PositiveSchedule,
)
from fedkd.training import Cohort, distilled, supervised
from strategies.base import StrategySettings
from strategies.knowledge import Knowledge, Predictions
from strategies.plan import Federation, RoundPlan


class TaughtSettings(StrategySettings):
    """The student's side of the settings.

    Attributes:
        temperature: softens teachers and student; a number or a schedule over the run.
        ce_weight: weight of cross-entropy on private rows; a number or a schedule.
        kd_weight: weight of distillation on public rows; a number or a schedule.
        scale_by_t2: multiply the public term by the temperature's square.
        public_epochs: passes over the round's public rows, spread over its steps.
        confidence_threshold: leave out public rows whose target is less sure, in [0, 1).
    """

    temperature: PositiveSchedule = CosineSchedule(start=4.0, end=1.0)
    ce_weight: NonNegativeSchedule = ConstantSchedule(value=1.0)
    kd_weight: NonNegativeSchedule = ConstantSchedule(value=1.0)
    scale_by_t2: bool = True
    public_epochs: int = Field(1, ge=1)
    confidence_threshold: float = Field(0.0, ge=0, lt=1)


def rows_of_step(federation: Federation, settings: TaughtSettings, private_rows: int) -> int:
    """Return how many rows a step of `learn` takes: private ones, and its share of public ones."""
    local = federation.local
    public = settings.public_epochs * federation.rows_per_round
    return min(local.batch_size, private_rows) + public // max(local.count(private_rows), 1)


def learn(
    cohort: Cohort, received: Knowledge | None, plan: RoundPlan, settings: TaughtSettings
) -> None:
    """Minimise both terms in every step, or the private one where nothing teaches.

    With ``kd_weight`` 0 the public rows are left out altogether, so that the bits are those of
    learning alone.
    """
    ce_weight = settings.ce_weight.at(plan.progress)
    kd_weight = settings.kd_weight.at(plan.progress)
    if not isinstance(received, Predictions) or kd_weight == 0:
        cohort.fit(partial(supervised, weight=ce_weight), private=plan.local)
        return
    objective = partial(
        distilled,
        temperature=received.temperature,
        targets_are_logits=received.kind != "mean_probability",
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        scale_by_t2=settings.scale_by_t2,
        confidence_threshold=settings.confidence_threshold,
    )
    lesson = plan.public(received, epochs=settings.public_epochs)
    cohort.fit(objective, private=plan.local, public=lesson)
