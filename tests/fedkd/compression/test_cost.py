"""Counts against sums done by hand."""

import pytest
import safetensors.torch
import torch
from torch import nn

from fedkd.compression import (
    PruningSettings,
    measure_cost,
    prune_weights,
    quantise,
    stored_bytes,
)
from fedkd.compression.cost import row_flops
from fedkd.models import ModelSettings, build_model, count_parameters


def test_a_linear_layer_costs_two_operations_per_weight():
    model = nn.Sequential(nn.Flatten(), nn.Linear(2 * 3 * 5, 7), nn.ReLU(), nn.Linear(7, 4))
    cost = measure_cost(model, (2, 3, 5), batch_sizes=(), repeats=1)
    assert cost.flops == 2 * (30 * 7 + 7 * 4)
    assert cost.parameters == 30 * 7 + 7 + 7 * 4 + 4


def test_a_row_to_learn_from_costs_the_backward_pass_too():
    first, last = nn.Linear(30, 7), nn.Linear(7, 4)
    model = nn.Sequential(nn.Flatten(), first, nn.BatchNorm1d(7), nn.ReLU(), last)
    first.weight.grad = torch.ones(7, 30)
    forwards = 2 * (30 * 7 + 7 * 4)
    # Weights of both layers once more, and the gradient by what the second one read.
    assert row_flops(model, (2, 3, 5)) == (2 * forwards + 2 * 7 * 4, forwards)
    assert model.training
    assert first.weight.grad is not None
    assert torch.equal(first.weight.grad, torch.ones(7, 30))
    assert last.weight.grad is None
    last.requires_grad_(requires_grad=False)
    assert row_flops(model, (2, 3, 5)).trained == 2 * forwards + 2 * 7 * 4 - 2 * 7 * 4
    model.requires_grad_(requires_grad=False)
    assert row_flops(model, (2, 3, 5)) == (forwards, forwards)


def test_a_convolution_costs_two_operations_per_weight_and_position():
    strided = nn.Conv2d(3, 4, kernel_size=(3, 5), stride=2, padding=(1, 2))
    grouped = nn.Conv2d(4, 6, kernel_size=1, groups=2)
    model = nn.Sequential(strided, nn.BatchNorm2d(4), grouped)
    cost = measure_cost(model, (3, 8, 10), batch_sizes=(), repeats=1)
    # 8x10 at stride 2 becomes 4x5 positions; a group of the 1x1 layer sees 2 channels.
    assert cost.flops == 2 * (4 * 5) * (4 * 3 * 3 * 5) + 2 * (4 * 5) * (6 * 2)
    assert cost.parameters == (4 * 45 + 4) + (4 + 4) + (6 * 2 + 6)


def test_attention_and_recurrent_cells_are_counted():
    settings = ModelSettings(name="transformer", options={"dim": 8, "heads": 2, "depth": 1})
    model = build_model(settings, input_shape=(1, 8, 8), num_classes=3, seed=0)
    ratio = settings.options["mlp_ratio"]
    # 8 tokens of 8 pixels: embedding, q k v and output, scores and values, MLP, classifier.
    products = 8 * 8 * 8 + 4 * 8 * 8 * 8 + 2 * 8 * 8 * 8 + 2 * ratio * 8 * 8 * 8 + 8 * 3
    assert measure_cost(model, (1, 8, 8), batch_sizes=()).flops == 2 * products

    settings = ModelSettings(name="gru", options={"hidden": 5})
    model = build_model(settings, input_shape=(1, 8, 9), num_classes=3, seed=0)
    # 8 rows: 15 gate values from 9 pixels and from the state of 5.
    products = 8 * 15 * 9 + 8 * 15 * 5 + 5 * 3
    assert measure_cost(model, (1, 8, 9), batch_sizes=()).flops == 2 * products


