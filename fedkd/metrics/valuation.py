"""What players of a cooperative game are worth: leave-one-out and Shapley values.

A game is a utility of coalitions: sets of players, numbered from 0. Here players are clients, and
a coalition's utility is what a federation achieves in which only its members teach; the
mathematics knows nothing of that.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

Coalition = frozenset[int]
Utility = Callable[[Coalition], float]
"""What a coalition achieves, in any unit; it has to give the same for the same coalition."""

MOST_EXACT = 16
"""Players of a game whose coalitions can all be asked: there are 2 to that power."""


@dataclass(frozen=True)
class ShapleyEstimate:
    """Shapley values from sampled permutations.

    Attributes:
        values: of each player, in the utility's unit.
        standard_errors: of each value; NaN where one permutation, or one pair, was drawn.
        marginals: ``[permutations, players]``, what each player added in each permutation.
        truncated: marginals that were not looked at and count as 0.
    """

    values: Float64[np.ndarray, "players"]
    standard_errors: Float64[np.ndarray, "players"]
    marginals: Float64[np.ndarray, "permutations players"]
    truncated: int = 0


def leave_one_out(utility: Utility, players: int) -> Float64[np.ndarray, "players"]:
    """Return what each player adds to all others: ``U(N) - U(N without i)``.

    Args:
        utility: of the game.
        players: how many, >= 1.

    Raises:
        ValueError: there is no player.
    """
    _check_players(players)
    everybody = frozenset(range(players))
    whole = utility(everybody)
    return np.array([whole - utility(everybody - {player}) for player in range(players)])


def shapley_values(utility: Utility, players: int) -> Float64[np.ndarray, "players"]:
    """Return the Shapley values of a small game, from all of its coalitions.

    ``sum over S without i of |S|! (n - |S| - 1)! / n! (U(S with i) - U(S))``.

    Args:
        utility: of the game; it is asked ``2 ** players`` times.
        players: how many, 1 to `MOST_EXACT`.

    Raises:
        ValueError: there is no player, or there are too many.

    Source:
        Shapley, 1953, A value for n-person games.
    """
    _check_players(players)
    if players > MOST_EXACT:
        raise ValueError(
            f"players must be at most {MOST_EXACT} for exact values, got {players}: sample "
            "permutations"
        )
    known = {
        frozenset(members): utility(frozenset(members))
        for size in range(players + 1)
        for members in itertools.combinations(range(players), size)
    }
    values = np.zeros(players)
    for coalition, value in known.items():
        size = len(coalition)
        if size == players:
            continue
        weight = 1 / (players * math.comb(players - 1, size))
        for player in range(players):
            if player not in coalition:
                values[player] += weight * (known[coalition | {player}] - value)
    return values


def drawn_permutations(
    players: int, count: int, rng: np.random.Generator, *, antithetic: bool = True
) -> Int64[np.ndarray, "count players"]:
    """Draw orders in which players join.

    Args:
        players: how many, >= 1.
        count: how many orders, >= 1.
        rng: draws them.
        antithetic: whether every second order is the one before, backwards: who comes early there
            comes late here, which takes out part of the noise where what a player adds falls, or
            grows, with how many are there already.

    Raises:
        ValueError: there is no player, or no order is asked for.

    Source:
        Antithetic pairs: Mitchell, Cooper, Frank, Holmes, 2022, Sampling Permutations for Shapley
        Value Estimation. https://jmlr.org/papers/v23/21-0439.html
    """
    _check_players(players)
    if count < 1:
        raise ValueError(f"permutations must be >= 1, got {count}")
    orders: list[np.ndarray] = []
    while len(orders) < count:
        order = rng.permutation(players)
        orders += [order, order[::-1]] if antithetic else [order]
    return np.stack(orders[:count]).astype(np.int64)


def sampled_shapley(
    utility: Utility,
    orders: Int64[np.ndarray, "count players"],
    *,
    antithetic: bool = True,
    tolerance: int | float | None = None,
) -> ShapleyEstimate:
    """Estimate Shapley values: the mean of what each player adds when it joins, over orders.

    Within an order the contributions add up to ``U(N) - U(nobody)``, so without truncation the
    values do as well, whatever orders were drawn.

    Args:
        utility: of the game; asked again for a coalition that comes again.
        orders: in which players join, one a row; every row holds each player once.
        antithetic: whether each row of an odd number, from 1, is the row before backwards: then
            pairs, not single orders, are what is independent, and the standard errors are theirs.
        tolerance: once a coalition is so close to ``U(N)``, in the utility's unit, whoever joins
            later counts as adding nothing; None: nothing is truncated.

    Raises:
        ValueError: an order is none.

    Source:
        The estimator: Castro, Gomez, Tejada, 2009, Polynomial calculation of the Shapley value
        based on sampling. Truncation: Ghorbani, Zou, 2019, Algorithm 1.
        https://arxiv.org/abs/1904.02868
    """
    count, players = orders.shape
    _check_players(players)
    if count < 1 or any(sorted(order) != list(range(players)) for order in orders.tolist()):
        raise ValueError(f"orders must hold each of the players 0 to {players - 1} once a row")
    if tolerance is not None and tolerance < 0:
        raise ValueError(f"tolerance must be >= 0, got {tolerance}")
    whole = utility(frozenset(range(players)))
    nobody = utility(frozenset())
    marginals = np.zeros((count, players))
    truncated = 0
    for row, order in enumerate(orders.tolist()):
        there: Coalition = frozenset()
        before = nobody
        for place, player in enumerate(order):
            if tolerance is not None and abs(whole - before) <= tolerance:
                truncated += players - place
                break
            there = there | {player}
            after = whole if len(there) == players else utility(there)
            marginals[row, player] = after - before
            before = after
    return ShapleyEstimate(
        values=marginals.mean(0),
        standard_errors=standard_errors(marginals, antithetic=antithetic),
        marginals=marginals,
        truncated=truncated,
    )


def standard_errors(
    marginals: Float64[np.ndarray, "count players"], *, antithetic: bool
) -> Float64[np.ndarray, "players"]:
    """Return the standard error of each player's mean; NaN where a single draw shows no spread.

    Args:
        marginals: one row an order.
        antithetic: whether rows come in pairs. A last row without its partner is part of the mean
            with half the weight of a pair, and as uncertain as any single order.
    """
    count, size = len(marginals), 2 if antithetic else 1
    whole = count // size * size
    drawn = marginals[:whole].reshape(-1, size, marginals.shape[1]).mean(1)
    if len(drawn) < 2:
        return np.full(marginals.shape[1], np.nan)
    variance = size**2 * len(drawn) * drawn.var(axis=0, ddof=1)
    if whole < count:
        variance = variance + marginals.var(axis=0, ddof=1)
    errors: np.ndarray = np.sqrt(variance) / count
    return errors


def coalitions_of(orders: Int64[np.ndarray, "count players"]) -> list[Coalition]:
    """Return the coalitions that `sampled_shapley` asks for, each once, in the order it does."""
    players = orders.shape[1]
    found: dict[Coalition, None] = {frozenset(range(players)): None, frozenset(): None}
    for order in orders.tolist():
        for size in range(1, players):
            found[frozenset(order[:size])] = None
    return list(found)


def _check_players(players: int) -> None:
    if players < 1:
        raise ValueError(f"players must be >= 1, got {players}")
