import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, brier_score_loss, confusion_matrix, recall_score

from fedkd.metrics import (
    accuracy,
    brier_score,
    class_table,
    confusion_counts,
    macro_recall,
    negative_log_likelihood,
    per_class_precision,
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


def test_no_rows_have_no_likelihood():
    assert math.isnan(negative_log_likelihood(np.zeros((0, 3)), np.zeros(0, dtype=int)))
    assert math.isnan(brier_score(np.zeros((0, 3)), np.zeros(0, dtype=int)))


def test_brier_score_runs_from_certain_and_right_to_certain_and_wrong():
    assert brier_score(np.eye(3), np.arange(3)) == 0
    assert brier_score(np.eye(3), np.roll(np.arange(3), 1)) == 2
    # (0.4^2 + 0.3^2 + 0.1^2 + ...) by hand: 0.16 + 0.09 + 0.01
    assert brier_score(np.array([[0.6, 0.3, 0.1]]), np.array([0])) == pytest.approx(0.26)


def test_brier_score_of_two_classes_is_twice_scikit_learns():
    rng = np.random.default_rng(0)
    chance, labels = rng.random(50), rng.integers(2, size=50)
    ours = brier_score(torch.tensor(np.stack([1 - chance, chance], axis=1)), labels)
    assert ours == pytest.approx(2 * brier_score_loss(labels, chance))


def test_brier_score_refuses_logits_and_unknown_labels():
    with pytest.raises(ValueError, match="probabilities must be >= 0 and sum to 1"):
        brier_score(np.array([[2.0, -1.0]]), np.array([0]))
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\), got 2 to 2"):
        brier_score(np.array([[0.5, 0.5]]), np.array([2]))


def test_the_table_counts_absent_classes_and_classes_never_predicted():
    # Class 2 never occurs but is predicted; class 3 occurs but is never predicted.
    counts = confusion_counts(np.array([0, 0, 1, 3, 3]), np.array([0, 2, 1, 1, 0]), 4)
    table = class_table(counts)
    assert table.rows.tolist() == [2, 1, 0, 2]
    assert table.predicted.tolist() == [2, 2, 1, 0]
    assert table.recall == pytest.approx([0.5, 1, math.nan, 0], nan_ok=True)
    assert table.precision == pytest.approx([0.5, 0.5, 0, math.nan], nan_ok=True)
    assert table.num_absent == 1
    assert table.num_never_predicted == 1


def test_precision_agrees_with_torchmetrics():
    from torchmetrics.functional.classification import multiclass_precision

    labels, predictions = np.random.default_rng(0).integers(5, size=(2, 200))
    oracle = multiclass_precision(
        torch.tensor(predictions), torch.tensor(labels), num_classes=5, average="none"
    )
    ours = per_class_precision(confusion_counts(labels, predictions, 5))
    assert ours == pytest.approx(oracle.numpy(), abs=1e-6)
