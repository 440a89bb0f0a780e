"""What a confidence threshold keeps of a target, and which classes it starves.

The filter itself is `fedkd.targets.confidence_mask`; these numbers ask it, so they cannot differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from fedkd.metrics.arrays import Array, as_classes, as_probabilities, mean_or_nan
from fedkd.targets import confidence_mask


@dataclass(frozen=True, slots=True, kw_only=True)
class ThresholdCurve:
    """What is kept at each confidence threshold, see `threshold_curve`.

    Attributes:
        thresholds: in the order asked for.
        kept: share of all rows that is kept.
        accuracy: share of the kept rows whose top class is the label; NaN without labels or
            without kept rows.
        kept_by_class: share of each class's rows that is kept; NaN for a class without rows.
    """

    thresholds: Float[np.ndarray, " thresholds"]
    kept: Float[np.ndarray, " thresholds"]
    accuracy: Float[np.ndarray, " thresholds"]
    kept_by_class: Float[np.ndarray, "thresholds classes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfidenceHistogram:
    """Rows by the highest probability of their target; counts of batches add up.

    Attributes:
        edges: of equal intervals of [0, 1]; an interval holds its lower edge, the last one both.
        counts: rows in each interval.
    """

    edges: Float[np.ndarray, " edges"]
    counts: Integer[np.ndarray, " bins"]


def kept_by_class(
    target: Float[Array, "rows classes"],
    threshold: int | float,
    *,
    labels: Integer[Array, " rows"] | None = None,
) -> Float[np.ndarray, " classes"]:
    """Return the share of each class's rows that a confidence threshold keeps.

    Args:
        target: class probabilities of a teacher or an ensemble.
        threshold: least confidence to be kept, >= 0; above 1 keeps none.
        labels: true class of each row; None goes by the target's own top class, which is all that
            is known of unlabelled rows.

    Returns:
        In [0, 1]; NaN for a class without rows.

    Raises:
        ValueError: if a row is no probability distribution, ``threshold`` is negative or a label
            is none of the classes.
    """
    curve = threshold_curve(target, [threshold], labels=labels)
    shares: np.ndarray = curve.kept_by_class[0]
    return shares


def threshold_curve(
    target: Float[Array, "rows classes"],
    thresholds: Sequence[int | float],
    *,
    labels: Integer[Array, " rows"] | None = None,
) -> ThresholdCurve:
    """Return how much each confidence threshold keeps, of which classes, and how right it is.

    Args:
        target: class probabilities of a teacher or an ensemble.
        thresholds: least confidences to be kept, each >= 0.
        labels: true class of each row; None groups rows by the target's own top class and leaves
            the accuracy unknown.

    Raises:
        ValueError: as `kept_by_class`.
    """
    probabilities = as_probabilities(target)
    num_classes = probabilities.shape[1]
    top_classes = probabilities.argmax(axis=1)
    classes = top_classes if labels is None else as_classes("labels", labels, num_classes)
    right = (top_classes == classes).astype(np.float64)
    rows = np.bincount(classes, minlength=num_classes)
    # In the type that it came in: a threshold of 0.9 keeps a float32 that was rounded below it.
    as_tensor = target if isinstance(target, Tensor) else torch.from_numpy(target)
    kept, accuracies, shares = [], [], np.full((len(thresholds), num_classes), np.nan)
    for position, threshold in enumerate(thresholds):
        mask = confidence_mask(as_tensor.detach().cpu(), float(threshold)).numpy() > 0
        kept.append(mean_or_nan(mask.astype(np.float64)))
        accuracies.append(float("nan") if labels is None else mean_or_nan(right[mask]))
        of_class = np.bincount(classes[mask], minlength=num_classes)
        np.divide(of_class, rows, out=shares[position], where=rows > 0)
    return ThresholdCurve(
        thresholds=np.array(thresholds, dtype=np.float64),
        kept=np.array(kept),
        accuracy=np.array(accuracies),
        kept_by_class=shares,
    )


def confidence_histogram(
    target: Float[Array, "rows classes"], *, bins: int = 20
) -> ConfidenceHistogram:
    """Count rows by the confidence of their target, in equal intervals of [0, 1].

    `fedkd.metrics.calibration.ReliabilityBins` counts the right ones too where labels are known.

    Args:
        target: class probabilities of a teacher or an ensemble.
        bins: number of intervals, >= 1.

    Raises:
        ValueError: if a row is no probability distribution or ``bins`` < 1.
    """
    if bins < 1:
        raise ValueError(f"bins must be >= 1, got {bins}")
    edges = np.linspace(0, 1, bins + 1)
    confidence = as_probabilities(target).max(axis=1)
    interval = np.searchsorted(edges[1:-1], confidence, side="right")
    return ConfidenceHistogram(edges=edges, counts=np.bincount(interval, minlength=bins))
