"""Born-again generations: each is taught by the one before, and shares nothing with it."""

import copy
import dataclasses

import pytest
import torch

from fedkd.distillation.fit.workshop import labels_only
from fedkd.distillation.methods.born_again import BornAgain, BornAgainSettings
from fedkd.distillation.methods.peers import Ensemble
from fedkd.distillation.task.combining import Combination
from fedkd.distillation.task.participants import StudentPruning
from fedkd.distillation.task.teachers import Teacher


def weights_of(model):
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


def run(shop, generations=2):
    return BornAgain(BornAgainSettings(generations=generations)).run(shop)


@pytest.mark.parametrize("generations", [1, 2])
def test_the_last_generation_is_the_run_s_student_taught_by_the_one_before(workshop, generations):
    left = run(workshop(), generations)
    shop = workshop()
    before = copy.deepcopy(left.others[f"generation {generations - 1}"])
    by_hand = shop.new_student()
    shop.fit(by_hand, name="by hand", teacher=Teacher([before], Combination()))
    assert torch.equal(weights_of(left.student), weights_of(by_hand))


def test_generation_0_learns_labels_only(workshop):
    one = run(workshop(objective={"ce": 0.1, "kd": 0.9})).others["generation 0"]
    other = run(workshop(objective={"kd": {"weight": 5, "temperature": 3}})).others["generation 0"]
    assert torch.equal(weights_of(one), weights_of(other))


def test_every_generation_starts_from_weights_of_its_own(workshop):
    left = run(workshop(epochs=0))
    shop = workshop(epochs=0)
    models = [left.others["generation 0"], left.others["generation 1"], left.student]
    for model, number in zip(models, (2, 1, 0), strict=True):
        assert torch.equal(weights_of(model), weights_of(shop.new_student(number)))


def test_generations_share_no_tensor_and_none_is_frozen(workshop):
    left = run(workshop())
    models = [left.others["generation 0"], left.others["generation 1"], left.student]
    pointers = [{tensor.data_ptr() for tensor in model.parameters()} for model in models]
    assert not any(a & b for k, a in enumerate(pointers) for b in pointers[:k])
    assert all(parameter.requires_grad for model in models for parameter in model.parameters())


def test_the_ensemble_leaves_generation_0_out(workshop):
    shop = workshop()
    left = run(shop)
    inputs = shop.rows.validation_inputs
    born_again = Ensemble([left.others["generation 1"], left.student])
    assert torch.equal(left.others["ensemble"](inputs), born_again(inputs))
    assert "ensemble" not in run(workshop(), generations=1).others


def test_every_generation_has_a_history(workshop):
    shop = workshop()
    run(shop)
    assert list(shop.histories) == ["generation 0", "generation 1", "student"]
    assert "loss/kd" not in shop.histories["generation 0"].epochs[0]
    assert "loss/kd" in shop.histories["generation 1"].epochs[0]


def test_an_objective_that_does_not_fit_is_refused_before_generation_0_trains(workshop):
    told = []
    shop = dataclasses.replace(
        workshop(objective={"ce": 1, "dkd": 1}), listener=lambda name, row: told.append(name)
    )
    with pytest.raises(ValueError, match=r"objective.dkd needs the labels of all transfer rows"):
        BornAgain(BornAgainSettings()).check(shop)
    with pytest.raises(ValueError, match=r"objective.dkd needs the labels of all transfer rows"):
        run(shop)
    assert not told


def test_masks_of_a_student_that_is_pruned_at_the_start_hold_in_every_generation(workshop):
    shop = workshop()
    pruned = StudentPruning(amount=0.5, when="start")
    student = run(
        dataclasses.replace(shop, student=shop.student.model_copy(update={"prune": pruned}))
    ).student
    weight = student[1].weight
    assert float((weight == 0).double().mean()) == pytest.approx(0.5, abs=0.2)


def test_the_objective_of_generation_0_is_the_twin_s(workshop):
    shop = workshop()
    first = run(shop, generations=1).others["generation 0"]
    twin = shop.new_student(1)
    shop.fit(twin, name="twin", teacher=None, objective=labels_only(shop.objective), key=(0, 8, 1))
    assert torch.equal(weights_of(first), weights_of(twin))
