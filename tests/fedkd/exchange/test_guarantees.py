"""Claims that a guarantee rests on, and bugs that would break them: each is planted and caught."""

import math
from dataclasses import replace

import numpy as np
import pytest

from fedkd.exchange import spending
from fedkd.exchange.codecs import Int8
from fedkd.exchange.ledger import OpenLedger
from fedkd.exchange.mechanisms import GaussianRelease, LaplaceRelease, Votes, noise
from fedkd.exchange.mechanisms.randomized import RandomizedAnswers
from fedkd.exchange.mechanisms.sensitivity import on_simplex, sensitivity
from fedkd.exchange.payloads import Predictions
from fedkd.exchange.pipeline import (
    ClientTurn,
    ExchangeState,
    ServerTurn,
    Stages,
    Standing,
)
from fedkd.exchange.pipeline import client as client_side
from fedkd.exchange.pipeline import server as server_side
from fedkd.exchange.release import Form, Occasion
from fedkd.exchange.spending import spent_by_client, spent_of
from fedkd.exchange.views import Upload
from fedkd.privacy import RandomizedResponse, spent

ROWS, CLASSES = 400, 10
UNIT = sensitivity(Form(ROWS, CLASSES, False), clip=1.0, norm="l2")
ASKED = Predictions.asked(np.arange(ROWS), CLASSES)
GAUSSIAN = GaussianRelease(noise=0.5, clip=1.0)


def predictions(values, scale="logits"):
    return Predictions(rows=np.arange(len(values)), values=np.float32(values), scale=scale)


ZEROS = predictions(np.zeros((ROWS, CLASSES)))


def sent_by(client=0, *, rule=GAUSSIAN, round=1, attempt=1, answer=ZEROS, **stages):
    """Return the numbers that leave a client."""
    turn = ClientTurn(
        Stages(release=rule, **stages),
        seed=3,
        round=round,
        attempt=attempt,
        clients={client: Standing()},
    )
    return turn.send({client: answer})[client]


def shown(answers, *, rule=GAUSSIAN, round=1, before=None, sums="equal", **options):
    """Return what a trusted server makes of answers, and what it remembers after that."""
    turn = ServerTurn(
        Stages(release=rule, where="server"), before or ExchangeState(), seed=3, round=round
    )
    for client, answer in enumerate(answers):
        turn.receive(client, answer, ASKED)
    uploads = [Upload(client, answer, 5) for client, answer in enumerate(answers)]
    return list(turn.view(uploads, sums=sums, **options)), turn.committed()


# -- claims --------------------------------------------------------------------------------------


def noise_is_added_at_a_client():
    assert sent_by().values.std() / UNIT == pytest.approx(0.5, rel=0.05)


def noise_is_added_at_the_server():
    (mean,), _ = shown([ZEROS] * 4)
    assert mean.payload.values.std() * 4 / UNIT == pytest.approx(0.5, rel=0.05)


def noise_follows_the_answers_that_came():
    for came in (10, 5):
        (mean,), _ = shown([ZEROS] * came)
        assert mean.payload.values.std() * came / UNIT == pytest.approx(0.5, rel=0.05)


def one_client_moves_a_mean_by_the_sensitivity_at_most():
    quiet = GaussianRelease(noise=1e-6, clip=1.0)
    huge = predictions(np.full((ROWS, CLASSES), 9e3))
    (with_it,), _ = shown([ZEROS, huge], rule=quiet)
    (without,), _ = shown([ZEROS, ZEROS], rule=quiet)
    apart = with_it.payload.values.astype(np.float64) - without.payload.values
    assert np.linalg.norm(apart) <= UNIT / 2 * 1.01


def every_round_and_every_attempt_is_charged():
    state = ExchangeState()
    for round in (1, 2, 3):
        turn = ServerTurn(Stages(release=GAUSSIAN), state, seed=3, round=round)
        for attempt in (1, 2) if round == 2 else (1,):
            turn.send(0, None, lambda _: ZEROS, asked=ASKED, attempt=attempt)
        state = turn.committed()
    assert [round for round, _ in state.ledger.of_client(0)] == [1, 2, 2, 3]
    epsilon = spent_by_client(state.ledger, delta=1e-5)[0].epsilon
    assert epsilon == pytest.approx(spent_of([(GAUSSIAN.cost(SOME), 4)], delta=1e-5).epsilon)


def no_noise_comes_twice():
    tables = [
        sent_by().values,
        sent_by(1).values,
        sent_by(round=2).values,
        sent_by(attempt=2).values,
        # Of two answers as well: else their difference would come out.
        sent_by(answer=predictions(np.full((ROWS, CLASSES), 0.01))).values,
        *(shown([ZEROS], round=round)[0][0].payload.values for round in (1, 2)),
    ]
    for position, one in enumerate(tables):
        for other in tables[position + 1 :]:
            assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.1


