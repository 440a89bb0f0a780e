"""COMET: both groups' means travel, and each client learns the one nearest to what it says."""

import numpy as np
import pytest
import torch

from fedkd.exchange.payloads import Predictions
from fedkd.models import ModelSettings
from fedkd.targets import Targets
from fedkd.training import Batch, Cohort, Outputs, Passes, supervised
from strategies.contract import (
    Call,
    Federation,
    Received,
    ServerModel,
    ServerTools,
    Trained,
    Upload,
)
from strategies.public_predictions.comet import COMET, Centroids, COMETSettings
from strategies.public_predictions.dsfl import SERVER
from strategies.shared.lessons import Distilling

S = [[1.0, 2, 3, 0], [0.5, -1, 0, 2]]
T = [[2.0, 1, 4, -1], [0, 0, 1, 3]]
U = [[-4.0, 3, 1, 1], [2, 0, -1, 1]]
V = [[-3.0, 2, 1, 0], [3, 0, -1, 1]]
FIRST = [
    [0.10034697, 0.13932769, 0.74146938, 0.01885595],
    [0.09938054, 0.03783508, 0.10284642, 0.75993796],
]
SECOND = [
    [0.00258974, 0.72434704, 0.17503350, 0.09802971],
    [0.73743346, 0.06425751, 0.02363902, 0.17467002],
]


class Board(ServerTools):
    """Server tools whose model writes down what it is taught."""

    def __init__(self):
        self.lessons = []

    def new(self, name):
        return ServerModel(name, {})

    def fit(self, model, objective, *, round, public):
        self.lessons.append(public.targets.values)
        return Trained(model)


def comet(**settings):
    federation = Federation(
        seed=0,
        rounds=3,
        participation=1.0,
        models=(ModelSettings(name="mlp"),) * 4,
        local=Passes(batch_size=8),
        public_size=2,
        rows_per_round=2,
        public_labelled=False,
        num_classes=4,
        input_shape=(1, 8, 8),
        num_examples=(5,) * 4,
    )
    return COMET(COMETSettings(**settings), federation)


def uploads(*logits):
    soft = torch.softmax(torch.tensor(logits), -1).numpy()
    return [
        Upload(client, Predictions(rows=np.arange(2), values=own, scale="probabilities"), 5)
        for client, own in enumerate(soft)
    ]


def after(strategy, sent, state=None, server=None):
    server = server or Board()
    state = strategy.begin(server) if state is None else state
    return strategy.aggregate(state, sent, strategy.federation.round(1), server)


def told(state):
    return [part.values for part in state.means.parts.values()]


class Says:
    """A cohort whose members predict what they are made with, and that writes down its fits."""

    def __init__(self, *logits):
        self.clients = tuple(range(len(logits)))
        self._logits, self.fits = np.array(logits, np.float32), []

    def predict_public(self, rows):
        return self._logits[:, rows]

    def fit(self, objective, *, private=None, public=None):
        self.fits.append((objective, private, public))


Cohort.register(Says)


def learnt(strategy, state, *logits):
    cohort = Says(*logits)
    received = Received([strategy.payload(state, "means")] * len(logits))
    strategy.client(cohort, received, Call(strategy.federation, 2))
    (lesson,) = [public for _, _, public in cohort.fits if public is not None]
    return [lesson.targets_of(place).values for place in range(len(logits))], cohort


# -- the server --------------------------------------------------------------------------------


def test_the_means_of_both_groups_go_to_everybody():
    strategy = comet()
    state = after(strategy, uploads(S, T, U, V))
    assert np.allclose(told(state), [FIRST, SECOND], atol=1e-7)
    round = strategy.federation.round(2)
    assert {strategy.receives(state, client, round) for client in range(4)} == {"means"}
    payload = strategy.payload(state, "means")
    assert payload.payload_bytes == 2 * 2 * 4 * 4
    assert all(part.scale == "probabilities" for part in payload.parts.values())


def test_groups_of_clients_hold_for_all_rows():
    # Row 0 alone would put the second client to the third.
    mixed = [U[0], T[1]]
    apart = after(comet(), uploads(S, mixed, U, V))
    whole = after(comet(group="clients"), uploads(S, mixed, U, V))
    soft = torch.softmax(torch.tensor([S, mixed, U, V]), -1).numpy()
    assert np.allclose(told(apart)[0], [soft[0, 0], soft[:2, 1].mean(0)], atol=1e-6)
    assert np.allclose(told(whole), [soft[:2].mean(0), soft[2:].mean(0)], atol=1e-6)


