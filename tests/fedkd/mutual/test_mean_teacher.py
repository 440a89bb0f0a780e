"""A running mean of weights: where it starts, what it averages, whom it refuses."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from fedkd.mutual.mean_teacher import update_mean_teacher
from fedkd.mutual.native_ensemble import one_losses

# Distinct sizes for every axis: 3 peers, 5 rows, 4 classes.
_generator = torch.Generator().manual_seed(7)
GATES = torch.softmax(torch.randn(5, 3, generator=_generator, dtype=torch.float64), dim=1)


def one(logits: Tensor, labels: Tensor, **options: object) -> Tensor:
    gates = GATES.to(logits.dtype)[: logits.shape[1]]
    return sum(one_losses(logits, gates, labels, **options).values())


def small_network() -> nn.Sequential:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(generator=generator)
    return network


def test_a_mean_teacher_is_the_plain_average_until_the_decay_sets_in():
    model = small_network()
    mean = copy.deepcopy(model)
    seen = []
    for step in range(4):
        with torch.no_grad():
            model[0].weight.add_(float(step + 1))
            model[1].running_mean.add_(1.0)
            model[1].num_batches_tracked.add_(1)
        seen.append(copy.deepcopy(model))
        update_mean_teacher(mean, model, step=step, decay=0.99)
    weights = torch.stack([each[0].weight for each in seen])
    torch.testing.assert_close(mean[0].weight, weights.mean(0))
    torch.testing.assert_close(mean[1].running_mean, torch.full((4,), 2.5, dtype=torch.float64))
    assert mean[1].num_batches_tracked == 4
    before = mean[0].weight.clone()
    update_mean_teacher(mean, model, step=1000, decay=0.75)
    torch.testing.assert_close(mean[0].weight, 0.75 * before + 0.25 * model[0].weight)


def test_a_mean_teacher_starts_as_a_copy_and_leaves_the_model_alone():
    model, mean = small_network(), small_network()
    with torch.no_grad():
        mean[2].bias.fill_(math.pi)
    before = copy.deepcopy(model.state_dict())
    update_mean_teacher(mean, model, step=0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert torch.equal(mean.state_dict()[name], value)
        assert mean.state_dict()[name].data_ptr() != value.data_ptr()


def test_a_mean_teacher_refuses_itself_and_strangers():
    model = small_network()
    with pytest.raises(ValueError, match=r"share the tensor 0\.weight; average a copy"):
        update_mean_teacher(model, model, step=0)
    one = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(1, 1, bias=False)])
    other = nn.ModuleList([nn.Linear(3, 4), nn.Linear(5, 2), nn.Linear(1, 1)])
    with pytest.raises(ValueError, match=r"differ in 1\.weight, 2\.bias"):
        update_mean_teacher(one, other, step=0)
    with pytest.raises(ValueError, match="step must be >= 0, got -1"):
        update_mean_teacher(copy.deepcopy(model), model, step=-1)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        update_mean_teacher(copy.deepcopy(model), model, step=0, decay=1.0)
