"""FedMD: digest, revisit, communicate, in this order; the consensus is a mean of logits."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedkd.exchange.payloads import Predictions
from fedkd.models import build_model
from fedkd.targets import Targets, coordinate_median, trimmed_mean
from fedkd.training import Batch, Outputs, Passes, supervised, supervised_public
from strategies.public_predictions.fedmd import TRANSFERRED, FedMDSettings
from strategies.shared.lessons import Lesson


@pytest.fixture
def fedmd(tiny_settings, tiny_data, parts):
    """Make (strategy, server) with some options."""

    def build(labelled=False, **options):
        return parts(tiny_settings("fedmd", options=options), tiny_data(labelled=labelled))

    return build


def consensus(round, value=0.5):
    rows = round.public_rows
    values = np.full((len(rows), 3), value, np.float32)
    return Predictions(rows=rows, values=values, averaged=True)


def agreed(strategy, uploads, round, server):
    """Return what a round's uploads come to; everybody receives it."""
    state = strategy.aggregate(Lesson(), uploads, round, server)
    assert {strategy.receives(state, client, round.next()) for client in range(4)} == {"lesson"}
    return strategy.payload(state, "lesson")


def test_a_round_digests_then_revisits_then_communicates(spy, fedmd, learn):
    strategy, _ = fedmd(digest_epochs=2)
    cohort, round = spy((0, 2)), strategy.federation.round(2)
    received = consensus(round)
    answers = learn(strategy, cohort, received, 2)

    assert cohort.order == ["fit", "fit", "predict_public"]
    digest, revisit = cohort.fits
    assert digest["private"] is None
    assert digest["public"].targets.values is received.values
    assert digest["public"].rows is received.rows
    assert digest["public"].passes == Passes(batch_size=8, epochs=2)
    assert revisit == {"objective": supervised, "private": round.local, "public": None}
    assert np.array_equal(cohort.asked[-1][1]["rows"], round.public_rows)
    assert [answer.label for answer in answers] == ["logits", "logits"]


def test_a_round_without_consensus_only_revisits(spy, fedmd, learn):
    strategy, _ = fedmd()
    cohort = spy()
    learn(strategy, cohort, None, 2)
    assert cohort.order == ["fit", "predict_public"]
    assert cohort.fits[0]["objective"] is supervised


def beginning(cohort, begun=()):
    """Give a spy the memory of whether its members have begun."""
    memory = {(TRANSFERRED, client): np.ones(1, np.int8) for client in begun}
    cohort.kept = lambda name: [memory.get((name, client)) for client in cohort.clients]
    cohort.keep = lambda name, values: memory.update(
        {(name, client): value for client, value in zip(cohort.clients, values, strict=True)}
    )
    return memory


def test_the_phases_are_public_labels_then_private_ones_then_the_round(spy, fedmd, learn):
    """Published fault: a baseline that revisits first and never learns on the public set."""
    strategy, _ = fedmd(labelled=True, transfer_epochs=4, private_transfer_epochs=3)
    cohort = spy((0, 1))
    memory = beginning(cohort)
    learn(strategy, cohort, consensus(strategy.federation.round(2)), 2)
    public, private, digest, revisit = cohort.fits
    assert public["objective"] is supervised_public
    assert public["private"] is None
    assert public["public"].targets is None
    assert public["public"].passes == Passes(batch_size=8, epochs=4)
    # All public rows, whatever classes a client holds.
    assert [rows.tolist() for rows in public["public"].rows] == [list(range(20))] * 2
    assert private["objective"] is supervised
    assert private["private"] == [Passes(batch_size=8, epochs=3)] * 2
    assert digest["public"].targets is not None
    assert revisit["objective"] is supervised
    assert len(memory) == 2


def test_only_who_is_new_begins_whoever_trains_beside_it(spy, fedmd, learn):
    strategy, _ = fedmd(labelled=True, private_transfer_epochs=3)
    cohort = spy((0, 1))
    beginning(cohort, begun=[0])
    learn(strategy, cohort, None, 3)
    public, private, _ = cohort.fits
    assert [len(rows) for rows in public["public"].rows] == [0, 20]
    assert [passes.epochs for passes in private["private"]] == [0, 3]


