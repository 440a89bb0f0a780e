"""RHFL: who learns well is believed more, and what travels has the gradient of the paper's sum."""

import numpy as np
import pytest
import torch

from fedkd.exchange.payloads import Bundle, Numbers, Predictions
from fedkd.losses.noisy_labels import symmetric_rows
from fedkd.targets import Targets
from fedkd.training import Batch, Outputs, RowOutputs, supervised
from strategies.contract import Upload
from strategies.public_predictions.rhfl import (
    LOSS,
    SCORES,
    TAUGHT,
    TRUST,
    Trust,
    confidence_weights,
    private_losses,
    towards_others,
)

S = torch.tensor([[1, 2, 3, 0], [0.5, -1, 0, 2]], dtype=torch.float64)
T = torch.tensor([[2, 1, 4, -1], [0, 0, 1, 3]], dtype=torch.float64)
U = torch.tensor([[-4, 3, 1, 1], [2, 0, -1, 1]], dtype=torch.float64)
WEIGHTS = [0.38360255, 0.31438248, 0.30201496]


@pytest.fixture
def rhfl(tiny_settings, tiny_data, parts):
    return lambda **options: parts(tiny_settings("rhfl", options=options), tiny_data())


def upload(round, client, logits, loss):
    values = np.broadcast_to(np.asarray(logits, np.float32), (len(round.public_rows), 3))
    scores = Predictions(rows=round.public_rows, values=values.copy())
    return Upload(client, Bundle(parts={SCORES: scores, LOSS: Numbers.of(loss)}), 5)


# -- confidence --------------------------------------------------------------------------------


def test_confidence_matches_the_published_value():
    weights = confidence_weights((1, 1.2, 0.9), (0.8, 1.1, 0.85), beta=0.5)
    assert weights == pytest.approx(WEIGHTS, abs=1e-8)


def test_before_anybody_was_there_twice_all_others_together_weigh_one():
    assert confidence_weights((None, None, None), (1, 2, 3), beta=0.5) == [0.5] * 3


@pytest.mark.parametrize("before", [(0.8, 1.1), (0.7, 1.0), (0.8, 1.2)])
def test_losses_that_did_not_fall_together_weigh_nobody_out(before):
    """Published fault: shares of a sum that is 0 or negative.

    Were q = (0, 0) divided by its sum, the weights would be NaN; with q = (-0.1, 0.09) the client
    that got worse would win.
    """
    weights = confidence_weights(before, (0.8, 1.1), beta=0.5)
    assert sum(weights) == pytest.approx(1)
    assert all(0 < weight < 1 for weight in weights)
    assert weights[1] >= weights[0]


def test_a_loss_that_rose_counts_as_one_that_stayed():
    rose = confidence_weights((1.0, 1.0), (2.0, 0.9), beta=0.5)
    stayed = confidence_weights((1.0, 1.0), (1.0, 0.9), beta=0.5)
    assert rose == pytest.approx(stayed)


def test_who_is_new_has_no_bonus_and_a_loss_of_zero_divides_nothing():
    new = confidence_weights((None, 1.0, 1.0), (0.1, 0.9, 1.0), beta=0.5)
    assert new[0] == new[2] < new[1]
    perfect = confidence_weights((1.0, 1.0), (0.0, 0.9), beta=0.5)
    assert np.isfinite(perfect).all()
    assert perfect[0] > perfect[1]


def test_one_client_alone_has_all_the_weight():
    assert confidence_weights([None], [1.0], beta=0.5) == [1.0]
    assert confidence_weights([1.0], [0.5], beta=0.5) == [1.0]


# -- what is minimised -------------------------------------------------------------------------


def lesson_of_s():
    """What client s is told: the others' weighted mean, and the sum of their weights."""
    probabilities = torch.softmax(torch.stack([T, U]), -1)
    others = torch.tensor(WEIGHTS[1:], dtype=torch.float64)
    mean = torch.einsum("k,krc->rc", others, probabilities) / others.sum()
    return probabilities, others, mean


