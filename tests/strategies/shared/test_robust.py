"""One answer of what many clients say of public rows: of all of them, or of the others."""

from dataclasses import replace
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch

from fedkd.exchange.payloads import Predictions
from fedkd.mutual.averages import ensemble_target, entering, leave_one_out_targets
from fedkd.targets import (
    coordinate_median,
    filtered_mean,
    geometric_median,
    less_trusted,
    mean_by_row,
    norm_checked_mean,
    outlier_checked_mean,
    trimmed_mean,
)
from sim.contract import sections_of
from sim.contract.toy import simulate, toy_data, toy_table
from sim.settings import merge_tables, settings_from_table
from strategies import STRATEGIES
from strategies.contract import Upload
from strategies.mutual.dml import DMLSettings
from strategies.mutual.kdcl import KDCLSettings
from strategies.public_predictions.fedmd import FedMDSettings
from strategies.server_models.feddf import FedDFSettings
from strategies.shared.robust import (
    CheckedSettings,
    Consensus,
    RobustSettings,
    Rule,
    TrustingSettings,
    checked,
    values_of,
)

SHARP = {"dishonest": 0.9, "trim": 0.4, "factor": 1.0}
"""Settings with which every rule leaves out somebody of three or four clients."""

RULES = {
    "median": coordinate_median,
    "trimmed_mean": partial(trimmed_mean, trim=0.4),
    "geometric_median": geometric_median,
    "filter": partial(filtered_mean, dishonest=0.9),
    "norm_check": partial(norm_checked_mean, factor=1.0),
    "outlier_check": partial(outlier_checked_mean, factor=1.0),
}
every_rule = pytest.mark.parametrize("name", RULES)

SAID = torch.from_numpy(np.random.default_rng(0).normal(0, 2, (5, 6, 3)).astype(np.float32))
FIVE = torch.tensor(
    [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.65, 0.25, 0.1], [0.5, 0.3, 0.2], [0, 0, 1]]
)


def settings(name="mean", kind=RobustSettings, **more):
    return kind(name="any", aggregation=name, **SHARP, **more)


def gathered(said, chosen, *, scale="logits", others=False, **more):
    consensus = Consensus(chosen, scale=scale, clients=len(said), **more)
    for client, values in enumerate(said):
        consensus.add(client, values, among_others=others)
    return consensus


def test_every_rule_of_the_settings_is_tried_here():
    assert {"mean", *RULES} == {*get_args(Rule)}


@every_rule
def test_what_all_come_to_is_the_rule_over_their_tables_side_by_side(name):
    with gathered(SAID, settings(name)) as consensus:
        assert torch.equal(consensus.of_all(), RULES[name](SAID))
        assert torch.equal(consensus.pop_of_all(), RULES[name](SAID))
        assert not torch.allclose(consensus.of_all(), SAID.mean(0), atol=1e-3)


@every_rule
def test_what_the_others_come_to_is_the_rule_without_a_client(name):
    with gathered(SAID, settings(name), others=True) as consensus:
        for client in range(5):
            others = torch.cat([SAID[:client], SAID[client + 1 :]])
            assert torch.equal(consensus.of_others(client), RULES[name](others))


@pytest.mark.parametrize("average", ["probability", "logit"])
def test_a_plain_mean_one_by_one_is_that_of_peers_side_by_side(average):
    options = {"temperature": 3.0, "average": average}
    entered = [entering(own, **options) for own in SAID]
    with gathered(entered, settings(), others=True) as consensus:
        torch.testing.assert_close(consensus.of_all().float(), ensemble_target(SAID, **options))
        for client, expected in enumerate(leave_one_out_targets(SAID, **options)):
            torch.testing.assert_close(consensus.of_others(client).float(), expected)
        whole = consensus.of_all().float()
        assert torch.equal(consensus.pop_of_all(), whole)


def test_a_plain_mean_is_weighted():
    with Consensus(settings(), scale="logits") as consensus:
        consensus.add(0, np.zeros((1, 2), np.float32), 3)
        consensus.add(1, np.ones((1, 2), np.float32), 1)
        assert consensus.of_all().tolist() == [[0.25, 0.25]]


