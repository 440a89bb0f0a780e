"""What is done to a model when its training is over: pruning and int8 weights, and what it costs.

Pruning after training, then training on with the masks: Han, Pool, Tran, Dally, 2015, section 3,
https://arxiv.org/abs/1506.02626
"""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from fedkd.compression import (
    ModelCost,
    QuantisationSettings,
    compare_quantised,
    make_permanent,
    measure_cost,
    measure_sparsity,
    pruning_masks,
    quantise,
    quantised_layers,
)
from fedkd.distillation.fit.workshop import Workshop, labels_only
from fedkd.distillation.task.participants import TeacherPruning, TrainingSettings
from fedkd.distillation.task.predicting import predict_logits
from fedkd.distillation.task.rows import Rows
from fedkd.metrics import top1_agreement
from fedkd.objectives import Objective

QUANTISED_STUDENT = "student int8"
"""What the student with int8 weights is called."""

_FINETUNING = 7
"""Last part of the key of a fit after pruning; what else has a key of its model has lower ones."""


def prune_teacher(
    teacher: nn.Module,
    settings: TeacherPruning,
    workshop: Workshop,
    *,
    name: str,
    objective: Objective,
    training: TrainingSettings,
    rows: Rows,
    key: tuple[int, ...],
) -> None:
    """Prune a trained teacher in place and train it on with its masks, then make them permanent.

    Args:
        teacher: trained or loaded.
        settings: how much goes, and how many epochs follow.
        workshop: trains, and keeps the history under ``<name> finetuned``.
        name: of the teacher.
        objective: that it was trained on.
        training: as it was trained; the number of epochs is that of ``settings``.
        rows: that it was trained on.
        key: of its fit.

    Raises:
        ValueError: naming the setting, if there is nothing to prune.
    """
    workshop.prune(teacher, settings, key=key, setting="teacher.prune")
    if settings.finetune_epochs:
        workshop.fit(
            teacher,
            name=f"{name} finetuned",
            teacher=None,
            objective=objective,
            training=training.model_copy(update={"epochs": settings.finetune_epochs}),
            rows=rows,
            key=(*key, _FINETUNING),
        )
    make_permanent(teacher)


def finish_student(student: nn.Module, workshop: Workshop, *, name: str = "student") -> None:
    """Do what ``student.prune`` asks for after training; masks stay until `settle`.

    A student is trained on with the run's objective where there is a teacher. Without one, as for
    the undistilled twin, labels alone teach.

    Args:
        student: trained; changed in place.
        workshop: trains, and keeps the history under ``<name> finetuned``.
        name: ``student``, or ``twin``, which no teacher teaches.

    Raises:
        ValueError: naming the setting, if there is nothing to prune.
    """
    settings = workshop.student.prune
    if settings is None or settings.when == "start":
        return
    # The twin's key is the student's: the same draws, the same batches.
    workshop.prune(student, settings, key=(0, 0), setting="student.prune")
    teacher = None if name == "twin" else workshop.teacher
    if settings.finetune_epochs:
        workshop.fit(
            student,
            name=f"{name} finetuned",
            teacher=teacher,
            objective=labels_only(workshop.objective) if teacher is None else workshop.objective,
            training=workshop.training.model_copy(update={"epochs": settings.finetune_epochs}),
            key=(0, _FINETUNING),
        )


def settle(
    models: Mapping[str, nn.Module], pruned: tuple[str, ...] = ()
) -> dict[str, dict[str, float]]:
    """Make all masks permanent and tell how much of each pruned model is zero.

    Args:
        models: by name; changed in place. Some may share layers.
        pruned: names of models that were pruned and have no masks any more.

    Returns:
        By model the share of zeros of each prunable weight, in [0, 1], and of all as ``total``.
    """
    names = [name for name, model in models.items() if name in pruned or pruning_masks(model)]
    for model in models.values():
        make_permanent(model)
    return {
        name: {key: found.share for key, found in measure_sparsity(models[name]).items()}
        for name in names
    }


def quantised_student(student: nn.Module, settings: QuantisationSettings) -> nn.Module:
    """Return a copy of the student with int8 weights.

    Raises:
        ValueError: naming the setting, if no layer can have them.
    """
    try:
        return quantise(student, settings)
    except ValueError as error:
        raise ValueError(f"student.quantise: {error}") from None


def compare_with_float(student: nn.Module, quantised: nn.Module, rows: Rows) -> dict[str, Any]:
    """Compare the int8 student with the float one on the test rows.

    Returns:
        ``agreement_with_student``, share of test rows with the same class, in [0, 1];
        ``max_logit_difference``; ``float_bytes`` and ``int8_bytes`` of the files; ``int8_layers``.
    """
    before, after = (
        predict_logits(model, rows.test_inputs).float().cpu().numpy()
        for model in (student, quantised)
    )
    sizes = compare_quantised(student, quantised, rows.test_inputs[:1])
    return {
        "agreement_with_student": top1_agreement(before, after),
        "max_logit_difference": float(np.abs(before - after).max()),
        "float_bytes": sizes.float_bytes,
        "int8_bytes": sizes.quantised_bytes,
        "int8_layers": list(quantised_layers(quantised)),
    }


def measure_costs(models: Mapping[str, nn.Module], rows: Rows) -> dict[str, ModelCost]:
    """Measure what every model costs, on the CPU, with latency for batches of 1 and of 64."""
    on_cpu = {
        name: copy.deepcopy(model).cpu() if rows.device.type != "cpu" else model
        for name, model in models.items()
    }
    return {name: measure_cost(model, rows.input_shape) for name, model in on_cpu.items()}
