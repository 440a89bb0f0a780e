"""Lower bounds on epsilon from attacks that succeed: what was promised must lie above them.

A bound proves nothing about safety: a weak attack proves little of a mechanism without any noise.
It can only contradict a promise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Integer, Num

from fedkd.privacy.attacks.figures import clopper_pearson

SHARES = (0.1, 0.25, 0.5, 1.0)
"""Of all canaries: how many are guessed. Fixed before anybody looks at a score."""


@dataclass(frozen=True, slots=True)
class Guesses:
    """What an auditor guessed of canaries, and what follows.

    Attributes:
        guesses: canaries that were said to be in or out; the others were left open.
        right: guesses that were.
        epsilon: what it must be at least, with the confidence that was asked for.
    """

    guesses: int
    right: int
    epsilon: float


def audit_bound(
    guesses: int,
    right: int,
    *,
    canaries: int,
    delta: int | float = 0,
    confidence: int | float = 0.95,
) -> float:
    """Return the largest epsilon that one run contradicts; it is larger with this confidence.

    Each of m canaries was in the data with probability 1/2, by itself, and some were guessed. Under
    (epsilon, delta)-privacy for one row more or less, with ``B ~ Binomial(guesses, e^epsilon /
    (1 + e^epsilon))``, the chance of so many right ones is at most
    ``P[B >= right] + 2 m delta max over i >= 1 of P[right > B >= right - i] / i``.

    Args:
        guesses: canaries that were guessed, chosen without knowing which are in.
        right: guesses that were.
        canaries: m, at least ``guesses``.
        delta: that the promise is for, in [0, 1).
        confidence: in (0, 1).

    Returns:
        0 where nothing is contradicted.

    Raises:
        ValueError: if a number is out of range.

    Source:
        Steinke, Nasr, Jagielski, 2023, appendix D. https://arxiv.org/abs/2305.08846
    """
    if not 0 <= right <= guesses <= canaries:
        raise ValueError(
            f"0 <= right <= guesses <= canaries must hold, got {right}, {guesses}, {canaries}"
        )
    if not 0 <= delta < 1:
        raise ValueError(f"delta must be in [0, 1), got {delta}")
    _check_confidence(confidence)

    def contradicted(epsilon: float) -> bool:
        return _chance(guesses, right, canaries, epsilon, delta) <= 1 - confidence

    if not contradicted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while contradicted(high):
        low, high = high, 2 * high
    # The lower end, so that rounding never adds to what is proven.
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if contradicted(middle) else (low, middle)
    return low


def best_guesses(
    scores: Num[np.ndarray, " canaries"],
    inside: Bool[np.ndarray, " canaries"],
    *,
    delta: int | float = 0,
    confidence: int | float = 0.95,
    shares: Sequence[float] = SHARES,
) -> Guesses:
    """Guess the canaries of the highest scores in and those of the lowest out; bound epsilon.

    Few guesses are surer, many are better evidence, and which is best is seen afterwards only. So
    each of the shares of canaries, fixed before, is tried with a part of the doubt, ``(1 -
    confidence) / len(shares)``, and the best bound counts (Bonferroni). Half of the guesses are in.
    Canaries of equal scores are taken as they come, which must not depend on ``inside``.

    Args:
        scores: higher is more likely in.
        inside: which canary was in the data.
        delta: that the promise is for, in [0, 1).
        confidence: of the bound, in (0, 1), the choice included.
        shares: of the canaries, each in (0, 1].

    Raises:
        ValueError: if a number is out of range, or there are fewer than two canaries.
    """
    if np.isnan(scores).any():
        raise ValueError(f"scores must be numbers, got NaN for {int(np.isnan(scores).sum())} rows")
    order = np.argsort(scores, kind="stable")
    found = []
    for each in _halves(len(scores), shares):
        right = int((~inside[order[:each]]).sum() + inside[order[-each:]].sum())
        bound = audit_bound(
            2 * each,
            right,
            canaries=len(scores),
            delta=delta,
            confidence=1 - (1 - confidence) / len(shares),
        )
        found.append(Guesses(2 * each, right, bound))
    # Where nothing is proven, the most guesses say most of how it went.
    return max(found, key=lambda one: (one.epsilon, one.guesses))


def most_provable(
    canaries: int,
    *,
    delta: int | float = 0,
    confidence: int | float = 0.95,
    shares: Sequence[float] = SHARES,
) -> float:
    """Return the bound that `best_guesses` gives if every guess is right: no audit proves more.

    Args:
        canaries: >= 2.
        delta: that the promise is for, in [0, 1).
        confidence: of the bound, in (0, 1).
        shares: of the canaries, each in (0, 1].

    Raises:
        ValueError: if a number is out of range.
    """
    inside = np.arange(canaries) >= canaries // 2
    return best_guesses(
        inside.astype(np.float64), inside, delta=delta, confidence=confidence, shares=shares
    ).epsilon


def smallest_sufficient(claim: int | float, *, confidence: int | float = 0.95) -> int:
    """Return how many guesses, all right, contradict a promise of this epsilon with delta 0.

    The least r with ``(e^epsilon / (1 + e^epsilon))^r <= 1 - confidence``. A delta above 0, or a
    choice among several shares, takes more.

    Args:
        claim: epsilon, > 0.
        confidence: in (0, 1).

    Raises:
        ValueError: if a number is out of range.
    """
    if not 0 < claim < 500:
        raise ValueError(f"claim must be in (0, 500), got {claim}")
    _check_confidence(confidence)
    return math.ceil(math.log(1 - confidence) / -math.log1p(math.exp(-claim)))


def epsilon_from_rates(
    *,
    false_positives: int,
    without: int,
    false_negatives: int,
    with_it: int,
    delta: int | float = 0,
    confidence: int | float = 0.95,
) -> float:
    """Return what epsilon must be at least, from many releases with and without a row.

    A test that tells one from the other has, under (epsilon, delta)-privacy, rates with
    ``fpr + e^epsilon fnr >= 1 - delta`` and ``fnr + e^epsilon fpr >= 1 - delta``. Both rates are
    taken at the upper end of Clopper-Pearson's intervals, which share the doubt.

    Args:
        false_positives: releases without the row that the test takes for one with it.
        without: releases without the row, >= 1.
        false_negatives: releases with the row that the test takes for one without.
        with_it: releases with the row, >= 1.
        delta: that the promise is for, in [0, 1).
        confidence: of the bound, in (0, 1). The test was fixed before looking at these releases.

    Returns:
        0 where nothing is contradicted.

    Raises:
        ValueError: if a number is out of range.

    Source:
        Kairouz, Oh, Viswanath, 2015, theorem 2.1 (https://arxiv.org/abs/1311.0776); Nasr et al.,
        2021, for the intervals (https://arxiv.org/abs/2101.04535).
    """
    if not 0 <= delta < 1:
        raise ValueError(f"delta must be in [0, 1), got {delta}")
    # The upper ends of two-sided intervals: each errs with half of the doubt.
    fpr = clopper_pearson(false_positives, without, confidence)[1]
    fnr = clopper_pearson(false_negatives, with_it, confidence)[1]
    ratio = max((1 - delta - fpr) / fnr, (1 - delta - fnr) / fpr)
    return math.log(ratio) if ratio > 1 else 0.0


def _check_confidence(confidence: int | float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")


def _halves(canaries: int, shares: Sequence[float]) -> list[int]:
    if canaries < 2:
        raise ValueError(f"canaries must be >= 2, got {canaries}")
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ValueError(f"shares must be in (0, 1], got {list(shares)}")
    return [max(1, int(share * canaries / 2)) for share in shares]


def _chance(guesses: int, right: int, canaries: int, epsilon: float, delta: int | float) -> float:
    """Return the most that the chance of so many right guesses can be."""
    from scipy.special import betaincc, expit  # imported late: no training needs it

    if not right:
        return 1.0
    # By the chance of a wrong guess, which keeps its digits where that of a right one rounds to 1.
    chance = float(betaincc(guesses - right + 1, right, expit(-epsilon)))
    if delta:
        below = np.cumsum(_binomial(guesses, np.arange(right - 1, -1, -1), epsilon))
        chance += 2 * canaries * delta * float((below / np.arange(1, right + 1)).max())
    return min(chance, 1.0)


def _binomial(
    trials: int, hits: Integer[np.ndarray, " hits"], epsilon: float
) -> Float[np.ndarray, " hits"]:
    """Return ``P[B = hits]``, B ~ Binomial(trials, sigmoid(epsilon))."""
    from scipy.special import gammaln

    ways = gammaln(trials + 1) - gammaln(hits + 1) - gammaln(trials - hits + 1)
    logs = ways - trials * math.log1p(math.exp(-epsilon)) - (trials - hits) * epsilon
    return np.asarray(np.exp(logs))
