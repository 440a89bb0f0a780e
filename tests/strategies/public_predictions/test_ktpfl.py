"""KT-pFL: clients learn mixes of their own, whose coefficients the server learns."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedkd.exchange.payloads import Predictions
from fedkd.models import ModelSettings
from fedkd.targets import Targets
from fedkd.training import Batch, Outputs, Passes, supervised
from strategies.contract import Federation, ServerTools, Upload
from strategies.public_predictions.ktpfl import (
    KTpFL,
    KTpFLSettings,
    gradients,
    projected,
    published_steps,
    shares_of,
)

S = [[1.0, 2, 3, 0], [0.5, -1, 0, 2]]
T = [[2.0, 1, 4, -1], [0, 0, 1, 3]]
U = [[-4.0, 3, 1, 1], [2, 0, -1, 1]]
SOFT = torch.softmax(torch.tensor([S, T, U]), -1).numpy()
EQUAL = np.full((3, 3), 1 / 3)

NO_TOOLS = object.__new__(ServerTools)
"""For a server half that uses none."""


def ktpfl(clients=3, **settings):
    federation = Federation(
        seed=0,
        rounds=5,
        participation=1.0,
        models=(ModelSettings(name="mlp"),) * clients,
        local=Passes(batch_size=8),
        public_size=2,
        rows_per_round=2,
        public_labelled=False,
        num_classes=4,
        input_shape=(1, 8, 8),
        num_examples=(5,) * clients,
    )
    return KTpFL(KTpFLSettings(**{"temperature": 1.0, **settings}), federation)


def uploads(**logits):
    """Return uploads of clients by number: ``uploads(_0=S)``."""
    return [
        Upload(
            int(name[1:]), Predictions(rows=np.arange(2), values=np.array(values, np.float32)), 5
        )
        for name, values in logits.items()
    ]


def after(strategy, sent, state=None):
    state = strategy.begin(NO_TOOLS) if state is None else state
    return strategy.aggregate(state, sent, strategy.federation.round(1), NO_TOOLS)


# -- values by hand ----------------------------------------------------------------------------


def test_the_gradient_of_the_coefficients():
    expected = [
        [-0.02917449, -0.04749378, 0.03322744],
        [-0.06277588, -0.10650185, 0.07999061],
        [0.09195037, 0.15399563, -0.11321804],
    ]
    assert np.allclose(gradients(EQUAL, SOFT, rho=0.7, clients=3), expected, atol=2e-8)


def test_the_gradient_is_that_of_the_distance_of_the_mix_and_of_the_pull():
    def losses(coefficients):
        mix = torch.einsum("ij,jrc->irc", coefficients, torch.tensor(SOFT).double())
        near = (mix - torch.tensor(SOFT)).square().mean(dim=(1, 2))
        return near + 0.7 * (coefficients - 1 / 3).square().mean(dim=1)

    assert np.allclose(losses(torch.tensor(EQUAL)), [0.00734711, 0.03836974, 0.07873035], atol=1e-8)
    uneven = np.array([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8]])
    leaf = torch.tensor(uneven, requires_grad=True)
    (expected,) = torch.autograd.grad(losses(leaf).sum(), leaf)
    assert np.allclose(gradients(uneven, SOFT, rho=0.7, clients=3), expected, atol=1e-7)


@pytest.mark.parametrize(
    ("project", "expected"),
    [
        (
            "simplex",
            [
                [0.34068044, 0.34984009, 0.30947948],
                [0.34984009, 0.37170307, 0.27845684],
                [0.30947948, 0.27845684, 0.41206368],
            ],
        ),
        (
            "softmax5",
            [
                [0.34454028, 0.36068653, 0.29477318],
                [0.35519629, 0.39622629, 0.24857742],
                [0.28356881, 0.24282515, 0.47360604],
            ],
        ),
    ],
)
def test_coefficients_after_a_step_of_one_half(project, expected):
    state = after(ktpfl(step=0.5, project=project), uploads(_0=S, _1=T, _2=U))
    assert np.allclose(state.coefficients, expected, atol=2e-8)


def test_the_next_step_goes_on_from_the_coefficients_of_the_last():
    strategy = ktpfl(step=0.5)
    once = after(strategy, uploads(_0=S, _1=T, _2=U))
    twice = after(strategy, uploads(_0=S, _1=T, _2=U), once)
    gradient = gradients(once.coefficients, SOFT, rho=0.7, clients=3)
    expected = projected(once.coefficients - 0.5 * gradient, "simplex")
    assert np.allclose(twice.coefficients, expected, atol=1e-12)
    assert np.abs(twice.coefficients - once.coefficients).max() > 0.01


def test_a_step_before_its_projection():
    stepped = EQUAL - 0.5 * gradients(EQUAL, SOFT, rho=0.7, clients=3)
    expected = [
        [0.34792058, 0.35708022, 0.31671961],
        [0.36472127, 0.38658426, 0.29333803],
        [0.28735815, 0.25633552, 0.38994236],
    ]
    assert np.allclose(stepped, expected, atol=1e-8)


def test_the_published_code_s_steps_and_projection_give_its_coefficients():
    gradient = gradients(EQUAL, SOFT, rho=0.7, clients=3)
    assert np.allclose(published_steps(gradient).ravel(), [1, 0.2, 0.2])
    state = after(ktpfl(project="softmax5"), uploads(_0=S, _1=T, _2=U))
    expected = [
        [0.3536196, 0.3875397, 0.2588406],
        [0.3434475, 0.3587983, 0.2977541],
        [0.3156992, 0.2967069, 0.3875939],
    ]
    assert np.allclose(state.coefficients, expected, atol=1e-7)


@pytest.mark.parametrize("size", [1e-9, 1e-4, 3e-3, 0.02, 0.3, 40.0])
def test_a_published_step_is_a_power_of_five_at_most_the_fifth(size):
    (step,) = published_steps(np.array([[size, -size]])).ravel()
    power = np.log(step) / np.log(5)
    assert power == pytest.approx(round(power))
    assert abs(power) <= 5
    if 1e-5 < size < 30:
        assert 0.01 <= step * size <= 0.05


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.04907065), (10.0, 0.00073398)])
def test_what_a_client_pays_for_its_distance_from_the_mix(temperature, expected):
    # Coefficients are still equal: a step of next to nothing.
    strategy = ktpfl(temperature=temperature, step=1e-6, scale_by_t2=False)
    state = after(strategy, uploads(_0=S, _1=T, _2=U))
    mix = strategy.payload(state, 0)
    assert mix.temperature == temperature
    (loss,) = strategy.objective(0.0)(
        Outputs(public=torch.tensor(S)), Batch(targets=mix.targets)
    ).values()
    assert float(loss.mean()) == pytest.approx(expected, abs=2e-7)


# -- published faults --------------------------------------------------------------------------


def test_the_divergence_is_a_mean_over_rows_times_t2():
    """Published fault: divided by rows and classes, and without the temperature's square."""
    mix = torch.softmax(torch.tensor(T) / 10, -1)
    targets = Targets(mix, scale="probabilities", temperature=10.0)
    rows = (mix * (mix.log() - torch.log_softmax(torch.tensor(S) / 10, -1))).sum(-1)
    (loss,) = (
        ktpfl(temperature=10.0, kd_weight=0.5)
        .objective(0.0)(Outputs(public=torch.tensor(S)), Batch(targets=targets))
        .values()
    )
    assert float(loss.mean()) == pytest.approx(0.5 * 100 * float(rows.mean()), rel=1e-4)


