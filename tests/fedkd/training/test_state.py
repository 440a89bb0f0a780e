"""States: a value that goes to arrays and back, and a digest that sees every bit."""

import numpy as np
import pytest

from fedkd.training import ClientState, ModelState, weights_digest


def state(shift=0.0):
    return ClientState(
        {
            "model": ModelState(
                weights={
                    "0.weight": np.arange(6, dtype=np.float32).reshape(2, 3) + np.float32(shift),
                    "1.num_batches_tracked": np.array(3, dtype=np.int64),
                },
                optimizer={
                    "exp_avg/0.weight": np.full((2, 3), 0.5, np.float32),
                    "step/0.weight": np.array(7.0, dtype=np.float32),
                },
            ),
            "proxy": ModelState(weights={"a.b.c": np.zeros(2, np.float32)}),
        }
    )


def replaced(original, model, name, array):
    models = dict(original.models)
    models[model] = ModelState({**models[model].weights, name: array}, models[model].optimizer)
    return ClientState(models)


def test_a_state_survives_being_flattened_bit_for_bit():
    rebuilt = ClientState.from_arrays(state().to_arrays())
    assert list(rebuilt.models) == ["model", "proxy"]
    for name, model in state().models.items():
        for part in ("weights", "optimizer"):
            before, after = getattr(model, part), getattr(rebuilt.models[name], part)
            assert list(after) == list(before)
            for key, array in before.items():
                assert after[key].dtype == array.dtype
                assert after[key].shape == array.shape
                assert after[key].tobytes() == array.tobytes()


def test_flat_names_tell_model_part_and_array():
    assert set(state().to_arrays()) == {
        "model/weights/0.weight",
        "model/weights/1.num_batches_tracked",
        "model/optimizer/exp_avg/0.weight",
        "model/optimizer/step/0.weight",
        "proxy/weights/a.b.c",
    }


def test_a_model_without_optimizer_slots_has_none_after_the_way_back():
    assert ClientState.from_arrays(state().to_arrays()).models["proxy"].optimizer == {}


def test_equal_weights_have_equal_digests():
    assert weights_digest([state(), state(1)]) == weights_digest([state(), state(1)])


def test_digest_does_not_depend_on_the_order_of_names():
    models = state().models
    turned = ClientState(
        {
            name: ModelState(dict(reversed(models[name].weights.items())))
            for name in reversed(models)
        }
    )
    assert weights_digest([turned]) == weights_digest([state()])


def test_digest_does_not_depend_on_how_an_array_lies_in_memory():
    weights = state().models["model"].weights["0.weight"]
    turned = replaced(state(), "model", "0.weight", np.asfortranarray(weights))
    assert weights_digest([turned]) == weights_digest([state()])


@pytest.mark.parametrize("byte", range(24))
def test_digest_sees_a_single_bit(byte):
    raw = bytearray(state().models["model"].weights["0.weight"].tobytes())
    raw[byte] ^= 1 << (byte % 8)
    changed = np.frombuffer(bytes(raw), np.float32).reshape(2, 3)
    other = replaced(state(), "model", "0.weight", changed)
    assert weights_digest([other]) != weights_digest([state()])


@pytest.mark.parametrize(
    "other",
    [
        [state(1), state()],
        [state()],
        [state(), state(1), state()],
        [replaced(state(), "model", "0.weight", np.arange(6, dtype=np.float32)), state(1)],
        [replaced(state(), "proxy", "a.b.c", np.zeros(2, np.int32)), state(1)],
        [replaced(state(), "proxy", "a.b.d", np.zeros(2, np.float32)), state(1)],
    ],
    ids=["order", "fewer", "more", "shape", "dtype", "name"],
)
def test_digest_sees_clients_order_shapes_types_and_names(other):
    assert weights_digest(other) != weights_digest([state(), state(1)])


def test_digest_is_of_weights_only():
    models = {name: ModelState(model.weights) for name, model in state().models.items()}
    assert weights_digest([ClientState(models)]) == weights_digest([state()])
