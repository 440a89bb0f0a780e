"""FD: means over the other holders of a class, and nothing where there are none."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedkd.data import build_federated_data
from fedkd.exchange.payloads import ClassTable, Weights
from fedkd.training import Batch, Outputs
from sim.settings import Settings
from strategies.contract import Upload
from strategies.data_free.fd import (
    TAUGHT,
    FDSettings,
    Tables,
    added_up,
    mean_over_other_holders,
    taught_rows,
)

MLPS = {"models": [{"name": "mlp", "options": {"hidden": [8]}}]}

COUNTS = [[2, 1, 0], [1, 0, 1], [0, 2, 1]]
SUMS = [
    [[1.5, 0.3, 0.2], [0.2, 0.7, 0.1], [0, 0, 0]],
    [[0.6, 0.3, 0.1], [0, 0, 0], [0.1, 0.2, 0.7]],
    [[0, 0, 0], [0.5, 1.2, 0.3], [0.2, 0.2, 0.6]],
]


def tables(*, counted=False):
    sent = {}
    for client, (counts, sums) in enumerate(zip(COUNTS, SUMS, strict=True)):
        means = np.array(sums) / np.maximum(counts, 1)[:, None]
        sent[client] = ClassTable(
            values=means.astype(np.float32),
            counts=np.array(counts, np.float32) if counted else None,
        )
    return sent


# -- the mean over other holders ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("client", "expected"),
    [
        # Class 0 is held by 0 and 1, class 1 by 0 and 2, class 2 by 1 and 2.
        (0, [[0.6, 0.3, 0.1], [0.25, 0.6, 0.15], [0.15, 0.2, 0.65]]),
        (1, [[0.75, 0.15, 0.1], [0.225, 0.65, 0.125], [0.2, 0.2, 0.6]]),
        (2, [[0.675, 0.225, 0.1], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7]]),
        # Who sent nothing learns from all that did.
        (None, [[0.675, 0.225, 0.1], [0.225, 0.65, 0.125], [0.15, 0.2, 0.65]]),
    ],
)
def test_each_class_is_the_mean_over_its_other_holders(client, expected):
    mean = mean_over_other_holders(added_up(tables()), client)
    assert mean.counts is None
    assert np.allclose(mean.values, expected, atol=1e-7)


def test_counts_weight_the_holders():
    # Class 0 of client 2: (2 * (.75, .15, .1) + 1 * (.6, .3, .1)) / 3
    mean = mean_over_other_holders(added_up(tables(counted=True)), 2)
    assert np.allclose(mean.values[0], [0.7, 0.2, 0.1], atol=1e-7)


def test_a_class_that_nobody_else_holds_is_a_zero_row():
    lone = added_up({0: tables()[0], 1: tables()[1]})
    mean = mean_over_other_holders(lone, 0)
    assert mean.values[1].tolist() == [0.0, 0.0, 0.0]
    assert mean.held.tolist() == [True, False, True]
    # Dividing by all others instead would halve the rows of two clients out of three.
    assert np.allclose(mean.values[[0, 2]].sum(1), 1)


@st.composite
def federations(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    clients, classes = draw(st.integers(1, 6)), draw(st.integers(2, 5))
    held = rng.random((clients, classes)) < draw(st.sampled_from([0.3, 0.7, 1.0]))
    # Confident models: probabilities of 0 and 1, of which rounding leaves the least.
    scores = rng.normal(0, draw(st.sampled_from([1.0, 40.0])), (clients, classes, classes))
    soft = torch.softmax(torch.as_tensor(scores), -1).numpy()
    values = (soft * held[:, :, None]).astype(np.float32)
    counts = held * rng.integers(1, 50, held.shape) if draw(st.booleans()) else None
    return values, held, counts


@settings(max_examples=80, deadline=None)
@given(federations())
def test_leaving_one_out_of_the_sum_is_the_mean_of_the_others(given_tables):
    values, held, counts = given_tables
    weights = held if counts is None else counts
    sent = {
        client: ClassTable(
            values=own, counts=None if counts is None else counts[client].astype(np.float32)
        )
        for client, own in enumerate(values)
    }
    added = added_up(sent)
    for client in range(len(values)):
        mean = mean_over_other_holders(added, client).values
        others = np.arange(len(values)) != client
        weight = weights[others].sum(0)[:, None]
        total = (weights[others][:, :, None] * values[others]).sum(0)
        assert np.allclose(mean, total / np.maximum(weight, 1), atol=1e-6)
        assert (mean >= 0).all()


# -- the loss ----------------------------------------------------------------------------------


def test_the_loss_is_the_papers_by_hand(tiny_settings, tiny_data, parts):
    strategy, _ = parts(tiny_settings("fd"), tiny_data())
    taught = mean_over_other_holders(added_up(tables()), 0).values
    outputs = Outputs(private=torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]]))
    batch = Batch(labels=torch.tensor([0, 1, 2]), tables={TAUGHT: torch.as_tensor(taught)})
    losses = strategy._learn(outputs, batch, weight=0.5)
    total = sum(loss.mean() for loss in losses.values())
    assert total.item() == pytest.approx(0.87429772, rel=1e-6)


def test_a_class_without_other_holders_teaches_nothing():
    logits = torch.randn(2, 3, requires_grad=True)
    taught = torch.tensor([[0.6, 0.3, 0.1], [0.0, 0.0, 0.0], [0.1, 0.2, 0.7]])
    rows = taught_rows(logits, torch.tensor([1, 0]), taught)
    rows.sum().backward()
    assert rows[0] == 0
    assert rows[1] > 0
    assert not logits.grad[0].any()
    assert logits.grad[1].any()


# -- who receives what -------------------------------------------------------------------------


def uploads(sent):
    return [Upload(client, table, 10) for client, table in sent.items()]


def test_participants_hear_the_others_and_everybody_else_hears_all(tiny_settings, tiny_data, parts):
    strategy, server = parts(tiny_settings("fd"), tiny_data())
    round = strategy.federation.round(1)
    before = strategy.begin(server)
    assert [strategy.receives(before, client, round) for client in range(4)] == [None] * 4
    state = strategy.aggregate(before, uploads({0: tables()[0], 2: tables()[2]}), round, server)
    # Each of the two holds a class that the other has too, so both learn something.
    assert [strategy.receives(state, client, round) for client in range(4)] == [0, "all", 2, "all"]
    assert np.allclose(strategy.payload(state, 0).values[1], [0.25, 0.6, 0.15])
    assert np.allclose(strategy.payload(state, "all").values[1], [0.225, 0.65, 0.125])


def test_a_lone_participant_learns_from_nobody(tiny_settings, tiny_data, parts):
    strategy, server = parts(tiny_settings("fd"), tiny_data())
    round = strategy.federation.round(1)
    state = strategy.aggregate(Tables(), uploads({1: tables()[1]}), round, server)
    assert [strategy.receives(state, client, round) for client in range(3)] == ["all", None, "all"]


def test_a_round_without_answers_leaves_nothing_to_learn_from(tiny_settings, tiny_data, parts):
    strategy, server = parts(tiny_settings("fd"), tiny_data())
    round = strategy.federation.round(1)
    full = strategy.aggregate(Tables(), uploads(tables()), round, server)
    empty = strategy.aggregate(full, [], round, server)
    assert strategy.receives(empty, 0, round) is None


def test_refuses_weights(tiny_settings, tiny_data, parts):
    strategy, server = parts(tiny_settings("fd"), tiny_data())
    sent = [Upload(0, Weights(arrays={"w": np.zeros(1, np.float32)}), 10)]
    with pytest.raises(TypeError, match="expected class_table"):
        strategy.aggregate(Tables(), sent, strategy.federation.round(1), server)


def test_counts_travel_only_where_they_weight(tiny_settings, tiny_data, parts):
    for weighting, arrays in (("equal", {"values"}), ("count", {"values", "counts"})):
        settings = tiny_settings("fd", options={"weighting": weighting})
        strategy, server = parts(settings, tiny_data())
        asked = strategy.asks(Tables(), 0, strategy.federation.round(1), server)
        assert set(asked.limits) == arrays


# -- runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weighting", "up"), [("equal", 3 * 3 * 4), ("count", 3 * 3 * 4 + 3 * 4)])
def test_an_absent_class_costs_its_bytes_too(weighting, up, tiny_settings, tiny_data, simulate):
    # Client 3 of two rows cannot hold all three classes.
    data = tiny_data(rows=(12, 13, 9, 2))
    run = simulate(tiny_settings("fd", options={"weighting": weighting}), data)
    assert run.events == []
    sent = [row["bytes"] for row in run.exchange if row["direction"] == "up"]
    came = [row["bytes"] for row in run.exchange if row["direction"] == "down"]
    assert set(sent) == {up}
    assert set(came) == {3 * 3 * 4}
    assert (len(sent), len(came)) == (12, 8)


def test_what_others_say_changes_what_is_learnt(tiny_settings, tiny_data, simulate):
    local = simulate(tiny_settings("local"), tiny_data()).digest
    assert simulate(tiny_settings("fd", options={"kd_weight": 0.0}), tiny_data()).digest == local
    assert simulate(tiny_settings("fd"), tiny_data()).digest != local


@pytest.mark.parametrize("collect", ["round", "last_epoch", "evaluation"])
@pytest.mark.parametrize("weighting", ["equal", "count"])
def test_stacked_clients_learn_what_clients_learn_one_by_one(
    collect, weighting, tiny_settings, tiny_data, simulate
):
    one_by_one, stacked = (
        simulate(
            tiny_settings(
                "fd",
                options={"collect": collect, "weighting": weighting},
                clients={**MLPS, "optimizer": {"name": "sgd", "lr": 0.3}, "local": {"epochs": 2}},
                engine={"backend": "inline", "vectorize": vectorize},
            ),
            tiny_data(),
        )
        for vectorize in ("loop", "vmap")
    )
    for one, other in zip(one_by_one.states, stacked.states, strict=True):
        for name, array in one.models["model"].weights.items():
            assert np.allclose(array, other.models["model"].weights[name], atol=1e-5)


def test_the_weight_is_a_schedule():
    settings = FDSettings.model_validate({"kd_weight": {"kind": "linear", "start": 0, "end": 2}})
    assert settings.kd_weight.at(0.5) == 1


# -- Table 1 of the paper, "total communication" -------------------------------------------------


def test_the_bits_of_table_1_come_out_exactly_for_fd(simulate):
    """102,400: 10 x 10 soft labels of 32 bits, up and down, in 16 rounds of one device.

    What the paper sends down after its 16th round is here received in the 17th, by who learns then.
    """
    made = Settings.model_validate(
        {
            "rounds": 17,
            "data": {"public": {"size": 0}, "private_rows": 40, "test_rows": 20},
            "clients": {"count": 2, "models": ["mlp"], "local": {"steps": 1}},
            "strategy": {"name": "fd"},
            "engine": {"backend": "inline"},
            "evaluation": {"every": 17},
        }
    )
    data = build_federated_data(made.data, num_clients=2, seed=0)
    rows = [row for row in simulate(made, data).exchange if row["client"] == 0]
    up = [row for row in rows if row["direction"] == "up" and row["round"] <= 16]
    down = [row for row in rows if row["direction"] == "down"]
    assert (len(up), len(down)) == (16, 16)
    assert 8 * sum(row["bytes"] for row in up + down) == 102_400


def test_the_bits_of_table_1_come_out_exactly_for_fl():
    """1,228,439,552: weights of the 32-64-128-10 network without biases, the same way."""
    network = nn.Sequential(
        nn.Conv2d(1, 32, 3, bias=False),
        nn.Conv2d(32, 64, 3, bias=False),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 12 * 12, 128, bias=False),
        nn.Linear(128, 10, bias=False),
    )
    arrays = {name: array.numpy() for name, array in network.state_dict().items()}
    assert sum(array.size for array in arrays.values()) == 1_199_648
    assert network(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
    assert 8 * Weights(arrays=arrays).payload_bytes * 16 * 2 == 1_228_439_552
