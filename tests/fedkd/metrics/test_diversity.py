import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy as scipy_entropy

from fedkd.metrics import (
    PeerAnswers,
    VoteCounter,
    ensemble_entropy,
    ensemble_gain,
    error_correlation,
    jensen_shannon,
    pairwise_disagreement,
    q_statistic,
    target_entropy,
)

predicted = arrays(
    np.int64, st.tuples(st.integers(2, 6), st.integers(1, 8)), elements=st.integers(0, 3)
)


@settings(max_examples=60, deadline=None)
@given(predicted)
def test_closed_form_equals_the_mean_over_all_pairs(classes):
    pairs = [np.mean(one != other) for one, other in combinations(classes, 2)]
    assert pairwise_disagreement(classes) == pytest.approx(np.mean(pairs))


def test_disagreement_of_three_peers_by_hand():
    # Row 0: all agree, 0 of 3 pairs differ. Row 1: two against one, 2 of 3 pairs differ.
    assert pairwise_disagreement(torch.tensor([[0, 1], [0, 1], [0, 2]])) == pytest.approx(1 / 3)


def test_a_lone_peer_has_nobody_to_disagree_with():
    assert math.isnan(pairwise_disagreement(np.array([[0, 1, 2]])))
    assert math.isnan(VoteCounter(3, 3).disagreement())
    assert math.isnan(VoteCounter(3, 3).vote_entropy())


def test_peers_may_be_counted_one_at_a_time_in_any_order():
    classes = np.random.default_rng(0).integers(4, size=(5, 20))
    forwards, backwards = VoteCounter(20, 4), VoteCounter(20, 4)
    for one, other in zip(classes, classes[::-1], strict=True):
        forwards.add(one)
        backwards.add(other)
    assert forwards.disagreement() == backwards.disagreement() == pairwise_disagreement(classes)
    assert forwards.vote_entropy() == backwards.vote_entropy()


def test_vote_entropy_is_zero_for_a_unanimous_row_and_log_two_for_a_tie():
    counter = VoteCounter(num_rows=2, num_classes=3)
    counter.add(np.array([2, 0]))
    counter.add(np.array([2, 1]))
    assert counter.vote_entropy() == pytest.approx(math.log(2) / 2)
    assert counter.disagreement() == 0.5


def test_votes_of_peers_that_predict_some_rows_are_counted_by_hand():
    counter = VoteCounter(num_rows=4, num_classes=3)
    counter.add(np.array([0, 1, 2]), np.array([0, 1, 2]))
    counter.add(np.array([1, 1]), np.array([1, 0]))
    counter.add(np.array([1]), np.array([1]))
    counter.add(np.array([], int), np.array([], int))
    # Row 0: votes 0 and 1, which differ. Row 1: 1, 1, 1. Row 2 has one vote and row 3 none.
    assert counter.votes.tolist() == [[1, 1, 0], [0, 3, 0], [0, 0, 1], [0, 0, 0]]
    assert counter.disagreement() == pytest.approx((1 + 0) / 2)
    # ln 2 for row 0, 0 for rows 1 and 2.
    assert counter.vote_entropy() == pytest.approx(math.log(2) / 3)


def test_votes_without_two_peers_on_any_row_say_nothing_of_disagreement():
    counter = VoteCounter(num_rows=2, num_classes=3)
    counter.add(np.array([1]), np.array([0]))
    counter.add(np.array([2]), np.array([1]))
    assert math.isnan(counter.disagreement())


def test_votes_that_do_not_fit_are_refused():
    counter = VoteCounter(num_rows=2, num_classes=3)
    with pytest.raises(ValueError, match="one class for each of the 2 rows, got 3"):
        counter.add(np.array([0, 1, 2]))
    with pytest.raises(ValueError, match=r"predictions must lie in \[0, 3\), got 0 to 3"):
        counter.add(np.array([0, 3]))
    assert counter.votes.sum() == 0


