"""Online distillation: what each method makes of its peers, and what it must not touch."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from fedkd.distillation.methods import METHODS
from fedkd.distillation.methods.online import (
    BranchedNetwork,
    CodistillationSettings,
    KDCLSettings,
    OKDDipSettings,
    PCLSettings,
    _Collaborators,
    _DiversePeers,
    _PeersWithMeans,
    _StaleReaders,
)
from fedkd.distillation.peers import (
    Exchange,
    GroupStep,
    InForce,
    build_peers,
    fit_group,
    peer_names,
)
from fedkd.models import ModelSettings
from fedkd.mutual.stale import StalePeers

FAST = {"name": "adam", "lr": 0.01}
BATCH_NORM = ModelSettings(name="cnn", options={"channels": [4], "norm": "batch"})
DEEP = ModelSettings(name="mlp", options={"hidden": [8, 6]})


def weights_of(model):
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


def run(shop, name, **settings):
    method = METHODS[name]
    return method(method.Settings(name=name, **settings)).run(shop)


def apart(first, second, inputs):
    """Return how far two models' predictions are from each other."""
    with torch.no_grad():
        return (first(inputs).softmax(-1) - second(inputs).softmax(-1)).abs().mean()


# --- ONE


def test_the_student_of_one_is_a_plain_model_on_the_shared_trunk(workshop):
    shop = workshop(model=DEEP)
    left = run(shop, "one", branches=3)
    network = left.others["ensemble"].network
    assert left.student.state_dict().keys() == shop.new_student().state_dict().keys()
    trunk = {tensor.data_ptr() for tensor in network.trunk.parameters()}
    branch = {tensor.data_ptr() for tensor in network.branches[0].parameters()}
    assert {tensor.data_ptr() for tensor in left.student.parameters()} == trunk | branch
    assert not torch.equal(weights_of(network.branches[1]), weights_of(network.branches[2]))


def test_branches_come_closer_to_their_ensemble_than_without_it(workshop, hard_rows):
    distances = []
    for weight in (0, 5):
        shop = workshop(rows=hard_rows(), model=DEEP, epochs=20, optimizer=FAST)
        left = run(shop, "one", split="3", kd_weight=weight)
        distances.append(apart(left.student, left.others["ensemble"], shop.rows.inputs))
    assert distances[1] < 0.6 * distances[0]


def test_labels_alone_teach_the_gate(workshop):
    shop = workshop(epochs=5, optimizer=FAST)
    untrained = run(workshop(epochs=0), "one").others["ensemble"].network.gate
    for weight in (0, 1):
        gate = run(shop, "one", kd_weight=weight).others["ensemble"].network.gate
        assert not torch.allclose(gate.linear.weight, untrained.linear.weight, atol=1e-3)


@pytest.mark.parametrize(("split", "layers"), [(None, 1), ("3", 3), ("1", 5)])
def test_the_split_decides_what_branches_share(workshop, split, layers):
    # hidden [8, 6]: flatten, linear, relu, linear, relu, linear
    shop = workshop(model=DEEP)
    network = BranchedNetwork(build_peers(shop, 2), split, shop.rows.inputs[:2])
    assert [len(branch) for branch in network.branches] == [layers, layers]


def test_a_dry_run_does_not_move_batch_norm(workshop):
    shop = workshop(model=BATCH_NORM)
    students = build_peers(shop, 2)
    before = weights_of(students[0])
    BranchedNetwork(students, None, shop.rows.inputs[:2])
    assert torch.equal(weights_of(students[0]), before)


def test_a_split_that_cannot_be_made_is_refused(workshop):
    with pytest.raises(ValueError, match=r"method.split must be a child of .* got 'tail'"):
        run(workshop(), "one", split="tail")
    with pytest.raises(ValueError, match=r"chain of layers .* got ResNet"):
        run(workshop(model=ModelSettings(name="resnet8")), "one")


# --- KDCL


@pytest.mark.parametrize("rule", ["general", "naive", "linear", "minlogit"])
def test_every_rule_brings_the_peers_together(workshop, hard_rows, rule):
    distances = []
    for weight in (0, 5):
        shop = workshop(rows=hard_rows(), epochs=15, optimizer=FAST)
        left = run(shop, "kdcl", rule=rule, kd_weight=weight)
        inputs = shop.rows.inputs[: shop.rows.labelled if rule != "general" else None]
        distances.append(apart(left.student, left.others["peer 2"], inputs))
    assert distances[1] < 0.8 * distances[0]