@pytest.mark.parametrize("name", ["mean", *RULES])
def test_of_probabilities_every_rule_makes_probabilities(name):
    soft = torch.softmax(3 * SAID, -1)
    with gathered(soft, settings(name), scale="probabilities", others=True) as consensus:
        for told in (consensus.of_all(), *map(consensus.of_others, range(5))):
            assert torch.allclose(told.sum(-1).double(), torch.ones(6).double(), atol=1e-6)
            assert told.min() >= 0


@pytest.mark.parametrize("name", ["mean", "median"])
def test_nobody_and_nobody_else_come_to_nothing(name):
    with gathered([], settings(name)) as consensus:
        assert consensus.clients == ()
        with pytest.raises(ValueError, match="at least 1 contribution, got 0"):
            consensus.of_all()
    with (
        gathered(SAID[:1], settings(name), others=True) as consensus,
        pytest.raises(ValueError, match="at least"),
    ):
        consensus.of_others(0)


# -- trust ---------------------------------------------------------------------------------------


def test_what_is_learnt_is_the_mean_by_trust_of_all_or_of_the_others():
    trusting = settings(kind=TrustingSettings, trust_rate=1.0)
    with gathered(FIVE[:, None], trusting, scale="probabilities") as consensus:
        told, trust = consensus.of_all(), consensus.trust
        golden = [0.20834572, 0.21789522, 0.21489329, 0.24334102, 0.11552475]
        assert np.allclose(trust, golden, atol=1e-7)
        assert np.allclose(told, [[0.53793028, 0.23376334, 0.22830638]], atol=1e-7)
        rest = torch.tensor(golden[1:])
        expected = (rest[:, None] * FIVE[1:]).sum(0) / rest.sum()
        assert torch.allclose(consensus.of_others(0)[0], expected, atol=1e-6)


def test_trust_is_measured_from_what_the_rule_says():
    trusting = settings("median", kind=TrustingSettings, trust_rate=2.0)
    soft = torch.softmax(SAID, -1)
    before = np.array([0.1, 0.2, 0.3, 0.2, 0.1, 0.1])
    consensus = Consensus(trusting, scale="probabilities", trust=before, clients=6)
    with consensus:
        for client, values in zip((0, 1, 2, 4, 5), soft, strict=True):
            consensus.add(client, values)
        told = coordinate_median(soft, scale="probabilities")
        expected = less_trusted(before[[0, 1, 2, 4, 5]], soft, told, rate=2.0)
        trust = consensus.trust
        assert np.allclose(trust[[0, 1, 2, 4, 5]], expected)
        assert trust[3] == before[3]  # who was away keeps what it had
        shares = torch.from_numpy(expected)[:, None].expand(-1, 6)
        assert torch.allclose(consensus.of_all(), mean_by_row(soft, shares))
    assert before.tolist() == [0.1, 0.2, 0.3, 0.2, 0.1, 0.1]


REMEMBERING = {
    "cfd": {"distil_epochs": 1, "server_epochs": 1},
    "codistillation": {"interval": 1},
    "cronus": {},
    "dml": {},
    "dsfl": {},
    "fccl": {},
    "fedmd": {},
    "kdcl": {},
    "one_way": {"direction": "clients_to_server"},
    "scarlet": {"cache": 1},
}


def test_these_algorithms_remember_whom_they_trust():
    having = {
        name for name, kind in STRATEGIES.items() if "trust_rate" in kind.Settings.model_fields
    }
    assert having == REMEMBERING.keys()


@pytest.mark.parametrize("name", REMEMBERING)
def test_trust_falls_over_rounds_and_only_in_those_who_are_there(
    name, tiny_settings, tiny_data, parts, scores
):
    options = {**REMEMBERING[name], "aggregation": "median", "trust_rate": 1.0}
    strategy, server = parts(tiny_settings(name, options=options), tiny_data())
    state = strategy.begin(server)
    trust = []
    for number in (1, 2):
        round = strategy.federation.round(number)
        # In the second round the last client is away.
        uploads = scores(round, range(4))[: 5 - number]
        if name in ("cfd", "cronus", "dsfl", "scarlet"):
            uploads = [softened(upload) for upload in uploads]
        state = strategy.aggregate(state, uploads, round, server)
        trust.append(state.trust)
    assert [own.sum() for own in trust] == pytest.approx([1, 1])
    assert len({*trust[0]}) == 4
    assert trust[1][3] == trust[0][3]
    assert (np.abs(trust[1][:3] / trust[0][:3] - 1) > 1e-6).all()
    after = strategy.aggregate(state, [], strategy.federation.round(3), server)
    assert np.array_equal(after.trust, trust[1])


