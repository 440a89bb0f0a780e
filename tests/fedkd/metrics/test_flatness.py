import copy
import math

import pytest
import torch
from torch import nn

from fedkd.metrics import filter_normalize, line_between, weight_noise_curve
from fedkd.randomness import seeded_torch


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(weights):
    model = nn.Linear(len(weights[0]), len(weights), bias=False)
    model.weight.data = torch.tensor(weights)
    return model


@pytest.fixture(name="network")
def _network():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator())
    # As after training: the statistics have a past that a new estimate must forget.
    model[1].num_batches_tracked.fill_(7)
    model[1].running_mean.fill_(0.3)
    model.train()
    return model


INPUTS = torch.randn(11, 1, 4, 4, generator=generator(1))
LABELS = torch.randint(3, (11,), generator=generator(2))


def judged(model, inputs=INPUTS, labels=LABELS):
    logits = copy.deepcopy(model).eval()(inputs).double()
    loss = nn.functional.cross_entropy(logits, labels).item()
    return loss, (logits.argmax(1) == labels).double().mean().item()


@pytest.mark.parametrize("statistics", [None, INPUTS])
def test_the_model_is_left_as_it_was_bit_for_bit(network, statistics):
    before = copy.deepcopy(network.state_dict())
    weight_noise_curve(
        network, INPUTS, LABELS, sigmas=[0.3], generator=generator(), batch_norm_inputs=statistics
    )
    line_between(network, network, INPUTS, LABELS, positions=[0.5, 2], batch_norm_inputs=statistics)
    after = network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(module.training for module in network.modules())
    assert network[1].momentum == 0.1
    assert all(parameter.grad is None for parameter in network.parameters())


def test_no_noise_is_the_model_itself_without_dropout_and_whatever_the_batch_size(network):
    loss, accuracy = judged(network)
    for batch_size in (4, 256):
        (point,) = weight_noise_curve(
            network, INPUTS, LABELS, sigmas=[0], generator=generator(), batch_size=batch_size
        )
        assert point.loss == pytest.approx(loss)
        assert point.accuracy == pytest.approx(accuracy)
        assert point.loss_std == point.accuracy_std == 0
        assert point.draws == 10


def test_noise_matches_a_loop_that_moves_the_weights_by_hand(network):
    (point,) = weight_noise_curve(
        network, INPUTS, LABELS, sigmas=[0.7], generator=generator(), draws=4
    )
    source, results = generator(), []
    for _ in range(4):
        moved = copy.deepcopy(network)
        for parameter in moved.parameters():
            parameter.data += 0.7 * torch.randn(parameter.shape, generator=source)
        results.append(judged(moved))
    losses, accuracies = torch.tensor(results, dtype=torch.float64).T
    assert point.loss == pytest.approx(losses.mean().item())
    assert point.accuracy == pytest.approx(accuracies.mean().item())
    assert point.loss_std == pytest.approx(losses.std().item())
    assert point.accuracy_std == pytest.approx(accuracies.std().item())


def test_noise_on_a_linear_model_flips_as_many_rows_as_the_normal_distribution_says():
    # The margin of x = 1 is w0 - w1 = 2 with noise of standard deviation sigma sqrt(2).
    model = linear([[1.0], [-1.0]])
    inputs, labels = torch.ones(1, 1), torch.zeros(1, dtype=torch.long)
    sigma = 1.5
    (point,) = weight_noise_curve(
        model, inputs, labels, sigmas=[sigma], generator=generator(), draws=4000
    )
    expected = 0.5 * (1 + math.erf(2 / (sigma * math.sqrt(2)) / math.sqrt(2)))
    # Four standard errors of a share.
    error = 4 * math.sqrt(expected * (1 - expected) / 4000)
    assert point.accuracy == pytest.approx(expected, abs=error)


def test_a_seed_repeats_and_another_sigma_in_the_list_changes_no_point(network):
    def curve(sigmas, seed=0):
        return weight_noise_curve(
            network, INPUTS, LABELS, sigmas=sigmas, generator=generator(seed), draws=3
        )

    assert curve([0.1, 0.4]) == curve([0.1, 0.4])
    assert curve([0.4])[0] == curve([0.1, 0.4, 0.9])[1]
    assert curve([0.4]) != curve([0.4], seed=1)


def test_batch_norm_statistics_are_those_of_the_moved_network(network):
    (point,) = weight_noise_curve(
        network,
        INPUTS,
        LABELS,
        sigmas=[0.5],
        generator=generator(),
        draws=1,
        batch_norm_inputs=INPUTS,
    )
    moved, source = copy.deepcopy(network), generator()
    for parameter in moved.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=source)
    without, _ = judged(moved)
    activations = moved[0](INPUTS)
    moved[1].running_mean = activations.mean(dim=(0, 2, 3)).detach()
    moved[1].running_var = activations.var(dim=(0, 2, 3)).detach()
    expected, _ = judged(moved)
    assert point.loss == pytest.approx(expected, rel=1e-5)
    assert abs(without - expected) > 0.01


