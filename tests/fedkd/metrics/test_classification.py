import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, recall_score

from fedkd.metrics import (
    accuracy,
    confusion_counts,
    expected_calibration_error,
    macro_recall,
    negative_log_likelihood,
    per_class_recall,
    personal_accuracy,
    worst_class_recall,
)

# Class 0: 3 of 4 right; class 1: 1 of 2; class 2 never occurs but is predicted once.
LABELS = np.array([0, 0, 0, 0, 1, 1])
PREDICTIONS = np.array([0, 0, 0, 1, 1, 2])


@pytest.fixture(name="counts")
def _counts():
    return confusion_counts(LABELS, PREDICTIONS, 3)


def softmax(logits):
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def test_confusion_has_true_classes_in_rows_and_predicted_ones_in_columns(counts):
    assert counts.tolist() == [[3, 1, 0], [0, 1, 1], [0, 0, 0]]


def test_batches_of_counts_add_up(counts):
    halves = [
        confusion_counts(LABELS[part], PREDICTIONS[part], 3) for part in (np.s_[:4], np.s_[4:])
    ]
    assert (sum(halves) == counts).all()


def test_a_class_without_rows_has_no_recall_and_does_not_count_as_zero(counts):
    recall = per_class_recall(counts)
    assert recall[:2].tolist() == [0.75, 0.5]
    assert math.isnan(recall[2])
    assert macro_recall(counts) == 0.625
    assert worst_class_recall(counts) == 0.5


def test_accuracy_counts_rows_and_not_classes(counts):
    assert accuracy(counts) == pytest.approx(4 / 6)


@pytest.mark.parametrize("number", [accuracy, macro_recall, worst_class_recall])
def test_without_rows_nothing_is_known(number):
    assert math.isnan(number(np.zeros((3, 3), dtype=np.int64)))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30),
)
def test_agrees_with_scikit_learn_even_where_classes_are_absent(rows):
    labels, predictions = np.array(rows).T
    counts = confusion_counts(labels, predictions, 5)
    oracle = confusion_matrix(labels, predictions, labels=range(5))
    assert (counts == oracle).all()
    assert accuracy(counts) == pytest.approx(accuracy_score(labels, predictions))
    present = np.unique(labels)
    recalls = recall_score(labels, predictions, labels=present, average=None, zero_division=0)
    assert per_class_recall(counts)[present] == pytest.approx(recalls)
    assert np.isnan(np.delete(per_class_recall(counts), present)).all()
    assert macro_recall(counts) == pytest.approx(recalls.mean())
    assert worst_class_recall(counts) == pytest.approx(recalls.min())


def test_tensors_and_narrow_integers_count_the_same():
    # 199 * 200 does not fit a byte: the product must not be formed in the input's type.
    labels = np.array([199, 3], dtype=np.uint8)
    counts = confusion_counts(labels, torch.tensor([199, 4]), 200)
    assert counts[199, 199] == 1
    assert counts[3, 4] == 1
    assert counts.sum() == 2


@pytest.mark.parametrize("wrong", [[0, 3], [-1, 0]])
def test_a_class_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\), got"):
        confusion_counts(np.array(wrong), np.array([0, 0]), 3)
    with pytest.raises(ValueError, match=r"predictions must lie in \[0, 3\), got"):
        confusion_counts(np.array([0, 0]), np.array(wrong), 3)


def test_personal_accuracy_weighs_recall_by_the_clients_own_labels(counts):
    # 1/5 * 3/4 + 4/5 * 1/2; counts and shares say the same.
    assert personal_accuracy(counts, np.array([10, 40, 0])) == pytest.approx(0.55)
    assert personal_accuracy(counts, torch.tensor([0.2, 0.8, 0.0])) == pytest.approx(0.55)


def test_personal_accuracy_leaves_out_classes_that_the_test_split_lacks(counts):
    assert personal_accuracy(counts, np.array([10, 40, 50])) == pytest.approx(0.55)
    assert math.isnan(personal_accuracy(counts, np.array([0, 0, 1])))


def test_personal_accuracy_under_the_test_splits_own_mix_is_accuracy(counts):
    assert personal_accuracy(counts, counts.sum(axis=1)) == pytest.approx(accuracy(counts))


@pytest.mark.parametrize("mix", [[0.0, 0.0, 0.0], [1.0, -0.1, 0.0], [1.0, np.nan, 0.0]])
def test_a_label_mix_that_is_none_is_refused(counts, mix):
    with pytest.raises(ValueError, match="label_mix must be finite, >= 0 and not all 0"):
        personal_accuracy(counts, np.array(mix))


def test_nll_matches_hand_computed_value():
    # p = (3/4, 1/4) and (1/2, 1/2), true classes 1 and 0: (ln 4 + ln 2) / 2
    logits = np.array([[math.log(3.0), 0.0], [5.0, 5.0]])
    expected = 1.5 * math.log(2.0)
    assert negative_log_likelihood(logits, np.array([1, 0])) == pytest.approx(expected)


def test_nll_picks_one_entry_per_row():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(64, 10, generator=generator, dtype=torch.float64)
    labels = torch.randint(10, (64,), generator=generator)
    log_probabilities = logits.log_softmax(1)
    expected = torch.nn.functional.nll_loss(log_probabilities, labels).item()
    rows_by_rows_mistake = -log_probabilities[:, labels].mean().item()
    assert negative_log_likelihood(logits, labels) == pytest.approx(expected, rel=1e-12)
    assert abs(rows_by_rows_mistake - expected) > 0.05


def test_nll_survives_huge_logits_and_reads_half_precision():
    logits = torch.tensor([[1e4, 0.0], [0.0, 1e4]], dtype=torch.bfloat16, requires_grad=True)
    assert negative_log_likelihood(logits, torch.tensor([0, 1])) == 0
    assert negative_log_likelihood(logits, torch.tensor([1, 0])) == pytest.approx(1e4, rel=1e-2)


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


def test_no_rows_have_no_likelihood_and_no_calibration():
    assert math.isnan(negative_log_likelihood(np.zeros((0, 3)), np.zeros(0, dtype=int)))
    assert math.isnan(expected_calibration_error(np.zeros((0, 3)), np.zeros(0, dtype=int)))
