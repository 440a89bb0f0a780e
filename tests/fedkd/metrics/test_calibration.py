import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from fedkd.metrics import (
    ReliabilityBins,
    calibration_error_of_logits,
    expected_calibration_error,
    fit_temperature,
    maximum_calibration_error,
    negative_log_likelihood,
    root_mean_square_calibration_error,
    temperature_scaled_calibration_error,
)

# Five intervals: 0.65 and 0.75 | 0.85 and 1.0. Right: yes, no | no, yes.
PROBABILITIES = np.array([[0.65, 0.35], [0.25, 0.75], [0.15, 0.85], [1.0, 0.0]])
LABELS = np.array([0, 0, 0, 0])


def softmax(logits):
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def overconfident(rng, rows, classes=7, factor=3.0):
    """Labels drawn from softmax(logits), and the logits times a factor: T = factor is right."""
    logits = rng.normal(size=(rows, classes)) * 1.5
    labels = np.array([rng.choice(classes, p=p) for p in softmax(logits)])
    return factor * logits, labels


def test_calibration_error_matches_hand_computed_value():
    # Two intervals. [0, 1/2): empty. [1/2, 1]: confidences 0.6, 0.8, 1.0; two of three right.
    probabilities = np.array([[0.6, 0.4], [0.2, 0.8], [1.0, 0.0]])
    labels = np.array([0, 0, 0])
    assert expected_calibration_error(probabilities, labels, bins=2) == pytest.approx(
        abs(2 / 3 - 0.8)
    )
    # Five intervals keep them apart: 0.6 | 0.8 and 1.0. |1 - 0.6| / 3 + 2/3 |1/2 - 0.9|
    assert expected_calibration_error(probabilities, labels, bins=5) == pytest.approx(0.4)


def test_certain_and_right_is_perfectly_calibrated_and_certain_and_wrong_is_not():
    certain = np.eye(3)
    assert expected_calibration_error(certain, np.arange(3)) == 0
    assert expected_calibration_error(certain, np.roll(np.arange(3), 1)) == 1


def test_calibration_error_of_logits_is_that_of_their_softmax():
    logits, labels = overconfident(np.random.default_rng(1), 300)
    for scores in (logits, logits - 1e4):
        assert calibration_error_of_logits(scores, labels) == pytest.approx(
            expected_calibration_error(softmax(scores), labels), rel=1e-9
        )
    # One class impossible, the other two alike: half sure, and right in half of the rows.
    halves = np.array([[0.0, 0.0, -np.inf]] * 2)
    assert calibration_error_of_logits(halves, np.array([0, 1])) == 0


def test_logits_without_a_finite_largest_have_no_calibration_error():
    labels = np.array([0])
    for broken in (np.inf, np.nan):
        assert math.isnan(calibration_error_of_logits(np.array([[broken, 0.0]]), labels))
    assert math.isnan(calibration_error_of_logits(np.full((1, 2), -np.inf), labels))
    assert math.isnan(calibration_error_of_logits(np.zeros((0, 2)), np.zeros(0, int)))


@pytest.mark.parametrize("bins", [5, 15])
def test_calibration_error_agrees_with_torchmetrics(bins):
    from torchmetrics.functional.classification import multiclass_calibration_error

    rng = np.random.default_rng(0)
    probabilities = softmax(2 * rng.normal(size=(500, 7)))
    labels = rng.integers(7, size=500)
    oracle = multiclass_calibration_error(
        torch.tensor(probabilities), torch.tensor(labels), num_classes=7, n_bins=bins, norm="l1"
    )
    ours = expected_calibration_error(probabilities, labels, bins=bins)
    assert ours == pytest.approx(oracle.item(), abs=1e-6)


def test_logits_are_no_probabilities():
    with pytest.raises(ValueError, match="probabilities must be >= 0 and sum to 1"):
        expected_calibration_error(np.array([[2.0, -1.0]]), np.array([0]))
    with pytest.raises(ValueError, match="probabilities must be >= 0 and sum to 1"):
        expected_calibration_error(np.array([[np.nan, 1.0]]), np.array([0]))


def test_calibration_needs_an_interval():
    with pytest.raises(ValueError, match="bins must be >= 1, got 0"):
        expected_calibration_error(np.eye(2), np.arange(2), bins=0)


def test_no_rows_have_no_calibration():
    nothing = np.zeros((0, 3)), np.zeros(0, dtype=int)
    assert math.isnan(expected_calibration_error(*nothing))
    assert math.isnan(maximum_calibration_error(*nothing))
    assert math.isnan(root_mean_square_calibration_error(*nothing))


