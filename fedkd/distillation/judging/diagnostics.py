"""What finished models have learned of each other, beyond their scores, as plain tables.

Rows are those of the split that ``diagnostics.split`` names, or transfer rows. Labels of transfer
rows that no student saw are looked at here, when nothing is decided any more.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedkd.distillation.fit.probes import spread_ids
from fedkd.distillation.judging.finished import FinishedLogits
from fedkd.distillation.judging.result import Distillation
from fedkd.distillation.judging.scores import teacher_on_training_rows, training_ids
from fedkd.distillation.task.measures import DiagnosticsSettings
from fedkd.distillation.task.predicting import predict_logits
from fedkd.distillation.task.rows import Rows
from fedkd.distillation.task.teachers import Teacher, teacher_names
from fedkd.metrics import (
    MinibatchCKA,
    ReliabilityBins,
    agreement_matrix,
    class_correlation_difference,
    confidence_histogram,
    confusion_counts,
    ensemble_entropy,
    ensemble_gain,
    error_correlation,
    jensen_shannon,
    kept_by_class,
    kl_matrix,
    logit_geometry,
    pairwise_disagreement,
    q_statistic,
    target_entropy,
    threshold_curve,
    weight_noise_curve,
)
from fedkd.models import uses_batch_norm
from fedkd.objectives import PENULTIMATE, layer_shapes, tapped
from fedkd.randomness import Purpose, torch_generator, torch_seed_for

THRESHOLDS = (*(0.05 * step for step in range(20)), 0.99)
"""Confidence thresholds that the curve of kept rows has a point at."""

PAIRED = ("agreement", "kl", "disagreement", "error_correlation", "q_statistic")
"""What two models have in common."""

MOST_LAYERS = 16
"""Layers of each model that are compared, evenly spaced where it has more."""

CKA_BATCH = 128
"""Rows of a batch of layers' outputs; memory grows with it, not with the number of rows."""

BATCH_NORM_ROWS = 1024
"""Transfer rows, at most, that statistics of BatchNorm are estimated on under noise."""

_SAME_OUTPUT = (nn.Sequential, nn.Dropout, nn.Dropout2d, nn.Flatten, nn.Identity)
"""Layers that put out, in evaluation mode, the numbers of a layer inside or before them."""


def diagnose(
    distillation: Distillation, settings: DiagnosticsSettings | None = None
) -> dict[str, Any]:
    """Compare the finished models of a distillation, and what the student was taught.

    Args:
        distillation: finished; its models are left as they are.
        settings: what to measure; None: ``diagnostics`` of the distillation's own settings.

    Returns:
        Plain values, None for what there is not. Matrices are lists of rows, NaN where undefined.
        A model that diverged, whose logits are not all finite, is left out.

        - ``split``, ``rows``, ``class_names``: what models are judged on, and how many.
        - ``models``: of each, its ``confusion`` counts, ``reliability`` (bins' sums) and
          ``geometry`` (of logits, see `fedkd.metrics.LogitGeometry`).
        - ``pairs``: ``names`` of the models, and matrices ``agreement``, ``kl`` (nats,
          KL(row || column)), ``disagreement``, ``error_correlation`` and ``q_statistic``.
        - ``ensembles``: for the models of a teacher, and those of an ensemble, ``members``, their
          mean ``disagreement``, ``error_correlation``, ``q_statistic``, ``jensen_shannon`` (nats),
          ``gain`` (accuracy of the mean probability minus mean accuracy), ``entropy`` of the mean
          and ``member_entropy`` (nats).
        - ``target``: of the teacher on transfer rows at temperature 1: ``entropy`` (nats), a
          histogram of ``confidence``, a ``threshold_curve``, and ``kept_by_class`` at
          ``targets.confidence_threshold``.
        - ``class_correlation``: of the student and its twin, minus the teacher's.
        - ``similarity``: CKA of the (first) teacher's layers with the student's, on transfer rows.
        - ``flatness``: of the student and its twin, points of accuracy by noise.
        - ``epochs``: of the student and each other model that a teacher taught, by epoch:
          ``target_entropy`` (nats), ``kept`` rows, values ``in_force`` (weights, temperatures,
          learning rate) and ``gradients``.
    """
    settings = settings or distillation.settings.diagnostics
    rows, models, known = distillation.rows, distillation.models, distillation.predictions
    if settings.split == "test":
        inputs, labels = rows.test_inputs, rows.test_labels
    else:
        inputs, labels = rows.validation_inputs, rows.validation_labels
    logits = {name: known.logits(model, inputs).double().cpu() for name, model in models.items()}
    # A model that diverged says nothing that could be compared.
    logits = {name: scores for name, scores in logits.items() if bool(scores.isfinite().all())}
    answers = labels.cpu().numpy()
    teacher = distillation.teacher
    num_teachers = 0 if teacher is None else len(teacher.members)
    if not set(teacher_names(num_teachers)[:num_teachers]) <= set(logits):
        teacher = None
    compared = [name for name in ("student", "twin") if name in logits]
    return {
        "split": settings.split,
        "rows": len(answers),
        "class_names": list(rows.class_names),
        "models": {
            name: _of_model(scores.numpy(), answers, rows.num_classes)
            for name, scores in logits.items()
        },
        "pairs": _pairs({name: scores.numpy() for name, scores in logits.items()}, answers),
        "ensembles": {
            name: _ensemble({member: logits[member].numpy() for member in members}, answers)
            for name, members in _groups(models, num_teachers).items()
            if set(members) <= set(logits)
        },
        "target": None if teacher is None else _target(distillation, teacher),
        "class_correlation": (
            None
            if teacher is None
            else _class_correlation(known, teacher, inputs, logits, compared)
        ),
        "similarity": (
            _similarity(teacher.first, models["student"], rows, settings.similarity_rows)
            if teacher is not None and "student" in logits and settings.similarity
            else None
        ),
        "flatness": (
            {
                name: _flatness(distillation, models[name], inputs, labels, settings)
                for name in compared
            }
            if settings.flatness and len(labels) and compared
            else None
        ),
        "epochs": {
            name: of_model
            for name, history in distillation.histories.items()
            if (of_model := _by_epoch(history))
            and (name == "student" or of_model["target_entropy"] is not None)
        },
    }


