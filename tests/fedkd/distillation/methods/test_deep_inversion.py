"""DeepInversion: images out of a teacher's memory, and a student that sees nothing else."""

import dataclasses
import math

import pytest
import torch

from fedkd.distillation.methods.deep_inversion import (
    DeepInversion,
    DeepInversionSettings,
    invert,
)
from fedkd.distillation.task.combining import Combination
from fedkd.distillation.task.teachers import Teacher
from fedkd.losses.data_free import batch_norm_losses, inversion_losses
from fedkd.models import ModelSettings
from fedkd.objectives import Objective

BATCH_NORM = ModelSettings(name="cnn", options={"channels": [8], "norm": "batch"})
QUICK = {"images": 24, "batch_size": 12, "iterations": 10}
LABELS = torch.arange(12) % 3


def weights_of(model):
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


def run(shop, **settings):
    return DeepInversion(DeepInversionSettings(**{**QUICK, **settings})).run(shop)


def inverted(teacher, **settings):
    return invert(
        teacher.first,
        LABELS,
        DeepInversionSettings(**settings),
        shape=(1, 8, 8),
        generator=torch.Generator().manual_seed(0),
    )


@pytest.fixture
def good_teacher(workshop):
    """Return a teacher with BatchNorm that knows the toy problem."""
    shop = workshop(epochs=15, optimizer={"lr": 0.01})
    model = shop.build(BATCH_NORM, 1, 0)
    shop.fit(
        model,
        name="teacher",
        teacher=None,
        objective=Objective.model_validate({"ce": 1}),
        rows=shop.rows.all_labelled(),
    )
    return Teacher([model], Combination())


def test_no_row_reaches_the_student(workshop, trained_teacher, toy_rows):
    rows, teacher = toy_rows(), trained_teacher(BATCH_NORM)
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
    shop = workshop(teacher=good_teacher, epochs=30, optimizer={"lr": 0.01})
    # A class is told by single pixels here: rolled images are of no class.
    left = run(shop, images=48, batch_size=24, iterations=80, jitter=0, batch_norm_weight=10.0)
    assert left.notes["images"] == 48
    assert left.notes["recognised"] > 0.8
    found = left.student(shop.rows.validation_inputs).argmax(-1)
    assert (found == shop.rows.validation_labels).double().mean() > 0.6  # chance is 1/3


def test_images_show_their_class_and_the_statistics_that_the_teacher_remembers(good_teacher):
    start, end = inverted(good_teacher, iterations=1), inverted(good_teacher, iterations=80)
    assert end.loss < 0.5 * start.loss
    assert end.parts["batch_norm"] < 0.5 * start.parts["batch_norm"]
    alone = inverted(good_teacher, iterations=80, batch_norm_weight=0.0)
    assert end.parts["batch_norm"] < 0.5 * alone.parts["batch_norm"]


def test_the_best_images_are_kept_as_they_were(good_teacher):
    # Steps this large leave the best images behind, and go on changing what is optimised.
    settings = {"iterations": 30, "jitter": 0, "lr": 5.0}
    best = inverted(good_teacher, **settings)
    with torch.no_grad(), batch_norm_losses(good_teacher.first) as layers:
        logits = good_teacher.first(best.images)
        again = inversion_losses(best.images, logits, LABELS, layers).total()
    assert float(again) == pytest.approx(best.loss, rel=1e-5)
    assert not best.images.requires_grad


def test_the_teacher_does_not_change_and_no_hook_is_left(workshop, trained_teacher):
    teacher = trained_teacher(BATCH_NORM)
    before = weights_of(teacher)
    run(workshop(teacher=teacher))
    run(workshop(teacher=teacher))
    assert torch.equal(weights_of(teacher), before)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    for module in teacher.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_the_same_seed_gives_the_same_bits_and_another_others(workshop, trained_teacher):
    teacher = trained_teacher(BATCH_NORM)
    one, same, other = (
        weights_of(run(workshop(teacher=teacher, seed=seed)).student) for seed in (3, 3, 4)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_every_batch_of_images_is_recorded_and_somebody_is_told(workshop, trained_teacher):
    told = []
    shop = dataclasses.replace(
        workshop(teacher=trained_teacher(BATCH_NORM)),
        listener=lambda name, row: told.append((name, row["epoch"], row["epochs"])),
    )
    run(shop)
    assert told[:2] == [("inverted images", 1, 2), ("inverted images", 2, 2)]
    row = shop.histories["inverted images"].epochs[-1]
    assert {"loss/ce", "loss/batch_norm", "loss/total_variation", "loss/l2"} <= set(row)


def test_a_teacher_without_batch_norm_is_refused_and_told_what_works(workshop, trained_teacher):
    shop = workshop(teacher=trained_teacher())
    message = r"teacher.models=\[\{name: cnn, options: \{norm: batch\}\}\], or method=dafl"
    with pytest.raises(ValueError, match=message):
        DeepInversion(DeepInversionSettings()).check(shop)
    with pytest.raises(ValueError, match=message):
        run(shop)
