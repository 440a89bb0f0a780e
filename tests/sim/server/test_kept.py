"""A server's state from a checkpoint is looked into, whatever kinds of payload it holds."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from fedkd.exchange.ledger import Charge, Cost, Ledger
from fedkd.exchange.payload import Extent, Payload
from fedkd.exchange.payloads import (
    Bundle,
    ClassTable,
    Orders,
    Predictions,
    Prototypes,
    RowFeatures,
    RowLogits,
    Weights,
)
from fedkd.exchange.pipeline import ExchangeState
from fedkd.exchange.values import Value
from sim.contract.toy import toy_data, toy_parts, toy_settings
from sim.server.kept import check_clients, check_exchange, check_kept

EXTENT = Extent(clients=4, public_rows=20, classes=3)


@dataclass(frozen=True)
class State(Value):
    pieces: Mapping[int, Payload] = field(default_factory=dict)


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


GOOD: dict[str, Payload] = {
    "predictions": Predictions(rows=np.array([2, 5]), values=zeros(2, 3), weights=zeros(2)),
    "class_table": ClassTable(values=zeros(3, 3), counts=zeros(3)),
    "prototypes": Prototypes(
        classes=np.array([0, 2]), values=zeros(2, 7), num_classes=3, counts=zeros(2)
    ),
    "row_features": RowFeatures(
        rows=np.array([90, 4]), features=zeros(2, 5), logits=zeros(2, 3), labels=np.array([0, 2])
    ),
    "row_logits": RowLogits(rows=np.array([90, 4]), values=zeros(2, 3)),
    "orders": Orders(rows=np.array([0, 19]), peers=(3, 1)),
}

BAD = [
    ("predictions", {"rows": np.array([5, 2])}, "not of the public set, in order"),
    ("predictions", {"rows": np.array([2, 20])}, "not of the public set"),
    ("predictions", {"values": zeros(2, 4)}, r"are float32 \(2, 4\)"),
    ("predictions", {"weights": zeros(3)}, "weights of 2 predictions"),
    ("predictions", {"temperature": 0.0}, "temperature 0.0"),
    ("class_table", {"values": zeros(3, 4)}, r"is \(3, 4\), and there are 3 classes"),
    ("class_table", {"counts": zeros(2)}, r"counts are \(2,\)"),
    ("prototypes", {"classes": np.array([0, 3])}, "not some of 0 to 2"),
    ("prototypes", {"num_classes": 4}, "not some of 0 to 2"),
    ("prototypes", {"values": zeros(3, 7)}, "of 2 classes are"),
    ("prototypes", {"counts": zeros(1)}, "counts of 2 prototypes"),
    ("row_features", {"labels": np.array([0, 3])}, "labels that are not 0 to 2"),
    ("row_features", {"features": zeros(3, 5)}, "of different rows"),
    ("row_features", {"logits": zeros(2, 2)}, "logits of 2 rows"),
    ("row_logits", {"values": zeros(1, 3)}, "logits of rows"),
    ("orders", {"rows": np.array([20])}, "not of the public set"),
    ("orders", {"peers": (4,)}, "peers that are not 0 to 3"),
]


@pytest.mark.parametrize("kind", GOOD)
def test_a_run_may_have_kept_a_good_piece(kind: str) -> None:
    assert GOOD[kind].not_kept(EXTENT) is None


@pytest.mark.parametrize(("kind", "change", "told"), BAD)
def test_each_kind_says_what_no_run_can_have_kept(kind: str, change: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        raise ValueError(replace(GOOD[kind], **change).not_kept(EXTENT))


@pytest.fixture(scope="module")
def parts():
    return toy_parts(toy_settings("local", clients={"models": "mlp"}), toy_data())


def weights(parts, **change: float) -> Weights:
    strategy, server = parts
    limits = server.asked_weights(strategy.federation.models[0]).limits
    arrays = {
        name.removeprefix("arrays/"): np.full(limit.shape, change.get("number", 0.0), limit.dtype)
        for name, limit in limits.items()
    }
    return Weights(arrays=arrays)


def test_pieces_are_found_wherever_they_are(parts) -> None:
    good = Bundle(parts={"w": weights(parts), "table": GOOD["class_table"]})
    check_kept(State({3: good}), *parts)
    for bad, told in (
        (Bundle(parts={"table": ClassTable(values=zeros(2, 2))}), "a class table is"),
        (Bundle(parts={"w": Weights(arrays={"x": zeros(1)})}), "of no model of this run"),
        (weights(parts, number=np.nan), "weights with NaN or infinity in"),
        (ClassTable(values=zeros(3, 3) + np.inf), "class_table with NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=told):
            check_kept(State({3: bad}), *parts)


@pytest.mark.parametrize("client", [-1, 4])
def test_a_client_that_there_is_not_is_refused(client: int) -> None:
    with pytest.raises(ValueError, match=rf"the key {client}, which is no client.*0 to 3"):
        check_clients(State({client: GOOD["class_table"]}), 4)


@pytest.mark.parametrize(
    ("clients", "attempts", "told"),
    [
        (np.array([4]), np.array([1]), "not 0 to 3"),
        (np.array([1]), np.array([1, 1]), "of one length"),
        (np.array([1.5]), np.array([1]), "of one length"),
    ],
)
def test_charges_are_to_clients_that_there_are(clients, attempts, told: str) -> None:
    ledger = Ledger((Charge(1, "client", Cost("x", {}), clients, attempts),))
    with pytest.raises(ValueError, match=told):
        check_exchange(ExchangeState(ledger=ledger), 4)
