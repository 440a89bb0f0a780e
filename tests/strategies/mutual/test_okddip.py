"""OKDDip across clients: attention chooses for each row from whom a client learns."""

import numpy as np
import pytest
import torch

from fedkd.exchange.payloads import Bundle, Predictions
from fedkd.mutual.okddip import peer_mixtures
from strategies.contract import Upload
from strategies.mutual.okddip import OKDDip, PublicFeatures
from strategies.mutual.taught_by_peers import lesson

LOGITS = {
    0: [[1, 2, 3, 0], [0.5, -1, 0, 2]],
    1: [[2, 1, 4, -1], [0, 0, 1, 3]],
    2: [[-4, 3, 1, 1], [2, 0, -1, 1]],
}


@pytest.fixture
def okddip(tiny_settings, tiny_data, parts):
    def build(**options):
        return parts(tiny_settings("okddip", options=options, rounds=4), tiny_data())

    return build


def sent(strategy, clients, logits=None, seed=0):
    round = strategy.federation.round(1)
    rows, uploads = round.public_rows, []
    for client in clients:
        rng = np.random.default_rng([seed, client])
        own = rng.normal(0, 2, (len(rows), 3)) if logits is None else logits[client]
        features = rng.normal(0, 1, (len(rows), strategy.width))
        parts = {
            "logits": Predictions(rows=rows, values=np.asarray(own, np.float32)),
            "features": PublicFeatures(rows=rows, values=features.astype(np.float32)),
        }
        uploads.append(Upload(client, Bundle(parts=parts), 8))
    return uploads


def aggregated(strategy, server, uploads, state=None):
    state = strategy.begin(server) if state is None else state
    return strategy.aggregate(state, uploads, strategy.federation.round(1), server)


# -- reference values ---------------------------------------------------------------------------


@pytest.mark.parametrize(("average", "value"), [("logit", 1.87671771), ("probability", 1.88872238)])
def test_what_clients_learn_matches_the_reference_values(
    average, value, reference_parts, minimised
):
    queries = torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    keys = torch.tensor([[1.0, 0], [0.5, 0.5], [0, 1]])
    attention = torch.softmax(queries @ keys.T, 1)
    expected = [
        [0.50648039, 0.30719589, 0.18632372],
        [0.18632372, 0.30719589, 0.50648039],
        [1 / 3, 1 / 3, 1 / 3],
    ]
    np.testing.assert_allclose(attention, expected, atol=1e-7)
    strategy, _ = reference_parts("okddip", average=average, kd_weight=1.0)
    # The same attention for both rows: the maps read features that are the queries and keys.
    mixtures = peer_mixtures(
        torch.tensor(list(LOGITS.values())),
        attention.expand(2, 3, 3),
        temperature=3.0,
        average="prob" if average == "probability" else "logit",
    )
    total = 0.0
    for client, mixture in enumerate(mixtures):
        taught = lesson(np.arange(2), mixture, "probabilities", 3.0)
        total += minimised(strategy, client, taught)["kd"]
    assert total == pytest.approx(value, abs=1e-5)


# -- who learns from whom -----------------------------------------------------------------------


def attention_of(strategy, state, uploads, **options):
    """Who takes what from whom by the maps of a state: [rows, clients, clients]."""
    features = np.stack([upload.payload["features"].values for upload in uploads])
    maps = strategy._attention(state.attention)
    with torch.no_grad():
        return maps(torch.tensor(features), **options)


@pytest.mark.parametrize("average", ["logit", "probability"])
def test_each_client_gets_its_own_mixture_by_the_attention_that_was_trained(okddip, told, average):
    strategy, server = okddip(average=average)
    uploads = sent(strategy, [0, 1, 3])
    state = aggregated(strategy, server, uploads)
    attention = attention_of(strategy, state, uploads)
    logits = torch.tensor(np.stack([u.payload["logits"].values for u in uploads]))
    soft = torch.softmax(logits / 3, -1)
    mixed = torch.einsum("nab,bnc->anc", attention, logits if average == "logit" else soft)
    expected = torch.softmax(mixed / 3, -1) if average == "logit" else mixed
    receives = told(strategy, state)
    for place, client in enumerate([0, 1, 3]):
        np.testing.assert_allclose(receives(client).values, expected[place], atol=1e-5)
    # In the scale of the mixtures: clients that were absent are stacked with those that were not.
    mean = torch.softmax(logits.mean(0) / 3, -1) if average == "logit" else soft.mean(0)
    np.testing.assert_allclose(receives(2).values, mean, atol=1e-5)


