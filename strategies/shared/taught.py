"""What clients do in every algorithm that teaches them on public rows while they learn at home."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal

from pydantic import model_validator

from fedkd.bounds import Count, ShareBelowOne
from fedkd.exchange.payloads import Predictions
from fedkd.objectives import Objective
from fedkd.objectives.basic import HardLabels, SoftTargets
from fedkd.objectives.terms import SoftenedTerm, Term
from fedkd.schedules import (
    ConstantSchedule,
    CosineSchedule,
    NonNegativeSchedule,
    PositiveSchedule,
)
from fedkd.training import (
    MODEL,
    Cohort,
    ComposedObjective,
    Learner,
    PublicLesson,
)
from strategies.contract import Call, Federation, Received, Round, Step, Strategy, StrategySettings


class TaughtSettings(StrategySettings):
    """The student's side of the settings.

    Attributes:
        temperature: softens teachers and student; a number or a schedule over the run.
        ce_weight: weight of cross-entropy on private rows; a number or a schedule.
        kd_weight: weight of distillation on public rows; a number or a schedule.
        scale_by_t2: multiply the public term by the temperature's square.
        objective: terms, of which the four settings above are a short form (``ce`` and ``kd``):
            those that need labels only are taken on private rows, the others on public rows, where
            what was received is the teacher. What travels is softened with the first temperature
            among them, or with 1.
        public_epochs: passes over the round's public rows, spread over its steps; more of them
            where a step would have fewer than two public rows.
        public_forward: ``joint`` takes a step's private and public rows through the model in one
            forward pass, in which BatchNorm mixes them: its statistics are those of both together;
            ``apart`` in a pass each, private rows first.
        confidence_threshold: leave out public rows whose target is less sure, in [0, 1).
    """

    temperature: PositiveSchedule = CosineSchedule(start=4.0, end=1.0)
    ce_weight: NonNegativeSchedule = ConstantSchedule(value=1.0)
    kd_weight: NonNegativeSchedule = ConstantSchedule(value=1.0)
    scale_by_t2: bool = True
    objective: Objective | None = None
    public_epochs: Count = 1
    public_forward: Literal["joint", "apart"] = "joint"
    confidence_threshold: ShareBelowOne = 0.0

    @model_validator(mode="after")
    def _terms_can_be_taught(self) -> "TaughtSettings":
        if self.objective is None:
            return self
        for name in ("temperature", "ce_weight", "kd_weight", "scale_by_t2"):
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default:
                raise ValueError(
                    f"strategy.{name} has no say beside strategy.objective, got "
                    f"{getattr(value, 'value', value)}: set it in a term such as kd"
                )
        comparing = self.objective.needs("features")
        if comparing:
            raise ValueError(
                f"strategy.objective.{comparing[0]} compares layers, but only predictions travel: "
                "use a term on logits such as kd, or strategy.name: fml"
            )
        if not _knowledge_terms(self.objective):
            raise ValueError(
                "strategy.objective must have a term that learns from a teacher, such as kd, got "
                f"{', '.join(self.objective.terms)}"
            )
        return self

    @cached_property
    def terms(self) -> Objective:
        """What a client minimises: ``objective``, or what its short form stands for."""
        if self.objective is not None:
            return self.objective
        ce = HardLabels(weight=self.ce_weight)
        kd = SoftTargets(
            weight=self.kd_weight, temperature=self.temperature, scale_by_t2=self.scale_by_t2
        )
        return Objective.model_validate({"ce": ce, "kd": kd})

    def softening(self, progress: float) -> float:
        """Return what predictions on public rows are softened with, at ``progress`` of the run."""
        for term in self.terms.terms.values():
            if isinstance(term, SoftenedTerm):
                return term.temperature.at(progress)
        return 1.0


def check_public_labels(settings: TaughtSettings, federation: Federation) -> None:
    """Refuse terms that need labels which the public set does not have.

    Raises:
        ValueError: naming the term and the setting.
    """
    needing = settings.terms.needs("transfer_labels")
    if needing:
        federation.check_public_labels(
            f"strategy.objective.{needing[0]}", "a term that does without, such as kd"
        )


def composed_of(settings: TaughtSettings, federation: Federation) -> ComposedObjective:
    """Return what a client minimises."""
    return ComposedObjective(learners={MODEL: _learner(federation.in_force(settings.terms))})


def never_taught(settings: TaughtSettings, federation: Federation) -> bool:
    """Return whether what clients receive has no weight in any round."""
    terms = _knowledge_terms(settings.terms)
    return all(federation.never(term.weight) for term in terms.values())


def lesson_of(
    objective: Objective, received: Predictions, settings: TaughtSettings, round: Round
) -> ComposedObjective:
    """Return terms whose teacher is what was received."""
    return ComposedObjective(
        learners={MODEL: _learner(objective)},
        progress=round.progress,
        temperature=received.temperature,
        confidence_threshold=settings.confidence_threshold,
    )


def knowledge_of(objective: Objective, progress: float) -> Objective | None:
    """Return the terms that a teacher has a part in and that have a weight; None without any."""
    terms = _knowledge_terms(objective)
    in_force = [name for name, term in terms.items() if term.weight.at(progress) > 0]
    return objective.only(in_force) if in_force else None


def _knowledge_terms(objective: Objective) -> dict[str, Term]:
    return {name: term for name, term in objective.terms.items() if term.needs != ("labels",)}


def _learner(objective: Objective) -> Learner:
    return Learner(objective=objective, setting="strategy.objective")


def apart_steps(strategy: Strategy[Any, Any], settings: TaughtSettings) -> Iterator[Step]:
    """Yield the smallest steps of clients whose public rows go through the model on their own."""
    if settings.public_forward == "joint" or strategy.learns_alone:
        return
    # However many steps a round has, each gets two of them, or the only one that there is.
    rows = min(2, strategy.federation.rows_per_round)
    yield from strategy.clients_public_steps(rows)


def rows_of_step(federation: Federation, settings: TaughtSettings, private_rows: int) -> int:
    """Return how many rows a step of `learn` takes: private ones, and its share of public ones."""
    local = federation.local
    public = settings.public_epochs * federation.rows_per_round
    return min(local.batch_size, private_rows) + public // max(local.count(private_rows), 1)


def learn(cohort: Cohort, received: Received, call: Call, settings: TaughtSettings) -> None:
    """Minimise all terms in every step, or those on private rows where nothing teaches.

    Where no other term has a weight the public rows are left out altogether, so that the bits are
    those of learning alone.
    """
    objective = call.federation.in_force(settings.terms)
    if received and knowledge_of(objective, call.progress) is not None:
        taught = received.all(Predictions)[0]
        lesson = lesson_of(objective, taught, settings, call)
        cohort.fit(lesson, private=call.local, public=_public(received, call, settings))
        return
    alone = [name for name, term in objective.terms.items() if term.needs == ("labels",)]
    if alone:
        learners = {MODEL: _learner(objective.only(alone))}
        cohort.fit(ComposedObjective(learners=learners, progress=call.progress), private=call.local)


def _public(received: Received, call: Call, settings: TaughtSettings) -> PublicLesson:
    return call.lesson(
        received, epochs=settings.public_epochs, apart=settings.public_forward == "apart"
    )
