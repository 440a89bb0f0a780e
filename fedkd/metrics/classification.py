"""How well a classifier does: accuracy, recall and precision per class, likelihood, Brier score.

What the rows do not determine, such as the recall of a class that never occurs, is NaN and
never 0: a zero would read as a failure of the model.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer, Num

from fedkd.metrics.arrays import (
    Array,
    as_classes,
    as_float64,
    as_probabilities,
    log_softmax,
    mean_or_nan,
)

NAN = float("nan")


def confusion_counts(
    labels: Integer[Array, " rows"], predictions: Integer[Array, " rows"], num_classes: int
) -> Integer[np.ndarray, "classes classes"]:
    """Count rows by true class (first axis) and predicted class (second axis).

    Counts of several batches add up to the counts of all their rows.

    Raises:
        ValueError: if a label or prediction is not in ``[0, num_classes)``.

    Examples:
        >>> import numpy as np
        >>> from fedkd.metrics import confusion_counts
        >>> confusion_counts(np.array([0, 0, 1]), np.array([0, 1, 1]), 2)
        array([[1, 1],
               [0, 1]])
    """
    true_classes = as_classes("labels", labels, num_classes)
    predicted = as_classes("predictions", predictions, num_classes)
    if true_classes.shape != predicted.shape:
        raise ValueError(
            f"labels and predictions must have as many rows, got {len(true_classes)} "
            f"and {len(predicted)}"
        )
    cells = np.bincount(true_classes * num_classes + predicted, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def accuracy(counts: Integer[np.ndarray, "classes classes"]) -> float:
    """Return the share of rows predicted right; NaN without rows.

    Examples:
        >>> import numpy as np
        >>> from fedkd.metrics import accuracy
        >>> accuracy(np.array([[3, 1], [0, 4]]))
        0.875
    """
    rows = counts.sum()
    return float(np.trace(counts) / rows) if rows else NAN


def per_class_recall(
    counts: Integer[np.ndarray, "classes classes"],
) -> Float[np.ndarray, " classes"]:
    """Return the share of each class's rows predicted right; NaN for a class without rows.

    Examples:
        >>> import numpy as np
        >>> from fedkd.metrics import per_class_recall
        >>> per_class_recall(np.array([[3, 1], [0, 4]]))
        array([0.75, 1.  ])
    """
    return _diagonal_share(counts, counts.sum(axis=1))


def per_class_precision(
    counts: Integer[np.ndarray, "classes classes"],
) -> Float[np.ndarray, " classes"]:
    """Return the share of each class's predictions that are right; NaN if it is never predicted."""
    return _diagonal_share(counts, counts.sum(axis=0))


def _diagonal_share(
    counts: Integer[np.ndarray, "classes classes"], totals: Integer[np.ndarray, " classes"]
) -> Float[np.ndarray, " classes"]:
    shares = np.full(len(counts), NAN)
    np.divide(np.diagonal(counts), totals, out=shares, where=totals > 0)
    return shares


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassTable:
    """What is known of each class, see `class_table`.

    Attributes:
        rows: test rows of the class.
        predicted: rows that were predicted to be of the class.
        recall: share of ``rows`` predicted right, NaN for an absent class.
        precision: share of ``predicted`` that is right, NaN for a class never predicted.
    """

    rows: Integer[np.ndarray, " classes"]
    predicted: Integer[np.ndarray, " classes"]
    recall: Float[np.ndarray, " classes"]
    precision: Float[np.ndarray, " classes"]

    @property
    def num_absent(self) -> int:
        """Classes without test rows: no mean over classes speaks of them."""
        return int((self.rows == 0).sum())

    @property
    def num_never_predicted(self) -> int:
        """Classes that no row was predicted to be of: a collapsed model has many."""
        return int((self.predicted == 0).sum())


def class_table(counts: Integer[np.ndarray, "classes classes"]) -> ClassTable:
    """Return rows, predictions, recall and precision of every class, and count the undefined."""
    return ClassTable(
        rows=counts.sum(axis=1),
        predicted=counts.sum(axis=0),
        recall=per_class_recall(counts),
        precision=per_class_precision(counts),
    )


