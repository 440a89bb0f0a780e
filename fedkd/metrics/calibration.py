"""Calibration: whether a model that says 80 % is right on 80 % of such rows.

Confidence is the highest probability of a row. Everything follows from three sums per interval of
confidence, so batches, and processes, add up to the value of all their rows; a mean of the batches'
errors would not. NaN without rows.
"""

import numpy as np
from jaxtyping import Bool, Float, Integer

from fedkd.metrics.arrays import (
    Array,
    as_classes,
    as_float64,
    as_probabilities,
    by_class,
    log_softmax,
)

NAN = float("nan")

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 100.0
"""Where `fit_temperature` looks."""


class ReliabilityBins:
    """Counts rows, right answers and confidence in equal intervals of confidence.

    An interval holds its lower edge, the last one both.

    Args:
        bins: number of intervals of [0, 1], >= 1.

    Raises:
        ValueError: if ``bins`` < 1.

    Source:
        Guo, Pleiss, Sun, Weinberger, 2017, section 2. https://arxiv.org/abs/1706.04599
    """

    def __init__(self, bins: int = 15) -> None:
        if bins < 1:
            raise ValueError(f"bins must be >= 1, got {bins}")
        self.edges = np.linspace(0, 1, bins + 1)
        self.counts = np.zeros(bins, dtype=np.int64)
        self.correct_counts = np.zeros(bins, dtype=np.int64)
        self.confidence_sums = np.zeros(bins)

    def add(
        self, probabilities: Float[Array, "rows classes"], labels: Integer[Array, " rows"]
    ) -> None:
        """Count the rows of a batch.

        Raises:
            ValueError: if a row of ``probabilities`` is no distribution or a label is none of its
                classes.
        """
        distributions = as_probabilities(probabilities)
        true_classes = as_classes("labels", labels, distributions.shape[1])
        self.add_answers(distributions.max(axis=1), distributions.argmax(axis=1) == true_classes)

    def add_answers(
        self, confidence: Float[np.ndarray, " rows"], correct: Bool[np.ndarray, " rows"]
    ) -> None:
        """Count rows of which only the highest probability, in [0, 1], and the verdict is known."""
        interval = np.searchsorted(self.edges[1:-1], confidence, side="right")
        bins = len(self.counts)
        self.counts += np.bincount(interval, minlength=bins)
        self.correct_counts += np.bincount(interval[correct], minlength=bins)
        self.confidence_sums += np.bincount(interval, weights=confidence, minlength=bins)

    @property
    def accuracy(self) -> Float[np.ndarray, " bins"]:
        """Share of right answers in each interval; NaN in an empty one."""
        return self._per_row(self.correct_counts.astype(np.float64))

    @property
    def confidence(self) -> Float[np.ndarray, " bins"]:
        """Mean confidence in each interval; NaN in an empty one."""
        return self._per_row(self.confidence_sums)

    def expected_error(self) -> float:
        """Return ECE: the mean of ``|accuracy - confidence|``, intervals weighted by their rows."""
        gaps, shares = self._gaps_and_shares()
        return float(shares @ gaps) if len(gaps) else NAN

    def maximum_error(self) -> float:
        """Return MCE: the largest ``|accuracy - confidence|`` of an interval that has rows."""
        gaps, _ = self._gaps_and_shares()
        return float(gaps.max()) if len(gaps) else NAN

    def root_mean_square_error(self) -> float:
        """Return RMSCE: the root of the weighted mean of ``(accuracy - confidence)**2``."""
        gaps, shares = self._gaps_and_shares()
        return float(np.sqrt(shares @ np.square(gaps))) if len(gaps) else NAN

    def _per_row(self, sums: Float[np.ndarray, " bins"]) -> Float[np.ndarray, " bins"]:
        means = np.full(len(sums), NAN)
        np.divide(sums, self.counts, out=means, where=self.counts > 0)
        return means

    def _gaps_and_shares(
        self,
    ) -> tuple[Float[np.ndarray, " filled"], Float[np.ndarray, " filled"]]:
        filled = self.counts > 0
        rows = self.counts[filled]
        gaps = np.abs(self.correct_counts[filled] - self.confidence_sums[filled]) / rows
        return gaps, rows / max(rows.sum(), 1)


def expected_calibration_error(
    probabilities: Float[Array, "rows classes"],
    labels: Integer[Array, " rows"],
    *,
    bins: int = 15,
) -> float:
    """Return by how much confidence and accuracy differ on average, in [0, 1]; NaN without rows.

    Args:
        probabilities: class probabilities.
        labels: true class of each row.
        bins: intervals of confidence, >= 1; values with different numbers of them do not compare.

    Raises:
        ValueError: if ``bins`` < 1, a row of ``probabilities`` is no distribution or a label is
            none of its classes.

    Source:
        Guo, Pleiss, Sun, Weinberger, 2017, equation 3. https://arxiv.org/abs/1706.04599
    """
    return _bins_of(probabilities, labels, bins).expected_error()


