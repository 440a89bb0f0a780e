"""Payloads in Flower's records: what travels arrives bit for bit, and only payloads do."""

import json

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from fedkd.exchange.payloads import Bundle, ClassTable, Orders, Predictions, Weights
from fedkd.exchange.values import digest
from sim.wire.messages import Told, instruction, read_instruction
from sim.wire.records import read_payload, write_payload


def predictions(values=None, **others):
    values = np.arange(12, dtype=np.float32).reshape(4, 3) if values is None else values
    return Predictions(**{"rows": np.array([0, 2, 5, 6]), "values": values, **others})


def written(payload):
    records = RecordDict()
    write_payload(records, "payload", payload)
    return records


def round_trip(payload):
    return read_payload(written(payload), "payload")


@pytest.mark.parametrize("scale", ["logits", "probabilities"])
@pytest.mark.parametrize("averaged", [True, False])
def test_predictions_survive_a_record_bit_for_bit(scale, averaged):
    awkward = np.array([[-0.0, 1e-42, np.float32(1 / 3)], [3e38, -3e38, 0]] * 2, np.float32)
    sent = predictions(awkward, scale=scale, averaged=averaged, temperature=2.7182818284590455)
    got = round_trip(sent)
    assert (got.scale, got.averaged, got.temperature) == (scale, averaged, 2.7182818284590455)
    assert got.values.tobytes() == awkward.tobytes()
    assert (got.values.dtype, got.values.shape) == (np.float32, (4, 3))
    assert got.rows.tolist() == [0, 2, 5, 6]
    assert got.rows.dtype == np.int64


def test_weights_survive_a_record_bit_for_bit_with_types_shapes_and_order():
    arrays = {
        "b.weight": np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32),
        "a.num_batches_tracked": np.array(7, np.int64),
        "a.bias": np.zeros(0, np.float32),
        "a.turned": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    }
    got = round_trip(Weights(arrays=arrays))
    assert list(got.arrays) == list(arrays)
    for name, array in arrays.items():
        assert got.arrays[name].tobytes() == array.tobytes()
        assert got.arrays[name].dtype == array.dtype
        assert got.arrays[name].shape == array.shape


def test_parts_of_a_bundle_travel_with_it():
    table = ClassTable(values=np.eye(3, dtype=np.float32))
    sent = Bundle(parts={"means": table, "scores": predictions()})
    assert digest(round_trip(sent)) == digest(sent)


def test_nothing_leaves_the_records_as_they_are():
    records = RecordDict({"plan": ConfigRecord({"round": 1})})
    write_payload(records, "payload", None)
    assert list(records) == ["plan"]
    assert read_payload(records, "payload") is None


@pytest.mark.parametrize(
    ("plain", "told"),
    [
        ({"value": "os:system", "fields": {}}, "unknown kind of value 'os:system'"),
        ({"value": "strategies.contract.strategy:Nothing", "fields": {}}, "no payload"),
        ([1, 2], "no part of a value"),
        (7, "no payload, but '7'"),
        (None, "no payload, but 'None'"),
    ],
)
def test_what_is_no_payload_is_named(plain, told):
    records = written(predictions())
    records["payload"]["plain"] = json.dumps(plain)
    records["payload-arrays"].clear()
    with pytest.raises(ValueError, match=told):
        read_payload(records, "payload")


@pytest.mark.parametrize("plain", [7, b"{}", True])
def test_plain_values_are_a_text(plain):
    records = written(predictions())
    records["payload"]["plain"] = plain
    with pytest.raises(ValueError, match="the plain values of a payload are a text"):
        read_payload(records, "payload")


def test_an_instruction_tells_a_client_what_it_receives_and_what_was_decided_for_it():
    orders = Orders(rows=np.array([2, 5]), planned=4, peers=(3,), phase="digest")
    told = instruction(3, Told(predictions(), orders, 2), 4)
    whole = read_instruction(told)
    assert whole.payload is not None
    # Records that were in other hands are read, others handed over as they are.
    over = read_instruction(RecordDict(dict(told.items())))
    assert (over.round, over.attempt, over.since) == (3, 4, 2)
    assert digest(over.payload) == digest(whole.payload)
    assert digest(over.orders) == digest(orders)
    nothing = read_instruction(RecordDict(dict(instruction(1, Told()).items())))
    assert (nothing.payload, nothing.orders) == (None, None)


def test_orders_in_the_place_of_a_payload_are_not_taken_for_orders():
    records = RecordDict(dict(instruction(1, Told()).items()))
    write_payload(records, "orders", predictions())
    with pytest.raises(ValueError, match="expected orders, got predictions"):
        read_instruction(records)
