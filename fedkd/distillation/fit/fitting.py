"""Training one model: on labels, on what a teacher says, or on both."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedkd.data.augmentation import AugmentationSettings, Views
from fedkd.distillation.fit.epochs import (
    EpochRow,
    FitHistory,
    FitRecord,
    Watcher,
    epoch_means,
)
from fedkd.distillation.fit.feeding import (
    RowViews,
    own_batches,
    transfer_batches,
    validated,
)
from fedkd.distillation.fit.probes import TargetEntropy, fixed_rows, gradients_beside_labels
from fedkd.distillation.task.participants import TrainingSettings
from fedkd.distillation.task.rows import Rows
from fedkd.distillation.task.selection import RowSelector, Selection
from fedkd.distillation.task.teachers import Teacher, TeacherCache
from fedkd.models.dropout import connect_dropout, step_keys
from fedkd.objectives import BoundObjective, Objective, View
from fedkd.objectives.basic import LogitL1, LogitMSE, SoftTargets
from fedkd.objectives.response import AnnealingKD, DisagreementKD, StandardisedKD
from fedkd.objectives.terms import Need, SoftenedTerm
from fedkd.randomness import Purpose, seeded_everything, torch_seed_for
from fedkd.targets import Targets
from fedkd.training.steps import RatedOptimizer, StepRecords, Steps

LOGIT_TERMS = (LogitMSE, LogitL1, AnnealingKD, DisagreementKD, StandardisedKD)
"""Terms that compare logits as they are, and not the probabilities made of them."""

Target = Callable[[float], Targets]
"""Makes the teacher's target for a temperature: logits whose softmax at it is the target."""