def test_a_last_row_does_not_become_a_batch_of_one(network):
    # 11 rows in batches of at most 5: BatchNorm would refuse a single value per channel.
    with seeded_torch(0):
        flat = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 3))
    (point,) = line_between(
        flat, flat, INPUTS, LABELS, positions=[0], batch_norm_inputs=INPUTS, batch_size=5
    )
    assert math.isfinite(point.loss)


def test_filter_normalised_noise_does_not_see_a_scale_that_batch_norm_takes_back():
    norm = nn.BatchNorm1d(6, eps=1e-12)
    with seeded_torch(0):
        small = nn.Sequential(nn.Flatten(), nn.Linear(16, 6, bias=False), norm, nn.Linear(6, 3))
    large = copy.deepcopy(small)
    large[1].weight.data *= 8

    def loss(model, filter_normalized):
        (point,) = weight_noise_curve(
            model,
            INPUTS,
            LABELS,
            sigmas=[0.5],
            generator=generator(),
            filter_normalized=filter_normalized,
            batch_norm_inputs=INPUTS,
        )
        return point.loss

    assert loss(small, True) == pytest.approx(loss(large, True), rel=1e-4)
    assert loss(small, False) != pytest.approx(loss(large, False), rel=1e-2)


def test_a_normalised_filter_has_the_weights_length_and_its_own_direction():
    direction = {"w": torch.tensor([[3.0, 4.0], [0.0, 0.0]]), "b": torch.ones(2)}
    weights = {"w": torch.tensor([[0.0, 10.0], [1.0, 1.0]]), "b": torch.ones(2)}
    normalized = filter_normalize(direction, weights)
    assert normalized["w"].tolist() == [[6, 8], [0, 0]]
    assert normalized["b"].tolist() == [0, 0]


def test_the_line_starts_at_one_model_and_ends_at_the_other(network):
    other = copy.deepcopy(network)
    for value in (*other.parameters(), other[1].running_mean):
        value.data += torch.randn(value.shape, generator=generator(5))
    first, middle, last = line_between(network, other, INPUTS, LABELS, positions=[0, 0.5, 1])
    assert (first.loss, first.accuracy) == pytest.approx(judged(network))
    assert (last.loss, last.accuracy) == pytest.approx(judged(other), rel=1e-4)
    between = copy.deepcopy(network)
    state = other.state_dict()
    for name, value in between.state_dict().items():
        if value.is_floating_point():
            value.copy_((value + state[name]) / 2)
    assert (middle.loss, middle.accuracy) == pytest.approx(judged(between), rel=1e-4)
    assert middle.position == 0.5


def test_a_filter_normalised_line_steps_by_the_first_models_norms():
    first, second = linear([[2.0, 0.0], [0.0, 1.0]]), linear([[2.0, 5.0], [0.0, -1.0]])
    inputs, labels = torch.tensor([[1.0, 1.0]]), torch.tensor([0])
    (point,) = line_between(first, second, inputs, labels, positions=[0.5], filter_normalized=True)
    # Filter 0 moves by (0, 1) x 2 x 1/2, filter 1 by (0, -1) x 1 x 1/2: logits 3 and 0.5.
    assert point.loss == pytest.approx(math.log(1 + math.exp(0.5 - 3)))


def test_models_of_different_architecture_have_no_line():
    with pytest.raises(ValueError, match="differ in name or shape: weight"):
        line_between(
            linear([[1.0]]),
            linear([[1.0], [2.0]]),
            torch.ones(1, 1),
            torch.tensor([0]),
            positions=[0],
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draws": 0}, "draws must be >= 1, got 0"),
        ({"sigmas": [0.1, -1]}, "sigmas must be >= 0 and finite, got -1"),
        ({"sigmas": [math.nan]}, "sigmas must be >= 0 and finite, got nan"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"inputs": INPUTS[:0], "labels": LABELS[:0]}, "at least 1, got 0 and 0"),
        ({"batch_norm_inputs": INPUTS[:1]}, "batch_norm_inputs must have at least 2 rows, got 1"),
    ],
)
def test_settings_out_of_range_are_refused(network, changes, message):
    settings = {"inputs": INPUTS, "labels": LABELS, "sigmas": [0.1], "generator": generator()}
    with pytest.raises(ValueError, match=message):
        weight_noise_curve(network, **(settings | changes))
