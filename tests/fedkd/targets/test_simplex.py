"""Shares are the nearest numbers that are >= 0 and sum to 1."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.targets import nearest_shares

rows = st.lists(st.floats(-5, 5), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.5, 0.5], [0.5, 0.5]),
        ([1.0, 1.0], [0.5, 0.5]),
        ([2.0, 0.0], [1.0, 0.0]),
        ([0.8, 0.6, -1.0], [0.6, 0.4, 0.0]),
        ([-3.0, -3.0, -3.0], [1 / 3] * 3),
        ([7.0], [1.0]),
    ],
)
def test_shares_by_hand(values, expected):
    assert np.allclose(nearest_shares(np.array([values])), [expected], atol=1e-12)


@given(values=rows, shift=st.floats(-5, 5))
@settings(max_examples=60, deadline=None)
def test_shares_are_nearest_and_do_not_see_a_constant(values, shift):
    given_row = np.array(values)
    shares = nearest_shares(given_row)
    assert shares.min() >= 0
    assert shares.sum() == pytest.approx(1)
    assert np.allclose(nearest_shares(given_row + shift), shares, atol=1e-9)
    assert np.allclose(nearest_shares(shares), shares, atol=1e-12)
    # No corner of the simplex is in a direction that leads nearer.
    assert ((np.eye(len(values)) - shares) @ (given_row - shares)).max() <= 1e-9
