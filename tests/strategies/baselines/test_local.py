"""Local: private training, and not a byte of anything else."""

import torch

from fedkd.training import (
    LoopCohort,
    Member,
    ModelPool,
    Streams,
    TrainingData,
    supervised,
    weights_digest,
)
from strategies.contract import Nothing


def test_a_round_is_one_fit_on_private_rows_and_no_answer(
    spy, tiny_settings, tiny_data, parts, learn
):
    strategy, _ = parts(tiny_settings("local"), tiny_data())
    cohort, local = spy(), strategy.federation.local
    assert list(learn(strategy, cohort, None)) == []
    assert cohort.order == ["fit"]
    assert cohort.fits == [{"objective": supervised, "private": local, "public": None}]


def test_nothing_goes_out(tiny_settings, tiny_data, parts, simulate):
    settings, data = tiny_settings("local"), tiny_data()
    strategy, server = parts(settings, data)
    state = strategy.begin(server)
    assert state == Nothing()
    assert strategy.aggregate(state, [], strategy.federation.round(1), server) == Nothing()
    run = simulate(settings, data)
    assert run.exchange == []
    assert all(row["bytes_up"] == row["bytes_down"] == 0 for row in run.history.federation)


def test_runs_without_a_public_set(tiny_settings, tiny_data, simulate):
    run = simulate(tiny_settings("local", public=0), tiny_data(public=0))
    assert len(run.history.federation) == 3


def test_clients_remember_their_optimizers_from_round_to_round(tiny_settings, tiny_data, simulate):
    settings, data = tiny_settings("local"), tiny_data()
    tensors = TrainingData.from_arrays(data, torch.device("cpu"))
    optimizer = settings.clients.optimizer
    states = []
    for client in range(4):
        state = None
        for number in (1, 2, 3):
            cohort = LoopCohort(
                [Member(client, data.client_rows[client], state)],
                model=settings.model_of(client),
                optimizer=optimizer,
                data=tensors,
                pool=ModelPool(tensors, optimizer),
                streams=Streams(seed=settings.seed, round=number, rounds=3),
            )
            cohort.fit(supervised, private=settings.local)
            (state,) = cohort.states()
        states.append(state)
    assert simulate(settings, data).digest == weights_digest(states)
    assert int(states[0].models["model"].optimizer["step/1.weight"]) == 3 * 2
