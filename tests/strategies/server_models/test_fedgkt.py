"""FedGKT: features, logits and labels go up; the server's logits of the same rows come down."""

from functools import partial

import numpy as np
import pytest
import torch

from fedkd.exchange.payloads import RowFeatures, RowLogits
from fedkd.models import ModelSettings
from fedkd.training import Batch, Outputs
from sim.engine.runtime import ClientRuntime
from sim.wire.messages import CohortCall
from strategies.contract import Call, Received, Upload
from strategies.server_models.fedgkt import (
    KNOWN,
    TAUGHT,
    Server,
    as_image,
    feature_shape,
    taught_and_labelled,
)

S = [[1.0, 2, 3, 0], [0.5, -1, 0, 2]]
R = [[0.0, 1, 1, 0], [1, 0, 0, 1]]
SMALL = {"name": "mlp", "options": {"hidden": [8]}}
CNN = {"name": "cnn", "options": {"channels": [4]}}


def loss_of(own, other, *, known=(1.0, 1.0), **weights):
    batch = Batch(
        labels=torch.tensor([2, 0]),
        tables={TAUGHT: torch.tensor(other).double(), KNOWN: torch.tensor(known).double()},
    )
    losses = taught_and_labelled(Outputs(private=torch.tensor(own).double()), batch, **weights)
    return {name: float(loss.mean()) for name, loss in losses.items()}


# -- losses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "a", "client", "server"),
    [(3.0, 0.5, 1.27480097, 0.77016342), (1.0, 1.0, 1.38645416, 1.22523781)],
)
def test_losses_are_asymmetric_and_of_hand_computed_size(temperature, a, client, server):
    # A client pays CE + a T^2 KL(server || client), the server T^2 KL(client || server) + a CE.
    mine = loss_of(S, R, kd_weight=a, ce_weight=1.0, temperature=temperature)
    its = loss_of(R, S, kd_weight=1.0, ce_weight=a, temperature=temperature)
    assert sum(mine.values()) == pytest.approx(client, abs=1e-8)
    assert sum(its.values()) == pytest.approx(server, abs=1e-8)


def test_rows_that_nobody_spoke_of_have_the_first_term_only():
    rule = {"kd_weight": 0.5, "ce_weight": 1.0, "temperature": 3.0}
    none = loss_of(S, R, known=(0.0, 0.0), **rule)
    assert none["kd"] == 0
    first = loss_of(S, [R[0], [9.0, 9, 9, 0]], known=(1.0, 0.0), **rule)
    alone = loss_of([S[0], S[0]], [R[0], R[0]], **rule)
    assert first["kd"] == pytest.approx(alone["kd"])


# -- rows and shapes ---------------------------------------------------------------------------


def test_logits_are_found_by_the_row_they_are_of():
    said = RowLogits(rows=np.array([7, 2, 5]), values=np.diag([1.0, 2, 3]).astype(np.float32))
    values, known = said.of(np.array([5, 7, 4]))
    assert values.tolist() == [[0, 0, 3], [1, 0, 0], [0, 0, 0]]
    assert known.tolist() == [True, True, False]
    assert said.payload_bytes == 9 * 4


@pytest.mark.parametrize(
    ("shape", "image"), [((64,), (1, 1, 64)), ((5, 6), (1, 5, 6)), ((4, 8, 8), (4, 8, 8))]
)
def test_features_count_as_images(shape, image):
    assert as_image(shape) == image


def test_a_layer_that_a_client_lacks_is_named():
    model = ModelSettings.model_validate(SMALL)
    assert feature_shape(model, "penultimate", (1, 8, 8), 3) == (8,)
    with pytest.raises(ValueError, match=r"strategy\.layer: layer 'last_map'.*feature maps"):
        feature_shape(model, "last_map", (1, 8, 8), 3)


# -- the client --------------------------------------------------------------------------------


