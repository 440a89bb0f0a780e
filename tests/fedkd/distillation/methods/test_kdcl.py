"""KDCL: who makes the common target, and on which rows."""

import math

import pytest
import torch
from torch import nn

from fedkd.distillation.fit.group import Exchange, GroupStep, InForce, fit_group
from fedkd.distillation.methods import METHODS
from fedkd.distillation.methods.kdcl import KDCLSettings, _Collaborators
from fedkd.distillation.methods.peers import build_peers, peer_names

FAST = {"name": "adam", "lr": 0.01}


def weights_of(model):
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


def run(shop, name, **settings):
    method = METHODS[name]
    return method(method.Settings(name=name, **settings)).run(shop)


def apart(first, second, inputs):
    """Return how far two models' predictions are from each other."""
    with torch.no_grad():
        return (first(inputs).softmax(-1) - second(inputs).softmax(-1)).abs().mean()


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
