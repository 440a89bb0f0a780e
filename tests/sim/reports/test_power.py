"""What so many seeds can see, against noncentral t by SciPy, by integration and by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, special, stats

from sim.reports.power import (
    detectable_effect,
    power_of,
    sd_interval,
    seeds_for,
    seeds_needed,
)

counts = st.integers(2, 40)
spreads = st.floats(1e-3, 1e3)


@pytest.mark.parametrize("count", [2, 3, 5, 10])
@pytest.mark.parametrize("effect", [0.0, 0.4, 1.5])
def test_power_is_that_of_the_noncentral_t_by_integration(count, effect):
    # T = (Z + shift) / s with s^2 = chi2 / (n - 1): P(|T| > q) given s, over s.
    shift, quantile = effect * math.sqrt(count), stats.t.ppf(0.975, count - 1)

    def rejected(s):
        given_s = special.ndtr(shift - quantile * s) + special.ndtr(-shift - quantile * s)
        return given_s * stats.chi.pdf(s * math.sqrt(count - 1), count - 1) * math.sqrt(count - 1)

    area, _ = integrate.quad(
        rejected, 0, 40, epsabs=1e-14, epsrel=1e-13, limit=400, points=[0.1, 1]
    )
    assert power_of(effect, 1.0, count) == pytest.approx(area, abs=1e-12)


@given(counts, spreads, st.floats(0, 3))
def test_power_is_scipy_s_whatever_the_unit_and_the_sign(count, sd, effect):
    law = stats.nct(count - 1, effect * math.sqrt(count))
    quantile = stats.t.ppf(0.975, count - 1)
    expected = law.sf(quantile) + np.nan_to_num(law.cdf(-quantile))
    assert power_of(effect * sd, sd, count) == pytest.approx(expected, abs=1e-12)
    assert power_of(-effect * sd, sd, count) == power_of(effect * sd, sd, count)


def test_without_an_effect_the_test_finds_one_in_twenty():
    assert [power_of(0.0, 2.0, count) for count in (2, 5, 30)] == pytest.approx([0.05] * 3)


@given(counts, spreads)
def test_the_detectable_effect_is_found_in_four_of_five_studies(count, sd):
    assert power_of(detectable_effect(sd, count), sd, count) == pytest.approx(0.8, abs=1e-12)


def test_the_detectable_effect_matches_known_values():
    # As programs for planning have it, half a standard deviation takes 34 pairs.
    assert detectable_effect(1.0, 34) <= 0.5 < detectable_effect(1.0, 33)
    # At three seeds the normal approximation (1.96 + 0.84) / sqrt(3) = 1.62 is wrong by half.
    assert detectable_effect(1.0, 3) > 3.2


@given(spreads, st.floats(0.02, 5))
def test_so_many_seeds_and_no_fewer_give_the_wanted_interval(sd, in_sds):
    def half(count):
        return stats.t.ppf(0.975, count - 1) * sd / math.sqrt(count)

    wanted = in_sds * sd
    found = seeds_for(wanted, sd)
    assert half(found) <= wanted
    assert found == 2 or half(found - 1) > wanted


def test_seeds_needed_match_values_by_hand():
    # t(0.975, 5) / sqrt(6) = 2.570582 / 2.449490 = 1.0494, and one more 2.446912 / 2.645751 = 0.92.
    assert seeds_for(1.0, 1.0) == 7
    assert seeds_for(1.05, 1.0) == 6
    assert seeds_for(0.01, 0.0) == 2
    needed = seeds_needed(1.0, 1.0, 5)
    assert needed.seeds == 7
    # Of five values: sd * sqrt(4 / 11.1433) = 0.5991 and sd * sqrt(4 / 0.484419) = 2.8736.
    assert sd_interval(1.0, 5) == pytest.approx((0.599128, 2.873556), abs=1e-5)
    assert (needed.low, needed.high) == (seeds_for(1.0, 0.599128), seeds_for(1.0, 2.873556))


@given(counts, spreads)
def test_the_interval_of_a_spread_is_scipy_s(count, sd):
    low, high = sd_interval(sd, count)
    tails = stats.chi2.ppf([0.975, 0.025], count - 1)
    assert (low, high) == pytest.approx(tuple(sd * np.sqrt((count - 1) / tails)), rel=1e-12)
    assert low < sd < high
