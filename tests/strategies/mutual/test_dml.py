"""Mutual learning: a client's target is the mean of the others, at the temperature in force."""

from dataclasses import replace

import numpy as np
import pytest

from fedkd.exchange.payloads import Predictions
from fedkd.training import Passes
from strategies.mutual.dml import HeardPeers

SCHEDULE = {"kind": "linear", "start": 4.0, "end": 1.0}
"""Over four rounds: 4, 3, 2, 1."""


@pytest.fixture
def dml(tiny_settings, tiny_data, parts):
    """Make (strategy, server) of four rounds with some options."""

    def build(**options):
        options = {"temperature": SCHEDULE, **options}
        return parts(tiny_settings("dml", options=options, rounds=4), tiny_data())

    return build


def softmax(values, temperature):
    powers = np.exp(np.asarray(values, np.float64) / temperature)
    return powers / powers.sum(-1, keepdims=True)


def values_of(uploads):
    return {upload.client: upload.payload.values for upload in uploads}


# -- what the server answers -------------------------------------------------------------------


def test_each_of_three_clients_gets_the_mean_of_the_two_others(dml, scores, told):
    strategy, server = dml()
    round = strategy.federation.round(1)
    uploads = scores(round, [0, 1, 3])
    receives = told(strategy, strategy.aggregate(HeardPeers(), uploads, round, server))
    soft = {client: softmax(values, 3.0) for client, values in values_of(uploads).items()}
    for client, (one, other) in {0: (1, 3), 1: (0, 3), 3: (0, 1)}.items():
        received = receives(client)
        assert received.label == "mean_probabilities"
        assert received.values.dtype == np.float32
        assert np.array_equal(received.rows, round.public_rows)
        np.testing.assert_allclose(received.values, (soft[one] + soft[other]) / 2, atol=1e-6)


def test_a_newcomer_gets_the_mean_of_all(dml, scores, told):
    strategy, server = dml()
    round = strategy.federation.round(1)
    uploads = scores(round, [0, 1, 3])
    received = told(strategy, strategy.aggregate(HeardPeers(), uploads, round, server))(2)
    soft = [softmax(values, 3.0) for values in values_of(uploads).values()]
    np.testing.assert_allclose(received.values, np.mean(soft, axis=0), atol=1e-6)


def test_own_predictions_never_count(dml, scores, told):
    strategy, server = dml()
    round = strategy.federation.round(1)
    received = []
    for own in (0.0, 9.0):
        uploads = scores(round, [0, 1, 3])
        mine = uploads[0].payload
        changed = mine.values + np.array([own, 0, 0], np.float32)
        uploads[0] = replace(uploads[0], payload=replace(mine, values=changed))
        received.append(told(strategy, strategy.aggregate(HeardPeers(), uploads, round, server)))
    np.testing.assert_allclose(received[0](0).values, received[1](0).values, atol=1e-7)
    assert np.abs(received[0](1).values - received[1](1).values).max() > 0.01


def test_include_self_gives_everybody_the_mean_of_all(dml, scores, told):
    strategy, server = dml(include_self=True)
    round = strategy.federation.round(1)
    uploads = scores(round, [0, 1, 3])
    receives = told(strategy, strategy.aggregate(HeardPeers(), uploads, round, server))
    soft = [softmax(values, 3.0) for values in values_of(uploads).values()]
    assert all(receives(client) is receives(0) for client in range(4))
    np.testing.assert_allclose(receives(0).values, np.mean(soft, axis=0), atol=1e-6)


def test_logits_may_be_averaged_instead_which_is_another_target(dml, scores, told):
    strategy, server = dml(average="logit")
    round = strategy.federation.round(1)
    uploads = scores(round, [0, 1, 3])
    received = told(strategy, strategy.aggregate(HeardPeers(), uploads, round, server))(0)
    values = values_of(uploads)
    by_hand = (values[1] + values[3]) / 2
    assert received.label == "mean_logits"
    assert received.temperature == pytest.approx(3.0)
    np.testing.assert_allclose(received.values, by_hand, atol=1e-6)
    probabilities = (softmax(values[1], 3.0) + softmax(values[3], 3.0)) / 2
    assert np.abs(softmax(by_hand, 3.0) - probabilities).max() > 1e-3