def test_answers_that_come_one_by_one_have_the_entropies_of_the_whole_stack():
    probabilities = np.random.default_rng(0).dirichlet(np.ones(4), size=(3, 20))
    peers = PeerAnswers(20, 4)
    for number, own in enumerate(probabilities):
        peers.add(np.log(own) - 50.0 if number else own, from_logits=number > 0)
    assert peers.peer_entropy() == pytest.approx(ensemble_entropy(probabilities).peers.mean())
    assert peers.diversity() == pytest.approx(jensen_shannon(probabilities))


def test_answers_of_peers_that_answer_some_rows_by_hand():
    peers = PeerAnswers(num_rows=3, num_classes=2)
    peers.add(np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([0, 1]))
    peers.add(np.array([[0.0, 1.0]]), np.array([0]))
    # Row 0: two certain peers of which the mean is a coin. Row 1: one coin. Row 2: nobody.
    assert peers.peer_entropy() == pytest.approx((0 + math.log(2)) / 2)
    assert peers.diversity() == pytest.approx(math.log(2))


def test_answers_without_two_peers_on_any_row_have_no_diversity():
    peers = PeerAnswers(num_rows=2, num_classes=2)
    assert math.isnan(peers.peer_entropy())
    peers.add(np.array([[0.5, 0.5]]), np.array([1]))
    assert math.isnan(peers.diversity())
    with pytest.raises(ValueError, match="probabilities must be >= 0 and sum to 1"):
        peers.add(np.array([[1.0, 2.0]]), np.array([0]))
    assert peers.peers.tolist() == [0, 1]


def test_target_entropy_runs_from_one_hot_to_uniform():
    assert target_entropy(np.eye(4)) == 0
    assert target_entropy(np.full((3, 4), 0.25)) == pytest.approx(math.log(4))


def test_target_entropy_agrees_with_scipy():
    probabilities = np.random.default_rng(0).dirichlet(np.ones(5), size=30)
    expected = scipy_entropy(probabilities, axis=1).mean()
    assert target_entropy(torch.tensor(probabilities)) == pytest.approx(expected)


def test_entropy_of_logits_is_refused():
    with pytest.raises(ValueError, match="probabilities must be >= 0 and sum to 1"):
        target_entropy(np.array([[1.0, 2.0, 3.0]]))


def test_targets_that_travelled_as_half_precision_are_probabilities():
    probabilities = torch.full((3, 100), 0.01, dtype=torch.float16)
    assert target_entropy(probabilities) == pytest.approx(math.log(100), abs=1e-3)


def test_jensen_shannon_of_two_clients_agrees_with_scipy():
    p, q = np.random.default_rng(0).dirichlet(np.ones(5), size=(2, 30))
    expected = np.mean(jensenshannon(p, q, axis=1) ** 2)
    assert jensen_shannon(np.stack([p, q])) == pytest.approx(expected)
    logits = torch.tensor(np.log(np.stack([p, q])) + 7.0)
    assert jensen_shannon(logits, from_logits=True) == pytest.approx(expected)


def test_jensen_shannon_runs_from_equal_clients_to_disjoint_ones():
    same = np.repeat(np.random.default_rng(0).dirichlet(np.ones(4), size=(1, 9)), 3, axis=0)
    assert jensen_shannon(same) == pytest.approx(0, abs=1e-15)
    assert jensen_shannon(np.eye(3)[:, None, :]) == pytest.approx(math.log(3))


def test_jensen_shannon_is_what_mean_of_kls_exceeds_kl_to_the_mean_by():
    # Two peers and a student, T = 1. The last line: the two losses with the same CE term in both.
    peers = torch.tensor(
        [[[2, 1, 4, -1], [0, 0, 1, 3]], [[-4, 3, 1, 1], [2, 0, -1, 1]]], dtype=torch.float64
    )
    student = torch.tensor([[1, 2, 3, 0], [0.5, -1, 0, 2]], dtype=torch.float64).log_softmax(1)
    probabilities = peers.softmax(-1)

    def kl(target):
        return torch.nn.functional.kl_div(student, target, reduction="batchmean").item()

    mean_of_kls = (kl(probabilities[0]) + kl(probabilities[1])) / 2
    expected = mean_of_kls - kl(probabilities.mean(0))
    assert jensen_shannon(peers, from_logits=True) == pytest.approx(expected)
    assert expected == pytest.approx(1.59208643 - 1.24723729, abs=1e-7)


