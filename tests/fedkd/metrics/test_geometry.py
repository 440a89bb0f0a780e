import math

import numpy as np
import pytest
import torch

from fedkd.metrics import class_correlation, class_correlation_difference, logit_geometry


def test_the_scale_of_logits_matches_hand_computed_values():
    geometry = logit_geometry(np.array([[1.0, 4.0, 1.0], [-2.0, 0.0, 2.0]]))
    assert geometry.mean == 1
    assert geometry.std == pytest.approx(math.sqrt((0 + 9 + 0 + 9 + 1 + 1) / 6))
    assert (geometry.minimum, geometry.maximum) == (-2, 4)
    assert geometry.row_std == pytest.approx((math.sqrt(2) + math.sqrt(8 / 3)) / 2)
    assert geometry.row_range == 3.5
    assert geometry.margin == 2.5


def test_doubling_logits_doubles_every_number():
    logits = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)).double()
    once, twice = logit_geometry(logits), logit_geometry(2 * logits)
    for name in ("mean", "std", "minimum", "maximum", "row_std", "row_range", "margin"):
        assert getattr(twice, name) == pytest.approx(2 * getattr(once, name)), name


def test_logits_of_no_rows_have_no_scale_and_one_class_no_margin():
    geometry = logit_geometry(np.zeros((0, 3)))
    assert math.isnan(geometry.mean)
    assert math.isnan(geometry.std)
    assert math.isnan(geometry.maximum)
    assert math.isnan(geometry.margin)
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        logit_geometry(np.zeros((4, 1)))


def test_class_correlation_agrees_with_numpy():
    logits = np.random.default_rng(0).normal(size=(40, 5))
    assert class_correlation(torch.tensor(logits)) == pytest.approx(np.corrcoef(logits.T))


def test_a_class_with_the_same_logit_everywhere_correlates_with_nothing():
    logits = np.random.default_rng(0).normal(size=(9, 3))
    logits[:, 1] = 0.1
    correlation = class_correlation(logits)
    assert np.isnan(correlation[1]).all()
    assert np.isnan(correlation[:, 1]).all()
    assert correlation[0, 0] == pytest.approx(1)
    assert np.isnan(class_correlation(logits[:0])).all()


def test_the_difference_is_the_students_minus_the_teachers():
    # Classes 0 and 1 rise together for the student and against each other for the teacher.
    rising = np.array([1.0, 2.0, 4.0])
    student, teacher = np.stack([rising, rising], axis=1), np.stack([rising, -rising], axis=1)
    difference = class_correlation_difference(student, teacher)
    assert difference == pytest.approx(np.array([[0, 2], [2, 0]]))
