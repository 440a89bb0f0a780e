"""Label shares of a client: recovered exactly where the model of the attack holds."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedkd.privacy.attacks.labels import against_consensus, kl, mean_prediction


def posterior(likelihood, shares):
    """Return p(y | x) of a model that is right where labels come in these shares."""
    joint = likelihood * shares
    return joint / joint.sum(1, keepdims=True)


@given(st.integers(0, 10_000), st.integers(2, 6))
def test_shares_are_recovered_exactly_where_only_they_differ(seed, classes):
    rng = np.random.default_rng(seed)
    likelihood = rng.uniform(0.1, 1, (7, classes))  # p(x | y) of 7 public rows, of any mix
    shares, prior = rng.dirichlet(np.full(classes, 3.0), size=2) * 0.9 + 0.1 / classes
    own, consensus = posterior(likelihood, shares), posterior(likelihood, prior)
    assert against_consensus(own, consensus, prior, from_logits=False) == pytest.approx(shares)
    shifts = rng.normal(0, 5, (7, 1))
    found = against_consensus(np.log(own) + shifts, np.log(consensus), prior, from_logits=True)
    assert found == pytest.approx(shares)
    order = rng.permutation(classes)
    found = against_consensus(own[:, order], consensus[:, order], prior[order], from_logits=False)
    assert found == pytest.approx(shares[order])


def test_the_mean_prediction_by_hand():
    assert mean_prediction(np.array([[0.5, 0.5], [1, 0]])) == pytest.approx([0.75, 0.25])


def test_a_mean_prediction_is_drawn_to_the_public_mix_and_the_difference_is_not():
    rng = np.random.default_rng(2)
    likelihood = np.exp(
        rng.normal(0, 1, (500, 3)) + np.array([3.0, 0, 0])
    )  # class 0 in public rows
    shares, prior = np.array([0.1, 0.1, 0.8]), np.full(3, 1 / 3)
    own, consensus = posterior(likelihood, shares), posterior(likelihood, prior)
    assert kl(shares, against_consensus(own, consensus, prior, from_logits=False)) < 1e-9
    assert kl(shares, mean_prediction(own)) > 0.1


def test_probabilities_of_zero_count_as_a_millionth():
    own, consensus = np.array([[1.0, 0.0]]), np.array([[0.5, 0.5]])
    prior = np.array([0.5, 0.5])
    found = against_consensus(own, consensus, prior, from_logits=False)
    assert found == pytest.approx([1 / (1 + 1e-6), 1e-6 / (1 + 1e-6)])
    far = against_consensus(np.array([[900.0, 0.0]]), consensus * 0, prior, from_logits=True)
    assert far == pytest.approx(found)


def test_the_divergence_by_hand_and_against_scipy():
    true, estimated = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    # 1/2 ln 2 - 1/4 ln 2
    assert kl(true, estimated) == pytest.approx(math.log(2) / 4)
    assert kl(true, estimated) == pytest.approx(stats.entropy(true, estimated))
    assert kl(np.array([1.0, 0.0]), np.array([0.5, 0.5])) == pytest.approx(math.log(2))
    assert kl(true, true) == 0


def test_a_class_said_to_be_absent_costs_much_but_not_infinitely():
    # (1/2) ln(1/2 / 1) + (1/2) ln(1/2 / 1e-6), of an estimate that sums to 1 + 1e-6.
    wanted = math.log(0.5) + 3 * math.log(10) + math.log1p(1e-6)
    assert kl(np.array([0.5, 0.5]), np.array([1.0, 0.0])) == pytest.approx(wanted, abs=1e-9)


def test_what_is_no_distribution_is_refused():
    rows = np.full((2, 2), 0.5)
    with pytest.raises(ValueError, match="sum to 1"):
        mean_prediction(rows * 3)
    with pytest.raises(ValueError, match="sum to 1"):
        against_consensus(rows * 3, rows, rows[0], from_logits=False)
    with pytest.raises(ValueError, match="sum to 1"):
        kl(np.array([2.0, 1.0]), rows[0])
    with pytest.raises(ValueError, match="got none"):
        mean_prediction(rows[:0])
    with pytest.raises(ValueError, match="got none"):
        against_consensus(rows[:0], rows[:0], rows[0], from_logits=False)