def macro_recall(counts: Integer[np.ndarray, "classes classes"]) -> float:
    """Return the mean recall over the classes that occur (balanced accuracy); NaN without rows.

    Examples:
        >>> import numpy as np
        >>> from fedkd.metrics import macro_recall
        >>> macro_recall(np.array([[3, 1], [0, 4]]))
        0.875
    """
    recall = per_class_recall(counts)
    return mean_or_nan(recall[~np.isnan(recall)])


def worst_class_recall(counts: Integer[np.ndarray, "classes classes"]) -> float:
    """Return the lowest recall over the classes that occur; NaN without rows.

    Under label skew this is the number that moves first.

    Examples:
        >>> import numpy as np
        >>> from fedkd.metrics import worst_class_recall
        >>> worst_class_recall(np.array([[3, 1], [0, 4]]))
        0.75
    """
    return float(np.fmin.reduce(per_class_recall(counts)))


def personal_accuracy(
    counts: Integer[np.ndarray, "classes classes"], label_mix: Num[Array, " classes"]
) -> float:
    """Estimate a client's accuracy on its own label mix from a test split common to all clients.

    Computes ``sum over classes of share(class) * recall(class)``. Where clients differ in how
    often they see a class but not in how the class looks, this is an unbiased estimate of the
    accuracy under the client's label mix, and it uses every test row instead of the few that a
    test split of the client's own would hold. Classes without test rows are left out and the
    remaining shares rescaled to sum to 1.

    Args:
        counts: confusion counts on the common test split, see `confusion_counts`.
        label_mix: how often the client sees each class, as counts or shares, >= 0.

    Returns:
        Accuracy in [0, 1]; NaN if none of the client's classes occurs in the test split.

    Raises:
        ValueError: if a share is negative or not finite, or all are 0.

    Examples:
        >>> import numpy as np
        >>> from fedkd.metrics import personal_accuracy
        >>> personal_accuracy(np.array([[1, 1], [0, 2]]), np.array([9, 1]))  # 0.9 * 0.5 + 0.1 * 1
        0.55
    """
    shares = as_float64(label_mix)
    if not (np.isfinite(shares).all() and (shares >= 0).all() and shares.any()):
        raise ValueError(
            f"label_mix must be finite, >= 0 and not all 0, got {np.round(shares, 6).tolist()}"
        )
    recall = per_class_recall(counts)
    occurs = ~np.isnan(recall)
    total = shares[occurs].sum()
    return float(shares[occurs] @ recall[occurs] / total) if total else NAN


def negative_log_likelihood(
    logits: Float[Array, "rows classes"], labels: Integer[Array, " rows"]
) -> float:
    """Return the mean surprise at the true class, in nats per row, >= 0; NaN without rows.

    Raises:
        ValueError: if a label is not a class of ``logits``.
    """
    true_classes = as_classes("labels", labels, logits.shape[1])
    log_probabilities = log_softmax(logits)
    # One entry per row. log_probabilities[:, labels] would pick a rows x rows table instead.
    own = np.take_along_axis(log_probabilities, true_classes[:, None], axis=1)
    return -mean_or_nan(own)


def brier_score(
    probabilities: Float[Array, "rows classes"], labels: Integer[Array, " rows"]
) -> float:
    """Return the squared distance to the one-hot label, summed over classes, averaged over rows.

    From 0 (certain and right) to 2 (certain and wrong); NaN without rows. Unlike calibration
    error, it also rewards telling the classes apart. Some define it for two classes as the square
    of one probability's error, which is half of this.

    Raises:
        ValueError: if a row of ``probabilities`` is no distribution or a label is none of its
            classes.

    Source:
        Brier, 1950, equation 2. https://doi.org/10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2
    """
    distributions = as_probabilities(probabilities)
    true_classes = as_classes("labels", labels, distributions.shape[1])
    errors = distributions - np.eye(distributions.shape[1])[true_classes]
    return mean_or_nan(np.square(errors).sum(axis=1))