def test_a_late_joiner_begins_on_the_public_set(tiny_settings, tiny_data, simulate):
    settings = tiny_settings(
        "fedmd",
        options={"transfer_epochs": 1},
        data={"public": {"size": 20, "labelled": True}},
        clients={"participants": 2},
        rounds=4,
    )
    run = simulate(settings, tiny_data(labelled=True))
    took_part = {row["client"] for row in run.exchange if row["direction"] == "up"}
    assert len(took_part) > 2
    begun = {client for client, own in enumerate(run.states) if TRANSFERRED in own.arrays}
    assert begun == took_part


def test_public_rows_teach_classes_that_a_client_does_not_have(tiny_settings, tiny_data, simulate):
    # Client 0 holds one class; without the others' rows it could name no other.
    data = tiny_data(labelled=True)
    own = data.client_rows[0]
    one_class = own[data.train_labels[own] == data.train_labels[own][0]]
    data = replace(data, client_rows=(one_class, *data.client_rows[1:]))

    def named(epochs):
        settings = tiny_settings(
            "fedmd",
            options={"transfer_epochs": epochs, "digest_epochs": 0},
            data={"public": {"size": 20, "labelled": True}},
            clients={"local": {"epochs": 0}},
            rounds=1,
        )
        return simulate(settings, data).history.clients[0]["accuracy"]

    assert named(60) > named(0) + 0.2


def test_public_rows_may_be_of_classes_that_nobody_holds(tiny_settings, tiny_data, simulate):
    # The paper's setting: what is learnt there has outputs of its own, behind the private classes.
    data = tiny_data(labelled=True)
    private = data.num_classes
    data = replace(
        data,
        class_names=(*data.class_names, *(f"public {name}" for name in data.class_names)),
        public_labels=data.public_labels + private,
        other_classes=private,
    )
    settings = tiny_settings(
        "fedmd",
        options={"transfer_epochs": 60, "digest_epochs": 0},
        data={"public": {"size": 20, "labelled": True, "source": "digits"}},
        clients={"models": ["mlp"], "local": {"epochs": 0}},
        rounds=1,
    )
    run = simulate(settings, data)
    (model,) = settings.clients.models
    network = build_model(model, input_shape=data.input_shape, num_classes=data.num_classes, seed=0)
    weights = run.states[0].models["model"].weights
    network.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    named = network(torch.from_numpy(data.public_inputs)).argmax(-1).numpy()
    assert (named == data.public_labels).mean() > 0.9


def test_algorithms_that_need_public_labels_refuse_other_classes(tiny_settings, tiny_data, parts):
    data = tiny_data(labelled=True)
    data = replace(data, class_names=(*data.class_names, "x"), other_classes=1)
    message = "has 1 that are none of these: name another, or use"
    for name, options in (
        ("fedgems", {}),
        ("kdcl", {"rule": "linear"}),
        ("one", {"gate": "learned"}),
    ):
        with pytest.raises(ValueError, match=f"strategy.*{message}"):
            parts(tiny_settings(name, options=options), data)
    parts(tiny_settings("fedmd"), data)


def test_a_direction_that_is_off_leaves_labels_alone(spy, fedmd, learn):
    strategy, _ = fedmd(labelled=True, directions=[])
    cohort = spy()
    learn(strategy, cohort, consensus(strategy.federation.round(2)), 2)
    assert strategy.learns_alone
    assert [fit["objective"] for fit in cohort.fits] == [supervised]


@pytest.mark.parametrize(("labelled", "epochs"), [(False, 4), (True, 0)])
def test_transfer_learning_needs_labels_and_epochs(spy, fedmd, learn, labelled, epochs):
    strategy, _ = fedmd(labelled=labelled, transfer_epochs=epochs)
    cohort = spy()
    learn(strategy, cohort, None)
    assert [fit["objective"] for fit in cohort.fits] == [supervised]


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("equal", (1 + 2 + 6) / 3),
        # Clients 0, 1 and 3 hold 12, 13 and 17 rows.
        ("examples", (12 * 1 + 13 * 2 + 17 * 6) / (12 + 13 + 17)),
    ],
)
def test_consensus_is_the_mean_of_the_logits(fedmd, scores, weighting, expected):
    strategy, server = fedmd(weighting=weighting)
    round = strategy.federation.round(1)
    shape = np.arange(60, dtype=np.float32).reshape(20, 3)
    uploads = scores(round, {0: shape, 1: 2 * shape, 3: 6 * shape})
    shared = agreed(strategy, uploads, round, server)
    assert (shared.label, shared.values.dtype) == ("mean_logits", np.float32)
    assert np.array_equal(shared.rows, round.public_rows)
    np.testing.assert_allclose(shared.values, expected * shape, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"aggregation": "median"}, 2.5),
        ({"aggregation": "trimmed_mean", "trim": 0.25}, 2.5),
        ({"aggregation": "trimmed_mean", "trim": 0.24}, (1 + 2 + 3 + 600) / 4),
        ({"aggregation": "mean"}, (1 + 2 + 3 + 600) / 4),
    ],
)
def test_a_robust_consensus_withstands_a_client_that_lies(fedmd, scores, options, expected):
    strategy, server = fedmd(**options)
    round = strategy.federation.round(1)
    uploads = scores(round, dict(enumerate((1.0, 2.0, 3.0, 600.0))))
    shared = agreed(strategy, uploads, round, server)
    assert (shared.label, shared.values.dtype) == ("mean_logits", np.float32)
    assert np.array_equal(shared.rows, round.public_rows)
    np.testing.assert_allclose(shared.values, expected, rtol=1e-6)