def test_worst_and_root_mean_square_errors_match_hand_computed_values():
    # Gaps |1/2 - 0.7| = 0.2 and |1/2 - 0.925| = 0.425, half of the rows in each.
    assert expected_calibration_error(PROBABILITIES, LABELS, bins=5) == pytest.approx(0.3125)
    assert maximum_calibration_error(PROBABILITIES, LABELS, bins=5) == pytest.approx(0.425)
    assert root_mean_square_calibration_error(PROBABILITIES, LABELS, bins=5) == pytest.approx(
        math.sqrt((0.2**2 + 0.425**2) / 2)
    )


@pytest.mark.parametrize(
    ("norm", "error"),
    [("max", maximum_calibration_error), ("l2", root_mean_square_calibration_error)],
)
def test_other_norms_agree_with_torchmetrics(norm, error):
    from torchmetrics.functional.classification import multiclass_calibration_error

    rng = np.random.default_rng(1)
    probabilities = softmax(2 * rng.normal(size=(500, 7)))
    labels = rng.integers(7, size=500)
    oracle = multiclass_calibration_error(
        torch.tensor(probabilities), torch.tensor(labels), num_classes=7, n_bins=10, norm=norm
    )
    assert error(probabilities, labels, bins=10) == pytest.approx(oracle.item(), abs=1e-6)


def test_batches_add_up_to_the_value_of_all_rows_which_their_mean_is_not():
    rng = np.random.default_rng(0)
    probabilities, labels = softmax(2 * rng.normal(size=(90, 4))), rng.integers(4, size=90)
    bins, errors = ReliabilityBins(10), []
    for part in (np.s_[:13], np.s_[13:50], np.s_[50:]):
        bins.add(torch.tensor(probabilities[part]), torch.tensor(labels[part]))
        errors.append(expected_calibration_error(probabilities[part], labels[part], bins=10))
    whole = expected_calibration_error(probabilities, labels, bins=10)
    assert bins.expected_error() == pytest.approx(whole)
    assert bins.counts.sum() == 90
    assert abs(np.mean(errors) - whole) > 0.01


def test_bins_hold_counts_accuracy_and_confidence_and_nothing_where_they_are_empty():
    bins = ReliabilityBins(5)
    bins.add(PROBABILITIES, LABELS)
    assert bins.edges == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert bins.counts.tolist() == [0, 0, 0, 2, 2]
    assert bins.accuracy == pytest.approx([math.nan] * 3 + [0.5, 0.5], nan_ok=True)
    assert bins.confidence == pytest.approx([math.nan] * 3 + [0.7, 0.925], nan_ok=True)


def test_the_fitted_temperature_is_what_the_logits_were_inflated_by():
    logits, labels = overconfident(np.random.default_rng(0), rows=6000)
    assert fit_temperature(logits, labels) == pytest.approx(3, rel=0.05)
    assert fit_temperature(torch.tensor(logits / 9), labels) == pytest.approx(1 / 3, rel=0.05)


def test_the_fitted_temperature_has_the_lowest_likelihood_loss():
    logits, labels = overconfident(np.random.default_rng(0), rows=100)
    best = minimize_scalar(
        lambda t: negative_log_likelihood(logits / t, labels),
        bounds=(0.1, 20),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert fit_temperature(logits, labels) == pytest.approx(best.x, rel=1e-6)


def test_without_a_best_temperature_the_end_of_the_range_is_taken():
    right, wrong = np.array([[2.0, 0.0], [0.0, 3.0]]), np.array([[0.0, 2.0], [3.0, 0.0]])
    assert fit_temperature(right, np.array([0, 1])) == pytest.approx(0.01)
    assert fit_temperature(wrong, np.array([0, 1])) == 100
    assert fit_temperature(np.zeros((2, 3)), np.array([0, 1])) == 1


def test_a_temperature_needs_validation_rows():
    with pytest.raises(ValueError, match="needs at least 1 validation row, got 0"):
        fit_temperature(np.zeros((0, 3)), np.zeros(0, dtype=int))


def test_temperature_scaling_repairs_overconfidence():
    rng = np.random.default_rng(0)
    logits, labels = overconfident(rng, rows=3000)
    fitted_on, its_labels = overconfident(rng, rows=2000)
    before = expected_calibration_error(softmax(logits), labels)
    after = temperature_scaled_calibration_error(
        logits, labels, validation_logits=fitted_on, validation_labels=its_labels
    )
    temperature = fit_temperature(fitted_on, its_labels)
    assert after == pytest.approx(expected_calibration_error(softmax(logits / temperature), labels))
    assert before > 0.2
    assert after < 0.04
