"""What a finished model is worth: measured on the test rows, once."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedkd.distillation.fit.probes import spread_ids
from fedkd.distillation.judging.finished import FinishedLogits
from fedkd.distillation.task.rows import Rows
from fedkd.distillation.task.teachers import Teacher
from fedkd.metrics import (
    ReliabilityBins,
    accuracy,
    brier_score,
    confusion_counts,
    fidelity,
    fidelity_by_correctness,
    fit_temperature,
    macro_recall,
    negative_log_likelihood,
    per_class_recall,
    temperature_scaled_calibration_error,
    worst_class_recall,
)

FIDELITY_ROWS = 10_000
"""Transfer rows of each kind, at most, on which models are compared with the teacher."""

NAN = float("nan")

NUMBERS = (
    "accuracy",
    "macro_recall",
    "worst_class_recall",
    "nll",
    "brier",
    "ece",
    "mce",
    "rmsce",
)
"""What every model has, NaN where it puts out anything but finite numbers."""

NOTHING: Mapping[str, np.ndarray] = MappingProxyType({})


def score(
    model: nn.Module,
    rows: Rows,
    teacher_logits: Float[np.ndarray, "test classes"] | None,
    training_logits: Mapping[str, np.ndarray] = NOTHING,
    predictions: FinishedLogits | None = None,
) -> dict[str, Any]:
    """Measure a model on the test rows.

    Args:
        model: any model of the run.
        rows: with the test rows.
        teacher_logits: the teacher's on the test rows; None: there is no teacher.
        training_logits: the teacher's on rows of the training, from `teacher_on_training_rows`.
        predictions: what is known already; None: nothing is.

    Returns:
        ``accuracy``, ``macro_recall``, ``worst_class_recall``, ``per_class_recall``; ``nll`` (nats)
        and ``brier``; calibration errors ``ece``, ``mce``, ``rmsce`` of 15 intervals, and
        ``ece_scaled`` after all logits are divided by ``fitted_temperature``, which is fitted on
        the validation rows; few of them fit it badly.

        Where there is a teacher ``agreement`` (share of rows with the same top class) and
        ``kl_to_teacher`` (KL(teacher || model), nats). Both again where the teacher's top class is
        the label (``agreement_teacher_right``, ``kl_teacher_right``) and on the
        ``teacher_wrong_rows`` rows where it is not (``..._teacher_wrong``); and on the rows of the
        training (``agreement_labelled``, ``kl_labelled``, ``..._unlabelled``). What has no rows is
        left out.
    """
    predictions = predictions or finished_logits(rows)
    logits = predictions.logits(model, rows.test_inputs).float().cpu().numpy()
    labels = rows.test_labels.cpu().numpy()
    if not np.isfinite(logits).all():
        # A student that diverged: the table shows it.
        lost = NUMBERS if teacher_logits is None else (*NUMBERS, "agreement", "kl_to_teacher")
        return {"per_class_recall": [NAN] * rows.num_classes, **dict.fromkeys(lost, NAN)}
    counts = confusion_counts(labels, logits.argmax(-1), rows.num_classes)
    probabilities = torch.softmax(torch.from_numpy(logits).double(), -1).numpy()
    bins = ReliabilityBins()
    bins.add(probabilities, labels)
    measured: dict[str, Any] = {
        "accuracy": accuracy(counts),
        "macro_recall": macro_recall(counts),
        "worst_class_recall": worst_class_recall(counts),
        "per_class_recall": per_class_recall(counts).tolist(),
        "nll": negative_log_likelihood(logits, labels),
        "brier": brier_score(probabilities, labels),
        "ece": bins.expected_error(),
        "mce": bins.maximum_error(),
        "rmsce": bins.root_mean_square_error(),
    }
    if len(rows.validation_labels):
        validation = predictions.logits(model, rows.validation_inputs).float().cpu().numpy()
        validation_labels = rows.validation_labels.cpu().numpy()
        measured["fitted_temperature"] = fit_temperature(validation, validation_labels)
        measured["ece_scaled"] = temperature_scaled_calibration_error(
            logits, labels, validation_logits=validation, validation_labels=validation_labels
        )
    if teacher_logits is not None and not np.isfinite(teacher_logits).all():
        return measured | {"agreement": NAN, "kl_to_teacher": NAN}
    if teacher_logits is not None:
        found = fidelity(teacher_logits, logits)
        measured |= {"agreement": found.agreement, "kl_to_teacher": found.kl}
        split = fidelity_by_correctness(teacher_logits, logits, labels)
        measured["teacher_wrong_rows"] = split.teacher_wrong.rows
        for kind, found in (("right", split.teacher_right), ("wrong", split.teacher_wrong)):
            if found.rows:
                measured[f"agreement_teacher_{kind}"] = found.agreement
                measured[f"kl_teacher_{kind}"] = found.kl
    for kind, taught in training_logits.items():
        own = predictions.logits(model, predictions.training[kind]).float().cpu().numpy()
        found = fidelity(taught, own)
        measured |= {f"agreement_{kind}": found.agreement, f"kl_{kind}": found.kl}
    return measured


def training_ids(rows: Rows) -> dict[str, Int[Tensor, " _"]]:
    """Return ids of ``labelled`` and of ``unlabelled`` transfer rows, where there are such.

    At most `FIDELITY_ROWS` of each kind, evenly spaced.
    """
    bounds = {"labelled": (0, rows.labelled), "unlabelled": (rows.labelled, len(rows.inputs))}
    return {
        kind: spread_ids(first, last, FIDELITY_ROWS).to(rows.device)
        for kind, (first, last) in bounds.items()
        if last > first
    }


def finished_logits(rows: Rows) -> FinishedLogits:
    """Return where the predictions for these rows are kept."""
    return FinishedLogits({kind: rows.inputs[ids] for kind, ids in training_ids(rows).items()})


def teacher_on_training_rows(
    teacher: Teacher, rows: Rows, predictions: FinishedLogits | None = None
) -> dict[str, np.ndarray]:
    """Return a teacher's logits for the rows of `training_ids`, as a student would get them.

    At temperature 1 and without augmentation. A teacher that goes by labels or tasks gets them.
    """
    predictions = predictions or finished_logits(rows)
    taught = {}
    for kind, ids in training_ids(rows).items():
        labels = rows.labels[ids]
        each = torch.stack(
            [predictions.logits(member, predictions.training[kind]) for member in teacher.members]
        )
        target = teacher.combine(
            each, temperature=1.0, labels=labels, tasks=teacher.task_ids(labels)
        )
        taught[kind] = target.logits().float().cpu().numpy()
    return taught
