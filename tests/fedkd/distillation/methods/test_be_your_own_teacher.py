"""Classifiers on inner layers: what they learn reaches the layers below them, and no others."""

import dataclasses
import math

import pytest
import torch

from fedkd.distillation.fit.workshop import labels_only
from fedkd.distillation.methods import METHODS
from fedkd.distillation.methods.be_your_own_teacher import (
    BeYourOwnTeacher,
    BeYourOwnTeacherSettings,
    inner_layers,
)
from fedkd.models import ModelSettings
from fedkd.training.early_stopping import EarlyStopping

DEEP = ModelSettings(name="mlp", options={"hidden": [8, 8, 8]})
CNN = ModelSettings(name="cnn", options={"channels": [4, 6], "norm": "batch"})
RESNET = ModelSettings(name="resnet8", options={"width": 8})
DROPOUT = ModelSettings(name="mlp", options={"hidden": [8, 8], "dropout": 0.5})
OFF = {"shallow_ce_weight": 0.0, "kd_weight": 0.0, "feature_weight": 0.0}


def weights_of(model):
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


def run(shop, **settings):
    return BeYourOwnTeacher(BeYourOwnTeacherSettings(**settings)).run(shop)


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (ModelSettings(name="mlp", options={"hidden": [8]}), ["2"]),
        (DEEP, ["2", "4"]),
        (CNN, ["3"]),
        (RESNET, ["norm", "blocks.0", "blocks.1"]),
        (ModelSettings(name="transformer"), ["embedding", "blocks.0"]),
    ],
)
def test_classifiers_stand_at_the_ends_of_the_inner_blocks(workshop, model, layers):
    shop = workshop(model=model)
    assert inner_layers(shop.new_student(), shop.rows.inputs[:2]) == layers


@pytest.mark.parametrize("labelled", [12, 48])
@pytest.mark.parametrize("model", [DEEP, CNN, DROPOUT])
def test_without_its_terms_it_is_plain_training_bit_for_bit(workshop, toy_rows, model, labelled):
    shop = workshop(model=model, rows=toy_rows(labelled=labelled))
    student = run(shop, **OFF).student
    twin = shop.new_student()
    shop.fit(twin, name="twin", teacher=None, objective=labels_only(shop.objective))
    assert torch.equal(weights_of(student), weights_of(twin))


@pytest.mark.parametrize(
    "term", [{"kd_weight": 1.0}, {"feature_weight": 1.0}, {"shallow_ce_weight": 1.0}]
)
def test_shallow_classifiers_move_the_layers_below_them_and_not_the_deepest_one(
    workshop, toy_rows, term
):
    # One step on one batch: where a layer ends is its gradient.
    one_step = {"epochs": 1, "batch_size": 48, "optimizer": {"name": "sgd", "lr": 0.1}}
    without, with_term = (
        run(workshop(rows=toy_rows(labelled=48), model=DEEP, **one_step), **OFF | weights).student
        for weights in ({}, term)
    )
    assert not torch.allclose(without[1].weight, with_term[1].weight)
    for layer in (5, 7):  # above the last shallow classifier, which reads layer 4
        assert torch.allclose(without[layer].weight, with_term[layer].weight, atol=1e-7)


def test_the_student_has_no_classifier_inside_and_no_hook_left(workshop):
    shop = workshop(model=CNN)
    student = run(shop).student
    assert list(student.state_dict()) == list(shop.new_student().state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


def test_a_pass_a_step_and_all_rows_in_it(workshop):
    student = run(workshop(model=CNN)).student
    assert int(student[1].num_batches_tracked) == 3 * 6


def test_classifiers_learn_and_stand_beside_the_student_by_the_name_of_their_layer(workshop):
    shop = workshop(model=DEEP, epochs=15, optimizer={"lr": 0.02})
    left = run(shop)
    assert list(left.others) == ["classifier on 2", "classifier on 4", "ensemble"]
    for model in (left.student, *left.others.values()):
        found = model(shop.rows.validation_inputs).argmax(-1)
        assert (found == shop.rows.validation_labels).double().mean() > 0.6


def test_the_ensemble_is_the_mean_of_all_branches_probabilities(workshop):
    shop = workshop(model=DEEP)
    left = run(shop)
    inputs = shop.rows.validation_inputs
    branches = [left.others["classifier on 2"], left.others["classifier on 4"], left.student]
    mean = torch.stack([branch(inputs).softmax(-1) for branch in branches]).mean(0)
    assert left.others["ensemble"](inputs).softmax(-1).allclose(mean, atol=1e-6)


def test_rows_without_labels_teach_and_their_labels_are_never_read(workshop, toy_rows):
    rows = toy_rows()
    labels, inputs = rows.labels.clone(), rows.inputs.clone()
    labels[rows.labelled :] = labels[rows.labelled :].roll(1)
    inputs[rows.labelled :] *= 2
    one, same, other = (
        weights_of(run(workshop(rows=each)).student)
        for each in (
            rows,
            dataclasses.replace(rows, labels=labels),
            dataclasses.replace(rows, inputs=inputs),
        )
    )
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


def test_the_same_seed_gives_the_same_bits_and_another_others(workshop):
    one, same, other = (
        weights_of(run(workshop(model=DROPOUT, seed=seed)).others["ensemble"]) for seed in (3, 3, 4)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_every_part_of_the_loss_is_recorded(workshop):
    shop = workshop(model=DEEP)
    run(shop)
    rows = shop.histories["student"].epochs
    assert {"loss/ce", "loss/ce_shallow", "loss/kd_shallow", "loss/features"} <= set(rows[0])
    assert all(math.isfinite(value) for row in rows for value in row.values())


def test_layers_may_be_named_and_must_exist(workshop):
    assert "classifier on 1" in run(workshop(model=DEEP, epochs=0), layers=("1",)).others
    with pytest.raises(ValueError, match="the student has no layer 'conv9'; it has"):
        run(workshop(), layers=("conv9",))


def test_the_classifiers_of_the_best_epoch_are_kept_with_the_student(workshop, monkeypatch):
    kept = []
    update = EarlyStopping.update

    def noted(self, value, module, *, step):
        best = update(self, value, module, step=step)
        if best:
            kept.append({name: t.clone() for name, t in module.state_dict().items()})
        return best

    monkeypatch.setattr(EarlyStopping, "update", noted)
    shop = workshop(epochs=8, early_stopping={"patience": 2}, optimizer={"name": "adam", "lr": 0.3})
    method = METHODS["be_your_own_teacher"]
    done = method(method.Settings(name="be_your_own_teacher")).run(shop)
    history = shop.histories["student"]
    assert history.best_epoch < len(history.epochs)
    after = done.others["ensemble"].network.state_dict()
    assert any(name.startswith("classifiers") for name in kept[-1])
    assert all(torch.equal(tensor, after[name]) for name, tensor in kept[-1].items())
