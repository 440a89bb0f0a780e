import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import roc_auc_score

from fedkd.metrics.public_set import (
    DomainShift,
    area_under_curve,
    confident_rows,
    covered_classes,
    density_overlap,
    domain_shift,
    figures_of,
    mix_distance,
)

UNKNOWN = DomainShift(auc=math.nan, overlap=math.nan)
values = arrays(np.float64, st.integers(1, 12), elements=st.integers(0, 4).map(float))


def shift(private, public, seed=0):
    return domain_shift(private, public, np.random.default_rng(seed))


def test_samples_of_one_distribution_cannot_be_told_apart():
    rng = np.random.default_rng(0)
    alike = shift(rng.normal(size=(400, 6)), rng.normal(size=(300, 6)))
    assert alike.auc == pytest.approx(0.5, abs=0.06)
    assert alike.overlap > 0.9


@pytest.mark.parametrize("far", [lambda rows: rows + 3, lambda rows: 4 * rows])
def test_another_mean_and_another_variance_are_noticed(far):
    rng = np.random.default_rng(0)
    told = shift(rng.normal(size=(300, 6)), far(rng.normal(size=(300, 6))))
    assert told.auc > 0.95
    assert told.overlap < 0.35


def test_a_shift_is_the_same_for_the_same_stream_and_any_shape():
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(60, 1, 3, 3)), rng.normal(size=(50, 1, 3, 3)) + 0.3
    assert shift(one, two) == shift(one.reshape(60, 9), two.reshape(50, 9))


def test_few_rows_and_rows_that_never_differ_say_nothing():
    assert math.isnan(shift(np.zeros((9, 2)), np.zeros((20, 2))).auc)
    assert shift(np.ones((20, 2)), np.ones((20, 2))).auc == 0.5


@settings(max_examples=60, deadline=None)
@given(values, values)
def test_the_area_under_the_curve_is_that_of_sklearn(lower, higher):
    labels = np.repeat([0, 1], [len(lower), len(higher)])
    expected = roc_auc_score(labels, np.concatenate([lower, higher]))
    assert area_under_curve(lower, higher) == pytest.approx(expected)


def test_the_overlap_by_hand():
    # Ratios q / p of 1 and 3: (2 / 2 + 2 / 4) / 2.
    assert density_overlap(np.log([1.0, 3.0])) == pytest.approx(0.75)
    assert density_overlap(np.full(3, 1e9)) == pytest.approx(0, abs=1e-12)
    assert density_overlap(np.full(3, -1e9)) == 1
    assert math.isnan(density_overlap(np.zeros(0)))


def test_the_overlap_is_an_integral():
    # Two normal densities, their means 1 apart; rows are drawn from the second.
    rows = np.random.default_rng(0).normal(1, 1, 200_000)
    grid = np.linspace(-8, 9, 20_001)
    p, q = (np.exp(-np.square(grid - mean) / 2) / np.sqrt(2 * np.pi) for mean in (0, 1))
    expected = np.trapezoid(2 * p * q / (p + q), grid)
    assert density_overlap(rows - 0.5) == pytest.approx(expected, abs=0.003)


# Row 0: the mean says 0, and client 0 is sure of it. Row 1: the mean says 1, nobody is sure.
# Row 2: client 0 is sure of 2, and the mean says 1, of which client 1 is surer.
ANSWERS = np.array(
    [
        [[0.8, 0.1, 0.1], [0.3, 0.4, 0.3], [0.0, 0.4, 0.6]],
        [[0.4, 0.3, 0.3], [0.3, 0.4, 0.3], [0.1, 0.8, 0.1]],
    ]
)


def test_confident_rows_by_hand():
    assert confident_rows(ANSWERS).tolist() == [1, 1, 0]
    assert confident_rows(ANSWERS, confidence=0.35).tolist() == [1, 2, 0]
    with pytest.raises(ValueError, match="probabilities must be"):
        confident_rows(2 * ANSWERS)


def test_a_class_is_covered_by_a_tenth_of_its_share():
    # 100 rows, 4 classes: 25 each if dealt out evenly, so three are needed.
    assert covered_classes(np.array([90, 3, 2, 5])).tolist() == [0, 1, 3]
    assert covered_classes(np.array([1, 0])).tolist() == [0]
    assert covered_classes(np.zeros(3, int)).tolist() == []


def test_the_distance_of_mixes_by_hand():
    first = np.array([[1.0, 0.0], [0.5, 0.5]])
    assert mix_distance(first, np.array([[0.25, 0.75]])) == pytest.approx(0.5)
    assert mix_distance(first, first[::-1]) == 0
    assert math.isnan(mix_distance(first, np.zeros((0, 2))))


def test_figures_of_a_public_set_by_hand():
    labels = np.array([0, 1, 2])
    figures = figures_of(ANSWERS, ANSWERS, labels, UNKNOWN)
    assert figures.rows_per_class == 1
    # Client 0 is right in all three rows, client 1 and the mean in the first two.
    assert figures.client_accuracy == pytest.approx(5 / 6)
    assert figures.ensemble_accuracy == pytest.approx(2 / 3)
    assert figures.ensemble_gain == pytest.approx(-1 / 6)
    assert figures.disagreement == pytest.approx(1 / 3)
    assert figures.coverage == pytest.approx(2 / 3)
    assert figures.mix_distance == 0
    assert math.isnan(figures.domain_auc)


def test_entropy_and_diversity_are_shares_of_what_is_possible():
    certain = np.stack([np.tile(row, (4, 1)) for row in np.eye(2)])
    even = np.full((2, 4, 2), 0.5)
    labels = np.array([0, 1])
    apart = figures_of(certain, even[:, :2], labels, UNKNOWN)
    assert (apart.answer_entropy, apart.diversity) == pytest.approx((0, 1))
    alike = figures_of(even, even[:, :2], labels, UNKNOWN)
    assert (alike.answer_entropy, alike.diversity) == pytest.approx((1, 0))
