"""Figures of confidence: bars are accuracies, a class without rows has no curve."""

import math

import numpy as np
import pytest

from fedkd import figures
from fedkd.metrics import NoisePoint, ReliabilityBins, confidence_histogram, threshold_curve

RNG = np.random.default_rng(0)
PROBABILITIES = RNG.dirichlet(0.5 * np.ones(4), size=60)
LABELS = RNG.integers(3, size=60)  # class 3 never occurs
NAMES = ["mlp", "a model with a rather long name", "_hidden", "cost in $"]


def bins():
    reliability = ReliabilityBins(10)
    reliability.add(PROBABILITIES, LABELS)
    return reliability


def noise(accuracy):
    return [
        NoisePoint(sigma=s, loss=1.0, accuracy=accuracy - s, loss_std=0.0, accuracy_std=s, draws=9)
        for s in (0.0, 0.1)
    ]


FIGURES = {
    "reliability": lambda: figures.reliability_diagram(bins()),
    "reliability_of_nothing": lambda: figures.reliability_diagram(ReliabilityBins()),
    "confusion": lambda: figures.confusion_heat_map(np.array([[5, 1], [0, 0]]), ["cat", "dog"]),
    "agreement": lambda: figures.agreement_heat_map(np.eye(4), NAMES),
    "kl": lambda: figures.kl_heat_map(1 - np.eye(4), NAMES),
    "cka": lambda: figures.cka_heat_map(RNG.random((4, 2)), NAMES, ["conv.0", "linear"]),
    "correlation": lambda: figures.correlation_difference_heat_map(RNG.random((4, 4)) - 0.5),
    "error_correlation": lambda: figures.error_correlation_heat_map(np.eye(4), NAMES),
    "gradients": lambda: figures.gradient_plot(
        [1, 2], {"kd": [30.0, math.nan], "_at": [0.1, 0.2]}, {"kd": [0.9, -0.1], "_at": [1, 0]}
    ),
    "entropy": lambda: figures.entropy_curves(
        [1, 2, 3], [1.2, 1.0, 0.9], {name: [0.5, 0.4, 0.3] for name in NAMES}, num_classes=4
    ),
    "schedules": lambda: figures.schedules_in_force(
        [1, 2, 3], {"temperature": [4, 2, 1], "_weight": [0.0, 0.5, 1.0]}
    ),
    "threshold": lambda: figures.threshold_plot(
        threshold_curve(PROBABILITIES, [0, 0.5, 0.9], labels=LABELS), NAMES
    ),
    "unlabelled": lambda: figures.threshold_plot(threshold_curve(PROBABILITIES, [0, 0.5, 0.9])),
    "confidence": lambda: figures.confidence_plot(confidence_histogram(PROBABILITIES)),
    "flatness": lambda: figures.flatness_plot({"alone": noise(0.8), "_mutual": noise(0.9)}),
}


def test_bars_of_the_reliability_diagram_are_the_accuracies():
    figure = figures.reliability_diagram(bins())
    upper, lower = figure.axes
    known = bins().accuracy[bins().counts > 0]
    assert [bar.get_height() for bar in upper.patches] == pytest.approx(100 * known)
    assert [bar.get_height() for bar in lower.patches] == bins().counts.tolist()
    assert f"ECE {100 * bins().expected_error():.2f} %" in upper.get_title(loc="left")


def test_the_curve_of_a_class_without_rows_is_left_out():
    left, right = FIGURES["threshold"]().axes
    assert len(right.lines) == 3
    assert len(left.lines) == 2
    assert len(FIGURES["unlabelled"]().axes[0].lines) == 1
