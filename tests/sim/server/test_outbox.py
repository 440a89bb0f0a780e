"""What clients are told: each distinct piece made once, and counted for those who got it."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from fedkd.exchange.payloads import Orders, Predictions, Weights
from fedkd.exchange.pipeline import ExchangeState, ServerTurn, Stages
from fedkd.metrics.diversity import target_entropy
from sim.server.outbox import Outbox
from sim.server.validation import AuthorError
from sim.wire.messages import Told


def lesson(sharp):
    values = np.full((2, 3), (1 - sharp) / 2, np.float32)
    values[:, 0] = sharp
    return Predictions(rows=np.arange(2), values=values, scale="probabilities")


@dataclass
class Names:
    """Stands for an algorithm: names by client, pieces by name."""

    keys: dict
    pieces: dict
    decided: dict = field(default_factory=dict)
    made: list = field(default_factory=list)

    def receives(self, state, client, round):
        return self.keys.get(client)

    def payload(self, state, key):
        self.made.append(key)
        return self.pieces[key]

    def orders(self, state, client, round):
        return self.decided.get(client)

    def asks(self, state, client, round, server):
        return None


@pytest.fixture
def outbox(tiny_settings, tiny_data, monkeypatch):
    """Make the outbox of an algorithm that names its pieces."""
    from sim.engine.runtime import federation_of
    from strategies.contract import Nothing, Strategy

    Strategy.register(Names)
    settings = tiny_settings()
    round = federation_of(settings, tiny_data()).round(2)

    def build(names, **options):
        turn = ServerTurn(Stages(), ExchangeState(1), seed=0, round=2)
        return Outbox(names, Nothing(), round, turn, **options)

    return build


def test_clients_with_equal_names_are_told_one_object_that_is_made_once(outbox):
    names = Names({0: "a", 1: "b", 2: "a"}, {"a": lesson(0.5), "b": lesson(0.9)})
    box = outbox(names)
    told = [box.tell(client, 1).payload for client in range(4)]
    assert told[0] is told[2] is names.pieces["a"]
    assert told[1] is names.pieces["b"]
    assert told[3] is None
    assert names.made == ["a", "b"]
    assert box.tell(1, 2).payload is told[1]
    assert names.made == ["a", "b"]


def test_orders_are_a_client_s_own(outbox):
    orders = Orders(peers=(1, 2))
    box = outbox(Names({}, {}, {1: orders}))
    assert [box.tell(client, 1).orders for client in range(3)] == [None, orders, None]
    assert box.told[1].orders is orders


def test_a_silent_one_tells_nobody_anything(outbox):
    names = Names({0: "a"}, {"a": lesson(0.5)}, {0: Orders(peers=(1,))})
    assert outbox(names, silent=True).tell(0, 1) == Told()
    assert names.made == []


def test_the_entropy_is_of_the_different_lessons_that_somebody_received(outbox):
    names = Names(
        {0: "a", 1: "b", 2: "a", 3: "w"},
        {"a": lesson(0.5), "b": lesson(0.9), "w": Weights(arrays={}), "never": lesson(1.0)},
    )
    box = outbox(names)
    assert box.entropy() is None
    for client in range(4):
        box.tell(client, 1)
    each = [target_entropy(names.pieces[key].values) for key in "ab"]
    assert box.entropy() == pytest.approx(np.mean(each))


def test_a_name_without_a_piece_is_the_author_s_mistake(outbox):
    box = outbox(Names({0: "z"}, {}))
    with pytest.raises(AuthorError, match=r"round 2, the server's half: .*\n(.*\n)*KeyError: 'z'"):
        box.tell(0, 1)
