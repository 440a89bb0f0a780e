"""Mutual learning: a client's target is the mean of the others, at the temperature in force."""

from dataclasses import replace

import numpy as np
import pytest

from fedkd.exchange.payloads import Predictions
from fedkd.training import Passes
from strategies.mutual.dml import Peers

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
    receives = told(strategy, strategy.aggregate(Peers(), uploads, round, server))
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
    received = told(strategy, strategy.aggregate(Peers(), uploads, round, server))(2)
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
        received.append(told(strategy, strategy.aggregate(Peers(), uploads, round, server)))
    np.testing.assert_allclose(received[0](0).values, received[1](0).values, atol=1e-7)
    assert np.abs(received[0](1).values - received[1](1).values).max() > 0.01


def test_include_self_gives_everybody_the_mean_of_all(dml, scores, told):
    strategy, server = dml(include_self=True)
    round = strategy.federation.round(1)
    uploads = scores(round, [0, 1, 3])
    receives = told(strategy, strategy.aggregate(Peers(), uploads, round, server))
    soft = [softmax(values, 3.0) for values in values_of(uploads).values()]
    assert all(receives(client) is receives(0) for client in range(4))
    np.testing.assert_allclose(receives(0).values, np.mean(soft, axis=0), atol=1e-6)


def test_logits_may_be_averaged_instead_which_is_another_target(dml, scores, told):
    strategy, server = dml(average="logit")
    round = strategy.federation.round(1)
    uploads = scores(round, [0, 1, 3])
    received = told(strategy, strategy.aggregate(Peers(), uploads, round, server))(0)
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
    receives = told(strategy, strategy.aggregate(Peers(), uploads, round, server))
    for client in range(4):
        values = receives(client).values
        assert values.min() >= 0
        np.testing.assert_allclose(values.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize(("number", "expected"), [(1, 3.0), (2, 2.0), (3, 1.0), (4, 1.0)])
def test_the_temperature_is_that_of_the_round_that_learns(dml, scores, told, number, expected):
    strategy, server = dml()
    round = strategy.federation.round(number)
    uploads = scores(round, [0, 1])
    received = told(strategy, strategy.aggregate(Peers(), uploads, round, server))(0)
    assert received.temperature == pytest.approx(expected)
    soft = softmax(uploads[1].payload.values, expected)
    np.testing.assert_allclose(received.values, soft, atol=1e-6)


def test_a_lone_participant_receives_nothing_but_teaches_the_others(dml, scores, told):
    strategy, server = dml()
    round = strategy.federation.round(1)
    uploads = scores(round, [2])
    receives = told(strategy, strategy.aggregate(Peers(), uploads, round, server))
    assert receives(2) is None
    soft = softmax(uploads[0].payload.values, 3.0)
    for client in (0, 1, 3):
        np.testing.assert_allclose(receives(client).values, soft, atol=1e-6)


def test_nobody_teaches_nothing(dml, told):
    strategy, server = dml()
    before = strategy.begin(server)
    assert before == Peers()
    assert strategy.aggregate(before, [], strategy.federation.round(1), server) == Peers()
    assert [told(strategy, before)(client) for client in range(4)] == [None] * 4


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
