import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.metrics import forgetting, spread, worst_mean

shares = st.lists(st.floats(0, 1), min_size=1, max_size=40)


def test_spread_is_the_root_of_the_variance_over_these_clients():
    # Mean 0.6; squared distances 0.04, 0.01, 0.01, 0.04 have the mean 0.025.
    assert spread([0.4, 0.5, 0.7, 0.8]) == pytest.approx(math.sqrt(0.025))
    assert spread([0.3]) == 0


def test_the_worst_tenth_is_rounded_up_to_whole_clients():
    assert worst_mean([0.9, 0.2, 0.5]) == 0.2
    assert worst_mean(np.arange(10) / 10) == 0
    assert worst_mean(np.arange(11) / 10) == pytest.approx((0 + 0.1) / 2)
    # 0.1 * 30 is 3.0000000000000004 in binary.
    assert worst_mean(np.arange(30) / 100) == pytest.approx(0.01)
    assert worst_mean([0.1, 0.3], share=1) == pytest.approx(0.2)


@settings(max_examples=60, deadline=None)
@given(shares)
def test_the_worst_lie_between_the_lowest_and_the_mean(values):
    assert min(values) - 1e-9 <= worst_mean(values) <= np.mean(values) + 1e-9
    assert 0 <= spread(values) <= 0.5 + 1e-9


@pytest.mark.parametrize("share", [0, -0.1, 1.5, math.nan])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\]"):
        worst_mean([0.5], share=share)


def test_forgetting_is_measured_from_the_best_so_far():
    assert forgetting([0.5, 0.9, 0.7], 0.6) == pytest.approx(0.3)
    assert forgetting([0.5, 0.6], 0.8) == pytest.approx(-0.2)
    assert forgetting([0.5, 0.9], 0.9) == 0


def test_clients_without_a_value_say_nothing():
    assert spread([0.2, math.nan, 0.4]) == pytest.approx(0.1)
    assert worst_mean([math.nan, 0.4]) == 0.4
    assert forgetting([math.nan, 0.4], 0.3) == pytest.approx(0.1)
    for value in (
        spread([]),
        worst_mean([math.nan]),
        forgetting([], 0.5),
        forgetting([0.5], math.nan),
    ):
        assert math.isnan(value)
