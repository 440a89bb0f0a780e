"""PCL across clients: the ensemble and the others' mean teachers teach, each client its own."""

import numpy as np
import pytest
import torch

from fedkd.exchange.payloads import Bundle, Predictions
from fedkd.targets import entropy, soften
from fedkd.training.objectives import Batch, Outputs
from strategies.contract import Upload
from strategies.mutual.pcl import Collective, PCLSettings, taught_twice

LOGITS = {
    0: [[1, 2, 3, 0], [0.5, -1, 0, 2]],
    1: [[2, 1, 4, -1], [0, 0, 1, 3]],
    2: [[-4, 3, 1, 1], [2, 0, -1, 1]],
}
LABELS = [2, 0]


@pytest.fixture
def pcl(tiny_settings, tiny_data, parts):
    def build(**options):
        return parts(tiny_settings("pcl", options=options, rounds=4), tiny_data())

    return build


def bundle(rows, own, teacher):
    both = (np.asarray(values, np.float32) for values in (own, teacher))
    parts = ("own", "mean_teacher")
    return Bundle(
        parts={name: Predictions(rows=rows, values=v) for name, v in zip(parts, both, strict=True)}
    )


def sent(round, clients, seed=0):
    shape = len(round.public_rows), 3
    drawn = [np.random.default_rng([seed, c]).normal(0, 2, (2, *shape)) for c in clients]
    return [
        Upload(client, bundle(round.public_rows, *values), 8)
        for client, values in zip(clients, drawn, strict=True)
    ]


# -- reference values ---------------------------------------------------------------------------


def losses_of(client, reference_parts):
    """What a client minimises whose peers' mean teachers are the peers themselves, at w = 1."""
    strategy, server = reference_parts("pcl", kd_weight=1.0)
    round = strategy.federation.round(1)
    uploads = [Upload(c, bundle(round.public_rows, z, z), 8) for c, z in LOGITS.items()]
    state = strategy.aggregate(strategy.begin(server), uploads, round, server)
    taught = strategy.payload(state, strategy.receives(state, client, round.next()))
    others = torch.tensor(taught["mean_teachers"].values).double()
    own = torch.tensor(LOGITS[client], dtype=torch.float64)
    batch = Batch(
        labels=torch.tensor(LABELS),
        targets=taught["ensemble"].targets,
        tables={"mean_teachers": others},
    )
    losses = taught_twice(
        Outputs(private=own, public=own), batch, temperature=3.0, ce_weight=1.0, kd_weight=1.0
    )
    found = {name: float(loss.mean()) for name, loss in losses.items()}
    # The reference takes the mean of the divergences from each mean teacher, here it is the
    # divergence from their mean: the difference does not depend on the client's own predictions.
    peers = torch.tensor([z for c, z in LOGITS.items() if c != client], dtype=torch.float64)
    each = soften(peers, temperature=3.0)
    apart = entropy(others).mean() - torch.stack([entropy(t) for t in each]).mean()
    found["kd_mean_teachers"] += 9 * float(apart)
    return found


def test_the_losses_match_the_reference_values(reference_parts):
    first = losses_of(0, reference_parts)
    assert first["ce"] == pytest.approx(1.14126964, abs=1e-6)
    assert sum(first.values()) == pytest.approx(1.98470124, abs=1e-5)
    every = [first, *(losses_of(client, reference_parts) for client in (1, 2))]
    totals = {name: sum(losses[name] for losses in every) for name in first}
    assert totals == pytest.approx(
        {"ce": 4.17475206, "kd_ensemble": 1.55113136, "kd_mean_teachers": 4.49256224}, abs=1e-5
    )


def test_published_fault_the_weight_does_not_stay_at_almost_nothing():
    # Published fault 29: a port divides the ramp by another number, weights are ~0 from epoch 3 on.
    ramp = PCLSettings().kd_weight
    assert [ramp.at(share) for share in (0.0, 0.27, 0.5, 1.0)] == pytest.approx(
        [0.00673795, 1, 1, 1], abs=1e-7
    )


# -- the mean teacher ---------------------------------------------------------------------------


def test_a_client_keeps_a_running_mean_of_its_own_weights(tiny_settings, tiny_data, simulate):
    # Shares of the past are 0, 1/2, 2/3, 3/4, 4/5: the plain mean of all steps so far.
    def run(steps):
        alone, clients = {"kd_weight": 0.0}, {"local": {"steps": 1}}
        settings = tiny_settings("pcl", options=alone, clients=clients, rounds=steps)
        return simulate(settings, tiny_data())

    runs = [run(steps) for steps in (1, 2, 3, 4, 5)]
    for client in range(4):
        steps = [run.states[client].models["model"].weights for run in runs]
        mean = {name: np.mean([own[name] for own in steps], axis=0) for name in steps[0]}
        kept = averages_of(runs[-1].states[client])
        assert kept.keys() == mean.keys()
        for name, values in mean.items():
            np.testing.assert_allclose(kept[name], values, atol=1e-6)


def averages_of(state):
    arrays = state.to_arrays()
    head = "average/mean_teacher/model/weights/"
    return {name.split(head)[1]: values for name, values in arrays.items() if head in name}


# -- what the server makes of it ----------------------------------------------------------------


def test_a_client_gets_the_ensemble_of_all_and_the_mean_teachers_of_the_others(pcl, told):
    strategy, server = pcl()
    round = strategy.federation.round(1)
    uploads = sent(round, [0, 1, 3])
    receives = told(strategy, strategy.aggregate(strategy.begin(server), uploads, round, server))
    mean = np.mean([u.payload["own"].values for u in uploads], axis=0)
    soft = {
        u.client: soften(torch.tensor(u.payload["mean_teacher"].values), temperature=3.0).numpy()
        for u in uploads
    }
    for client, peers in {0: (1, 3), 1: (0, 3), 3: (0, 1), 2: (0, 1, 3)}.items():
        piece = receives(client)
        assert piece["ensemble"].label == "mean_logits"
        np.testing.assert_allclose(piece["ensemble"].values, mean, atol=1e-6)
        expected = np.mean([soft[peer] for peer in peers], axis=0)
        np.testing.assert_allclose(piece["mean_teachers"].values, expected, atol=1e-6)


def test_who_was_alone_has_no_other_and_nobody_teaches_nothing(pcl, told):
    strategy, server = pcl()
    round, before = strategy.federation.round(1), strategy.begin(server)
    receives = told(strategy, strategy.aggregate(before, sent(round, [2]), round, server))
    assert receives(2) is None
    assert receives(0) is not None
    assert strategy.aggregate(before, [], round, server) == Collective()


def test_two_models_predict_and_both_tables_cost_bytes(tiny_settings, tiny_data, simulate):
    run = simulate(tiny_settings("pcl", rounds=2), tiny_data())
    up = {row["bytes"] for row in run.exchange if row["direction"] == "up"}
    down = {row["bytes"] for row in run.exchange if row["direction"] == "down"}
    assert up == down == {2 * 20 * 3 * 4}


def test_without_its_direction_it_is_local_learning_bit_for_bit(tiny_settings, tiny_data, simulate):
    data = tiny_data()
    alone = simulate(tiny_settings("local"), data).digest
    for options, same in (({"directions": []}, True), ({"kd_weight": 0.0}, True), ({}, False)):
        assert (simulate(tiny_settings("pcl", options=options), data).digest == alone) is same
