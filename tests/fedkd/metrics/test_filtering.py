import math

import numpy as np
import pytest
import torch

from fedkd.metrics import confidence_histogram, kept_by_class, threshold_curve

# Top classes 0, 0, 1, 1 with confidences 0.9, 0.5, 0.7, 0.6; the third row is really of class 0.
TARGET = np.array([[0.9, 0.1, 0.0], [0.5, 0.3, 0.2], [0.2, 0.7, 0.1], [0.4, 0.6, 0.0]])
LABELS = np.array([0, 0, 0, 1])


def test_the_curve_matches_hand_computed_values():
    curve = threshold_curve(TARGET, [0, 0.65, 0.8, 1.01], labels=LABELS)
    assert curve.thresholds.tolist() == [0, 0.65, 0.8, 1.01]
    assert curve.kept.tolist() == [1, 0.5, 0.25, 0]
    assert curve.accuracy == pytest.approx([0.75, 0.5, 1, math.nan], nan_ok=True)
    expected = [[1, 1, math.nan], [2 / 3, 0, math.nan], [1 / 3, 0, math.nan], [0, 0, math.nan]]
    assert curve.kept_by_class == pytest.approx(np.array(expected), nan_ok=True)


def test_without_labels_rows_belong_to_their_top_class_and_accuracy_is_unknown():
    curve = threshold_curve(torch.tensor(TARGET), [0.65])
    assert curve.kept_by_class[0] == pytest.approx([0.5, 0.5, math.nan], nan_ok=True)
    assert np.isnan(curve.accuracy).all()
    assert kept_by_class(TARGET, 0.65) == pytest.approx(curve.kept_by_class[0], nan_ok=True)


def test_what_is_kept_falls_with_the_threshold_and_is_all_at_zero():
    target = np.random.default_rng(0).dirichlet(np.ones(4), size=200)
    curve = threshold_curve(target, np.linspace(0, 1, 21).tolist())
    assert curve.kept[0] == 1
    assert (np.diff(curve.kept) <= 0).all()
    assert (np.diff(curve.kept_by_class, axis=0) <= 0).all()
    assert 0 < curve.kept[10] < 1


def test_the_share_kept_is_that_of_the_mask_that_training_uses():
    from fedkd.targets import confidence_mask

    # float32(0.9) is below 0.9: read in double precision it would be dropped.
    target = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    assert threshold_curve(target, [0.9]).kept[0] == confidence_mask(target, 0.9).mean() == 0.5


def test_a_threshold_below_zero_and_a_target_of_logits_are_refused():
    with pytest.raises(ValueError, match=r"confidence threshold must be >= 0, got -0\.1"):
        kept_by_class(TARGET, -0.1)
    with pytest.raises(ValueError, match="probabilities must be >= 0 and sum to 1"):
        threshold_curve(10 * TARGET, [0.5])


def test_no_rows_keep_nothing_known():
    curve = threshold_curve(np.zeros((0, 3)), [0.5], labels=np.zeros(0, dtype=int))
    assert np.isnan(curve.kept).all()
    assert np.isnan(curve.kept_by_class).all()


def test_the_histogram_counts_every_row_once_and_batches_add_up():
    histogram = confidence_histogram(TARGET, bins=4)
    assert histogram.edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert histogram.counts.tolist() == [0, 0, 3, 1]
    halves = [
        confidence_histogram(torch.tensor(TARGET[part]), bins=4) for part in (np.s_[:1], np.s_[1:])
    ]
    assert sum(half.counts for half in halves).tolist() == histogram.counts.tolist()
    assert confidence_histogram(np.eye(2), bins=4).counts.tolist() == [0, 0, 0, 2]
    with pytest.raises(ValueError, match="bins must be >= 1, got 0"):
        confidence_histogram(TARGET, bins=0)
