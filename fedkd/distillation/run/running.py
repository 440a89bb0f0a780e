"""A whole distillation: teacher, student, undistilled twin, and what each is worth."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from fedkd.distillation.fit.workshop import EpochListener, Workshop, labels_only
from fedkd.distillation.judging.result import Distillation
from fedkd.distillation.judging.scores import finished_logits, score, teacher_on_training_rows
from fedkd.distillation.methods import METHODS, method_class
from fedkd.distillation.run.finishing import (
    QUANTISED_STUDENT,
    compare_with_float,
    finish_student,
    measure_costs,
    prune_teacher,
    quantised_student,
    settle,
)
from fedkd.distillation.settings import DistillSettings
from fedkd.distillation.task.first_weights import load_weights
from fedkd.distillation.task.heads import split_into_heads, task_of_each_class, tasks_objective
from fedkd.distillation.task.participants import TeacherSettings
from fedkd.distillation.task.rows import Rows, load_rows
from fedkd.distillation.task.teachers import Teacher, teacher_names
from fedkd.inputs import Kind
from fedkd.objectives import Objective
from fedkd.objectives.basic import HardLabels


def choose_device(name: str) -> torch.device:
    """Return the device that the setting ``device`` names.

    Raises:
        ValueError: cuda where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but torch sees no GPU; use auto or cpu")
    return torch.device(name)


def _nobody(_name: str, _row: Mapping[str, Any]) -> None:
    return None


def distill(
    settings: DistillSettings, *, rows: Rows | None = None, observe: EpochListener = _nobody
) -> Distillation:
    """Train or load the teacher, distil the student, train its twin, and measure all three.

    Args:
        settings: everything that decides the result.
        rows: loaded already; None loads what ``settings.data`` names.
        observe: told after every epoch of every fit.

    Raises:
        ValueError: naming a setting that cannot work, as early as it can be known.
    """
    if rows is None:
        rows = load_rows(settings.data, seed=settings.seed, device=choose_device(settings.device))
    workshop = open_workshop(settings, rows, observe)
    method = method_class(settings.method.name)(settings.method)
    distilled = method.run(workshop)
    finish_student(distilled.student, workshop)
    twin = workshop.new_twin()
    workshop.fit(twin, name="twin", teacher=None, objective=labels_only(settings.objective))
    finish_student(twin, workshop, name="twin")
    models: dict[str, nn.Module] = {}
    predictions = finished_logits(rows)
    teacher_logits = None
    training_logits: dict[str, np.ndarray] = {}
    if workshop.teacher is not None:
        members = list(workshop.teacher.members)
        models.update(zip(teacher_names(len(members)), members, strict=True))
        each = torch.stack([predictions.logits(member, rows.test_inputs) for member in members])
        teacher_logits = workshop.teacher.opinion(each).cpu().numpy()
        training_logits = teacher_on_training_rows(workshop.teacher, rows, predictions)
    pruned = tuple(models) if settings.teacher.prune is not None else ()
    models |= {"student": distilled.student, "twin": twin, **distilled.others}
    notes = {**workshop.notes, **distilled.notes}
    sparsity = settle(models, pruned)
    if sparsity:
        notes["sparsity"] = sparsity
    if settings.student.quantise is not None:
        quantised = quantised_student(distilled.student, settings.student.quantise)
        models[QUANTISED_STUDENT] = quantised
        notes["int8"] = int8 = compare_with_float(distilled.student, quantised, rows)
    scores = {
        name: score(model, rows, teacher_logits, training_logits, predictions)
        for name, model in models.items()
    }
    for name, shares in sparsity.items():
        scores[name]["sparsity"] = shares["total"]
    if settings.student.quantise is not None:
        scores[QUANTISED_STUDENT]["agreement_with_student"] = int8["agreement_with_student"]
    return Distillation(
        settings=settings,
        rows=rows,
        models=models,
        scores=scores,
        costs=measure_costs(models, rows),
        histories={name: history.epochs for name, history in workshop.histories.items()},
        notes=notes,
        teacher=workshop.teacher,
        predictions=predictions,
    )


def open_workshop(
    settings: DistillSettings, rows: Rows, observe: EpochListener = _nobody
) -> Workshop:
    """Return the workshop of these settings, with the teacher trained or loaded.

    Raises:
        ValueError: naming what is not for inputs of this kind.
    """
    _check_kind(settings, rows.input_shape.kind)
    workshop = Workshop(
        rows=rows,
        teacher=None,
        student=settings.student,
        training=settings.training,
        objective=settings.objective,
        selection=settings.targets,
        seed=settings.seed,
        listener=observe,
        compares_gradients=settings.diagnostics.gradients,
    )
    if not method_class(settings.method.name).needs_teacher:
        return workshop
    return workshop.taught_by(train_teacher(settings.teacher, workshop))


def _check_kind(settings: DistillSettings, kind: Kind) -> None:
    method = method_class(settings.method.name)
    if kind not in method.takes:
        others = [name for name, other in METHODS.items() if kind in other.takes]
        raise ValueError(
            f"method {settings.method.name!r} is for {' and '.join(method.takes)}, and data.source "
            f"holds {kind}: use one of {', '.join(others)}"
        )
    settings.training.augmentation.check(kind, "training.augmentation")
    settings.teacher.training.augmentation.check(kind, "teacher.training.augmentation")


def train_teacher(settings: TeacherSettings, workshop: Workshop) -> Teacher:
    """Train or load every model of the teacher."""
    members = []
    every = workshop.rows
    rows = every.only_labelled() if settings.rows == "labelled" else every.all_labelled()
    names = teacher_names(len(settings.models))
    for number, (name, model) in enumerate(zip(names, settings.models, strict=True)):
        member = workshop.build(model, 1, number, trains=not settings.weights)
        objective = Objective({"ce": HardLabels(label_smoothing=settings.label_smoothing)})
        if settings.tasks:
            split_into_heads(member, settings.tasks, every.num_classes)
            objective = tasks_objective(settings.tasks, label_smoothing=settings.label_smoothing)
        if settings.weights:
            load_weights(member, settings.weights[number], setting="teacher.weights")
        else:
            workshop.fit(
                member,
                name=name,
                teacher=None,
                objective=objective,
                training=settings.training,
                rows=rows,
                key=(1, number),
            )
        if settings.prune is not None:
            prune_teacher(
                member,
                settings.prune,
                workshop,
                name=name,
                objective=objective,
                training=settings.training,
                rows=rows,
                key=(1, number),
            )
        members.append(member)
    task_of_class = None
    if settings.tasks and settings.heads == "own":
        task_of_class = task_of_each_class(settings.tasks, every.num_classes)
    return Teacher(members, settings.combine, task_of_class)
