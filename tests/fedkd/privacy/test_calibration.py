"""Noise for a wanted epsilon: exact values, and that it buys what was wanted."""

import math

import pytest

from fedkd.privacy import (
    Gaussian,
    SampledGaussian,
    noise_for_gaussian,
    noise_for_sampled_gaussian,
    spent,
)


@pytest.mark.parametrize(
    ("epsilon", "delta", "count", "noise"),
    [
        (1, 1e-5, 1, 3.7306316348),
        (1, 1e-5, 10, 11.7972930771),
        (2, 1e-5, 10, 6.3049885554),
        (4, 1e-5, 50, 7.6449687536),
        (8, 1e-5, 50, 4.2442604722),
        (0.5, 1e-6, 100, 80.5761848073),
    ],
)
def test_gaussian_noise_is_exact(epsilon, delta, count, noise):
    found = noise_for_gaussian(epsilon, delta, count=count)
    assert found == pytest.approx(noise, abs=1e-9)
    assert spent([Gaussian(count, found)], delta=delta).epsilon == pytest.approx(epsilon, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("epsilon", "rate", "steps", "delta", "noise"),
    [
        (1, 0.05, 200, 1e-5, 2.838598),
        (8, 0.05, 200, 1e-5, 0.786894),
        (1, 0.1, 300, 1e-4, 5.632090),
        (8, 0.1, 300, 1e-4, 1.181977),
    ],
)
def test_noise_of_dp_sgd(epsilon, rate, steps, delta, noise):
    found = noise_for_sampled_gaussian(epsilon, delta, sample_rate=rate, steps=steps)
    assert found == pytest.approx(noise, abs=5e-6)
    bought = spent([SampledGaussian(steps, found, rate)], delta=delta).epsilon
    assert epsilon * (1 - 1e-4) < bought <= epsilon


def test_the_classic_formula_would_give_more_away_than_it_says():
    """Published fault: sqrt(2 log(1.25 / delta)) / epsilon is no bound for epsilon above 1."""
    classic = math.sqrt(2 * math.log(1.25e5)) / 10
    assert spent([Gaussian(1, classic)], delta=1e-5).epsilon == pytest.approx(10.39, abs=0.005)
    assert noise_for_gaussian(10, 1e-5) > classic


@pytest.mark.parametrize(
    ("epsilon", "delta", "count"), [(0, 1e-5, 1), (math.inf, 1e-5, 1), (1, 0, 1), (1, 1e-5, 0)]
)
def test_what_is_out_of_range_is_refused(epsilon, delta, count):
    with pytest.raises(ValueError, match=r"must be"):
        noise_for_gaussian(epsilon, delta, count=count)
    with pytest.raises(ValueError, match=r"must be"):
        noise_for_sampled_gaussian(epsilon, delta, sample_rate=0.1, steps=count)


@pytest.mark.parametrize(("epsilon", "delta"), [(1e-12, 1e-20), (1e13, 1e-5), (1, 1e-300)])
def test_gaussian_noise_for_extremes(epsilon, delta):
    found = noise_for_gaussian(epsilon, delta)
    assert spent([Gaussian(1, found)], delta=delta).epsilon == pytest.approx(epsilon, rel=1e-3)


@pytest.mark.parametrize(
    ("epsilon", "rate", "steps"),
    [
        (1, 0.05, 200),
        *(
            pytest.param(*cell, marks=pytest.mark.slow)
            for cell in [(8, 0.05, 200), (2, 0.3, 100), (8, 0.3, 500), (4, 0.1, 500), (0.5, 0.1, 3)]
        ),
    ],
)
def test_wide_bins_find_a_little_more_noise_never_less(epsilon, rate, steps):
    fast = noise_for_sampled_gaussian(epsilon, 1e-5, sample_rate=rate, steps=steps, grid=1e-3)
    bought = spent([SampledGaussian(steps, fast, rate)], delta=1e-5).epsilon
    assert epsilon * (1 - 5e-3) < bought <= epsilon


def test_a_step_that_draws_every_row_takes_gaussian_noise():
    found = noise_for_sampled_gaussian(2, 1e-5, sample_rate=1, steps=10)
    assert found == pytest.approx(6.3049885554, abs=1e-9)
    nearly = noise_for_sampled_gaussian(2, 1e-5, sample_rate=1 - 1e-9, steps=10, grid=1e-2)
    assert found * (1 - 1e-6) < nearly < found * 1.01


@pytest.mark.parametrize(("epsilon", "delta"), [(1, 0.1), (200, 1e-5)])
def test_there_is_a_least_noise(epsilon, delta):
    """Rows are drawn with a chance below delta, or so much may be lost that any noise would do."""
    found = noise_for_sampled_gaussian(epsilon, delta, sample_rate=0.01, steps=10, grid=1e-2)
    assert found == 0.1


@pytest.mark.parametrize("epsilon", [0.8, 1.7, 2.9, 5])
def test_a_search_ends_on_the_side_of_more_noise(epsilon):
    found = noise_for_sampled_gaussian(epsilon, 1e-5, sample_rate=0.2, steps=20, grid=1e-2)
    bought = spent([SampledGaussian(20, found, 0.2)], delta=1e-5, grid=1e-2).epsilon
    assert epsilon * (1 - 0.02) < bought <= epsilon


def test_noise_where_delta_alone_may_be_enough():
    # With a fifth more of it, epsilon is 0.
    found = noise_for_sampled_gaussian(0.05, 0.3, sample_rate=0.5, steps=10, grid=1e-2)
    assert 0 < spent([SampledGaussian(10, found, 0.5)], delta=0.3, grid=1e-2).epsilon <= 0.05


def test_noise_for_an_epsilon_that_renyi_divergences_never_show():
    found = noise_for_sampled_gaussian(0.002, 1e-5, sample_rate=0.01, steps=100)
    assert spent([SampledGaussian(100, found, 0.01)], delta=1e-5).epsilon <= 0.002
    assert found < noise_for_gaussian(0.002, 1e-5, count=100)
