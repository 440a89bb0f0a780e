"""KDCL across clients: the server makes one teacher of all, by labels where the rule needs them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedkd.exchange.payloads import Predictions
from fedkd.mutual.kdcl import error_correlation, kdcl_linear_shares
from strategies.contract import Upload
from strategies.mutual.kdcl import KDCLSettings

S, T, U = (
    np.array(rows, np.float32)
    for rows in (
        [[1, 2, 3, 0], [0.5, -1, 0, 2]],
        [[2, 1, 4, -1], [0, 0, 1, 3]],
        [[-4, 3, 1, 1], [2, 0, -1, 1]],
    )
)
LABELS = torch.tensor([2, 0])
ALL = torch.tensor(np.stack([S, T, U])).double()


def cross_entropy(values):
    return F.cross_entropy(torch.tensor(values).double(), LABELS).item()


# -- reference values ---------------------------------------------------------------------------


def test_naive_takes_for_each_row_the_client_that_knows_it_best(reference):
    taught = reference("kdcl", rule="naive").taught(0)
    assert (taught.scale, taught.temperature) == ("logits", 2.0)
    np.testing.assert_array_equal(taught.values, np.stack([T[0], U[1]]))


def test_minlogit_and_its_loss_match_the_reference_values(reference):
    run = reference("kdcl", rule="minlogit")
    taught = run.taught(0).values
    np.testing.assert_allclose(taught, [[-5, -3, 0, -5], [0, -2, -3, -1]], atol=1e-6)
    assert cross_entropy(taught) == pytest.approx(0.25076607, abs=1e-7)
    assert run.losses(0)["kd"] == pytest.approx(0.64889403, abs=1e-6)


def test_linear_finds_the_reference_mixture_of_each_row(reference):
    # Shares .95471905 and .04528095 of t and u in the first row, u alone in the second.
    taught = reference("kdcl", rule="linear").taught(0).values
    expected = np.stack([0.95471905 * T[0] + 0.04528095 * U[0], U[1]])
    np.testing.assert_allclose(taught, expected, atol=1e-3)


def test_linear_finds_the_reference_mixture_of_all_rows_together(reference):
    shares = kdcl_linear_shares(ALL, LABELS, per="batch")
    for row in (0, 1):
        np.testing.assert_allclose(shares[:, row], [0, 0.39645583, 0.60354417], atol=1e-4)
    taught = reference("kdcl", rule="linear", mixture="batch").taught(0).values
    assert cross_entropy(taught) == pytest.approx(0.99193528, abs=1e-5)


def test_general_weighs_clients_by_how_their_errors_go_together(reference):
    correlation = error_correlation(ALL, LABELS)
    expected = [
        [0.70723751, 0.73594933, 0.49099484],
        [0.73594933, 0.81547450, 0.35897755],
        [0.49099484, 0.35897755, 0.80989286],
    ]
    np.testing.assert_allclose(correlation, expected, atol=1e-8)
    # The paper's own weights may be negative, which is why there is a ridge.
    published = torch.linalg.solve(correlation, torch.ones(3, dtype=torch.float64))
    published /= published.sum()
    np.testing.assert_allclose(published, [-17.96635009, 14.27482983, 4.69152026], rtol=1e-5)
    # The reference adds 0.1 to the diagonal; ours is a share of its mean.
    ridge = 0.1 / correlation.diagonal().mean().item()
    taught = reference("kdcl", rule="general", ridge=ridge).taught(0).values
    weighted = 0.14076724 * S + 0.39631394 * T + 0.46291882 * U
    np.testing.assert_allclose(taught, weighted, atol=1e-6)


# -- who learns what ----------------------------------------------------------------------------


@pytest.fixture
def kdcl(tiny_settings, tiny_data, parts):
    def build(labelled=True, **options):
        settings = tiny_settings(
            "kdcl", options=options, data={"public": {"size": 20, "labelled": labelled}}
        )
        return parts(settings, tiny_data(labelled=labelled))

    return build


def test_the_mean_of_the_logits_needs_no_labels(kdcl, scores, told):
    strategy, server = kdcl(labelled=False)
    uploads = scores(strategy.federation.round(1), [0, 1, 3])
    state = strategy.aggregate(
        strategy.begin(server), uploads, strategy.federation.round(1), server
    )
    mean = np.mean([upload.payload.values for upload in uploads], axis=0)
    received = [told(strategy, state)(client) for client in range(4)]
    assert {piece.label for piece in received} == {"mean_logits"}
    for piece in received:
        np.testing.assert_allclose(piece.values, mean, atol=1e-6)


@pytest.mark.parametrize("rule", ["naive", "minlogit", "linear", "general"])
def test_a_rule_that_needs_labels_refuses_unlabelled_public_rows(kdcl, rule):
    with pytest.raises(ValueError, match=f"strategy.rule: {rule} needs the labels of public rows"):
        kdcl(labelled=False, rule=rule)


@pytest.mark.parametrize("rule", ["mean", "naive", "minlogit", "linear", "general"])
def test_who_was_alone_is_not_taught_by_itself_and_nobody_teaches_nothing(kdcl, scores, told, rule):
    strategy, server = kdcl(rule=rule)
    round, before = strategy.federation.round(1), strategy.begin(server)
    receives = told(strategy, strategy.aggregate(before, scores(round, [2]), round, server))
    assert receives(2) is None
    assert np.isfinite(receives(0).values).all()
    silent = told(strategy, strategy.aggregate(before, [], round, server))
    assert [silent(client) for client in range(4)] == [None] * 4


@pytest.mark.parametrize("rule", ["naive", "linear"])
def test_labels_of_the_rounds_rows_are_used_and_of_no_others(rule, parts, tiny_settings, tiny_data):
    settings = tiny_settings(
        "kdcl",
        options={"rule": rule},
        data={"public": {"size": 20, "labelled": True}},
        exchange={"rows_per_round": 6},
    )
    data = tiny_data(labelled=True)
    strategy, server = parts(settings, data)
    round = strategy.federation.round(2)
    # One client knows every label, one is wrong on every row.
    right = 5 * np.eye(3, dtype=np.float32)[data.public_labels[round.public_rows]]
    uploads = [
        Upload(client, Predictions(rows=round.public_rows, values=values), 8)
        for client, values in enumerate((right, -right))
    ]
    state = strategy.aggregate(strategy.begin(server), uploads, round, server)
    taught = state.shared
    assert np.array_equal(taught.rows, round.public_rows)
    assert (taught.values.argmax(-1) == data.public_labels[round.public_rows]).all()


def test_the_papers_temperature_and_weight_are_the_defaults():
    settings = KDCLSettings()
    kd = settings.terms.terms["kd"]
    assert (kd.temperature.at(0.0), kd.temperature.at(1.0), kd.weight.at(0.5)) == (2.0, 2.0, 1.0)


def test_without_its_direction_it_is_local_learning_bit_for_bit(tiny_settings, tiny_data, simulate):
    data = tiny_data()
    alone = simulate(tiny_settings("local"), data).digest
    assert simulate(tiny_settings("kdcl", options={"directions": []}), data).digest == alone
    assert simulate(tiny_settings("kdcl"), data).digest != alone