def test_the_public_loss_is_the_published_one_up_to_a_constant_with_its_gradient():
    # sum_j w_j KL(p_j || s) = 0.27379527; it differs from what is minimised by the spread of the
    # p_j around their mean, in which s has no part.
    probabilities, others, mean = lesson_of_s()
    own = S.clone().requires_grad_()
    targets = Targets(mean, scale="probabilities", temperature=1.0)
    batch = Batch(targets=targets, tables={TRUST: others.sum()[None]})
    loss = towards_others(Outputs(public=own), batch)["kd"].mean()
    spread = (others[:, None, None] * torch.xlogy(probabilities, probabilities / mean)).sum() / 2
    assert (loss + spread).item() == pytest.approx(0.27379527, abs=1e-8)
    literal = own.detach().clone().requires_grad_()
    log_p = torch.log_softmax(literal, -1)
    kls = torch.xlogy(probabilities, probabilities).sum((1, 2)) - (probabilities * log_p).sum(
        (1, 2)
    )
    total = (others * kls).sum() / 2
    assert total.item() == pytest.approx(0.27379527, abs=1e-8)
    loss.backward()
    total.backward()
    assert own.grad is not None
    assert literal.grad is not None
    assert torch.allclose(own.grad, literal.grad, atol=1e-12)


def test_the_server_tells_each_client_that_mean_and_that_sum(rhfl):
    strategy, server = rhfl()
    round = strategy.federation.round(1)
    logits = {0: [1.0, 2.0, 3.0], 1: [2.0, 1.0, 0.0], 2: [0.0, 0.0, 5.0]}
    before = Trust(losses={0: 1.0, 1: 1.2, 2: 0.9})
    uploads = [
        upload(round, client, logits[client], loss)
        for client, loss in zip(logits, (0.8, 1.1, 0.85), strict=True)
    ]
    state = strategy.aggregate(before, iter(uploads), round, server)
    told = strategy.payload(state, strategy.receives(state, 0, round.next()))
    p = {client: np.exp(own) / np.exp(own).sum() for client, own in logits.items()}
    expected = (WEIGHTS[1] * p[1] + WEIGHTS[2] * p[2]) / (WEIGHTS[1] + WEIGHTS[2])
    np.testing.assert_allclose(told[TAUGHT].values[0], expected, rtol=1e-5)
    assert told[TRUST][0] == pytest.approx(WEIGHTS[1] + WEIGHTS[2], rel=1e-6)
    # Client 3 was not there: all three teach it.
    assert strategy.receives(state, 3, round.next()) == "shared"
    everybody = strategy.payload(state, "shared")
    mean = sum(weight * p[client] for client, weight in enumerate(WEIGHTS))
    np.testing.assert_allclose(everybody[TAUGHT].values[0], mean, rtol=1e-5)
    assert everybody[TRUST][0] == 1
    assert state.losses == pytest.approx({0: 0.8, 1: 1.1, 2: 0.85})


def test_a_client_alone_learns_from_nobody_and_teaches_who_comes_next(rhfl):
    strategy, server = rhfl()
    round = strategy.federation.round(1)
    state = strategy.aggregate(Trust(), [upload(round, 2, [1, 0, 0], 1.0)], round, server)
    assert strategy.receives(state, 2, round.next()) is None
    assert strategy.receives(state, 0, round.next()) == "shared"
    assert strategy.payload(state, "shared")[TAUGHT].values.sum(-1) == pytest.approx(1)


def test_a_round_without_answers_keeps_what_was_known(rhfl, same):
    strategy, server = rhfl()
    round = strategy.federation.round(1)
    state = strategy.aggregate(Trust(), [upload(round, 2, [1, 0, 0], 1.0)], round, server)
    assert same(strategy.aggregate(state, [], round.next(), server), state)


def test_who_was_away_is_weighed_by_the_loss_of_its_last_round(rhfl):
    strategy, server = rhfl()
    first, second, third = (strategy.federation.round(number) for number in (1, 2, 3))
    state = strategy.aggregate(
        Trust(), [upload(first, c, [1, 0, 0], 1.0) for c in (0, 1)], first, server
    )
    state = strategy.aggregate(state, [upload(second, 1, [1, 0, 0], 0.9)], second, server)
    state = strategy.aggregate(
        state, [upload(third, c, [1, 0, 0], 0.5) for c in (0, 1)], third, server
    )
    weights = confidence_weights((1.0, 0.9), (0.5, 0.5), beta=0.5)
    assert strategy.payload(state, 0)[TRUST][0] == pytest.approx(weights[1], rel=1e-6)


