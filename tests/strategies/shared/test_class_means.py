"""Means of classes: by hand, whatever the order of the rows, and when they are collected."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.models import ModelSettings
from fedkd.training import (
    LoopCohort,
    Member,
    ModelPool,
    OptimizerSettings,
    Passes,
    RowOutputs,
    Streams,
    TrainingData,
    supervised,
)
from strategies.contract import Call, Federation
from strategies.shared.class_means import class_means, fit_and_collect, last_pass

MLP = ModelSettings(name="mlp", options={"hidden": [8]})


def test_means_and_counts_by_hand():
    values = np.array([[1.0, 0.0], [0.0, 4.0], [3.0, 2.0]], np.float32)
    means, counts = class_means(values, np.array([2, 0, 2]), 3)
    assert means.tolist() == [[0.0, 4.0], [0.0, 0.0], [2.0, 1.0]]
    assert counts.tolist() == [1.0, 0.0, 2.0]
    assert (means.dtype, counts.dtype) == (np.float32, np.float32)


def test_no_rows_have_no_means():
    means, counts = class_means(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), 3)
    assert means.shape == (3, 4)
    assert not means.any()
    assert not counts.any()


def test_refuses_rows_without_labels():
    with pytest.raises(ValueError, match="means of classes need the labels of the rows"):
        class_means(np.zeros((2, 3), np.float32), None, 3)


@settings(max_examples=50, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=30),
    seed=st.integers(0, 2**16),
)
def test_means_weighted_by_counts_are_the_mean_of_all_rows_in_any_order(labels, seed):
    rng = np.random.default_rng(seed)
    labels = np.array(labels)
    values = rng.normal(size=(len(labels), 3)).astype(np.float32)
    means, counts = class_means(values, labels, 5)
    assert np.allclose(counts @ means / counts.sum(), values.mean(0), atol=1e-5)
    order = rng.permutation(len(labels))
    shuffled, _ = class_means(values[order], labels[order], 5)
    assert np.allclose(means, shuffled, atol=1e-6)


@pytest.fixture
def trained(tiny_data):
    """Train two clients of 12 and 8 rows, each step on all of them; return what was collected."""
    data = tiny_data(rows=(12, 8))
    tensors = TrainingData.from_arrays(data, torch.device("cpu"))
    optimizer = OptimizerSettings(name="sgd", lr=0.5)
    pool = ModelPool(tensors, optimizer)

    def build(collect, *, epochs=1, steps=None, fit=True):
        passes = Passes(batch_size=50, epochs=epochs, steps=steps)
        federation = Federation(
            seed=0,
            rounds=1,
            participation=1.0,
            models=(MLP, MLP),
            local=passes,
            public_size=0,
            rows_per_round=0,
            public_labelled=False,
            num_classes=3,
            input_shape=(1, 8, 8),
            num_examples=(12, 8),
        )
        cohort = LoopCohort(
            [Member(client, data.client_rows[client]) for client in (0, 1)],
            model=MLP,
            optimizer=optimizer,
            data=tensors,
            pool=pool,
            streams=Streams(seed=0),
        )
        if not fit:
            return cohort.outputs(on="private", layers=["penultimate"])
        call = Call(federation, 1)
        return fit_and_collect(cohort, supervised, call, collect, layers=["penultimate"])

    return build


def logits_by_row(outputs):
    order = np.argsort(outputs.rows, kind="stable")
    return outputs.logits[order], outputs.features["penultimate"][order]


@pytest.mark.parametrize(
    ("collect", "epochs", "trained_for"),
    # What a step puts out is what the model says that the steps before it have made.
    [("round", 1, 0), ("last_epoch", 1, 0), ("last_epoch", 3, 2), ("evaluation", 3, 3)],
)
def test_what_is_collected_when(trained, collect, epochs, trained_for):
    expected = (
        trained("evaluation", epochs=trained_for) if trained_for else trained(None, fit=False)
    )
    for own, other in zip(trained(collect, epochs=epochs), expected, strict=True):
        for found, wanted in zip(logits_by_row(own), logits_by_row(other), strict=True):
            assert np.allclose(found, wanted, atol=1e-6)


def test_a_round_is_all_its_passes(trained):
    for own, rows in zip(trained("round", epochs=3), (12, 8), strict=True):
        assert own.logits.shape == (3 * rows, 3)
        assert own.features["penultimate"].shape == (3 * rows, 8)
        assert len(own.rows) == len(own.labels) == 3 * rows


def test_the_last_pass_of_a_short_round_is_all_there_is_of_it(trained):
    first, second = trained("last_epoch", steps=1)
    assert (len(first.logits), len(second.logits)) == (12, 8)


@pytest.mark.parametrize(("seen", "expected"), [(7, [3, 4, 5]), (9, [6, 7, 8]), (2, [0, 1])])
def test_the_last_pass_is_the_last_whole_one(seen, expected):
    # Passes over three rows; the round ends after so many, perhaps in the middle of a pass.
    outputs = RowOutputs(
        rows=np.arange(seen),
        labels=np.arange(seen),
        logits=np.arange(seen, dtype=np.float32)[:, None],
        features={"penultimate": np.arange(seen, dtype=np.float32)[:, None]},
    )
    last = last_pass(outputs, 3)
    for found in (last.rows, last.labels, last.logits[:, 0], last.features["penultimate"][:, 0]):
        assert found.tolist() == expected