@pytest.fixture
def home(tiny_settings, tiny_data, parts):
    """Make (strategy, server tools, a function that opens a cohort of a round)."""

    def build(models=(SMALL,), clients=None, **options):
        settings = tiny_settings(
            "fedgkt", options=options, clients={"models": list(models), **(clients or {})}
        )
        data = tiny_data()
        runtime = ClientRuntime(settings, data)

        def cohort(*clients, backend="loop", number=1, states=None):
            call = CohortCall("train", number, clients, backend)
            return runtime._cohort(call, states or [None] * len(clients))

        return *parts(settings, data), cohort

    return build


def test_a_client_sends_features_logits_and_labels_of_all_its_rows(home, tiny_data):
    strategy, server, open_cohort = home()
    cohort = open_cohort(1)
    (sent,) = strategy.client(cohort, Received([None]), Call(strategy.federation, 1))
    data = tiny_data()
    assert np.array_equal(sent.rows, data.client_rows[1])
    assert np.array_equal(sent.labels, data.train_labels[data.client_rows[1]])
    assert sent.features.shape == (13, 8)
    inputs = torch.from_numpy(data.train_inputs[data.client_rows[1]])
    assert np.allclose(sent.logits, cohort.predict(inputs)[0], atol=1e-6)
    asked = strategy.asks(strategy.begin(server), 1, strategy.federation.round(1), server)
    assert sent.problem(asked) is None
    # Ids and labels cost four bytes each.
    assert sent.payload_bytes == 13 * (8 + 3 + 1 + 1) * 4


@pytest.mark.parametrize("backend", ["loop", "vmap"])
def test_who_heard_nothing_learns_from_labels_alone(backend, home):
    strategy, _, open_cohort = home()
    first = open_cohort(0, 1, backend=backend)
    strategy.client(first, Received([None, None]), Call(strategy.federation, 1))
    rows, alone = first.private_rows, first.weights()
    said = RowLogits(rows=rows[1][::-1].copy(), values=np.ones((len(rows[1]), 3), np.float32))
    second = open_cohort(0, 1, backend=backend)
    strategy.client(second, Received([None, said]), Call(strategy.federation, 1))
    taught = second.weights()
    same = [
        all(np.allclose(one[name], other[name], atol=1e-6) for name in one)
        for one, other in zip(alone, taught, strict=True)
    ]
    assert same == [True, False]


# -- the server --------------------------------------------------------------------------------


def upload(client, rows, width, seed):
    rng = np.random.default_rng(seed)
    return Upload(
        client,
        RowFeatures(
            rows=np.array(rows),
            features=rng.normal(size=(len(rows), width)).astype(np.float32),
            logits=rng.normal(size=(len(rows), 3)).astype(np.float32),
            labels=rng.integers(0, 3, len(rows)),
        ),
        len(rows),
    )


def test_the_server_answers_each_client_about_its_own_rows(home):
    strategy, server, _ = home()
    uploads = [upload(0, [4, 1, 9], 8, 0), upload(2, [3, 7], 8, 1)]
    after = strategy.aggregate(
        strategy.begin(server), uploads, strategy.federation.round(1), server
    )
    (model,) = after.models.values()
    for one in uploads:
        said = after.logits[one.client]
        assert np.array_equal(said.rows, one.payload.rows)
        inputs = torch.from_numpy(one.payload.features.reshape(-1, 1, 1, 8))
        assert np.allclose(said.values, server.predict(model, inputs), atol=1e-5)
    assert strategy.receives(after, 1, strategy.federation.round(2)) is None


