"""The discriminator trains itself: neither model helps it, and it helps neither along."""

import copy

import pytest
import torch
from torch import nn

from fedkd.losses.adversarial import Discriminator
from fedkd.objectives import Objective, View
from fedkd.randomness import seeded_torch
from fedkd.targets import Targets
from fedkd.training.optimizers import OptimizerSettings
from fedkd.training.pool import Slot

TABLE = {"adversarial": {"weight": 1, "width": 6, "discriminator_lr": 0.01}}
WEIGHTS = torch.tensor([1.0, 0, 2, 1, 1])


def bound(table=TABLE):
    return Objective.model_validate(table).bind(
        nn.Linear(4, 4), None, torch.randn(2, 1, 2, 2), num_classes=4, rows=10, seed=3
    )


def adversary_of(objective):
    return objective.parts["adversarial"]["adversary"]


def view(step=0, **fields):
    generator = torch.Generator().manual_seed(step)
    student = torch.randn(5, 4, generator=generator)
    teacher = 3 + torch.randn(5, 4, generator=generator)
    return View(
        logits=student.requires_grad_(), targets=Targets(teacher.requires_grad_()), **fields
    )


def same_discriminator():
    with seeded_torch(3):
        return Discriminator(4, width=6, num_layers=2)


def test_it_learns_as_with_torchs_adam_and_the_student_is_judged_by_what_it_learned():
    objective, reference = bound(), same_discriminator()
    optimizer = torch.optim.Adam(reference.parameters(), lr=0.01)
    for step in range(4):
        seen = view(step, weights=WEIGHTS)
        optimizer.zero_grad()
        reference.loss(seen.logits, seen.targets.values, sample_weights=WEIGHTS).backward()
        optimizer.step()
        loss = objective.losses(seen)["adversarial"]
        expected = reference.fooling_loss(seen.logits, sample_weights=WEIGHTS)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    weights = nn.utils.parameters_to_vector(reference.parameters())
    torch.testing.assert_close(adversary_of(objective).weights, weights.detach())


def test_its_step_gives_neither_model_a_gradient_and_the_students_gives_it_none():
    objective, seen = bound(), view()
    loss = objective.losses(seen)["adversarial"]
    assert seen.logits.grad is None
    learned = adversary_of(objective).weights.clone()
    loss.backward()
    assert seen.logits.grad.abs().sum() > 0
    assert seen.targets.values.grad is None
    assert torch.equal(adversary_of(objective).weights, learned)
    assert not adversary_of(objective).weights.requires_grad


def test_its_weights_are_in_the_state_but_in_no_optimizer_of_the_student():
    objective = bound()
    assert list(objective.parts.parameters()) == []
    assert "adversarial.adversary.weights" in objective.parts.state_dict()
    # A client's slot holds parts without a single parameter, too.
    slot = Slot(objective.parts, OptimizerSettings(), torch.device("cpu"))
    slot.optimizer.param_groups[0]["lr"] = 0.1
    slot.optimizer.step()
    slot.load(slot.state())


def test_it_stands_still_outside_training():
    objective = bound()
    objective.parts.eval()
    before = adversary_of(objective).weights.clone()
    objective.losses(view())
    assert torch.equal(adversary_of(objective).weights, before)


def test_with_its_state_put_back_it_goes_on_with_the_same_bits():
    straight, cut, resumed = bound(), bound(), bound()
    expected = [straight.losses(view(step))["adversarial"].item() for step in range(4)]
    for step in range(2):
        cut.losses(view(step))
    resumed.parts.load_state_dict(copy.deepcopy(cut.parts.state_dict()))
    again = [resumed.losses(view(step))["adversarial"].item() for step in (2, 3)]
    assert again == expected[2:]


def test_two_views_may_be_taken_before_the_first_is_gone_back_through():
    objective = bound()
    first, second = view(0), view(1)
    losses = [objective.losses(seen)["adversarial"] for seen in (first, second)]
    (losses[0] + losses[1]).backward()
    assert first.logits.grad.abs().sum() > 0


def test_its_accuracy_is_noted_a_half_for_equal_models_and_near_one_for_different_ones():
    objective, seen = bound(), view()
    equal = View(logits=seen.logits, targets=Targets(seen.logits.detach()))
    assert objective.notes(equal)["adversarial/accuracy"].item() == 0.5
    for step in range(100):
        objective.losses(view(step))
    assert objective.notes(view(7))["adversarial/accuracy"].item() > 0.9
    assert not objective.notes(view(7))["adversarial/accuracy"].requires_grad
