"""Targets: what an average is, who is in it, and that streaming it changes nothing."""

import errno
import math
import tracemalloc
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from fedkd.targets import (
    PredictionSpool,
    StreamingMean,
    confidence,
    confidence_mask,
    coordinate_median,
    entropy,
    entropy_reduction,
    entropy_reduction_by_power,
    leave_one_out,
    mean_logit,
    mean_probability,
    soften,
    streaming,
    trimmed_mean,
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


@pytest.mark.parametrize(
    ("power", "expected"),
    [
        (2.0, [0.01089960, 0.30479358, 0.67872434, 0.00558249]),
        (0.5, [0.14378820, 0.33065272, 0.40391874, 0.12164034]),
        (1.0, [0.06713702, 0.35502569, 0.52978979, 0.04804750]),
    ],
)
def test_entropy_reduction_by_power_keeps_the_ratios_of_logarithms(power, expected):
    mean = torch.tensor([[0.06713702, 0.35502569, 0.52978979, 0.04804750]], dtype=torch.float64)
    sharpened = entropy_reduction_by_power(mean, power=power)
    expected = torch.tensor([expected], dtype=torch.float64)
    torch.testing.assert_close(sharpened, expected, rtol=0, atol=2e-8)


def test_no_power_of_a_row_is_zero_altogether():
    mean = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])
    sharpened = entropy_reduction_by_power(mean, power=100.0)
    torch.testing.assert_close(sharpened, mean)


@pytest.mark.parametrize("power", [0.0, -1.0, math.nan, math.inf])
def test_refuses_a_power_that_is_none(power: float):
    with pytest.raises(ValueError, match="power must be > 0"):
        entropy_reduction_by_power(torch.full((1, 2), 0.5), power=power)


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


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work on three rows of four classes at a time."""
    monkeypatch.setattr(streaming, "BLOCK_VALUES", 12)


def random_tables(num_clients: int, rows: int, classes: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 3, (num_clients, rows, classes)).astype(np.float32)


@pytest.mark.parametrize("rows", [1, 3, 7, 9])
def test_streaming_in_blocks_gives_the_bits_of_the_whole(small_blocks: None, rows: int):
    tables, weights = random_tables(5, rows, 4), [1, 3.7, 0.1, 2, 11]
    stream = StreamingMean()
    total = np.zeros((rows, 4))
    for table, weight in zip(tables, weights, strict=True):
        stream.add(table, weight)
        total += weight * table.astype(np.float64)
    mean = total / sum(weights)
    assert np.array_equal(stream.mean().numpy(), mean)
    others = (total - 3.7 * tables[1].astype(np.float64)) / (sum(weights) - 3.7)
    assert np.array_equal(stream.without(tables[1], 3.7).numpy(), others)
    assert np.array_equal(stream.pop_mean().numpy(), mean.astype(np.float32))


def test_streaming_reads_tables_that_are_not_contiguous(small_blocks: None):
    tables = random_tables(2, 14, 8)
    stream, reference = StreamingMean(), StreamingMean()
    for table in tables:
        stream.add(table[::2, ::2])
        reference.add(table[::2, ::2].copy())
    assert torch.equal(stream.mean(), reference.mean())


def test_a_bad_value_in_the_last_block_leaves_every_block_as_it_was(small_blocks: None):
    stream = StreamingMean()
    good, bad = random_tables(2, 9, 4)
    stream.add(good)
    bad[-1, -1] = np.nan
    with pytest.raises(ValueError, match="values must be finite"):
        stream.add(bad)
    assert np.array_equal(stream.mean().numpy(), good)


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (257, 1), (40, 7)])
def test_popping_the_mean_gives_its_bits_in_float32_and_starts_afresh(
    small_blocks: None, shape: tuple[int, int]
):
    first, second, third = random_tables(3, *shape)
    stream, reference = StreamingMean(), StreamingMean()
    for mean in (stream, reference):
        mean.add(first, 2)
        mean.add(second, 5)
    popped = stream.pop_mean()
    assert popped.dtype == torch.float32
    assert torch.equal(popped, reference.mean().float())
    assert stream.count == 0
    with pytest.raises(ValueError, match="at least 1 contribution, got 0"):
        stream.pop_mean()
    stream.add(third.T.copy())  # another shape: nothing is left of the first mean
    assert np.array_equal(stream.pop_mean().numpy(), third.T)
    assert torch.equal(popped, reference.mean().float())


def test_streaming_holds_two_payloads_and_a_block_however_many_clients():
    rows, classes, num_clients = 20_000, 50, 6
    tables = random_tables(num_clients, rows, classes)
    payload, block = tables[0].nbytes, 8 * streaming.BLOCK_VALUES
    tracemalloc.start()
    try:
        stream = StreamingMean()
        for table in tables:
            stream.add(table)
        mean = stream.pop_mean()
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert mean.shape == (rows, classes)
    assert peak <= 2 * payload + block + 2**15
    assert held <= payload + 2**15


# --- robust rules ---------------------------------------------------------------------------


def slow_trimmed_mean(values: Tensor, drop: int) -> Tensor:
    """Sort each score's clients in plain Python."""
    num_clients, rows, classes = values.shape
    result = torch.empty(rows, classes, dtype=values.dtype)
    for row in range(rows):
        for column in range(classes):
            scores = sorted(values[client, row, column].item() for client in range(num_clients))
            kept = scores[drop : num_clients - drop]
            result[row, column] = sum(kept) / len(kept)
    return result


