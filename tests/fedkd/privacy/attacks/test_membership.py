"""Membership scores: in closed form, by brute force, and that they find members."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats
from scipy.special import expit
from sklearn.metrics import log_loss

from fedkd.privacy.attacks.figures import auc, rate_at
from fedkd.privacy.attacks.membership import (
    confidence_logit,
    lira_scores,
    loss_scores,
    rmia_scores,
)


def test_confidence_and_loss_by_hand():
    # Probabilities 1/2, 1/4, 1/4: the odds of the classes are 1, 1/3 and 1/3.
    logits = np.log([[2.0, 1.0, 1.0], [2.0, 1.0, 1.0]])
    labels = np.array([0, 2])
    assert confidence_logit(logits, labels) == pytest.approx([0, -math.log(3)])
    assert loss_scores(logits, labels) == pytest.approx([-math.log(2), -math.log(4)])


@given(arrays.arrays(np.float64, (2, 3, 4), elements=st.floats(-8, 8)), st.floats(-100, 100))
def test_scores_of_ordinary_logits(logits, shift):
    labels = np.array([0, 3, 1])
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    at = p[:, [0, 1, 2], labels]
    assert confidence_logit(logits, labels) == pytest.approx(np.log(at / (1 - at)), abs=1e-9)
    assert confidence_logit(logits + shift, labels) == pytest.approx(
        confidence_logit(logits, labels), abs=1e-9
    )
    for one, scores in zip(p, loss_scores(logits, labels), strict=True):
        assert -scores.mean() == pytest.approx(log_loss(labels, one, labels=range(4)), abs=1e-9)


def test_a_probability_that_rounds_to_one_keeps_its_digits():
    logits = np.array([[60.0, 0.0], [90.0, 0.0], [0.0, 80.0]], dtype=np.float32)
    assert confidence_logit(logits, np.zeros(3, int)) == pytest.approx([60, 90, -80])


def test_a_class_of_probability_zero_has_a_finite_score():
    with np.errstate(divide="ignore"):
        logits = np.log(np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    assert confidence_logit(logits, np.array([0, 1])) == pytest.approx(
        [700 - math.log(2), -700], abs=1e-9
    )
    assert loss_scores(logits, np.array([0, 1])) == pytest.approx([0, -700])


@pytest.mark.parametrize("score", [confidence_logit, loss_scores])
@pytest.mark.parametrize(
    ("logits", "label", "named"),
    [
        ([[math.nan, 0.0]], 0, "numbers"),
        ([[math.inf, 0.0]], 0, "numbers"),
        ([[-math.inf, -math.inf]], 0, "numbers"),
        ([[0.0]], 0, "2 classes"),
        ([[0.0, 1.0]], 2, "labels must lie in"),
    ],
)
def test_what_has_no_score_is_refused(score, logits, label, named):
    with pytest.raises(ValueError, match=named):
        score(np.array(logits), np.array([label]))


# -- LiRA --------------------------------------------------------------------------------------


def known_normals(mean_in, mean_out, spread_in, spread_out):
    """Return shadows whose scores have just these means and unbiased deviations, of 4 rows."""
    unit = np.array([-1.0, 0.0, 1.0])[:, None] * np.ones(4)  # mean 0, deviation 1
    shadows = np.concatenate([mean_in + spread_in * unit, mean_out + spread_out * unit])
    inside = np.arange(6)[:, None] < 3 * np.ones(4)
    return shadows, inside


def test_the_ratio_of_two_known_normals():
    target = np.array([-1.0, 0.0, 2.0, 5.0])
    shadows, inside = known_normals(3.0, 1.0, 2.0, 0.5)
    wanted = stats.norm(3, 2).logpdf(target) - stats.norm(1, 0.5).logpdf(target)
    for fixed in (True, False, None):
        found = lira_scores(target, shadows, inside, online=True, fixed_variance=fixed)
        assert found == pytest.approx(wanted, abs=1e-12)
        found = lira_scores(target, shadows, inside, online=False, fixed_variance=fixed)
        assert found == pytest.approx(stats.norm(1, 0.5).logcdf(target), abs=1e-12)


def test_of_equal_variances_the_ratio_is_linear():
    # With s_in = s_out = s: (mu_in - mu_out)(t - (mu_in + mu_out) / 2) / s^2.
    target = np.array([0.0, 1.0, 2.0, 9.0])
    shadows, inside = known_normals(3.0, 1.0, 2.0, 2.0)
    found = lira_scores(target, shadows, inside, online=True)
    assert found == pytest.approx((target - 2) / 2)


def test_a_variance_of_all_rows_is_pooled_and_one_of_a_row_is_its_own():
    # Rows 0 and 1, outside of 3 and 2 shadows: squared deviations 2 * 1 and 2 * 4, of 2 + 1 free.
    shadows = np.array([[-1.0, 5.0], [0.0, 1.0], [1.0, 1.0], [0.0, 5.0], [0.0, 9.0]])
    inside = np.array([[0, 0], [0, 1], [0, 1], [1, 1], [1, 0]], dtype=bool)
    target = np.array([1.0, 1.0])
    pooled = math.sqrt((2 + 8) / 3)
    for fixed, deviations in [(True, [pooled] * 2), (None, [pooled] * 2), (False, [1, 8**0.5])]:
        found = lira_scores(target, shadows, inside, online=False, fixed_variance=fixed)
        wanted = stats.norm([0, 7], deviations).logcdf(target)
        assert found == pytest.approx(wanted, abs=1e-12), fixed


def test_from_32_shadows_on_rows_have_variances_of_their_own_all_or_none():
    rng = np.random.default_rng(1)
    shadows = rng.normal(0, [1.0, 3.0], (40, 2))
    target = np.array([2.0, 2.0])

    def scores(outside, fixed):
        inside = np.zeros((40, 2), dtype=bool)
        inside[outside:, 0] = True
        return lira_scores(target, shadows, inside, online=False, fixed_variance=fixed)

    assert scores(32, None)[0] == scores(32, False)[0]
    assert scores(31, None)[0] == scores(31, True)[0]
    # Else a row would be told by the number of its shadows.
    assert scores(31, None)[1] == scores(31, True)[1] != scores(31, False)[1]
    assert scores(31, True)[0] != scores(31, False)[0]


def test_where_all_shadows_agree_the_deviation_has_a_floor():
    shadows, inside = known_normals(1.0, 0.0, 0.0, 0.0)
    found = lira_scores(np.full(4, 0.001), shadows, inside, online=False)
    assert found == pytest.approx(stats.norm.logcdf(1.0))
    # Online: (0.001^2 - 0.999^2) / (2 * 0.001^2).
    found = lira_scores(np.full(4, 0.001), shadows, inside, online=True)
    assert found == pytest.approx((1 - 999**2) / 2)


@pytest.mark.parametrize(
    ("inside", "online", "message"),
    [
        ([1, 1, 0, 0], True, None),
        ([1, 0, 0, 0], False, None),
        ([1, 0, 0, 0], True, "inside of at least 2 shadows, row 0 is so of 1 of 4.*or attack off"),
        ([1, 1, 1, 0], True, "outside of at least 2 shadows, row 0 is so of 1 of 4"),
        ([1, 1, 1, 0], False, "outside of at least 2 shadows.*each row in half of them$"),
    ],
)
def test_too_few_shadows_are_refused(inside, online, message):
    shadows, seen = np.arange(4.0)[:, None], np.array(inside, dtype=bool)[:, None]
    if message is None:
        assert np.isfinite(lira_scores(np.ones(1), shadows, seen, online=online)).all()
    else:
        with pytest.raises(ValueError, match=message):
            lira_scores(np.ones(1), shadows, seen, online=online)


def test_one_row_with_too_few_shadows_is_named():
    inside = np.array([[True, True], [True, False], [False, False], [False, False]])
    with pytest.raises(ValueError, match="row 1 is so of 1 of 4"):
        lira_scores(np.ones(2), np.ones((4, 2)), inside, online=True)


def rows_of_unlike_difficulty(rng, shadow_count, rows=4000, effect=1.5):
    """Easy and hard rows: seeing one raises its score by 1.5, its difficulty is within 4."""
    difficulty = rng.normal(0, 4, rows)
    half = np.arange(shadow_count)[:, None] < np.full(rows, shadow_count // 2)
    inside = rng.permuted(half, axis=0)
    members = rng.random(rows) < 0.5
    shadows = difficulty + effect * inside + rng.normal(0, 0.7, inside.shape)
    target = difficulty + effect * members + rng.normal(0, 0.7, rows)
    return target, shadows, inside, members


def test_lira_beats_the_threshold_where_rows_differ_in_difficulty():
    target, shadows, inside, members = rows_of_unlike_difficulty(np.random.default_rng(7), 16)
    plain = rate_at(target, members, 0.01)
    online = rate_at(lira_scores(target, shadows, inside, online=True), members, 0.01)
    offline = rate_at(lira_scores(target, shadows, inside, online=False), members, 0.01)
    assert plain.high < 0.05
    assert online.low > 0.3
    assert offline.low > 0.3
    assert auc(target, members).high < 0.65
    # Knowing each row's mean leaves two normals 1.5 / 0.7 apart: Phi(1.5 / 0.7 / sqrt 2) = 0.935.
    assert auc(lira_scores(target, shadows, inside, online=True), members).value > 0.91


@given(st.integers(0, 10_000), st.booleans())
def test_neither_order_of_shadows_nor_scale_of_scores_matters(seed, online):
    rng = np.random.default_rng(seed)
    shadows, target = rng.normal(0, 1, (8, 5)), rng.normal(0, 1, 5)
    inside = rng.permuted(np.arange(8)[:, None] < np.full(5, 4), axis=0)
    found = lira_scores(target, shadows, inside, online=online)
    order = rng.permutation(8)
    again = lira_scores(3 * target + 1, 3 * shadows[order] + 1, inside[order], online=online)
    assert again == pytest.approx(found, abs=1e-9)


# -- RMIA --------------------------------------------------------------------------------------


def rmia_by_loops(target, shadows, inside, population, population_shadows, gamma, a):
    scores = []
    for x in range(len(target)):
        outside = [p[x] for p, saw in zip(shadows, inside, strict=True) if not saw[x]]
        within = [p[x] for p, saw in zip(shadows, inside, strict=True) if saw[x]]
        p_out = sum(outside) / len(outside)
        p_x = (
            (sum(within) / len(within) + p_out) / 2 if a is None else ((1 + a) * p_out + 1 - a) / 2
        )
        beaten = 0
        for z in range(len(population)):
            p_z = sum(p[z] for p in population_shadows) / len(population_shadows)
            p_z = p_z if a is None else ((1 + a) * p_z + 1 - a) / 2
            beaten += (target[x] / p_x) / (population[z] / p_z) >= gamma
        scores.append(beaten / len(population))
    return scores


@pytest.mark.parametrize("a", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_rmia_by_loops(a, gamma):
    rng = np.random.default_rng(11)
    target, population = rng.random(30), rng.random(25)
    shadows, population_shadows = rng.random((6, 30)), rng.random((6, 25))
    inside = rng.permuted(np.arange(6)[:, None] < np.full(30, 2), axis=0)
    given_to = target, shadows, inside, population, population_shadows
    wanted = rmia_by_loops(*given_to, gamma, a)
    assert rmia_scores(*given_to, gamma=gamma, offline_scale=a) == pytest.approx(wanted, abs=1e-12)
    assert 0.1 < np.mean(wanted) < 0.9


def test_rmia_by_hand_with_ties():
    # p(x): inside 1/2, outside 1/4, so 3/8; the ratio is (3/4) / (3/8) = 2.
    # p(z) = 1/2 for all: ratios 2, 1, 1/2 and 0; three are at most 2, one at most 1/2.
    shadows, inside = np.array([[0.5], [0.25]]), np.array([[True], [False]])
    population, its_shadows = np.array([1.0, 0.5, 0.25, 0.0]), np.full((2, 4), 0.5)
    rates = [
        rmia_scores(np.array([0.75]), shadows, inside, population, its_shadows, gamma=gamma)[0]
        for gamma in (1, 2, 4, 5)
    ]
    assert rates == [1, 0.75, 0.5, 0.25]


def test_rmia_finds_members():
    rng = np.random.default_rng(7)
    target, shadows, inside, members = rows_of_unlike_difficulty(rng, 8)
    population, its_shadows, _, _ = rows_of_unlike_difficulty(rng, 8, rows=500, effect=0)
    target, shadows, population, its_shadows = map(
        expit, (target, shadows, population, its_shadows)
    )
    for a in (None, 0.3):
        scores = rmia_scores(target, shadows, inside, population, its_shadows, offline_scale=a)
        assert auc(scores, members).low > auc(target, members).high


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"gamma": 0}, "gamma must be > 0"),
        ({"offline_scale": 1.5}, "offline_scale must be in"),
        ({"inside": np.ones((2, 1), dtype=bool)}, "outside of at least 1 shadows"),
        ({"inside": np.zeros((2, 1), dtype=bool)}, "inside of at least 1 shadows"),
        (
            {"population_target": np.zeros(0), "population_shadows": np.zeros((2, 0))},
            "nobody was trained on",
        ),
    ],
)
def test_what_rmia_cannot_use_is_refused(changed, named):
    usual = {
        "target_prob": np.ones(1),
        "shadow_probs": np.ones((2, 1)),
        "inside": np.array([[True], [False]]),
        "population_target": np.ones(3),
        "population_shadows": np.ones((2, 3)),
    }
    with pytest.raises(ValueError, match=named):
        rmia_scores(**(usual | changed))
