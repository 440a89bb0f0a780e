"""FedTGP: gaps, margins and distances by hand; what the server's prototypes learn."""

import numpy as np
import pytest
import torch

from fedkd.exchange.payloads import Prototypes
from strategies.contract import Upload
from strategies.data_free.fedproto import mean_over_holders
from strategies.data_free.fedtgp import distances, margin_of, separation_loss


def prototypes(table, *, num_classes=3):
    return Prototypes(
        classes=np.array(sorted(table), np.int64),
        values=np.array([table[label] for label in sorted(table)], np.float32).reshape(-1, 2),
        num_classes=num_classes,
    )


NONE = prototypes({})
SENT = [
    prototypes({0: (1, 0), 1: (0, 1)}),
    prototypes({0: (0.8, 0.4), 2: (-1, 0)}),
    prototypes({1: (0.2, 0.6), 2: (-0.6, -0.4)}),
]
TRAINED = torch.tensor([[0.9, 0.1], [0.1, 0.9], [-0.9, -0.1]])


# -- arithmetic --------------------------------------------------------------------------------


def test_the_margin_is_the_widest_gap_to_the_nearest_class_by_hand():
    means = mean_over_holders(SENT, NONE)
    values = torch.as_tensor(means.values)
    apart = distances(values, values)
    assert apart[0, 1].item() == pytest.approx(1.0, rel=1e-6)
    assert apart[0, 2].item() == pytest.approx(1.74642492, rel=1e-6)
    assert apart[1, 2].item() == pytest.approx(1.34536240, rel=1e-6)
    # The gaps are 1, 1 and 1.3453624.
    assert margin_of(means, 100.0) == pytest.approx(1.34536240, rel=1e-6)
    assert margin_of(means, 0.5) == 0.5


def test_a_class_that_is_absent_widens_no_gap():
    means = mean_over_holders(SENT, prototypes({}, num_classes=7))
    assert margin_of(means, 100.0) == pytest.approx(1.34536240, rel=1e-6)
    # Published fault: the gap of an only class is 1e9, and so the margin the largest that there is.
    assert margin_of(prototypes({1: (3, 4)}), 100.0) == 0
    assert margin_of(NONE, 100.0) == 0


@pytest.mark.parametrize(("margin", "expected"), [(1.34536240, 1.24755621), (0.0, 0.50288614)])
def test_the_servers_loss_by_hand(margin, expected):
    sent = torch.as_tensor(np.concatenate([own.values for own in SENT]))
    labels = torch.as_tensor(np.concatenate([own.classes for own in SENT]))
    loss = separation_loss(sent, labels, TRAINED, margin=margin)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_distances_are_no_nan_and_have_a_gradient_at_0():
    # Published fault: sqrt(a^2 - 2 a b + b^2) is NaN where rounding makes its square negative, and
    # its gradient is infinite at 0.
    rng = np.random.default_rng(0)
    sent = torch.as_tensor(rng.normal(300, 1, (50, 32)).astype(np.float32))
    square = (sent**2).sum(1, keepdim=True) - 2 * sent @ sent.T + (sent**2).sum(1)
    assert (square.diagonal() < 0).any()
    own = sent.clone().requires_grad_()
    apart = distances(sent, own)
    assert apart.diagonal().max() <= 1e-6
    loss = separation_loss(sent, torch.arange(50), own, margin=1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(own.grad).all()


# -- the server --------------------------------------------------------------------------------


@pytest.fixture
def made(tiny_settings, tiny_data, parts):
    def build(**options):
        options = {"features": 2, "server_lr": 0.1, **options}
        return parts(tiny_settings("fedtgp", options=options), tiny_data())

    return build


def uploads(sent):
    return [Upload(client, own, 10) for client, own in enumerate(sent)]


def test_before_anybody_sent_anything_there_is_no_prototype(made):
    strategy, server = made()
    state = strategy.begin(server)
    assert strategy.payload(state, "prototypes").payload_bytes == 0
    assert state.network["embedding"].shape == (3, 2)


def test_trained_prototypes_are_nearest_to_their_own(made):
    strategy, server = made(server_epochs=300)
    state = strategy.begin(server)
    state = strategy.aggregate(state, uploads(SENT), strategy.federation.round(1), server)
    known = strategy.payload(state, "prototypes")
    assert known.classes.tolist() == [0, 1, 2]
    for own in SENT:
        apart = distances(torch.as_tensor(own.values), torch.as_tensor(known.values))
        assert apart.argmin(1).tolist() == own.classes.tolist()
    # They keep farther from each other than the clients' means do.
    means = mean_over_holders(SENT, NONE)
    gaps = [
        distances(torch.as_tensor(each.values), torch.as_tensor(each.values))[0, 1].item()
        for each in (known, means)
    ]
    assert gaps[0] > gaps[1]


def test_a_class_that_nobody_ever_sent_has_no_prototype_and_one_that_is_away_keeps_its(made):
    strategy, server = made(server_epochs=2)
    first, second = (strategy.federation.round(number) for number in (1, 2))
    state = strategy.begin(server)
    two = [prototypes({0: (1, 0), 1: (0, 1)})]
    state = strategy.aggregate(state, uploads(two), first, server)
    assert state.known.classes.tolist() == [0, 1]
    assert state.known.values.shape == (2, 2)
    state = strategy.aggregate(state, uploads([prototypes({2: (-1, 0)})]), second, server)
    assert state.known.classes.tolist() == [0, 1, 2]
    assert np.isfinite(state.known.values).all()


def test_where_nobody_sends_anything_nothing_moves(made):
    strategy, server = made()
    round = strategy.federation.round(1)
    state = strategy.begin(server)
    assert strategy.aggregate(state, [], round, server) is state
    assert strategy.aggregate(state, uploads([NONE]), round, server) is state


# -- runs --------------------------------------------------------------------------------------


def test_clients_are_judged_by_the_nearest_prototype(tiny_settings, tiny_data, simulate):
    runs = {
        judge: simulate(tiny_settings("fedtgp", options={"judge": judge}), tiny_data())
        for judge in ("prototype", "head")
    }
    assert runs["prototype"].events == []
    assert runs["prototype"].digest == runs["head"].digest
    accuracies = {
        judge: [row["accuracy"] for row in run.history.clients.values()]
        for judge, run in runs.items()
    }
    assert accuracies["prototype"] != accuracies["head"]
    assert np.mean(accuracies["prototype"]) > 0.5
