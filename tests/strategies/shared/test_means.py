"""Means of models: weighted, in the models' own types, bit for bit for a single one."""

import numpy as np
import pytest

from strategies.shared.means import WeightedMean


def model(weight, counter=0):
    return {
        "weight": np.array(weight, np.float32),
        "num_batches_tracked": np.array(counter, np.int64),
    }


def test_mean_is_weighted_by_hand():
    mean = WeightedMean()
    mean.add(model([1.0, 10.0]), 1)
    mean.add(model([5.0, -2.0]), 3)
    # (1 + 3 * 5) / 4 and (10 - 3 * 2) / 4
    assert mean.mean()["weight"].tolist() == [4.0, 1.0]


def test_counters_are_rounded_and_stay_counters():
    mean = WeightedMean()
    mean.add(model([0.0], counter=10), 1)
    mean.add(model([0.0], counter=13), 2)
    assert mean.mean()["num_batches_tracked"] == 12
    mean.add(model([0.0], counter=14), 2)
    averaged = mean.mean()["num_batches_tracked"]  # 64 / 5 = 12.8
    assert averaged == 13
    assert averaged.dtype == np.int64
    assert mean.mean()["weight"].dtype == np.float32


def test_the_mean_of_arrays_without_dimensions_has_none_either():
    mean = WeightedMean()
    for scale, counter, flag in ((1.0, 3, True), (4.0, 6, True), (4.0, 9, False)):
        arrays = {"scale": np.float32(scale), "counter": np.int64(counter), "flag": np.bool_(flag)}
        mean.add({name: np.asarray(value) for name, value in arrays.items()}, 1)
    means = mean.mean()
    assert {name: (type(a), a.shape, a.item()) for name, a in means.items()} == {
        "scale": (np.ndarray, (), 3.0),
        "counter": (np.ndarray, (), 6),
        # True for the majority, and not for whatever is more than nothing.
        "flag": (np.ndarray, (), True),
    }
    assert means["flag"].dtype == bool
    mean.add({"scale": means["scale"], "counter": means["counter"], "flag": np.array(False)}, 9)
    assert not mean.mean()["flag"]


def test_one_model_is_its_own_mean_bit_for_bit():
    weights = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    mean = WeightedMean()
    mean.add({"weight": weights}, 17)
    assert mean.mean()["weight"].tobytes() == weights.tobytes()


def test_what_was_added_is_not_written_to():
    first, second = model([1.0, 2.0]), model([3.0, 4.0])
    mean = WeightedMean()
    mean.add(first, 1)
    mean.add(second, 1)
    mean.mean()
    assert first["weight"].tolist() == [1.0, 2.0]
    assert second["weight"].tolist() == [3.0, 4.0]


@pytest.mark.parametrize("weight", [0, -1, float("nan")])
def test_refuses_a_weight_that_is_not_positive(weight):
    with pytest.raises(ValueError, match="weight must be > 0, got"):
        WeightedMean().add(model([1.0]), weight)
