"""Objectives: which terms, with which weights, and where no gradient goes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedkd.objectives import Objective
from fedkd.targets import Targets
from fedkd.training import (
    Batch,
    ComposedObjective,
    Learner,
    Outputs,
    supervised,
    supervised_public,
)
from fedkd.training.steps import total


def logits(*shape, seed=0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.requires_grad_()


def distilled(
    outputs, batch, *, temperature, ce_weight=1.0, kd_weight=1.0, scale_by_t2=True, threshold=0.0
):
    """The means of the terms that a strategy's short form stands for."""
    kd = {"weight": kd_weight, "temperature": temperature, "scale_by_t2": scale_by_t2}
    objective = Objective.model_validate({"ce": ce_weight, "kd": kd})
    composed = ComposedObjective(
        learners={"model": Learner(objective=objective)},
        confidence_threshold=threshold,
        temperature=temperature,
    )
    bound = objective.bind(
        nn.Identity(), None, torch.zeros(2, 1, 1, 3), num_classes=3, rows=5, seed=0
    )
    view = composed.view("model", {"model": outputs}, batch)
    return view.step_rows.means(bound.weighted(view))


def soft(probabilities, temperature):
    return Targets(probabilities, scale="probabilities", temperature=temperature)


@pytest.fixture
def outputs():
    return Outputs(private=logits(4, 3), public=logits(5, 3, seed=1))


@pytest.fixture
def batch():
    return Batch(
        labels=torch.tensor([0, 2, 1, 1]),
        targets=soft(F.softmax(logits(5, 3, seed=2).detach(), -1), 2.0),
        public_labels=torch.tensor([1, 1, 0, 2, 2]),
    )


def test_supervised_is_the_mean_cross_entropy_of_private_rows(outputs, batch):
    log_p = F.log_softmax(outputs.private, -1)
    by_hand = -sum(log_p[row, label] for row, label in enumerate([0, 2, 1, 1])) / 4
    assert supervised(outputs, batch)["ce"].mean().item() == pytest.approx(by_hand.item(), rel=1e-6)
    assert supervised(outputs, batch, weight=0.5)["ce"].mean().item() == pytest.approx(
        by_hand.item() / 2, rel=1e-6
    )


def test_supervised_public_looks_at_public_labels_only(outputs, batch):
    losses = supervised_public(outputs, batch)
    assert list(losses) == ["ce_public"]
    expected = F.cross_entropy(outputs.public, batch.public_labels)
    assert losses["ce_public"].of == "public"
    assert losses["ce_public"].mean().item() == pytest.approx(expected.item(), rel=1e-6)


def test_distilled_weights_its_two_terms(outputs, batch):
    losses = distilled(outputs, batch, temperature=2.0, ce_weight=0.25, kd_weight=3.0)
    divergence = F.kl_div(
        F.log_softmax(outputs.public / 2, -1), batch.targets.values, reduction="batchmean"
    )
    assert losses["ce"].item() == pytest.approx(
        0.25 * F.cross_entropy(outputs.private, batch.labels).item(), rel=1e-6
    )
    assert losses["kd"].item() == pytest.approx(3 * 4 * divergence.item(), rel=1e-5)
    assert total(losses).item() == pytest.approx(sum(loss.item() for loss in losses.values()))


def test_the_square_of_the_temperature_can_be_left_out(outputs, batch):
    scaled, plain = (
        distilled(outputs, batch, temperature=3.0, scale_by_t2=scale)["kd"].item()
        for scale in (True, False)
    )
    assert scaled == pytest.approx(9 * plain, rel=1e-6)


def test_logit_targets_are_softened_with_the_temperature(outputs, batch):
    scores = logits(5, 3, seed=3).detach()
    softened = batch._replace(targets=soft(F.softmax(scores / 2.5, -1), 2.5))
    from_logits = distilled(outputs, batch._replace(targets=Targets(scores)), temperature=2.5)
    from_probabilities = distilled(outputs, softened, temperature=2.5)
    assert torch.equal(from_logits["kd"], from_probabilities["kd"])


def test_unsure_rows_do_not_count_and_the_mean_is_over_the_rows_that_stay(outputs, batch):
    targets = torch.tensor(
        [[0.9, 0.05, 0.05], [0.4, 0.3, 0.3], [0.1, 0.8, 0.1], [0.5, 0.5, 0.0], [0.34, 0.33, 0.33]]
    )
    kept = [0, 2]
    masked = distilled(
        outputs,
        batch._replace(targets=soft(targets, 1.0)),
        temperature=1.0,
        threshold=0.8,
    )
    only = distilled(
        outputs._replace(public=outputs.public[kept]),
        batch._replace(targets=soft(targets[kept], 1.0)),
        temperature=1.0,
    )
    assert masked["kd"].item() == pytest.approx(only["kd"].item(), rel=1e-6)


def test_no_row_sure_enough_costs_nothing(outputs, batch):
    loss = distilled(outputs, batch, temperature=1.0, threshold=0.9999)["kd"]
    loss.backward()
    assert loss.item() == 0
    assert outputs.public.grad.abs().max() == 0


@pytest.mark.parametrize("are_logits", [False, True])
def test_no_gradient_reaches_the_targets(outputs, batch, are_logits):
    targets = torch.rand(5, 3).requires_grad_()
    handed = Targets(targets) if are_logits else soft(targets, 2.0)
    losses = distilled(outputs, batch._replace(targets=handed), temperature=2.0)
    total(losses).backward()
    assert outputs.public.grad.abs().max() > 0
    assert outputs.private.grad.abs().max() > 0
    assert targets.grad is None or targets.grad.abs().max() == 0


def test_each_term_sends_its_gradient_to_its_own_rows(outputs, batch):
    distilled(outputs, batch, temperature=1.0)["ce"].backward()
    assert outputs.private.grad.abs().max() > 0
    assert outputs.public.grad is None


def test_a_term_without_weight_is_left_out(outputs, batch):
    losses = distilled(outputs, batch, temperature=1.0, ce_weight=0.0)
    assert list(losses) == ["kd"]
    losses["kd"].backward()
    assert outputs.private.grad is None


def test_a_teacher_that_agrees_leaves_nothing_to_learn(outputs, batch):
    targets = F.softmax(outputs.public.detach() / 2, -1)
    loss = distilled(outputs, batch._replace(targets=soft(targets, 2.0)), temperature=2.0)["kd"]
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert outputs.public.grad.abs().max().item() == pytest.approx(0, abs=1e-6)


def test_missing_rows_or_labels_are_named(outputs, batch):
    with pytest.raises(ValueError, match="needs private rows with labels"):
        supervised(outputs, batch._replace(labels=None))
    with pytest.raises(ValueError, match="needs private rows with labels"):
        supervised(outputs._replace(private=None), batch)
    with pytest.raises(ValueError, match=r"data\.public\.labelled: true"):
        supervised_public(outputs, batch._replace(public_labels=None))
