"""A forecast from few cases: ridge regression, judged on groups of cases that it has not seen.

Cases of one group (federations on one data set) resemble each other more than those of the next
data set will, so a whole group is left out at a time.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

PENALTY = 10.0
"""Ridge penalty on standardised features; set beforehand, never tuned on the cases."""

COVERAGE = 0.8
"""Of what comes, how much an interval is to cover."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """A linear forecast with an interval.

    Attributes:
        intercept: the mean of the outcomes.
        centres, scales: what each feature is standardised with.
        weights: of the standardised features.
        half_width: of the interval that covers `COVERAGE` of outcomes of unseen groups.
    """

    intercept: float
    centres: tuple[float, ...]
    scales: tuple[float, ...]
    weights: tuple[float, ...]
    half_width: float = math.nan

    def at(self, features: Sequence[float] | Float[np.ndarray, " features"]) -> float:
        """Return what is expected at these features."""
        standardised = (np.asarray(features, np.float64) - self.centres) / self.scales
        return float(self.intercept + standardised @ np.asarray(self.weights))

    def to_row(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Forecast":
        """Return what `to_row` wrote."""
        lists = {name: tuple(row[name]) for name in ("centres", "scales", "weights")}
        return cls(intercept=row["intercept"], half_width=row["half_width"], **lists)


def ridge(
    features: Float[np.ndarray, "cases features"],
    outcomes: Float[np.ndarray, " cases"],
    *,
    penalty: int | float = PENALTY,
) -> Forecast:
    """Fit standardised features by least squares with ``penalty * |weights|**2``; no interval.

    A feature that never varies has weight 0.

    Raises:
        ValueError: without cases.

    Source:
        Hoerl, Kennard, 1970.
    """
    if not len(outcomes):
        raise ValueError("a forecast needs at least 1 case, got 0")
    centres, deviations = features.mean(axis=0), features.std(axis=0)
    scales = np.where(deviations > 0, deviations, 1.0)
    standardised = (features - centres) / scales
    mean = float(outcomes.mean())
    normal = standardised.T @ standardised + penalty * np.eye(features.shape[1])
    weights = np.linalg.solve(normal, standardised.T @ (outcomes - mean))
    return Forecast(mean, tuple(centres.tolist()), tuple(scales.tolist()), tuple(weights.tolist()))


def left_out_predictions(
    features: Float[np.ndarray, "cases features"],
    outcomes: Float[np.ndarray, " cases"],
    groups: Sequence[str],
    *,
    penalty: int | float = PENALTY,
) -> Float[np.ndarray, " cases"]:
    """Predict every case by a `ridge` of the other groups.

    Raises:
        ValueError: with fewer than two groups.
    """
    names = np.asarray(groups)
    if len(set(groups)) < 2:
        raise ValueError(f"leaving a group out needs at least 2, got {sorted(set(groups))}")
    predicted = np.empty(len(outcomes))
    for group in sorted(set(groups)):
        inside = names == group
        fitted = ridge(features[~inside], outcomes[~inside], penalty=penalty)
        predicted[inside] = [fitted.at(each) for each in features[inside]]
    return predicted


def half_width(errors: Float[np.ndarray, " cases"], coverage: float = COVERAGE) -> float:
    """Return what a share of absolute errors stays within, with one case more for the next one.

    The ``ceil((n + 1) * coverage)``-th smallest; infinite where there are too few.

    Source:
        Vovk, Gammerman, Shafer, 2005 (conformal prediction); Lei et al., 2018, algorithm 2.
    """
    place = math.ceil(round((len(errors) + 1) * coverage, 9))
    return float(np.sort(np.abs(errors))[place - 1]) if place <= len(errors) else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a forecast was worth on groups that it had not seen.

    Attributes:
        predicted: of each case.
        error: mean absolute error.
        trivial_errors: those of simpler predictors, by name.
        r2: 1 minus the squared error over that of the other groups' mean; below 0 that mean is the
            better forecast.
        widths: half of each case's interval, which knew other groups only.
        covered: share of outcomes within it.
        right_sign: share of cases whose forecast has the sign of the outcome.
        positive: share of outcomes above 0: what always saying "it helps" gets right.
    """

    predicted: Float[np.ndarray, " cases"]
    error: float
    trivial_errors: Mapping[str, float]
    r2: float
    widths: Float[np.ndarray, " cases"]
    covered: float
    right_sign: float
    positive: float


def calibrate(
    features: Float[np.ndarray, "cases features"],
    outcomes: Float[np.ndarray, " cases"],
    groups: Sequence[str],
    *,
    single: Mapping[str, int],
    penalty: int | float = PENALTY,
) -> tuple[Forecast, Calibration]:
    """Fit a forecast with its interval, and say what such a fit was worth on unseen groups.

    Args:
        features: of each case.
        outcomes: what became of it.
        groups: which it belongs to; at least three.
        single: by name of a simpler predictor, the feature that it has alone.
        penalty: see `ridge`.

    Returns:
        The forecast of all cases; its calibration with each group left out in turn, of which the
        intervals come from leaving groups out of the rest.

    Raises:
        ValueError: with fewer than three groups.
    """
    names = np.asarray(groups)
    if len(set(groups)) < 3:
        raise ValueError(f"calibration needs at least 3 groups, got {sorted(set(groups))}")
    predicted = left_out_predictions(features, outcomes, groups, penalty=penalty)
    means, widths = np.empty(len(outcomes)), np.empty(len(outcomes))
    for group in sorted(set(groups)):
        inside = names == group
        rest = names[~inside].tolist()
        inner = left_out_predictions(features[~inside], outcomes[~inside], rest, penalty=penalty)
        means[inside] = outcomes[~inside].mean()
        widths[inside] = half_width(inner - outcomes[~inside])
    alone = {
        name: left_out_predictions(
            features[:, place : place + 1], outcomes, groups, penalty=penalty
        )
        for name, place in single.items()
    }
    errors = predicted - outcomes
    forecast = ridge(features, outcomes, penalty=penalty)
    return (
        replace(forecast, half_width=half_width(errors)),
        Calibration(
            predicted=predicted,
            error=float(np.abs(errors).mean()),
            trivial_errors={
                "no gain": float(np.abs(outcomes).mean()),
                "mean of the others": float(np.abs(means - outcomes).mean()),
                **{name: float(np.abs(own - outcomes).mean()) for name, own in alone.items()},
            },
            r2=1 - float(np.square(errors).sum() / np.square(means - outcomes).sum()),
            widths=widths,
            covered=float((np.abs(errors) <= widths).mean()),
            right_sign=float((np.sign(predicted) == np.sign(outcomes)).mean()),
            positive=float((outcomes > 0).mean()),
        ),
    )
