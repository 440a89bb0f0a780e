"""Dropout masks: as good as random ones, and a function of client, step, call, row and unit."""

import numpy as np
import pytest
import torch
from torch import nn

from fedkd.models import ModelSettings, build_model
from fedkd.models.dropout import (
    DropoutStream,
    SeededDropout,
    connect_dropout,
    seed_dropout,
    step_keys,
)


def keys(seed, steps=4):
    return torch.from_numpy(step_keys(seed, steps))


def mask(seed=0, *, step=0, call=0, rows=None, shape=(64, 50), share=0.7, model=0):
    stream = DropoutStream()
    stream.begin(keys(seed)[step], rows=rows, model=model)
    stream.calls += call
    return stream.keep(torch.Size(shape), share)


def agreement(one, other):
    return (one == other).double().mean().item()


def test_hashes_are_splitmix64():
    # First outputs of the reference implementation for state 0.
    from fedkd.models.dropout import _STEP, _mix, _signed

    states = torch.tensor([_signed(count * _STEP) for count in (1, 2, 3)])
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [number % 2**64 for number in _mix(states).tolist()] == expected


@pytest.mark.parametrize("share", [0.1, 0.5, 0.7, 0.95])
def test_the_share_of_kept_units_is_as_asked(share):
    kept = mask(shape=(400, 500), share=share).double()
    deviation = (share * (1 - share) / kept.numel()) ** 0.5
    assert abs(kept.mean().item() - share) < 4 * deviation
    # No row and no unit is favoured: their means spread as those of independent draws.
    for dim in (0, 1):
        spread = kept.mean(dim).std().item() / (share * (1 - share) / kept.shape[dim]) ** 0.5
        assert spread == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"step": 1}, {"call": 1}, {"model": 1}, {"rows": torch.arange(1, 401)}],
    ids=lambda other: next(iter(other)),
)
def test_clients_steps_layers_models_and_rows_drop_independently(other):
    shape = (400, 500)
    # Independent masks with a share of 0.7 agree on 0.7^2 + 0.3^2 of the units.
    assert agreement(mask(shape=shape), mask(shape=shape, **other)) == pytest.approx(
        0.58, abs=4 * (0.58 * 0.42 / 200_000) ** 0.5
    )


def test_neighbouring_units_rows_and_steps_are_uncorrelated():
    kept = torch.stack([mask(step=step, shape=(200, 300)) for step in range(4)]).double() - 0.7
    variance = 0.7 * 0.3
    for dim in range(3):
        length = kept.shape[dim]
        product = kept.narrow(dim, 0, length - 1) * kept.narrow(dim, 1, length - 1)
        correlation = product.mean().item() / variance
        assert abs(correlation) < 4 / product.numel() ** 0.5


def test_a_row_keeps_its_mask_wherever_it_stands():
    whole = mask(shape=(8, 30))
    picked = torch.tensor([5, 0, 7])
    assert torch.equal(mask(rows=picked, shape=(3, 30)), whole[picked])


def test_masks_repeat_and_do_not_touch_torchs_generators():
    before = torch.get_rng_state()
    assert torch.equal(mask(3), mask(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_has_its_own_key_whatever_the_number_of_steps():
    assert np.array_equal(step_keys(9, 3), step_keys(9, 5)[:3])
    assert len(set(step_keys(9, 1000)) | set(step_keys(10, 1000))) == 2000


def test_stacked_clients_drop_what_each_would_drop_alone():
    layer = SeededDropout(0.4)
    layer.stream = DropoutStream()
    inputs = torch.ones(3, 6, 5)
    seeds = (4, 5, 2**62 - 1)

    def dropped(key, rows):
        layer.stream.begin(key)
        return layer(layer(rows))

    stacked = torch.vmap(dropped)(torch.stack([keys(seed)[1] for seed in seeds]), inputs)
    for seed, together in zip(seeds, stacked, strict=True):
        assert torch.equal(dropped(keys(seed)[1], inputs[0]), together)


def test_two_calls_in_one_step_drop_independently_and_the_next_step_starts_over():
    module = nn.Sequential(SeededDropout(0.3), SeededDropout(0.3))
    stream = connect_dropout(module)
    inputs = torch.ones(400, 500)
    results = []
    for _ in range(2):
        stream.begin(keys(1)[0])
        results.append([layer(inputs) != 0 for layer in module])
    first, second = results[0]
    assert agreement(first, second) == pytest.approx(0.58, abs=0.01)
    assert torch.equal(first, results[1][0])
    assert torch.equal(second, results[1][1])


def test_kept_units_are_scaled_up_and_gradients_reach_no_other():
    layer = SeededDropout(0.5)
    layer.stream = DropoutStream()
    layer.stream.begin(keys(1)[0])
    inputs = torch.full((20, 10), 3.0, requires_grad=True)
    output = layer(inputs)
    assert set(output.detach().flatten().tolist()) == {0.0, 6.0}
    output.sum().backward()
    assert torch.equal(inputs.grad, output.detach() / 3)


def test_dropping_everything_leaves_zeros_and_a_gradient_of_zero():
    layer = SeededDropout(1.0)
    layer.stream = DropoutStream()
    layer.stream.begin(keys(1)[0])
    inputs = torch.ones(3, 4, requires_grad=True)
    output = layer(2 * inputs)
    output.sum().backward()
    assert not output.any()
    assert torch.equal(inputs.grad, torch.zeros(3, 4))


def test_without_a_trainer_it_is_ordinary_dropout():
    layer, plain = SeededDropout(0.5), nn.Dropout(0.5)
    results = []
    for module in (layer, plain):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            results.append(module(torch.ones(9, 9)))
    assert torch.equal(*results)
    assert torch.equal(layer.eval()(torch.ones(3, 3)), torch.ones(3, 3))


def test_a_stream_that_ended_leaves_the_layer_ordinary():
    module = nn.Sequential(SeededDropout(0.5))
    stream = connect_dropout(module)
    stream.begin(keys(1)[0])
    first = module(torch.ones(9, 9))
    stream.end()
    assert not torch.equal(module(torch.ones(9, 9)), first)


def test_models_are_built_with_seeded_dropout():
    for name, layers in (("mlp", 1), ("transformer", 2)):
        settings = ModelSettings(name=name, options={"dropout": 0.3})
        model = build_model(settings, input_shape=(1, 8, 8), num_classes=3, seed=0)
        found = [part for part in model.modules() if isinstance(part, nn.Dropout)]
        assert [type(part) for part in found] == [SeededDropout] * layers
        assert {part.p for part in found} == {0.3}
        assert connect_dropout(model) is not None
    plain = build_model(ModelSettings(name="mlp"), input_shape=(1, 8, 8), num_classes=3, seed=0)
    assert connect_dropout(plain) is None


def test_only_plain_dropout_is_exchanged():
    class Special(nn.Dropout):
        pass

    module = nn.Sequential(nn.Dropout(0.2).eval(), Special(0.2), nn.Dropout1d(0.2))
    seed_dropout(module)
    assert [type(part) for part in module] == [SeededDropout, Special, nn.Dropout1d]
    assert not module[0].training
