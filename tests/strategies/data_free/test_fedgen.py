"""FedGen: a generator learns from last layers, and clients from what it makes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedkd.exchange.payloads import Bundle, Numbers, Weights
from fedkd.training import MODEL, Batch, OptimizerSettings, Outputs
from strategies.contract import Upload
from strategies.data_free.fedgen import (
    COUNTS,
    GENERATOR,
    LABELS,
    FedGenSettings,
    towards_generated,
    weight_at,
)
from strategies.shared.generator import (
    GeneratorShape,
    diversity_loss,
    generated,
    generator_weights,
    known_labels,
    label_weights,
    taught,
    teacher_loss,
)

SETTINGS = {"models": [{"name": "mlp", "options": {"hidden": [8]}}], "batch_size": 6}
COUNTED = np.array([[5.0, 1.0], [3.0, 7.0]], np.float32)
LOGITS = torch.tensor([[[2.0, 0], [0, 1]], [[1, 0], [0, 3]]])
LABELLED = torch.tensor([0, 1])
SHAPE = GeneratorShape(classes=3, noise=4, hidden=8, features=5)


# -- what a generator learns -----------------------------------------------------------------------


def test_a_client_counts_by_its_share_of_a_class():
    assert label_weights(COUNTED).tolist() == [[0.625, 0.125], [0.375, 0.875]]


@pytest.mark.parametrize(
    ("teacher", "loss"),
    [("losses", 0.13923739), ("logits", 0.16417064), ("weighted_logits", 0.12085611)],
)
def test_losses_of_last_layers_are_those_computed_by_hand(teacher, loss):
    weights = torch.from_numpy(label_weights(COUNTED)).float()
    found = teacher_loss(LOGITS, LABELLED, weights, teacher=teacher)
    assert found.item() == pytest.approx(loss, abs=1e-7)


def test_the_code_s_form_is_the_default():
    assert FedGenSettings().teacher == "losses"


def test_diversity_is_that_computed_by_hand():
    features = torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    noise = torch.tensor([[0.1, 0.9], [0.5, 0.5], [0.8, 0.2]])
    assert diversity_loss(noise, features).item() == pytest.approx(0.90483742, abs=1e-7)
    # Features that do not depend on the noise are as bad as can be, and no gradient is NaN.
    same = torch.ones(3, 2, requires_grad=True)
    worst = diversity_loss(noise, same)
    assert worst.item() == 1.0
    assert torch.isfinite(torch.autograd.grad(worst, same)[0]).all()


def test_a_class_without_a_holder_has_no_weight_and_is_not_generated():
    """Published fault: counts start at 1, so a class that a client lacks counts as one it holds."""
    counts = np.array([[4.0, 0, 0, 1], [0, 0, 2, 1]], np.float32)
    weights = label_weights(counts)
    assert weights.tolist() == [[1, 0, 0, 0.5], [0, 0, 1, 0.5]]
    # As in the code a class needs more than one row at some client.
    assert known_labels(counts).tolist() == [0, 2]
    assert known_labels(np.zeros((0, 4), np.float32)).tolist() == []


def noise_as_it_is():
    """A generator that puts out its noise: ReLU of both signs, put together again."""
    one = np.eye(4, dtype=np.float32)
    first = np.zeros((8, 7), np.float32)
    first[:4, :4], first[4:, :4] = one, -one
    return {
        "0.weight": first,
        "0.bias": np.zeros(8, np.float32),
        "1.weight": np.full(8, np.sqrt(1 + 1e-5), np.float32),
        "1.bias": np.zeros(8, np.float32),
        "1.running_mean": np.zeros(8, np.float32),
        "1.running_var": np.ones(8, np.float32),
        "1.num_batches_tracked": np.array(0),
        "3.weight": np.concatenate([one, -one], axis=1),
        "3.bias": np.zeros(4, np.float32),
    }


def test_noise_is_gaussian_and_each_client_s_own():
    """Published fault: noise is drawn evenly from 0 to 1, where the paper has it Gaussian."""
    shape = GeneratorShape(classes=3, noise=4, hidden=8, features=4)
    labels = [np.zeros(2000, np.int64)] * 2
    rngs = [np.random.default_rng(client) for client in range(2)]
    one, other = generated(shape, noise_as_it_is(), labels, rngs)
    assert abs(one.mean()) < 0.05
    assert one.std() == pytest.approx(1, abs=0.05)
    assert one.min() < -2
    assert not np.array_equal(one, other)
    again = generated(shape, noise_as_it_is(), labels, [np.random.default_rng(0)] * 2)[0]
    assert np.array_equal(one, again)


def heads(clients):
    rng = np.random.default_rng(0)
    return [(3 * rng.normal(size=(3, 5)).astype(np.float32), None) for _ in range(clients)]


def train(state, clients=2, steps=200, counts=None, seed=1):
    return taught(
        SHAPE,
        state,
        heads(clients),
        np.full((clients, 3), 4, np.float32) if counts is None else counts,
        optimizer=OptimizerSettings(lr=0.01),
        steps=steps,
        batch=32,
        teacher="losses",
        teacher_weight=1.0,
        diversity_weight=1.0,
        rng=np.random.default_rng(seed),
    )


def right(state, clients=2, labels=None):
    labels = np.arange(300) % 3 if labels is None else labels
    (features,) = generated(SHAPE, generator_weights(state), [labels], [np.random.default_rng(5)])
    return np.mean([(features @ w.T).argmax(1) == labels for w, _ in heads(clients)])


@pytest.mark.parametrize("clients", [1, 2])
def test_last_layers_come_to_recognise_what_is_generated(clients):
    first = SHAPE.first(7)
    trained = train(first, clients)
    assert right(trained, clients) > 0.9 > right(first, clients)
    # The optimizer remembers, and the same draws give the same bits.
    assert any("exp_avg" in name for name in trained)
    again = train(SHAPE.first(7), clients)
    assert all(np.array_equal(trained[name], again[name]) for name in trained)
    assert not np.array_equal(
        first["model/weights/3.weight"], SHAPE.first(8)["model/weights/3.weight"]
    )


# -- what a client learns --------------------------------------------------------------------------


def test_a_client_s_losses_are_those_computed_by_hand():
    # The last layer doubles; rows of classes 0 and 2, the latter of which the generator lacks.
    logits = torch.tensor([[1.0, 0, 0], [0, 1, 2]])
    drawn, same = torch.eye(3)[[1, 0]], torch.eye(3)[[0, 2]]
    tables = {
        "drawn": drawn,
        "drawn labels": torch.tensor([1, 1]),
        "same": same.requires_grad_(),
        "known": torch.tensor([1.0, 0.0]),
    }
    outputs = Outputs(private=logits.requires_grad_(), head=lambda features: 2 * features)
    batch = Batch(labels=torch.tensor([0, 2]), tables=tables)
    losses = towards_generated(outputs, batch, label_weight=3.0, latent_weight=5.0)
    means = {name: loss.mean().item() for name, loss in losses.items()}
    target = (2 * same[0]).softmax(-1)
    kl = (target * (target.log() - logits[0].log_softmax(-1))).sum()
    assert means == pytest.approx(
        {
            "ce": F.cross_entropy(logits, batch.labels).item(),
            "generated": 3 * F.cross_entropy(2 * drawn, torch.tensor([1, 1])).item(),
            "latent": 5 * kl.item(),
        }
    )
    # What last layers say about features is a constant for the prediction that it teaches.
    assert torch.autograd.grad(losses["latent"].mean(), same, allow_unused=True) == (None,)
    assert "latent" not in towards_generated(outputs, batch, label_weight=1.0, latent_weight=0.0)


def test_weights_of_what_is_generated_fall_from_round_to_round():
    assert [weight_at(10.0, 0.98, round) for round in (1, 2, 3)] == pytest.approx([10, 9.8, 9.604])
    assert weight_at(10.0, 0.98, 10_000) == 1e-4
    assert weight_at(0.0, 0.98, 3) == 0


# -- rounds ----------------------------------------------------------------------------------------


@pytest.fixture
def home(parts, tiny_settings, tiny_data):
    def build(clients=SETTINGS, **options):
        options = {"generator_steps": 3, "generator_batch": 8, "noise": 4, "hidden": 8, **options}
        return parts(tiny_settings("fedgen", clients=clients, options=options), tiny_data())

    return build


def upload(strategy, state, client, counts):
    received = strategy.payload(state, (strategy._key(client), False))
    numbers = Numbers(values=np.array(counts, np.float32))
    return Upload(client, Bundle(parts={MODEL: received, COUNTS: numbers}), 12)


@pytest.mark.parametrize("share", ["model", "head"])
def test_clients_receive_the_generator_once_there_is_one(share, home):
    strategy, server = home(share=share)
    round = strategy.federation.round(1)
    state = strategy.begin(server)
    first = strategy.payload(state, strategy.receives(state, 0, round))
    assert isinstance(first, Weights)
    sent = upload(strategy, state, 0, [2, 0, 3])
    assert sent.payload.problem(strategy.asks(state, 0, round, server)) is None
    after = strategy.aggregate(state, [sent], round, server)
    received = strategy.payload(after, strategy.receives(after, 1, round))
    assert received[LABELS].values.tolist() == [1, 0, 1]
    assert received[GENERATOR].arrays.keys() == noise_as_it_is().keys()
    if share == "head":
        assert set(received[MODEL].arrays) == {"weight", "bias"}
    # Without an answer, and where nobody holds a class twice, the generator stays as it is.
    assert strategy.aggregate(after, [], round, server) == after
    few = strategy.aggregate(after, [upload(strategy, after, 1, [1, 0, 0])], round, server)
    assert few.generator is after.generator
    assert few.labels == (0, 2)


def test_more_rows_than_a_client_has_are_refused(home):
    strategy, server = home()
    state, round = strategy.begin(server), strategy.federation.round(1)
    asked = strategy.asks(state, 0, round, server)
    for counts in ([500, 0, 0], [-1, 0, 0], [np.nan, 0, 0]):
        assert upload(strategy, state, 0, counts).payload.problem(asked) is not None


def test_a_loop_and_a_stack_learn_alike(tiny_settings, tiny_data, simulate):
    loop, stack = (
        simulate(
            tiny_settings(
                "fedgen",
                clients=SETTINGS,
                rounds=3,
                engine={"backend": "inline", "vectorize": how},
            ),
            tiny_data(),
        )
        for how in ("loop", "vmap")
    )
    for one, other in zip(loop.states, stack.states, strict=True):
        mine, others = one.to_arrays(), other.to_arrays()
        for name, array in mine.items():
            np.testing.assert_allclose(array, others[name], atol=1e-4)
    assert {row["kind"] for row in loop.exchange} >= {"weights+numbers", "weights+weights+numbers"}


def test_models_of_any_architecture_share_last_layers(tiny_settings, tiny_data, simulate):
    models = [
        {"name": "mlp", "options": {"hidden": [8]}},
        {"name": "mlp", "options": {"hidden": [16, 8]}},
    ]
    options = {"share": "head", "generator_steps": 2}
    run = simulate(
        tiny_settings("fedgen", clients={**SETTINGS, "models": models}, options=options),
        tiny_data(),
    )
    up = {row["bytes"] for row in run.exchange if row["direction"] == "up"}
    # A last layer of 3 x 8 and 3 biases, and three counts.
    assert up == {4 * (24 + 3 + 3)}


def test_last_layers_of_different_widths_are_refused_by_name(home):
    models = [SETTINGS["models"][0], {"name": "mlp", "options": {"hidden": [9]}}]
    strategy, _ = home(clients={**SETTINGS, "models": models})
    with pytest.raises(ValueError, match=r"clients\.models: fedgen .* mlp.* has 8, mlp.* has 9"):
        strategy.check((1, 8, 8))


def test_last_layers_with_and_without_a_bias_have_no_common_mean(home):
    models = [SETTINGS["models"][0], {"name": "odd_models:make", "options": {"kind": "Unbiased"}}]
    clients = {**SETTINGS, "models": models}
    home(clients=clients)[0].check((1, 8, 8))
    with pytest.raises(ValueError, match=r"share: head .* mlp.* has one, .*odd_models.* has none"):
        home(clients=clients, share="head")[0].check((1, 8, 8))


@pytest.mark.parametrize(
    "optimizer", [{"decay": {"kind": "cosine", "start": 1.0, "end": 0.0}}, {"warm_up": 0.1}]
)
def test_the_generator_s_rate_is_constant_in_a_round(tiny_settings, optimizer):
    message = r"strategy\.generator_optimizer must have a constant rate"
    with pytest.raises(ValueError, match=message):
        tiny_settings("fedgen", options={"generator_optimizer": optimizer})