def a_threshold_is_charged_for_every_row():
    rule = Votes(noise=40 / math.sqrt(2), threshold=0.6, check_noise=150 / 40)
    occasion = Occasion(where="server", round=1, clients=100, form=Form(500, 10, True))
    values = np.full((500, 10), 0.1)
    values[:200] = np.eye(10)[3]
    cost = rule.cost_of(predictions(values, "probabilities"), occasion)
    assert spent_of([(cost, 1)], delta=1e-5).epsilon == pytest.approx(2.09022467, abs=1e-5)


def what_leaves_was_written_after_the_noise():
    # Of a row of 8-bit numbers and one scale, differences are whole multiples of a step.
    sent = sent_by(up=Int8(), answer=predictions(np.eye(ROWS, CLASSES)))
    values = (sent if isinstance(sent, Predictions) else Int8().decode(sent, {})[0]).values
    values = values.astype(np.float64)
    step = np.abs(values).max(-1) / 127
    levels = values / step[:, None]
    assert np.abs(levels - np.rint(levels)).max() < 0.01
    assert values.std() / UNIT == pytest.approx(0.5, rel=0.05)


def every_randomised_answer_is_counted():
    rule = RandomizedAnswers(noise=2.0)  # epsilon 0.5 each
    cost = rule.cost(Occasion(where="client", round=1, form=Form(20, 10, True)))
    assert spent_of([(cost, 1)], delta=1e-5).epsilon == pytest.approx(4.99270, abs=1e-4)


def means_of_all_others_share_one_noise_that_is_large_enough():
    rng = np.random.default_rng(0)
    answers = [predictions(rng.normal(0, 0.05, (ROWS, CLASSES))) for _ in range(4)]
    uploads, state = shown(answers, sums=None, leaves_one_out=True)
    values = [upload.payload.values.astype(np.float64) for upload in uploads]
    exact = sum(answer.values.astype(np.float64) for answer in answers)
    sums = [sum(values) - values[left] + answers[left].values for left in range(4)]
    for noisy in (*sums, 4 * uploads[0].of_all.values.astype(np.float64)):
        np.testing.assert_allclose(noisy, sums[0], atol=1e-3)
        assert (noisy - exact).std() / UNIT == pytest.approx(0.5, rel=0.05)
    assert len(state.ledger.charges) == 1


SOME = Occasion(where="client", round=1, form=Form(ROWS, CLASSES, False))

CLAIMS = (
    noise_is_added_at_a_client,
    noise_is_added_at_the_server,
    noise_follows_the_answers_that_came,
    one_client_moves_a_mean_by_the_sensitivity_at_most,
    every_round_and_every_attempt_is_charged,
    no_noise_comes_twice,
    a_threshold_is_charged_for_every_row,
    what_leaves_was_written_after_the_noise,
    every_randomised_answer_is_counted,
    means_of_all_others_share_one_noise_that_is_large_enough,
)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_claim(claim):
    claim()


@pytest.mark.parametrize("rule", [GAUSSIAN, LaplaceRelease(noise=0.5, clip=1.0)])
def test_what_a_rule_remembers_is_nothing(rule):
    """The same release is the same, whoever asks how often: a resumed round gives nothing more."""
    once, again = (sent_by(rule=rule).values for _ in range(2))
    np.testing.assert_array_equal(once, again)


# -- planted -------------------------------------------------------------------------------------


def no_noise(patch):
    patch.setattr(GaussianRelease, "draws", lambda self, rng, shape: np.zeros(shape))


def no_clipping(patch):
    patch.setattr(noise, "bounded", lambda payload, **_: payload)


def noise_for_ten_answers(patch):
    patch.setattr(GaussianRelease, "sensitivity", lambda self, occasion: UNIT / 10)


def a_ledger_of_this_round_alone(patch):
    closed = OpenLedger.closed

    def forgetful(self):
        ledger = closed(self)
        return replace(ledger, charges=ledger.charges[len(self.before.charges) :])

    patch.setattr(OpenLedger, "closed", forgetful)


def a_ledger_without_retries(patch):
    charge = OpenLedger.charge_client
    patch.setattr(
        OpenLedger,
        "charge_client",
        lambda self, round, client, attempt, cost: (
            charge(self, round, client, attempt, cost) if attempt == 1 else None
        ),
    )


