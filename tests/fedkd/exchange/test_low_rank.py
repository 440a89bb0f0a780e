"""Low-rank updates: ranks by energy, factors only where they save bytes, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest

from fedkd.exchange.factors import factors_by_squares, factors_of, rank_of
from fedkd.exchange.payloads import LowRank

VALUES = np.array([3.0, 2.0, 1.0])
RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("energy", "rank"), [(0.6, 1), (0.9, 2), (0.95, 3), (0.98, 3), (1.0, 3)])
def test_ranks_are_those_computed_by_hand(energy, rank):
    # 9, 4 and 1 of 14: shares of .64285714, .92857143 and 1.
    assert rank_of(VALUES, energy) == rank


@pytest.mark.parametrize("energy", [0.95, 0.98, 1.0])
def test_a_rank_is_never_0(energy):
    """Published fault: where no share exceeds the threshold the rank is 0, nothing is sent."""
    assert rank_of(VALUES, energy) == 3
    assert rank_of(np.array([1e-30]), energy) == 1
    assert rank_of(np.zeros(4), energy) == 4


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9, 9), (30, 4), (1, 50)])
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("most", [None, 2])
def test_the_fast_way_to_factors_agrees_with_the_plain_one(shape, energy, most):
    rng = np.random.default_rng(4)
    short = min(shape)
    u, _ = np.linalg.qr(rng.normal(size=(shape[0], short)))
    v, _ = np.linalg.qr(rng.normal(size=(shape[1], short)))
    matrix = (u * 0.5 ** np.arange(short) @ v.T).astype(np.float32)
    plain = factors_of(matrix, energy=energy, most=most)
    fast = factors_by_squares(matrix, energy=energy, most=most)
    assert (plain is None) == (fast is None)
    if plain is not None and fast is not None:
        np.testing.assert_allclose(fast.values, plain.values, rtol=1e-5)
        np.testing.assert_allclose(fast.product(), plain.product(), atol=1e-6)


@pytest.mark.parametrize("size", [1e-25, 1e-12, 1.0, 1e25])
@pytest.mark.parametrize("energy", [0.8, 0.95, 0.999999])
def test_what_is_left_out_is_as_little_at_any_size(size, energy):
    """Single precision holds no squares of 1e-25 or 1e25, and no share of a millionth."""
    rng = np.random.default_rng(6)
    u, _ = np.linalg.qr(rng.normal(size=(120, 120)))
    v, _ = np.linalg.qr(rng.normal(size=(400, 120)))
    matrix = (size * (u * 0.8 ** np.arange(120)) @ v.T).astype(np.float32)
    plain = factors_of(matrix, energy=energy)
    fast = factors_by_squares(matrix, energy=energy)
    assert plain is not None
    assert fast is not None
    assert len(fast.values) == len(plain.values)
    lost = matrix.astype(np.float64) - fast.product()
    share = np.sum((lost / size) ** 2) / np.sum((matrix.astype(np.float64) / size) ** 2)
    assert share <= 1 - energy + 1e-9
    np.testing.assert_allclose(fast.product() / size, plain.product() / size, atol=2e-6)


def test_nothing_has_no_factors_either_way():
    for find in (factors_of, factors_by_squares):
        assert find(np.zeros((12, 20), np.float32), energy=0.9) is None
        assert find(np.zeros((12, 20), np.float32), energy=0.9, most=1).product().max() == 0


def matrices(rank, shape=(12, 20)):
    rows, columns = shape
    change = RNG.normal(size=(rows, rank)) @ RNG.normal(size=(rank, columns))
    before = {"w": RNG.normal(size=shape).astype(np.float32)}
    return before, {"w": (before["w"] + change).astype(np.float32)}


@pytest.mark.parametrize(("rank", "factors"), [(1, True), (7, True), (8, False), (12, False)])
def test_factors_travel_where_they_save_bytes(rank, factors):
    # 12 x 20 numbers are 240; rank x 33 are fewer up to rank 7.
    before, after = matrices(rank)
    sent = LowRank.between(before, after, energy=0.999999, base=1)
    assert (sent.ranks() == {"w": rank}) == factors
    assert sent.payload_bytes == 4 * min(rank * 33 if factors else 240, 240)
    np.testing.assert_allclose(sent.added_to(before)["w"], after["w"], atol=1e-2)


def test_little_energy_keeps_the_largest_singular_value():
    before = {"w": np.zeros((6, 6), np.float32)}
    after = {"w": np.diag([3.0, 2, 1, 0, 0, 0]).astype(np.float32)}
    sent = LowRank.between(before, after, energy=0.6, base=1)
    np.testing.assert_allclose(sent.added_to(before)["w"], np.diag([3.0, 0, 0, 0, 0, 0]), atol=1e-6)


def test_kernels_are_matrices_and_the_rest_travels_as_it_is():
    before = {
        "conv": RNG.normal(size=(8, 4, 3, 3)).astype(np.float32),
        "bias": RNG.normal(size=8).astype(np.float32),
        "bn.num_batches_tracked": np.array(3),
        "mask": np.array([0.0, -np.inf], np.float32),
    }
    change = np.outer(RNG.normal(size=8), RNG.normal(size=36)).reshape(8, 4, 3, 3)
    after = {
        **before,
        "conv": (before["conv"] + change).astype(np.float32),
        "bias": before["bias"] + np.float32(1),
        "bn.num_batches_tracked": np.array(5),
    }
    sent = LowRank.between(before, after, energy=0.9, base=1)
    assert sent.ranks() == {"conv": 1}
    assert set(sent.whole) == {"bias", "bn.num_batches_tracked", "mask"}
    found = sent.added_to(before)
    for name, array in after.items():
        assert found[name].shape == array.shape
        assert found[name].dtype == array.dtype
        np.testing.assert_allclose(found[name], array, atol=1e-5)
    assert sent.problem(LowRank.asked(before, base=1)) is None
    whole = LowRank.itself(after, made=4)
    assert whole.problem(LowRank.asked(before, base=0)) is None
    assert all(np.array_equal(whole.added_to({})[name], array) for name, array in after.items())


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda sent: replace(sent, base=2), "an update of weights 2, expected of 1"),
        (lambda sent: replace(sent, left={}), "neither there as it is nor as three factors"),
        (lambda sent: replace(sent, whole={"w": np.zeros((12, 20), np.float32)}), "neither there"),
        (lambda sent: replace(sent, left={}, values={}, right={}), "neither there as it is"),
        (
            lambda sent: replace(
                sent,
                left={"w": sent.left["w"][:, :0]},
                values={"w": sent.values["w"][:0]},
                right={"w": sent.right["w"][:0]},
            ),
            "'w' has rank 0",
        ),
        (lambda sent: replace(sent, values={"w": np.ones(2, np.float32)}), "has shape"),
        (lambda sent: replace(sent, left={"w": 9 * sent.left["w"]}), "a factor of the change"),
        (lambda sent: replace(sent, right={"v": sent.right["w"]}), "unexpected or missing arrays"),
    ],
)
def test_what_is_no_update_is_named(spoil, reason):
    before, after = matrices(1)
    sent = LowRank.between(before, after, energy=0.9, base=1)
    asked = LowRank.asked(before, base=1)
    assert sent.problem(asked) is None
    assert reason in str(spoil(sent).problem(asked))


def test_a_model_that_diverged_travels_as_it_is_and_is_named():
    before = {"w": np.zeros((9, 9), np.float32)}
    after = {"w": np.full((9, 9), np.nan, np.float32)}
    sent = LowRank.between(before, after, energy=0.9, base=1, made=2)
    told = sent.problem(LowRank.asked(before, base=1))
    assert told is not None
    assert "NaN or infinity in the change of 'w'" in told


def test_a_variance_is_never_negative():
    before = {"running_var": np.array([0.7003], np.float32)}
    sent = LowRank(base=1, made=2, whole={"running_var": np.array([-0.7007], np.float32)})
    assert sent.added_to(before)["running_var"] == 0
