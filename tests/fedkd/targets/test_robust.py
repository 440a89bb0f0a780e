"""Robust means of soft labels return soft labels, whatever a few clients say."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.targets import (
    PredictionSpool,
    coordinate_median,
    filtered_mean,
    geometric_median,
    kept_by_filter,
    kept_within,
    less_trusted,
    norm_checked_mean,
    outlier_checked_mean,
    outlier_scores,
    squared_deviations,
    squared_distances,
    trimmed_mean,
)

# Five clients' soft labels of one row; the last one lies.
SAMPLE = torch.tensor(
    [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.65, 0.25, 0.1], [0.5, 0.3, 0.2], [0, 0, 1]],
    dtype=torch.float64,
)[:, None]
RULES = {
    "filter": partial(filtered_mean, dishonest=0.4),
    "geometric median": geometric_median,
    "median": partial(coordinate_median, scale="probabilities"),
    "trimmed mean": partial(trimmed_mean, trim=0.2, scale="probabilities"),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def by_row(values):
    return values.numpy().transpose(1, 0, 2)


def soft(clients, rows=40, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(2 * torch.randn(clients, rows, classes, generator=generator), -1)


# -- values by hand ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("filter", [0.65, 0.25, 0.10]),
        ("median", [0.63157895, 0.26315789, 0.10526316]),
        ("trimmed mean", [0.60344828, 0.25862069, 0.13793103]),
        ("geometric median", [0.61107988, 0.26280099, 0.12611913]),
    ],
)
def test_a_liar_among_five_moves_no_robust_mean_far(rule, expected):
    # Their mean is (.49, .21, .30).
    assert np.allclose(RULES[rule](SAMPLE)[0], expected, atol=1e-8)


def test_scores_are_distances_along_the_widest_direction():
    first = outlier_scores(by_row(SAMPLE))
    expected = [0.27510521, 0.24119363, 0.25814942, 0.10533660, 0.87978485]
    assert np.allclose(first[0], expected, atol=1e-8)
    # Their squares are the largest eigenvalue of the covariance, times the clients less one.
    assert (first**2).sum() / 4 == pytest.approx(0.24640389, abs=1e-8)
    second = outlier_scores(by_row(SAMPLE[:4]))
    assert np.allclose(second[0], [0.10665865, 0.01449280, 0.04608291, 0.13824878], atol=3e-8)


@pytest.mark.parametrize(("clients", "classes"), [(3, 6), (6, 6), (9, 4)])
def test_scores_are_the_same_whichever_matrix_is_the_smaller(clients, classes):
    values = by_row(soft(clients, classes=classes).double())
    for row, scores in zip(values, outlier_scores(values), strict=True):
        covariance = np.cov(row, rowvar=False)
        direction = np.linalg.eigh(covariance)[1][:, -1]
        assert np.allclose(scores, np.abs((row - row.mean(0)) @ direction), atol=1e-9)


def test_the_geometric_median_has_the_smallest_sum_of_distances():
    def total(point):
        return float((SAMPLE - point).norm(dim=-1).sum())

    assert total(geometric_median(SAMPLE)) == pytest.approx(1.44406728, abs=1e-8)
    values = soft(7).double()
    best = geometric_median(values)
    for seed in range(3):
        near = best + 1e-3 * torch.randn(best.shape, generator=torch.Generator().manual_seed(seed))
        assert ((values - near).norm(dim=-1).sum(0) >= (values - best).norm(dim=-1).sum(0)).all()


def test_the_geometric_median_stays_at_a_point_that_most_clients_share():
    # A mean that begins at somebody's point divides by a distance of 0.
    values = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])[:, None]
    assert np.allclose(geometric_median(values)[0], [1, 0], atol=1e-6)
    cross = torch.tensor([[1.0, 0.5], [0, 0.5], [0.5, 1], [0.5, 0], [0.5, 0.5]])[:, None]
    assert np.allclose(geometric_median(cross)[0], [0.5, 0.5])


def test_the_geometric_median_does_not_leave_the_point_that_it_is():
    # The mean is at two clients' point, which the other three pull less than the two hold.
    first = torch.tensor([1.0, 4, 5, 6, 4], dtype=torch.float64) / 8
    values = torch.stack([first, 1 - first], dim=-1)[:, None]
    assert geometric_median(values).tolist() == [[0.5, 0.5]]


# -- published faults --------------------------------------------------------------------------


@pytest.mark.parametrize("clients", [5, 10, 13, 20])
def test_both_passes_leave_out_as_many_as_half_the_liars_of_all_clients(clients):
    """Published fault: the second pass counts by the clients that are left, and keeps liars."""
    liars = int(0.4 * clients / 2) * 2
    values = soft(clients, seed=clients)
    kept = kept_by_filter(values, dishonest=0.4)
    assert kept.shape == (40, clients - liars)
    honest = torch.tensor([0.6, 0.3, 0.1]).repeat(clients, 1)
    honest[: liars // 2] = torch.tensor([0.0, 0, 1])
    honest[liars // 2 : liars] = torch.tensor([0.0, 1, 0])
    assert kept_by_filter(honest[:, None], dishonest=0.4).tolist() == [[*range(liars, clients)]]
    told = filtered_mean(honest[:, None], dishonest=0.4)
    assert np.allclose(told[0], [0.6, 0.3, 0.1], atol=1e-6)


@pytest.mark.parametrize(
    ("honest", "lie"),
    [
        ([0.75, 0.25, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]),  # exactly representable
        ([1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]),  # one-hot
        ([0.5, 0.5, 0.0], [0.0, 0.0, 1.0]),
    ],
)
@pytest.mark.parametrize("liar", range(5))
def test_a_liar_is_found_where_rounding_does_not_help(honest, lie, liar):
    """Published fault: a direction iterated from a vector of ones is 0, since rows sum to 1."""
    values = torch.tensor(honest).repeat(5, 1)
    values[liar] = torch.tensor(lie)
    assert torch.equal(filtered_mean(values[:, None], dishonest=0.4)[0], torch.tensor(honest))
    assert liar not in kept_by_filter(values[:, None], dishonest=0.4)


def test_one_hot_rows_never_keep_a_minority_of_one():
    # The published code fails on one row of seven of this kind.
    rng = np.random.default_rng(0)
    for _ in range(50):
        truth, lie = rng.choice(4, 2, replace=False)
        classes = np.full(5, truth)
        classes[rng.integers(5)] = lie
        told = filtered_mean(torch.eye(4)[classes][:, None], dishonest=0.4)
        assert told.argmax() == truth
        assert told.max() == 1


@pytest.mark.parametrize("rule", ["median", "trimmed mean"])
def test_robust_means_of_probabilities_sum_to_one(rule):
    """Published fault: medians and trimmed means of probabilities are no distributions."""
    told = RULES[rule](SAMPLE)
    assert float(told.sum()) == pytest.approx(1, abs=1e-12)
    raw = {"median": coordinate_median(SAMPLE), "trimmed mean": trimmed_mean(SAMPLE, trim=0.2)}
    assert float(raw[rule].sum()) == pytest.approx({"median": 0.95, "trimmed mean": 0.966667}[rule])


# -- the edges ---------------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("clients", [1, 2, 3, 5, 8])
def test_a_robust_mean_of_distributions_is_one(rule, clients):
    told = rule(soft(clients))
    assert told.dtype == torch.float32
    assert told.min() >= 0
    assert np.allclose(told.sum(-1), 1, atol=1e-6)


@every_rule
def test_clients_that_all_say_something_else_still_come_to_a_distribution(rule):
    # No class has a positive median or trimmed mean.
    told = rule(torch.eye(5)[:, None])
    assert torch.isfinite(told).all()
    assert float(told.sum()) == pytest.approx(1, abs=1e-6)


@every_rule
def test_clients_that_agree_are_repeated(rule):
    one = soft(1)
    assert np.allclose(rule(one.expand(6, -1, -1)), one[0], atol=1e-6)


@every_rule
def test_a_chunk_of_rows_has_the_bits_of_the_whole(rule):
    values = soft(9, rows=37)
    whole = rule(values)
    with PredictionSpool(chunk_bytes=9 * 5 * 4 * 3) as spool:
        for own in values:
            spool.add(own)
        assert torch.equal(spool.reduce(rule), whole)


@every_rule
def test_no_client_has_no_robust_mean(rule):
    with pytest.raises(ValueError, match="at least 1 client, got 0"):
        rule(SAMPLE[:0])


@pytest.mark.parametrize("dishonest", [-0.1, 1.0, float("nan")])
def test_a_share_of_liars_out_of_range_is_refused(dishonest):
    with pytest.raises(ValueError, match=r"dishonest must be in \[0, 1\), got"):
        filtered_mean(SAMPLE, dishonest=dishonest)


def test_half_a_client_is_left_out_by_no_pass():
    values = soft(9)
    assert kept_by_filter(values, dishonest=0.2).shape == (40, 9)
    assert np.allclose(filtered_mean(values, dishonest=0.2), values.mean(0), atol=1e-7)
    assert kept_by_filter(soft(100), dishonest=0.58).shape == (40, 42)


def test_trust_keeps_its_sum_and_falls_for_whoever_is_far():
    values, target = soft(4, rows=6), soft(1, rows=6)[0]
    trust = np.array([0.1, 0.2, 0.05, 0.15])
    assert np.allclose(less_trusted(trust, values, target, rate=0.0), trust)
    after = less_trusted(trust, values, target, rate=5.0)
    assert after.sum() == pytest.approx(0.5)
    far = (values - target).norm(dim=-1).mean(1).numpy()
    assert (np.argsort(after / trust) == np.argsort(-far)).all()
    assert np.isfinite(less_trusted(trust, values, target, rate=1e6)).all()


def test_those_who_are_left_are_trusted_however_little_that_was():
    target = SAMPLE.mean(0)
    least = np.full(5, 1e-200)
    for trust in (least, np.array([0.5, *least[1:]])):
        after = less_trusted(trust, SAMPLE, target, rate=1e6)
        assert np.isfinite(after).all()
        assert (after > 0).all()
    assert np.isfinite(less_trusted(after[1:], SAMPLE[1:], target, rate=1e6)).all()


def test_somebody_is_left_however_many_may_lie():
    found = filtered_mean(SAMPLE[:4], dishonest=0.9999999999)
    assert torch.isfinite(found).all()


# -- checks of whole clients -------------------------------------------------------------------

# Of two rows: sizes sqrt(2), sqrt(2), sqrt(2), 10 sqrt(2); the last one scales up what it says.
SCALED = torch.tensor(
    [
        [[1.0, -1], [1, -1]],
        [[2.0, 0], [0, -2]],
        [[-1.0, 1], [1, -1]],
        [[10.0, -10], [10, -10]],
    ]
)
# Their coordinate median is (0, 0) in both rows; distances are 1, 1, 1, 1 and sqrt(13).
FAR = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1], [0, 0]])[:, None].repeat(1, 2, 1)
FAR[4] = torch.tensor([[3.0, 0], [-1, 4]])


def test_sizes_are_distances_from_a_row_of_equal_scores():
    assert squared_deviations(SCALED).tolist() == [[2, 2], [2, 2], [2, 2], [200, 200]]


def test_who_is_larger_than_the_median_client_allows_is_left_out():
    assert kept_within(squared_deviations(SCALED), factor=9.99).tolist() == [True] * 3 + [False]
    assert kept_within(squared_deviations(SCALED), factor=10).tolist() == [True] * 4
    told = norm_checked_mean(SCALED, factor=2)
    assert np.allclose(told, [[2 / 3, 0], [2 / 3, -4 / 3]], atol=1e-7)


def test_who_is_farther_from_the_median_than_the_median_client_allows_is_left_out():
    assert squared_distances(FAR).tolist() == [[1, 1], [1, 1], [1, 1], [1, 1], [9, 17]]
    for factor, last in ((3.6, False), (3.61, True)):
        kept = kept_within(squared_distances(FAR), factor=factor)
        assert kept.tolist() == [True] * 4 + [last]
    assert np.allclose(outlier_checked_mean(FAR, factor=2), 0, atol=1e-7)
    assert np.allclose(outlier_checked_mean(FAR, factor=4), FAR.mean(0), atol=1e-7)


def test_only_the_rows_that_a_client_spoke_of_count():
    squares = np.array([[1.0, 1, 1], [4, 0, 0], [1, 1, 0], [0, 0, 0]])
    sent = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]], bool)
    # Distances are 1, 2, 1; the last client says nothing, and is no median client.
    assert kept_within(squares, sent, factor=1.9).tolist() == [True, False, True, False]
    assert kept_within(squares, sent, factor=2).tolist() == [True, True, True, False]
    assert not kept_within(squares, np.zeros_like(sent), factor=2).any()


@pytest.mark.parametrize("checked", [norm_checked_mean, outlier_checked_mean])
def test_where_all_are_alike_a_check_leaves_out_nobody(checked):
    one = soft(1)
    for clients in (1, 2, 5):
        assert np.allclose(checked(one.expand(clients, -1, -1), factor=1), one[0], atol=1e-7)
    with pytest.raises(ValueError, match=r"factor must be >= 1, got 0.99"):
        checked(SCALED, factor=0.99)


@pytest.mark.parametrize("checked", [norm_checked_mean, outlier_checked_mean])
def test_a_check_without_clients_has_no_mean(checked):
    with pytest.raises(ValueError, match="at least 1 client, got 0"):
        checked(SCALED[:0], factor=2)


# -- what liars can do, whatever they send -------------------------------------------------------

CLASSES = 4
CENTRE = np.array([0.55, 0.25, 0.15, 0.05])
RADIUS = 0.02
quickly = settings(max_examples=60, deadline=None)
ROUNDING = 1e-6

on_the_simplex = st.lists(st.floats(0, 1, width=32), min_size=CLASSES, max_size=CLASSES).map(
    lambda parts: (np.array(parts) + 1e-9) / (np.sum(parts) + CLASSES * 1e-9)
)


@st.composite
def federations(draw, liars_of, together=False):
    """Honest clients near a centre, and so many liars that say anything; a row of each."""
    clients = draw(st.integers(3, 12))
    liars = draw(st.integers(0, liars_of(clients)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    away = rng.normal(size=(clients - liars, CLASSES))
    away -= away.mean(-1, keepdims=True)
    away *= RADIUS * rng.random((len(away), 1)) / np.linalg.norm(away, axis=-1, keepdims=True)
    honest = CENTRE + away
    lies = (
        [draw(on_the_simplex)] * liars if together else [draw(on_the_simplex) for _ in range(liars)]
    )
    order = rng.permutation(clients)
    values = np.concatenate([honest, np.reshape(lies, (liars, CLASSES))])[order]
    return torch.from_numpy(values)[:, None], honest, liars


def fewer_than_half(clients):
    return (clients - 1) // 2


@quickly
@given(federations(fewer_than_half))
def test_a_median_stays_among_the_honest_whatever_fewer_than_half_say(case):
    values, honest, _ = case
    told = coordinate_median(values)[0].numpy()
    assert (told >= honest.min(0) - ROUNDING).all()
    assert (told <= honest.max(0) + ROUNDING).all()


@quickly
@given(federations(lambda clients: int(0.34 * clients)))
def test_a_trimmed_mean_stays_among_the_honest_while_it_trims_as_many_as_lie(case):
    values, honest, _ = case
    told = trimmed_mean(values, trim=0.34)[0].numpy()
    assert (told >= honest.min(0) - ROUNDING).all()
    assert (told <= honest.max(0) + ROUNDING).all()


@quickly
@given(federations(fewer_than_half))
def test_a_median_of_probabilities_has_the_honest_range_divided_by_its_sum(case):
    values, honest, _ = case
    told = coordinate_median(values, scale="probabilities")[0].numpy()
    assert told.sum() == pytest.approx(1, abs=1e-6)
    low, high = honest.min(0), honest.max(0)
    assert (told >= low / high.sum() - ROUNDING).all()
    assert (told <= high / low.sum() + ROUNDING).all()


@quickly
@given(federations(fewer_than_half))
def test_a_geometric_median_stays_near_the_honest(case):
    # Minsker, 2015, Lemma 2.1: with a share a of liars at most (1 - a) / sqrt(1 - 2 a) times the
    # radius of a ball that holds all honest clients. https://arxiv.org/abs/1308.1334
    values, _, liars = case
    share = liars / len(values)
    told = geometric_median(values)[0].numpy()
    bound = (1 - share) / np.sqrt(1 - 2 * share) * RADIUS
    assert np.linalg.norm(told - CENTRE) <= bound + ROUNDING


def dropped(clients, dishonest=0.6):
    return 2 * min(int(dishonest * clients / 2 + 1e-9), (clients - 1) // 2)


@quickly
@given(federations(lambda clients: min(fewer_than_half(clients), dropped(clients)), together=True))
def test_a_filter_finds_liars_that_lie_together_or_they_are_no_liars(case):
    # One that is not left out has moved the mean by no more than some radii.
    values, _, _ = case
    told = filtered_mean(values, dishonest=0.6)[0].numpy()
    assert np.linalg.norm(told - CENTRE) <= 12 * RADIUS


@quickly
@given(federations(fewer_than_half), st.floats(1, 4))
def test_who_passes_the_norm_check_is_at_most_so_many_times_as_large_as_an_honest_client(
    case, factor
):
    values, honest, _ = case
    largest = np.sqrt(squared_deviations(torch.from_numpy(honest)[:, None]).max())
    sizes = np.sqrt(squared_deviations(values)[:, 0])
    kept = kept_within(squared_deviations(values), factor=factor)
    assert (sizes[kept] <= factor * largest + ROUNDING).all()
    told = norm_checked_mean(values, factor=factor)
    assert np.sqrt(squared_deviations(told[None])[0, 0]) <= factor * largest + ROUNDING


@quickly
@given(federations(fewer_than_half), st.floats(1, 4))
def test_the_outlier_check_keeps_the_mean_near_the_honest(case, factor):
    # The median is within the honest range; the median client is no farther from it than some
    # honest client is, and nobody who is kept is farther than so many times that.
    values, honest, _ = case
    spread = np.linalg.norm(honest.max(0) - honest.min(0)) if len(honest) > 1 else 0.0
    told = outlier_checked_mean(values, factor=factor)[0].numpy()
    median = coordinate_median(values)[0].numpy()
    assert np.linalg.norm(told - median) <= factor * spread + ROUNDING


ALL_RULES = {
    **RULES,
    "norm check": partial(norm_checked_mean, factor=1.2),
    "outlier check": partial(outlier_checked_mean, factor=1.2),
}


@pytest.mark.parametrize("rule", ALL_RULES.values(), ids=ALL_RULES.keys())
@quickly
@given(values=st.integers(0, 10**6), order=st.permutations(range(7)))
def test_the_order_of_clients_makes_no_difference(rule, values, order):
    said = soft(7, rows=3, seed=values).double()
    assert np.allclose(rule(said), rule(said[list(order)]), atol=1e-9)


@quickly
@given(federations(fewer_than_half), st.floats(0.1, 20))
def test_trust_falls_most_for_whoever_is_farthest(case, rate):
    values, _, _ = case
    target = coordinate_median(values, scale="probabilities")
    trust = np.full(len(values), 1 / len(values))
    after = less_trusted(trust, values, target, rate=rate)
    away = np.linalg.norm((values[:, 0] - target[0]).numpy(), axis=-1)
    assert after.sum() == pytest.approx(1)
    ratio = np.log(after / after.max())
    assert np.allclose(ratio, -rate * (away - away.min()), atol=1e-6)
