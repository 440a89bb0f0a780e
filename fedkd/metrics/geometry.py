"""Geometry of logits: their scale, and which classes a model takes for alike.

Losses such as the KL at one common temperature ask a student to copy the teacher's scale; these
numbers show how far apart the scales are. What too few rows do not determine is NaN.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from fedkd.metrics.arrays import Array, as_float64, mean_or_nan


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitGeometry:
    """Scale of a model's logits, see `logit_geometry`; all in units of logits.

    Attributes:
        mean: over all logits.
        std: of all logits.
        minimum, maximum: over all logits.
        row_std: standard deviation over the classes of a row, averaged over rows; what
            standardised logits are divided by.
        row_range: highest minus lowest logit of a row, averaged over rows.
        margin: highest minus second highest logit of a row, averaged over rows.
    """

    mean: float
    std: float
    minimum: float
    maximum: float
    row_std: float
    row_range: float
    margin: float


def logit_geometry(logits: Float[Array, "rows classes"]) -> LogitGeometry:
    """Return the scale of logits; standard deviations divide by the number of values.

    Args:
        logits: unnormalised scores, at least 2 classes. NaN everywhere without rows.

    Raises:
        ValueError: if there are fewer than 2 classes.

    Source:
        Sun, Ren, Li, Wang, Cao, 2024, section 4 (why scales differ).
        https://arxiv.org/abs/2403.01427
    """
    scores = as_float64(logits)
    num_rows, num_classes = scores.shape
    if num_classes < 2:
        raise ValueError(f"logits must have at least 2 classes, got {num_classes}")
    ordered = np.sort(scores, axis=1)
    return LogitGeometry(
        mean=mean_or_nan(scores),
        std=float(scores.std()) if num_rows else float("nan"),
        minimum=float(scores.min()) if num_rows else float("nan"),
        maximum=float(scores.max()) if num_rows else float("nan"),
        row_std=mean_or_nan(scores.std(axis=1)),
        row_range=mean_or_nan(ordered[:, -1] - ordered[:, 0]),
        margin=mean_or_nan(ordered[:, -1] - ordered[:, -2]),
    )


def class_correlation(
    logits: Float[Array, "rows classes"],
) -> Float[np.ndarray, "classes classes"]:
    """Return Pearson's correlation of every two classes' logits over rows, in [-1, 1].

    Classes that a model takes for alike rise and fall together. NaN for a class whose logit is
    the same in all rows.
    """
    scores = as_float64(logits)
    num_classes = scores.shape[1]
    correlation = np.full((num_classes, num_classes), np.nan)
    if not len(scores):
        return correlation
    # Equal rows are exactly 0, which their rounded mean would miss.
    centred = np.where((scores == scores[0]).all(axis=0), 0.0, scores - scores.mean(axis=0))
    covariance = centred.T @ centred
    spread = np.sqrt(np.diagonal(covariance))
    scale = np.outer(spread, spread)
    np.divide(covariance, scale, out=correlation, where=scale > 0)
    np.clip(correlation, -1, 1, out=correlation)
    return correlation


def class_correlation_difference(
    student_logits: Float[Array, "rows classes"], teacher_logits: Float[Array, "rows classes"]
) -> Float[np.ndarray, "classes classes"]:
    """Return the student's `class_correlation` minus the teacher's, in [-2, 2].

    0 where the student has learned the teacher's likeness of two classes; positive where it takes
    them for more alike than the teacher does. NaN where either is undefined.
    """
    student, teacher = class_correlation(student_logits), class_correlation(teacher_logits)
    difference: np.ndarray = student - teacher
    return difference
