"""Cronus: clients learn a robust mean of soft labels while they learn their own rows."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fedkd.exchange.payloads import Predictions
from fedkd.models import ModelSettings
from fedkd.training import Passes
from strategies.contract import Federation, ServerTools, Upload
from strategies.public_predictions.cronus import Cronus, CronusSettings
from strategies.shared.lessons import Lesson

FIVE = [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.65, 0.25, 0.1], [0.5, 0.3, 0.2], [0.0, 0.0, 1.0]]

NO_TOOLS = object.__new__(ServerTools)
"""For a server half that uses none."""


def cronus(clients=5, **settings):
    federation = Federation(
        seed=0,
        rounds=3,
        participation=1.0,
        models=(ModelSettings(name="mlp"),) * clients,
        local=Passes(batch_size=8),
        public_size=2,
        rows_per_round=2,
        public_labelled=False,
        num_classes=3,
        input_shape=(1, 8, 8),
        num_examples=(5,) * clients,
    )
    return Cronus(CronusSettings(**settings), federation)


def uploads(*soft):
    rows = np.arange(2)
    return [
        Upload(
            client,
            Predictions(rows=rows, values=np.array([own, own], np.float32), scale="probabilities"),
            5,
        )
        for client, own in enumerate(soft)
    ]


def target(strategy, sent, state=None):
    round = strategy.federation.round(1)
    return strategy.aggregate(state or Lesson(), sent, round, NO_TOOLS).predictions


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"dishonest": 0.4}, [0.65, 0.25, 0.10]),
        ({"aggregation": "mean"}, [0.49, 0.21, 0.30]),
        ({"aggregation": "median"}, [0.63157895, 0.26315789, 0.10526316]),
        ({"aggregation": "trimmed_mean", "trim": 0.2}, [0.60344828, 0.25862069, 0.13793103]),
        ({"aggregation": "geometric_median"}, [0.61107988, 0.26280099, 0.12611913]),
    ],
)
def test_what_clients_learn_is_the_robust_mean_of_their_soft_labels(settings, expected):
    told = target(cronus(**settings), uploads(*FIVE))
    assert np.allclose(told.values, [expected, expected], atol=1e-7)
    assert (told.scale, told.temperature, told.averaged) == ("probabilities", 1.0, True)


TRUST = [0.20834572, 0.21789522, 0.21489329, 0.24334102, 0.11552475]


def test_trust_falls_with_the_distance_from_the_robust_mean():
    strategy = cronus(aggregation="mean", trust_rate=1.0)
    round = strategy.federation.round(1)
    state = strategy.aggregate(Lesson(), uploads(*FIVE), round, NO_TOOLS)
    assert np.allclose(state.trust, TRUST, atol=1e-7)
    expected = [0.53793028, 0.23376334, 0.22830638]
    assert np.allclose(state.predictions.values, [expected, expected], atol=1e-7)
    # It goes on falling, and who was away keeps what it had.
    again = strategy.aggregate(state, uploads(*FIVE)[1:], round, NO_TOOLS)
    assert again.trust[0] == state.trust[0]
    assert again.trust[4] < 0.7 * state.trust[4]
    assert again.trust.sum() == pytest.approx(1)
    assert strategy.aggregate(again, [], round, NO_TOOLS) is again


def test_a_client_that_nobody_trusts_any_more_counts_for_nothing():
    strategy = cronus(aggregation="median", trust_rate=100.0)
    round, state = strategy.federation.round(1), Lesson()
    for _ in range(30):
        state = strategy.aggregate(state, uploads(*FIVE), round, NO_TOOLS)
        assert np.isfinite(state.trust).all()
        assert np.allclose(state.predictions.values.sum(-1), 1, atol=1e-6)
    assert state.trust[4] == pytest.approx(0, abs=1e-12)


def test_at_another_temperature_soft_labels_are_softened_before_they_are_averaged():
    strategy = cronus(aggregation="mean", temperature=2.0)
    told = target(strategy, uploads([0.9, 0.09, 0.01], [0.25, 0.25, 0.5]))
    roots = np.sqrt([[0.9, 0.09, 0.01], [0.25, 0.25, 0.5]])
    softened = roots / roots.sum(-1, keepdims=True)
    assert told.temperature == 2.0
    assert np.allclose(told.values[0], softened.mean(0), atol=1e-6)


def test_where_nobody_answers_the_last_mean_is_learnt_again():
    strategy = cronus()
    before = Lesson(target(strategy, uploads(*FIVE)))
    assert target(strategy, [], before) is before.predictions
    assert target(strategy, []) is None


def test_a_single_client_learns_what_it_said_itself():
    assert np.allclose(target(cronus(1), uploads(FIVE[0])).values, FIVE[0])


def test_private_and_public_rows_are_learnt_in_one_step(
    tiny_settings, tiny_data, parts, spy, learn
):
    # Not digest, then revisit.
    strategy, _ = parts(tiny_settings("cronus"), tiny_data())
    cohort = spy((0,), 3)
    soft = np.full((4, 3), 1 / 3, np.float32)
    received = Predictions(rows=np.arange(4), values=soft, scale="probabilities", averaged=True)
    (sent,) = learn(strategy, cohort, received, 2)
    assert cohort.order == ["fit", "predict_public"]
    (fit,) = cohort.fits
    assert fit["private"] is not None
    assert fit["public"].targets.scale == "probabilities"
    assert sent.scale == "probabilities"


def test_a_share_of_liars_out_of_range_is_refused():
    with pytest.raises(ValidationError, match="dishonest"):
        CronusSettings(dishonest=1.0)


def test_targets_stay_distributions_whatever_is_sent():
    one_hot = np.eye(3)[[0, 1, 2, 0, 1]].tolist()
    for aggregation in ("filter", "geometric_median", "median", "trimmed_mean", "mean"):
        told = target(cronus(aggregation=aggregation, dishonest=0.4), uploads(*one_hot))
        assert torch.isfinite(torch.tensor(told.values)).all()
        assert np.allclose(told.values.sum(-1), 1, atol=1e-6)