def test_the_server_minimises_its_loss(home):
    strategy, server, _ = home(server_epochs=30, server_ce_weight=1.0)
    sent = upload(0, range(12), 8, 0)
    before = strategy.begin(server)
    after = strategy.aggregate(before, [sent], strategy.federation.round(1), server)

    def loss(state):
        (model,) = state.models.values()
        inputs = torch.from_numpy(sent.payload.features.reshape(-1, 1, 1, 8))
        batch = Batch(
            labels=torch.from_numpy(sent.payload.labels),
            tables={TAUGHT: torch.from_numpy(sent.payload.logits), KNOWN: torch.ones(12)},
        )
        outputs = Outputs(private=torch.from_numpy(server.predict(model, inputs)))
        rule = partial(taught_and_labelled, kd_weight=1.0, ce_weight=1.0, temperature=3.0)
        return sum(float(each.mean()) for each in rule(outputs, batch).values())

    assert loss(after) < 0.7 * loss(before)


def test_logits_of_the_last_pass_are_those_of_each_row_before_its_step(home):
    # In one batch all rows are seen before the only step: what comes back is of the old model.
    strategy, server, _ = home(clients={"batch_size": 50}, returned="trained", server_epochs=1)
    before = strategy.begin(server)
    sent = upload(0, [8, 3, 5, 1], 8, 0)
    after = strategy.aggregate(before, [sent], strategy.federation.round(1), server)
    (old,), (new,) = before.models.values(), after.models.values()
    inputs = torch.from_numpy(sent.payload.features.reshape(-1, 1, 1, 8))
    assert np.allclose(after.logits[0].values, server.predict(old, inputs), atol=1e-5)
    assert not np.allclose(after.logits[0].values, server.predict(new, inputs), atol=1e-5)


def test_the_servers_optimizer_remembers_from_round_to_round(home):
    strategy, server, _ = home()
    state = strategy.begin(server)
    counts = []
    for number in (1, 2):
        round = strategy.federation.round(number)
        state = strategy.aggregate(state, [upload(0, [1, 2, 3], 8, 0)], round, server)
        (model,) = state.models.values()
        steps = [array for name, array in model.arrays.items() if "optimizer/step" in name]
        counts.append(float(steps[0]))
    assert counts[1] == 2 * counts[0] > 0


def test_a_client_that_is_away_keeps_what_was_said_of_its_rows(home):
    strategy, server, _ = home()
    state = strategy.begin(server)
    state = strategy.aggregate(
        state,
        [upload(0, [1, 2], 8, 0), upload(1, [3, 4], 8, 1)],
        strategy.federation.round(1),
        server,
    )
    later = strategy.aggregate(
        state, [upload(1, [3, 4], 8, 2)], strategy.federation.round(2), server
    )
    assert np.array_equal(later.logits[0].values, state.logits[0].values)
    assert not np.array_equal(later.logits[1].values, state.logits[1].values)


def test_there_is_a_model_for_each_shape_of_features(home):
    strategy, server, _ = home([SMALL, {"name": "mlp", "options": {"hidden": [6]}}])
    assert [each.input_shape for each in strategy.server_models().values()] == [
        (1, 1, 6),
        (1, 1, 8),
    ]
    assert isinstance(strategy.begin(server), Server)


# -- the whole ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["penultimate", "last_map"])
def test_clients_and_server_learn(layer, tiny_settings, tiny_data, simulate):
    settings = tiny_settings(
        "fedgkt", options={"layer": layer}, clients={"models": [CNN]}, rounds=8
    )
    run = simulate(settings, tiny_data())
    assert run.events == []
    assert run.history.federation[-1]["accuracy"] > 0.8
    down = {row["round"] for row in run.exchange if row["direction"] == "down"}
    assert down == set(range(2, 9))


def test_a_loop_and_a_stack_learn_alike(tiny_settings, tiny_data, simulate):
    loop, stack = (
        simulate(
            tiny_settings(
                "fedgkt",
                clients={"models": [SMALL], "participants": 3},
                engine={"backend": "inline", "vectorize": how},
            ),
            tiny_data(),
        )
        for how in ("loop", "vmap")
    )
    for one, other in zip(loop.states, stack.states, strict=True):
        for name, weights in one.models["model"].weights.items():
            assert np.allclose(weights, other.models["model"].weights[name], atol=1e-5)
