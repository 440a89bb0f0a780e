"""Figures of a distillation's diagnostics."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fedkd import figures as plots
from fedkd.distillation.judging.diagnostics import diagnose
from fedkd.distillation.judging.result import Distillation
from fedkd.metrics import ConfidenceHistogram, NoisePoint, ReliabilityBins, ThresholdCurve

MOST_CLASSES = 50
"""With more classes a table of classes is not drawn: its cells would be points."""

Tables = Mapping[str, Any]
"""What `fedkd.distillation.judging.diagnostics.diagnose` returns, or the same read from JSON."""


def figures(distillation: Distillation) -> dict[str, Figure]:
    """Diagnose a distillation and draw all of it; see `draw`."""
    return draw(diagnose(distillation))


def draw(tables: Tables) -> dict[str, Figure]:
    """Draw everything that diagnostics tell something about.

    Args:
        tables: from `fedkd.distillation.judging.diagnostics.diagnose`; None may stand for NaN,
            which JSON lacks.

    Returns:
        By name, fit for a file: ``reliability_<model>``, ``confusion_student``, ``agreement``,
        ``kl``, ``error_correlation``, ``cka``, ``class_correlation_<model>``, ``confidence``,
        ``threshold``, ``flatness``, and for the student and each other model that a teacher taught
        ``target_entropy_<model>``, ``schedules_<model>``, ``gradients_<model>``.
    """
    drawn = {
        f"reliability_{_slug(name)}": plots.reliability_diagram(
            _bins(of_model["reliability"]),
            title=f"Reliability of the {name} on the {tables['split']} split",
        )
        for name, of_model in tables["models"].items()
    }
    drawn |= _classes(tables) | _pairs(tables) | _target(tables)
    similarity = tables["similarity"]
    if similarity is not None:
        drawn["cka"] = plots.cka_heat_map(
            _array(similarity["matrix"]),
            similarity["teacher_layers"],
            similarity["student_layers"],
            title=f"Similarity of layers on {similarity['rows']:,} transfer rows",
        )
    if tables["flatness"] is not None:
        drawn["flatness"] = plots.flatness_plot(
            {
                name: [NoisePoint(**point) for point in points]
                for name, points in tables["flatness"].items()
            },
            title=f"Accuracy on the {tables['split']} split under Gaussian weight noise",
        )
    for name, history in tables["epochs"].items():
        drawn |= _history(name, history, len(tables["class_names"]))
    return drawn


def _classes(tables: Tables) -> dict[str, Figure]:
    names = tables["class_names"]
    if len(names) > MOST_CLASSES:
        return {}
    drawn = {}
    if "student" in tables["models"]:
        drawn["confusion_student"] = plots.confusion_heat_map(
            np.array(tables["models"]["student"]["confusion"]),
            names,
            title=f"Confusion of the student on the {tables['split']} split",
        )
    for model, matrix in (tables["class_correlation"] or {}).items():
        drawn[f"class_correlation_{_slug(model)}"] = plots.correlation_difference_heat_map(
            _array(matrix), names, model=model, title=f"Which classes the {model} takes for alike"
        )
    return drawn


def _pairs(tables: Tables) -> dict[str, Figure]:
    pairs, split = tables["pairs"], tables["split"]
    names = pairs["names"]
    if len(names) < 2:
        return {}
    maps: dict[str, tuple[Callable[..., Figure], str]] = {
        "agreement": (plots.agreement_heat_map, "Agreement between models"),
        "kl": (plots.kl_heat_map, "Divergence between models"),
        "error_correlation": (plots.error_correlation_heat_map, "Errors that models share"),
    }
    return {
        key: heat_map(_array(pairs[key]), names, title=f"{title}, {split} split")
        for key, (heat_map, title) in maps.items()
    }


def _target(tables: Tables) -> dict[str, Figure]:
    target = tables["target"]
    if target is None:
        return {}
    counted, curve = target["confidence"], target["threshold_curve"]
    drawn = {
        "confidence": plots.confidence_plot(
            ConfidenceHistogram(
                edges=np.array(counted["edges"]), counts=np.array(counted["counts"])
            ),
            title="Confidence of the target on transfer rows",
        )
    }
    drawn["threshold"] = plots.threshold_plot(
        ThresholdCurve(**{name: _array(values) for name, values in curve.items()}),
        tables["class_names"],
        title="Transfer rows above a confidence",
    )
    return drawn


def _history(model: str, history: Tables, num_classes: int) -> dict[str, Figure]:
    steps, slug = history["epoch"], _slug(model)
    drawn = {}
    if history["target_entropy"] is not None:
        drawn[f"target_entropy_{slug}"] = plots.entropy_curves(
            steps,
            _curve(history["target_entropy"]),
            num_classes=num_classes,
            x_label="epoch",
            title=f"Entropy of what the {model} is taught, at the temperature in force",
        )
    in_force = {**history["in_force"], **history["kept"]}
    if in_force:
        drawn[f"schedules_{slug}"] = plots.schedules_in_force(
            steps,
            {name.replace("/", " of "): _curve(values) for name, values in in_force.items()},
            x_label="epoch",
            title=f"Schedules of the {model}: values at the end of each epoch",
        )
    compared = {
        kind: {
            name.split("/")[1]: _curve(values)
            for name, values in history["gradients"].items()
            if name.endswith(f"/{kind}")
        }
        for kind in ("norm_ratio", "cosine")
    }
    if compared["cosine"]:
        drawn[f"gradients_{slug}"] = plots.gradient_plot(
            steps,
            compared["norm_ratio"],
            compared["cosine"],
            title=f"Gradients of the {model}'s terms beside that of the labels",
        )
    return drawn


def _slug(model: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in model)


def _array(values: Sequence[Any]) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def _curve(values: Sequence[int | float | None]) -> list[int | float]:
    return [float("nan") if value is None else value for value in values]


def _bins(stored: Tables) -> ReliabilityBins:
    bins = ReliabilityBins(len(stored["counts"]))
    bins.counts = np.array(stored["counts"])
    bins.correct_counts = np.array(stored["correct_counts"])
    bins.confidence_sums = np.array(stored["confidence_sums"])
    return bins
