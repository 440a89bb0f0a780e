"""Pooled: one model per architecture on everybody's rows."""

import numpy as np

from fedkd.exchange.payloads import Weights
from fedkd.training import supervised
from strategies.baselines.fedavg import GlobalModels
from strategies.contract import Upload


def upload(client, value):
    return Upload(client, Weights(arrays={"w": np.array([value], np.float32)}), 10)


def test_the_first_client_of_each_architecture_trains(tiny_settings, tiny_data, parts):
    settings = tiny_settings(
        "pooled", clients={"models": ["mlp", "cnn", "cnn"], "participation": 0.25}
    )
    strategy, server = parts(settings, tiny_data())
    state = strategy.begin(server)
    for number in (1, 2, 3):
        assert strategy.participants(state, strategy.federation.round(number)) == (0, 1)


def test_it_trains_on_everybody_s_rows_once(tiny_settings, tiny_data, parts):
    data = tiny_data()
    strategy, _ = parts(tiny_settings("pooled"), data)
    rows = strategy.private_rows(1, data)
    assert rows.tolist() == list(range(12 + 13 + 9 + 17))


def test_a_round_goes_on_from_its_own_state(spy, tiny_settings, tiny_data, parts, learn):
    strategy, _ = parts(tiny_settings("pooled"), tiny_data())
    cohort, local = spy(), strategy.federation.local
    received = Weights(arrays={"w": np.ones(1, np.float32)})
    (answer,) = learn(strategy, cohort, received, 2)
    assert cohort.order == ["fit", "weights"]
    assert cohort.fits == [{"objective": supervised, "private": local, "public": None}]
    assert isinstance(answer, Weights)


def test_every_client_gets_the_model_of_its_architecture(tiny_settings, tiny_data, parts, told):
    strategy, server = parts(tiny_settings("pooled"), tiny_data())
    before = strategy.begin(server)
    assert [told(strategy, before)(client) for client in range(4)] == [None] * 4
    sent = [upload(0, 1.0), upload(1, 2.0)]
    receives = told(
        strategy, strategy.aggregate(before, sent, strategy.federation.round(1), server)
    )
    assert [receives(client).arrays["w"].item() for client in range(4)] == [1, 2, 1, 2]


def test_a_model_that_does_not_arrive_stays_as_it_was(tiny_settings, tiny_data, parts, told):
    strategy, server = parts(tiny_settings("pooled"), tiny_data())
    round = strategy.federation.round
    first = strategy.aggregate(GlobalModels({}), [upload(1, 2.0)], round(1), server)
    assert told(strategy, first)(0) is None
    assert told(strategy, first)(3).arrays["w"].item() == 2
    second = strategy.aggregate(first, [upload(0, 5.0)], round(2), server)
    receives = told(strategy, second)
    assert [receives(client).arrays["w"].item() for client in range(4)] == [5, 2, 5, 2]


def test_everybody_is_judged_by_the_pooled_model(tiny_settings, tiny_data, simulate):
    run = simulate(tiny_settings("pooled"), tiny_data())
    accuracies = {client: row["accuracy"] for client, row in run.history.clients.items()}
    assert accuracies[0] == accuracies[2]
    assert accuracies[1] == accuracies[3]
    assert {row["client"] for row in run.exchange if row["direction"] == "up"} == {0, 1}
