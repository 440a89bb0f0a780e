"""Epsilon of events: against closed forms, two libraries and published traps."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkd.privacy import (
    Gaussian,
    Laplace,
    RandomizedResponse,
    SampledGaussian,
    spent,
)
from fedkd.privacy.accounting import gaussian_delta, gaussian_epsilon, merged

SLOW = pytest.mark.slow

# sigma, T, delta: exact, and by Renyi divergences (dp-accounting 0.6.0 and Opacus 1.6.0 alike).
GAUSSIAN = [
    (1, 1, 1e-5, 4.3771780957, 4.728507),
    (2, 1, 1e-5, 1.9930914044, 2.165716),
    (0.5, 1, 1e-5, 9.9972561464, 10.725510),
    (4, 10, 1e-5, 3.3414094692, 3.617100),
    (10, 50, 1e-5, 2.9432252398, 3.188992),
    (20, 100, 1e-5, 1.9930914044, 2.165716),
    (50, 1000, 1e-5, 2.5943833805, 2.813653),
    (1.5, 5, 1e-6, 7.7498568478, 8.257599),
    (3, 3, 1e-4, 2.0030590072, 2.213799),
    (100, 200, 1e-5, 0.4969753639, 0.545813),
    (0.8, 2, 1e-5, 8.5958657905, 9.234959),
    (30, 10, 1e-6, 0.4198552893, 0.454741),
]


@pytest.mark.parametrize(("noise", "count", "delta", "exact", "renyi"), GAUSSIAN)
def test_gaussian_releases(noise, count, delta, exact, renyi):
    found = spent([Gaussian(count, noise)], delta=delta)
    assert found.epsilon == pytest.approx(exact, abs=1e-9)
    assert found.renyi == pytest.approx(renyi, abs=1e-6)
    assert found.pure == math.inf


# sigma, q, steps, delta: by loss distributions (dp-accounting), by Renyi divergences (Opacus).
SAMPLED = [
    (1.0, 0.01, 1000, 1e-5, 1.82824365, 2.10136527),
    (1.1, 0.01, 1000, 1e-5, 1.51537025, 1.71177009),
    (0.8, 0.05, 500, 1e-5, 12.03524795, 13.33528771),
    (1.0, 0.1, 100, 1e-5, 7.04660288, 7.89925500),
    (0.7, 0.02, 300, 1e-5, 5.43513317, 6.38537981),
    (2.0, 0.25, 200, 1e-5, 9.55677708, 10.35241226),
    (1.3, 0.0042666667, 14062, 1e-5, 1.82365483, 1.98899294),
    (4.0, 0.5, 100, 1e-5, 5.86872058, 6.35017954),
    (0.6, 0.01, 100, 1e-5, 3.81559922, 4.83086619),
    (1.0, 0.25, 1200, 1e-3, 80.79856434, 86.78478598),
    (1.5, 0.04, 2500, 1e-6, 8.00062947, 8.56632031),
    (3.0, 0.1, 1000, 1e-5, 4.88373284, 5.28825431),
]


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta", "by_loss", "renyi"),
    [SAMPLED[3], *(pytest.param(*cell, marks=SLOW) for cell in SAMPLED[:3] + SAMPLED[4:])],
)
def test_steps_of_dp_sgd(noise, rate, steps, delta, by_loss, renyi):
    found = spent([SampledGaussian(steps, noise, rate)], delta=delta)
    assert found.epsilon == pytest.approx(by_loss, abs=1e-6)
    assert found.renyi == pytest.approx(renyi, rel=2e-4)
    assert found.epsilon <= found.renyi


def test_a_step_that_draws_every_row_is_a_gaussian_release():
    assert merged([SampledGaussian(10, 2.0, 1.0)]) == merged([Gaussian(10, 2.0)])
    for order in (1.5, 2, 8):
        renyi = SampledGaussian(10, 2.0, 1.0).renyi(order)
        assert renyi == pytest.approx(10 * order / 8)
        assert SampledGaussian(10, 2.0, 1 - 1e-9).renyi(order) == pytest.approx(renyi, rel=1e-6)


@pytest.mark.parametrize(
    ("scale", "count", "delta", "pure", "by_loss", "renyi"),
    [
        (1, 1, 1e-5, 1, 0.99998000, 1.00282432),
        (2, 10, 1e-5, 5, 4.98996232, 4.99033448),
        (10, 50, 1e-5, 5, 2.79660110, 2.99766357),
        (0.5, 1, 1e-6, 2, 1.99999800, 2.00507514),
        (20, 200, 1e-5, 10, 2.89336591, 3.12649839),
        (5, 100, 1e-6, 20, 10.27648112, 10.85086828),
    ],
)
def test_laplace_releases(scale, count, delta, pure, by_loss, renyi):
    found = spent([Laplace(count, scale)], delta=delta)
    assert found.pure == pytest.approx(pure)
    assert found.epsilon == pytest.approx(by_loss, abs=1e-6)
    # Renyi's bound alone may be above the sum of all.
    assert found.renyi <= min(renyi, pure) + 1e-6
    assert found.renyi >= found.epsilon


def test_renyi_divergences_of_laplace_by_hand():
    found = [Laplace(1, scale).renyi(order) for order, scale in ((2, 1), (8, 2), (32, 10))]
    assert found == pytest.approx([0.6191236300, 0.4102678818, 0.0782057586], abs=1e-10)


@pytest.mark.parametrize(
    ("epsilon", "classes", "keep", "other"),
    [
        (1, 10, 0.2319693167, 0.0853367426),
        (2, 10, 0.4508530604, 0.0610163266),
        (4, 10, 0.8584864498, 0.0157237278),
        (8, 10, 0.9969899243, 0.0003344529),
        (1, 100, 0.0267236310, 0.0098310744),
        (3, 2, 0.9525741268, 0.0474258732),
    ],
)
def test_chances_of_randomised_response(epsilon, classes, keep, other):
    event = RandomizedResponse(1, epsilon, classes)
    assert (event.keep, event.other) == pytest.approx((keep, other), abs=1e-9)
    assert math.log(event.keep / event.other) == pytest.approx(epsilon)


@pytest.mark.parametrize(
    ("epsilon", "count", "exact"),
    [
        (0.5, 1, 0.49993541),
        (0.5, 2, 0.99958276),
        (0.5, 5, 2.38077035),
        (0.5, 20, 4.99270002),
        (1, 50, 22.99716994),
    ],
)
def test_every_use_of_randomised_response_is_counted(epsilon, count, exact):
    """Fault of a library: 20 uses of 0.5 are reported as one, 0.49994."""
    found = spent([RandomizedResponse(count, epsilon, 10)], delta=1e-5)
    assert found.epsilon == pytest.approx(exact, abs=1e-8)
    one_by_one = spent([RandomizedResponse(1, epsilon, 10)] * count, delta=1e-5)
    assert one_by_one == found
    assert found.renyi >= found.epsilon
    # The distribution that other events are composed with is at most a bin above that.
    mixed = spent([RandomizedResponse(count, epsilon, 10), Gaussian(1, 1e5)], delta=1e-5)
    assert exact - 1e-6 <= mixed.epsilon <= exact + 3e-4


def test_mixed_events_cost_more_than_each_and_less_than_their_sum():
    parts = [RandomizedResponse(5, 0.5, 10), Gaussian(3, 4.0), Laplace(4, 3.0)]
    whole = spent(parts, delta=1e-5).epsilon
    each = [spent([part], delta=1e-5).epsilon for part in parts]
    assert max(each) < whole < sum(each)
    assert whole <= spent(parts, delta=1e-5).renyi


def test_confident_votes_charge_their_threshold_for_every_query():
    # s1 150, s2 40, 500 asked and 200 answered: mu^2 = 500 / s1^2 + 2 * 200 / s2^2.
    asked, answered = Gaussian(500, 150), Gaussian(200, 40 / math.sqrt(2))
    assert spent([asked, answered], delta=1e-5).epsilon == pytest.approx(2.09022467, abs=1e-8)
    wrong = spent([Gaussian(200, 150), answered], delta=1e-5).epsilon
    assert wrong == pytest.approx(2.032365, abs=1e-6)


def test_replies_that_were_lost_without_rescaling_the_noise_cost_epsilon():
    # Noise for the mean of K, of which K / 2 came: half of the multiplier.
    whole, half = (spent([Gaussian(1, z)], delta=1e-5).epsilon for z in (0.60083276, 0.30041638))
    assert (whole, half) == pytest.approx((7.99028836, 19.095961), abs=1e-6)


def test_nothing_costs_nothing():
    assert spent([], delta=1e-5) == (0, 0, 0)


@pytest.mark.parametrize("delta", [0, 1, -1e-5, math.nan])
def test_a_delta_out_of_range_is_refused(delta):
    with pytest.raises(ValueError, match="delta must be in"):
        spent([Gaussian(1, 1.0)], delta=delta)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Gaussian(0, 1.0),
        lambda: Gaussian(1, 0.0),
        lambda: SampledGaussian(1, 1.0, 0.0),
        lambda: SampledGaussian(1, 1.0, 1.1),
        lambda: Laplace(1, math.inf),
        lambda: RandomizedResponse(1, 1.0, 1),
        lambda: RandomizedResponse(1, -1.0, 3),
    ],
)
def test_events_out_of_range_are_refused(build):
    with pytest.raises(ValueError, match="must be"):
        build()


@given(st.floats(0.05, 20), st.floats(1e-9, 0.1))
def test_epsilon_and_delta_of_a_gaussian_belong_together(mu, delta):
    epsilon = gaussian_epsilon(mu, delta=delta)
    assert gaussian_delta(mu, epsilon) <= delta * (1 + 1e-6)
    if epsilon:
        assert gaussian_delta(mu, epsilon) == pytest.approx(delta, rel=1e-6)


def test_delta_of_a_gaussian_is_that_of_its_losses():
    # By simulation: the loss is N(mu^2 / 2, mu^2), and delta = E[(1 - e^(eps - L))+].
    mu, epsilon = 1.3, 1.1
    losses = np.random.default_rng(0).normal(mu**2 / 2, mu, 10**6)
    sampled = np.maximum(-np.expm1(epsilon - losses), 0).mean()
    assert gaussian_delta(mu, epsilon) == pytest.approx(sampled, abs=2e-3)


@given(st.integers(1, 40), st.integers(1, 40))
def test_it_does_not_matter_how_releases_are_counted(first, second):
    parts = spent([Gaussian(first, 3.0), Gaussian(second, 3.0)], delta=1e-5)
    whole = spent([Gaussian(first + second, 3.0)], delta=1e-5)
    assert parts.epsilon == pytest.approx(whole.epsilon, rel=1e-9)
