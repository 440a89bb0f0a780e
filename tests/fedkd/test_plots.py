import io
import math
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from fedkd import plots
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
    "reliability": lambda: plots.reliability_diagram(bins()),
    "reliability_of_nothing": lambda: plots.reliability_diagram(ReliabilityBins()),
    "confusion": lambda: plots.confusion_heat_map(np.array([[5, 1], [0, 0]]), ["cat", "dog"]),
    "agreement": lambda: plots.agreement_heat_map(np.eye(4), NAMES),
    "kl": lambda: plots.kl_heat_map(1 - np.eye(4), NAMES),
    "cka": lambda: plots.cka_heat_map(RNG.random((4, 2)), NAMES, ["conv.0", "linear"]),
    "correlation": lambda: plots.correlation_difference_heat_map(RNG.random((4, 4)) - 0.5),
    "error_correlation": lambda: plots.error_correlation_heat_map(np.eye(4), NAMES),
    "gradients": lambda: plots.gradient_plot(
        [1, 2], {"kd": [30.0, math.nan], "_at": [0.1, 0.2]}, {"kd": [0.9, -0.1], "_at": [1, 0]}
    ),
    "entropy": lambda: plots.entropy_curves(
        [1, 2, 3], [1.2, 1.0, 0.9], {name: [0.5, 0.4, 0.3] for name in NAMES}, num_classes=4
    ),
    "schedules": lambda: plots.schedules_in_force(
        [1, 2, 3], {"temperature": [4, 2, 1], "_weight": [0.0, 0.5, 1.0]}
    ),
    "threshold": lambda: plots.threshold_plot(
        threshold_curve(PROBABILITIES, [0, 0.5, 0.9], labels=LABELS), NAMES
    ),
    "unlabelled": lambda: plots.threshold_plot(threshold_curve(PROBABILITIES, [0, 0.5, 0.9])),
    "confidence": lambda: plots.confidence_plot(confidence_histogram(PROBABILITIES)),
    "flatness": lambda: plots.flatness_plot({"alone": noise(0.8), "_mutual": noise(0.9)}),
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


def test_bars_of_the_reliability_diagram_are_the_accuracies():
    figure = plots.reliability_diagram(bins())
    upper, lower = figure.axes
    known = bins().accuracy[bins().counts > 0]
    assert [bar.get_height() for bar in upper.patches] == pytest.approx(100 * known)
    assert [bar.get_height() for bar in lower.patches] == bins().counts.tolist()
    assert f"ECE {100 * bins().expected_error():.2f} %" in upper.get_title(loc="left")


def test_the_confusion_map_colours_shares_and_writes_rows():
    axes = plots.confusion_heat_map(np.array([[6, 2], [0, 0]])).axes[0]
    shown = axes.images[0].get_array()
    assert shown[0].tolist() == [75, 25]
    assert shown.mask[1].all()  # an absent class has no shares
    assert [text.get_text() for text in axes.texts] == ["6", "2", "", ""]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0", "1"]


def test_the_input_layers_of_the_cka_map_are_at_the_bottom():
    axes = plots.cka_heat_map(np.array([[0.1, 0.2], [0.3, 0.4]]), ["in", "out"], ["x", "y"]).axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["out", "in"]
    assert axes.images[0].get_array().tolist() == [[0.3, 0.4], [0.1, 0.2]]
    assert [text.get_text() for text in axes.texts] == ["0.30", "0.40", "0.10", "0.20"]


def test_numbers_on_cells_stand_out_from_their_colour():
    axes = plots.agreement_heat_map(np.array([[1.0, 0.0], [0.0, 1.0]]), ["a", "b"]).axes[0]
    assert [text.get_color() for text in axes.texts] == ["black", "white", "white", "black"]


def test_a_map_of_many_cells_shows_colours_and_some_names_only():
    axes = plots.agreement_heat_map(np.eye(90), [f"client {k}" for k in range(90)]).axes[0]
    assert not axes.texts
    assert len(axes.get_xticklabels()) == 30


def test_the_line_of_knowing_nothing_is_at_log_classes():
    axes = plots.entropy_curves([1, 2], [0.5, 0.4], num_classes=7).axes[0]
    assert axes.lines[-1].get_ydata()[0] == pytest.approx(math.log(7))


def test_a_schedule_holds_its_value_until_the_next_step():
    figure = plots.schedules_in_force([1, 2], {"temperature": [4, 1], "kd_weight": [0.0, 1.0]})
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["temperature", "kd_weight"]
    assert figure.axes[0].lines[0].get_drawstyle() == "steps-post"
    assert figure.axes[0].lines[0].get_ydata().tolist() == [4, 1]


def test_the_curve_of_a_class_without_rows_is_left_out():
    left, right = FIGURES["threshold"]().axes
    assert len(right.lines) == 3
    assert len(left.lines) == 2
    assert len(FIGURES["unlabelled"]().axes[0].lines) == 1


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="names must be 2, one for each row or column, got 1"):
        plots.agreement_heat_map(np.eye(2), ["a"])
    with pytest.raises(ValueError, match="'target' must have one value for each of 2 steps, got 1"):
        plots.entropy_curves([1, 2], [0.5])
    with pytest.raises(ValueError, match="at least 1 schedule, got 0"):
        plots.schedules_in_force([1], {})


@pytest.mark.slow
def test_metrics_do_not_import_matplotlib():
    code = "import sys, fedkd.metrics; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