def _noise_of(*parts):
    """Return a stream that depends on nothing but some of seed, purpose, round, side, ..."""

    def plant(patch):
        honest = client_side.generator_for
        for side in (client_side, server_side):
            patch.setattr(
                side,
                "generator_for",
                lambda *key: honest(*(part if at in parts else 1 for at, part in enumerate(key))),
            )

    return plant


def a_threshold_for_answered_rows(patch):
    honest = Votes._cost

    def cheap(self, occasion, answered):
        cost = honest(self, occasion, answered)
        return replace(cost, figures={**cost.figures, "checked": answered})

    patch.setattr(Votes, "_cost", cheap)


def a_codec_before_the_release(patch):
    released, encoded = ClientTurn._released, ClientTurn._encoded

    def swapped(self, client, payload):
        return released(self, client, Int8().decode(encoded(self, client, payload), {})[0])

    patch.setattr(ClientTurn, "_released", swapped)
    patch.setattr(ClientTurn, "_encoded", lambda self, client, payload: payload)


def randomised_answers_without_their_count(patch):
    honest = spending.events_of
    patch.setattr(
        spending,
        "events_of",
        lambda cost: tuple(
            replace(event, count=1) if isinstance(event, RandomizedResponse) else event
            for event in honest(cost)
        ),
    )


def a_smaller_noise_on_each_answer(patch):
    draws = np.random.default_rng(0)

    def each(payload, released):
        share = 0.5 * UNIT / 4
        values = payload.values + draws.normal(0, share, payload.values.shape)
        return payload.with_arrays({"values": values.astype(np.float32)})

    patch.setattr(server_side, "_with", each)


def a_projection_before_the_mean(patch):
    honest = server_side._with

    def projected(payload, released):
        made = honest(payload, released)
        return made.with_arrays({"values": on_simplex(made.values)})

    patch.setattr(server_side, "_with", projected)


def a_mean_of_all_with_more_noise(patch):
    patch.setattr(
        server_side, "_scaled", lambda payload, factor: payload if factor else _zero(payload)
    )


def _zero(payload):
    return payload.with_arrays({"values": np.zeros_like(payload.values)})


PLANTED = (
    (no_noise, noise_is_added_at_a_client),
    (no_noise, noise_is_added_at_the_server),
    (no_clipping, one_client_moves_a_mean_by_the_sensitivity_at_most),
    (noise_for_ten_answers, noise_follows_the_answers_that_came),
    (a_ledger_of_this_round_alone, every_round_and_every_attempt_is_charged),
    (a_ledger_without_retries, every_round_and_every_attempt_is_charged),
    # Of seed, purpose, round, side, client, attempt and content one is left out.
    *(
        (_noise_of(*({0, 1, 2, 3, 4, 5, 6} - {left})), no_noise_comes_twice)
        for left in (2, 4, 5, 6)
    ),
    (a_threshold_for_answered_rows, a_threshold_is_charged_for_every_row),
    (a_codec_before_the_release, what_leaves_was_written_after_the_noise),
    (randomised_answers_without_their_count, every_randomised_answer_is_counted),
    (
        a_smaller_noise_on_each_answer,
        means_of_all_others_share_one_noise_that_is_large_enough,
    ),
    (a_projection_before_the_mean, means_of_all_others_share_one_noise_that_is_large_enough),
    (a_mean_of_all_with_more_noise, means_of_all_others_share_one_noise_that_is_large_enough),
)


@pytest.mark.parametrize(
    ("plant", "claim"),
    PLANTED,
    ids=[f"{at}-{claim.__name__}" for at, (_, claim) in enumerate(PLANTED)],
)
def test_a_planted_bug_is_caught(plant, claim, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        claim()


def test_twenty_rounds_cost_more_than_one_and_more_rows_than_fewer():
    """An epsilon of one release printed once for all of them is the oldest of these mistakes."""
    answers = RandomizedAnswers(noise=10.0)
    few, many = (
        answers.cost(Occasion(where="client", round=1, form=Form(rows, 10, True)))
        for rows in (10, 40)
    )
    for cost in (GAUSSIAN.cost(SOME), LaplaceRelease(noise=5.0).cost(SOME), few):
        grown = [spent_of([(cost, rounds)], delta=1e-5).epsilon for rounds in (1, 5, 20)]
        assert grown[0] < grown[1] < grown[2]
    assert spent_of([(few, 1)], delta=1e-5).epsilon < spent_of([(many, 1)], delta=1e-5).epsilon
    # Rows of tables are in the sensitivity: more rows, more noise for the same epsilon.
    wide = sensitivity(Form(4 * ROWS, CLASSES, False), clip=1.0, norm="l2")
    assert wide == pytest.approx(2 * UNIT)
    assert spent(spending.events_of(few), delta=1e-5).pure == pytest.approx(1.0)