def test_private_rows_pay_symmetric_cross_entropy():
    batch = Batch(labels=torch.tensor([2, 0]))
    loss = private_losses(Outputs(private=S), batch, rows_of=symmetric_rows)
    assert loss["sce"].mean().item() == pytest.approx(5.62946773, abs=1e-8)


# -- a round -----------------------------------------------------------------------------------


def test_bytes_are_a_number_more_than_those_of_the_scores(tiny_settings, tiny_data, simulate):
    run = simulate(tiny_settings("rhfl", rounds=2), tiny_data())
    table = 20 * 3 * 4
    assert [row["bytes_up"] for row in run.history.federation] == [4 * (table + 4)] * 2
    down = [row["bytes_down"] for row in run.history.federation]
    assert down == [0, 4 * (table + 4)]


def test_a_round_approaches_the_others_first_and_without_its_direction_never(spy, rhfl, learn):
    lesson = Bundle(
        parts={
            TAUGHT: Predictions(
                rows=np.arange(4), values=np.full((4, 3), 1 / 3, np.float32), scale="probabilities"
            ),
            TRUST: Numbers.of(0.5),
        }
    )
    seen = RowOutputs(
        rows=np.arange(1), labels=np.zeros(1, int), logits=np.zeros((1, 3), np.float32)
    )
    asked = {}
    for name, options in {
        "all": {},
        "none": {"directions": []},
        "home": {"public_epochs": 0},
    }.items():
        cohort = spy()
        cohort.outputs = lambda on: [seen]
        learn(rhfl(**options)[0], cohort, lesson, 2)
        asked[name] = [fit["objective"] for fit in cohort.fits]
    assert [len(fits) for fits in asked.values()] == [2, 1, 1]
    assert asked["all"][0] is towards_others
    assert asked["none"] == [supervised]
    assert asked["home"][0].func is private_losses


def test_a_client_that_does_not_get_better_has_less_say(rhfl):
    strategy, server = rhfl()
    first, second = strategy.federation.round(1), strategy.federation.round(2)
    now = {0: 0.5, 1: 0.5, 2: 2.3}
    state = strategy.aggregate(
        Trust(), [upload(first, c, [0, 0, 0], 2.3) for c in now], first, server
    )
    state = strategy.aggregate(
        state, [upload(second, c, [0, 0, 0], loss) for c, loss in now.items()], second, server
    )
    trusts = [strategy.payload(state, client)[TRUST][0] for client in now]
    weights = [1 - trust for trust in trusts]
    assert weights[2] < weights[0] == pytest.approx(weights[1])


def test_a_lie_about_a_loss_is_refused_where_it_cannot_be_one(rhfl):
    strategy, server = rhfl()
    round = strategy.federation.round(1)
    asked = strategy.asks(Trust(), 0, round, server)
    assert upload(round, 0, [2, 0, 0], 0.3).payload.problem(asked) is None
    assert "a loss is negative" in upload(round, 0, [2, 0, 0], -1.0).payload.problem(asked)


def test_losses_are_measured_alike_whatever_the_weights_are_scheduled_to(spy, rhfl, learn):
    # Otherwise a client would seem to get worse because a weight rises.
    seen = RowOutputs(
        rows=np.arange(1), labels=np.zeros(1, int), logits=np.array([[0.0, 1.0, 0.0]], np.float32)
    )
    ramp = {"kind": "linear", "start": 0.0, "end": 1.0}
    strategy, _ = rhfl(ce_weight=ramp, reverse_weight=ramp)
    sent = []
    for number in (1, 2):
        cohort = spy()
        cohort.outputs = lambda on: [seen]
        (answer,) = learn(strategy, cohort, None, number)
        sent.append(answer[LOSS][0])
    assert sent[0] == sent[1] > 0


@pytest.mark.parametrize("beta", [-0.1, 20.5, {"kind": "linear", "start": 0.5, "end": 21}])
def test_confidence_counts_within_bounds(rhfl, beta):
    with pytest.raises(ValueError, match="beta"):
        rhfl(beta=beta)
