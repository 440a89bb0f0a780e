"""What confidence is worth: reliability, thresholds and how confidences are spread."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from fedkd.figures.style import (
    COLORS,
    DASHES,
    STYLE,
    check_names,
    new_figure,
    visible,
    whole_numbers,
)
from fedkd.metrics.calibration import ReliabilityBins
from fedkd.metrics.filtering import ConfidenceHistogram, ThresholdCurve


def reliability_diagram(
    bins: ReliabilityBins, *, title: str = "Reliability on the test split"
) -> Figure:
    """Draw accuracy by confidence, with the rows of each interval below it.

    Bars below the diagonal are overconfident. Their errors are in the title, because a bar does
    not show how many rows stand behind it.
    """
    with matplotlib.rc_context(STYLE):
        figure = new_figure(5.2, 5.6)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        widths = np.diff(bins.edges)
        filled = bins.counts > 0
        upper.bar(
            bins.edges[:-1][filled],
            100 * bins.accuracy[filled],
            widths[filled],
            align="edge",
            color=COLORS[0],
            alpha=0.75,
            edgecolor="white",
            label="accuracy",
        )
        upper.plot(
            bins.confidence[filled],
            100 * bins.confidence[filled],
            "o",
            color=COLORS[1],
            markersize=4,
            label="mean confidence",
        )
        upper.plot([0, 1], [0, 100], color="#666666", lw=1, linestyle=(0, (4, 3)))
        upper.set_ylim(0, 102)
        upper.set_xlim(0, 1)
        upper.set_ylabel("accuracy (%)")
        upper.legend(loc="upper left")
        upper.set_title(
            f"{title}\nECE {100 * bins.expected_error():.2f} %, "
            f"RMSCE {100 * bins.root_mean_square_error():.2f} %, "
            f"MCE {100 * bins.maximum_error():.2f} %, {bins.counts.sum():,} rows"
        )
        lower.bar(
            bins.edges[:-1], bins.counts, widths, align="edge", color="#888888", edgecolor="white"
        )
        lower.set_ylabel("rows")
        lower.set_xlabel("confidence (highest probability)")
        whole_numbers(lower, "y")
    return figure


def threshold_plot(
    curve: ThresholdCurve,
    class_names: Sequence[str] | None = None,
    *,
    title: str = "What a confidence threshold keeps",
) -> Figure:
    """Draw kept share and accuracy by threshold, and the kept share of each class beside it.

    Args:
        curve: see `fedkd.metrics.threshold_curve`; needs two thresholds or more to be a curve.
        class_names: one for each class; None numbers them.
        title: the title.

    Raises:
        ValueError: if there are not as many names as classes.
    """
    num_classes = curve.kept_by_class.shape[1]
    names = [str(index) for index in range(num_classes)] if class_names is None else class_names
    check_names(names, num_classes)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(8.6, 4.2)
        left, right = figure.subplots(1, 2, sharey=True)
        left.plot(curve.thresholds, 100 * curve.kept, color=COLORS[0], lw=1.8, label="rows kept")
        if not np.isnan(curve.accuracy).all():
            left.plot(
                curve.thresholds,
                100 * curve.accuracy,
                color=COLORS[1],
                lw=1.8,
                linestyle=DASHES[1],
                label="accuracy of the rows kept",
            )
        left.set_title(title)
        left.set_ylabel("share (%)")
        left.set_ylim(0, 102)
        for index, name in enumerate(names):
            shares = curve.kept_by_class[:, index]
            if np.isnan(shares).all():
                continue
            right.plot(
                curve.thresholds,
                100 * shares,
                color=COLORS[index % len(COLORS)],
                linestyle=DASHES[index // len(COLORS) % len(DASHES)],
                lw=1.3,
                label=visible(name),
            )
        right.set_title("rows kept of each class")
        for axes in (left, right):
            axes.set_xlabel("least confidence")
            axes.grid(visible=True)
        left.legend(loc="lower left")
        if num_classes <= 28:
            figure.legend(
                *right.get_legend_handles_labels(),
                loc="outside right center",
                ncols=1 + (num_classes - 1) // 14,
                title="class",
            )
    return figure


def confidence_plot(
    histogram: ConfidenceHistogram, *, title: str = "Confidence of the target"
) -> Figure:
    """Draw how many rows have which confidence, see `fedkd.metrics.confidence_histogram`."""
    with matplotlib.rc_context(STYLE):
        figure = new_figure(6.0, 3.4)
        axes = figure.subplots()
        axes.bar(
            histogram.edges[:-1],
            histogram.counts,
            np.diff(histogram.edges),
            align="edge",
            color=COLORS[0],
            edgecolor="white",
        )
        axes.set_xlim(0, 1)
        axes.set_xlabel("confidence (highest probability)")
        axes.set_ylabel("rows")
        axes.set_title(f"{title}, {histogram.counts.sum():,} rows")
        whole_numbers(axes, "y")
    return figure