def _nobody(_row: Mapping[str, Any]) -> None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What a model learns.

    Attributes:
        rows: transfer rows, and those with labels among them.
        objective: the sum of terms to minimise.
        training: how long, in which batches, with which optimizer.
        teacher: who knows something about the transfer rows; None: only labels teach.
        selection: which transfer rows count.
        seed: of the run.
        key: tells apart the fits of a run; equal keys give equal batches.
        compares_gradients: whether every epoch ends with a comparison of the terms' gradients.
    """

    rows: Rows
    objective: Objective
    training: TrainingSettings
    teacher: Teacher | None = None
    selection: Selection = field(default_factory=Selection)
    seed: int = 0
    key: tuple[int, ...] = ()
    compares_gradients: bool = False


def fit(student: nn.Module, lesson: Lesson, watch: Watcher = _nobody) -> FitHistory:
    """Train a model in place.

    An epoch is one pass over the transfer rows. Where some of them have no labels, every step
    takes a batch of transfer rows for the teacher's terms and a batch of labelled rows for the
    labels, in one forward pass; else both are the same batch. Batches depend on the seed and the
    key alone: a twin that learns from labels only takes the same labelled batches.

    Args:
        student: in training mode afterwards only while it trains; left in evaluation mode.
        lesson: what to learn.
        watch: told after every epoch.

    Raises:
        ValueError: if a term needs what the lesson does not have.
    """
    return _Fit(student, lesson, watch).run()


class _Fit:
    def __init__(self, student: nn.Module, lesson: Lesson, watch: Watcher) -> None:
        self._student, self._lesson, self._watch = student, lesson, watch
        self._rows, self._training = lesson.rows, lesson.training
        self._teacher = lesson.teacher
        check_needs(lesson)
        self._bound: BoundObjective = lesson.objective.bind(
            student,
            None if self._teacher is None else self._teacher.first,
            self._rows.inputs[:2],
            num_classes=self._rows.num_classes,
            rows=len(self._rows.inputs),
            seed=torch_seed_for(lesson.seed, Purpose.DISTILL, *lesson.key, 1),
        )
        self._teaches = self._teacher is not None and any(
            bound.term.weight.range()[1] > 0 and bound.term.needs != ("labels",)
            for bound in self._bound.terms.values()
        )
        self._taps = bool(self._bound.student_layers)
        self._row_views = RowViews(lesson.rows, lesson.training, seed=lesson.seed, key=lesson.key)
        self._cache: TeacherCache | None = None
        if self._teaches and self._teacher is not None:
            clean = self._training.augmentation.teacher_view == "clean"
            clean = clean or not self._row_views.augments
            if clean and not self._taps:
                self._cache = TeacherCache(self._teacher, self._rows.inputs)
        softened = _softened_terms(lesson.objective)
        lowest, highest = softened[0].target_temperature_range() if softened else (1.0, 1.0)
        self._target_entropy = TargetEntropy(
            same_every_epoch=self._cache is not None and lowest == highest
        )
        self._row_tasks: Int[Tensor, " rows"] | None = None
        if self._teacher is not None:
            self._row_tasks = self._teacher.task_ids(self._rows.labels)
        self._selector = self._row_selector()

    def run(self) -> FitHistory:
        training, student = self._training, self._student
        record = FitRecord(training, self._watch)
        batches = self._batches()
        if not batches:
            student.eval()
            return record.history
        seed = torch_seed_for(self._lesson.seed, Purpose.DISTILL, *self._lesson.key, 2)
        parameters = [*student.parameters(), *self._bound.parts.parameters()]
        optimizer = RatedOptimizer(
            training.optimizer.build(parameters), training.optimizer, len(batches)
        )
        dropout = connect_dropout(student)
        steps = Steps(
            [optimizer],
            len(batches),
            epochs=training.epochs,
            dropout=[dropout],
            keys=None if dropout is None else torch.from_numpy(step_keys(seed, len(batches))),
        )
        teacher_model = None if self._teacher is None else self._teacher.first
        with (
            seeded_everything(seed),
            self._bound.tapping(student, teacher_model if self._taps else None) as features,
        ):
            student.train()
            self._bound.parts.train()
            for step in steps:
                transfer, labelled = batches[step.number]
                losses = self._losses(transfer, labelled, features, step.progress, steps.records)
                steps.descend(losses)
                if step.epoch is None:
                    continue
                row = self._epoch_row(step.epoch, steps.records.take(), step.progress)
                row["learning_rate"] = optimizer.rate
                if self._teaches and self._lesson.compares_gradients:
                    row |= self._gradients(features, step.progress)
                record.close_epoch(row, student)
                if record.stopped:
                    break
                student.train()
        record.restore_best(student)
        student.eval()
        return record.history

    def _batches(self) -> Sequence[tuple[Int[Tensor, " _"], Int[Tensor, " _"] | None]]:
        """Return for every step its transfer rows, and its labelled rows where these differ."""
        seed, key = self._lesson.seed, self._lesson.key
        rows, training = self._rows, self._training
        transfer = transfer_batches(rows, training, seed=seed, key=key)
        if rows.labelled == len(rows.inputs):
            return [(batch, None) for batch in transfer]
        if not rows.labelled:
            return [(batch, batch[:0]) for batch in transfer]
        own = own_batches(rows, rows.labelled, training, steps=len(transfer), seed=seed, key=key)
        return list(zip(transfer, own, strict=True))

    def _losses(
        self,
        transfer: Int[Tensor, " rows"],
        labelled: Int[Tensor, " labelled"] | None,
        features: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
        progress: float,
        records: StepRecords,
    ) -> dict[str, Float[Tensor, ""]]:
        rows, student = self._rows, self._student
        if not self._teaches:
            # No term looks at rows without labels: they need not go through the model.
            own = transfer if labelled is None else labelled
            inputs, mix = self._row_views.own(own)
            view = View(
                labelled_logits=student(inputs),
                labels=rows.labels[own],
                mix=mix,
                progress=progress,
            )
            return self._bound.losses(view)
        temperature = self._bound.target_temperature(progress)
        view, target = self._view(
            self._row_views, transfer, labelled, features, progress, temperature
        )
        if view.targets is not None:
            self._target_entropy.add(view.targets, temperature=temperature)
        if self._selector is not None:
            # It looks at the target without temperature.
            weights, shares = self._selector.weights(view._replace(targets=target(1.0)))
            view = view._replace(weights=weights)
            for name, share in shares.items():
                records.add(f"targets/{name}", torch.as_tensor(share))
        for name, value in self._bound.notes(view).items():
            records.add(f"notes/{name}", value)
        return self._bound.losses(view)

    def _view(
        self,
        row_views: RowViews,
        transfer: Int[Tensor, " rows"],
        labelled: Int[Tensor, " labelled"] | None,
        features: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
        progress: float,
        temperature: float,
    ) -> tuple[View, Target]:
        """Run the student, and ask the teacher, about rows; the target can be made anew."""
        rows, student = self._rows, self._student
        views = row_views.both(transfer)
        num_transfer = len(transfer)
        labels_known = labelled is None
        labelled_logits: Tensor | None
        labels: Tensor | None
        if labelled is None:
            logits = labelled_logits = student(views.student)
            labels, mix = rows.labels.index_select(0, transfer), views.mix
        elif len(labelled):
            inputs, mix = row_views.own(labelled)
            both = student(torch.cat([views.student, inputs]))
            logits, labelled_logits = both[:num_transfer], both[num_transfer:]
            labels = rows.labels[labelled]
        else:
            logits = student(views.student)
            labelled_logits = labels = mix = None
        known_labels = labels if labels_known else None
        target = self._taught(transfer, known_labels, views)
        view = View(
            labelled_logits=labelled_logits,
            labels=labels,
            mix=mix,
            logits=logits,
            targets=target(temperature),
            transfer_labels=known_labels,
            features={name: tensor[:num_transfer] for name, tensor in features[0].items()},
            teacher_features=features[1],
            rows=transfer,
            progress=progress,
        )
        return view, target

    def _row_selector(self) -> RowSelector | None:
        """Return who weighs transfer rows; None: they all count the same."""
        selection, rows, teacher = self._lesson.selection, self._rows, self._teacher
        if teacher is None or not self._teaches or not selection.is_on:
            return None
        if selection.curriculum is None:
            return RowSelector(selection)
        cache = self._cache or TeacherCache(teacher, rows.inputs)
        every = torch.arange(len(rows.inputs), device=rows.device)
        labels = rows.labels if rows.labelled == len(every) else None
        targets = teacher.combine(
            cache.logits(every), temperature=1.0, labels=labels, tasks=self._row_tasks
        )
        return RowSelector(selection, targets, labels)

    def _gradients(
        self, features: tuple[Mapping[str, Tensor], Mapping[str, Tensor]], progress: float
    ) -> dict[str, float]:
        """Compare the terms' gradients on fixed rows, unaugmented, in evaluation mode."""
        rows, lesson = self._rows, self._lesson
        transfer = fixed_rows(0, len(rows.inputs), rows.device)
        labelled = None
        if rows.labelled < len(rows.inputs):
            labelled = fixed_rows(0, rows.labelled, rows.device)
        augmentation = AugmentationSettings()
        plain = lesson.training.model_copy(update={"augmentation": augmentation})
        row_views = RowViews(rows, plain, seed=lesson.seed, key=lesson.key)
        self._student.eval()
        temperature = self._bound.target_temperature(progress)
        view, _ = self._view(row_views, transfer, labelled, features, progress, temperature)
        return gradients_beside_labels(self._bound, view, self._student)

    def _taught(
        self, transfer: Int[Tensor, " rows"], labels: Int[Tensor, " rows"] | None, views: Views
    ) -> Target:
        """Ask the teacher, and return what makes its target for a temperature."""
        teacher = self._teacher
        if teacher is None:
            raise ValueError("a term needs a teacher, got none")
        if self._cache is not None:
            each = self._cache.logits(transfer)
        else:
            each = teacher.member_logits(views.teacher)
        tasks = None if self._row_tasks is None else self._row_tasks[transfer]

        # Not a function in here: its annotations would be made anew in every step.
        return partial(_target, teacher, each, labels, tasks, views)

    def _epoch_row(self, epoch: int, recorded: Mapping[str, Tensor], progress: float) -> EpochRow:
        row: EpochRow = {"epoch": epoch, **epoch_means(recorded)}
        entropy = self._target_entropy.take()
        if entropy is not None:
            row["targets/entropy"] = entropy
        row |= validated(self._student, self._rows)
        return row | self._bound.in_force(progress)