def test_coefficients_of_many_clients_do_not_contract_to_equal_ones():
    """Published fault: a softmax of five times the row draws 20 clients' coefficients together."""
    rng = np.random.default_rng(0)
    coefficients = rng.dirichlet(np.full(20, 5.0), 20)
    away = np.abs(coefficients - 1 / 20).max()
    assert np.allclose(projected(coefficients, "simplex"), coefficients, atol=1e-12)
    contracted = np.abs(projected(coefficients, "softmax5") - 1 / 20).max()
    assert contracted < 0.35 * away


# -- who is there ------------------------------------------------------------------------------


def test_each_client_learns_its_own_mix():
    strategy = ktpfl(step=0.5)
    state = after(strategy, uploads(_0=S, _1=T, _2=U))
    round = strategy.federation.round(2)
    for client in range(3):
        assert strategy.receives(state, client, round) == client
        mix = np.einsum("j,jrc->rc", state.coefficients[client], SOFT)
        assert np.allclose(strategy.payload(state, client).values, mix, atol=1e-6)


def test_those_who_were_away_keep_their_row_and_learn_from_those_who_were_there():
    strategy = ktpfl(clients=4, step=0.5)
    state = after(strategy, uploads(_0=S, _2=U))
    assert np.allclose(state.coefficients[[1, 3]], 0.25)
    assert np.abs(state.coefficients[[0, 2]] - 0.25).max() > 1e-3
    # What those who were there have of a row moves among them.
    assert np.allclose(state.coefficients[:, [1, 3]], 0.25, atol=1e-12)
    assert np.allclose(state.coefficients.sum(-1), 1)
    assert (state.coefficients >= 0).all()
    mix = strategy.payload(state, 1)
    assert np.allclose(mix.values, SOFT[[0, 2]].mean(0), atol=1e-6)


