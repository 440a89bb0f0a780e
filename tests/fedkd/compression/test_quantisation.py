"""Int8 weights: what rounding may change, what it saves, and that a file gives the model back."""

import pytest
import safetensors.torch
import torch
from torch import nn

from fedkd.compression import (
    PruningSettings,
    QuantisationSettings,
    QuantisedConv2d,
    QuantisedLinear,
    compare_quantised,
    load_quantised,
    make_permanent,
    prune_weights,
    quantise,
    quantised_layers,
    save_quantised,
    stored_bytes,
)
from fedkd.models import ModelSettings, build_model, known_models


def network(name="cnn", seed=0, **options):
    settings = ModelSettings(name=name, options=options)
    return build_model(settings, input_shape=(1, 8, 8), num_classes=10, seed=seed)


def images(rows=9, seed=0):
    return torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_weights_are_rounded_to_steps_of_their_own_channel():
    layer = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.27, -0.5, 0.004], [0.0, 0.0, 0.0]]))
    quantised = QuantisedLinear(layer)
    # The largest of row 0 is 1.27 = 127 steps of 0.01: 127, -50 and 0.4 -> 0. Row 1 is all zeros.
    assert quantised.weight_int8.tolist() == [[127, -50, 0], [0, 0, 0]]
    torch.testing.assert_close(quantised.weight_step[0], torch.tensor([0.01]))
    outputs = quantised(torch.tensor([[1.0, 2.0, 3.0]]))
    torch.testing.assert_close(outputs, torch.tensor([[1.27 - 1.0, 0.0]]))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(7, 5),
        nn.Conv2d(4, 6, kernel_size=(3, 2), stride=2, padding=1, dilation=(1, 2), groups=2),
        nn.Conv2d(3, 5, kernel_size=3, padding="same", bias=False),
    ],
)
def test_a_layer_computes_what_the_float_layer_does_with_rounded_weights(layer):
    quantised = quantise(layer)
    weight = quantised.float_weight(layer.weight)
    step = quantised.weight_step
    assert quantised.weight_int8.dtype == torch.int8
    assert ((weight - layer.weight).abs() <= step / 2 + 1e-7).all()
    assert (quantised.weight_int8.flatten(1).abs().amax(1) == 127).all()
    with torch.no_grad():
        inputs = (
            torch.randn(2, 3, 7) if isinstance(layer, nn.Linear)
            else torch.randn(2, layer.in_channels, 8, 9)
        )  # fmt: skip
        layer.weight.copy_(weight)
        torch.testing.assert_close(quantised(inputs), layer(inputs))


def test_int8_activations_are_whole_numbers_per_row():
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.27, 0.64]]))
        layer.bias.fill_(0.5)
    quantised = QuantisedLinear(layer, activations="int8")
    # Row 0: step 2.54/127 = 0.02, so (2.54, 0.1049) -> (127, 5). Row 1 is zeros: bias alone.
    outputs = quantised(torch.tensor([[2.54, 0.1049], [0.0, 0.0]]))
    expected = (127 * 127 + 5 * 64) * 0.02 * 0.01 + 0.5
    torch.testing.assert_close(outputs, torch.tensor([[expected], [0.5]]))


