"""FedNTD: FedAvg whose clients keep the global model's view of the other classes."""

import numpy as np
import pytest
import torch

from fedkd.exchange.payloads import Weights
from fedkd.training import MODEL, Batch, LoopCohort, Member, ModelPool, Outputs, Streams
from fedkd.training import TrainingData as Tensors
from strategies.regularised.fedntd import GLOBAL

BATCH_NORM = {"name": "cnn", "options": {"channels": [4], "norm": "batch"}}
CNN = {"name": "cnn", "options": {"channels": [4]}}

LOCAL = torch.tensor([[1.0, 2.0, 3.0, 0.0], [0.5, -1.0, 0.0, 2.0]])
KNOWN = torch.tensor([[2.0, 1.0, 4.0, -1.0], [0.0, 0.0, 1.0, 3.0]])
LABELS = torch.tensor([2, 0])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # CE of the local model: 1.14126964.
        ({}, 1.37595103),
        ({"temperature": 3.0}, 1.38424047),
        ({"temperature": 3.0, "scale_by_t2": False}, 1.14126964 + 0.02699676),
    ],
)
def test_the_loss_is_the_papers_by_hand(options, expected, tiny_settings, tiny_data, parts):
    strategy, _ = parts(tiny_settings("fedntd", options=options), tiny_data())
    local = LOCAL.clone().requires_grad_()
    known = KNOWN.clone().requires_grad_()
    outputs = {MODEL: Outputs(private=local), GLOBAL: Outputs(private=known)}
    losses = strategy._learn(outputs, Batch(labels=LABELS), weight=1.0)
    assert sum(loss.mean() for loss in losses.values()).item() == pytest.approx(expected, rel=1e-6)
    losses["ntd"].mean().backward()
    # What a row's own class says is left to its label, and the global model learns nothing.
    assert local.grad[[0, 1], LABELS].tolist() == [0.0, 0.0]
    assert local.grad.any()
    assert known.grad is None


def test_needs_two_classes_beside_a_rows_own(tiny_settings, tiny_data, parts):
    message = r"strategy\.name: fedntd needs at least 3 classes.*, got 2; use fedavg or fedprox"
    with pytest.raises(ValueError, match=message):
        parts(tiny_settings("fedntd"), tiny_data(num_classes=2))


@pytest.fixture
def cohort_of(tiny_settings, tiny_data, parts):
    """Make a cohort of one client with some model: (strategy, cohort, global weights)."""

    def build(model):
        settings = tiny_settings("fedntd", clients={"models": [model]})
        data = tiny_data()
        strategy, server = parts(settings, data)
        tensors = Tensors.from_arrays(data, torch.device("cpu"))
        optimizer = settings.clients.optimizer
        cohort = LoopCohort(
            [Member(0, data.client_rows[0])],
            model=settings.model_of(0),
            optimizer=optimizer,
            data=tensors,
            pool=ModelPool(tensors, optimizer),
            streams=Streams(seed=0),
        )
        return strategy, cohort, server.initial_weights(1)

    return build


def test_the_teacher_is_what_was_received_in_evaluation_mode_and_never_moves(
    cohort_of, learn, monkeypatch
):
    strategy, cohort, received = cohort_of(BATCH_NORM)
    # Statistics that no batch has, so that it would show if batches were used instead.
    received = {
        name: array + 0.5 if "running" in name else array for name, array in received.items()
    }
    told, said = strategy._learn, {}

    def listen(outputs, batch, **more):
        said.update(zip(batch.private_rows.tolist(), outputs[GLOBAL].private, strict=True))
        return told(outputs, batch, **more)

    monkeypatch.setattr(strategy, "_learn", listen)
    (sent,) = learn(strategy, cohort, Weights(arrays=received))
    (after,) = cohort.weights(model=GLOBAL)
    for name, array in received.items():
        assert array.tobytes() == after[name].tobytes()
    (expected,) = cohort.outputs(on="private", model=GLOBAL)
    assert len(said) == 12
    for row, logits in zip(expected.rows, expected.logits, strict=True):
        assert said[row].detach().numpy() == pytest.approx(logits, abs=1e-6)
    moved = [name for name, array in received.items() if (sent.arrays[name] != array).any()]
    assert any("running" in name for name in moved)
    assert any("weight" in name for name in moved)


def test_without_weight_it_is_fedavg(tiny_settings, tiny_data, simulate):
    fedavg = simulate(tiny_settings("fedavg"), tiny_data()).digest
    options = {"kd_weight": 0.0}
    assert simulate(tiny_settings("fedntd", options=options), tiny_data()).digest == fedavg
    assert simulate(tiny_settings("fedntd"), tiny_data()).digest != fedavg


def test_clients_stay_nearer_to_what_the_global_model_says(cohort_of, learn, tiny_data):
    inputs = torch.as_tensor(tiny_data().test_inputs)
    drift = {}
    for weight in (0.0, 10.0):
        strategy, cohort, received = cohort_of(CNN)
        settings = type(strategy.settings).model_validate({"kd_weight": weight, "temperature": 2.0})
        strategy = type(strategy)(settings, strategy.federation)
        cohort.load_weights(received)
        before = cohort.predict(inputs)
        learn(strategy, cohort, Weights(arrays=received))
        drift[weight] = np.abs(cohort.predict(inputs) - before).mean()
    assert drift[10.0] < drift[0.0]


@pytest.mark.parametrize("model", [CNN, BATCH_NORM], ids=["cnn", "batch norm"])
def test_stacked_clients_learn_what_clients_learn_one_by_one(
    model, tiny_settings, tiny_data, simulate
):
    one_by_one, stacked = (
        simulate(
            tiny_settings(
                "fedntd",
                clients={"models": [model], "optimizer": {"name": "sgd", "lr": 0.1}},
                engine={"backend": "inline", "vectorize": vectorize},
                rounds=2,
            ),
            tiny_data(),
        )
        for vectorize in ("loop", "vmap")
    )
    for one, other in zip(one_by_one.states, stacked.states, strict=True):
        for name, array in one.models["model"].weights.items():
            assert np.allclose(array, other.models["model"].weights[name], atol=1e-5)
