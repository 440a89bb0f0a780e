"""Every algorithm's client half through both backends: the same uploads, the same states."""

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from strategies.knowledge import ClientUpload, Predictions, read_knowledge, write_knowledge

from fedkd.training import Member, ModelPool, Streams, TrainingData, open_cohort
from strategies import STRATEGIES

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


def stacked(received):
    """What a cohort receives: one piece for all, or everybody's own predictions together."""
    first = received[0]
    if all(piece is first for piece in received):
        return first
    return Predictions(
        kind=first.kind,
        rows=first.rows,
        values=np.stack([piece.values for piece in received]),
        temperature=first.temperature,
    )


def travelled(knowledge):
    """What arrives at a client."""
    records = RecordDict()
    write_knowledge(records, knowledge)
    return read_knowledge(records)


def numbers(knowledge):
    return {"values": knowledge.values} if isinstance(knowledge, Predictions) else knowledge.arrays


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
        broadcast = strategy.prepare(server)
        states = {}
        rounds[backend] = []
        for number in (1, 2):
            plan = strategy.federation.plan(number)
            participants = strategy.participants(plan)
            cohort = open_cohort(
                [
                    Member(client, strategy.private_rows(client, data), states.get(client))
                    for client in participants
                ],
                backend=backend,
                model=strategy.architecture(participants[0]),
                optimizer=settings.clients.optimizer,
                data=tensors,
                pool=pool,
                streams=Streams(seed=settings.seed, round=number, rounds=settings.rounds),
            )
            received = stacked([broadcast.to(client) for client in participants])
            answers = strategy.client_round(cohort, travelled(received), plan)
            states = dict(zip(participants, cohort.states(), strict=True))
            rounds[backend].append((answers, states, cohort.metrics()))
            uploads = [
                ClientUpload(client, answer, len(data.client_rows[client]))
                for client, answer in zip(participants, answers, strict=False)
            ]
            broadcast = strategy.aggregate(uploads, plan, server)
    for by_loop, by_vmap in zip(rounds["loop"], rounds["vmap"], strict=True):
        for one, other in zip(by_loop[0], by_vmap[0], strict=True):
            close(numbers(one), numbers(other))
        for client, state in by_loop[1].items():
            close(state.to_arrays(), by_vmap[1][client].to_arrays())
        for one, other in zip(by_loop[2], by_vmap[2], strict=True):
            close(one, other)
