"""ONE across clients: a gate combines all clients, and each learns from the ensemble."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedkd.mutual.native_ensemble import StreamingGate, one_losses
from strategies.mutual.one import Gated, ONESettings, among
from strategies.mutual.taught_by_peers import lesson

LOGITS = torch.tensor(
    [
        [[1, 2, 3, 0], [0.5, -1, 0, 2]],
        [[2, 1, 4, -1], [0, 0, 1, 3]],
        [[-4, 3, 1, 1], [2, 0, -1, 1]],
    ]
)
LABELS = torch.tensor([2, 0])


@pytest.fixture
def one(tiny_settings, tiny_data, parts):
    def build(labelled=True, rows=20, **options):
        settings = tiny_settings(
            "one",
            options=options,
            rounds=4,
            data={"public": {"size": 20, "labelled": labelled}},
            exchange={"rows_per_round": rows},
        )
        return parts(settings, tiny_data(labelled=labelled))

    return build


# -- reference values ---------------------------------------------------------------------------


def test_an_equal_gate_matches_the_reference_value(reference):
    run = reference("one", gate="equal", kd_weight=1.0)
    total = sum(run.losses(client)["kd"] for client in range(3))
    assert total == pytest.approx(1.55113136, abs=1e-5)


def test_shares_of_a_gate_match_the_reference_values(reference):
    shares = torch.tensor([0.5, 0.3, 0.2])
    ensemble = StreamingGate()
    for logits, share in zip(LOGITS, shares, strict=True):
        ensemble.add(logits, share.expand(2))
    run = reference("one", kd_weight=1.0)
    taught = lesson(np.arange(2), ensemble.target(), "logits", 3.0)
    total = sum(run.losses(client, taught)["kd"] for client in range(3))
    assert total == pytest.approx(1.61586671, abs=1e-5)
    # What a learned gate minimises.
    terms = one_losses(LOGITS.double(), shares.double().expand(2, 3), LABELS, kd_weight=0.0)
    assert terms["ce_ensemble"].item() == pytest.approx(1.10880922, abs=1e-7)


def test_the_weight_rises_over_80_of_300_epochs_as_published():
    weight = ONESettings().kd_weight
    for epoch, value in {0: 0.00673795, 20: 0.06005467, 40: 0.28650480, 80: 1.0}.items():
        assert weight.at(0.27 * epoch / 80) == pytest.approx(value, abs=1e-7)
    assert weight.at(0.27 * 79 / 80) == pytest.approx(0.99921906, abs=1e-7)


# -- the gate -----------------------------------------------------------------------------------


def test_a_client_that_is_surer_of_a_row_counts_more_for_it(one, scores, told):
    strategy, server = one(labelled=False)
    round = strategy.federation.round(1)
    sure, unsure = np.array([4.0, 0, 0], np.float32), np.array([0.0, 0.5, 0], np.float32)
    uploads = scores(round, {0: sure, 3: unsure})
    receives = told(strategy, strategy.aggregate(strategy.begin(server), uploads, round, server))
    shares = [F.softmax(torch.tensor(own), 0).max().item() for own in (sure, unsure)]
    expected = (shares[0] * sure + shares[1] * unsure) / sum(shares)
    for client in range(4):
        received = receives(client)
        assert (received.label, received.temperature) == ("mean_logits", 3.0)
        np.testing.assert_allclose(received.values, np.tile(expected, (20, 1)), atol=1e-6)


def test_a_learned_gate_comes_to_trust_who_knows_the_labels(one, told, scores):
    strategy, server = one(gate="learned", gate_steps=40)
    state, knows = strategy.begin(server), []
    right = 3 * np.eye(3, dtype=np.float32)[server.data.public_labels]
    for number in (1, 2, 3):
        round = strategy.federation.round(number)
        state = strategy.aggregate(state, scores(round, {0: -right, 2: right}), round, server)
        taught = torch.tensor(state.shared.values)
        knows.append(F.cross_entropy(taught, torch.tensor(server.data.public_labels)).item())
    # An equal gate would know nothing: the two cancel each other out.
    assert knows[0] < np.log(3) - 0.1
    assert knows[2] < knows[1] < knows[0]


def test_who_is_away_has_no_share_in_a_learned_gate():
    gates = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.2, 0.2]])
    torch.testing.assert_close(among(gates, [0, 2]), torch.tensor([[2 / 7, 5 / 7], [0.75, 0.25]]))


def test_the_gate_starts_from_the_runs_seed_and_stays_as_it_was_where_nobody_answers(one, same):
    strategy, server = one(gate="learned")
    state = strategy.begin(server)
    assert same(state, strategy.begin(server))
    silent = strategy.aggregate(state, [], strategy.federation.round(1), server)
    assert same(silent, state)
    assert one()[0].begin(server) == Gated()


@pytest.mark.parametrize("gate", ["confidence", "equal", "learned"])
def test_who_was_alone_is_not_taught_by_itself(one, scores, told, gate):
    strategy, server = one(gate=gate)
    round = strategy.federation.round(1)
    uploads = scores(round, [2])
    receives = told(strategy, strategy.aggregate(strategy.begin(server), uploads, round, server))
    assert receives(2) is None
    np.testing.assert_allclose(receives(0).values, uploads[0].payload.values, atol=1e-6)


def test_a_learned_gate_refuses_unlabelled_rows_and_a_single_one(one):
    with pytest.raises(ValueError, match=r"strategy.gate: learned needs the labels of public rows"):
        one(labelled=False, gate="learned")
    with pytest.raises(ValueError, match="needs at least 2 public rows in a round, got 1"):
        one(gate="learned", rows=1)


def test_without_its_direction_it_is_local_learning_bit_for_bit(tiny_settings, tiny_data, simulate):
    data = tiny_data()
    alone = simulate(tiny_settings("local"), data).digest
    for options, same in (({"directions": []}, True), ({"kd_weight": 0.0}, True), ({}, False)):
        assert (simulate(tiny_settings("one", options=options), data).digest == alone) is same
