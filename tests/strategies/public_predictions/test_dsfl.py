"""DS-FL: a sharpened mean of soft labels, which clients and the server's model distil."""

import numpy as np
import pytest
import torch

from fedkd.exchange.payloads import Predictions
from fedkd.models import ModelSettings
from fedkd.targets import Targets
from fedkd.training import Batch, Outputs, Passes, supervised, towards_targets
from strategies.contract import Call, Federation, Received, ServerTools, Upload
from strategies.public_predictions.dsfl import (
    DSFL,
    SERVER,
    DSFLSettings,
    Target,
    soft_labels,
)

S = [[1.0, 2, 3, 0], [0.5, -1, 0, 2]]
T = [[2.0, 1, 4, -1], [0, 0, 1, 3]]
U = [[-4.0, 3, 1, 1], [2, 0, -1, 1]]
MEAN = [
    [0.06713702, 0.35502569, 0.52978979, 0.04804750],
    [0.28089178, 0.05427149, 0.07925048, 0.58558624],
]
ERA = [
    [0.00821157, 0.14612038, 0.83888349, 0.00678456],
    [0.04486767, 0.00465301, 0.00597333, 0.94450599],
]
SQUARED = [
    [0.01089960, 0.30479358, 0.67872434, 0.00558249],
    [0.18304718, 0.00683327, 0.01457098, 0.79554857],
]

NO_TOOLS = object.__new__(ServerTools)
"""For a server half that uses none."""


def federation(**changed):
    constants = {
        "seed": 0,
        "rounds": 3,
        "participation": 1.0,
        "models": (ModelSettings(name="mlp"),) * 3,
        "local": Passes(batch_size=8),
        "public_size": 2,
        "rows_per_round": 2,
        "public_labelled": False,
        "num_classes": 4,
        "input_shape": (1, 8, 8),
        "num_examples": (5, 6, 7),
        **changed,
    }
    return Federation(**constants)


def uploads(*logits):
    soft = torch.softmax(torch.tensor(logits), -1).numpy()
    return [
        Upload(client, Predictions(rows=np.arange(2), values=own, scale="probabilities"), 5)
        for client, own in enumerate(soft)
    ]


# -- the target --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"sharpening": "sa"}, MEAN), ({}, ERA), ({"sharpening": "enhanced_era"}, SQUARED)],
)
def test_the_target_is_the_sharpened_mean_of_the_clients_probabilities(settings, expected):
    strategy = DSFL(DSFLSettings(**settings), federation())
    target = strategy.aggregate(Target(), uploads(S, T, U), strategy.federation.round(1), NO_TOOLS)
    assert np.allclose(target.predictions.values, expected, atol=1e-8)
    assert target.predictions.scale == "probabilities"
    assert target.predictions.values.dtype == np.float32


@pytest.mark.parametrize(
    ("target", "expected"), [(ERA, 0.15407467), (SQUARED, 0.07912280), (MEAN, 0.04907065)]
)
def test_a_client_pays_for_what_separates_it_from_the_target(target, expected):
    # The cross-entropy of the paper, 0.52932183 and 1.07931732 for ERA and the mean, less the
    # target's entropy.
    batch = Batch(targets=Targets(torch.tensor(target), scale="probabilities"))
    losses = towards_targets(Outputs(public=torch.tensor(S)), batch)
    total = sum(float(loss.mean()) for loss in losses.values())
    assert total == pytest.approx(expected, abs=2e-7)


def test_a_round_that_nobody_answered_leaves_nothing_to_learn():
    strategy = DSFL(DSFLSettings(), federation())
    after = strategy.aggregate(Target(), [], strategy.federation.round(1), NO_TOOLS)
    assert strategy.receives(after, 0, strategy.federation.round(2)) is None


# -- the client --------------------------------------------------------------------------------


def test_a_client_distils_then_trains_then_predicts(spy):
    strategy = DSFL(DSFLSettings(distil_epochs=2), federation())
    cohort = spy((1,), 4)
    target = Predictions(rows=np.arange(2), values=np.array(ERA, np.float32), scale="probabilities")
    strategy.client(cohort, Received([target]), Call(strategy.federation, 2))
    assert cohort.order == ["fit", "fit", "predict_public"]
    distil, train = cohort.fits
    assert distil["objective"] is towards_targets
    assert distil["public"].targets.scale == "probabilities"
    assert distil["public"].passes.epochs == 2
    assert distil["private"] is None
    assert train["objective"] is supervised


def test_a_client_sends_probabilities(spy):
    (sent,) = soft_labels(spy((0,), 4), np.arange(3))
    assert sent.scale == "probabilities"
    assert sent.problem(Predictions.asked(np.arange(3), 4, scale="probabilities")) is None
    assert np.allclose(sent.values, 0.25)


# -- the whole ---------------------------------------------------------------------------------


def test_the_servers_model_learns_the_target_and_is_judged(tiny_settings, tiny_data, simulate):
    options = {"server_model": {"name": "mlp", "options": {"hidden": [8]}}, "server_epochs": 20}
    run = simulate(tiny_settings("dsfl", options=options, rounds=4), tiny_data())
    first, *_, last = (row["server_accuracy"] for row in run.history.federation)
    assert last > max(first, 0.5)
    assert run.loop.boundary.state.model.name == SERVER


def test_without_a_model_the_server_is_not_judged(tiny_settings, tiny_data, simulate):
    run = simulate(tiny_settings("dsfl", rounds=1), tiny_data())
    assert "server_accuracy" not in run.history.federation[0]


def test_a_loop_and_a_stack_learn_alike(tiny_settings, tiny_data, simulate):
    clients = {"models": [{"name": "mlp", "options": {"hidden": [8]}}]}
    loop, stack = (
        simulate(
            tiny_settings(
                "dsfl",
                clients=clients,
                exchange={"rows_per_round": 9},
                engine={"backend": "inline", "vectorize": how},
            ),
            tiny_data(),
        )
        for how in ("loop", "vmap")
    )
    for one, other in zip(loop.states, stack.states, strict=True):
        for name, weights in one.models["model"].weights.items():
            assert np.allclose(weights, other.models["model"].weights[name], atol=1e-5)


@pytest.mark.parametrize("directions", [[], ["clients"], ["server"]])
def test_each_direction_alone(directions, tiny_settings, tiny_data, simulate):
    data = tiny_data()
    options = {"server_model": "mlp", "directions": directions}
    run = simulate(tiny_settings("dsfl", options=options), data)
    alone = simulate(tiny_settings("local"), data)
    assert (run.digest == alone.digest) == ("clients" not in directions)
    learnt = [row.get("server_steps", 0) > 0 for row in run.history.federation]
    assert learnt == [directions == ["server"]] * len(learnt)
    ways = {row["direction"] for row in run.exchange if row["bytes"]}
    assert ways == ({"up", "down"} if "clients" in directions else {"up"})