@pytest.mark.parametrize("rule", ["naive", "linear", "minlogit"])
def test_a_rule_that_needs_labels_never_looks_at_other_rows(workshop, toy_rows, rule):
    rows = toy_rows()
    rows.inputs[rows.labelled :] = math.nan
    shop = workshop(rows=rows)
    settings = KDCLSettings(rule=rule)
    group = _Collaborators(shop, settings, build_peers(shop, 2), peer_names(2))
    fit_group(group)
    assert all(weights_of(model).isfinite().all() for model in group.models)


def test_the_general_rule_gives_the_better_peer_more_weight(workshop, hard_rows):
    shop = workshop(rows=hard_rows(), epochs=0)
    peers = build_peers(shop, 2)
    group = _Collaborators(shop, KDCLSettings(), peers, peer_names(2))
    labels = shop.rows.validation_labels

    class Knows(nn.Module):
        def forward(self, inputs):
            return 4.0 * nn.functional.one_hot(labels, 3).float()

    group.models[1] = Knows()
    group.before_epoch()
    assert group.shares.sum().item() == pytest.approx(1)
    assert group.shares[1] > 0.9


def test_peers_learn_from_those_that_have_the_weight(workshop):
    shop = workshop()
    group = _Collaborators(shop, KDCLSettings(), build_peers(shop, 2), peer_names(2))
    group.shares = torch.tensor([0.0, 1.0], dtype=torch.float64)
    logits = torch.randn(2, 5, 3).requires_grad_()
    exchange = Exchange(logits, {}, (), torch.arange(5), ())
    loss = group.losses(GroupStep(InForce(1.0, 1.0), 0.5, (), {}, exchange))["kd"]
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[0].abs().max() > 1e-3
    assert gradient[1].abs().max() < 1e-6


def test_one_collaborator_is_plain_training(workshop):
    shop = workshop()
    left = run(shop, "kdcl", peers=1)
    assert left.others == {}
    shop.fit(
        twin := shop.new_student(), name="twin", teacher=None, objective=_labels(shop.objective)
    )
    assert torch.equal(weights_of(left.student), weights_of(twin))


def _labels(objective):
    return type(objective).model_validate({"ce": 1})


# --- OKDDip


def test_the_leader_follows_the_mean_of_its_peers(workshop, hard_rows):
    distances = []
    for weight in (0, 5):
        shop = workshop(rows=hard_rows(), epochs=20, optimizer=FAST)
        left = run(shop, "okddip", kd_weight=weight)
        peers = type(left.others["ensemble"])([left.others[f"peer {k}"] for k in (1, 2, 3)])
        distances.append(apart(left.student, peers, shop.rows.inputs))
    assert distances[1] < 0.7 * distances[0]


@pytest.mark.parametrize("learned", [True, False])
def test_attention_learns_unless_it_is_told_not_to(workshop, learned):
    shop = workshop(optimizer=FAST)
    settings = OKDDipSettings(learned_attention=learned, kd_weight=1)
    names = ["student", "peer 1", "peer 2", "peer 3"]
    group = _DiversePeers(shop, settings, build_peers(shop, 4), names)
    before = weights_of(group.attention)
    fit_group(group)
    assert torch.equal(before, weights_of(group.attention)) != learned
    shares = [row["targets/attention_to_itself"] for row in shop.histories["student"].epochs]
    assert all(0 < share < 1 for share in shares)


def test_peers_learn_nothing_from_their_leader(workshop):
    # The leader's weights are scrambled; its peers end with the same bits.
    ends = []
    for factor in (1.0, -3.0):
        shop = workshop()
        models = build_peers(shop, 3)
        with torch.no_grad():
            for parameter in models[0].parameters():
                parameter.mul_(factor)
        names = ["student", "peer 1", "peer 2"]
        group = _DiversePeers(shop, OKDDipSettings(peers=2, kd_weight=1), models, names)
        fit_group(group)
        ends.append([weights_of(model) for model in group.models])
    assert not torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])
    assert torch.equal(ends[0][2], ends[1][2])


# --- PCL


def test_without_memory_the_running_mean_is_the_peer_itself(workshop):
    shop = workshop(model=BATCH_NORM)
    for decay, same in ((0.0, True), (0.9, False)):
        group = _PeersWithMeans(
            shop, PCLSettings(decay=decay), build_peers(shop, 2), ["student", "mean teacher 2"]
        )
        fit_group(group)
        pairs = zip(group.judged, group.models, strict=True)
        assert all(mean is not model for mean, model in pairs)
        distance = (weights_of(group.judged[0]) - weights_of(group.models[0])).abs().max()
        assert (distance < 1e-6) == same


