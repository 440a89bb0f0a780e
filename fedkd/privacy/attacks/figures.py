"""How well an attack tells members from others, with intervals."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Num

_SLACK = 1e-9
"""What rounding may take from a count: 0.29 of 100 are 29."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and what it may be instead.

    Attributes:
        value: what was measured.
        low: lower end of the interval.
        high: upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Roc:
    """Both rates of an attack at every threshold that changes one, from (0, 0) to (1, 1).

    Attributes:
        false_positive_rates: shares of non-members that pass, ascending.
        true_positive_rates: shares of members that pass, ascending.
    """

    false_positive_rates: Float[np.ndarray, " points"]
    true_positive_rates: Float[np.ndarray, " points"]


def clopper_pearson(hits: int, trials: int, confidence: int | float = 0.95) -> tuple[float, float]:
    """Return the ends of an interval that holds a share with at least this confidence.

    Args:
        hits: how often it was seen, in [0, trials].
        trials: independent ones, >= 1.
        confidence: in (0, 1).

    Raises:
        ValueError: if a number is out of range.

    Source:
        Clopper and Pearson, 1934, by quantiles of beta distributions.
        https://doi.org/10.1093/biomet/26.4.404
    """
    return _beta_interval(hits, trials, confidence)


def _beta_interval(hits: int | float, trials: int, confidence: int | float) -> tuple[float, float]:
    from scipy.special import betaincinv  # imported late: no training needs it

    if trials < 1:
        raise ValueError(f"trials must be >= 1, got {trials}: nothing says anything of a share")
    if not 0 <= hits <= trials:
        raise ValueError(f"hits must be in [0, {trials}], got {hits}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    tail = (1 - confidence) / 2
    low = betaincinv(hits, trials - hits + 1, tail) if hits > 0 else 0.0
    high = betaincinv(hits + 1, trials - hits, 1 - tail) if hits < trials else 1.0
    return float(low), float(high)


def roc(scores: Num[np.ndarray, " rows"], members: Bool[np.ndarray, " rows"]) -> Roc:
    """Return both rates as the threshold falls; rows of equal scores pass together.

    Args:
        scores: higher is more likely a member; may be infinite.
        members: who is one; there is at least one of each kind.

    Raises:
        ValueError: if a score is NaN, or all rows are of one kind.
    """
    inside, outside = _split(scores, members)
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last_of_its_score = np.append(ranked[1:] != ranked[:-1], True)
    passed = np.cumsum(members[order])[last_of_its_score]
    rows = np.flatnonzero(last_of_its_score) + 1
    return Roc(
        np.concatenate([[0.0], (rows - passed) / len(outside)]),
        np.concatenate([[0.0], passed / len(inside)]),
    )


def auc(
    scores: Num[np.ndarray, " rows"],
    members: Bool[np.ndarray, " rows"],
    confidence: int | float = 0.95,
) -> Interval:
    """Return the chance that a member scores above a non-member; ties count half.

    The interval is normal, of DeLong's variance. Where that variance is 0 (all pairs alike, so a
    value of 0, 1/2 or 1) or not defined (one row of a kind) it is Clopper-Pearson's of as many
    pairs as have no row in common: ``min(members, others)``, which are independent.

    Args:
        scores: higher is more likely a member; may be infinite.
        members: who is one; there is at least one of each kind.
        confidence: of the interval, in (0, 1).

    Raises:
        ValueError: if a score is NaN, all rows are of one kind, or ``confidence`` is out of range.

    Source:
        DeLong, DeLong, Clarke-Pearson, 1988. https://doi.org/10.2307/2531595
    """
    from scipy.special import ndtri

    inside, outside = _split(scores, members)
    # Of each row, the share of the other kind that it is on the right side of.
    above = _share_below(inside, outside)
    below = 1 - _share_below(outside, inside)
    value = float(above.mean())
    pairs = min(len(inside), len(outside))
    by_pairs = _beta_interval(value * pairs, pairs, confidence)
    if pairs < 2:
        return Interval(value, *by_pairs)
    variance = above.var(ddof=1) / len(inside) + below.var(ddof=1) / len(outside)
    if np.ptp(above) == np.ptp(below) == 0:
        return Interval(value, *by_pairs)
    half = float(ndtri((1 + confidence) / 2) * math.sqrt(variance))
    return Interval(value, max(value - half, 0.0), min(value + half, 1.0))


def _share_below(
    rows: Num[np.ndarray, " rows"], others: Num[np.ndarray, " others"]
) -> Float[np.ndarray, " rows"]:
    """Return the share of the others that each row scores above; ties count half."""
    ranked = np.sort(others)
    twice = np.searchsorted(ranked, rows) + np.searchsorted(ranked, rows, side="right")
    return np.asarray(twice / (2 * len(others)))


def rate_at(
    scores: Num[np.ndarray, " rows"],
    members: Bool[np.ndarray, " rows"],
    false_positive_rate: int | float,
    least_expected: int | float = 10,
    confidence: int | float = 0.95,
) -> Interval | None:
    """Return the share of members found where at most this share of non-members passes.

    The threshold is a non-member's score, and who scores above it passes. The interval is
    Clopper-Pearson's over members, for this threshold.

    Args:
        scores: higher is more likely a member; may be infinite.
        members: who is one; there is at least one of each kind.
        false_positive_rate: in [0, 1].
        least_expected: non-members who may pass, so that the threshold is not one row's luck.
        confidence: of the interval, in (0, 1).

    Returns:
        None where ``false_positive_rate`` of the non-members are fewer than ``least_expected``.

    Raises:
        ValueError: if a number is out of range, a score is NaN, or all rows are of one kind.
    """
    inside, outside = _split(scores, members)
    if not 0 <= false_positive_rate <= 1:
        raise ValueError(f"false_positive_rate must be in [0, 1], got {false_positive_rate}")
    allowed = false_positive_rate * len(outside) + _SLACK
    if allowed < least_expected:
        return None
    passing = math.floor(allowed)
    if passing < len(outside):
        hits = int((inside > np.sort(outside)[::-1][passing]).sum())
    else:
        hits = len(inside)
    return Interval(hits / len(inside), *clopper_pearson(hits, len(inside), confidence))


def balanced_advantage(
    scores: Num[np.ndarray, " rows"], members: Bool[np.ndarray, " rows"]
) -> float:
    """Return the largest difference of both rates over all thresholds, in [0, 1].

    The best threshold is chosen on the same rows, so a few rows without signal give more than 0.

    Args:
        scores: higher is more likely a member; may be infinite.
        members: who is one; there is at least one of each kind.

    Raises:
        ValueError: if a score is NaN, or all rows are of one kind.

    Source:
        Yeom et al., 2018 (membership advantage). https://arxiv.org/abs/1709.01604
    """
    curve = roc(scores, members)
    return float((curve.true_positive_rates - curve.false_positive_rates).max())


def _split(
    scores: Num[np.ndarray, " rows"], members: Bool[np.ndarray, " rows"]
) -> tuple[Num[np.ndarray, " members"], Num[np.ndarray, " others"]]:
    if np.isnan(scores).any():
        raise ValueError(f"scores must be numbers, got NaN for {int(np.isnan(scores).sum())} rows")
    if members.all() or not members.any():
        raise ValueError(
            f"there must be members and others, got {int(members.sum())} members of {len(members)}"
        )
    return scores[members], scores[~members]
