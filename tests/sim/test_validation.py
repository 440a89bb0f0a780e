"""Validation: every kind of bad upload is named, and a good one passes."""

from dataclasses import replace

import numpy as np
import pytest

from sim.validation import LARGEST_SCORE, rejection
from strategies.knowledge import Parameters, Predictions


@pytest.fixture
def plan(tiny_settings, tiny_data):
    from sim.engine.runtime import federation_of

    settings = tiny_settings(exchange={"rows_per_round": 6})
    return federation_of(settings, tiny_data()).plan(2)


@pytest.fixture
def good(plan):
    values = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    return Predictions(kind="logits", rows=plan.public_rows, values=values)


def spoilt(values, value):
    values = values.copy()
    values[4, 1] = value
    return values


def test_good_predictions_pass(good, plan):
    assert rejection(good, plan, None) is None
    assert rejection(replace(good, values=spoilt(good.values, LARGEST_SCORE)), plan, None) is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_named(good, plan, value):
    bad = replace(good, values=spoilt(good.values, value))
    assert rejection(bad, plan, None) == "NaN or infinity among the scores"


@pytest.mark.parametrize("value", [2e4, -2e4, 3e38])
def test_scores_that_no_training_gives_are_named(good, plan, value):
    bad = replace(good, values=spoilt(good.values, value))
    expected = f"a score of size {abs(value):g}, expected at most 10000"
    assert rejection(bad, plan, None) == expected


@pytest.mark.parametrize("shape", [(5, 3), (6, 4), (3, 6), (18,), (1, 6, 3), (0, 3)])
def test_another_shape_is_named(good, plan, shape):
    bad = replace(good, values=np.zeros(shape, np.float32))
    assert rejection(bad, plan, None) == f"shape {shape}, expected (6, 3)"


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32])
def test_another_type_is_named(good, plan, dtype):
    bad = replace(good, values=good.values.astype(dtype))
    assert rejection(bad, plan, None) == f"dtype {np.dtype(dtype)}, expected float32"


@pytest.mark.parametrize("change", ["order", "other", "fewer", "earlier round"])
def test_other_rows_are_named(good, plan, change):
    rows = good.rows
    unused = next(row for row in range(20) if row not in rows)
    changed = {
        "order": rows[::-1].copy(),
        "other": np.sort(np.append(rows[:-1], unused)),
        "fewer": rows[:-1],
        "earlier round": plan.federation.plan(1).public_rows,
    }[change]
    expected = "rows are not the 6 public rows of round 2"
    assert rejection(replace(good, rows=changed), plan, None) == expected


@pytest.mark.parametrize("kind", ["mean_logit", "mean_probability"])
def test_predictions_of_another_kind_are_named(good, plan, kind):
    assert rejection(replace(good, kind=kind), plan, None) == f"kind {kind!r}, expected 'logits'"


LAYOUT = {
    "weight": ((2, 3), np.dtype(np.float32)),
    "num_batches_tracked": ((), np.dtype(np.int64)),
}


def parameters(**changes):
    arrays = {
        "weight": np.ones((2, 3), np.float32),
        "num_batches_tracked": np.array(3, np.int64),
        **changes,
    }
    return Parameters({name: array for name, array in arrays.items() if array is not None})


def test_good_parameters_pass(plan):
    assert rejection(parameters(), plan, LAYOUT) is None


def test_the_other_kind_of_knowledge_is_named(plan, good):
    assert rejection(parameters(), plan, None) == "expected predictions, got parameters"
    assert rejection(good, plan, LAYOUT) == "expected parameters, got predictions"


@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_a_parameter_of_another_type_is_named(plan, dtype):
    bad = parameters(weight=np.ones((2, 3), dtype))
    expected = f"parameter 'weight' has dtype {np.dtype(dtype)}, expected float32"
    assert rejection(bad, plan, LAYOUT) == expected


@pytest.mark.parametrize(
    ("changes", "odd"),
    [
        ({"weight": None}, "['weight']"),
        ({"extra": np.zeros(1, np.float32)}, "['extra']"),
    ],
)
def test_missing_and_unexpected_parameters_are_named(plan, changes, odd):
    expected = f"unexpected or missing parameters: {odd}"
    assert rejection(parameters(**changes), plan, LAYOUT) == expected


@pytest.mark.parametrize("shape", [(3, 2), (6,), (1, 2, 3)])
def test_a_parameter_of_another_shape_is_named(plan, shape):
    bad = parameters(weight=np.ones(shape, np.float32))
    expected = f"parameter 'weight' has shape {shape}, expected (2, 3)"
    assert rejection(bad, plan, LAYOUT) == expected


@pytest.mark.parametrize(
    "array",
    [
        np.full((2, 3), np.nan, np.float32),
        np.full((2, 3), np.inf, np.float32),
        np.full((2, 3), "a"),
        np.full((2, 3), 1j, np.complex64),
        np.ones((2, 3), bool),
    ],
    ids=["nan", "infinity", "text", "complex", "bool"],
)
def test_a_parameter_without_numbers_is_named(plan, array):
    reason = rejection(parameters(weight=array), plan, LAYOUT)
    assert reason is not None
    assert "'weight'" in reason
