"""Pooled: one model per architecture on everybody's rows."""

import numpy as np

from fedkd.training import supervised
from strategies.knowledge import Broadcast, ClientUpload, Parameters


def upload(client, value):
    return ClientUpload(client, Parameters({"w": np.array([value], np.float32)}), 10)


def test_the_first_client_of_each_architecture_trains(tiny_settings, tiny_data, parts):
    settings = tiny_settings(
        "pooled", clients={"models": ["mlp", "cnn", "cnn"], "participation": 0.25}
    )
    strategy, _ = parts(settings, tiny_data())
    for number in (1, 2, 3):
        assert strategy.participants(strategy.federation.plan(number)) == (0, 1)


def test_it_trains_on_everybody_s_rows_once(tiny_settings, tiny_data, parts):
    data = tiny_data()
    strategy, _ = parts(tiny_settings("pooled"), data)
    rows = strategy.private_rows(1, data)
    assert rows.tolist() == list(range(12 + 13 + 9 + 17))


def test_a_round_goes_on_from_its_own_state(spy, tiny_settings, tiny_data, parts):
    strategy, _ = parts(tiny_settings("pooled"), tiny_data())
    cohort, plan = spy(), strategy.federation.plan(2)
    received = Parameters({"w": np.ones(1, np.float32)})
    (answer,) = strategy.client_round(cohort, received, plan)
    assert cohort.order == ["fit", "weights"]
    assert cohort.fits == [{"objective": supervised, "private": plan.local, "public": None}]
    assert isinstance(answer, Parameters)


def test_every_client_gets_the_model_of_its_architecture(tiny_settings, tiny_data, parts):
    strategy, server = parts(tiny_settings("pooled"), tiny_data())
    assert strategy.prepare(server) == Broadcast()
    broadcast = strategy.aggregate(
        [upload(0, 1.0), upload(1, 2.0)], strategy.federation.plan(1), server
    )
    assert [broadcast.to(client).arrays["w"].item() for client in range(4)] == [1, 2, 1, 2]


def test_a_model_that_does_not_arrive_stays_as_it_was(tiny_settings, tiny_data, parts):
    strategy, server = parts(tiny_settings("pooled"), tiny_data())
    plan = strategy.federation.plan
    first = strategy.aggregate([upload(1, 2.0)], plan(1), server)
    assert first.to(0) is None
    assert first.to(3).arrays["w"].item() == 2
    second = strategy.aggregate([upload(0, 5.0)], plan(2), server)
    assert [second.to(client).arrays["w"].item() for client in range(4)] == [5, 2, 5, 2]


def test_everybody_is_judged_by_the_pooled_model(tiny_settings, tiny_data, simulate):
    run = simulate(tiny_settings("pooled"), tiny_data())
    accuracies = {client: row["accuracy"] for client, row in run.history.clients.items()}
    assert accuracies[0] == accuracies[2]
    assert accuracies[1] == accuracies[3]
    assert {row["client"] for row in run.exchange if row["direction"] == "up"} == {0, 1}