def test_int8_activations_add_up_as_integers_do():
    # 50,000 products of up to 127^2 exceed by far what float32 adds up exactly.
    layer = nn.Linear(50_000, 3, bias=False)
    inputs = torch.rand(8, 50_000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.weight.copy_(torch.rand(3, 50_000, generator=torch.Generator().manual_seed(1)))
    quantised = QuantisedLinear(layer, activations="int8")
    row_step = inputs.amax(1, keepdim=True) / 127
    whole = (inputs / row_step).round().long()
    sums = whole @ quantised.weight_int8.long().T
    assert sums.min() > 2**24
    expected = sums.float() * row_step * quantised.weight_step.squeeze(1)
    assert torch.equal(quantised(inputs), expected)


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("name", known_models())
def test_every_family_stays_close_and_shrinks(name, activations):
    model = network(name).eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    quantised = quantise(model, QuantisationSettings(activations=activations))
    comparison = compare_quantised(model, quantised, images(40))
    scale = model(images(40)).detach().abs().max()
    assert 0 < comparison.max_logit_difference < 0.1 * scale
    assert comparison.agreement > 0.8
    assert comparison.quantised_bytes < 0.6 * comparison.float_bytes
    assert not quantised.training
    # The float model is the teacher of other comparisons: it must not change.
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    addresses = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert addresses.isdisjoint(t.data_ptr() for t in quantised.state_dict().values())


def test_bytes_are_those_of_int8_weights_and_their_steps():
    quantised = quantise(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    values = sum(t.numel() * t.element_size() for t in quantised.state_dict().values())
    # 640 int8 weights, 10 float32 steps, 10 float32 biases.
    assert values == 640 + 40 + 40
    header = stored_bytes(quantised.state_dict()) - values
    assert 0 < header < 400


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("name", ["resnet8", "transformer"])
def test_a_file_gives_the_same_model_back(name, activations, tmp_path):
    path = tmp_path / "student.safetensors"
    quantised = quantise(network(name), QuantisationSettings(activations=activations))
    save_quantised(quantised, path)
    assert path.stat().st_size == pytest.approx(stored_bytes(quantised.state_dict()), abs=80)
    loaded = load_quantised(path, network(name, seed=7))
    assert quantised_layers(loaded) == quantised_layers(quantised)
    assert torch.equal(loaded(images()), quantised(images()))


def test_other_files_and_other_architectures_are_refused(tmp_path):
    path = tmp_path / "student.safetensors"
    safetensors.torch.save_file(network().state_dict(), path)
    with pytest.raises(ValueError, match="holds no quantised model"):
        load_quantised(path, network())
    save_quantised(quantise(network()), path)
    with pytest.raises(RuntimeError, match="Missing key"):
        load_quantised(path, network("mlp"))


def test_layers_that_cannot_be_int8_stay_float():
    class Scaled(nn.Linear):
        def forward(self, inputs):
            return 2 * super().forward(inputs)

    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(2),
        nn.Conv2d(2, 2, 3),
        nn.Flatten(),
        Scaled(72, 4),
        nn.Linear(4, 3),
    )
    quantised = quantise(model)
    assert quantised_layers(quantised) == ("2", "5")
    assert isinstance(quantised[2], QuantisedConv2d)
    assert isinstance(quantised[4], Scaled)
    assert quantised(images()).shape == (9, 3)


def test_a_layer_used_twice_stays_one_layer():
    shared = nn.Linear(5, 5)
    block = nn.Sequential(shared, nn.ReLU())
    quantised = quantise(nn.Sequential(block, shared, block))
    assert quantised[0][0] is quantised[1]
    assert quantised[2] is quantised[0]


def test_nothing_to_quantise_is_an_error():
    with pytest.raises(ValueError, match="needs a linear or 2-d convolution layer"):
        quantise(nn.Flatten())
    with pytest.raises(ValueError, match="at least one image"):
        compare_quantised(network(), quantise(network()), images(0))


def test_masks_must_be_permanent_and_zeros_stay_zeros():
    model = network()
    prune_weights(model, PruningSettings(amount=0.5), seed=0)
    with pytest.raises(ValueError, match="call make_permanent"):
        quantise(model)
    make_permanent(model)
    zeros = model[0].weight == 0
    assert zeros.any()
    assert not quantise(model)[0].weight_int8[zeros].any()


def test_int8_weights_do_not_train():
    quantised = quantise(network())
    int8 = [p for p in quantised.parameters() if p.dtype == torch.int8]
    assert int8
    assert not any(parameter.requires_grad for parameter in int8)


def test_comparing_leaves_modes_alone():
    model = network("tutorial_student").train()
    compare_quantised(model, quantise(model), images())
    assert all(part.training for part in model.modules())
