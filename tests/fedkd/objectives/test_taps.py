"""Layers are tapped by name, and nothing is left behind."""

import pytest
import torch
from torch import nn

from fedkd.models import ModelSettings, build_model
from fedkd.objectives.taps import (
    LAST_MAP,
    PENULTIMATE,
    last_linear,
    layer_shapes,
    resolved_layer,
    tapped,
    vectors,
)


def model_of(name, **options):
    settings = ModelSettings(name=name, options=options)
    return build_model(settings, input_shape=(1, 8, 8), num_classes=3, seed=0)


def hooks_of(model):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def test_a_tapped_layer_gives_what_it_puts_out_with_its_graph():
    model, inputs = model_of("mlp", hidden=[5, 4]), torch.randn(2, 1, 8, 8)
    with tapped(model, ["1", PENULTIMATE]) as features:
        logits = model(inputs)
    assert torch.equal(features["1"], model[1](model[0](inputs)))
    assert torch.equal(last_linear(model)(features[PENULTIMATE]), logits)
    features["1"].sum().backward()
    assert model[1].weight.grad is not None


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_outlives_the_block(fails):
    model = model_of("cnn", channels=[2])
    before = hooks_of(model)
    for _ in range(3):
        try:
            with tapped(model, ["0", PENULTIMATE]):
                assert hooks_of(model) == before + 2
                if fails:
                    raise RuntimeError("of the user's own")
        except RuntimeError:
            pass
        assert hooks_of(model) == before


def test_an_unknown_layer_is_refused_by_name_and_leaves_no_hook():
    model = model_of("mlp", hidden=[5])
    with pytest.raises(ValueError, match=r"no layer '7'.*1, 2, 3"), tapped(model, ["1", "7"]):
        pass
    assert hooks_of(model) == 0


def test_a_dry_run_says_every_layers_shape_and_changes_nothing():
    model = model_of("cnn", channels=[2, 4], norm="batch")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    shapes = layer_shapes(model, torch.randn(2, 1, 8, 8))
    assert shapes["0"] == (2, 8, 8)
    assert resolved_layer(LAST_MAP, shapes, whose="student") == "7"
    assert shapes[PENULTIMATE] == (16,)
    assert all(module.training for module in model.modules())
    assert hooks_of(model) == 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_model_without_maps_or_without_a_linear_layer_says_so():
    shapes = layer_shapes(model_of("mlp", hidden=[5]), torch.randn(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"the teacher has no layer that puts out feature maps"):
        resolved_layer(LAST_MAP, shapes, whose="teacher")
    with pytest.raises(ValueError, match="needs a model with a linear layer"):
        last_linear(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()))


def test_maps_become_vectors_by_their_mean_over_space():
    maps = torch.arange(24.0).reshape(1, 2, 3, 4)
    assert vectors(maps).tolist() == [[5.5, 17.5]]
    assert vectors(torch.ones(2, 3, 4)).shape == (2, 12)