def _of_model(
    logits: Float[np.ndarray, "rows classes"], labels: Int[np.ndarray, " rows"], num_classes: int
) -> dict[str, Any]:
    bins = ReliabilityBins()
    bins.add(_probabilities(logits), labels)
    return {
        "confusion": confusion_counts(labels, logits.argmax(-1), num_classes).tolist(),
        "reliability": {
            "counts": bins.counts.tolist(),
            "correct_counts": bins.correct_counts.tolist(),
            "confidence_sums": bins.confidence_sums.tolist(),
        },
        "geometry": asdict(logit_geometry(logits)),
    }


def _pairs(logits: Mapping[str, np.ndarray], labels: Int[np.ndarray, " rows"]) -> dict[str, Any]:
    if not logits:
        return dict.fromkeys(("names", *PAIRED), ())
    stacked = np.stack(list(logits.values()))
    classes = stacked.argmax(-1)

    def each(measure: Callable[[np.ndarray], float]) -> list[list[float]]:
        return [[measure(np.stack([one, other])) for other in classes] for one in classes]

    return {
        "names": list(logits),
        "agreement": agreement_matrix(stacked).tolist(),
        "kl": kl_matrix(stacked).tolist(),
        "disagreement": each(pairwise_disagreement),
        "error_correlation": each(lambda pair: error_correlation(pair, labels)),
        "q_statistic": each(lambda pair: q_statistic(pair, labels)),
    }


def _groups(models: Mapping[str, nn.Module], num_teachers: int) -> dict[str, list[str]]:
    """Return which models make one target together: a teacher's, and those inside another."""
    groups = {}
    if num_teachers > 1:
        groups["teachers"] = teacher_names(num_teachers)
    for name, model in models.items():
        inside = {id(module) for module in model.modules()} - {id(model)}
        groups[name] = [other for other, candidate in models.items() if id(candidate) in inside]
    return {name: members for name, members in groups.items() if len(members) > 1}


def _ensemble(logits: Mapping[str, np.ndarray], labels: Int[np.ndarray, " rows"]) -> dict[str, Any]:
    stacked = np.stack(list(logits.values()))
    classes = stacked.argmax(-1)
    undecided = ensemble_entropy(stacked, from_logits=True)
    return {
        "members": list(logits),
        "disagreement": pairwise_disagreement(classes),
        "error_correlation": error_correlation(classes, labels),
        "q_statistic": q_statistic(classes, labels),
        "jensen_shannon": jensen_shannon(stacked, from_logits=True),
        "gain": ensemble_gain(stacked, labels, from_logits=True),
        "entropy": undecided.target,
        "member_entropy": undecided.peers.tolist(),
    }