def test_targets_are_distributions(dml, scores, told):
    strategy, server = dml()
    round = strategy.federation.round(1)
    sure = np.where(np.arange(3) == 1, 500.0, -500.0)
    uploads = scores(round, {0: sure, 1: sure, 3: -sure})
    receives = told(strategy, strategy.aggregate(HeardPeers(), uploads, round, server))
    for client in range(4):
        values = receives(client).values
        assert values.min() >= 0
        np.testing.assert_allclose(values.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize(("number", "expected"), [(1, 3.0), (2, 2.0), (3, 1.0), (4, 1.0)])
def test_the_temperature_is_that_of_the_round_that_learns(dml, scores, told, number, expected):
    strategy, server = dml()
    round = strategy.federation.round(number)
    uploads = scores(round, [0, 1])
    received = told(strategy, strategy.aggregate(HeardPeers(), uploads, round, server))(0)
    assert received.temperature == pytest.approx(expected)
    soft = softmax(uploads[1].payload.values, expected)
    np.testing.assert_allclose(received.values, soft, atol=1e-6)


def test_a_lone_participant_receives_nothing_but_teaches_the_others(dml, scores, told):
    strategy, server = dml()
    round = strategy.federation.round(1)
    uploads = scores(round, [2])
    receives = told(strategy, strategy.aggregate(HeardPeers(), uploads, round, server))
    assert receives(2) is None
    soft = softmax(uploads[0].payload.values, 3.0)
    for client in (0, 1, 3):
        np.testing.assert_allclose(receives(client).values, soft, atol=1e-6)


def test_nobody_teaches_nothing(dml, told):
    strategy, server = dml()
    before = strategy.begin(server)
    assert before == HeardPeers()
    assert strategy.aggregate(before, [], strategy.federation.round(1), server) == HeardPeers()
    assert [told(strategy, before)(client) for client in range(4)] == [None] * 4


# -- whom a client hears ------------------------------------------------------------------------


@pytest.fixture
def heard(dml, scores):
    """Let senders send, and return what a client is then taught: their own logits and payloads."""

    def build(senders, number=1, **options):
        strategy, server = dml(**options)
        round = strategy.federation.round(number)
        uploads = scores(round, senders)
        state = strategy.aggregate(strategy.begin(server), uploads, round, server)

        def taught(client, in_round=number + 1):
            key = strategy.receives(state, client, strategy.federation.round(in_round))
            return None if key is None else strategy.payload(state, key).values

        temperature = strategy.settings.softening(round.next().progress)
        soft = {client: softmax(v, temperature) for client, v in values_of(uploads).items()}
        return taught, soft

    return build


def test_on_a_ring_a_client_learns_from_the_participant_before_it(heard):
    taught, soft = heard([0, 1, 3], peers="ring")
    for client, peer in {0: 3, 1: 0, 2: 1, 3: 1}.items():
        np.testing.assert_allclose(taught(client), soft[peer], atol=1e-6)


def test_on_the_exponential_graph_the_distance_doubles_from_round_to_round(heard):
    taught, soft = heard([0, 1, 2, 3], peers="exponential")
    for in_round, peers in {2: [3, 0, 1, 2], 3: [2, 3, 0, 1], 4: [3, 0, 1, 2]}.items():
        for client, peer in enumerate(peers):
            np.testing.assert_allclose(taught(client, in_round), soft[peer], atol=1e-6)


def test_drawn_peers_are_k_of_the_others_and_others_in_another_round(heard):
    taught, soft = heard([0, 1, 2, 3], peers="random-k", k=2)
    pairs = {(1, 2), (1, 3), (2, 3)}
    means = {pair: np.mean([soft[peer] for peer in pair], axis=0) for pair in pairs}
    drawn = [
        [pair for pair in pairs if np.allclose(taught(0, number), means[pair], atol=1e-6)]
        for number in range(2, 30)
    ]
    assert {len(found) for found in drawn} == {1}
    assert {found[0] for found in drawn} == pairs
    np.testing.assert_array_equal(taught(0, 5), taught(0, 5))


def test_the_best_peers_are_those_that_agree_on_public_rows(heard):
    one, other = [5.0, 0, 0], [0.0, 5, 0]
    taught, soft = heard({0: one, 1: other, 2: other, 3: one}, peers="best-k", k=1)
    for client, peer in {0: 3, 1: 2, 2: 1, 3: 0}.items():
        np.testing.assert_allclose(taught(client), soft[peer], atol=1e-6)


def test_who_was_away_agrees_with_nobody_yet_and_learns_from_all(heard):
    taught, soft = heard([0, 1, 3], peers="best-k", k=1)
    np.testing.assert_allclose(taught(2), np.mean(list(soft.values()), axis=0), atol=1e-6)


@pytest.mark.parametrize("peers", ["all", "ring", "exponential", "random-k", "best-k"])
def test_whoever_is_heard_a_lone_participant_hears_nobody_and_teaches_the_others(heard, peers):
    taught, soft = heard([2], peers=peers)
    assert taught(2) is None
    np.testing.assert_allclose(taught(0), soft[2], atol=1e-6)


@pytest.mark.parametrize("peers", ["random-k", "best-k"])
def test_as_many_peers_as_there_are_is_everybody_else(heard, peers):
    taught, soft = heard([0, 1, 3], peers=peers, k=7)
    np.testing.assert_allclose(taught(0), (soft[1] + soft[3]) / 2, atol=1e-6)


def test_who_hears_a_few_may_hear_itself_too(heard):
    taught, soft = heard([0, 1, 3], peers="ring", include_self=True)
    np.testing.assert_allclose(taught(1), (soft[0] + soft[1]) / 2, atol=1e-6)
    np.testing.assert_allclose(taught(2), soft[1], atol=1e-6)


def test_whom_a_client_hears_decides_what_it_becomes(tiny_settings, tiny_data, simulate):
    data, digests = tiny_data(), set()
    for peers in ("all", "ring", "exponential", "random-k", "best-k"):
        options = {"peers": peers, "k": 1}
        digests.add(simulate(tiny_settings("dml", options=options, rounds=4), data).digest)
    assert len(digests) == 5


# -- reference values ---------------------------------------------------------------------------


def test_the_peers_mean_and_its_loss_match_the_reference_values(reference):
    run = reference("dml", temperature=1.0)
    expected = [
        [0.05713337, 0.41409712, 0.47272755, 0.05604195],
        [0.34211532, 0.06373035, 0.07082493, 0.52332940],
    ]
    np.testing.assert_allclose(run.taught(0).values, expected, atol=1e-7)
    # The mean of the divergences, 1.59208643, less what does not depend on the client.
    assert sum(run.losses(0).values()) == pytest.approx(1.24723729, abs=1e-6)


@pytest.mark.parametrize(("client", "value"), [(0, 0.78128359), (1, 0.18976181), (2, 1.57778006)])
def test_divergences_on_a_ring_match_the_reference_values(client, value, reference):
    losses = reference("dml", temperature=1.0, peers="ring").losses(client)
    assert losses["kd"] == pytest.approx(value, abs=1e-6)


# -- what a client does ------------------------------------------------------------------------


def received_by(round, scale="probabilities"):
    value = 1 / 3 if scale == "probabilities" else 2.0
    return Predictions(
        rows=round.public_rows,
        values=np.full((len(round.public_rows), 3), value, np.float32),
        scale=scale,
        temperature=2.5,
        averaged=True,
    )


@pytest.mark.parametrize("scale", ["probabilities", "logits"])
def test_a_client_minimises_both_terms_in_every_step_and_then_predicts(spy, dml, learn, scale):
    strategy, _ = dml(
        ce_weight=0.5,
        kd_weight={"kind": "linear", "start": 0.0, "end": 3.0},
        scale_by_t2=False,
        public_epochs=2,
        confidence_threshold=0.25,
    )
    cohort, round = spy((1, 3)), strategy.federation.round(3)
    received = received_by(round, scale)
    answers = learn(strategy, cohort, received, 3)

    assert cohort.order == ["fit", "predict_public"]
    (fit,) = cohort.fits
    objective = fit["objective"]
    assert objective.learners["model"].objective == strategy.settings.terms
    ce, kd = strategy.settings.terms.terms.values()
    assert (ce.weight.at(objective.progress), kd.weight.at(objective.progress)) == (0.5, 2.0)
    assert not kd.scale_by_t2
    assert (objective.confidence_threshold, objective.temperature) == (0.25, 2.5)
    assert fit["private"] == round.local
    assert fit["public"].targets.values is received.values
    assert fit["public"].passes == Passes(batch_size=8, epochs=2)
    assert np.array_equal(cohort.asked[-1][1]["rows"], round.public_rows)
    assert [answer.label for answer in answers] == ["logits", "logits"]


@pytest.mark.parametrize("with_target", [False, True])
def test_without_a_teacher_or_a_weight_for_it_a_client_learns_from_its_labels(
    spy, dml, learn, with_target
):
    strategy, _ = dml(kd_weight=0.0 if with_target else 1.0, ce_weight=0.5)
    cohort, round = spy(), strategy.federation.round(1)
    learn(strategy, cohort, received_by(round) if with_target else None)
    assert cohort.order == ["fit", "predict_public"]
    (fit,) = cohort.fits
    (term,) = fit["objective"].learners["model"].objective.terms.values()
    assert (term.kind, term.weight.at(0.0)) == ("ce", 0.5)
    assert (fit["private"], fit["public"]) == (round.local, None)


# -- whole runs --------------------------------------------------------------------------------


def test_without_weight_for_the_peers_it_is_local_learning_bit_for_bit(
    tiny_settings, tiny_data, simulate
):
    data = tiny_data()
    alone = simulate(tiny_settings("local"), data)
    assert simulate(tiny_settings("dml", options={"kd_weight": 0.0}), data).digest == alone.digest
    assert simulate(tiny_settings("dml"), data).digest != alone.digest


def test_a_federation_of_one_is_local_learning_bit_for_bit(tiny_settings, tiny_data, simulate):
    data = tiny_data(rows=(20,))
    digests = {
        simulate(tiny_settings(name, clients={"count": 1}), data).digest
        for name in ("dml", "local")
    }
    assert len(digests) == 1


def test_without_weight_for_labels_permuting_them_changes_nothing(
    tiny_settings, tiny_data, simulate
):
    data = tiny_data()
    permuted = replace(data, train_labels=data.train_labels[::-1].copy())
    for ce_weight, same in ((0.0, True), (1.0, False)):
        settings = tiny_settings("dml", options={"ce_weight": ce_weight})
        one, other = simulate(settings, data), simulate(settings, permuted)
        assert (one.digest == other.digest) is same


def test_without_the_direction_of_the_clients_none_learns_from_another(
    tiny_settings, tiny_data, simulate
):
    data = tiny_data()
    alone = simulate(tiny_settings("local"), data).digest
    for options in ({"directions": []}, {"directions": [], "ce_weight": 0.3, "peers": "ring"}):
        assert simulate(tiny_settings("dml", options=options), data).digest == alone
    both = simulate(tiny_settings("dml", options={"directions": ["clients"]}), data)
    assert both.digest == simulate(tiny_settings("dml"), data).digest


@pytest.mark.parametrize("peers", ["ring", "random-k"])
def test_rounds_of_one_step_know_every_graph(peers, tiny_settings, tiny_data, simulate):
    clients = {"local": {"steps": 1}}
    run = simulate(
        tiny_settings("dml", options={"peers": peers}, clients=clients, rounds=5), tiny_data()
    )
    assert [row["replies"] for row in run.history.federation] == [4] * 5
    assert run.states[0].models["model"].optimizer["step/1.weight"] == 5


def test_step_by_step_exchange_is_the_same_code(tiny_settings, tiny_data, simulate):
    settings = tiny_settings("dml", clients={"local": {"steps": 1}}, rounds=5)
    run = simulate(settings, tiny_data())
    steps = run.states[0].models["model"].optimizer["step/1.weight"]
    assert steps == 5


def test_dropout_and_batch_norm_clients_are_reproducible(tiny_settings, tiny_data, simulate):
    clients = {
        "models": [
            {"name": "mlp", "options": {"hidden": [8], "dropout": 0.5}},
            {"name": "cnn", "options": {"channels": [4], "norm": "batch"}},
        ]
    }
    data = tiny_data()
    digests = {
        simulate(
            tiny_settings(
                "dml", clients=clients, engine={"backend": "inline", "cohort_size": size}
            ),
            data,
        ).digest
        for size in (1, 2)
    }
    assert len(digests) == 1
