"""FedAvg: the weighted mean, architecture by architecture."""

import numpy as np
import pytest
import torch

from fedkd.exchange.payloads import Weights
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
from strategies.baselines.fedavg import GlobalModels
from strategies.contract import Call, Received, Upload


def model(weight, counter=0):
    return {
        "weight": np.array(weight, np.float32),
        "num_batches_tracked": np.array(counter, np.int64),
    }


def uploads(values, num_examples=(12, 13, 9, 17)):
    return [
        Upload(client, Weights(arrays=model(value)), num_examples[client])
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
    tiny_settings, tiny_data, parts, told, weighting, mlp, cnn
):
    strategy, server = parts(tiny_settings("fedavg", options={"weighting": weighting}), tiny_data())
    answers = uploads({0: [1.0], 1: [2.0], 2: [8.0], 3: [5.0]})
    state = strategy.aggregate(GlobalModels({}), answers, strategy.federation.round(1), server)
    receives = told(strategy, state)
    received = [receives(client).arrays["weight"].item() for client in range(4)]
    assert received == pytest.approx([mlp, cnn, mlp, cnn])
    assert receives(0) is receives(2)
    assert receives(1) is receives(3)


def test_an_architecture_without_uploads_keeps_its_model(tiny_settings, tiny_data, parts, told):
    strategy, server = parts(tiny_settings("fedavg"), tiny_data())
    start = strategy.begin(server)
    round = strategy.federation.round(1)
    after = strategy.aggregate(start, uploads({1: [2.0]}), round, server)
    assert told(strategy, after)(0) is told(strategy, start)(0)
    assert told(strategy, after)(3).arrays["weight"].tolist() == [2.0]


def test_everybody_starts_from_the_first_client_of_its_architecture(
    tiny_settings, tiny_data, parts, told, same
):
    strategy, server = parts(tiny_settings("fedavg"), tiny_data())
    receives = told(strategy, strategy.begin(server))
    for client, first in ((0, 0), (1, 1), (2, 0), (3, 1)):
        assert same(receives(client), Weights(arrays=server.initial_weights(first)))
    assert not same(receives(0), Weights(arrays=server.initial_weights(2)))


def test_a_client_starts_from_the_global_model_without_memory(
    spy, tiny_settings, tiny_data, parts, learn
):
    strategy, _ = parts(tiny_settings("fedavg"), tiny_data())
    cohort = spy((0, 2))
    received = Weights(arrays={"w": np.ones(1, np.float32)})
    answers = learn(strategy, cohort, received, 2)
    assert cohort.order == ["load_weights", "reset_optimizers", "fit", "weights"]
    assert cohort.asked[0][1]["weights"] is received.arrays
    local = strategy.federation.local
    assert cohort.fits == [{"objective": supervised, "private": local, "public": None}]
    assert [answer.kind for answer in answers] == ["weights", "weights"]


def test_members_that_received_pieces_of_their_own_each_load_theirs(
    spy, tiny_settings, tiny_data, parts
):
    # As they do where a codec with a memory decodes for each client by itself.
    strategy, _ = parts(tiny_settings("fedavg"), tiny_data())
    pieces = [Weights(arrays={"w": np.full(1, value, np.float32)}) for value in (1, 2)]
    cohort = spy((0, 2))
    strategy.client(cohort, Received(pieces), Call(strategy.federation, 1))
    assert cohort.asked[0] == ("load_weights", {"weights": [piece.arrays for piece in pieces]})


def test_the_global_model_is_what_is_judged(tiny_settings, tiny_data, simulate):
    run = simulate(tiny_settings("fedavg"), tiny_data())
    accuracies = {client: row["accuracy"] for client, row in run.history.clients.items()}
    assert accuracies[0] == accuracies[2]
    assert accuracies[1] == accuracies[3]


def test_refuses_predictions(tiny_settings, tiny_data, parts, scores):
    strategy, server = parts(tiny_settings("fedavg"), tiny_data())
    round = strategy.federation.round(1)
    with pytest.raises(TypeError, match="expected weights, got predictions"):
        strategy.aggregate(GlobalModels({}), scores(round, [2]), round, server)


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


def test_changes_travel_as_factors_also_of_clients_that_were_away(
    tiny_settings, tiny_data, simulate
):
    def run(up):
        exchange, clients = {"up": up}, {"participants": 3}
        settings = tiny_settings("fedavg", exchange=exchange, clients=clients, rounds=3)
        return simulate(settings, tiny_data())

    plain, factored = run("float32"), run({"kind": "low_rank", "rank": 1})
    assert not factored.events
    # At all of the energy nothing is saved, and no bit differs.
    assert run({"kind": "low_rank", "energy": 1.0}).digest == plain.digest
    # Of the MLP's 64-8-3 one singular value each: 8 + 64 + 1 numbers of 512, 3 + 8 + 1 of 24.
    up = {row["bytes"] for row in factored.exchange if row["direction"] == "up"}
    assert 4 * (73 + 8 + 12 + 3) in up
    down = [
        [row["bytes"] for row in one.exchange if row["direction"] == "down"]
        for one in (plain, factored)
    ]
    assert down[0] == down[1]
