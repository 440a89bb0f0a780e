"""CFD: clients begin anew in every round, server and clients distil each other's labels."""

import numpy as np
import pytest
import torch

from fedkd.exchange.payloads import Predictions
from fedkd.training import Passes, supervised, towards_targets
from strategies.contract import Upload


@pytest.fixture
def cfd(tiny_settings, tiny_data, parts):
    def build(sections=None, **options):
        return parts(tiny_settings("cfd", options=options, **(sections or {})), tiny_data())

    return build


def labels(strategy, client, share=0.8):
    values = np.full((len(strategy.rows), 3), (1 - share) / 2, np.float32)
    values[:, client % 3] = share
    sent = Predictions(rows=strategy.rows, values=values, scale="probabilities")
    return Upload(client, sent, 5)


def test_a_client_begins_anew_distils_then_trains_then_predicts(spy, cfd, learn):
    strategy, _ = cfd(distil_epochs=3)
    cohort = spy((2,))
    received = labels(strategy, 1).payload
    (answer,) = learn(strategy, cohort, received, 2)
    assert cohort.order == ["load_weights", "reset_optimizers", "fit", "fit", "predict_public"]
    distil, at_home = cohort.fits
    assert distil["objective"] is towards_targets
    assert distil["public"].passes == Passes(batch_size=8, epochs=3)
    assert at_home["objective"] is supervised
    assert answer.scale == "probabilities"
    np.testing.assert_allclose(answer.values, 1 / 3)


def test_all_clients_of_an_architecture_begin_from_the_same_weights_in_every_round(spy, cfd, learn):
    strategy, server = cfd()
    begun = {}
    for client in range(4):
        for number in (1, 3):
            cohort = spy((client,))
            learn(strategy, cohort, None, number)
            begun[client, number] = cohort.asked[0][1]["weights"]
    # Clients 0 and 2 have one architecture; theta_0 is what the first of them starts from.
    theta = server.initial_weights(0)
    for key in ((0, 1), (0, 3), (2, 1), (2, 3)):
        assert all(np.array_equal(begun[key][name], theta[name]) for name in theta)
    assert begun[1, 1].keys() != theta.keys()
    assert begun[1, 1].keys() == begun[3, 3].keys()


def test_the_server_distils_the_mean_and_sends_its_own_labels(cfd):
    strategy, server = cfd(server_epochs=2)
    round = strategy.federation.round(1)
    before = strategy.begin(server)
    uploads = [labels(strategy, 0), labels(strategy, 1, 0.6)]
    after = strategy.aggregate(before, uploads, round, server)
    own = torch.softmax(torch.tensor(server.predict_public(after.model, strategy.rows)), -1)
    told = strategy.payload(after, strategy.receives(after, 3, round.next()))
    assert not told.averaged
    np.testing.assert_allclose(told.values, own, rtol=1e-6)
    untaught = torch.softmax(torch.tensor(server.predict_public(before.model, strategy.rows)), -1)
    mean = torch.tensor((uploads[0].payload.values + uploads[1].payload.values) / 2)
    assert (own - mean).abs().sum() < (untaught - mean).abs().sum()


def test_the_server_goes_on_from_the_model_of_the_round_before(cfd):
    strategy, server = cfd(server_epochs=1)
    first, second = strategy.federation.round(1), strategy.federation.round(2)
    once = strategy.aggregate(strategy.begin(server), [labels(strategy, 0)], first, server)
    twice = strategy.aggregate(once, [labels(strategy, 0)], second, server)

    def far(state):
        return abs(float(state.predictions.values[:, 0].mean()) - 0.8)

    assert far(twice) < far(once)


def test_without_the_servers_direction_the_clients_mean_comes_down(cfd):
    strategy, server = cfd(directions=["clients"])
    round = strategy.federation.round(1)
    state = strategy.aggregate(
        strategy.begin(server), [labels(strategy, 0), labels(strategy, 1)], round, server
    )
    np.testing.assert_allclose(state.predictions.values, [[0.45, 0.45, 0.1]] * 20, rtol=1e-5)


def test_a_round_without_answers_keeps_the_labels(cfd, same):
    strategy, server = cfd()
    round = strategy.federation.round(1)
    state = strategy.aggregate(strategy.begin(server), [labels(strategy, 0)], round, server)
    assert same(strategy.aggregate(state, [], round.next(), server), state)


def test_the_public_rows_are_the_same_in_every_round(cfd):
    strategy, server = cfd(sections={"exchange": {"rows_per_round": 9}})
    state = strategy.begin(server)
    asked = [
        strategy.asks(state, 0, strategy.federation.round(number), server).about["rows"]
        for number in (1, 2, 3)
    ]
    assert len(asked[0]) == 9
    assert all(np.array_equal(asked[0], rows) for rows in asked)


def test_bytes_are_those_of_the_packed_bits(tiny_settings, tiny_data, simulate):
    # 20 rows of 3 classes: 2 bits number a class, 4 bits a share make 3 x 4 of a row.
    exchange = {"up": "cfd", "down": {"kind": "cfd", "bits": 4}}
    run = simulate(tiny_settings("cfd", exchange=exchange, rounds=2), tiny_data())
    assert [row["bytes_up"] for row in run.history.federation] == [4 * 5] * 2
    assert [row["bytes_down"] for row in run.history.federation] == [0, 4 * 30]


def test_deltas_cost_what_changed_and_teach_the_same(tiny_settings, tiny_data, simulate):
    def run(kind):
        exchange = {"up": kind, "down": {"kind": kind, "bits": 3}}
        settings = tiny_settings("cfd", exchange=exchange, rounds=4, clients={"participants": 3})
        return simulate(settings, tiny_data())

    whole, delta = run("cfd"), run("cfd_delta")
    assert not delta.events
    assert delta.digest == whole.digest
    # Of 20 classes 5 bytes travel as they are; at first an arithmetic coder knows nothing of them.
    ups = [row["bytes"] for row in delta.exchange if row["direction"] == "up"]
    assert max(ups) <= 5 + 2
    assert min(ups) < 5
    total = [sum(row["bytes"] for row in of.exchange) for of in (whole, delta)]
    assert total[1] < total[0]
