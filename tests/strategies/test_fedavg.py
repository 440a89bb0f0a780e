"""FedAvg: the weighted mean, architecture by architecture."""

import numpy as np
import pytest
import torch

from fedkd.training import (
    LoopCohort,
    Member,
    ModelPool,
    Streams,
    TrainingData,
    initial_model_seed,
    supervised,
    weights_digest,
)
from strategies.fedavg import WeightedMean
from strategies.knowledge import ClientUpload, Parameters


def model(weight, counter=0):
    return {
        "weight": np.array(weight, np.float32),
        "num_batches_tracked": np.array(counter, np.int64),
    }


def test_mean_is_weighted_by_hand():
    mean = WeightedMean()
    mean.add(model([1.0, 10.0]), 1)
    mean.add(model([5.0, -2.0]), 3)
    # (1 + 3 * 5) / 4 and (10 - 3 * 2) / 4
    assert mean.mean()["weight"].tolist() == [4.0, 1.0]


def test_counters_are_rounded_and_stay_counters():
    mean = WeightedMean()
    mean.add(model([0.0], counter=10), 1)
    mean.add(model([0.0], counter=13), 2)
    assert mean.mean()["num_batches_tracked"] == 12
    mean.add(model([0.0], counter=14), 2)
    averaged = mean.mean()["num_batches_tracked"]  # 64 / 5 = 12.8
    assert averaged == 13
    assert averaged.dtype == np.int64
    assert mean.mean()["weight"].dtype == np.float32


def test_the_mean_of_arrays_without_dimensions_has_none_either():
    mean = WeightedMean()
    for scale, counter, flag in ((1.0, 3, True), (4.0, 6, True), (4.0, 9, False)):
        arrays = {"scale": np.float32(scale), "counter": np.int64(counter), "flag": np.bool_(flag)}
        mean.add({name: np.asarray(value) for name, value in arrays.items()}, 1)
    means = mean.mean()
    assert {name: (type(a), a.shape, a.item()) for name, a in means.items()} == {
        "scale": (np.ndarray, (), 3.0),
        "counter": (np.ndarray, (), 6),
        # True for the majority, and not for whatever is more than nothing.
        "flag": (np.ndarray, (), True),
    }
    assert means["flag"].dtype == bool
    mean.add({"scale": means["scale"], "counter": means["counter"], "flag": np.array(False)}, 9)
    assert not mean.mean()["flag"]


def test_one_model_is_its_own_mean_bit_for_bit():
    weights = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    mean = WeightedMean()
    mean.add({"weight": weights}, 17)
    assert mean.mean()["weight"].tobytes() == weights.tobytes()


def test_what_was_added_is_not_written_to():
    first, second = model([1.0, 2.0]), model([3.0, 4.0])
    mean = WeightedMean()
    mean.add(first, 1)
    mean.add(second, 1)
    mean.mean()
    assert first["weight"].tolist() == [1.0, 2.0]
    assert second["weight"].tolist() == [3.0, 4.0]


@pytest.mark.parametrize("weight", [0, -1, float("nan")])
def test_refuses_a_weight_that_is_not_positive(weight):
    with pytest.raises(ValueError, match="weight must be > 0, got"):
        WeightedMean().add(model([1.0]), weight)


def uploads(values, num_examples=(12, 13, 9, 17)):
    return [
        ClientUpload(client, Parameters(model(value)), num_examples[client])
        for client, value in values.items()
    ]


@pytest.mark.parametrize(
    ("weighting", "mlp", "cnn"),
    [
        # Clients 0 and 2 share the mlp and hold 12 and 9 rows, 1 and 3 the cnn with 13 and 17.
        ("examples", (12 * 1.0 + 9 * 8.0) / 21, (13 * 2.0 + 17 * 5.0) / 30),
        ("equal", 4.5, 3.5),
    ],
)
def test_each_architecture_has_a_mean_of_its_own(
    tiny_settings, tiny_data, parts, weighting, mlp, cnn
):
    strategy, server = parts(tiny_settings("fedavg", options={"weighting": weighting}), tiny_data())
    plan = strategy.federation.plan(1)
    answers = uploads({0: [1.0], 1: [2.0], 2: [8.0], 3: [5.0]})
    broadcast = strategy.aggregate(answers, plan, server)
    received = [broadcast.to(client).arrays["weight"].item() for client in range(4)]
    assert received == pytest.approx([mlp, cnn, mlp, cnn])
    assert broadcast.to(0) is broadcast.to(2)
    assert broadcast.to(1) is broadcast.to(3)


