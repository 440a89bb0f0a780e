"""Every algorithm's client half through both backends: the same uploads, the same states."""

import numpy as np
import pytest
import torch
from flwr.app import RecordDict

from fedkd.exchange.values import flatten
from fedkd.training import Member, ModelPool, Streams, TrainingData, open_cohort
from sim.wire.records import read_payload, write_payload
from strategies import STRATEGIES
from strategies.contract import Call, Received, Upload

VARIANTS = {
    "dml": [
        {},
        {"average": "logit", "include_self": True},
        {"confidence_threshold": 0.4},
        {"objective": {"ce": 1.0, "kd": {"temperature": 2.0}, "ntd": 0.5}},
    ],
    "fedmd": [{}, {"digest_loss": "mse"}, {"digest_loss": "kl"}],
    "fml": [{}, {"objective": {"ce": 1.0, "hint": 0.3}}],
    "one_way": [{}, {"direction": "server_to_clients"}],
}
CASES = [
    pytest.param(name, options, id=" ".join([name, *map(str, options.values())]))
    for name in STRATEGIES
    for options in VARIANTS.get(name, [{}])
]
MODELS = {
    "mlp": {"name": "mlp", "options": {"hidden": [16]}},
    "dropout": {"name": "mlp", "options": {"hidden": [16], "dropout": 0.3}},
    "batch norm": {"name": "cnn", "options": {"channels": [4], "norm": "batch"}},
}


def travelled(payload):
    """What arrives at a client."""
    records = RecordDict()
    write_payload(records, "payload", payload)
    return read_payload(records, "payload")


def told_in(strategy, state, round, clients):
    """What each client receives; those that receive the same receive one object."""
    made = {None: None}
    told = {}
    for client in clients:
        key = strategy.receives(state, client, round)
        if key not in made:
            made[key] = travelled(strategy.payload(state, key))
        told[client] = made[key]
    return told


def cohorts_of(told):
    """As in a grid: members of a cohort all receive something, or nothing."""
    for nothing in (True, False):
        members = [client for client, piece in told.items() if (piece is None) is nothing]
        if members:
            yield members


def close(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        # A few steps of float32 with SGD; the backends only round differently.
        np.testing.assert_allclose(array, other[name], atol=2e-5, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_two_rounds_are_the_same_through_both_backends(
    name, options, model, tiny_settings, tiny_data, parts
):
    clients = {"models": [model], "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.5}}
    settings = tiny_settings(name, options=options, clients=clients)
    data = tiny_data(labelled=True)
    tensors = TrainingData.from_arrays(data, torch.device("cpu"))
    pool = ModelPool(tensors, settings.clients.optimizer)
    rounds = {}
    for backend in ("loop", "vmap"):
        strategy, server = parts(settings, data)
        state = strategy.begin(server)
        states = {}
        rounds[backend] = []
        for number in (1, 2):
            round = strategy.federation.round(number)
            told = told_in(strategy, state, round, strategy.participants(state, round))
            answers, metrics = {}, {}
            for members in cohorts_of(told):
                cohort = open_cohort(
                    [
                        Member(client, strategy.private_rows(client, data), states.get(client))
                        for client in members
                    ],
                    backend=backend,
                    model=strategy.architecture(members[0]),
                    optimizer=settings.clients.optimizer,
                    data=tensors,
                    pool=pool,
                    streams=Streams(seed=settings.seed, round=number, rounds=settings.rounds),
                )
                orders = tuple(strategy.orders(state, client, round) for client in members)
                received = Received([told[client] for client in members])
                call = Call(strategy.federation, number, orders)
                sent = strategy.client(cohort, received, call)
                answers.update(zip(members, sent, strict=False))
                states.update(zip(members, cohort.states(), strict=True))
                metrics.update(zip(members, cohort.metrics(), strict=True))
            rounds[backend].append((answers, dict(states), metrics))
            uploads = [
                Upload(client, answer, len(data.client_rows[client]))
                for client, answer in sorted(answers.items())
            ]
            state = strategy.aggregate(state, uploads, round, server)
    for by_loop, by_vmap in zip(rounds["loop"], rounds["vmap"], strict=True):
        assert [each.keys() for each in by_loop] == [each.keys() for each in by_vmap]
        for client, sent in by_loop[0].items():
            close(flatten(sent).arrays, flatten(by_vmap[0][client]).arrays)
        for client, own in by_loop[1].items():
            close(own.to_arrays(), by_vmap[1][client].to_arrays())
        for client, terms in by_loop[2].items():
            close(terms, by_vmap[2][client])