def test_entropy_of_the_ensemble_exceeds_that_of_its_peers_by_their_divergence():
    probabilities = np.random.default_rng(0).dirichlet(np.ones(5), size=(3, 20))
    entropies = ensemble_entropy(probabilities)
    assert entropies.target == pytest.approx(target_entropy(probabilities.mean(axis=0)))
    assert entropies.peers == pytest.approx([target_entropy(own) for own in probabilities])
    difference = entropies.target - entropies.peers.mean()
    assert difference == pytest.approx(jensen_shannon(probabilities))
    from_logits = ensemble_entropy(torch.tensor(np.log(probabilities) - 3), from_logits=True)
    assert from_logits.target == pytest.approx(entropies.target)


def test_two_certain_peers_that_differ_make_a_target_of_log_two():
    entropies = ensemble_entropy(np.eye(3)[[0, 1]][:, None])
    assert entropies.target == pytest.approx(math.log(2))
    assert entropies.peers.tolist() == [0, 0]


def test_entropy_of_no_rows_is_unknown():
    entropies = ensemble_entropy(np.zeros((2, 0, 3)))
    assert math.isnan(entropies.target)
    assert np.isnan(entropies.peers).all()


def test_an_ensemble_gains_where_mistakes_differ():
    # Labels 0. Each of three clients errs on one row of its own; the other two outvote it.
    probabilities = np.tile([0.9, 0.1], (3, 3, 1))
    probabilities[range(3), range(3)] = [0.2, 0.8]
    labels = np.zeros(3, dtype=int)
    assert ensemble_gain(probabilities, labels) == pytest.approx(1 - 2 / 3)
    assert ensemble_gain(np.log(probabilities), labels, from_logits=True) == pytest.approx(1 / 3)
    assert ensemble_gain(probabilities[:1].repeat(4, axis=0), labels) == pytest.approx(0)
    assert math.isnan(ensemble_gain(np.zeros((2, 0, 3)), np.zeros(0, dtype=int)))


right_or_wrong = arrays(
    np.int64, st.tuples(st.integers(2, 5), st.integers(1, 12)), elements=st.integers(0, 1)
)


@settings(max_examples=60, deadline=None)
@given(right_or_wrong)
def test_error_correlation_and_q_agree_with_loops_over_pairs(right):
    correlations, statistics = [], []
    for one, other in combinations(right, 2):
        if one.std() > 0 and other.std() > 0:
            correlations.append(np.corrcoef(one, other)[0, 1])
        a, d = sum(one & other), sum(~one & ~other & 1)
        b, c = sum(one & ~other), sum(~one & other & 1)
        if a * d + b * c:
            statistics.append((a * d - b * c) / (a * d + b * c))
    # Class 0 is right everywhere; what is predicted instead makes no difference.
    predicted = np.where(right == 1, 0, 3)
    labels = np.zeros(right.shape[1], dtype=np.int64)
    for ours, expected in (
        (error_correlation(predicted, labels), correlations),
        (q_statistic(torch.tensor(predicted), torch.tensor(labels)), statistics),
    ):
        if expected:
            assert ours == pytest.approx(np.mean(expected), abs=1e-12)
        else:
            assert math.isnan(ours)


def test_q_and_correlation_by_hand():
    # Both right on 4 rows, one only on 1, the other only on 2, neither on 3.
    right = np.array([[1] * 4 + [1] + [0] * 2 + [0] * 3, [1] * 4 + [0] + [1] * 2 + [0] * 3])
    labels = np.ones(10, dtype=np.int64)
    assert q_statistic(right, labels) == pytest.approx((12 - 2) / (12 + 2))
    assert error_correlation(right, labels) == pytest.approx(10 / math.sqrt(5 * 5 * 6 * 4))


def test_clients_that_never_err_have_no_correlation():
    labels = np.arange(10)
    assert math.isnan(error_correlation(np.stack([labels, labels]), labels))
    assert math.isnan(q_statistic(np.stack([labels, labels]), labels))
