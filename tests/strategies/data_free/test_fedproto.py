"""FedProto: prototypes by hand, who keeps which, and who is judged by what."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.exchange.payloads import ClassTable, Prototypes
from fedkd.training import Batch, Outputs
from strategies.contract import Upload
from strategies.data_free.fedproto import mean_over_holders

MLPS = {"models": [{"name": "mlp", "options": {"hidden": [8]}}]}


def prototypes(table, counts=None, *, num_classes=3):
    return Prototypes(
        classes=np.array(sorted(table), np.int64),
        values=np.array([table[label] for label in sorted(table)], np.float32).reshape(-1, 2),
        num_classes=num_classes,
        counts=None if counts is None else np.array(counts, np.float32),
    )


NONE = prototypes({})
SENT = [
    (prototypes({0: (1, 0), 1: (0, 1)}), (30, 10)),
    (prototypes({0: (0.8, 0.4), 2: (-1, 0)}), (10, 20)),
    (prototypes({1: (0.2, 0.6), 2: (-0.6, -0.4)}), (30, 20)),
]


# -- the server's mean -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counted", "expected"),
    [
        (False, [[0.9, 0.2], [0.1, 0.8], [-0.8, -0.2]]),
        (True, [[0.95, 0.1], [0.15, 0.7], [-0.8, -0.2]]),
    ],
)
def test_each_class_is_the_mean_over_its_holders(counted, expected):
    sent = [
        replace(own, counts=np.array(counts, np.float32)) if counted else own
        for own, counts in SENT
    ]
    mean = mean_over_holders(sent, NONE)
    assert mean.classes.tolist() == [0, 1, 2]
    assert mean.values == pytest.approx(np.array(expected, np.float32), abs=1e-6)
    assert mean.counts is None


def test_a_class_that_nobody_sent_keeps_its_prototype():
    before = prototypes({1: (5, 5), 2: (7, 7)})
    mean = mean_over_holders([prototypes({0: (1, 0), 1: (0, 1)})], before)
    assert mean.classes.tolist() == [0, 1, 2]
    assert mean.values.tolist() == [[1, 0], [0, 1], [7, 7]]
    assert mean_over_holders([], before).values.tolist() == [[5, 5], [7, 7]]


def test_what_was_known_is_not_written_to():
    before = prototypes({0: (5, 5)})
    before.values.flags.writeable = False
    mean_over_holders([prototypes({0: (1, 0)})], before)
    assert before.values.tolist() == [[5, 5]]


@st.composite
def uploads_of_some_classes(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    clients, classes = draw(st.integers(1, 5)), draw(st.integers(2, 5))
    held = rng.random((clients, classes)) < 0.6
    values = rng.normal(size=(clients, classes, 2)).astype(np.float32)
    return [
        prototypes({c: values[k, c] for c in np.flatnonzero(held[k])}, num_classes=classes)
        for k in range(clients)
    ]


@settings(max_examples=50, deadline=None)
@given(uploads_of_some_classes())
def test_a_mean_lies_among_what_was_sent_and_equal_counts_change_nothing(sent):
    none = prototypes({}, num_classes=sent[0].num_classes)
    mean = mean_over_holders(sent, none)
    assert mean.classes.tolist() == sorted({int(c) for own in sent for c in own.classes})
    for label, value in zip(mean.classes, mean.values, strict=True):
        each = np.concatenate([own.values[own.classes == label] for own in sent])
        assert (value <= each.max(0) + 1e-6).all()
        assert (value >= each.min(0) - 1e-6).all()
    counted = [replace(own, counts=np.full(len(own.classes), 7, np.float32)) for own in sent]
    assert np.allclose(mean_over_holders(counted, none).values, mean.values, atol=1e-6)


# -- the loss ----------------------------------------------------------------------------------


def step(known, held, features, labels):
    tables = {
        "prototypes": torch.tensor(known),
        "known": torch.tensor(held, dtype=torch.float32),
    }
    outputs = Outputs(private=torch.zeros(len(labels), 3), features={"penultimate": features})
    return outputs, Batch(labels=torch.tensor(labels), tables=tables)


def test_the_distance_is_the_mean_square_by_hand(tiny_settings, tiny_data, parts):
    strategy, _ = parts(tiny_settings("fedproto"), tiny_data())
    known = [[0.9, 0.2], [0.1, 0.8], [-0.8, -0.2]]
    features = torch.tensor([[0.5, 0.5], [-0.5, 0.5]])
    losses = strategy._learn(*step(known, [1, 1, 1], features, [0, 2]), weight=1.0)
    assert losses["prototype"].mean().item() == pytest.approx(0.2075, rel=1e-6)
    halved = strategy._learn(*step(known, [1, 1, 1], features, [0, 2]), weight=0.5)
    assert halved["prototype"].mean().item() == pytest.approx(0.10375, rel=1e-6)


def test_a_class_without_a_prototype_draws_nowhere(tiny_settings, tiny_data, parts):
    strategy, _ = parts(tiny_settings("fedproto"), tiny_data())
    features = torch.tensor([[0.5, 0.5], [-0.5, 0.5]], requires_grad=True)
    known = [[0.9, 0.2], [0.1, 0.8], [0.0, 0.0]]
    losses = strategy._learn(*step(known, [1, 1, 0], features, [0, 2]), weight=1.0)
    losses["prototype"].mean().backward()
    # (.4^2 + .3^2) / 2 of the first row, nothing of the second, over two rows.
    assert losses["prototype"].mean().item() == pytest.approx(0.0625, rel=1e-6)
    assert features.grad[0].any()
    assert not features.grad[1].any()


# -- what is refused ---------------------------------------------------------------------------


def test_prototypes_can_be_no_wider_than_the_narrowest_model(tiny_settings, tiny_data, parts):
    strategy, server = parts(tiny_settings("fedproto", options={"features": 9}), tiny_data())
    message = r"strategy\.features must be at most 8, which is what mlp.* of clients\.models has"
    with pytest.raises(ValueError, match=message):
        strategy.check(server.data.input_shape)


def test_refuses_class_tables(tiny_settings, tiny_data, parts):
    strategy, server = parts(tiny_settings("fedproto"), tiny_data())
    sent = [Upload(0, ClassTable(values=np.zeros((3, 3), np.float32)), 10)]
    with pytest.raises(TypeError, match="expected prototypes"):
        strategy.aggregate(strategy.begin(server), sent, strategy.federation.round(1), server)


# -- runs --------------------------------------------------------------------------------------


def test_different_models_meet_at_the_narrowest_ones_features(tiny_settings, tiny_data, simulate):
    run = simulate(tiny_settings("fedproto"), tiny_data())
    assert run.events == []
    assert run.loop.boundary.state.values.shape == (3, 8)
    rounds = {}
    for row in run.exchange:
        rounds.setdefault((row["direction"], row["round"]), set()).add(row["bytes"])
    # Nothing to tell in the first round; then 3 prototypes of 8 numbers.
    assert rounds["down", 1] == {0}
    assert rounds["down", 2] == rounds["up", 1] == {3 * 8 * 4}


def test_who_lacks_a_class_says_so_and_sends_less(tiny_settings, tiny_data, simulate):
    data = tiny_data(rows=(12, 13, 9, 2))
    options = {"weighting": "count", "features": 4}
    run = simulate(tiny_settings("fedproto", options=options), data)
    held = len(np.unique(data.train_labels[data.client_rows[3]]))
    assert held < 3
    up = {row["client"]: row["bytes"] for row in run.exchange if row["direction"] == "up"}
    # Which of three classes are held is one byte of bits, where it has to be said.
    assert up[3] == held * (4 * 4 + 4) + 1
    assert up[0] == 3 * (4 * 4 + 4)


def test_judges_decide_the_accuracy_and_not_what_is_learnt(tiny_settings, tiny_data, simulate):
    runs = {
        judge: simulate(tiny_settings("fedproto", options={"judge": judge}), tiny_data())
        for judge in ("prototype", "head")
    }
    assert runs["prototype"].digest == runs["head"].digest
    accuracies = {
        judge: [row["accuracy"] for row in run.history.clients.values()]
        for judge, run in runs.items()
    }
    assert accuracies["prototype"] != accuracies["head"]
    assert np.mean(accuracies["prototype"]) > 0.5


def test_without_weight_clients_learn_alone(tiny_settings, tiny_data, simulate):
    alone = simulate(tiny_settings("local"), tiny_data()).states
    run = simulate(tiny_settings("fedproto", options={"prototype_weight": 0.0}), tiny_data())
    for own, other in zip(run.states, alone, strict=True):
        for name, array in own.models["model"].weights.items():
            assert np.allclose(array, other.models["model"].weights[name], atol=1e-6)
    drawn = simulate(tiny_settings("fedproto"), tiny_data())
    assert drawn.digest != run.digest


@pytest.mark.parametrize(
    "options",
    [{}, {"collect": "round", "weighting": "count"}, {"collect": "evaluation", "features": 3}],
    ids=str,
)
def test_stacked_clients_learn_what_clients_learn_one_by_one(
    options, tiny_settings, tiny_data, simulate
):
    one_by_one, stacked = (
        simulate(
            tiny_settings(
                "fedproto",
                options=options,
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
    for run in (one_by_one, stacked):
        assert run.events == []
    found, wanted = (run.loop.boundary.state.values for run in (one_by_one, stacked))
    assert np.allclose(found, wanted, atol=1e-5)