def calibration_error_of_logits(
    logits: Float[Array, "rows classes"],
    labels: Integer[Array, " rows"],
    *,
    bins: int = 15,
) -> float:
    """Return `expected_calibration_error` of the softmax of logits, which is never written down.

    Confidence is all that counts, and that is one over the sum of ``exp(logit - largest)``. A class
    may have a logit of -inf; NaN without rows, or where a row's largest logit is not finite.

    Args:
        logits: unnormalised scores, taken at temperature 1.
        labels: true class of each row.
        bins: intervals of confidence, >= 1.

    Raises:
        ValueError: if ``bins`` < 1 or a label is no class of ``logits``.
    """
    reliability = ReliabilityBins(bins)
    scores = by_class(logits)
    true_classes = as_classes("labels", labels, len(scores))
    largest = scores.max(axis=0)
    if not np.isfinite(largest).all():
        return NAN
    confidence = 1 / np.exp(scores - largest).sum(axis=0)
    reliability.add_answers(confidence, scores.argmax(axis=0) == true_classes)
    return reliability.expected_error()


def maximum_calibration_error(
    probabilities: Float[Array, "rows classes"],
    labels: Integer[Array, " rows"],
    *,
    bins: int = 15,
) -> float:
    """Return by how much confidence and accuracy differ in the worst interval, in [0, 1].

    A single row may fill the worst interval, so look at `ReliabilityBins.counts` with it.

    Args:
        probabilities: class probabilities.
        labels: true class of each row.
        bins: intervals of confidence, >= 1.

    Raises:
        ValueError: as `expected_calibration_error`.

    Source:
        Guo, Pleiss, Sun, Weinberger, 2017, equation 5. https://arxiv.org/abs/1706.04599
    """
    return _bins_of(probabilities, labels, bins).maximum_error()


def root_mean_square_calibration_error(
    probabilities: Float[Array, "rows classes"],
    labels: Integer[Array, " rows"],
    *,
    bins: int = 15,
) -> float:
    """Return the root mean square difference of confidence and accuracy, in [0, 1].

    Never below `expected_calibration_error`, never above `maximum_calibration_error`.

    Args:
        probabilities: class probabilities.
        labels: true class of each row.
        bins: intervals of confidence, >= 1.

    Raises:
        ValueError: as `expected_calibration_error`.

    Source:
        Kumar, Liang, Ma, 2019, definition 2.2 with p = 2. https://arxiv.org/abs/1909.10155
    """
    return _bins_of(probabilities, labels, bins).root_mean_square_error()


def _bins_of(
    probabilities: Float[Array, "rows classes"], labels: Integer[Array, " rows"], bins: int
) -> ReliabilityBins:
    reliability = ReliabilityBins(bins)
    reliability.add(probabilities, labels)
    return reliability


def fit_temperature(logits: Float[Array, "rows classes"], labels: Integer[Array, " rows"]) -> float:
    """Find the temperature that makes dividing all logits by it fit the labels best.

    Minimises the negative log-likelihood of ``softmax(logits / temperature)``. That is convex in
    1 / temperature, so the root of its slope is found to machine precision and there is no
    learning rate to choose. Accuracy does not change: the order of classes stays.

    Args:
        logits: unnormalised scores on a validation split, never on the split that is judged.
        labels: true class of each row.

    Returns:
        In [0.01, 100]; above 1 the model was overconfident. An end of the range means there is
        no best one: at 0.01 all rows are right, at 100 the scores point away from the labels. 1
        if no temperature is better, as with equal scores for all classes.

    Raises:
        ValueError: if there are no rows or a label is no class of ``logits``.

    Source:
        Guo, Pleiss, Sun, Weinberger, 2017, section 4.2. https://arxiv.org/abs/1706.04599
    """
    if not len(labels):
        raise ValueError("fitting a temperature needs at least 1 validation row, got 0")
    scores = as_float64(logits)
    true_classes = as_classes("labels", labels, scores.shape[1])
    own = np.take_along_axis(scores, true_classes[:, None], axis=1).mean()

    def slope(inverse_temperature: float) -> float:
        """Derivative of the mean negative log-likelihood with respect to 1 / temperature."""
        expected = (np.exp(log_softmax(inverse_temperature * scores)) * scores).sum(axis=1)
        return float(expected.mean() - own)

    if slope(1.0) == 0:
        return 1.0
    if slope(1 / HIGHEST_TEMPERATURE) >= 0:
        return HIGHEST_TEMPERATURE
    if slope(1 / LOWEST_TEMPERATURE) <= 0:
        return LOWEST_TEMPERATURE
    from scipy.optimize import brentq  # imported late: half a second, and few ask for this

    inverse = brentq(slope, 1 / HIGHEST_TEMPERATURE, 1 / LOWEST_TEMPERATURE, xtol=1e-12)
    return 1 / float(inverse)


def temperature_scaled_calibration_error(
    logits: Float[Array, "rows classes"],
    labels: Integer[Array, " rows"],
    *,
    validation_logits: Float[Array, "validation classes"],
    validation_labels: Integer[Array, " validation"],
    bins: int = 15,
) -> float:
    """Return the calibration error that is left when one temperature is fitted on validation.

    A model whose error vanishes here was only over- or underconfident as a whole.

    Args:
        logits: unnormalised scores on the split that is judged.
        labels: its true classes.
        validation_logits: scores on the split that the temperature is fitted on.
        validation_labels: its true classes.
        bins: intervals of confidence, >= 1.

    Returns:
        In [0, 1]; NaN without rows to judge.

    Raises:
        ValueError: as `expected_calibration_error` and `fit_temperature`.
    """
    temperature = fit_temperature(validation_logits, validation_labels)
    scaled = np.exp(log_softmax(as_float64(logits) / temperature))
    return expected_calibration_error(scaled, labels, bins=bins)
