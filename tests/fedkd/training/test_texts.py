"""Clients that learn from texts: alone and stacked they compute the same."""

import numpy as np
import pytest
import torch

from fedkd.models import ModelSettings
from fedkd.training import (
    LoopCohort,
    Member,
    ModelPool,
    OptimizerSettings,
    Passes,
    Streams,
    TrainingData,
    VmapCohort,
)
from fedkd.training.gradients import Clipped
from fedkd.training.objectives import supervised

SGD = OptimizerSettings(name="sgd", lr=0.1)


def trained(kind, model, **fit):
    draw = torch.Generator().manual_seed(0)
    data = TrainingData(
        train_inputs=torch.randint(0, 7, (23, 5), generator=draw).float(),
        train_labels=torch.randint(3, (23,), generator=draw),
        public_inputs=torch.empty(0, 5),
        public_labels=None,
        num_classes=3,
        vocabulary=7,
    )
    cohort = kind(
        [Member(0, np.arange(10)), Member(1, np.arange(10, 23))],
        model=ModelSettings(name=model),
        optimizer=SGD,
        data=data,
        pool=ModelPool(data, SGD),
        streams=Streams(seed=7),
    )
    cohort.fit(supervised, private=Passes(batch_size=4), **fit)
    return [state.models["model"].weights for state in cohort.states()]


def difference(one, other):
    return max(
        float(np.abs(mine[name] - their[name]).max())
        for mine, their in zip(one, other, strict=True)
        for name in mine
    )


@pytest.mark.parametrize("model", ["mlp", "gru", "lstm", "transformer"])
def test_a_stack_learns_what_each_client_does_alone(model):
    assert difference(trained(LoopCohort, model), trained(VmapCohort, model)) < 1e-5


@pytest.mark.parametrize("kind", [LoopCohort, VmapCohort], ids=["loop", "vmap"])
def test_norms_of_row_gradients_of_an_embedding_are_those_of_nested_vmap(kind):
    # Texts of 5 tokens out of 7 repeat tokens, whose gradients add up.
    clip = [Clipped(norm=0.2, expected_batch=4.0, method=method) for method in ("norms", "vmap")]
    found = [trained(kind, "mlp", gradient=rule) for rule in clip]
    assert difference(*found) < 1e-6
    assert difference(found[0], trained(kind, "mlp")) > 1e-3
