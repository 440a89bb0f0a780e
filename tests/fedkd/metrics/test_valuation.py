"""Worth of players: hand-computed games, and what defines the Shapley value."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.metrics.valuation import (
    MOST_EXACT,
    coalitions_of,
    drawn_permutations,
    leave_one_out,
    sampled_shapley,
    shapley_values,
    standard_errors,
)


def gloves(coalition):
    """Players 0 and 1 have a left glove, player 2 the only right one; a pair is worth 1."""
    return float(2 in coalition and bool(coalition & {0, 1}))


def all_orders(players):
    return np.array(list(itertools.permutations(range(players))))


def game_of(numbers, players):
    """A game with a number for each coalition; nobody has any utility by being nobody."""
    return lambda coalition: numbers[sum(1 << player for player in coalition)]


games = st.integers(1, 4).flatmap(
    lambda players: st.tuples(
        st.just(players),
        st.lists(st.floats(-10, 10, allow_nan=False), min_size=2**players, max_size=2**players),
    )
)


def test_the_glove_game_by_hand():
    # Of the six orders player 2 completes a pair in four; 0 and 1 complete it in one each.
    expected = [1 / 6, 1 / 6, 4 / 6]
    assert shapley_values(gloves, 3) == pytest.approx(expected)
    assert sampled_shapley(gloves, all_orders(3), antithetic=False).values == pytest.approx(
        expected
    )
    # Without one left glove there is another; without the right one there is nothing.
    assert leave_one_out(gloves, 3).tolist() == [0, 0, 1]


def test_what_each_order_shows_by_hand():
    orders = np.array([[0, 1, 2], [2, 1, 0]])
    found = sampled_shapley(gloves, orders)
    # 0, then 1, then 2 who completes the pair; and 2, then 1 who completes it, then 0.
    assert found.marginals.tolist() == [[0, 0, 1], [0, 1, 0]]
    assert found.values.tolist() == [0, 0.5, 0.5]
    assert np.isnan(found.standard_errors).all()


def test_standard_errors_are_those_of_independent_draws():
    marginals = np.array([[1.0], [3.0], [2.0], [6.0]])
    # Orders: mean 3, variance (4 + 0 + 1 + 9) / 3, over 4.
    alone = standard_errors(marginals, antithetic=False)
    assert alone == pytest.approx([math.sqrt(14 / 3 / 4)])
    # Pairs: 2 and 4, whose variance is 2, over 2.
    assert standard_errors(marginals, antithetic=True) == pytest.approx([1.0])
    # A fifth order alone: the mean is (4 + 8 + 3) / 5, its variance (4 (2 + 2) + 14 / 4) / 25.
    odd = np.concatenate([marginals, [[3.0]]])
    assert standard_errors(odd, antithetic=True) == pytest.approx([math.sqrt((16 + 3.5) / 25)])
    assert np.isnan(standard_errors(marginals[:1], antithetic=False)).all()


def test_an_order_without_its_partner_leaves_doubt_where_pairs_leave_none():
    def both(coalition):
        return float(len(coalition) == 2)

    orders = drawn_permutations(2, 5, np.random.default_rng(0))
    even, odd = sampled_shapley(both, orders[:4]), sampled_shapley(both, orders)
    # A pair has both orders of two players: exact.
    assert even.values.tolist() == [0.5, 0.5]
    assert even.standard_errors.tolist() == [0, 0]
    assert sorted(odd.values) == pytest.approx([0.4, 0.6])
    assert (odd.standard_errors > 0.1).all()


@given(games, st.integers(1, 7), st.booleans(), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_values_add_up_to_what_all_achieve_beyond_nobody(game, count, antithetic, seed):
    players, numbers = game
    utility = game_of(numbers, players)
    whole = utility(frozenset(range(players))) - utility(frozenset())
    orders = drawn_permutations(players, count, np.random.default_rng(seed), antithetic=antithetic)
    assert sampled_shapley(utility, orders).values.sum() == pytest.approx(whole, abs=1e-9)
    assert shapley_values(utility, players).sum() == pytest.approx(whole, abs=1e-9)


@given(games)
@settings(max_examples=40, deadline=None)
def test_all_orders_give_the_exact_values(game):
    players, numbers = game
    utility = game_of(numbers, players)
    sampled = sampled_shapley(utility, all_orders(players), antithetic=False)
    assert sampled.values == pytest.approx(shapley_values(utility, players), abs=1e-9)


@given(games)
@settings(max_examples=40, deadline=None)
def test_who_adds_nothing_is_worth_nothing(game):
    players, numbers = game
    utility = game_of(numbers, players)

    def with_a_dummy(coalition):
        return utility(coalition - {players})

    values = shapley_values(with_a_dummy, players + 1)
    assert values[-1] == pytest.approx(0, abs=1e-9)
    # Nor does its being there change what others are worth.
    assert values[:-1] == pytest.approx(shapley_values(utility, players), abs=1e-9)
    orders = drawn_permutations(players + 1, 5, np.random.default_rng(0))
    assert sampled_shapley(with_a_dummy, orders).values[-1] == 0
    assert leave_one_out(with_a_dummy, players + 1)[-1] == 0


@given(st.lists(st.floats(-10, 10, allow_nan=False), min_size=8, max_size=8))
@settings(max_examples=40, deadline=None)
def test_players_who_add_the_same_are_worth_the_same(numbers):
    def utility(coalition):
        # 0 and 1 are interchangeable.
        swapped = frozenset({0: 1, 1: 0}.get(player, player) for player in coalition)
        one, other = (game_of(numbers, 3)(each) for each in (coalition, swapped))
        return one + other

    values = shapley_values(utility, 3)
    assert values[0] == pytest.approx(values[1], abs=1e-9)
    assert leave_one_out(utility, 3)[0] == pytest.approx(leave_one_out(utility, 3)[1])


def test_truncation_stops_where_nothing_is_left_to_add():
    asked = []

    def utility(coalition):
        asked.append(coalition)
        return gloves(coalition)

    orders = np.array([[2, 0, 1]])
    found = sampled_shapley(utility, orders, tolerance=0)
    # With 2 and 0 the pair is complete: 1 is not asked for.
    assert found.values.tolist() == [1, 0, 0]
    assert found.truncated == 1
    assert asked == [frozenset({0, 1, 2}), frozenset(), frozenset({2}), frozenset({0, 2})]
    # A tolerance of all there is to gain leaves nothing to look at.
    assert sampled_shapley(gloves, orders, tolerance=1).truncated == 3


def test_every_second_order_is_the_one_before_backwards():
    rng = np.random.default_rng(0)
    orders = drawn_permutations(5, 4, rng)
    assert (orders[1] == orders[0][::-1]).all()
    assert (orders[3] == orders[2][::-1]).all()
    assert (orders[2] != orders[0]).any()
    assert len(drawn_permutations(5, 3, rng)) == 3
    alone = drawn_permutations(5, 2, np.random.default_rng(0), antithetic=False)
    assert (alone[0] == orders[0]).all()
    assert (alone[1] != orders[1]).any()


def test_pairs_take_out_noise_where_contributions_fall_with_the_number_there():
    def utility(coalition):
        # Who comes k-th adds 11 - 2 k: backwards what is missing forwards, to 4 on average of 6.
        return 10 * len(coalition) - len(coalition) ** 2

    rng = np.random.default_rng(3)
    one = sampled_shapley(utility, drawn_permutations(6, 8, rng))
    orders = drawn_permutations(6, 8, rng, antithetic=False)
    other = sampled_shapley(utility, orders, antithetic=False)
    assert one.values.tolist() == [4] * 6
    assert one.standard_errors.max() == 0
    assert other.standard_errors.min() > 0.5


def test_the_coalitions_that_are_asked_for_are_known_before():
    orders = drawn_permutations(4, 3, np.random.default_rng(1))
    asked = []

    def utility(coalition):
        asked.append(coalition)
        return float(len(coalition))

    sampled_shapley(utility, orders)
    assert list(dict.fromkeys(asked)) == coalitions_of(orders)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: leave_one_out(gloves, 0), "players must be >= 1"),
        (lambda: shapley_values(gloves, MOST_EXACT + 1), "players must be at most 16"),
        (lambda: drawn_permutations(3, 0, np.random.default_rng(0)), "permutations must be >= 1"),
        (lambda: sampled_shapley(gloves, np.array([[0, 0, 1]])), "each of the players 0 to 2"),
        (lambda: sampled_shapley(gloves, all_orders(3), tolerance=-1), "tolerance must be >= 0"),
    ],
)
def test_what_cannot_be_is_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()
