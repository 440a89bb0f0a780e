"""Codistillation across clients: what the peers said some rounds ago, sent once and kept."""

import numpy as np
import pytest
import torch

from fedkd.targets import entropy
from strategies.contract import Upload
from strategies.mutual.codistillation import Codistillation, StalePeers


@pytest.fixture
def stale(tiny_settings, tiny_data, parts):
    def build(**options):
        return parts(tiny_settings("codistillation", options=options, rounds=8), tiny_data())

    return build


def softmax(values, temperature=1.0):
    powers = np.exp(np.asarray(values, np.float64) / temperature)
    return powers / powers.sum(-1, keepdims=True)


def heard(uploads):
    """The same clients in a round in which nothing is predicted."""
    return [
        Upload(u.client, type(u.payload)(rows=u.payload.rows[:0], values=u.payload.values[:0]), 8)
        for u in uploads
    ]


def test_the_loss_matches_the_reference_values(reference):
    run = reference("codistillation", interval=1)
    target = torch.tensor(run.taught(0).values).double()
    losses = run.losses(0)
    # The paper has a cross-entropy, which is the divergence and the target's own entropy.
    soft = losses["kd"] + entropy(target).mean().item()
    assert soft == pytest.approx(1.16252144, abs=1e-6)
    assert losses["ce"] + soft == pytest.approx(2.30379108, abs=1e-6)


@pytest.mark.parametrize(
    ("burn_in", "interval", "rounds"),
    [(1, 1, [1, 2, 3, 4, 5, 6, 7, 8]), (1, 2, [1, 3, 5, 7]), (3, 4, [3, 7]), (8, 1, [8])],
)
def test_predictions_are_exchanged_after_the_burn_in_and_then_every_so_often(
    stale, burn_in, interval, rounds
):
    strategy, server = stale(burn_in=burn_in, interval=interval)
    every = [strategy.federation.round(number) for number in range(1, 9)]
    assert [round.number for round in every if strategy.exchanges(round)] == rounds
    state = strategy.begin(server)
    for round in every:
        asked = strategy.asks(state, 0, round, server)
        rows = asked.about["rows"]
        assert np.array_equal(rows, round.public_rows if round.number in rounds else rows[:0])


def test_what_was_exchanged_is_sent_once_and_again_to_who_was_away(stale, scores):
    strategy, server = stale(interval=4)
    rounds = [strategy.federation.round(number) for number in range(1, 7)]
    uploads = scores(rounds[0], [0, 1, 2])
    state = strategy.aggregate(strategy.begin(server), uploads, rounds[0], server)
    assert [strategy.receives(state, c, rounds[1]) for c in range(4)] == [0, 1, 2, "shared"]
    # Clients 0 and 3 are there in round 2, client 1 in round 3.
    state = strategy.aggregate(state, heard(scores(rounds[1], [0, 3])), rounds[1], server)
    assert [strategy.receives(state, c, rounds[2]) for c in range(4)] == [None, 1, 2, None]
    state = strategy.aggregate(state, heard(scores(rounds[2], [1])), rounds[2], server)
    assert [strategy.receives(state, c, rounds[3]) for c in range(4)] == [None, None, 2, None]
    # A round in which nobody answered changes nothing, an exchange everything.
    assert strategy.aggregate(state, [], rounds[4], server) == state
    state = strategy.aggregate(state, scores(rounds[4], [1, 3]), rounds[4], server)
    assert [strategy.receives(state, c, rounds[5]) for c in range(4)] == ["shared", 1, "shared", 3]


def test_a_client_is_taught_by_the_mean_of_the_others(stale, scores, told):
    strategy, server = stale()
    round = strategy.federation.round(1)
    uploads = scores(round, [0, 1, 3])
    receives = told(strategy, strategy.aggregate(strategy.begin(server), uploads, round, server))
    soft = {upload.client: softmax(upload.payload.values) for upload in uploads}
    np.testing.assert_allclose(receives(0).values, (soft[1] + soft[3]) / 2, atol=1e-6)
    np.testing.assert_allclose(receives(2).values, np.mean(list(soft.values()), 0), atol=1e-6)


def test_nobody_has_anything_to_say_before_the_first_exchange(stale, scores):
    strategy, server = stale(burn_in=3)
    state = strategy.begin(server)
    for number in (1, 2):
        round = strategy.federation.round(number)
        state = strategy.aggregate(state, heard(scores(round, [0, 1])), round, server)
    assert state == StalePeers()


def targets_of_rounds(monkeypatch, run):
    """What each client learns from in each round: (round, client) -> targets."""
    seen = {}
    study = Codistillation.study

    def watch(self, cohort, received, call):
        for client, piece in zip(cohort.clients, received, strict=True):
            rows = None if piece is None else (piece.rows.tobytes(), piece.values.tobytes())
            seen[call.number, client] = rows
        study(self, cohort, received, call)

    monkeypatch.setattr(Codistillation, "study", watch)
    return run(), seen


def test_between_exchanges_clients_learn_from_the_same_stale_predictions(
    tiny_settings, tiny_data, simulate, monkeypatch
):
    options = {"burn_in": 2, "interval": 2, "temperature": {"kind": "linear", "start": 3, "end": 1}}
    settings = tiny_settings("codistillation", options=options, rounds=6)
    run, seen = targets_of_rounds(monkeypatch, lambda: simulate(settings, tiny_data()))
    for client in range(4):
        assert seen[1, client] is seen[2, client] is None
        assert seen[3, client] == seen[4, client] != seen[5, client] == seen[6, client]
    # They travel once; rounds without an exchange cost no byte either way.
    down = {row["round"] for row in run.exchange if row["direction"] == "down" and row["bytes"]}
    up = {row["round"] for row in run.exchange if row["direction"] == "up" and row["bytes"]}
    assert (up, down) == ({2, 4, 6}, {3, 5})


def test_until_the_burn_in_is_over_it_is_local_learning_bit_for_bit(
    tiny_settings, tiny_data, simulate
):
    data = tiny_data()
    alone = simulate(tiny_settings("local"), data).digest
    for options, same in (({"burn_in": 3}, True), ({"directions": []}, True), ({}, False)):
        run = simulate(tiny_settings("codistillation", options=options), data)
        assert (run.digest == alone) is same, options


def test_who_is_away_when_it_is_sent_gets_it_later_and_learns_all_the_same(
    tiny_settings, tiny_data, simulate, monkeypatch
):
    clients, options = {"participants": 2}, {"interval": 3}
    settings = tiny_settings("codistillation", clients=clients, options=options, rounds=8)
    run, seen = targets_of_rounds(monkeypatch, lambda: simulate(settings, tiny_data()))
    assert not run.events
    assert {number for (number, _), taught in seen.items() if taught is None} == {1}
    assert len(seen) == 16