def softened(upload):
    values = torch.softmax(torch.from_numpy(upload.payload.values), -1).numpy()
    soft = replace(upload.payload, values=values, scale="probabilities")
    return replace(upload, payload=soft)


# -- clients that speak of some rows ---------------------------------------------------------------

SENT = np.array(
    [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 1, 1, 1, 0],
        [1, 1, 1, 1, 0, 0],
    ],
    bool,
)


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "geometric_median", "filter"])
def test_a_row_is_what_the_rule_makes_of_those_who_spoke_of_it(name):
    with Consensus(settings(name), scale="logits") as consensus:
        for client, (values, sent) in enumerate(zip(SAID, SENT, strict=True)):
            consensus.add(
                client, torch.where(torch.from_numpy(sent)[:, None], values, 1e6), sent=sent
            )
        told = consensus.of_all()
        assert consensus.speakers().tolist() == [5, 4, 3, 3, 1, 0]
    for row in range(5):
        expected = RULES[name](SAID[torch.from_numpy(SENT[:, row])][:, row : row + 1])
        assert torch.equal(told[row], expected[0])
    assert told[5].tolist() == [0, 0, 0]


def test_a_check_compares_clients_by_the_rows_that_they_spoke_of():
    values = torch.tensor([[[1.0, -1]] * 3, [[1.0, -1]] * 3, [[-1.0, 1]] * 3, [[50.0, -50]] * 3])
    sent = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 1]], bool)
    with Consensus(settings("norm_check"), scale="logits") as consensus:
        for client, (own, rows) in enumerate(zip(values, sent, strict=True)):
            consensus.add(client, own, sent=rows)
        assert consensus.speakers().tolist() == [3, 2, 1]
        told = consensus.of_all()
    assert torch.allclose(told, torch.tensor([[1 / 3, -1 / 3], [0, 0], [1, -1]]), atol=1e-6)


def test_what_stands_in_rows_that_a_client_did_not_speak_of_moves_no_median():
    sent = np.array([[1, 1], [1, 1], [1, 0], [1, 0], [1, 0]], bool)
    values = torch.tensor([[1.0, -1], [1.2, -1.2], [0.8, -0.8], [1.1, -1.1], [0.9, -0.9]])
    chosen = RobustSettings(name="any", aggregation="outlier_check", factor=2.0)
    with Consensus(chosen, scale="logits") as all_kept:
        for client, own in enumerate(values):
            spoken = torch.from_numpy(sent[client])[:, None]
            all_kept.add(client, torch.where(spoken, own, 1e6), sent=sent[client])
        assert all_kept.speakers().tolist() == [5, 2]


# -- algorithms with weights of their own ----------------------------------------------------------


def predictions(values):
    rows = np.arange(len(values[0]))
    return [
        Upload(client, Predictions(rows=rows, values=np.asarray(own, np.float32)), 1)
        for client, own in enumerate(values)
    ]


@pytest.mark.parametrize("name", ["norm_check", "outlier_check"])
def test_a_check_passes_on_all_but_those_who_stand_out(name):
    uploads = predictions([[[1, 0]], [[1.1, 0]], [[0.9, 0]], [[90, 0]]])
    chosen = CheckedSettings(name="any", aggregation=name)
    assert [upload.client for upload in checked(chosen, iter(uploads), values_of)] == [0, 1, 2]
    assert list(checked(chosen, iter([]), values_of)) == []


def test_without_a_check_uploads_are_handed_on_one_by_one():
    seen = []

    def stream():
        for upload in predictions([[[1, 0]], [[90, 0]]]):
            seen.append(upload.client)
            yield upload

    first = next(checked(CheckedSettings(name="any"), stream(), values_of))
    assert (first.client, seen) == (0, [0])


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        (DMLSettings, {"peers": "ring", "aggregation": "median"}, "peers: ring does not go with"),
        (DMLSettings, {"peers": "exponential", "trust_rate": 1}, "strategy.trust_rate: 1: of a"),
        (DMLSettings, {"peers": "best-k", "trust_rate": 1}, "peers: best-k does not go with"),
        (KDCLSettings, {"rule": "naive", "aggregation": "filter"}, "use rule: mean"),
        (FedDFSettings, {"teachers": "accuracy", "aggregation": "median"}, "use teachers: equal"),
        (FedMDSettings, {"weighting": "examples", "trust_rate": 1}, "use weighting: equal"),
        (FedMDSettings, {"aggregation": "krum"}, "'filter', 'norm_check' or 'outlier_check'"),
        (FedMDSettings, {"factor": 0.5}, "greater than or equal to 1"),
    ],
)
def test_what_makes_no_sense_together_is_refused_by_name(kind, options, told):
    with pytest.raises(ValueError, match=told):
        kind(**options)


