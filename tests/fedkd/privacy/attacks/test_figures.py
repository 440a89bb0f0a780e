"""ROC, its area and rates: by hand, against scikit-learn, and with intervals that hold."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

from fedkd.privacy.attacks.figures import (
    Interval,
    auc,
    balanced_advantage,
    clopper_pearson,
    rate_at,
    roc,
)

# Members score 4, 3, 1 and others 3, 2, 0, 0: of 12 pairs 9 are right and one is a tie.
SCORES = np.array([4.0, 3.0, 1.0, 3.0, 2.0, 0.0, 0.0])
MEMBERS = np.array([True] * 3 + [False] * 4)


@st.composite
def samples(draw):
    """Scores with many ties, and at least two rows of each kind."""
    kinds = draw(st.lists(st.booleans(), min_size=4, max_size=40))
    members = np.array([True, False, True, False, *kinds])
    levels = st.integers(-4, 4)
    scores = draw(st.lists(levels, min_size=len(members), max_size=len(members)))
    return np.array(scores, dtype=np.float64), members


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    [
        (0, 1000, 0, 0.00368208),
        (1, 1000, 0.00002532, 0.00555892),
        (12, 1000, 0.00621553, 0.02086768),
        (50, 1000, 0.03733540, 0.06539049),
        (999, 1000, 0.99444108, 0.99997468),
        (1000, 1000, 1 - 0.00368208, 1),
    ],
)
def test_clopper_pearson_gives_known_intervals(hits, trials, low, high):
    assert clopper_pearson(hits, trials) == pytest.approx((low, high), abs=5e-9)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
def test_clopper_pearson_agrees_with_scipy(confidence):
    found = clopper_pearson(7, 31, confidence)
    ends = stats.binomtest(7, 31).proportion_ci(confidence, method="exact")
    assert found == pytest.approx((ends.low, ends.high), abs=1e-12)


@pytest.mark.parametrize(
    ("hits", "trials", "confidence", "named"),
    [(0, 0, 0.95, "trials"), (3, 2, 0.95, "hits"), (-1, 2, 0.95, "hits"), (1, 2, 1, "confidence")],
)
def test_what_is_no_share_is_refused(hits, trials, confidence, named):
    with pytest.raises(ValueError, match=named):
        clopper_pearson(hits, trials, confidence)


def test_a_curve_by_hand():
    curve = roc(SCORES, MEMBERS)
    # Thresholds 4, 3 (a tie: both rates rise at once), 2, 1, 0 (two others at once).
    assert curve.true_positive_rates == pytest.approx([0, 1 / 3, 2 / 3, 2 / 3, 1, 1])
    assert curve.false_positive_rates == pytest.approx([0, 0, 1 / 4, 1 / 2, 1 / 2, 1])
    # tpr - fpr: 0, 1/3, 5/12, 1/6, 1/2, 0
    assert balanced_advantage(SCORES, MEMBERS) == pytest.approx(1 / 2)


@given(samples())
def test_a_curve_is_that_of_scikit_learn(sample):
    scores, members = sample
    curve = roc(scores, members)
    false, true, _ = roc_curve(members, scores, drop_intermediate=False)
    assert curve.false_positive_rates == pytest.approx(false, abs=1e-12)
    assert curve.true_positive_rates == pytest.approx(true, abs=1e-12)


@given(samples())
def test_the_area_is_the_share_of_pairs_that_are_right(sample):
    scores, members = sample
    pairs = scores[members][:, None] - scores[~members]
    found = auc(scores, members)
    assert found.value == pytest.approx(((pairs > 0) + (pairs == 0) / 2).mean(), abs=1e-12)
    assert found.value == pytest.approx(roc_auc_score(members, scores), abs=1e-12)
    curve = roc(scores, members)
    under = np.trapezoid(curve.true_positive_rates, curve.false_positive_rates)
    assert found.value == pytest.approx(under, abs=1e-12)
    assert 0 <= found.low <= found.value + 1e-12
    assert found.value - 1e-12 <= found.high <= 1


@given(samples(), st.randoms(use_true_random=False))
def test_neither_order_nor_scale_of_scores_matters(sample, random):
    scores, members = sample
    order = random.sample(range(len(scores)), len(scores))
    stretched = np.exp(scores[order] / 2)
    found, again = auc(scores, members), auc(stretched, members[order])
    assert (found.low, found.high) == pytest.approx((again.low, again.high), abs=1e-12)
    assert rate_at(scores, members, 0.3, 0) == rate_at(stretched, members[order], 0.3, 0)


@given(samples())
def test_scores_turned_round_turn_the_area_round(sample):
    scores, members = sample
    found, turned = auc(scores, members), auc(-scores, members)
    assert (found.value, found.low, found.high) == pytest.approx(
        (1 - turned.value, 1 - turned.high, 1 - turned.low), abs=1e-9
    )


def test_delong_by_hand():
    # Of the members 4, 3, 1: above 4/4, 3.5/4, 2/4 of the others. Of the others 3, 2, 0, 0:
    # below 1.5/3, 2/3, 3/3, 3/3 of the members. Variances 0.0677083 and 0.0625.
    above, below = np.array([1, 0.875, 0.5]), np.array([1.5, 2, 3, 3]) / 3
    variance = above.var(ddof=1) / 3 + below.var(ddof=1) / 4
    assert variance == pytest.approx(0.0677083 / 3 + 0.0625 / 4, rel=1e-4)
    found = auc(SCORES, MEMBERS, confidence=0.5)
    assert found.value == pytest.approx(9.5 / 12)
    half = stats.norm.ppf(0.75) * math.sqrt(variance)
    assert found.high - found.value == pytest.approx(half, abs=1e-12)
    assert found.value - found.low == pytest.approx(half, abs=1e-12)


def test_the_area_of_two_normals():
    rng = np.random.default_rng(3)
    scores = np.concatenate([rng.normal(1, 1, 100_000), rng.normal(0, 1, 100_000)])
    members = np.arange(200_000) < 100_000
    wanted = stats.norm.cdf(1 / math.sqrt(2))
    found = auc(scores, members)
    assert found.value == pytest.approx(wanted, abs=0.003)
    assert found.low < wanted < found.high
    assert found.high - found.low < 0.006


def test_the_interval_holds_the_area_as_often_as_it_says():
    rng = np.random.default_rng(5)
    wanted = stats.norm.cdf(1 / math.sqrt(2))
    members = np.arange(140) < 60
    held = 0
    for _ in range(600):
        found = auc(rng.normal(members.astype(float)), members)
        held += found.low <= wanted <= found.high
    assert 0.92 < held / 600 < 0.975


@pytest.mark.parametrize(("sign", "value"), [(1.0, 1.0), (-1.0, 0.0), (0.0, 0.5)])
def test_a_sample_without_variance_still_proves_only_what_its_pairs_do(sign, value):
    members = np.arange(50) < 20
    found = auc(sign * members, members)
    low, high = found.low, found.high
    assert found.value == value
    if value == 0.5:
        assert low < 0.3
        assert high > 0.7
    else:
        # 20 independent pairs that are all alike: 0.025^(1 / 20).
        assert max(low, 1 - high) == pytest.approx(0.025 ** (1 / 20))
        assert min(low, 1 - high) == 0


def test_one_row_of_a_kind_says_next_to_nothing():
    found = auc(np.array([1.0, 0.0, 0.5, 2.0]), np.array([True, False, False, False]))
    assert found.value == pytest.approx(2 / 3)
    assert found.low < 0.1
    assert found.high > 0.97


def test_the_rate_at_a_threshold_by_hand():
    scores = np.array([9.0, 7.0, 5.0, 5.0, 1.0, 8.0, 5.0, 4.0, 3.0, 2.0])
    members = np.arange(10) < 5
    for rate, hits in [(0.0, 1), (0.19, 1), (0.2, 2), (0.4, 4), (1.0, 5)]:
        found = rate_at(scores, members, rate, least_expected=0)
        assert found == Interval(hits / 5, *clopper_pearson(hits, 5)), rate


@given(samples(), st.floats(0, 1))
def test_no_more_non_members_pass_than_may(sample, rate):
    scores, members = sample
    found = rate_at(scores, members, rate, least_expected=0)
    curve = roc(scores, members)
    allowed = curve.false_positive_rates <= rate + 1e-9
    assert found is not None
    assert found.value == pytest.approx(curve.true_positive_rates[allowed].max())


def test_a_share_of_non_members_is_not_lost_to_rounding():
    scores, members = np.append(np.arange(100.0), 70.5), np.arange(101) == 100
    # 0.29 * 100 is 28.999999999999996 in floating point.
    assert rate_at(scores, members, 0.29, 0).value == 1
    assert rate_at(scores, members, 0.28, 0).value == 0


@pytest.mark.parametrize(("others", "printed"), [(999, False), (1000, True)])
def test_a_point_without_enough_non_members_is_not_printed(others, printed):
    scores, members = np.arange(others + 5.0), np.arange(others + 5) < 5
    assert (rate_at(scores, members, 0.01) is not None) == printed


@pytest.mark.parametrize("figure", [roc, auc, balanced_advantage])
def test_what_has_no_figure_is_refused(figure):
    with pytest.raises(ValueError, match="members and others, got 3 members of 3"):
        figure(np.zeros(3), np.ones(3, dtype=bool))
    with pytest.raises(ValueError, match="NaN for 1 rows"):
        figure(np.array([0.0, np.nan]), np.array([True, False]))


def test_a_rate_is_a_share():
    with pytest.raises(ValueError, match="false_positive_rate must be in"):
        rate_at(SCORES, MEMBERS, 1.5)
