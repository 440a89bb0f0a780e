"""What each family is, layer by layer."""

import pytest
import torch
from torch import nn

from fedkd.models import ModelSettings, build_model, count_parameters


def build(name, *, input_shape=(1, 8, 8), num_classes=10, **options):
    settings = ModelSettings(name=name, options=options)
    return build_model(settings, input_shape=input_shape, num_classes=num_classes, seed=0)


def layers(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


def filters(model):
    return [(layer.in_channels, layer.out_channels) for layer in layers(model, nn.Conv2d)]


def randomise(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))


def test_mlp_has_the_hidden_widths_it_is_given_and_none_is_a_linear_model():
    widths = [layer.out_features for layer in layers(build("mlp", hidden=[32, 16]), nn.Linear)]
    assert widths == [32, 16, 10]
    assert count_parameters(build("mlp", hidden=[])) == 64 * 10 + 10


def test_dropout_is_off_by_default_and_where_asked_for_acts_in_training_only():
    batch = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for name in ("mlp", "transformer"):
        model = build(name)
        assert torch.equal(model(batch), model(batch))
        model = build(name, dropout=0.5)
        assert not torch.equal(model(batch), model(batch))
        model.eval()
        assert torch.equal(model(batch), model(batch))


def test_cnn_has_one_convolution_per_entry_of_channels():
    assert filters(build("cnn")) == [(1, 16), (16, 32)]
    assert filters(build("cnn", channels=[4, 8, 12], input_shape=(3, 8, 8))) == [
        (3, 4),
        (4, 8),
        (8, 12),
    ]
    assert [layer.num_groups for layer in layers(build("cnn", norm="group"), nn.GroupNorm)] == [
        8,
        8,
    ]


PUBLISHED = {
    # FD: 3x3x32 + 32x3x3x64 + 64x12x12x128 + 128x10, without biases.
    "fd": (
        {
            "channels": [32, 64],
            "padding": "none",
            "halving": "last",
            "hidden": [128],
            "bias": False,
        },
        288 + 18_432 + 1_179_648 + 1_280,
    ),
    # FedProto: 5x5 windows leave 24, 12, 8 and 4 pixels; features of 50.
    "fedproto": (
        {"channels": [10, 20], "kernel": 5, "padding": "none", "hidden": [50]},
        260 + 5_020 + 16_050 + 510,
    ),
    # FedGen's code: every other pixel, 16 maps of 7x7, features of 32.
    "fedgen": (
        {"channels": [6, 16], "halving": "stride", "hidden": [32]},
        60 + 880 + 25_120 + 330,
    ),
    # McMahan et al., 2017: "1,663,370 total parameters".
    "fedavg": ({"channels": [32, 64], "kernel": 5, "hidden": [512]}, 1_663_370),
}


@pytest.mark.parametrize(("options", "parameters"), PUBLISHED.values(), ids=PUBLISHED)
def test_cnn_can_be_the_networks_of_papers(options, parameters):
    model = build("cnn", input_shape=(1, 28, 28), **options)
    assert count_parameters(model) == parameters
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert [layer.out_features for layer in layers(model, nn.Linear)][:-1] == options["hidden"]


@pytest.mark.parametrize("halving", ["pool", "last", "stride"])
@pytest.mark.parametrize("padding", ["same", "none"])
@pytest.mark.parametrize("side", [10, 11, 14])
def test_cnn_maps_are_as_large_as_announced_however_they_are_halved(side, padding, halving):
    model = build(
        "cnn", input_shape=(1, side, side + 1), padding=padding, halving=halving, norm="group"
    )
    assert model(torch.zeros(1, 1, side, side + 1)).shape == (1, 10)


def test_a_cnn_that_leaves_nothing_of_the_image_is_refused():
    with pytest.raises(ValueError, match=r"left of an image of 8x8 .*kernel=5: use padding"):
        build("cnn", kernel=5, padding="none")
    with pytest.raises(ValueError, match=r"kernel must be odd with padding=same, got 4"):
        build("cnn", kernel=4)


@pytest.mark.parametrize("side", [28, 32])
def test_lenet_reaches_the_papers_five_by_five_maps(side):
    model = build("lenet", input_shape=(1, side, side))
    assert filters(model) == [(1, 6), (6, 16)]
    assert [layer.in_features for layer in layers(model, nn.Linear)] == [16 * 5 * 5, 120, 84]
    assert count_parameters(model) == 61_706


def test_lenet_maps_are_as_large_as_announced_for_any_side():
    for height, width in [(8, 40), (9, 31), (13, 20), (64, 10)]:
        model = build("lenet", input_shape=(1, height, width))
        assert model(torch.zeros(1, 1, height, width)).shape == (1, 10)


@pytest.mark.parametrize(("name", "weighted_layers"), [("resnet8", 8), ("resnet20", 20)])
def test_resnets_have_the_layers_of_their_name(name, weighted_layers):
    model = build(name, input_shape=(3, 32, 32))
    assert len(layers(model, (nn.Conv2d, nn.Linear))) == weighted_layers
    assert {layer.out_channels for layer in layers(model, nn.Conv2d)} == {16, 32, 64}
    assert {layer.num_groups for layer in layers(model, nn.GroupNorm)} == {8}
    assert not layers(model, nn.BatchNorm2d)