def test_a_client_that_was_alone_learns_nothing_from_itself_and_the_others_learn_from_it():
    strategy = ktpfl()
    state = after(strategy, uploads(_1=T))
    round = strategy.federation.round(2)
    assert strategy.receives(state, 1, round) is None
    assert np.allclose(strategy.payload(state, 0).values, SOFT[1], atol=1e-6)


def test_where_nobody_answers_the_state_stays_as_it_was():
    strategy = ktpfl()
    state = after(strategy, uploads(_0=S, _1=T, _2=U))
    assert after(strategy, [], state) is state
    begun = strategy.begin(NO_TOOLS)
    assert strategy.receives(after(strategy, [], begun), 0, strategy.federation.round(2)) is None


def test_a_row_that_gives_nobody_there_a_share_mixes_them_equally():
    assert np.allclose(shares_of(np.array([[0.0, 0.0], [0.2, 0.6]])), [[0.5, 0.5], [0.25, 0.75]])
    strategy = ktpfl()
    state = after(strategy, uploads(_1=T, _2=U))
    nobody = replace(state, coefficients=np.eye(3))
    assert np.allclose(strategy.payload(nobody, 0).values, SOFT[1:].mean(0), atol=1e-6)


def test_coefficients_of_much_disagreement_stay_shares():
    strategy = ktpfl(clients=4, step=100.0, rho=0.0)
    sure = 20 * np.eye(4, dtype=np.float32)
    state = None
    for _ in range(4):
        sent = {f"_{client}": np.stack([sure[client]] * 2) for client in range(4)}
        state = after(strategy, uploads(**sent), state)
        assert np.allclose(state.coefficients.sum(-1), 1)
        assert (state.coefficients >= 0).all()
    # Whoever says something else than everybody else learns from itself in the end.
    assert np.allclose(state.coefficients, np.eye(4), atol=1e-6)


def test_a_client_distils_before_it_trains_at_home(tiny_settings, tiny_data, parts, spy, learn):
    strategy, _ = parts(tiny_settings("ktpfl", options={"distil_epochs": 2}), tiny_data())
    cohort = spy((0,), 3)
    soft = np.full((4, 3), 1 / 3, np.float32)
    mix = Predictions(rows=np.arange(4), values=soft, scale="probabilities", temperature=10.0)
    (sent,) = learn(strategy, cohort, mix, 2)
    assert cohort.order == ["fit", "fit", "predict_public"]
    assert cohort.fits[0]["public"].passes.epochs == 2
    assert cohort.fits[0]["private"] is None
    assert cohort.fits[1]["objective"] is supervised
    assert sent.scale == "logits"
