"""Mechanisms: what one client can change, the noise that is really added, what is made of it."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

from fedkd.exchange.mechanisms import MECHANISMS, GaussianRelease, LaplaceRelease, Votes
from fedkd.exchange.mechanisms.randomized import RandomizedAnswers, unbiased_shares
from fedkd.exchange.mechanisms.sensitivity import (
    bounded,
    form_of,
    form_of_payload,
    on_simplex,
    sensitivity,
)
from fedkd.exchange.payloads import ClassTable, Predictions, Prototypes, Weights
from fedkd.exchange.pipeline import ClientTurn, ExchangeState, ServerTurn, Stages, Standing
from fedkd.exchange.release import Form, Occasion
from fedkd.exchange.spending import events_of
from fedkd.exchange.views import Upload
from fedkd.privacy import spent

ROWS, CLASSES = 40, 5
WILD = [0.0, 1.0, -1.0, 1e-30, 3e38, -3e38, math.inf, -math.inf, math.nan, 0.5]


def predictions(values, scale="logits"):
    return Predictions(rows=np.arange(len(values)), values=np.float32(values), scale=scale)


# -- sensitivity ---------------------------------------------------------------------------------


def tables(kind, rng):
    """Return an answer of a kind: random numbers, now and then wild or adversarial ones."""
    shape = (ROWS if kind != "class table" else CLASSES, CLASSES)
    values = rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 6)
    match rng.integers(4):
        case 0:
            values = rng.choice(WILD, shape)
        case 1:
            values = np.zeros(shape)
            values[:, rng.integers(CLASSES)] = rng.choice([1.0, -1.0]) * 1e9
    if kind == "logits":
        return predictions(values)
    if kind == "soft labels":
        return predictions(values, "probabilities")
    if kind == "class table":
        return ClassTable(values=np.float32(values))
    held = np.flatnonzero(rng.random(ROWS) < 0.5)
    return Prototypes(classes=held, values=np.float32(values[held]), num_classes=ROWS)


@pytest.mark.parametrize("kind", ["logits", "soft labels", "class table", "prototypes"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_no_pair_of_clients_is_further_apart_than_the_sensitivity(kind, norm):
    """2,500 pairs each, so 20,000 in all, random and adversarial."""
    rng = np.random.default_rng(0)
    for _ in range(2500 // 10):
        one, *others = (bounded(tables(kind, rng), clip=3.0, norm=norm) for _ in range(11))
        most = sensitivity(form_of_payload(one), clip=3.0, norm=norm)
        for other in others:
            apart = (one.values.astype(np.float64) - other.values).ravel()
            assert np.linalg.norm(apart, ord=1 if norm == "l1" else 2) <= most


def test_the_sensitivity_is_reached():
    """So it is not a bound that is far too large, either."""
    one, other = np.zeros((2, ROWS, CLASSES))
    one[:, 0], other[:, 1] = 1, 1
    for norm, order in (("l1", 1), ("l2", 2)):
        for scale, flip in (("probabilities", other), ("logits", -one)):
            a, b = (
                bounded(predictions(99 * x, scale), clip=3.0, norm=norm).values for x in (one, flip)
            )
            form = Form(ROWS, CLASSES, scale == "probabilities")
            most = sensitivity(form, clip=3.0, norm=norm)
            assert np.linalg.norm((a - b).ravel(), ord=order) == pytest.approx(most, rel=1e-5)


def test_soft_labels_of_500_rows_have_the_published_sensitivity():
    l1, l2 = (sensitivity(Form(500, 10, True), clip=1, norm=norm) for norm in ("l1", "l2"))
    assert l2 == pytest.approx(math.sqrt(1000), rel=2e-6)
    assert l1 == pytest.approx(1000, rel=2e-6)


@pytest.mark.parametrize(
    ("rows", "clients", "rounds", "deviation"),
    [(500, 10, 1, 1.90), (500, 10, 10, 6.00), (1000, 100, 10, 0.849), (1000, 1000, 10, 0.085)],
)
def test_noise_on_mean_soft_labels_for_epsilon_8_is_what_theory_says(
    rows, clients, rounds, deviation
):
    """By the exact composition of Balle and Wang, 2018, with sensitivity sqrt(2 N) / K."""
    rule = GaussianRelease(epsilon=8.0)
    occasion = Occasion(
        where="server", round=1, releases=rounds, clients=clients, form=Form(rows, 10, True)
    )
    made = rule.multiplier(occasion) * rule.sensitivity(occasion)
    assert made == pytest.approx(deviation, rel=3e-3)


def test_what_a_client_answers_has_the_form_that_is_asked_for():
    rows = np.arange(ROWS)
    for asked, answer in (
        (Predictions.asked(rows, CLASSES), predictions(np.ones((ROWS, CLASSES)))),
        (ClassTable.asked(CLASSES), ClassTable(values=np.zeros((CLASSES, CLASSES), np.float32))),
        (
            Prototypes.asked(CLASSES, 7),
            Prototypes(
                classes=np.array([1]), values=np.ones((1, 7), np.float32), num_classes=CLASSES
            ),
        ),
    ):
        assert form_of(asked) == form_of_payload(answer)


def test_which_classes_a_client_holds_does_not_show():
    table = np.zeros((CLASSES, CLASSES), np.float32)
    table[2, 2] = 1
    made = bounded(ClassTable(values=table), clip=1, norm="l2")
    np.testing.assert_allclose(made.values[0], 1 / CLASSES)
    held = Prototypes(classes=np.array([3]), values=np.ones((1, 2), np.float32), num_classes=6)
    assert bounded(held, clip=1, norm="l2").classes.tolist() == [0, 1, 2, 3, 4, 5]


@settings(max_examples=60, deadline=None)
@given(
    arrays.arrays(np.float32, (3, 4), elements=st.floats(-1e6, 1e6, width=32)),
)
def test_the_nearest_distribution_is_nearer_than_any_other(values):
    found = on_simplex(values)
    assert found.min() >= 0
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    rng = np.random.default_rng(0)
    others = rng.dirichlet(np.ones(4), 50)
    for row, own in zip(values.astype(np.float64), found.astype(np.float64), strict=True):
        nearest = np.square(others - row).sum(-1).min()
        assert np.square(own - row).sum() <= nearest * (1 + 1e-5) + 1e-5


# -- the noise that is really added --------------------------------------------------------------

DRAWS = 1_000_000


def released_at_client(rule, answer):
    stages = Stages(release=rule)
    client = ClientTurn(stages, seed=3, round=1, attempt=1, clients={0: Standing()})
    return client.send({0: answer})[0]


@pytest.mark.parametrize(
    ("rule", "law"),
    [
        (GaussianRelease(noise=0.5, clip=1.0), stats.norm(scale=1.0)),
        (LaplaceRelease(noise=0.5, clip=1.0), stats.laplace(scale=1.0)),
    ],
)
@pytest.mark.parametrize("lost", [0, 2, 5])
def test_the_noise_on_a_mean_is_that_of_those_who_answered(rule, law, lost):
    """Ten clients, of which some are lost: noise for ten would be too little by up to half."""
    rows, classes, clients = 1000, 10, 10 - lost
    zeros = predictions(np.zeros((rows, classes)))
    stages = Stages(release=rule, where="server")
    asked = Predictions.asked(np.arange(rows), classes)
    uploads = [Upload(client, zeros, 5) for client in range(clients)]
    seen = []
    for round in range(1, 101):
        server = ServerTurn(stages, ExchangeState(), seed=1, round=round)
        # One of them is enough to know the form of all.
        server.receive(0, zeros, asked)
        (mean,) = server.view(uploads, sums="equal")
        seen.append(mean.payload.values.ravel())
    one = sensitivity(Form(rows, classes, False), clip=1.0, norm=type(rule).norm)
    unit = np.concatenate(seen) * clients / one / 0.5
    check_law(unit, law)


@pytest.mark.parametrize(
    ("rule", "law"),
    [
        (GaussianRelease(noise=0.5), stats.norm(scale=1.0)),
        (LaplaceRelease(noise=0.5), stats.laplace(scale=1.0)),
    ],
)
def test_the_noise_of_a_client_is_that_of_its_own_answer(rule, law):
    rows, classes = DRAWS // 10, 10
    uniform = predictions(np.full((rows, classes), 1 / classes), "probabilities")
    sent = released_at_client(rule, uniform)
    one = sensitivity(Form(rows, classes, True), clip=1.0, norm=type(rule).norm)
    check_law((sent.values - np.float32(1 / classes)).ravel() / one / 0.5, law)


def check_law(unit, law):
    """Standard deviation within 0.5 %, and the law itself."""
    assert len(unit) == DRAWS
    assert unit.std() / law.std() == pytest.approx(1, abs=0.005)
    assert abs(unit.mean()) < 0.005
    assert stats.kstest(unit[:100_000], law.cdf).pvalue > 1e-3


def test_one_noise_on_the_sum_protects_the_means_of_all_others():
    rows, clients = DRAWS // 10, 4
    asked = Predictions.asked(np.arange(rows), 10)
    rng = np.random.default_rng(0)
    answers = [predictions(rng.standard_normal((rows, 10))) for _ in range(clients)]
    rule = GaussianRelease(noise=0.25, clip=100.0)
    server = ServerTurn(Stages(release=rule, where="server"), ExchangeState(), seed=0, round=1)
    for client, answer in enumerate(answers):
        server.receive(client, answer, asked)
    uploads = [Upload(client, answer, 5) for client, answer in enumerate(answers)]
    shown = [
        upload.payload.values.astype(np.float64)
        for upload in server.view(uploads, leaves_one_out=True)
    ]
    sums = [
        sum(other for at, other in enumerate(shown) if at != left) + answers[left].values
        for left in range(clients)
    ]
    # Whoever is left out: the same noisy sum.
    for other in sums[1:]:
        np.testing.assert_allclose(other, sums[0], atol=1.0)
    noise = (sums[0] - sum(a.values.astype(np.float64) for a in answers)).ravel()
    check_law(
        noise / sensitivity(Form(rows, 10, False), clip=100.0, norm="l2") / 0.25, stats.norm()
    )
    assert [
        cost.figures["noise_multiplier"] for _, cost in server.committed().ledger.of_client(3)
    ] == [0.25]


# -- randomised response -------------------------------------------------------------------------


def test_randomised_answers_are_as_often_true_as_they_are_to_be_and_read_without_bias():
    rows, classes = 200_000, 10
    truth = np.eye(classes, dtype=np.float32)[np.arange(rows) % 3]
    rule = RandomizedAnswers(noise=1.0)  # epsilon 1 each
    occasion = Occasion(where="client", round=1, form=Form(rows, classes, True))
    told = rule.release(predictions(truth, "probabilities"), occasion, np.random.default_rng(0))
    assert set(told.values.sum(-1)) == {1.0}
    kept = (told.values.argmax(-1) == truth.argmax(-1)).mean()
    assert kept == pytest.approx(0.2319693167, abs=0.005)
    for true in range(3):
        of = told.values[truth.argmax(-1) == true].mean(0)
        others = np.delete(of, true)
        np.testing.assert_allclose(others, 0.0853367426, atol=0.005)
    shares = unbiased_shares(told.values.mean(0)[None], 0.2319693167, 0.0853367426)[0]
    np.testing.assert_allclose(shares, [1 / 3] * 3 + [0] * 7, atol=0.02)
    assert rule.cost(occasion).figures == {"count": rows, "epsilon": 1.0, "classes": classes}


def test_randomised_answers_for_a_wanted_epsilon_cost_it():
    rule = RandomizedAnswers(epsilon=100.0)
    occasion = Occasion(where="client", round=1, releases=4, form=Form(50, 10, False))
    cost = rule.cost(occasion)
    events = [replace(event, count=4 * event.count) for event in events_of(cost)]
    assert spent(events, delta=1e-5).epsilon == pytest.approx(100, rel=1e-5)


def test_what_is_read_of_randomised_answers_are_logits_where_logits_are_asked_for():
    rule = RandomizedAnswers(noise=0.01)
    occasion = Occasion(where="client", round=1, form=Form(1, 3, False))
    read = rule.read(predictions([[0.0, 1.0, 0.0]], "probabilities"), occasion)
    assert read.scale == "logits"
    np.testing.assert_allclose(read.values, np.log([[1e-4, 1, 1e-4]]), atol=1e-5)


# -- votes ---------------------------------------------------------------------------------------


def votes_of(counts, rule, rows, seed=0):
    total = sum(counts)
    mean = np.tile(np.float32(counts) / total, (rows, 1))
    occasion = Occasion(where="server", round=1, clients=total, form=Form(rows, len(counts), True))
    rng = np.random.default_rng(seed)
    return rule.release(predictions(mean, "probabilities"), occasion, rng), occasion


def test_votes_win_as_often_as_their_noise_says():
    # Two classes with 60 and 40 votes, noise 20 on each: P(first wins) = Phi(20 / (20 sqrt 2)).
    won, _ = votes_of((60, 40), Votes(noise=20 / math.sqrt(2)), 200_000)
    assert won.values[:, 0].mean() == pytest.approx(stats.norm.cdf(1 / math.sqrt(2)), abs=0.005)


@pytest.mark.parametrize(("most", "answered"), [(90, 0.9331927987), (55, 0.4012936743)])
def test_a_row_is_answered_as_often_as_published(most, answered):
    """Threshold 60, noise of the check 20: Papernot et al., 2018."""
    rule = Votes(noise=10 / math.sqrt(2), threshold=0.6, check_noise=2.0)
    released, occasion = votes_of((most, 100 - most, 0), rule, 200_000)
    share = (released.values.max(-1) == 1).mean()
    assert share == pytest.approx(answered, abs=0.005)
    figures = rule.cost_of(released, occasion).figures
    assert figures["checked"] == 200_000
    assert figures["answered"] == round(share * 200_000)
    assert figures["check_multiplier"] == pytest.approx(20)
    assert figures["noise_multiplier"] * math.sqrt(2) == pytest.approx(10)


def test_the_check_of_a_threshold_costs_for_rows_that_are_not_answered():
    """privacy-golden, section 7: charged for answered rows alone it would be 2.032, not 2.090."""
    rule = Votes(noise=40 / math.sqrt(2), threshold=0.6, check_noise=150 / 40)
    occasion = Occasion(where="server", round=1, clients=100, form=Form(500, 10, True))
    values = np.full((500, 10), 0.1, np.float32)
    values[:200] = np.eye(10)[3]
    cost = rule.cost_of(predictions(values, "probabilities"), occasion)
    assert spent(events_of(cost), delta=1e-5).epsilon == pytest.approx(2.09022467, abs=1e-7)


def test_votes_for_a_wanted_epsilon_cost_at_most_that():
    for rule in (Votes(epsilon=8.0), Votes(epsilon=8.0, threshold=0.5)):
        occasion = Occasion(
            where="server", round=1, releases=3, clients=100, form=Form(20, 10, True)
        )
        events = [replace(event, count=3 * event.count) for event in events_of(rule.cost(occasion))]
        assert spent(events, delta=1e-5).epsilon == pytest.approx(8, rel=1e-6)


# -- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "votes", "randomized_response", "dp_sgd"])
def test_noise_is_named_once(kind):
    with pytest.raises(ValueError, match=r"one of both, such as privacy\.epsilon=8; got neither"):
        MECHANISMS.read(kind)
    with pytest.raises(ValueError, match="got both"):
        MECHANISMS.read({"kind": kind, "epsilon": 1.0, "noise": 1.0})
    assert MECHANISMS.read({"kind": kind, "epsilon": 1.0}).epsilon == 1.0


def test_what_a_mechanism_cannot_protect_is_refused_by_name():
    gaussian = GaussianRelease(epsilon=1.0)
    assert "got weights, of which nothing bounds" in gaussian.refuses(Weights, "client")
    counts = ClassTable.asked(3, counts=True)
    assert "strategy.weighting: equal" in gaussian.refuses_asked(counts)
    subset = Predictions.asked(np.arange(4), 3, ids="subset")
    assert "which public rows a client sends" in gaussian.refuses_asked(subset)
    assert "privacy.where: server" in Votes(epsilon=1.0).refuses(Predictions, "client")
    answers = RandomizedAnswers(epsilon=1.0)
    assert "privacy.where: client" in answers.refuses(Predictions, "server")
    assert "privacy.where: client" in MECHANISMS.read({"kind": "dp_sgd", "epsilon": 1}).refuses(
        Predictions, "server"
    )


def test_codecs_that_need_distributions_are_refused_after_noise():
    from fedkd.exchange.codecs import TopK

    stages = Stages(up=TopK(k=1), release=GaussianRelease(epsilon=1.0))
    with pytest.raises(ValueError, match=r"exchange.up top_k: it cannot write what .* gaussian"):
        stages.check(up=[Predictions], down=[Predictions], sums="equal")
    # A trusted server gets answers as they are.
    replace(stages, where="server").check(up=[Predictions], down=[Predictions], sums="equal")
