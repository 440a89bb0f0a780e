"""Which backend: a rule without a clock, a stop-watch on demand, and one place that opens."""

import math
import time

import numpy as np
import pytest
import torch
from torch import nn

from fedkd.models import ModelSettings
from fedkd.training import (
    LoopCohort,
    Member,
    ModelPool,
    OptimizerSettings,
    Passes,
    Streams,
    VmapCohort,
    VmapUnsupportedError,
    choose_backend,
    measure_backends,
    open_cohort,
)

MLP = ModelSettings(name="mlp", options={"hidden": [8]})
SGD = OptimizerSettings(name="sgd")


class Branching(nn.Module):
    def __init__(self, *, input_shape, num_classes) -> None:
        super().__init__()
        self.scores = nn.Linear(int(np.prod(input_shape)), num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.scores(images.flatten(1))
        return -logits if logits.sum() > 0 else logits


BRANCHING = ModelSettings(name=f"{__name__}:Branching")


def choice(name, *, options=None, shape=(1, 8, 8), members=16, batch_rows=32, device="cpu"):
    return choose_backend(
        ModelSettings(name=name, options=options or {}),
        input_shape=shape,
        num_classes=10,
        members=members,
        batch_rows=batch_rows,
        device=device,
    )


@pytest.mark.parametrize("name", ["mlp", "gru", "lstm", "transformer", "cnn", "lenet", "resnet8"])
def test_many_small_models_on_small_images_are_stacked(name):
    assert choice(name) == "vmap"
    assert choice(name, members=4) == "vmap"
    assert choice(name, members=3) == "loop"


def test_large_maps_and_large_models_are_not_stacked_on_a_cpu():
    assert choice("lenet", shape=(1, 28, 28), batch_rows=10) == "vmap"
    assert choice("lenet", shape=(1, 28, 28), batch_rows=32) == "loop"
    assert choice("cnn", shape=(1, 28, 28), batch_rows=32) == "loop"
    assert choice("mlp", options={"hidden": [256]}) == "vmap"
    assert choice("mlp", options={"hidden": [256, 256]}, shape=(1, 28, 28)) == "loop"
    assert choice("tutorial_teacher") == "loop"


def test_on_a_gpu_only_the_number_of_parameters_counts():
    assert choice("cnn", shape=(1, 28, 28), device="cuda") == "vmap"
    assert choice("mlp", options={"hidden": [2000]}, shape=(1, 28, 28), device="cuda") == "loop"


def test_a_model_of_ones_own_trains_in_the_loop_and_is_not_even_imported():
    assert choice("no_such_package:Model") == "loop"


def test_the_rule_is_asked_for_every_cohort_and_costs_next_to_nothing():
    choice("transformer")
    started = time.perf_counter()
    for _ in range(1000):
        choice("transformer")
    assert time.perf_counter() - started < 0.5


def test_the_rule_leaves_torchs_generators_alone():
    before = torch.get_rng_state()
    choice("mlp", options={"hidden": [17]})
    assert torch.equal(torch.get_rng_state(), before)


def opened(backend, data, model=MLP):
    return open_cohort(
        [Member(0, np.arange(12)), Member(1, np.arange(12, 20))],
        backend=backend,
        model=model,
        optimizer=SGD,
        data=data,
        pool=ModelPool(data, SGD),
        streams=Streams(seed=1),
    )


def test_a_name_opens_its_backend(tensors):
    assert type(opened("loop", tensors())) is LoopCohort
    assert type(opened("vmap", tensors())) is VmapCohort


def test_what_cannot_be_stacked_is_an_error_under_vmap_and_fine_in_the_loop(tensors):
    assert type(opened("loop", tensors(), BRANCHING)) is LoopCohort
    with pytest.raises(VmapUnsupportedError, match="cannot be stacked"):
        opened("vmap", tensors(), BRANCHING)


def measured(data, model):
    return measure_backends(
        [Member(0, np.arange(12)), Member(1, np.arange(12, 20))],
        model=model,
        optimizer=SGD,
        data=data,
        pool=ModelPool(data, SGD),
        passes=Passes(batch_size=4),
        seed=1,
    )


def test_measuring_times_both_and_names_the_faster(tensors):
    times = measured(tensors(), MLP)
    assert 0 < times.loop_s < 60
    assert 0 < times.vmap_s < 60
    assert times.choice == ("vmap" if times.vmap_s < times.loop_s else "loop")
    assert times.reason == ""


def test_measuring_what_cannot_be_stacked_chooses_the_loop_and_says_why(tensors):
    times = measured(tensors(), BRANCHING)
    assert times.choice == "loop"
    assert times.vmap_s == math.inf
    assert "Branching' cannot be stacked" in times.reason