@quick
@given(case=stacked_with_weights())
def test_robust_rules_agree_with_their_slow_twin(case: tuple[Tensor, list[float]]):
    values, _ = case
    num_clients = len(values)
    torch.testing.assert_close(
        coordinate_median(values), slow_trimmed_mean(values, (num_clients - 1) // 2)
    )
    torch.testing.assert_close(coordinate_median(values), torch.quantile(values, 0.5, dim=0))
    for drop in range((num_clients + 1) // 2):
        torch.testing.assert_close(
            trimmed_mean(values, trim=drop / num_clients), slow_trimmed_mean(values, drop)
        )


def test_robust_rules_by_hand():
    scores = torch.tensor([7.0, -1, 0, 100, 2, 3, 1, 2, -50, 4]).reshape(10, 1, 1)
    assert coordinate_median(scores).item() == 2.0  # between 2 and 2
    assert coordinate_median(scores[:4]).item() == 3.5  # between 0 and 7
    assert coordinate_median(scores[:1]).item() == 7.0
    # Without -50 and 100: (-1 + 0 + 1 + 2 + 2 + 3 + 4 + 7) / 8
    assert trimmed_mean(scores, trim=0.1).item() == 2.25
    assert trimmed_mean(scores, trim=0.19).item() == 2.25  # whole clients only
    assert trimmed_mean(scores, trim=0.0).item() == pytest.approx(6.8)


def test_a_fraction_that_is_a_whole_number_of_clients_trims_that_many():
    # 0.29 * 100 is 28.999999999999996.
    scores = torch.zeros(100, 1, 1)
    scores[:29] = 1e4
    assert trimmed_mean(scores, trim=0.29).item() == 0.0


@pytest.mark.parametrize("lie", [1e4, -1e4, 3e38])
def test_liars_that_are_fewer_than_half_do_not_move_the_median_out_of_the_honest_range(lie: float):
    honest = torch.from_numpy(random_tables(6, 8, 3))
    lies = torch.full((5, 8, 3), lie)
    median = coordinate_median(torch.cat([honest, lies]))
    assert (median >= honest.amin(0)).all()
    assert (median <= honest.amax(0)).all()
    # One more liar is half of them: nothing withstands that.
    broken = coordinate_median(torch.cat([honest, lies, lies[:1]]))
    assert broken.abs().min() > 1e3


def test_a_huge_liar_moves_the_mean_but_hardly_the_robust_rules():
    honest = torch.from_numpy(random_tables(9, 8, 3))
    liar = torch.full((1, 8, 3), 1e4)
    everybody = torch.cat([honest, liar])
    assert (mean_logit(everybody) - mean_logit(honest)).abs().min() > 900
    for rule in (coordinate_median, partial(trimmed_mean, trim=0.1)):
        robust = rule(everybody)
        assert (robust <= honest.amax(0)).all()
        assert (robust >= honest.amin(0)).all()


def test_trimming_fewer_than_the_liars_does_not_help():
    honest = torch.from_numpy(random_tables(8, 4, 3))
    everybody = torch.cat([honest, torch.full((2, 4, 3), 1e4)])
    assert trimmed_mean(everybody, trim=0.1).min() > 1e3
    assert trimmed_mean(everybody, trim=0.2).max() < 20


def test_robust_rules_do_not_depend_on_the_order_of_the_clients():
    values = torch.from_numpy(random_tables(9, 5, 4))
    shuffled = values[torch.randperm(9, generator=torch.Generator().manual_seed(0))]
    assert torch.equal(coordinate_median(values), coordinate_median(shuffled))
    assert torch.equal(trimmed_mean(values, trim=0.2), trimmed_mean(shuffled, trim=0.2))


def test_robust_rules_need_a_client_and_a_sensible_fraction():
    with pytest.raises(ValueError, match="at least 1 client, got 0"):
        coordinate_median(PEERS[:0])
    for trim in (-0.1, 0.5, math.nan):
        with pytest.raises(ValueError, match=r"trim must be in \[0, 0.5\), got "):
            trimmed_mean(PEERS, trim=trim)


@pytest.mark.parametrize("rule", [coordinate_median, partial(trimmed_mean, trim=0.25)])
@pytest.mark.parametrize("chunk_rows", [0, 1, 3, 10, 11, 1000])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_spool_read_in_chunks_gives_the_bits_of_the_stack(rule, chunk_rows: int, dtype):
    tables = random_tables(7, 11, 4).astype(dtype)
    wide = np.promote_types(dtype, np.float32)
    with PredictionSpool(chunk_bytes=chunk_rows * 7 * 4 * wide.itemsize) as spool:
        for table in tables:
            spool.add(table)
        assert spool.count == 7
        assert torch.equal(spool.reduce(rule), rule(torch.from_numpy(tables)))
        assert torch.equal(spool.reduce(rule), rule(torch.from_numpy(tables)))


def test_a_spool_refuses_what_it_could_not_use_and_stays_as_it_was(small_blocks: None):
    tables = random_tables(3, 9, 4)
    with PredictionSpool() as spool:
        with pytest.raises(ValueError, match="at least 1 contribution, got 0"):
            spool.reduce(coordinate_median)
        spool.add(tables[0])
        bad = tables[1].copy()
        bad[-1, -1] = np.inf
        with pytest.raises(ValueError, match="values must be finite"):
            spool.add(bad)
        with pytest.raises(
            ValueError, match=r"float32 of shape \(9, 4\), got float32 of .*\(4, 9\)"
        ):
            spool.add(np.ascontiguousarray(tables[1].T))
        with pytest.raises(ValueError, match=r"must be float32 .* got float64"):
            spool.add(tables[1].astype(np.float64))
        spool.add(tables[1])
        spool.add(torch.from_numpy(tables[2]))
        assert spool.count == 3
        expected = coordinate_median(torch.from_numpy(tables))
        assert torch.equal(spool.reduce(coordinate_median), expected)


def test_a_spool_without_room_names_the_folder_and_keeps_what_it_has(
    tmp_path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
):
    tables = random_tables(3, 9, 4)
    with PredictionSpool(tmp_path) as spool:
        spool.add(tables[0])
        file, writes = spool._file, iter([True, False])

        class Full:
            """Has room for one more block."""

            def write(self, data: memoryview) -> int:
                if not next(writes):
                    raise OSError(errno.ENOSPC, "No space left on device")
                return file.write(data)

            def __getattr__(self, name: str) -> object:
                return getattr(file, name)

        monkeypatch.setattr(spool, "_file", Full())
        with pytest.raises(OSError, match="TMPDIR") as raised:
            spool.add(tables[1])
        assert raised.value.errno == errno.ENOSPC
        assert str(tmp_path) in str(raised.value)
        monkeypatch.undo()
        monkeypatch.setattr(streaming, "BLOCK_VALUES", 12)
        spool.add(tables[2])
        expected = coordinate_median(torch.from_numpy(tables[[0, 2]]))
        assert torch.equal(spool.reduce(coordinate_median), expected)


def test_a_spool_leaves_nothing_behind(tmp_path):
    spool = PredictionSpool(tmp_path)
    spool.add(random_tables(1, 9, 4)[0])
    assert list(tmp_path.iterdir()) == []
    spool.close()


def test_a_spool_holds_a_chunk_of_rows_and_not_the_clients(tmp_path):
    rows, classes, num_clients, chunk = 5000, 20, 20, 2**18
    tables = random_tables(num_clients, rows, classes)
    with PredictionSpool(tmp_path, chunk_bytes=chunk) as spool:
        tracemalloc.start()
        try:
            for table in tables:
                spool.add(table)
            spool.reduce(coordinate_median)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    # Working space for the check of what is added, or the chunk and its sorted copy.
    assert peak <= tables[0].nbytes + 3 * chunk
    assert tables.nbytes > 8 * peak
