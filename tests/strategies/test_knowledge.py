"""Knowledge: what travels, how many bytes it has, and who gets which piece."""

import json

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from strategies.knowledge import (
    Broadcast,
    Parameters,
    Predictions,
    read_knowledge,
    write_knowledge,
)
from strategies.memory import Memory, recall_broadcast, remember_broadcast


def predictions(values=None, **others):
    values = np.arange(12, dtype=np.float32).reshape(4, 3) if values is None else values
    return Predictions(
        **{"kind": "logits", "rows": np.array([0, 2, 5, 6]), "values": values, **others}
    )


def round_trip(knowledge):
    records = RecordDict()
    write_knowledge(records, knowledge)
    return read_knowledge(records)


@pytest.mark.parametrize("kind", ["logits", "mean_logit", "mean_probability"])
def test_predictions_survive_a_record_bit_for_bit(kind):
    awkward = np.array([[-0.0, 1e-42, np.float32(1 / 3)], [3e38, -3e38, 0]] * 2, np.float32)
    sent = predictions(awkward, kind=kind, temperature=2.7182818284590455)
    got = round_trip(sent)
    assert (got.kind, got.temperature) == (kind, 2.7182818284590455)
    assert got.values.tobytes() == awkward.tobytes()
    assert (got.values.dtype, got.values.shape) == (np.float32, (4, 3))
    assert got.rows.tolist() == [0, 2, 5, 6]
    assert got.rows.dtype == np.int64


def test_parameters_survive_a_record_bit_for_bit_with_types_shapes_and_order():
    arrays = {
        "b.weight": np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32),
        "a.num_batches_tracked": np.array(7, np.int64),
        "a.bias": np.zeros(0, np.float32),
        "a.turned": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    }
    got = round_trip(Parameters(arrays))
    assert list(got.arrays) == list(arrays)
    for name, array in arrays.items():
        assert got.arrays[name].tobytes() == array.tobytes()
        assert got.arrays[name].dtype == array.dtype
        assert got.arrays[name].shape == array.shape


def test_nothing_leaves_the_record_as_it_is():
    records = RecordDict({"plan": ConfigRecord({"round": 1})})
    write_knowledge(records, None)
    assert list(records) == ["plan"]
    assert read_knowledge(records) is None


def test_an_unknown_kind_is_named():
    records = RecordDict()
    write_knowledge(records, predictions())
    records.config_records["knowledge"]["kind"] = "gradients"
    with pytest.raises(ValueError, match="unknown kind of knowledge 'gradients'"):
        read_knowledge(records)


def test_bytes_are_those_of_the_values():
    # 4 rows x 3 classes x 4 bytes; both sides know the rows.
    assert predictions().payload_bytes == 48
    # Stacked for three members: each member receives one table.
    assert predictions(np.zeros((3, 4, 3), np.float32)).payload_bytes == 48
    parameters = Parameters({"w": np.zeros((5, 2), np.float32), "n": np.array(1, np.int64)})
    assert parameters.payload_bytes == 5 * 2 * 4 + 8


def test_a_broadcast_knows_who_receives_what():
    shared, own = predictions(), predictions()
    broadcast = Broadcast(shared, personal={1: own, 2: None})
    assert broadcast.to(0) is shared
    assert broadcast.to(1) is own
    assert broadcast.to(2) is None
    assert list(map(id, broadcast)) == [id(own), id(shared)]


def test_an_empty_broadcast_reaches_nobody():
    assert Broadcast().to(0) is None
    assert list(Broadcast()) == []
    assert list(Broadcast(personal={0: None})) == []


@pytest.mark.parametrize("kind", ["logits", "mean_logit"])
def test_logits_become_soft_labels_at_their_temperature(kind):
    values = np.log(np.array([[4.0, 1.0, 1.0]], np.float32))
    piece = Predictions(kind=kind, rows=np.array([0]), values=values, temperature=2.0)
    # Square roots of the odds: 2, 1, 1.
    assert np.allclose(piece.probabilities(), [[0.5, 0.25, 0.25]])
    soft = Predictions(kind="mean_probability", rows=np.array([0]), values=values, temperature=2.0)
    assert soft.probabilities() is soft.values


# -- memory ------------------------------------------------------------------------------------


def test_who_has_no_entry_of_its_own_receives_what_its_architecture_does():
    mine, theirs, everybody = (predictions(temperature=float(t)) for t in (1, 2, 3))
    broadcast = Broadcast(
        everybody,
        {0: mine, 4: None},
        {"mlp": theirs, "gru": None},
        ("mlp", "mlp", "cnn", "gru") * 2,
    )
    received = [broadcast.to(client) for client in range(5)]
    assert received == [mine, theirs, everybody, None, None]
    assert list(broadcast) == [mine, theirs, everybody]


@pytest.mark.parametrize(
    "broadcast",
    [
        Broadcast(),
        Broadcast(predictions(kind="mean_logit")),
        Broadcast(None, {3: predictions(temperature=1 / 3), 1: None}),
        Broadcast(
            None, {}, {"a/b": Parameters({"0.w": np.float32([1, 2]), "n": np.array(7)})}, ("a/b",)
        ),
    ],
)
def test_a_broadcast_is_remembered_bit_for_bit(broadcast, same_knowledge):
    flat = remember_broadcast(broadcast)
    memory = Memory(flat.arrays, json.loads(json.dumps(flat.values)))
    again = recall_broadcast(memory, broadcast.architectures)
    assert again.personal.keys() == broadcast.personal.keys()
    assert again.by_architecture.keys() == broadcast.by_architecture.keys()
    assert again.architectures == broadcast.architectures
    for client in [*broadcast.personal, *range(len(broadcast.architectures)), *broadcast.personal]:
        assert same_knowledge(again.to(client), broadcast.to(client))
    assert same_knowledge(again.shared, broadcast.shared)


def test_what_clients_share_is_remembered_once_and_shared_again():
    piece = predictions()
    memory = remember_broadcast(Broadcast(piece, {1: piece, 2: predictions()}))
    assert len(memory.values["pieces"]) == 2
    again = recall_broadcast(memory, ())
    assert again.to(1) is again.to(0)
    assert again.to(1) is not again.to(2)


@pytest.mark.parametrize("personal", [(), (1,), (0, 1), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("of_architectures", [(), ("mlp",), ("mlp", "cnn")])
def test_what_is_received_is_what_asking_every_client_would_find(personal, of_architectures):
    def piece():
        return Predictions(kind="logits", rows=np.arange(1), values=np.zeros((1, 2), np.float32))

    broadcast = Broadcast(
        piece(),
        personal={client: piece() if client else None for client in personal},
        by_architecture={key: piece() for key in of_architectures},
        architectures=("mlp", "cnn", "mlp"),
    )
    asked = {id(broadcast.to(client)) for client in range(3)} - {id(None)}
    received = broadcast.received(3)
    assert {id(each) for each in received} == asked
    assert len(received) == len(asked)
