"""DAFL: a student that never sees a row, and images that a teacher is sure about."""

import dataclasses
import math

import pytest
import torch

from fedkd.distillation.methods.dafl import (
    DAFLSettings,
    DataFree,
    ImageGenerator,
    _DataFreeFit,
)
from fedkd.distillation.task.combining import Combination
from fedkd.distillation.task.participants import StudentPruning
from fedkd.distillation.task.selection import Selection
from fedkd.distillation.task.teachers import Teacher
from fedkd.models import ModelSettings
from fedkd.objectives import Objective

DROPOUT = ModelSettings(name="mlp", options={"hidden": [8], "dropout": 0.5})
QUICK = {"steps_per_epoch": 5, "batch_size": 32, "latent": 8, "width": 8}


def weights_of(model):
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


def run(shop, **settings):
    return DataFree(DAFLSettings(**{**QUICK, **settings})).run(shop)


@pytest.fixture
def good_teacher(workshop):
    """Return a teacher that knows the toy problem."""
    shop = workshop(epochs=20, optimizer={"lr": 0.005})
    model = shop.build(ModelSettings(name="mlp", options={"hidden": [32]}), 1, 0)
    shop.fit(
        model,
        name="teacher",
        teacher=None,
        objective=Objective.model_validate({"ce": 1}),
        rows=shop.rows.all_labelled(),
    )
    return Teacher([model], Combination())


def test_no_row_reaches_the_student(workshop, trained_teacher, toy_rows):
    rows, teacher = toy_rows(), trained_teacher()
    poisoned = dataclasses.replace(
        rows,
        inputs=torch.full_like(rows.inputs, math.nan),
        labels=torch.zeros_like(rows.labels),
        test_inputs=torch.full_like(rows.test_inputs, math.nan),
    )
    one, other = (
        weights_of(run(workshop(rows=each, teacher=teacher)).student) for each in (rows, poisoned)
    )
    assert torch.equal(one, other)
    assert one.isfinite().all()


def test_a_student_without_any_row_is_far_above_chance(workshop, good_teacher):
    shop = workshop(teacher=good_teacher, epochs=15, optimizer={"lr": 0.01})
    left = run(shop, steps_per_epoch=10)
    found = left.student(shop.rows.validation_inputs).argmax(-1)
    assert (found == shop.rows.validation_labels).double().mean() > 0.75  # chance is 1/3
    losses = [row["loss/one_hot"] for row in shop.histories["student"].epochs]
    assert losses[-1] < losses[0]
    assert left.notes["class_entropy"] > 0.9
    assert left.notes["confidence"] > 0.5


def test_images_of_one_class_only_cost(workshop, good_teacher):
    # Without the entropy of the batch the generator may make one class; with it, it must not.
    settings = {"steps_per_epoch": 10, "one_hot_weight": 1.0}
    with_it, without = (
        run(
            workshop(teacher=good_teacher, epochs=6), **settings, information_entropy_weight=weight
        ).notes["class_entropy"]
        for weight in (5.0, 0.0)
    )
    assert with_it > without


def test_what_the_student_minimises_does_not_move_the_generator(workshop, trained_teacher):
    teacher, generators, students = trained_teacher(), [], []
    for weight in (1, 5):
        shop = workshop(
            teacher=teacher, objective={"kd": weight}, optimizer={"name": "sgd", "lr": 0.01}
        )
        student = shop.new_student()
        fit = _DataFreeFit(shop, DAFLSettings(**QUICK), teacher, student)
        fit.run()
        generators.append(weights_of(fit.generator))
        students.append(weights_of(student))
    assert torch.equal(*generators)
    assert not torch.allclose(*students)


def test_the_teacher_does_not_change_and_no_hook_is_left(workshop, trained_teacher):
    model = ModelSettings(name="cnn", options={"channels": [4], "norm": "batch"})
    teacher = trained_teacher(model)
    before = weights_of(teacher)
    student = run(workshop(model=model, teacher=teacher)).student
    assert torch.equal(weights_of(teacher), before)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    for module in (*teacher.modules(), *student.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not student.training
    assert int(student[1].num_batches_tracked) == 3 * 5


def test_the_same_seed_gives_the_same_bits_and_another_others(workshop, trained_teacher):
    teacher = trained_teacher()
    one, same, other = (
        weights_of(run(workshop(model=DROPOUT, teacher=teacher, seed=seed)).student)
        for seed in (3, 3, 4)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_terms_that_compare_layers_see_generated_images(workshop, trained_teacher):
    shop = workshop(teacher=trained_teacher(), objective={"ce": 1, "kd": 1, "sp": 1})
    run(shop)
    row = shop.histories["student"].epochs[-1]
    assert {"loss/kd", "loss/sp", "loss/one_hot", "validation_accuracy"} <= set(row)
    assert "loss/ce" not in row
    assert all(math.isfinite(value) for value in row.values())


def test_several_teachers_all_teach(workshop, trained_teacher):
    models = [ModelSettings(name="mlp", options={"hidden": [width]}) for width in (16, 24)]
    both = trained_teacher(*models)
    first = Teacher([both.members[0]], Combination())
    one, two = (weights_of(run(workshop(teacher=teacher)).student) for teacher in (first, both))
    assert not torch.allclose(one, two)


def test_early_stopping_goes_back_to_the_best_weights(workshop, good_teacher):
    shop = workshop(
        teacher=good_teacher,
        epochs=12,
        early_stopping={"patience": 2},
        optimizer={"lr": 0.1},
    )
    student = run(shop).student
    history = shop.histories["student"]
    losses = [row["validation_loss"] for row in history.epochs]
    assert history.best_epoch == losses.index(min(losses)) + 1
    now = torch.nn.functional.cross_entropy(
        student(shop.rows.validation_inputs), shop.rows.validation_labels
    )
    assert now.item() == pytest.approx(min(losses), abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 11), (1, 28, 28)])
def test_a_generator_makes_images_of_any_shape_as_rows_are_normalised(shape):
    images = ImageGenerator(shape, latent=5, width=6)(torch.randn(64, 5))
    assert images.shape == (64, *shape)
    assert images.mean((0, 2, 3)).abs().max() < 1e-5
    assert images.var((0, 2, 3), correction=0).sub(1).abs().max() < 1e-2


def test_no_epochs_leave_the_first_weights(workshop, trained_teacher):
    shop = workshop(epochs=0, teacher=trained_teacher())
    assert torch.equal(weights_of(run(shop).student), weights_of(shop.new_student()))


def test_what_would_need_rows_is_refused_before_anything_trains(workshop, trained_teacher):
    teacher = trained_teacher()
    chosen = dataclasses.replace(
        workshop(teacher=teacher), selection=Selection(confidence_threshold=0.9)
    )
    plain = workshop(teacher=teacher)
    pruning = StudentPruning(when="end", finetune_epochs=1)
    finetuned = dataclasses.replace(
        plain, student=plain.student.model_copy(update={"prune": pruning})
    )
    for shop, message in (
        (workshop(), "needs a teacher"),
        (workshop(teacher=teacher, objective={"ce": 1}), "learns from the teacher, such as kd"),
        (workshop(teacher=teacher, objective={"dkd": 1}), "objective.dkd needs rows with labels"),
        (workshop(teacher=teacher, augmentation={"horizontal_flip": 0.5}), "augmentation"),
        (chosen, "targets choose transfer rows"),
        (finetuned, "student.prune.finetune_epochs"),
    ):
        with pytest.raises(ValueError, match=message):
            DataFree(DAFLSettings()).check(shop)
        with pytest.raises(ValueError, match=message):
            run(shop)