def test_the_running_mean_is_what_is_kept(workshop):
    shop = workshop()
    left = run(shop, "pcl")
    assert left.student.state_dict().keys() == shop.new_student().state_dict().keys()
    rows = shop.histories["student"].epochs
    logits = left.student(shop.rows.validation_inputs)
    loss = nn.functional.cross_entropy(logits, shop.rows.validation_labels)
    assert rows[-1]["validation_loss"] == pytest.approx(loss.item(), abs=1e-6)


def test_collaborating_peers_agree_more(workshop, hard_rows):
    alone, together = (
        run(
            workshop(rows=hard_rows(), epochs=20, optimizer=FAST), "pcl", kd_weight=weight, decay=0
        ).notes["disagreement"]
        for weight in (0, 5)
    )
    assert together < 0.8 * alone


def test_the_joined_classifier_leaves_peers_alone_while_they_train_alone(workshop):
    shop = workshop()
    group = _PeersWithMeans(
        shop, PCLSettings(kd_weight=0), build_peers(shop, 2), ["student", "mean teacher 2"]
    )
    before = weights_of(group.classifier)
    fit_group(group)
    assert not torch.equal(before, weights_of(group.classifier))
    for number, model in enumerate(group.models):
        alone = shop.new_student(number)
        shop.fit(alone, name="alone", teacher=None, objective=_labels(shop.objective))
        assert torch.equal(weights_of(model), weights_of(alone))


def test_peers_of_different_widths_are_joined(workshop):
    left = run(workshop(), "pcl", peers=3, models=(DEEP, BATCH_NORM), kd_weight=1)
    assert weights_of(left.student).isfinite().all()


# --- Codistillation


def test_nobody_reads_anything_during_the_burn_in(workshop, monkeypatch):
    reads = []
    original = StalePeers.others

    def spy(self, inputs, *, leave_out):
        reads.append(leave_out)
        return original(self, inputs, leave_out=leave_out)

    monkeypatch.setattr(StalePeers, "others", spy)
    run(workshop(epochs=3), "codistillation", burn_in=0.5)
    # 18 steps; from the middle on each peer asks once a step.
    assert reads == [0, 1] * 9


def test_the_burn_in_is_a_share_of_the_training(workshop):
    shop = workshop(epochs=5)
    run(shop, "codistillation", burn_in=0.5)
    weights = [row["weight/kd"] for row in shop.histories["student"].epochs]
    assert weights == [0, 0, 1, 1, 1]


def test_peers_read_each_other_as_they_were(workshop):
    # With no exchange ever, everybody listens to the first weights of the others.
    fresh, stale, never = (
        weights_of(run(workshop(), "codistillation", burn_in=0, interval=interval).student)
        for interval in (1, 5, 1000)
    )
    assert not torch.allclose(fresh, stale, atol=1e-5)
    assert not torch.allclose(stale, never, atol=1e-5)


def test_codistilled_peers_agree_more(workshop, hard_rows):
    alone, together = (
        run(
            workshop(rows=hard_rows(), epochs=20, optimizer=FAST),
            "codistillation",
            kd_weight=weight,
            labelled_rows="disjoint",
        ).notes["disagreement"]
        for weight in (0, 3)
    )
    assert together < 0.7 * alone


def test_disjoint_rows_are_every_label_once(workshop):
    shop = workshop()
    settings = CodistillationSettings(peers=3, labelled_rows="disjoint")
    group = _StaleReaders(shop, settings, build_peers(shop, 3), peer_names(3))
    ids = torch.cat(group.own_rows)
    assert sorted(ids.tolist()) == list(range(shop.rows.labelled))
    assert [len(part) for part in group.own_rows] == [4, 4, 4]


def test_more_peers_than_labelled_rows_cannot_be_disjoint(workshop, toy_rows):
    with pytest.raises(ValueError, match=r"labelled row for each of the 3 peers, but .* is 2"):
        run(
            workshop(rows=toy_rows(labelled=2)),
            "codistillation",
            peers=3,
            labelled_rows="disjoint",
        )


@pytest.mark.parametrize(
    ("settings", "name"),
    [(OKDDipSettings, "peers"), (PCLSettings, "peers"), (CodistillationSettings, "peers")],
)
def test_methods_that_need_others_refuse_one_alone(settings, name):
    with pytest.raises(ValidationError, match=name):
        settings(peers=1)
