import math

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from fedkd.metrics.forecast import Forecast, calibrate, half_width, left_out_predictions, ridge


@pytest.fixture
def cases():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 3))
    outcomes = features @ [0.5, -0.2, 0.0] + 0.1 + rng.normal(size=60) * 0.05
    return features, outcomes, [f"group {number % 4}" for number in range(60)]


def test_ridge_agrees_with_sklearn(cases):
    features, outcomes, _ = cases
    scaled = (features - features.mean(0)) / features.std(0)
    oracle = Ridge(alpha=10).fit(scaled, outcomes)
    forecast = ridge(features, outcomes)
    assert forecast.weights == pytest.approx(oracle.coef_, rel=1e-9)
    assert forecast.at(features[7]) == pytest.approx(oracle.predict(scaled[7:8])[0])


def test_ridge_by_hand():
    # Standardised to -1, 1: weight 2 * 1 / (2 + 2) = 1/2 around the mean of 3.
    forecast = ridge(np.array([[0.0], [4.0]]), np.array([2.0, 4.0]), penalty=2)
    assert (forecast.intercept, forecast.weights) == (3.0, (0.5,))
    assert forecast.at([4.0]) == 3.5
    assert forecast.at([8.0]) == 4.5


def test_a_feature_that_never_varies_has_no_weight():
    forecast = ridge(np.array([[1.0, 5.0], [3.0, 5.0]]), np.array([0.0, 1.0]))
    assert forecast.weights[1] == 0


def test_a_forecast_survives_plain_values():
    forecast = Forecast(0.1, (0.0,), (1.0,), (2.0,), 0.3)
    assert Forecast.of_row(forecast.to_row()) == forecast


def test_a_left_out_group_has_no_say_in_its_forecast(cases):
    features, outcomes, groups = cases
    predicted = left_out_predictions(features, outcomes, groups)
    inside = np.array(groups) == "group 2"
    changed = np.where(inside, 100.0, outcomes)
    again = left_out_predictions(features, changed, groups)
    assert again[inside].tolist() == predicted[inside].tolist()
    assert not np.allclose(again[~inside], predicted[~inside])


def test_an_interval_counts_the_next_case_as_one_more():
    errors = np.array([-0.4, 0.1, -0.2, 0.3])
    # ceil(5 * 0.8) = 4, the largest of four; of half of them the third.
    assert half_width(errors) == 0.4
    assert half_width(errors, 0.5) == pytest.approx(0.3)
    assert math.isinf(half_width(errors[:3]))


def test_a_forecast_that_knows_the_law_beats_the_trivial_ones(cases):
    forecast, worth = calibrate(*cases, single={"first": 0})
    assert worth.error < 0.12 < min(worth.trivial_errors.values())
    assert list(worth.trivial_errors) == ["no gain", "mean of the others", "first"]
    assert worth.r2 > 0.9
    assert worth.covered == pytest.approx(0.8, abs=0.15)
    assert worth.right_sign > worth.positive
    assert forecast.half_width == pytest.approx(half_width(worth.predicted - cases[1]))


def test_an_interval_knows_nothing_of_its_own_group(cases):
    features, outcomes, groups = cases
    inside = np.array(groups) == "group 1"
    changed = np.where(inside, 100.0, outcomes)
    (_, before), (_, after) = (
        calibrate(features, each, groups, single={}) for each in (outcomes, changed)
    )
    assert after.widths[inside].tolist() == before.widths[inside].tolist()
    assert (after.widths[~inside] > before.widths[~inside]).all()


def test_a_forecast_of_noise_is_no_better_than_the_mean(cases):
    features, outcomes, groups = cases
    _, worth = calibrate(
        features, np.random.default_rng(1).permutation(outcomes), groups, single={}
    )
    assert worth.r2 < 0.1


def test_too_few_groups_are_refused(cases):
    features, outcomes, _ = cases
    with pytest.raises(ValueError, match="at least 2"):
        left_out_predictions(features, outcomes, ["a"] * 60)
    with pytest.raises(ValueError, match="at least 3"):
        calibrate(features, outcomes, ["a", "b"] * 30, single={})
    with pytest.raises(ValueError, match="at least 1 case"):
        ridge(features[:0], outcomes[:0])
