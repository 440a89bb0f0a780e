"""FCCL: pretrain once, go with the mean of all, hold on to what one was."""

import numpy as np
import pytest
import torch

from fedkd.exchange.payloads import Predictions
from fedkd.targets import Targets
from fedkd.training import Batch, Outputs, Passes, supervised
from strategies.public_predictions.fccl import (
    PRETRAINED,
    PREVIOUS,
    FCCLSettings,
    as_before,
    with_others,
)
from strategies.shared.lessons import Lesson

OWN = torch.tensor([[1, 2, 0], [0, 1, 3], [2, 0, 1]], dtype=torch.float64)
OTHER = torch.tensor([[2, 1, 0], [1, 0, 2], [0, 2, 1]], dtype=torch.float64)
S = torch.tensor([[1, 2, 3, 0], [0.5, -1, 0, 2]], dtype=torch.float64)
T = torch.tensor([[2, 1, 4, -1], [0, 0, 1, 3]], dtype=torch.float64)


@pytest.fixture
def fccl(tiny_settings, tiny_data, parts):
    return lambda **options: parts(tiny_settings("fccl", options=options), tiny_data())


def consensus(round):
    values = np.random.default_rng(0).normal(size=(len(round.public_rows), 3)).astype(np.float32)
    return Predictions(rows=round.public_rows, values=values, averaged=True)


class Home:
    """Adds to a spy what FCCL needs beside: weights, memory and frozen models."""

    @staticmethod
    def around(cohort, kept=()):
        memory = dict(kept)
        cohort.frozen = {}
        cohort.moves = 0
        fit = cohort.fit

        def trained(objective, **more):
            passes = more.get("private")
            steps = [passes] if isinstance(passes, Passes) else passes or []
            cohort.moves += any(own.epochs for own in steps) or more.get("public") is not None
            return fit(objective, **more)

        cohort.fit = trained
        cohort.weights = lambda: [{"w": np.full(1, cohort.moves, np.float32)}] * len(cohort.clients)
        cohort.kept = lambda name: [memory.get((name, own)) for own in cohort.clients]
        cohort.keep = lambda name, values: memory.update(
            {(name, own): value for own, value in zip(cohort.clients, values, strict=True)}
        )
        cohort.freeze = lambda name, weights: cohort.frozen.update({name: weights})
        return memory


def test_the_public_loss_matches_the_published_value():
    # The target is the mean over all participants, oneself included.
    batch = Batch(targets=Targets((OWN + OTHER) / 2))
    loss = with_others(Outputs(public=OWN), batch, off_diagonal_weight=0.0051)["correlation"]
    assert loss.value.item() == pytest.approx(1.02521632, abs=1e-8)


def test_the_loss_at_home_is_cross_entropy_and_a_divergence_from_each_earlier_model():
    outputs = {"model": Outputs(private=S), PREVIOUS: Outputs(private=T), PRETRAINED: Outputs(S)}
    weights = {PREVIOUS: 1.0, PRETRAINED: 0.5}
    losses = as_before(outputs, Batch(labels=torch.tensor([2, 0])), weights=weights)
    means = {name: loss.mean().item() for name, loss in losses.items()}
    assert means["ce"] == pytest.approx(1.14126964, abs=1e-8)
    assert means[PREVIOUS] == pytest.approx(0.12034999, abs=1e-8)
    assert means[PRETRAINED] == pytest.approx(0, abs=1e-12)


def test_the_target_is_the_mean_of_all_and_the_same_for_all(fccl, scores):
    strategy, server = fccl()
    round = strategy.federation.round(1)
    state = strategy.aggregate(Lesson(), scores(round, {0: 1.0, 2: 4.0}), round, server)
    assert {strategy.receives(state, client, round.next()) for client in range(4)} == {"lesson"}
    np.testing.assert_allclose(strategy.payload(state, "lesson").values, 2.5)
    assert strategy.aggregate(state, [], round.next(), server) is state


def test_a_first_round_pretrains_and_keeps_what_came_of_it(spy, fccl, learn):
    strategy, _ = fccl(pretrain_epochs=3)
    cohort = spy((0, 1))
    memory = Home.around(cohort, {(f"{PRETRAINED}/w", 1): np.full(1, 9, np.float32)})
    learn(strategy, cohort, None, 1)
    pretraining, at_home = cohort.fits
    assert pretraining["objective"] is supervised
    # Client 1 was here before: it pretrains no more, whoever trains beside it.
    assert [own.epochs for own in pretraining["private"]] == [3, 0]
    assert [memory[f"{PRETRAINED}/w", client].item() for client in (0, 1)] == [1, 9]
    assert at_home["frozen"] == [PREVIOUS, PRETRAINED]
    assert [own["w"].item() for own in cohort.frozen[PRETRAINED]] == [1, 9]


def test_the_previous_model_is_that_before_the_public_rows(spy, fccl, learn):
    strategy, _ = fccl(public_epochs=2, public_batch=16)
    cohort = spy()
    Home.around(cohort, {(f"{PRETRAINED}/w", 0): np.full(1, 9, np.float32)})
    learn(strategy, cohort, consensus(strategy.federation.round(2)), 2)
    _, public, at_home = cohort.fits
    assert public["public"].passes == Passes(batch_size=16, epochs=2)
    assert cohort.frozen[PREVIOUS][0]["w"].item() == 0
    assert at_home["private"] == strategy.federation.local


def test_models_whose_weight_is_zero_are_not_asked(spy, fccl, learn):
    strategy, _ = fccl(previous_weight=0.0, pretrained_weight=0.0)
    cohort = spy()
    Home.around(cohort)
    learn(strategy, cohort, None, 2)
    assert not cohort.frozen
    assert cohort.fits[-1]["objective"] is supervised


def test_a_late_joiner_pretrains_in_its_first_round(tiny_settings, tiny_data, simulate):
    settings = tiny_settings(
        "fccl", options={"pretrain_epochs": 1}, clients={"participants": 2}, rounds=4
    )
    run = simulate(settings, tiny_data())
    took_part = {row["client"] for row in run.exchange if row["direction"] == "up"}
    kept = {
        client
        for client, state in enumerate(run.states)
        if any(name.startswith(PRETRAINED) for name in state.arrays)
    }
    assert kept == took_part


def test_a_batch_has_to_have_rows_that_can_be_compared():
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        FCCLSettings(public_batch=1)