def _target(distillation: Distillation, teacher: Teacher) -> dict[str, Any]:
    rows = distillation.rows
    ids = torch.cat(list(training_ids(rows).values()))
    taught = teacher_on_training_rows(teacher, rows, distillation.predictions)
    # In the precision in which a confidence threshold sees it.
    target = torch.softmax(torch.from_numpy(np.concatenate(list(taught.values()))), -1)
    labels = rows.labels[ids].cpu().numpy()
    histogram = confidence_histogram(target)
    curve = threshold_curve(target, THRESHOLDS, labels=labels)
    threshold = distillation.settings.targets.confidence_threshold
    return {
        "rows": len(ids),
        "entropy": target_entropy(target),
        "confidence": {"edges": histogram.edges.tolist(), "counts": histogram.counts.tolist()},
        "threshold_curve": {
            "thresholds": curve.thresholds.tolist(),
            "kept": curve.kept.tolist(),
            "accuracy": curve.accuracy.tolist(),
            "kept_by_class": curve.kept_by_class.tolist(),
        },
        "confidence_threshold": threshold,
        "kept_by_class": kept_by_class(target, threshold, labels=labels).tolist(),
    }


def _class_correlation(
    known: FinishedLogits,
    teacher: Teacher,
    inputs: Tensor,
    logits: Mapping[str, Tensor],
    names: Sequence[str],
) -> dict[str, Any]:
    each = torch.stack([known.logits(member, inputs) for member in teacher.members])
    taught = teacher.opinion(each).double().cpu().numpy()
    return {
        name: class_correlation_difference(logits[name].numpy(), taught).tolist() for name in names
    }


def _similarity(
    teacher: nn.Module, student: nn.Module, rows: Rows, most: int
) -> dict[str, Any] | None:
    """Return the CKA of layers, summed over batches; None where there is too little to compare."""
    inputs = rows.inputs[spread_ids(0, len(rows.inputs), most).to(rows.device)]
    layers = [_compared_layers(model, inputs) for model in (teacher, student)]
    # The unbiased estimate needs 4 rows, so the last batch may be left out.
    batches = [batch for batch in inputs.split(CKA_BATCH) if len(batch) >= 4]
    if not batches or not all(layers):
        return None
    similarity = MinibatchCKA()
    for batch in batches:
        similarity.add(*map(_layer_outputs, (teacher, student), layers, (batch, batch)))
    return {
        "rows": sum(map(len, batches)),
        "teacher_layers": layers[0],
        "student_layers": layers[1],
        "matrix": similarity.matrix().tolist(),
    }


def _compared_layers(model: nn.Module, inputs: Tensor) -> list[str]:
    if not len(inputs):
        return []
    kinds = dict(model.named_modules())
    layers = [
        name
        for name in layer_shapes(model, inputs[:2])
        if name != PENULTIMATE and not isinstance(kinds[name], _SAME_OUTPUT)
    ]
    if len(layers) <= MOST_LAYERS:
        return layers
    chosen = torch.linspace(0, len(layers) - 1, MOST_LAYERS).round().long().tolist()
    return [layers[position] for position in chosen]


def _layer_outputs(model: nn.Module, layers: Sequence[str], inputs: Tensor) -> dict[str, Tensor]:
    with tapped(model, layers) as features:
        predict_logits(model, inputs)
    return {layer: features[layer] for layer in layers}


def _flatness(
    distillation: Distillation,
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    settings: DiagnosticsSettings,
) -> list[dict[str, float]]:
    # The same directions for student and twin, which have the same parameters.
    seed = torch_seed_for(distillation.settings.seed, Purpose.EVALUATION, 0)
    statistics = distillation.rows.inputs[:BATCH_NORM_ROWS] if uses_batch_norm(model) else None
    points = weight_noise_curve(
        model,
        inputs,
        labels,
        sigmas=(0.0, *settings.noise),
        generator=torch_generator(seed),
        draws=settings.noise_draws,
        batch_norm_inputs=statistics,
    )
    return [asdict(point) for point in points]


def _by_epoch(history: Sequence[Mapping[str, int | float]]) -> dict[str, Any]:
    """Return what a history says of targets, schedules and gradients; empty without epochs."""
    if not history:
        return {}
    entropies = [row.get("targets/entropy") for row in history]
    names = dict.fromkeys(name for row in history for name in row)

    def columns(*prefixes: str) -> dict[str, list[int | float | None]]:
        chosen = [name for name in names if name.startswith(prefixes)]
        return {name: [row.get(name) for row in history] for name in chosen}

    return {
        "epoch": [row["epoch"] for row in history],
        "target_entropy": None if all(value is None for value in entropies) else entropies,
        "kept": columns("targets/kept"),
        "in_force": columns("weight/", "temperature/", "learning_rate"),
        "gradients": columns("gradients/"),
    }


def _probabilities(logits: Float[np.ndarray, "rows classes"]) -> Float[np.ndarray, "rows classes"]:
    probabilities: np.ndarray = torch.softmax(torch.from_numpy(logits).double(), -1).numpy()
    return probabilities
