"""Lower bounds on epsilon: known values, and that true promises are hardly ever contradicted."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.special import expit

from fedkd.privacy import noise_for_gaussian
from fedkd.privacy.attacks.audit import (
    Guesses,
    audit_bound,
    best_guesses,
    epsilon_from_rates,
    most_provable,
    smallest_sufficient,
)


@pytest.mark.parametrize(
    ("guesses", "right", "bound"),
    [
        (1000, 600, 0.29746792),
        (100, 90, 1.63082319),
        (200, 200, 4.19362999),
        (500, 420, 1.45355756),
        (1000, 510, 0),
        (7, 0, 0),
    ],
)
def test_known_bounds_for_delta_0(guesses, right, bound):
    found = audit_bound(guesses, right, canaries=guesses)
    assert found == pytest.approx(bound, abs=1e-8)
    assert audit_bound(guesses, right, canaries=10 * guesses) == found


def test_the_example_of_the_paper():
    # Steinke et al. 2023, appendix D: 75 right of 100 guesses, 1000 canaries, delta 1e-4.
    assert audit_bound(100, 75, canaries=1000, delta=1e-4) == pytest.approx(0.673, abs=5e-4)


@pytest.mark.parametrize(("guesses", "right", "delta"), [(60, 50, 1e-3), (200, 200, 1e-4)])
def test_the_bound_is_where_its_chance_is_what_is_left_of_confidence(guesses, right, delta):
    canaries, q = 300, expit(audit_bound(guesses, right, canaries=300, delta=delta))
    at_least = stats.binom.sf(right - 1, guesses, q)
    correction = max(
        sum(stats.binom.pmf(right - j, guesses, q) for j in range(1, i + 1)) / i
        for i in range(1, right + 1)
    )
    assert at_least + 2 * canaries * delta * correction == pytest.approx(0.05, abs=1e-8)
    assert at_least < 0.045


@given(st.integers(2, 60), st.data())
def test_more_evidence_never_proves_less(guesses, data):
    right = data.draw(st.integers(0, guesses - 1))
    delta = data.draw(st.sampled_from([0, 1e-5, 1e-3]))
    found = audit_bound(guesses, right, canaries=100, delta=delta)
    assert found <= audit_bound(guesses, right + 1, canaries=100, delta=delta) + 1e-8
    assert found <= audit_bound(guesses, right, canaries=100) + 1e-8
    assert found >= audit_bound(guesses, right, canaries=100, delta=delta, confidence=0.99)
    assert found >= audit_bound(guesses, right, canaries=200, delta=delta)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"right": 11}, "right <= guesses"),
        ({"canaries": 9}, "guesses <= canaries"),
        ({"delta": 1}, "delta must be in"),
        ({"confidence": 0}, "confidence must be in"),
    ],
)
def test_what_is_no_audit_is_refused(changed, named):
    usual = {"guesses": 10, "right": 5, "canaries": 20}
    with pytest.raises(ValueError, match=named):
        audit_bound(**(usual | changed))


def test_guesses_by_hand():
    # Highest 5, 4, 3 are said to be in, lowest 0, 1, 2 to be out; 3 is not in, 1 is.
    inside = np.array([False, True, False, False, True, True])
    found = best_guesses(np.arange(6.0), inside, shares=[1.0])
    assert found == Guesses(6, 4, audit_bound(6, 4, canaries=6))
    found = best_guesses(np.arange(6.0), inside, shares=[0.4])
    assert (found.guesses, found.right) == (2, 2)


def test_canaries_that_are_left_open_count_for_delta():
    inside = np.arange(400) >= 200
    found = best_guesses(inside + 0.0, inside, delta=1e-4, shares=[0.5])
    assert found == Guesses(200, 200, audit_bound(200, 200, canaries=400, delta=1e-4))


def test_choosing_among_shares_costs_confidence():
    inside = np.arange(400) >= 200
    scores = inside + 0.0
    found = best_guesses(scores, inside, delta=1e-5)
    wanted = audit_bound(400, 400, canaries=400, delta=1e-5, confidence=1 - 0.05 / 4)
    assert found == Guesses(400, 400, wanted)
    # Where the middle is a coin's toss, fewer guesses prove more.
    unsure = inside ^ (np.abs(np.arange(400) - 199.5) < 100) & (np.arange(400) % 2 == 0)
    assert best_guesses(np.arange(400.0), unsure).guesses == 200


def test_without_signal_hardly_anything_is_proven():
    rng = np.random.default_rng(4)
    proven = [
        best_guesses(rng.normal(size=300), rng.random(300) < 0.5).epsilon > 0 for _ in range(200)
    ]
    assert np.mean(proven) <= 0.05


def test_randomised_response_is_bounded_by_what_it_promises_and_nearly_so():
    """Each bit told truly with sigmoid(2): the mechanism for which the theorem is tight."""
    rng, bounds = np.random.default_rng(6), []
    for _ in range(200):
        inside = rng.random(500) < 0.5
        told = inside ^ (rng.random(500) > expit(2.0))
        bounds.append(best_guesses(told + rng.random(500) / 2, inside).epsilon)
    assert np.mean(np.array(bounds) > 2) <= 0.05
    assert np.median(bounds) > 1.5


def test_scores_need_to_be_numbers_of_two_canaries():
    with pytest.raises(ValueError, match="NaN for 1 rows"):
        best_guesses(np.array([0, np.nan]), np.array([True, False]))
    with pytest.raises(ValueError, match="canaries must be >= 2"):
        best_guesses(np.zeros(1), np.array([True]))
    with pytest.raises(ValueError, match="shares must be in"):
        best_guesses(np.zeros(2), np.array([True, False]), shares=[0.5, 1.5])


def test_what_can_be_proven_at_all():
    assert most_provable(1000) == pytest.approx(5.42805, abs=1e-5)
    # (e^eps / (1 + e^eps))^1000 = 0.05 / 4
    assert 1000 * math.log1p(math.exp(-most_provable(1000))) == pytest.approx(math.log(80))
    assert 4 < most_provable(1000, delta=1e-5) < most_provable(1000)
    assert most_provable(1000, delta=1e-5) < 8
    # With a delta as large as one over the rows, few guesses are the better evidence.
    assert most_provable(1000, delta=1e-3) < 3


@pytest.mark.parametrize(("claim", "needed"), [(1, 10), (4, 166), (8, 8932)])
def test_how_many_perfect_guesses_contradict_a_claim(claim, needed):
    assert smallest_sufficient(claim) == needed
    assert audit_bound(needed, needed, canaries=needed) >= claim - 1e-8
    assert audit_bound(needed - 1, needed - 1, canaries=needed) < claim


def test_a_claim_is_a_number():
    with pytest.raises(ValueError, match="claim must be in"):
        smallest_sufficient(0)


# -- many releases -----------------------------------------------------------------------------


def test_epsilon_from_rates_by_hand():
    # No errors in 1000 of each: both rates may be 1 - 0.025^(1 / 1000).
    rate = 1 - 0.025 ** (1 / 1000)
    found = epsilon_from_rates(
        false_positives=0, without=1000, false_negatives=0, with_it=1000, delta=0.01
    )
    assert found == pytest.approx(math.log((1 - 0.01 - rate) / rate))
    usual = {"without": 1000, "with_it": 1000}
    one = epsilon_from_rates(false_positives=0, false_negatives=500, **usual)
    other = epsilon_from_rates(false_positives=500, false_negatives=0, **usual)
    assert one == other > 4
    assert epsilon_from_rates(false_positives=500, false_negatives=500, **usual) == 0
    with pytest.raises(ValueError, match="delta must be in"):
        epsilon_from_rates(false_positives=0, false_negatives=0, delta=-1, **usual)


@pytest.mark.parametrize("claim", [1.0, 4.0])
def test_gaussian_noise_that_is_enough_is_not_contradicted_and_a_quarter_is(claim):
    rng, delta, releases = np.random.default_rng(8), 1e-5, 400_000
    enough = noise_for_gaussian(claim, delta)

    def bound(noise):
        # Sensitivity 1; a threshold far out, where an epsilon shows most.
        threshold = 0.5 + 2 * noise
        return epsilon_from_rates(
            false_positives=int((rng.normal(0, noise, releases) > threshold).sum()),
            without=releases,
            false_negatives=int((rng.normal(1, noise, releases) <= threshold).sum()),
            with_it=releases,
            delta=delta,
        )

    assert 0.3 * claim < bound(enough) < claim
    assert bound(enough / 4) > claim