def _target(
    teacher: Teacher,
    each: Float[Tensor, "teachers rows classes"],
    labels: Int[Tensor, " rows"] | None,
    tasks: Int[Tensor, " rows"] | None,
    views: Views,
    temperature: float,
) -> Targets:
    """Make the target of a batch for a temperature."""
    target = teacher.combine(each, temperature=temperature, labels=labels, tasks=tasks)
    if views.mix is None or views.teacher_is_mixed:
        return target
    mixed = views.targets(target.probabilities(temperature))
    return Targets.softened(mixed, temperature=temperature)


def check_needs(lesson: Lesson) -> None:
    """Refuse an objective that needs what the lesson does not have.

    Raises:
        ValueError: naming the term and what is missing.
    """
    objective, rows = lesson.objective, lesson.rows
    if objective.needs("labels") and not rows.labelled:
        raise ValueError(
            f"objective.{objective.needs('labels')[0]} needs labelled rows, but data.private_rows "
            "is 0: remove the term"
        )
    unlabelled = len(rows.inputs) - rows.labelled
    needs_all_labels = {
        f"objective.{name}": "use a term without labels such as kd"
        for name in objective.needs("transfer_labels")
    }
    if lesson.selection.needs_labels:
        by = f"targets.difficulty: {lesson.selection.difficulty}"
        needs_all_labels[by] = "use teacher_entropy or disagreement"
    if lesson.teacher is not None and lesson.teacher.needs_labels:
        needs_all_labels["teacher.combine.by: labels"] = "use uniform, confidence or entropy"
    for what, instead in needs_all_labels.items():
        if unlabelled:
            raise ValueError(
                f"{what} needs the labels of all transfer rows, but {unlabelled} of "
                f"{len(rows.inputs)} have none: set data.public.size=0, or {instead}"
            )
    _check_mixing(lesson)
    _check_weighing(lesson)
    _check_temperatures(lesson)
    if lesson.teacher is not None and lesson.teacher.routes:
        for name, term in objective.terms.items():
            if isinstance(term, LOGIT_TERMS):
                raise ValueError(
                    f"objective.{name} compares logits, which classes of other tasks do not have: "
                    "set teacher.heads=all, or use a term of probabilities such as kd"
                )


