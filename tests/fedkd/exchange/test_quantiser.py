"""The quantiser and the delta code by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkd.exchange.quantiser import (
    bytes_of,
    delta_symbols,
    packed,
    quantised,
    restored,
    unpacked,
)

MEAN = np.array([[0.06713702, 0.35502569, 0.52978979, 0.04804750]])
UNSURE = np.exp([[0.0, 0.0, 1.0, 3.0]]) / np.exp([[0.0, 0.0, 1.0, 3.0]]).sum()


def distance(probabilities, bits):
    return np.abs(restored(quantised(probabilities, bits=bits), bits=bits) - probabilities).sum()


@pytest.mark.parametrize(
    ("bits", "levels", "l1"),
    [
        (1, [0, 0, 1, 0], 0.94042042),
        (2, [0, 1, 2, 0], 0.27375375),
        (3, [0, 3, 4, 0], 0.23036905),
        (4, [1, 5, 8, 1], 0.04432542),
    ],
)
def test_matches_the_published_levels(bits, levels, l1):
    assert quantised(MEAN, bits=bits).tolist() == [levels]
    assert distance(MEAN, bits) == pytest.approx(l1, abs=1e-7)


@pytest.mark.parametrize(("bits", "levels"), [(2, [0, 0, 0, 3]), (3, [0, 0, 1, 6])])
def test_matches_the_published_levels_of_a_sure_client(bits, levels):
    assert quantised(UNSURE, bits=bits).tolist() == [levels]
    if bits == 3:
        assert distance(UNSURE, bits) == pytest.approx(0.16126549, abs=1e-7)


@pytest.mark.parametrize(
    ("shares", "levels"), [([0.5, 0.25, 0.25], [1, 1, 1]), ([0.2] * 5, [1, 1, 1, 0, 0])]
)
def test_what_is_sent_is_a_distribution(shares, levels):
    """Published fault: each share rounded by itself sums to 4/3, or to 5/3."""
    assert quantised(np.array([shares]), bits=2).tolist() == [levels]


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6).filter(lambda own: sum(own) > 0.1))
def test_no_other_levels_are_nearer(shares):
    probabilities = np.array([shares]) / sum(shares)
    levels = quantised(probabilities, bits=2)
    assert levels.sum() == 3
    nearest = distance(probabilities, 2)
    # Moving a unit from any class to any other is never nearer; the distance is convex.
    for giver in np.flatnonzero(levels[0]):
        for taker in range(len(shares)):
            moved = levels.astype(float)
            moved[0, giver] -= 1
            moved[0, taker] += 1
            assert np.abs(moved / 3 - probabilities).sum() >= nearest - 1e-5


def test_levels_that_are_there_already_stay():
    for bits in range(1, 9):
        levels = quantised(np.random.default_rng(bits).dirichlet(np.ones(10), 20), bits=bits)
        assert np.array_equal(quantised(restored(levels, bits=bits), bits=bits), levels)


def test_the_delta_code_matches_the_published_symbols_and_their_entropy():
    before, now = np.array([0, 1, 2, 2, 1, 0, 3, 3]), np.array([0, 1, 1, 2, 1, 0, 3, 2])
    symbols = delta_symbols(before, now)
    assert symbols.tolist() == [0, 0, 2, 0, 0, 0, 0, 3]

    def entropy(values):
        shares = np.unique(values, return_counts=True)[1] / len(values)
        return -(shares * np.log2(shares)).sum()

    assert entropy(now) == pytest.approx(1.90563906, abs=1e-8)
    assert entropy(symbols) == pytest.approx(1.06127812, abs=1e-8)
    assert delta_symbols(None, now).tolist() == (now + 1).tolist()


@pytest.mark.parametrize(("bits", "count"), [(1, 9), (3, 5), (4, 0), (8, 3), (11, 4)])
def test_what_is_packed_comes_out_again(bits, count):
    numbers = np.random.default_rng(0).integers(0, 2**bits, count)
    written = packed(numbers, bits=bits)
    assert len(written) == bytes_of(count, bits)
    assert unpacked(written, count, bits=bits).tolist() == numbers.tolist()


def test_other_numbers_of_bits_are_refused():
    for bits in (0, 9):
        with pytest.raises(ValueError, match=f"bits must be 1 to 8, got {bits}"):
            quantised(MEAN, bits=bits)