@pytest.mark.parametrize("aggregation", ["mean", "median", "trimmed_mean"])
def test_consensus_has_the_bits_of_the_rule_over_the_stacked_uploads(fedmd, scores, aggregation):
    strategy, server = fedmd(
        aggregation=aggregation, **({"trim": 0.25} if aggregation == "trimmed_mean" else {})
    )
    round = strategy.federation.round(1)
    uploads = scores(round, range(4))
    stacked = torch.from_numpy(np.stack([upload.payload.values for upload in uploads]))
    expected = {
        "mean": stacked.double().sum(0) / 4,
        "median": coordinate_median(stacked),
        "trimmed_mean": trimmed_mean(stacked, trim=0.25),
    }[aggregation].float()
    shared = agreed(strategy, iter(uploads), round, server)
    assert np.array_equal(shared.values, expected.numpy())


@pytest.mark.parametrize("aggregation", ["median", "trimmed_mean"])
def test_a_robust_consensus_of_nobody_is_none(fedmd, aggregation):
    strategy, server = fedmd(aggregation=aggregation)
    assert strategy.aggregate(Lesson(), [], strategy.federation.round(1), server) == Lesson()


@pytest.mark.parametrize("aggregation", ["median", "trimmed_mean"])
def test_robust_rules_have_no_weights(fedmd, aggregation):
    expected = f"weighting: examples does not go with strategy.aggregation: {aggregation}"
    with pytest.raises(ValueError, match=expected):
        fedmd(aggregation=aggregation, weighting="examples")


def test_consensus_of_nobody_is_none(fedmd):
    strategy, server = fedmd()
    state = strategy.begin(server)
    assert state == Lesson()
    assert strategy.receives(state, 0, strategy.federation.round(1)) is None
    taught = Lesson(consensus(strategy.federation.round(1)))
    assert strategy.aggregate(taught, [], strategy.federation.round(1), server) == Lesson()


STUDENT = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 4.0]])
CONSENSUS = torch.tensor([[1.0, 0.0, 6.0], [1.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("l1", (0 + 2 + 3 + 1 + 0 + 4) / 6),
        ("mse", (0 + 4 + 9 + 1 + 0 + 16) / 6),
        (
            "kl",
            F.kl_div(
                F.log_softmax(STUDENT, -1),
                F.log_softmax(CONSENSUS, -1),
                reduction="batchmean",
                log_target=True,
            ).item(),
        ),
    ],
)
def test_digest_losses_by_hand(spy, fedmd, learn, name, expected):
    strategy, _ = fedmd(digest_loss=name)
    cohort = spy()
    learn(strategy, cohort, consensus(strategy.federation.round(2)), 2)
    objective = cohort.fits[0]["objective"]
    losses = objective(Outputs(public=STUDENT), Batch(targets=Targets(CONSENSUS)))
    assert list(losses) == ["digest"]
    assert losses["digest"].mean().item() == pytest.approx(expected, rel=1e-6)


def test_l1_is_the_default_digest():
    assert FedMDSettings().digest_loss == "l1"


def test_digesting_brings_a_client_nearer_to_the_consensus(
    tiny_settings, tiny_data, simulate, listening_grid
):
    # With no private training in between, peers agree more after digesting.
    settings = tiny_settings(
        "fedmd",
        options={"digest_epochs": 5},
        clients={"local": {"epochs": 0}},
        rounds=4,
    )
    data = tiny_data()
    run = simulate(settings, data, listening_grid(settings, data))
    disagreement = [row["peer_disagreement"] for row in run.history.federation]
    assert disagreement[-1] < disagreement[0]