def _check_mixing(lesson: Lesson) -> None:
    """Refuse mixup where something needs a row's own label, id or features."""
    augmentation, objective, teacher = (
        lesson.training.augmentation,
        lesson.objective,
        lesson.teacher,
    )
    if not augmentation.mixup or teacher is None:
        return
    single: list[Need] = ["transfer_labels", "rows"]
    if augmentation.teacher_view != "same":
        single.append("features")
    what = [f"objective.{name}" for need in single for name in objective.needs(need)]
    if lesson.selection.needs_labels:
        what.append(f"targets.difficulty: {lesson.selection.difficulty}")
    if teacher.needs_labels:
        what.append("teacher.combine.by: labels")
    if what:
        raise ValueError(
            f"{what[0]} goes by single rows, which training.augmentation.mixup "
            f"({augmentation.mixup}) mixes: set it to 0, or remove {what[0]}"
        )


def _check_weighing(lesson: Lesson) -> None:
    """Refuse a selection that no term follows."""
    if lesson.teacher is None or not lesson.selection.is_on:
        return
    taught = {
        name: term
        for name, term in lesson.objective.terms.items()
        if term.needs != ("labels",) and term.weight.range()[1] > 0
    }
    if taught and not any(term.weighs_rows for term in taught.values()):
        raise ValueError(
            f"targets weigh single rows, but objective.{next(iter(taught))} compares rows with "
            "each other and follows no weights: remove targets, or add a term such as kd"
        )


def _check_temperatures(lesson: Lesson) -> None:
    """Refuse terms of different temperatures where one target is made for one temperature."""
    teacher, augmentation = lesson.teacher, lesson.training.augmentation
    if teacher is None:
        return
    mixed = augmentation.mixup > 0 and augmentation.teacher_view != "same"
    if not mixed and not teacher.depends_on_temperature:
        return
    found = {
        name: _target_temperature(term)
        for name, term in lesson.objective.terms.items()
        if isinstance(term, SoftenedTerm) and term.weight.range()[1] > 0
    }
    first = next(iter(found), "")
    for name, temperature in found.items():
        if temperature != found[first]:
            what = "mixed targets are" if mixed else "the target of several teachers is"
            raise ValueError(
                f"{what} made for one temperature, but objective.{first} and objective.{name} "
                "have different ones: give them the same"
                + ("" if mixed else ", or set teacher.combine.average=logit")
            )


def _softened_terms(objective: Objective) -> list[SoftenedTerm]:
    return [term for term in objective.terms.values() if isinstance(term, SoftenedTerm)]


def _target_temperature(term: SoftenedTerm) -> object:
    """Return what decides the teacher's temperature; equal for terms that share it."""
    if isinstance(term, SoftTargets):
        if term.learned:
            return term
        return term.teacher_temperature or term.temperature
    return term.temperature
