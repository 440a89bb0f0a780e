"""What can be found wrong with a distillation before anything trains."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch

from fedkd.distillation.fit.fitting import Lesson, check_needs
from fedkd.distillation.fit.method import MethodSettings
from fedkd.distillation.methods import method_class
from fedkd.distillation.run.finishing import finish_student, quantised_student, settle
from fedkd.distillation.run.running import open_workshop
from fedkd.distillation.settings import DistillSettings
from fedkd.distillation.task.participants import StudentPruning, TeacherPruning, TrainingSettings
from fedkd.distillation.task.rows import Rows
from fedkd.models import ModelSettings, uses_batch_norm

Pruning = TypeVar("Pruning", TeacherPruning, StudentPruning)

REHEARSAL_ROWS = 2
"""Rows with and without labels that the set-up is tried on."""


def check(settings: DistillSettings, rows: Rows) -> None:
    """Set everything up on a few rows and train nothing.

    Builds every model, loads what is to be loaded, and binds the objective to the models.

    Args:
        settings: to try.
        rows: of these settings; test rows are not looked at.

    Raises:
        ValueError: naming the setting that cannot work.
    """
    untrained: dict[str, Any] = {"training": _without_epochs(settings.training)}
    teacher = settings.teacher.model_copy(
        update={
            "training": _without_epochs(settings.teacher.training),
            "prune": _without_finetuning(settings.teacher.prune),
        }
    )
    pruned = {"prune": _without_finetuning(settings.student.prune)}
    untrained["student"] = settings.student.model_copy(update=pruned)
    workshop = open_workshop(
        settings.model_copy(update={**untrained, "teacher": teacher}), _few(rows)
    )
    for setting, architecture in _models_of(settings.method):
        try:
            workshop.try_out(architecture)
        except ValueError as error:
            raise ValueError(f"{setting}: {error}") from error
    method_class(settings.method.name)(settings.method).check(
        replace(workshop, student=settings.student)
    )
    student = workshop.new_student()
    trained = [("training", settings.training, student)]
    if workshop.teacher is not None:
        lesson = Lesson(
            rows=rows,
            objective=settings.objective,
            training=settings.training,
            teacher=workshop.teacher,
            selection=settings.targets,
        )
        check_needs(lesson)
        workshop.fit(student, name="student", teacher=workshop.teacher)
        if not settings.teacher.weights:
            training = settings.teacher.training
            trained.append(("teacher.training", training, workshop.teacher))
    finish_student(student, workshop)
    if settings.student.quantise is not None:
        settle({"student": student})
        quantised_student(student, settings.student.quantise)
    for where, training, model in trained:
        if training.batch_size < 2 and uses_batch_norm(model):
            raise ValueError(
                f"{where}.batch_size must be >= 2 for a model with BatchNorm, which cannot train "
                f"on a single row, got {training.batch_size}"
            )


def _models_of(method: MethodSettings) -> Iterator[tuple[str, ModelSettings]]:
    """Yield the architectures among a method's own settings, each with its setting."""
    for name in type(method).model_fields:
        value = getattr(method, name)
        for model in value if isinstance(value, tuple) else (value,):
            if isinstance(model, ModelSettings):
                yield f"method.{name}", model


def _without_epochs(training: TrainingSettings) -> TrainingSettings:
    return training.model_copy(update={"epochs": 0})


def _without_finetuning(pruning: Pruning | None) -> Pruning | None:
    return pruning and pruning.model_copy(update={"finetune_epochs": 0})


def _few(rows: Rows) -> Rows:
    labelled = min(rows.labelled, REHEARSAL_ROWS)
    chosen = [*range(labelled), *range(rows.labelled, len(rows.inputs))[:REHEARSAL_ROWS]]
    positions = torch.tensor(chosen, device=rows.device)
    return replace(
        rows,
        inputs=rows.inputs[positions],
        labels=rows.labels[positions],
        labelled=labelled,
    )
