"""Self-supervised distillation: turned rows stay with their upright ones, all the way through."""

import copy
import dataclasses

import pytest
import torch

from fedkd.distillation.fit.group import fit_group
from fedkd.distillation.fit.workshop import labels_only
from fedkd.distillation.methods.sskd import (
    SelfSupervised,
    SSKDSettings,
    _SelfSupervised,
    train_head,
)
from fedkd.distillation.task.selection import Selection
from fedkd.models import ModelSettings

BATCH_NORM = ModelSettings(name="cnn", options={"channels": [4], "norm": "batch"})
DROPOUT = ModelSettings(name="mlp", options={"hidden": [8], "dropout": 0.5})
OFF = {"kd_weight": 0.0, "ss_weight": 0.0, "tf_weight": 0.0}


def weights_of(model):
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


def run(shop, **settings):
    return SelfSupervised(SSKDSettings(**{"head_epochs": 2, **settings})).run(shop)


@pytest.mark.parametrize("model", [None, BATCH_NORM, DROPOUT])
def test_without_its_terms_it_is_plain_training_bit_for_bit(workshop, trained_teacher, model):
    shop = workshop(model=model, teacher=trained_teacher())
    student = run(shop, **OFF).student
    twin = shop.new_student()
    shop.fit(twin, name="twin", teacher=None, objective=labels_only(shop.objective))
    assert torch.equal(weights_of(student), weights_of(twin))


@pytest.mark.parametrize("labelled", [12, 48])
def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(
    workshop, trained_teacher, toy_rows, labelled
):
    # Any row out of its place, in logits, embeddings or turns, would show.
    teacher = trained_teacher(BATCH_NORM)
    shop = workshop(
        rows=toy_rows(labelled=labelled),
        teacher=teacher,
        epochs=1,
        optimizer={"name": "sgd", "lr": 1e-9},
    )
    head = train_head(shop, teacher, 2)
    student = copy.deepcopy(teacher.first).requires_grad_(True)
    student.train = lambda mode=True: student  # BatchNorm as the teacher's
    group = _SelfSupervised(shop, SSKDSettings(), student, teacher, head)
    group.parts["head"].load_state_dict(head.state_dict())
    fit_group(group)
    (row,) = shop.histories["student"].epochs
    assert [row[f"loss/{name}"] for name in ("kd", "ss", "tf")] == pytest.approx([0] * 3, abs=1e-5)


def test_the_head_learns_to_find_the_upright_image(workshop, trained_teacher):
    shop = workshop(teacher=trained_teacher(), optimizer={"lr": 0.01})
    head = train_head(shop, shop.teacher, 20)
    losses = [row["loss/contrastive"] for row in shop.histories["teacher's head"].epochs]
    assert len(losses) == 20
    assert losses[-1] < 0.75 * losses[0]
    assert not any(parameter.requires_grad for parameter in head.parameters())


@pytest.mark.parametrize("name", ["ss", "tf"])
def test_the_student_comes_nearer_to_what_the_teacher_says_of_turned_images(
    workshop, trained_teacher, name
):
    shop = workshop(teacher=trained_teacher(), epochs=15, optimizer={"lr": 0.01})
    run(shop, **OFF | {"ce_weight": 0.0, f"{name}_weight": 1.0}, head_epochs=5)
    losses = [row[f"loss/{name}"] for row in shop.histories["student"].epochs]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("share", ["ss_wrong_share", "tf_wrong_share"])
def test_rows_that_the_teacher_gets_wrong_may_be_left_out(workshop, trained_teacher, share):
    none, all_of_them = (
        weights_of(run(workshop(teacher=trained_teacher(), epochs=1), **{share: kept}).student)
        for kept in (0.0, 1.0)
    )
    assert not torch.equal(none, all_of_them)


def test_labels_of_rows_without_labels_are_never_read(workshop, trained_teacher, toy_rows):
    rows, teacher = toy_rows(), trained_teacher()
    wrong = rows.labels.clone()
    wrong[rows.labelled :] = wrong[rows.labelled :].roll(1)
    one, other = (
        weights_of(run(workshop(rows=each, teacher=teacher), tf_wrong_share=0.0).student)
        for each in (rows, dataclasses.replace(rows, labels=wrong))
    )
    assert torch.equal(one, other)


def test_the_teacher_does_not_change_and_no_hook_is_left(workshop, trained_teacher):
    teacher = trained_teacher(BATCH_NORM)
    before = weights_of(teacher)
    student = run(workshop(model=BATCH_NORM, teacher=teacher)).student
    assert torch.equal(weights_of(teacher), before)
    for model in (teacher, student):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert int(student[1].num_batches_tracked) == 3 * 6  # one pass a step


def test_the_same_seed_gives_the_same_bits_and_another_others(workshop, trained_teacher):
    teacher = trained_teacher()
    augmented = {"model": DROPOUT, "augmentation": {"gaussian_noise": 0.1}}
    one, same, other = (
        weights_of(run(workshop(teacher=teacher, seed=seed, **augmented)).student)
        for seed in (3, 3, 4)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_what_has_no_part_in_it_is_refused_before_anything_trains(
    workshop, trained_teacher, toy_rows
):
    rows, teacher = toy_rows(), trained_teacher()
    cut = {
        name: getattr(rows, name)[..., :6, :]
        for name in ("inputs", "validation_inputs", "test_inputs")
    }
    wide = dataclasses.replace(rows, **cut)
    chosen = dataclasses.replace(
        workshop(teacher=teacher), selection=Selection(confidence_threshold=0.9)
    )
    clean = workshop(teacher=teacher, augmentation={"teacher_view": "clean"})
    for shop, message in (
        (workshop(), "needs a teacher"),
        (workshop(rows=wide, teacher=teacher), "square images, got 6 x 8"),
        (chosen, "targets have no part in method 'sskd'"),
        (clean, "teacher_view must be same with method 'sskd'"),
    ):
        with pytest.raises(ValueError, match=message):
            SelfSupervised(SSKDSettings()).check(shop)
        with pytest.raises(ValueError, match=message):
            run(shop)