def test_attention_learns_which_mixture_a_client_can_follow(okddip):
    strategy, server = okddip(attention_lr=0.05)
    uploads = sent(strategy, [0, 1, 2, 3])
    before = strategy.begin(server)
    after = aggregated(strategy, server, uploads, before)
    itself = [
        attention_of(strategy, state, uploads).diagonal(dim1=1, dim2=2).mean()
        for state in (before, after)
    ]
    # What a client can follow best is itself.
    assert itself[1] > itself[0] + 0.01
    strategy, server = okddip(attention_steps=0)
    drawn = strategy.begin(server)
    still = aggregated(strategy, server, uploads, drawn)
    for name, weights in drawn.attention.items():
        assert np.array_equal(still.attention[name], weights)


def test_without_itself_a_client_learns_from_the_others_alone(okddip, told):
    strategy, server = okddip(include_self=False)
    wrong = {client: np.tile([[9.0, 0, 0]], (20, 1)) for client in (0, 1)}
    wrong[0] = -wrong[0]
    receives = told(strategy, aggregated(strategy, server, sent(strategy, [0, 1], wrong)))
    for client, peer in ((0, 1), (1, 0)):
        expected = torch.softmax(torch.tensor(wrong[peer]) / 3, -1)
        np.testing.assert_allclose(receives(client).values, expected, atol=1e-5)


def test_who_was_alone_is_not_taught_by_itself_and_nobody_changes_nothing(okddip, told, same):
    strategy, server = okddip()
    state = aggregated(strategy, server, sent(strategy, [2]))
    assert told(strategy, state)(2) is None
    assert told(strategy, state)(0) is not None
    assert same(aggregated(strategy, server, []), strategy.begin(server))


# -- what travels -------------------------------------------------------------------------------


def test_features_travel_and_cost_their_bytes(tiny_settings, tiny_data, simulate):
    run = simulate(tiny_settings("okddip", options={"features": 4}, rounds=2), tiny_data())
    up = {row["bytes"] for row in run.exchange if row["direction"] == "up"}
    down = {row["bytes"] for row in run.exchange if row["direction"] == "down"}
    assert (up, down) == ({20 * (3 + 4) * 4}, {20 * 3 * 4})


def test_features_of_other_rows_are_refused():
    rows = np.arange(5)
    asked = PublicFeatures.asked(rows, 3)
    good = PublicFeatures(rows=rows, values=np.zeros((5, 3), np.float32))
    assert good.problem(asked) is None
    assert PublicFeatures(rows=rows + 1, values=good.values).problem(asked) is not None
    assert PublicFeatures(rows=rows, values=good.values[:, :2]).problem(asked) is not None
    assert PublicFeatures(rows=rows, values=good.values + np.nan).problem(asked) is not None


def test_more_features_than_the_narrowest_model_has_are_refused(okddip):
    with pytest.raises(ValueError, match=r"strategy.features must be at most \d+, which is what"):
        okddip(features=4096)


# -- the leader ---------------------------------------------------------------------------------


def test_a_leader_learns_the_mean_of_the_clients_and_is_judged(tiny_settings, tiny_data, simulate):
    data, ramp = tiny_data(), {"kd_weight": 1.0, "leader": "mlp", "leader_epochs": 5}
    options = {"attention_steps": 1, **ramp}
    run = simulate(tiny_settings("okddip", options=options, rounds=4), data)
    assert run.history.federation[-1]["server_accuracy"] > 0.5
    still = {**options, "directions": ["peers"]}
    run = simulate(tiny_settings("okddip", options=still, rounds=2), data)
    state = run.loop.boundary.state
    assert isinstance(state.leader.name, str)
    first = [row["server_accuracy"] for row in run.history.federation]
    assert first[0] == first[1]


def test_directions_switch_clients_and_leader_each(tiny_settings, tiny_data, simulate):
    data = tiny_data()
    alone = simulate(tiny_settings("local"), data).digest
    digests = {
        directions: simulate(
            tiny_settings("okddip", options={"directions": list(directions), "leader": "mlp"}), data
        ).digest
        for directions in ((), ("leader",), ("peers",), ("peers", "leader"))
    }
    assert digests[()] == digests["leader",] == alone
    assert digests["peers",] == digests["peers", "leader"] != alone
    assert set(OKDDip.directions) == {"peers", "leader"}
