"""ProxyFL: proxies go round on an exponential graph and take the place of the receiver's own."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedkd.exchange.payloads import Weights
from fedkd.models import ModelSettings
from fedkd.training import Batch, Outputs, Passes
from fedkd.training.binding import BoundLearners
from strategies.contract import Call, Federation, Received, ServerTools, Upload
from strategies.two_models.pairs import PRIVATE
from strategies.two_models.proxyfl import PROXY, Mail, ProxyFL, ProxyFLSettings, next_peer

MLPS = {"models": [{"name": "mlp", "options": {"hidden": [8]}}]}
NO_TOOLS = object.__new__(ServerTools)


def federation(clients=4):
    return Federation(
        seed=0,
        rounds=3,
        participation=1.0,
        models=(ModelSettings(name="mlp"),) * clients,
        local=Passes(batch_size=8),
        public_size=0,
        rows_per_round=0,
        public_labelled=False,
        num_classes=4,
        input_shape=(1, 8, 8),
        num_examples=(5,) * clients,
    )


def proxy(number):
    return Weights(arrays={"w": np.full(2, number, np.float32)})


def sent(*clients):
    return [Upload(client, proxy(client), 5) for client in clients]


# -- who hears whom ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clients", "round", "peers"),
    [
        (2, 1, [1, 0]),
        (2, 2, [1, 0]),
        (4, 1, [1, 2, 3, 0]),
        (4, 2, [2, 3, 0, 1]),
        (4, 3, [1, 2, 3, 0]),
        (5, 1, [1, 2, 3, 4, 0]),
        (5, 2, [2, 3, 4, 0, 1]),
        (5, 3, [4, 0, 1, 2, 3]),
        (8, 3, [4, 5, 6, 7, 0, 1, 2, 3]),
        (8, 4, [1, 2, 3, 4, 5, 6, 7, 0]),
    ],
)
def test_a_proxy_goes_one_two_four_clients_further(clients, round, peers):
    assert [next_peer(client, round, clients) for client in range(clients)] == peers


@given(clients=st.integers(2, 40), round=st.integers(1, 30))
def test_everybody_sends_to_one_other_and_hears_from_one(clients, round):
    peers = [next_peer(client, round, clients) for client in range(clients)]
    assert sorted(peers) == list(range(clients))
    assert all(peer != client for client, peer in enumerate(peers))


@given(clients=st.integers(2, 40))
def test_in_a_few_rounds_everybody_has_heard_from_everybody(clients):
    heard = [{client} for client in range(clients)]
    for round in range(1, (clients - 1).bit_length() + 1):
        passed_on = [set(own) for own in heard]
        for client in range(clients):
            passed_on[next_peer(client, round, clients)] |= heard[client]
        heard = passed_on
    assert all(len(own) == clients for own in heard)


# -- the server --------------------------------------------------------------------------------


def numbers(mail):
    return {client: int(proxy.arrays["w"][0]) for client, proxy in mail.proxies.items()}


def test_the_server_passes_each_proxy_on_to_the_next_peer():
    strategy = ProxyFL(ProxyFLSettings(), federation())
    mail = strategy.aggregate(Mail(), sent(0, 1, 2, 3), strategy.federation.round(2), NO_TOOLS)
    assert numbers(mail) == {0: 2, 1: 3, 2: 0, 3: 1}
    assert strategy.payload(mail, strategy.receives(mail, 3, strategy.federation.round(3)))


def test_a_client_whose_peer_was_away_receives_nothing():
    strategy = ProxyFL(ProxyFLSettings(), federation())
    mail = strategy.aggregate(Mail(), sent(1, 2), strategy.federation.round(1), NO_TOOLS)
    assert numbers(mail) == {2: 1, 3: 2}
    assert strategy.receives(mail, 0, strategy.federation.round(2)) is None


def test_mail_waits_for_who_was_away_until_newer_comes():
    strategy = ProxyFL(ProxyFLSettings(), federation())
    round = strategy.federation.round
    mail = strategy.aggregate(Mail(), sent(0, 1), round(1), NO_TOOLS)
    assert numbers(mail) == {1: 0, 2: 1}
    # Client 1 answers, so it has fetched its mail; client 2 is still away.
    mail = strategy.aggregate(mail, sent(1), round(2), NO_TOOLS)
    assert numbers(mail) == {2: 1, 3: 1}
    mail = strategy.aggregate(mail, sent(1, 2), round(3), NO_TOOLS)
    assert numbers(mail) == {2: 1, 3: 2}


def test_a_client_alone_keeps_its_own():
    strategy = ProxyFL(ProxyFLSettings(), federation(clients=1))
    mail = strategy.aggregate(Mail(), sent(0), strategy.federation.round(1), NO_TOOLS)
    assert numbers(mail) == {}


# -- the client --------------------------------------------------------------------------------


def test_both_models_pay_half_for_labels_and_half_for_the_other():
    # The private model says s, the proxy t; 0.5 CE + 0.5 KL(other || own) for both.
    private = torch.tensor([[1.0, 2, 3, 0], [0.5, -1, 0, 2]])
    other = torch.tensor([[2.0, 1, 4, -1], [0, 0, 1, 3]])
    strategy = ProxyFL(ProxyFLSettings(), federation())
    composed = strategy.composed()
    modules = {name: nn.Sequential(nn.Flatten(), nn.Linear(4, 4)) for name in (PRIVATE, PROXY)}
    bound = BoundLearners(composed, modules, torch.zeros(2, 1, 2, 2), num_classes=4, rows=2)
    outputs = {PRIVATE: Outputs(private=private), PROXY: Outputs(private=other)}
    losses = bound.losses(composed, outputs, Batch(labels=torch.tensor([2, 0])))
    mine = sum(float(loss.mean()) for name, loss in losses.items() if "/" not in name)
    its = sum(float(loss.mean()) for name, loss in losses.items() if "/" in name)
    assert mine == pytest.approx(0.63080982, abs=1e-6)
    assert its == pytest.approx(0.94150915, abs=1e-6)


@pytest.mark.parametrize("vectorize", ["loop", "vmap"])
def test_a_peers_proxy_replaces_ones_own_and_without_one_it_stays(
    vectorize, tiny_settings, tiny_data
):
    from sim.engine.runtime import ClientRuntime
    from sim.wire.messages import CohortCall

    settings = tiny_settings(
        "proxyfl", options={"proxy": MLPS["models"][0]}, clients={**MLPS, "local": {"epochs": 0}}
    )
    runtime = ClientRuntime(settings, tiny_data())
    own = [runtime.initial_state(client).models[PROXY].weights for client in range(3)]
    sets = [None, Weights(arrays=own[0]), None]
    groups = [(0, 1, 2)] if vectorize == "vmap" else [(0,), (1,), (2,)]
    sent = []
    for group in groups:
        cohort = runtime._cohort(CohortCall("train", 2, group, vectorize), [None] * len(group))
        received = Received([sets[client] for client in group])
        sent += runtime._strategy.client(cohort, received, Call(runtime._federation, 2))
    for answer, expected in zip(sent, (own[0], own[0], own[2]), strict=True):
        for name, array in expected.items():
            assert np.array_equal(answer.arrays[name], array)


# -- the whole ---------------------------------------------------------------------------------


def test_a_private_model_never_travels(tiny_settings, tiny_data, simulate):
    run = simulate(tiny_settings("proxyfl", options={"proxy": "cnn"}), tiny_data())
    assert {row["kind"] for row in run.exchange} == {"weights"}
    assert len({row["bytes"] for row in run.exchange}) == 1
    down = [row for row in run.exchange if row["direction"] == "down"]
    assert {row["round"] for row in down} == {2, 3}


@pytest.mark.parametrize("participants", [2, 4])
def test_a_loop_and_a_stack_learn_alike(participants, tiny_settings, tiny_data, simulate):
    clients = {**MLPS, "participants": participants}
    loop, stack = (
        simulate(
            tiny_settings(
                "proxyfl",
                options={"proxy": MLPS["models"][0]},
                clients=clients,
                rounds=4,
                engine={"backend": "inline", "vectorize": how},
            ),
            tiny_data(),
        )
        for how in ("loop", "vmap")
    )
    for one, other in zip(loop.states, stack.states, strict=True):
        for model in (PRIVATE, PROXY):
            for name, weights in one.models[model].weights.items():
                assert np.allclose(weights, other.models[model].weights[name], atol=1e-5)
