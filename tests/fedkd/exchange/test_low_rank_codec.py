"""low_rank: how weights changed since they came down, as factors; both sides know what came."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.exchange.codecs import Float16, Float32, LowRankChanges
from fedkd.exchange.factors import saves
from fedkd.exchange.payloads import Bundle, ClassTable, LowRank, Predictions, Weights
from fedkd.exchange.pipeline import ClientTurn, ExchangeState, ServerTurn, Stages, Standing
from fedkd.exchange.values import digest, flatten

RNG = np.random.default_rng(0)
BEFORE = {
    "conv": RNG.normal(size=(8, 2, 3, 3)).astype(np.float32),
    "dense": RNG.normal(size=(12, 20)).astype(np.float32),
    "bias": RNG.normal(size=12).astype(np.float32),
    "seen": np.array(3),
}
ASKED = Weights.asked(BEFORE)


def changed(rank: int, size: float = 0.1, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def change(rows: int, columns: int) -> np.ndarray:
        return size * rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, columns))

    after = dict(BEFORE)
    after["conv"] = (BEFORE["conv"] + change(8, 18).reshape(8, 2, 3, 3)).astype(np.float32)
    after["dense"] = (BEFORE["dense"] + change(12, 20)).astype(np.float32)
    after["bias"], after["seen"] = BEFORE["bias"] + np.float32(1), np.array(9)
    return after


def told(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return flatten(Weights(arrays=arrays)).arrays


def test_changes_of_rank_1_travel_as_factors_and_the_rest_as_it_is():
    codec, after = LowRankChanges(), Weights(arrays=changed(1))
    encoded, _ = codec.encode(after, told(BEFORE), RNG)
    wanted = codec.asked(ASKED)
    assert (encoded.problem(wanted), codec.bad(encoded, wanted)) == (None, None)
    # 1 x (8 + 18 + 1) and 1 x (12 + 20 + 1) numbers, 12 of the bias and a counter of 8 bytes.
    assert encoded.payload_bytes == 4 * (27 + 33 + 12) + 8
    decoded, _ = codec.decode(encoded, told(BEFORE))
    assert decoded.problem(ASKED) is None
    for name, array in after.arrays.items():
        np.testing.assert_allclose(decoded.arrays[name], array, atol=1e-5)
    assert decoded.arrays["bias"].tobytes() == after.arrays["bias"].tobytes()


def test_the_largest_singular_value_is_what_stays_of_a_change_cut_short():
    # Squares 9, 4 and 1 of 14: one is 64 % of them, two are 93 %.
    zero = {"w": np.zeros((9, 9), np.float32)}
    after = {"w": np.diag([3.0, 2, 1, *[0] * 6]).astype(np.float32)}
    for cut, kept in (
        ({"energy": 0.6}, [3, 0, 0]),
        ({"energy": 0.9}, [3, 2, 0]),
        ({"energy": 0.99}, [3, 2, 1]),
        ({"energy": 0.99, "rank": 2}, [3, 2, 0]),
    ):
        codec = LowRankChanges(**cut)
        encoded, _ = codec.encode(Weights(arrays=after), told(zero), RNG)
        found = codec.decode(encoded, told(zero))[0].arrays["w"]
        np.testing.assert_allclose(found, np.diag([*kept, *[0] * 6]), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-6, 1.0), st.none() | st.integers(1, 9), st.integers(1, 8), st.integers(0, 99))
def test_what_is_left_out_is_at_most_its_share_and_bytes_never_grow(energy, rank, of, seed):
    codec, after = LowRankChanges(energy=energy, rank=rank), Weights(arrays=changed(of, seed=seed))
    encoded, _ = codec.encode(after, told(BEFORE), RNG)
    assert encoded.payload_bytes <= after.payload_bytes
    decoded, _ = codec.decode(encoded, told(BEFORE))
    for name in ("conv", "dense"):
        change = (after.arrays[name] - BEFORE[name]).astype(np.float64)
        lost = np.square(decoded.arrays[name] - after.arrays[name].astype(np.float64)).sum()
        allowed = 1.0 if rank is not None else 1 - energy
        assert lost <= allowed * np.square(change).sum() + 1e-6
        sent = encoded.array(f"arrays/{name}")
        rows, columns = (8, 18) if name == "conv" else (12, 20)
        assert sent.shape == (rows, columns) or (
            len(sent) >= 1 and saves(len(sent), rows, columns) and (not rank or len(sent) <= rank)
        )


def test_all_of_the_energy_comes_back_bit_for_bit():
    codec, after = LowRankChanges(energy=1.0), Weights(arrays=changed(12))
    encoded, _ = codec.encode(after, told(BEFORE), RNG)
    assert digest(codec.decode(encoded, told(BEFORE))[0]) == digest(after)


@pytest.mark.parametrize("memory", [{}, {"arrays/dense": np.zeros((3, 3), np.float32)}])
def test_who_received_no_weights_sends_its_own_as_they_are(memory):
    codec, after = LowRankChanges(), Weights(arrays=changed(1))
    encoded, _ = codec.encode(after, memory, RNG)
    assert encoded.payload_bytes == after.payload_bytes
    assert digest(codec.decode(encoded, memory)[0]) == digest(after)


def test_of_several_models_that_came_down_the_first_is_gone_on_from():
    other = {name: np.zeros_like(array) for name, array in BEFORE.items()}
    bundle = Bundle(parts={"model": Weights(arrays=BEFORE), "teacher": Weights(arrays=other)})
    codec, after = LowRankChanges(), Weights(arrays=changed(1))
    received = flatten(bundle).arrays
    encoded, _ = codec.encode(after, received, RNG)
    assert len(encoded.array("arrays/dense")) == 1
    decoded, _ = codec.decode(encoded, received)
    np.testing.assert_allclose(decoded.arrays["dense"], after.arrays["dense"], atol=1e-5)


def test_weights_in_a_bundle_are_coded_and_predictions_beside_them_not():
    rows = Predictions(rows=np.arange(6), values=np.zeros((6, 5), np.float32))
    asked = Bundle.asked(p=Predictions.asked(np.arange(6), 5), w=ASKED)
    codec = LowRankChanges()
    bundle = Bundle(parts={"p": rows, "w": Weights(arrays=changed(1))})
    encoded, _ = codec.encode(bundle, told(BEFORE), RNG)
    wanted = codec.asked(asked)
    assert (encoded.problem(wanted), codec.bad(encoded, wanted)) == (None, None)
    decoded, _ = codec.decode(encoded, told(BEFORE))
    assert decoded["p"].values is rows.values
    assert len(encoded.array("parts/w/arrays/dense")) == 1


def test_what_are_no_weights_is_refused_by_name():
    told = "low_rank: it codes how weights changed since they were received, got {}; use float32"
    for kind in (Predictions, ClassTable, LowRank):
        with pytest.raises(ValueError, match=told.format(kind.kind)):
            Stages(up=LowRankChanges()).check(up=[kind], down=[], sums=None)
    with pytest.raises(ValueError, match="got class_table without any matrix"):
        Stages(up=LowRankChanges()).check_asked(Bundle.asked(b=ClassTable.asked(4)))
    with pytest.raises(ValueError, match=r"exchange.down low_rank: .*nothing came before that"):
        Stages(down=LowRankChanges()).check(up=[Weights], down=[Weights], sums=None)


@pytest.mark.parametrize("shape", [(12, 19), (0, 33), (8, 33), (12, 33), (1, 32), (12, 20, 1)])
def test_numbers_that_are_no_factors_are_refused(shape):
    codec = LowRankChanges()
    encoded, _ = codec.encode(Weights(arrays=changed(1)), told(BEFORE), RNG)
    spoilt = encoded.with_arrays({"coded/arrays/dense": np.zeros(shape, np.float32)})
    wanted = codec.asked(ASKED)
    assert spoilt.problem(wanted) or codec.bad(spoilt, wanted)


def test_a_model_that_diverged_is_named():
    codec = LowRankChanges()
    spoilt = {**changed(1), "dense": np.full((12, 20), np.nan, np.float32)}
    encoded, _ = codec.encode(Weights(arrays=spoilt), told(BEFORE), RNG)
    assert "NaN or infinity in parameter 'dense'" in str(encoded.problem(codec.asked(ASKED)))


@pytest.mark.parametrize("down", [Float32(), Float16()])
def test_both_sides_go_on_from_what_came_down_whatever_happened_before(down):
    """Nothing is remembered: a lost answer, another attempt or a lost state changes nothing."""
    stages = Stages(up=LowRankChanges(energy=0.999), down=down)
    server = ServerTurn(stages, ExchangeState(), seed=0, round=1)
    after = Weights(arrays=changed(1))
    for attempt in (1, 2):
        sent_down = server.send(
            4, "model", lambda key: Weights(arrays=BEFORE), asked=ASKED, attempt=attempt
        ).payload
        client = ClientTurn(stages, seed=0, round=1, attempt=attempt, clients={4: Standing()})
        received = client.open({4: sent_down})[4]
        sent = client.send({4: after})[4]
        assert client.kept() == {}
    decoded = server.receive(4, sent, ASKED)
    assert decoded.problem(ASKED) is None
    np.testing.assert_allclose(decoded.arrays["dense"], after.arrays["dense"], atol=0.1)
    # Where it was rounded on the way down, both go on from what arrived.
    itself, _ = stages.up.decode(sent, flatten(received).arrays)
    assert digest(itself) == digest(decoded)
    assert sent.payload_bytes == 4 * (27 + 33 + 12) + 8
    # A client that nothing was sent to is not taken to have received what others have.
    other = ClientTurn(stages, seed=0, round=1, attempt=1, clients={5: Standing()})
    server.send(5, None, lambda key: after, asked=ASKED)
    whole = other.send({5: after})[5]
    assert digest(server.receive(5, whole, ASKED)) == digest(after)


def test_settings_have_bounds():
    for bad in ({"energy": 0.0}, {"energy": 1.1}, {"rank": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            LowRankChanges(**bad)