def test_an_architecture_without_uploads_keeps_its_model(tiny_settings, tiny_data, parts):
    strategy, server = parts(tiny_settings("fedavg"), tiny_data())
    start = strategy.prepare(server)
    after = strategy.aggregate(uploads({1: [2.0]}), strategy.federation.plan(1), server)
    assert after.to(0) is start.to(0)
    assert after.to(3).arrays["weight"].tolist() == [2.0]


def test_everybody_starts_from_the_first_client_of_its_architecture(
    tiny_settings, tiny_data, parts, same_knowledge
):
    strategy, server = parts(tiny_settings("fedavg"), tiny_data())
    start = strategy.prepare(server)
    for client, first in ((0, 0), (1, 1), (2, 0), (3, 1)):
        assert same_knowledge(start.to(client), Parameters(server.initial_weights(first)))
    assert not same_knowledge(start.to(0), Parameters(server.initial_weights(2)))


def test_a_client_starts_from_the_global_model_without_memory(spy, tiny_settings, tiny_data, parts):
    strategy, _ = parts(tiny_settings("fedavg"), tiny_data())
    cohort, plan = spy((0, 2)), strategy.federation.plan(2)
    received = Parameters({"w": np.ones(1, np.float32)})
    answers = strategy.client_round(cohort, received, plan)
    assert cohort.order == ["load_weights", "reset_optimizers", "fit", "weights"]
    assert cohort.asked[0][1]["weights"] is received.arrays
    assert cohort.fits == [{"objective": supervised, "private": plan.local, "public": None}]
    assert [answer.kind for answer in answers] == ["parameters", "parameters"]


def test_the_global_model_is_what_is_judged(tiny_settings, tiny_data, simulate):
    run = simulate(tiny_settings("fedavg"), tiny_data())
    accuracies = {client: row["accuracy"] for client, row in run.history.clients.items()}
    assert accuracies[0] == accuracies[2]
    assert accuracies[1] == accuracies[3]


def test_refuses_predictions(tiny_settings, tiny_data, parts, scores):
    strategy, server = parts(tiny_settings("fedavg"), tiny_data())
    plan = strategy.federation.plan(1)
    with pytest.raises(TypeError, match="expected parameters from client 2"):
        strategy.aggregate(scores(plan, [2]), plan, server)


def test_with_a_single_client_it_is_local_training_without_memory(
    tiny_settings, tiny_data, simulate
):
    settings, data = tiny_settings("fedavg", clients={"count": 1}), tiny_data(rows=(20,))
    tensors = TrainingData.from_arrays(data, torch.device("cpu"))
    optimizer = settings.clients.optimizer
    pool = ModelPool(tensors, optimizer)
    state = pool.initial_state(settings.model_of(0), initial_model_seed(settings.seed, 0))
    for number in (1, 2, 3):
        cohort = LoopCohort(
            [Member(0, data.client_rows[0], state)],
            model=settings.model_of(0),
            optimizer=optimizer,
            data=tensors,
            pool=pool,
            streams=Streams(seed=settings.seed, round=number, rounds=3),
        )
        cohort.reset_optimizers()
        cohort.fit(supervised, private=settings.local)
        (state,) = cohort.states()
    run = simulate(settings, data)
    assert run.digest == weights_digest([state])
    # Adam remembers, so this is not what local learning does.
    assert run.digest != simulate(tiny_settings("local", clients={"count": 1}), data).digest


def test_with_a_single_client_and_an_optimizer_without_memory_it_is_local_training(
    tiny_settings, tiny_data, simulate
):
    clients = {"count": 1, "optimizer": {"name": "sgd", "lr": 0.05}}
    data = tiny_data(rows=(20,))
    digests = {
        simulate(tiny_settings(name, clients=clients), data).digest for name in ("fedavg", "local")
    }
    assert len(digests) == 1


@pytest.mark.parametrize("vectorize", ["loop", "vmap"])
def test_batch_norm_counters_travel_like_everything_else(
    vectorize, tiny_settings, tiny_data, simulate
):
    batch_norm = {"name": "cnn", "options": {"channels": [4], "norm": "batch"}}
    engine = {"backend": "inline", "vectorize": vectorize}
    settings = tiny_settings("fedavg", clients={"models": [batch_norm]}, engine=engine)
    run = simulate(settings, tiny_data())
    assert run.events == []
    # Batches of 8: 12, 13, 9 and 17 rows are 2, 2, 1 and 2 steps. The weighted mean, 1.82, is
    # rounded to 2; so the third round starts from 2, then from 4.
    counters = [int(state.models["model"].weights["1.num_batches_tracked"]) for state in run.states]
    assert counters == [4 + 2, 4 + 2, 4 + 1, 4 + 2]
