"""Mutual learning: a client's target is the mean of the others, at the temperature in force."""

from dataclasses import replace

import numpy as np
import pytest
from strategies.knowledge import Broadcast, Predictions

from fedkd.training import Passes, distilled, supervised

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
    return {upload.client: upload.knowledge.values for upload in uploads}


# -- what the server answers -------------------------------------------------------------------


def test_each_of_three_clients_gets_the_mean_of_the_two_others(dml, scores):
    strategy, server = dml()
    plan = strategy.federation.plan(1)
    uploads = scores(plan, [0, 1, 3])
    broadcast = strategy.aggregate(uploads, plan, server)
    soft = {client: softmax(values, 3.0) for client, values in values_of(uploads).items()}
    for client, (one, other) in {0: (1, 3), 1: (0, 3), 3: (0, 1)}.items():
        received = broadcast.to(client)
        assert received.kind == "mean_probability"
        assert received.values.dtype == np.float32
        assert np.array_equal(received.rows, plan.public_rows)
        np.testing.assert_allclose(received.values, (soft[one] + soft[other]) / 2, atol=1e-6)


def test_a_newcomer_gets_the_mean_of_all(dml, scores):
    strategy, server = dml()
    plan = strategy.federation.plan(1)
    uploads = scores(plan, [0, 1, 3])
    received = strategy.aggregate(uploads, plan, server).to(2)
    soft = [softmax(values, 3.0) for values in values_of(uploads).values()]
    np.testing.assert_allclose(received.values, np.mean(soft, axis=0), atol=1e-6)


def test_own_predictions_never_count(dml, scores):
    strategy, server = dml()
    plan = strategy.federation.plan(1)
    received = []
    for own in (0.0, 9.0):
        uploads = scores(plan, [0, 1, 3])
        mine = uploads[0].knowledge
        changed = mine.values + np.array([own, 0, 0], np.float32)
        uploads[0] = replace(uploads[0], knowledge=replace(mine, values=changed))
        received.append(strategy.aggregate(uploads, plan, server))
    np.testing.assert_allclose(received[0].to(0).values, received[1].to(0).values, atol=1e-7)
    assert np.abs(received[0].to(1).values - received[1].to(1).values).max() > 0.01


def test_include_self_gives_everybody_the_mean_of_all(dml, scores):
    strategy, server = dml(include_self=True)
    plan = strategy.federation.plan(1)
    uploads = scores(plan, [0, 1, 3])
    broadcast = strategy.aggregate(uploads, plan, server)
    soft = [softmax(values, 3.0) for values in values_of(uploads).values()]
    assert all(broadcast.to(client) is broadcast.shared for client in range(4))
    np.testing.assert_allclose(broadcast.shared.values, np.mean(soft, axis=0), atol=1e-6)


def test_logits_may_be_averaged_instead_which_is_another_target(dml, scores):
    strategy, server = dml(average="logit")
    plan = strategy.federation.plan(1)
    uploads = scores(plan, [0, 1, 3])
    received = strategy.aggregate(uploads, plan, server).to(0)
    values = values_of(uploads)
    by_hand = (values[1] + values[3]) / 2
    assert received.kind == "mean_logit"
    assert received.temperature == pytest.approx(3.0)
    np.testing.assert_allclose(received.values, by_hand, atol=1e-6)
    probabilities = (softmax(values[1], 3.0) + softmax(values[3], 3.0)) / 2
    assert np.abs(softmax(by_hand, 3.0) - probabilities).max() > 1e-3


def test_targets_are_distributions(dml, scores):
    strategy, server = dml()
    plan = strategy.federation.plan(1)
    sure = np.where(np.arange(3) == 1, 500.0, -500.0)
    uploads = scores(plan, {0: sure, 1: sure, 3: -sure})
    for client in range(4):
        values = strategy.aggregate(uploads, plan, server).to(client).values
        assert values.min() >= 0
        np.testing.assert_allclose(values.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize(("number", "expected"), [(1, 3.0), (2, 2.0), (3, 1.0), (4, 1.0)])
def test_the_temperature_is_that_of_the_round_that_learns(dml, scores, number, expected):
    strategy, server = dml()
    plan = strategy.federation.plan(number)
    uploads = scores(plan, [0, 1])
    received = strategy.aggregate(uploads, plan, server).to(0)
    assert received.temperature == pytest.approx(expected)
    soft = softmax(uploads[1].knowledge.values, expected)
    np.testing.assert_allclose(received.values, soft, atol=1e-6)


def test_a_lone_participant_receives_nothing_but_teaches_the_others(dml, scores):
    strategy, server = dml()
    plan = strategy.federation.plan(1)
    uploads = scores(plan, [2])
    broadcast = strategy.aggregate(uploads, plan, server)
    assert broadcast.to(2) is None
    soft = softmax(uploads[0].knowledge.values, 3.0)
    for client in (0, 1, 3):
        np.testing.assert_allclose(broadcast.to(client).values, soft, atol=1e-6)


def test_nobody_teaches_nothing(dml):
    strategy, server = dml()
    assert strategy.prepare(server) == Broadcast()
    assert strategy.aggregate([], strategy.federation.plan(1), server) == Broadcast()


# -- what a client does ------------------------------------------------------------------------


def received_by(plan, kind="mean_probability"):
    value = 1 / 3 if kind == "mean_probability" else 2.0
    values = np.full((len(plan.public_rows), 3), value, np.float32)
    return Predictions(kind=kind, rows=plan.public_rows, values=values, temperature=2.5)


@pytest.mark.parametrize("kind", ["mean_probability", "mean_logit"])
def test_a_client_minimises_both_terms_in_every_step_and_then_predicts(spy, dml, kind):
    strategy, _ = dml(
        ce_weight=0.5,
        kd_weight={"kind": "linear", "start": 0.0, "end": 3.0},
        scale_by_t2=False,
        public_epochs=2,
        confidence_threshold=0.25,
    )
    cohort, plan = spy((1, 3)), strategy.federation.plan(3)
    received = received_by(plan, kind)
    answers = strategy.client_round(cohort, received, plan)

    assert cohort.order == ["fit", "predict_public"]
    (fit,) = cohort.fits
    assert fit["objective"].func is distilled
    assert fit["objective"].keywords == {
        "temperature": 2.5,
        "ce_weight": 0.5,
        "kd_weight": pytest.approx(2.0),
        "scale_by_t2": False,
        "confidence_threshold": 0.25,
    }
    assert fit["private"] == plan.local
    assert fit["public"].targets.values is received.values
    assert fit["public"].passes == Passes(batch_size=8, epochs=2)
    assert np.array_equal(cohort.asked[-1][1]["rows"], plan.public_rows)
    assert [answer.kind for answer in answers] == ["logits", "logits"]


@pytest.mark.parametrize("with_target", [False, True])
def test_without_a_teacher_or_a_weight_for_it_a_client_learns_from_its_labels(
    spy, dml, with_target
):
    strategy, _ = dml(kd_weight=0.0 if with_target else 1.0, ce_weight=0.5)
    cohort, plan = spy(), strategy.federation.plan(1)
    strategy.client_round(cohort, received_by(plan) if with_target else None, plan)
    assert cohort.order == ["fit", "predict_public"]
    (fit,) = cohort.fits
    assert fit["objective"].func is supervised
    assert fit["objective"].keywords == {"weight": 0.5}
    assert (fit["private"], fit["public"]) == (plan.local, None)


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