def test_resnet20_has_the_papers_size():
    # "0.27M" in table 6 of He et al.
    model = build("resnet20", input_shape=(3, 32, 32), norm="batch")
    assert count_parameters(model) == 269_722
    assert len(layers(model, nn.BatchNorm2d)) == 19
    assert not layers(model, nn.GroupNorm)


def test_a_residual_block_without_residual_is_a_smaller_image_with_empty_new_channels():
    model = build("resnet8")
    block = model.blocks[1]
    nn.init.zeros_(block.norm2.weight)
    images = torch.rand(2, 16, 9, 8, generator=torch.Generator().manual_seed(0))
    output = block(images)
    assert output.shape == (2, 32, 5, 4)
    assert torch.equal(output[:, :16], images[:, :, ::2, ::2])
    assert not output[:, 16:].any()


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize(("name", "oracle_type"), [("gru", nn.GRU), ("lstm", nn.LSTM)])
def test_recurrent_layers_compute_what_torchs_own_compute(name, oracle_type, num_layers):
    model = build(name, input_shape=(2, 9, 8), hidden=7, layers=num_layers)
    randomise(model)
    oracle = oracle_type(16, 7, num_layers=num_layers, batch_first=True)
    for depth, layer in enumerate(model.recurrent):
        state = {
            f"weight_ih_l{depth}": layer.from_input.weight,
            f"bias_ih_l{depth}": layer.from_input.bias,
            f"weight_hh_l{depth}": layer.from_state.weight,
            f"bias_hh_l{depth}": layer.from_state.bias,
        }
        oracle.load_state_dict(state, strict=False)
    steps = torch.randn(3, 9, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.recurrent(steps), oracle(steps)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_recurrent_models_read_rows_from_top_to_bottom_with_all_channels(name):
    model = build(name, input_shape=(2, 8, 9))
    images = torch.rand(3, 2, 8, 9, generator=torch.Generator().manual_seed(0))
    rows = torch.stack([images[:, :, row].reshape(3, 18) for row in range(8)], dim=1)
    expected = model.classifier(model.recurrent(rows)[:, -1])
    assert torch.equal(model(images), expected)


def test_transformer_tokens_are_rows_or_patches_in_reading_order():
    image = torch.arange(2 * 8 * 12.0).reshape(1, 2, 8, 12)
    by_rows = build("transformer", input_shape=(2, 8, 12))
    assert torch.equal(by_rows.cut(image)[0, 3], image[0, :, 3].reshape(-1))
    by_patches = build("transformer", input_shape=(2, 8, 12), patch=4)
    tokens = by_patches.cut(image)
    assert tokens.shape == (1, 6, 32)
    assert torch.equal(tokens[0, 4], image[0, :, 4:8, 4:8].reshape(-1))


def test_transformer_patches_must_fill_the_image():
    message = r"model 'transformer\(patch=3\)': patch must divide .* \(8x9\), got 3"
    with pytest.raises(ValueError, match=message):
        build("transformer", input_shape=(1, 8, 9), patch=3)


def test_encoder_block_computes_what_torchs_own_pre_norm_layer_computes():
    block = build("transformer").blocks[0]
    randomise(block)
    oracle = nn.TransformerEncoderLayer(
        32, 4, dim_feedforward=64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    oracle.load_state_dict(
        {
            "self_attn.in_proj_weight": block.queries_keys_values.weight,
            "self_attn.in_proj_bias": block.queries_keys_values.bias,
            "self_attn.out_proj.weight": block.attention_out.weight,
            "self_attn.out_proj.bias": block.attention_out.bias,
            "linear1.weight": block.mlp_in.weight,
            "linear1.bias": block.mlp_in.bias,
            "linear2.weight": block.mlp_out.weight,
            "linear2.bias": block.mlp_out.bias,
            "norm1.weight": block.attention_norm.weight,
            "norm1.bias": block.attention_norm.bias,
            "norm2.weight": block.mlp_norm.weight,
            "norm2.bias": block.mlp_norm.bias,
        }
    )
    tokens = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block(tokens), oracle(tokens), rtol=1e-5, atol=1e-5)


def test_transformer_knows_where_a_row_is():
    model = build("transformer")
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    upside_down = image.flip(2)
    assert not torch.allclose(model(image), model(upside_down))
    nn.init.zeros_(model.positions)
    torch.testing.assert_close(model(image), model(upside_down))


def test_tutorial_teacher_is_two_pairs_of_normalised_convolutions():
    model = build("tutorial_teacher")
    kinds = [type(layer).__name__ for layer in model]
    convolution = ["Conv2d", "BatchNorm2d", "ReLU"]
    assert kinds == [
        *convolution * 2,
        "MaxPool2d",
        *convolution * 2,
        "MaxPool2d",
        "Flatten",
        "Linear",
    ]
    assert filters(model) == [(1, 64), (64, 64), (64, 128), (128, 128)]
    assert [layer.num_features for layer in layers(model, nn.BatchNorm2d)] == [64, 64, 128, 128]
    assert model[-1].in_features == 128 * 2 * 2


def test_tutorial_student_is_a_single_convolution_of_six_filters():
    model = build("tutorial_student")
    assert [type(layer).__name__ for layer in model] == [
        "Conv2d",
        "ReLU",
        "MaxPool2d",
        "Flatten",
        "Linear",
    ]
    assert filters(model) == [(1, 6)]
    assert model[-1].in_features == 6 * 4 * 4
