"""What holds for every figure: it says what it shows, nothing is cut off, the same bytes."""

import io
import math
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread

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


def png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=60, metadata={"Software": None})
    return buffer.getvalue()


@pytest.mark.parametrize("name", FIGURES)
def test_a_plot_says_what_it_shows_and_nothing_is_cut_off(name):
    figure = FIGURES[name]()
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= width
    assert box.y1 <= height
    main = figure.axes[0]
    assert main.get_title(loc="left") or figure.get_suptitle()
    assert all(
        axes.get_xlabel() or axes.get_ylabel() or axes.get_title(loc="left") for axes in figure.axes
    )
    pixels = imread(io.BytesIO(png(figure)))
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 20


def test_the_same_plot_gives_the_same_bytes():
    assert png(FIGURES["threshold"]()) == png(FIGURES["threshold"]())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="names must be 2, one for each row or column, got 1"):
        figures.agreement_heat_map(np.eye(2), ["a"])
    with pytest.raises(ValueError, match="'target' must have one value for each of 2 steps, got 1"):
        figures.entropy_curves([1, 2], [0.5])
    with pytest.raises(ValueError, match="at least 1 schedule, got 0"):
        figures.schedules_in_force([1], {})


@pytest.mark.slow
def test_metrics_do_not_import_matplotlib():
    code = "import sys, fedkd.metrics; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