def test_who_sends_nothing_has_nothing_to_be_defended_from(tiny_settings, tiny_data, parts):
    with pytest.raises(ValueError, match="teacher_to_clients does not go with"):
        parts(tiny_settings("one_way", options={"aggregation": "median"}), tiny_data())


@pytest.mark.parametrize("name", ["fedmd", "dsfl", "cfd", "fccl", "selective_fd"])
def test_only_a_mean_can_do_with_sums(name, tiny_settings, tiny_data, parts):
    assert parts(tiny_settings(name), tiny_data())[0].sums == "equal"
    for rule in RULES:
        strategy, _ = parts(tiny_settings(name, options={"aggregation": rule}), tiny_data())
        assert strategy.sums is None
    if "trust_rate" in type(strategy.settings).model_fields:
        assert parts(tiny_settings(name, options={"trust_rate": 1.0}), tiny_data())[0].sums is None


def test_only_a_mean_of_the_others_can_do_with_their_sum(tiny_settings, tiny_data, parts):
    def one_out(**options):
        given = {"average": "logit", **options}
        return parts(tiny_settings("dml", options=given), tiny_data())[0].leaves_one_out

    assert one_out()
    assert not one_out(aggregation="median")
    assert not one_out(trust_rate=1.0)


WITH_PEERS = {"random-k": {"peers": "random-k", "k": 3}, "best-k": {"peers": "best-k", "k": 3}}


@pytest.mark.parametrize("peers", WITH_PEERS)
@every_rule
def test_of_some_peers_the_rule_is_over_those_that_are_heard(
    peers, name, tiny_settings, tiny_data, parts, scores
):
    options = {"aggregation": name, "average": "logit", **WITH_PEERS[peers], **SHARP}
    strategy, server = parts(tiny_settings("dml", options=options), tiny_data())
    round = strategy.federation.round(1)
    uploads = scores(round, range(4))
    state = strategy.aggregate(strategy.begin(server), uploads, round, server)
    key = strategy.receives(state, 0, round.next())
    heard = torch.stack([torch.from_numpy(uploads[client].payload.values) for client in key])
    assert len(heard) == 3
    assert np.array_equal(strategy.payload(state, key).values, RULES[name](heard).numpy())


# -- every algorithm -------------------------------------------------------------------------------

TAKING = {
    name: get_args(strategy.Settings.model_fields["aggregation"].annotation)
    for name, strategy in STRATEGIES.items()
    if "aggregation" in strategy.Settings.model_fields
}


def test_these_algorithms_take_rules():
    everything = {name for name, rules in TAKING.items() if rules == get_args(Rule)}
    assert everything == {
        *("cfd", "codistillation", "cronus", "dml", "dsfl", "fccl", "feddf", "fedmd", "kdcl"),
        *("one_way", "pcl", "scarlet", "selective_fd"),
    }
    assert TAKING.keys() - everything == {
        *("comet", "fedet", "fedgems", "ktpfl", "okddip", "one", "rhfl"),
    }


ON_THE_WAY = {
    "one_way": {"direction": "clients_to_server"},
    "fccl": {"pretrain_epochs": 1},
    "feddf": {"server_steps": 5},
    "fedet": {"server_steps": 5},
    "cfd": {"distil_epochs": 1, "server_epochs": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rule"), [(name, rule) for name, rules in TAKING.items() for rule in rules]
)
def test_every_algorithm_runs_with_every_rule_and_the_same_seed_gives_the_same_bits(name, rule):
    table = toy_table(name, options={**ON_THE_WAY.get(name, {}), "aggregation": rule}, rounds=2)
    chosen = settings_from_table(merge_tables(table, sections_of(STRATEGIES[name].card.needs)))
    data = toy_data(labelled=chosen.data.public.labelled)
    runs = [simulate(chosen, data) for _ in range(2)]
    assert runs[0].events == []
    assert runs[0].digest == runs[1].digest
    assert np.isfinite(runs[0].history.federation[-1]["accuracy"])
