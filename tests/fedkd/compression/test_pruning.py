"""Pruned weights are zero, and stay zero whatever happens to the model."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from fedkd.compression import (
    PruningSettings,
    apply_masks,
    dense_state,
    load_dense_state,
    make_permanent,
    measure_sparsity,
    prune_weights,
    pruning_masks,
)
from fedkd.models import ModelSettings, build_model, known_models


def network(seed=0, name="cnn", **options):
    settings = ModelSettings(name=name, options=options)
    return build_model(settings, input_shape=(1, 8, 8), num_classes=3, seed=seed)


def pruned(seed=0, **settings):
    model = network(seed)
    prune_weights(model, PruningSettings(**settings), seed=0)
    return model


def train(model, optimizer, steps=3):
    inputs = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), torch.tensor([0, 1, 2, 0, 1, 2])).backward()
        optimizer.step()


def test_the_smallest_of_all_weights_go():
    model = network()
    weights = {name: w.clone() for name, w in model.state_dict().items() if w.ndim > 1}
    prune_weights(model, PruningSettings(amount=0.7), seed=0)
    masks = pruning_masks(model)
    assert masks.keys() == weights.keys()
    kept = torch.cat([weights[name][masks[name]].abs() for name in masks])
    gone = torch.cat([weights[name][~masks[name]].abs() for name in masks])
    assert gone.max() <= kept.min()
    assert len(gone) == round(0.7 * (len(gone) + len(kept)))


def test_layer_by_layer_every_layer_loses_its_share():
    report = measure_sparsity(pruned(amount=0.25, scope="layer"))
    for name, sparsity in report.items():
        assert sparsity.zeros == pytest.approx(0.25 * sparsity.size, abs=1), name
    model = pruned(amount=0.5)
    shares = [sparsity.share for sparsity in measure_sparsity(model).values()]
    assert max(shares) - min(shares) > 0.05


def test_a_random_choice_follows_its_seed_and_no_magnitude():
    settings = PruningSettings(amount=0.5, method="random")
    masks = []
    for seed in (4, 4, 5):
        model = network()
        state = torch.get_rng_state()
        prune_weights(model, settings, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        masks.append(pruning_masks(model))
    first, again, other = masks
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    by_magnitude = pruning_masks(pruned(amount=0.5))
    assert any(not torch.equal(first[name], by_magnitude[name]) for name in first)


@pytest.mark.parametrize(
    "build",
    [
        lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.1),
        lambda parameters: torch.optim.AdamW(parameters, 0.01, weight_decay=0.1),
    ],
)
def test_masks_survive_momentum_and_weight_decay_of_an_optimizer_built_before(build):
    model = network()
    optimizer = build(model.parameters())
    train(model, optimizer)
    prune_weights(model, PruningSettings(amount=0.6), seed=0)
    masks, before = pruning_masks(model), dense_state(model)
    train(model, optimizer, steps=5)
    after = dense_state(model)
    for name, mask in masks.items():
        assert not after[name][~mask].any(), name
        assert not torch.equal(after[name], before[name]), name
    assert measure_sparsity(model)["total"].share == pytest.approx(0.6, abs=1e-3)


def test_the_dense_state_computes_the_same_and_has_plain_names():
    model = pruned(amount=0.6)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    state = dense_state(model)
    plain = network(seed=9)
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    inputs = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain.eval()(inputs), model.eval()(inputs))
    addresses = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert addresses.isdisjoint(tensor.data_ptr() for tensor in state.values())


def test_a_loaded_state_does_not_bring_pruned_weights_back():
    model, full = pruned(amount=0.6), network(seed=5)
    masks = pruning_masks(model)
    load_dense_state(model, full.state_dict())
    assert all(torch.equal(mask, masks[name]) for name, mask in pruning_masks(model).items())
    for name, tensor in dense_state(model).items():
        expected = full.state_dict()[name]
        assert torch.equal(tensor, expected * masks[name] if name in masks else expected), name
    with pytest.raises(RuntimeError, match="Missing key"):
        load_dense_state(network(), {})


@pytest.mark.parametrize("as_arrays", [False, True])
def test_masks_empty_an_average_of_clients_again(as_arrays):
    clients = [pruned(seed, amount=0.6) for seed in (0, 1)]
    masks = pruning_masks(clients[0])
    states = [dense_state(client) for client in clients]
    average = {name: (states[0][name] + states[1][name]) / 2 for name in states[0]}
    assert any(average[name][~mask].any() for name, mask in masks.items())
    if as_arrays:
        average = {name: tensor.numpy() for name, tensor in average.items()}
    masked = apply_masks(average, masks)
    for name, values in masked.items():
        assert values.dtype == average[name].dtype
        if name in masks:
            kept = masks[name].numpy()
            assert not np.asarray(values)[~kept].any()
            np.testing.assert_array_equal(np.asarray(values)[kept], np.asarray(average[name])[kept])
        else:
            assert values is average[name]


def test_masks_that_do_not_fit_are_an_error():
    masks = pruning_masks(pruned(amount=0.5))
    state = network().state_dict()
    with pytest.raises(ValueError, match=r"masked weight '0\.weight' is not in the state"):
        apply_masks({name: value for name, value in state.items() if name != "0.weight"}, masks)
    with pytest.raises(ValueError, match=r"shape \[16, 1, 3, 3\], the weight \[2, 2\]"):
        apply_masks({**state, "0.weight": torch.zeros(2, 2)}, masks)


def test_a_second_pruning_takes_its_share_of_what_is_left():
    model = pruned(amount=0.5)
    first = pruning_masks(model)
    prune_weights(model, PruningSettings(amount=0.5), seed=0)
    assert measure_sparsity(model)["total"].share == pytest.approx(0.75, abs=1e-3)
    for name, mask in pruning_masks(model).items():
        assert not (mask & ~first[name]).any()


def test_permanent_zeros_are_plain_weights():
    model = pruned(amount=0.6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer)
    expected = dense_state(model)
    make_permanent(model)
    assert pruning_masks(model) == {}
    assert model.state_dict().keys() == network().state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert measure_sparsity(model)["total"].share == pytest.approx(0.6, abs=1e-3)
    train(model, optimizer, steps=1)
    assert not torch.equal(model.state_dict()["0.weight"], expected["0.weight"])


def test_amount_zero_changes_nothing():
    model = pruned(amount=0.0)
    assert measure_sparsity(model)["total"].zeros == 0
    for name, tensor in network().state_dict().items():
        assert torch.equal(dense_state(model)[name], tensor), name


@pytest.mark.parametrize("name", known_models())
def test_every_family_can_be_pruned_and_trained(name):
    model = network(name=name)
    prune_weights(model, PruningSettings(amount=0.5), seed=0)
    train(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), steps=2)
    assert measure_sparsity(model)["total"].share == pytest.approx(0.5, abs=1e-2)
    network(seed=1, name=name).load_state_dict(dense_state(model))


def test_a_layer_on_its_own_and_a_layer_used_twice():
    layer = nn.Linear(4, 4)
    prune_weights(layer, PruningSettings(amount=0.5), seed=0)
    assert dense_state(layer).keys() == {"weight", "bias"}
    assert measure_sparsity(layer)["weight"] == (8, 16)

    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, shared)
    prune_weights(model, PruningSettings(amount=0.5), seed=0)
    assert measure_sparsity(model)["total"] == (8, 16)
    plain = nn.Sequential(*[nn.Linear(4, 4)] * 2)
    plain.load_state_dict(dense_state(model))
    assert int((plain[1].weight == 0).sum()) == 8


def test_a_model_without_such_layers_is_an_error():
    with pytest.raises(ValueError, match="needs a linear or convolution layer"):
        prune_weights(nn.Sequential(nn.Flatten()), PruningSettings(), seed=0)
    assert measure_sparsity(nn.Flatten()) == {}


@pytest.mark.parametrize("wrong", [{"amount": 1.0}, {"amount": -0.1}, {"method": "l7"}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        PruningSettings(**wrong)