class Torso(nn.Module):
    """Reads the rows of an image with one of torch's own fused layers."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, images):
        rows = images.flatten(0, 1)
        if isinstance(self.layer, nn.MultiheadAttention):
            return self.layer(rows, rows, rows)[0]
        return self.layer(rows)[0]


@pytest.mark.parametrize(
    ("layer", "products"),
    [
        # 5 rows of 4: four gates of 3 from the row and from the state.
        (nn.LSTM(4, 3, batch_first=True), 5 * (12 * 4 + 12 * 3)),
        (nn.GRU(4, 3, batch_first=True), 5 * (9 * 4 + 9 * 3)),
        # q, k, v and output; scores and values.
        (nn.MultiheadAttention(4, 2, batch_first=True), 4 * 5 * 4 * 4 + 2 * 5 * 5 * 4),
        (
            nn.TransformerEncoderLayer(4, 2, 6, batch_first=True),
            4 * 5 * 4 * 4 + 2 * 5 * 5 * 4 + 2 * 5 * 4 * 6,
        ),
    ],
)
def test_the_fused_kernels_of_torch_are_counted_too(layer, products):
    switches = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    for parameter in layer.parameters():
        parameter.requires_grad = False
    model = Torso(layer)
    assert measure_cost(model, (1, 5, 4), batch_sizes=()).flops == 2 * products
    assert switches == (torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled)


def test_size_is_that_of_the_file(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5))
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    cost = measure_cost(model, (3, 2, 2), batch_sizes=())
    assert cost.size_bytes == path.stat().st_size == stored_bytes(model.state_dict())


def test_int8_weights_count_as_parameters():
    model = build_model(ModelSettings(name="cnn"), input_shape=(1, 8, 8), num_classes=4, seed=0)
    before = measure_cost(model, (1, 8, 8), batch_sizes=())
    after = measure_cost(quantise(model), (1, 8, 8), batch_sizes=())
    assert before.parameters == after.parameters == count_parameters(model)
    assert before.flops == after.flops
    assert after.size_bytes < before.size_bytes / 2


def test_a_pruned_model_is_stored_without_its_masks():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    before = measure_cost(model, (1, 4, 4), batch_sizes=())
    prune_weights(model, PruningSettings(amount=0.5), seed=0)
    after = measure_cost(model, (1, 4, 4), batch_sizes=())
    assert (after.parameters, after.flops, after.size_bytes) == (
        before.parameters,
        before.flops,
        before.size_bytes,
    )


def test_shared_weights_count_once():
    layer = nn.Linear(6, 6)
    model = nn.Sequential(nn.Flatten(), layer, layer)
    cost = measure_cost(model, (1, 2, 3), batch_sizes=())
    assert cost.parameters == 6 * 6 + 6
    assert cost.flops == 2 * 2 * 6 * 6


class Recorder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.calls = []

    def forward(self, images):
        self.calls.append((len(images), self.training, torch.get_num_threads()))
        return self.layer(images.flatten(1))


def test_latency_is_taken_after_warm_up_on_one_thread_in_evaluation_mode():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = Recorder().train()
        cost = measure_cost(model, (1, 2, 2), batch_sizes=(1, 3), warm_up=2, repeats=5)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    flops_call, *timed = model.calls
    assert flops_call[:2] == (1, False)
    assert timed == [(1, False, 1)] * 7 + [(3, False, 1)] * 7
    assert model.training
    assert set(cost.latency_s) == {1, 3}
    assert all(seconds > 0 for seconds in cost.latency_s.values())


def test_measuring_leaves_batch_norm_and_modes_alone():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5))
    model[1].eval()
    measure_cost(model, (1, 4, 4), batch_sizes=(2,), repeats=1)
    assert [part.training for part in model] == [True, False, True]
    assert model[1].num_batches_tracked == 0


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"warm_up": -1}, {"batch_sizes": (0,)}])
def test_impossible_measurements_are_refused(wrong):
    with pytest.raises(ValueError, match="need batch_sizes >= 1, warm_up >= 0 and repeats >= 1"):
        measure_cost(nn.Flatten(), (1, 2, 2), **wrong)