def test_one_group_is_the_mean_of_all():
    (mean,) = told(after(comet(clusters=1), uploads(S, T, U, V)))
    assert np.allclose(mean, torch.softmax(torch.tensor([S, T, U, V]), -1).mean(0), atol=1e-6)


def test_the_server_s_model_distils_the_mean_of_all():
    server = Board()
    state = after(comet(server_model="mlp"), uploads(S, T, U, V), server=server)
    assert state.model.name == SERVER
    (lesson,) = server.lessons
    assert np.allclose(lesson, torch.softmax(torch.tensor([S, T, U, V]), -1).mean(0), atol=1e-6)


def test_each_direction_can_be_switched_off():
    server = Board()
    strategy = comet(server_model="mlp", directions=["clients"])
    state = after(strategy, uploads(S, T), server=server)
    assert not server.lessons
    assert strategy.receives(state, 0, strategy.federation.round(2)) == "means"
    strategy = comet(server_model="mlp", directions=["server"])
    state = after(strategy, uploads(S, T), server=server)
    assert len(server.lessons) == 1
    assert strategy.receives(state, 0, strategy.federation.round(2)) is None


def test_where_nobody_answers_the_last_means_stay():
    strategy = comet()
    state = after(strategy, uploads(S, T, U, V))
    assert after(strategy, [], state) is state
    assert after(strategy, []) == Centroids()


def test_a_single_client_and_clients_that_agree_have_two_equal_means():
    soft = torch.softmax(torch.tensor(S), -1).numpy()
    for sent in (uploads(S), uploads(S, S, S)):
        assert np.allclose(told(after(comet(), sent)), [soft, soft], atol=1e-6)


# -- the client --------------------------------------------------------------------------------


def test_each_client_learns_the_means_nearest_to_what_it_says_row_by_row():
    strategy = comet()
    state = after(strategy, uploads(S, T, U, V))
    lessons, cohort = learnt(strategy, state, S, U, [S[0], V[1]])
    assert np.allclose(lessons[0], FIRST, atol=1e-7)
    assert np.allclose(lessons[1], SECOND, atol=1e-7)
    assert np.allclose(lessons[2], [FIRST[0], SECOND[1]], atol=1e-7)
    (distil, private, _), (train, passes, _) = cohort.fits
    assert (distil, private) == (Distilling(1.0), None)
    assert train is supervised
    assert passes is not None


def test_by_clients_one_group_is_nearest_for_all_rows():
    strategy = comet(group="clients")
    state = after(strategy, uploads(S, T, U, V))
    (lesson,), _ = learnt(strategy, state, [S[0], S[1]])
    assert np.allclose(lesson, FIRST, atol=1e-7)
    (lesson,), _ = learnt(strategy, state, [V[0], [0, 0, 0, 0]])
    assert np.allclose(lesson, SECOND, atol=1e-7)


def test_the_public_term_may_be_in_the_steps_at_home():
    strategy = comet(distil="beside", kd_weight=0.5)
    state = after(strategy, uploads(S, T, U, V))
    _, cohort = learnt(strategy, state, S)
    ((objective, private, public),) = cohort.fits
    assert private is not None
    assert public is not None
    targets = Targets(torch.tensor(SECOND), scale="probabilities")
    batch = Batch(labels=torch.tensor([2, 0]), targets=targets)
    losses = objective(Outputs(private=torch.tensor(S), public=torch.tensor(S)), batch)
    assert losses.keys() == {"ce", "kd"}
    assert float(losses["ce"].mean()) == pytest.approx(1.14126964, abs=1e-6)
    divergence = float(Distilling()(Outputs(public=torch.tensor(S)), batch)["kd"].mean())
    assert float(losses["kd"].mean()) == pytest.approx(0.5 * divergence)
    assert divergence > 0.1


def test_without_a_weight_nothing_is_learnt_from_others():
    strategy = comet(kd_weight=0.0)
    assert strategy.learns_alone
    state = after(strategy, uploads(S, T, U, V))
    cohort = Says(S)
    strategy.client(
        cohort, Received([strategy.payload(state, "means")]), Call(strategy.federation, 2)
    )
    assert [objective for objective, _, _ in cohort.fits] == [supervised]
    assert strategy.receives(state, 0, strategy.federation.round(2)) is None
