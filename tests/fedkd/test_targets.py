"""Targets: what an average is, who is in it, and that streaming it changes nothing."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from fedkd.targets import (
    StreamingMean,
    confidence,
    confidence_mask,
    entropy,
    entropy_reduction,
    leave_one_out,
    mean_logit,
    mean_probability,
    soften,
)

PEERS = torch.tensor(
    [
        [[1, 2, 3, 0], [0.5, -1, 0, 2]],
        [[2, 1, 4, -1], [0, 0, 1, 3]],
        [[-4, 3, 1, 1], [2, 0, -1, 1]],
    ],
    dtype=torch.float64,
)
BAD_WEIGHTS = (
    [1.0, 2.0],
    [1.0, 1.0, 0.0],
    [1.0, -1.0, 1.0],
    [1.0, 1.0, math.nan],
    [1, 1, math.inf],
)

quick = settings(max_examples=30, deadline=None, derandomize=True, database=None)


@st.composite
def stacked_with_weights(draw: st.DrawFn) -> tuple[Tensor, list[float]]:
    num_clients = draw(st.integers(2, 5))
    shape = (num_clients, draw(st.integers(1, 3)), draw(st.integers(2, 4)))
    values = draw(hnp.arrays(np.float64, shape, elements=st.floats(-20, 20)))
    weights = draw(st.lists(st.floats(0.1, 10), min_size=num_clients, max_size=num_clients))
    return torch.from_numpy(values), weights


def test_softening_is_one_softmax_of_the_divided_logits():
    softened = soften(PEERS, temperature=4.0)
    torch.testing.assert_close(
        softened, (PEERS / 4).exp() / (PEERS / 4).exp().sum(-1, keepdim=True)
    )
    # (2 ln 3, 0) at T=2 is (3/4, 1/4).
    by_hand = soften(torch.tensor([2 * math.log(3.0), 0.0]), temperature=2.0)
    torch.testing.assert_close(by_hand, torch.tensor([0.75, 0.25]))


def test_softening_looks_at_one_row_at_a_time():
    changed = PEERS.clone()
    changed[:, 1] = -7.0
    changed[2, 1, 0] = 9.0
    assert torch.equal(soften(changed, temperature=2.0)[:, 0], soften(PEERS, temperature=2.0)[:, 0])


def test_average_of_one_client_is_that_client():
    assert torch.equal(
        mean_probability(PEERS[:1], temperature=3.0), soften(PEERS[0], temperature=3.0)
    )
    assert torch.equal(mean_logit(PEERS[:1]), PEERS[0])


def test_averages_of_probabilities_and_of_logits_differ():
    two = torch.tensor([[[math.log(9.0), 0.0]], [[0.0, 0.0]]])  # (9/10, 1/10) and (1/2, 1/2)
    torch.testing.assert_close(mean_probability(two), torch.tensor([[0.7, 0.3]]))
    # Half of ln 9 is ln 3.
    softened = soften(mean_logit(two), temperature=1.0)
    torch.testing.assert_close(softened, torch.tensor([[0.75, 0.25]]))


def test_entropies_of_averages_match_the_reference_values():
    by_probability = mean_probability(PEERS[1:])
    by_logit = soften(mean_logit(PEERS[1:]), temperature=1.0)
    assert entropy(by_probability).mean().item() == pytest.approx(1.05655379, abs=1e-8)
    assert entropy(by_logit).mean().item() == pytest.approx(0.97383023, abs=1e-8)


def test_temperature_is_applied_before_the_average():
    expected = (soften(PEERS[0], temperature=4.0) + soften(PEERS[1], temperature=4.0)) / 2
    torch.testing.assert_close(mean_probability(PEERS[:2], temperature=4.0), expected)


def test_integer_weights_are_repeated_clients():
    repeated = PEERS[[0, 1, 1, 1, 2, 2]]
    torch.testing.assert_close(mean_logit(PEERS, weights=[1, 3, 2]), mean_logit(repeated))
    torch.testing.assert_close(
        mean_probability(PEERS, temperature=2.0, weights=[1, 3, 2]),
        mean_probability(repeated, temperature=2.0),
    )


@quick
@given(case=stacked_with_weights())
def test_weights_count_only_relative_to_each_other(case: tuple[Tensor, list[float]]):
    values, weights = case
    scaled = [1000 * weight for weight in weights]
    torch.testing.assert_close(
        mean_logit(values, weights=scaled), mean_logit(values, weights=weights)
    )
    torch.testing.assert_close(
        leave_one_out(values, weights=scaled), leave_one_out(values, weights=weights)
    )


@quick
@given(case=stacked_with_weights())
def test_leave_one_out_is_the_average_of_the_others(case: tuple[Tensor, list[float]]):
    values, weights = case
    without = leave_one_out(values, weights=weights)
    for k in range(len(values)):
        others = [index for index in range(len(values)) if index != k]
        expected = mean_logit(values[others], weights=[weights[index] for index in others])
        torch.testing.assert_close(without[k], expected, rtol=1e-9, atol=1e-11)


def test_leave_one_out_does_not_move_with_one_s_own_answer():
    changed = PEERS.clone()
    changed[1] += 100.0
    torch.testing.assert_close(leave_one_out(changed)[1], leave_one_out(PEERS)[1])


def test_leave_one_out_of_probabilities_never_dips_below_zero():
    # Others that are all but certain leave 0 after the subtraction; -1e-17 would have no logarithm.
    generator = torch.Generator().manual_seed(0)
    logits = 60 * torch.randn(7, 200, 5, generator=generator, dtype=torch.float64)
    probabilities = soften(logits, temperature=1.0)
    weights = [0.3, 1.1, 7.7, 0.1, 2.9, 1.3, 0.7]
    others = leave_one_out(probabilities, weights=weights)
    assert others.min() >= 0
    assert all(torch.isfinite(entropy(target)).all() for target in others)
    stream = StreamingMean()
    for client, weight in zip(probabilities, weights, strict=True):
        stream.add(client, weight)
    for client, weight in zip(probabilities, weights, strict=True):
        assert stream.without(client, weight).min() >= 0


def test_leave_one_out_needs_another_client():
    with pytest.raises(ValueError, match="needs at least 2 clients, got 1"):
        leave_one_out(PEERS[:1])


def test_an_average_needs_a_client():
    with pytest.raises(ValueError, match="at least 1 client, got 0"):
        mean_logit(PEERS[:0])


@pytest.mark.parametrize("weights", BAD_WEIGHTS)
def test_refuses_weights_that_are_not_one_positive_number_per_client(weights: list[float]):
    for average in (mean_logit, mean_probability, leave_one_out):
        with pytest.raises(
            ValueError, match=r"one positive finite number per client \(3 clients\)"
        ):
            average(PEERS, weights=weights)


def test_sums_of_many_float32_values_are_taken_in_float64():
    # In float32, 2**24 + 1 is 2**24: the small clients would vanish beside the large one.
    values = torch.ones(5, 1, 1)
    values[0] = 2.0**24
    assert leave_one_out(values)[0].item() == 1.0
    assert leave_one_out(values).dtype == torch.float32
    assert mean_logit(values).item() == pytest.approx((2**24 + 4) / 5, rel=1e-7)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_gives_float32_targets(half: torch.dtype):
    logits = PEERS.to(half)
    for target in (
        soften(logits, temperature=2.0),
        mean_probability(logits),
        mean_logit(logits),
        leave_one_out(logits),
        entropy_reduction(logits[0].softmax(-1), temperature=0.1),
        confidence(logits[0].softmax(-1)),
        confidence_mask(logits[0].softmax(-1), 0.5),
        entropy(logits[0].softmax(-1)),
    ):
        assert target.dtype == torch.float32
    torch.testing.assert_close(
        mean_probability(logits).double(), mean_probability(PEERS), rtol=1e-5, atol=0
    )


# --- entropy reduction, confidence, entropy -------------------------------------------------


def test_entropy_reduction_is_a_softmax_of_probabilities():
    # exp(0.6/0.1) : exp(0.4/0.1) = e^2 : 1
    reduced = entropy_reduction(torch.tensor([[0.6, 0.4]], dtype=torch.float64), temperature=0.1)
    share = math.exp(2) / (math.exp(2) + 1)
    torch.testing.assert_close(reduced, torch.tensor([[share, 1 - share]], dtype=torch.float64))


def test_entropy_reduction_sharpens_at_the_published_temperature_and_flattens_at_one():
    mean = mean_probability(PEERS)
    assert (entropy(entropy_reduction(mean, temperature=0.1)) < entropy(mean)).all()
    assert (entropy(entropy_reduction(mean, temperature=1.0)) > entropy(mean)).all()
    assert torch.equal(entropy_reduction(mean, temperature=0.1).argmax(1), mean.argmax(1))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_refuses_a_temperature_that_softens_nothing(temperature: float):
    for call in (
        lambda: soften(PEERS, temperature=temperature),
        lambda: mean_probability(PEERS, temperature=temperature),
        lambda: entropy_reduction(PEERS[0].softmax(-1), temperature=temperature),
    ):
        with pytest.raises(ValueError, match=r"^temperature must be (> 0|finite), got "):
            call()


def test_entropy_is_in_nats_and_finite_for_certainty():
    rows = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    expected = torch.tensor([math.log(4), 0.0, math.log(2)])
    torch.testing.assert_close(entropy(rows), expected)


def test_confidence_is_the_largest_probability_of_each_row():
    rows = torch.tensor([[0.2, 0.7, 0.1], [0.4, 0.3, 0.3]])
    assert torch.equal(confidence(rows), torch.tensor([0.7, 0.4]))


def test_confidence_threshold_is_inclusive():
    rows = torch.tensor([[0.2, 0.7, 0.1], [0.4, 0.3, 0.3], [1.0, 0.0, 0.0]])
    assert torch.equal(confidence_mask(rows, 0.7), torch.tensor([1.0, 0.0, 1.0]))
    assert torch.equal(confidence_mask(rows, 1.0), torch.tensor([0.0, 0.0, 1.0]))


def test_a_higher_threshold_never_keeps_more_rows():
    probabilities = soften(PEERS.flatten(0, 1), temperature=1.0)
    kept = [confidence_mask(probabilities, step / 10).sum().item() for step in range(11)]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == len(probabilities)
    assert kept[-1] == 0


@pytest.mark.parametrize("threshold", [-0.1, math.nan])
def test_refuses_a_threshold_below_zero(threshold: float):
    with pytest.raises(ValueError, match="confidence threshold must be >= 0, got "):
        confidence_mask(PEERS[0].softmax(-1), threshold)


# --- streaming ------------------------------------------------------------------------------


@quick
@given(case=stacked_with_weights())
def test_streaming_agrees_with_the_stacked_functions(case: tuple[Tensor, list[float]]):
    values, weights = case
    stream = StreamingMean()
    for client, weight in zip(values, weights, strict=True):
        stream.add(client.numpy(), weight)
    assert stream.count == len(values)
    torch.testing.assert_close(stream.mean(), mean_logit(values, weights=weights))
    without = torch.stack(
        [stream.without(client, weight) for client, weight in zip(values, weights, strict=True)]
    )
    torch.testing.assert_close(
        without, leave_one_out(values, weights=weights), rtol=1e-9, atol=1e-11
    )


def test_streaming_takes_arrays_and_tensors_of_any_precision():
    read_only = PEERS[0].numpy().copy()
    read_only.flags.writeable = False
    stream = StreamingMean()
    stream.add(read_only)
    stream.add(PEERS[1].numpy().astype(np.float16))
    stream.add(PEERS[2].bfloat16().requires_grad_())
    assert stream.mean().dtype == torch.float64
    assert not stream.mean().requires_grad
    torch.testing.assert_close(stream.mean(), mean_logit(PEERS))


def test_streaming_keeps_no_reference_to_what_it_was_given():
    table = PEERS[0].numpy().copy()
    stream = StreamingMean()
    stream.add(table)
    table[:] = 0.0
    stream.mean()[:] = 0.0
    stream.add(PEERS[1])
    torch.testing.assert_close(stream.mean(), mean_logit(PEERS[:2]))


def test_streaming_in_the_same_order_gives_the_same_bits():
    generator = torch.Generator().manual_seed(0)
    clients = torch.randn(20, 3, 4, generator=generator)
    first, second = StreamingMean(), StreamingMean()
    for client in clients:
        first.add(client, 3)
        second.add(client, 3)
    assert torch.equal(first.mean(), second.mean())


def test_asking_for_the_others_changes_nothing():
    stream = StreamingMean()
    for client in PEERS:
        stream.add(client)
    before = stream.mean()
    stream.without(PEERS[1])
    assert torch.equal(stream.mean(), before)
    assert stream.count == 3


def test_streaming_has_no_mean_of_nothing():
    stream = StreamingMean()
    with pytest.raises(ValueError, match="at least 1 contribution, got 0"):
        stream.mean()
    with pytest.raises(ValueError, match="at least 2 contributions, got 0"):
        stream.without(PEERS[0])
    stream.add(PEERS[0])
    with pytest.raises(ValueError, match="at least 2 contributions, got 1"):
        stream.without(PEERS[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_streaming_refuses_a_value_it_could_never_take_out_again(bad: float):
    stream = StreamingMean()
    stream.add(PEERS[0])
    poisoned = PEERS[1].clone()
    poisoned[1, 2] = bad
    with pytest.raises(ValueError, match="values must be finite"):
        stream.add(poisoned)
    assert stream.count == 1
    assert torch.equal(stream.mean(), PEERS[0])


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_streaming_refuses_a_weight_that_is_not_positive(weight: float):
    stream = StreamingMean()
    with pytest.raises(ValueError, match="weight must be positive and finite, got "):
        stream.add(PEERS[0], weight)


def test_streaming_refuses_another_shape():
    stream = StreamingMean()
    stream.add(PEERS[0])
    with pytest.raises(ValueError, match=r"must have shape \(2, 4\), got \(2, 3\)"):
        stream.add(PEERS[1, :, :3])
    with pytest.raises(ValueError, match="at least 1 row"):
        StreamingMean().add(np.zeros((0, 4)))


def test_streaming_refuses_to_take_out_more_than_it_holds():
    stream = StreamingMean()
    stream.add(PEERS[0], 1.0)
    stream.add(PEERS[1], 2.0)
    with pytest.raises(ValueError, match=r"below the total of all contributions \(3.0\), got 3.0"):
        stream.without(PEERS[0], 3.0)
