"""Fed-ET: whom the server hears, what it learns where nobody disagrees, and whose head is whose."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedkd.exchange.payloads import Weights
from fedkd.training import Batch, Outputs
from strategies.contract import Upload
from strategies.server_models.fedet import (
    CONSENSUS,
    DISSENT,
    _learn,
    consensus_of,
    dissent_of,
    head_arrays,
    shares_by_variance,
)

S = [[1.0, 2, 3, 0], [0.5, -1, 0, 2]]
T = [[2.0, 1, 4, -1], [0, 0, 1, 3]]
U = [[-4.0, 3, 1, 1], [2, 0, -1, 1]]
SENT = torch.tensor([S, T, U])
SERVER = torch.tensor([[0.0, 1, 1, 0], [1, 0, 0, 1]])
SMALL = {"name": "mlp", "options": {"hidden": [8]}}
OTHER = {"name": "mlp", "options": {"hidden": [6]}}


def losses_on(sent, weight=0.05):
    logits = SERVER.clone().requires_grad_()
    tables = {CONSENSUS: consensus_of(sent), DISSENT: dissent_of(sent)}
    losses = _learn(Outputs(public=logits), Batch(tables=tables), diversity_weight=weight)
    return logits, losses


# -- whom the server hears ---------------------------------------------------------------------


def test_clients_count_by_their_variance_by_hand():
    shares = shares_by_variance(SENT)
    shares = shares / shares.sum(0)
    expected = [
        [0.11173184, 0.29880478],
        [0.29050279, 0.38247012],
        [0.59776536, 0.31872510],
    ]
    assert shares.numpy() == pytest.approx(np.array(expected), abs=1e-7)
    mean = consensus_of(SENT)
    expected = [
        [-1.69832402, 2.30726257, 2.09497207, 0.30726257],
        [0.78685259, -0.29880478, 0.06374502, 2.06374502],
    ]
    assert mean.numpy() == pytest.approx(np.array(expected), abs=1e-6)
    # The labels are 2 and 0: variance is not correctness.
    assert mean.argmax(-1).tolist() == [1, 3]


def test_those_who_disagree_are_averaged_by_hand():
    expected = [[1.72222222, 1.27777778, 3.72222222, -0.72222222], [2, 0, -1, 1]]
    assert dissent_of(SENT).numpy() == pytest.approx(np.array(expected), abs=1e-6)


def test_the_servers_loss_by_hand():
    _, losses = losses_on(SENT)
    assert losses["consensus"].mean().item() == pytest.approx(1.00640887, rel=1e-7)
    _, alone = losses_on(SENT, weight=1.0)
    rows = alone["diversity"].values.tolist()
    assert rows == pytest.approx([0.48188542, 0.17807483], rel=1e-6)
    total = sum(loss.mean() for loss in losses.values()).item()
    assert total == pytest.approx(1.02290787, rel=1e-7)


def test_where_nobody_disagrees_the_server_is_drawn_nowhere():
    # Published fault: the mean of nobody is 0, whose softmax is uniform; the server would pay a
    # divergence of .1201 here for being sure.
    agreed = torch.tensor([S, S])
    assert dissent_of(agreed).isnan().all()
    logits, losses = losses_on(agreed, weight=1.0)
    assert losses["diversity"].mean().item() == 0
    losses["diversity"].mean().backward()
    assert (logits.grad == 0).all()
    half = SENT.clone()
    half[:, 1] = SENT[0, 1]
    logits, losses = losses_on(half, weight=1.0)
    losses["diversity"].mean().backward()
    assert logits.grad[0].any()
    assert not logits.grad[1].any()


def test_one_client_is_its_own_consensus():
    assert consensus_of(SENT[:1]).numpy() == pytest.approx(np.array(S))
    assert dissent_of(SENT[:1]).isnan().all()


def test_clients_that_tell_no_class_from_another_count_alike_or_nothing():
    flat = torch.full((2, 1, 4), 3.0)
    assert consensus_of(flat).tolist() == [[3.0] * 4]
    # Its class is the first, by name only: a mean by its variance, 0, would be nobody's.
    beside = torch.stack([torch.tensor([[0.0, 0, 5, 0]]), flat[0]])
    assert consensus_of(beside).tolist() == [[0, 0, 5, 0]]
    assert dissent_of(beside).isnan().all()


# -- the last layer ----------------------------------------------------------------------------


def test_a_last_layer_is_known_by_its_parts(tiny_settings):
    settings = tiny_settings("fedet", clients={"models": [SMALL]})
    arrays = head_arrays(settings.model_of(0), (1, 8, 8), 3)
    assert {part: shape for part, (_, shape) in arrays.items()} == {"weight": (3, 8), "bias": (3,)}


def sent_by(server, clients):
    return [Upload(k, Weights(arrays=server.initial_weights(k)), 10 + k) for k in clients]


def head_of(strategy, model, arrays):
    names = head_arrays(model, strategy.federation.input_shape, strategy.federation.num_classes)
    return {part: arrays[name] for part, (name, _) in names.items()}


@pytest.fixture
def made(tiny_settings, tiny_data, parts):
    def build(models, **options):
        options = {"model": SMALL, "server_steps": 3, **options}
        return parts(
            tiny_settings("fedet", clients={"models": models}, options=options), tiny_data()
        )

    return build


def test_the_servers_last_layer_goes_to_those_whose_is_as_large(made):
    strategy, server = made([SMALL, OTHER])
    state = strategy.begin(server)
    after = strategy.aggregate(
        state, sent_by(server, range(4)), strategy.federation.round(1), server
    )
    learnt = head_of(strategy, strategy.settings.model, after.server.weights)
    ours, others = strategy.federation.models[:2]
    given = head_of(strategy, ours, after.models[ours.key].arrays)
    assert all((given[part] == learnt[part]).all() for part in learnt)
    kept = head_of(strategy, others, after.models[others.key].arrays)
    mean = np.average(
        [head_of(strategy, others, server.initial_weights(k))["bias"] for k in (1, 3)],
        axis=0,
        weights=[11, 13],
    )
    assert kept["bias"] == pytest.approx(mean, rel=1e-6)


def test_the_server_begins_with_the_mean_of_the_last_layers_that_fit(made, monkeypatch):
    strategy, server = made([SMALL, OTHER])
    begun = []
    told = server.fit

    def listen(model, objective, **more):
        begun.append(model.weights)
        return told(model, objective, **more)

    monkeypatch.setattr(server, "fit", listen)
    state = strategy.begin(server)
    round = strategy.federation.round(1)
    strategy.aggregate(state, sent_by(server, range(4)), round, server)
    model = strategy.federation.models[0]
    heads = [head_of(strategy, model, server.initial_weights(k)) for k in (0, 2)]
    mean = np.average([head["weight"] for head in heads], axis=0, weights=[10, 12])
    assert head_of(strategy, strategy.settings.model, begun[0])["weight"] == pytest.approx(
        mean, rel=1e-6
    )
    # Nobody's fits: it goes on with its own.
    strategy.aggregate(state, sent_by(server, [1, 3]), round, server)
    own = state.server.weights
    assert all((begun[1][name] == array).all() for name, array in own.items())


def test_last_layers_can_stay_apart(made):
    strategy, server = made([SMALL], share_head=False)
    state = strategy.begin(server)
    after = strategy.aggregate(
        state, sent_by(server, range(2)), strategy.federation.round(1), server
    )
    (model,) = after.models.values()
    arrays = [server.initial_weights(k) for k in (0, 1)]
    for name, array in model.arrays.items():
        mean = np.average([own[name] for own in arrays], axis=0, weights=[10, 11])
        assert array == pytest.approx(mean, rel=1e-5, abs=1e-7)


def test_what_all_clients_say_teaches_the_server(made):
    strategy, server = made([SMALL], server_steps=200)
    state = strategy.begin(server)
    round = strategy.federation.round(1)
    after = strategy.aggregate(state, sent_by(server, range(4)), round, server)
    model = strategy.federation.models[0]
    said = torch.stack(
        [
            torch.as_tensor(server.predict_with(model, own.payload.arrays, round.public_rows))
            for own in sent_by(server, range(4))
        ]
    )
    labels = consensus_of(said).argmax(-1)
    before, learnt = (
        F.cross_entropy(
            torch.as_tensor(server.predict_public(each.server, round.public_rows)), labels
        )
        for each in (state, after)
    )
    assert learnt < before / 2


def test_where_nobody_answers_nothing_moves(made):
    strategy, server = made([SMALL])
    state = strategy.begin(server)
    assert strategy.aggregate(state, [], strategy.federation.round(1), server) is state


# -- runs --------------------------------------------------------------------------------------


def test_a_federation_teaches_its_server(tiny_settings, tiny_data, simulate):
    run = simulate(tiny_settings("fedet", rounds=4), tiny_data())
    assert run.events == []
    assert run.history.federation[-1]["server_accuracy"] > 0.6
