"""The loop of several models: alone it is plain training, together nobody pulls on a target."""

import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from fedkd.distillation.fit.group import Group, SoftenedSettings, fit_group
from fedkd.distillation.fit.workshop import labels_only
from fedkd.distillation.methods import METHODS
from fedkd.distillation.methods.peers import Ensemble, build_peers, peer_names
from fedkd.distillation.task.selection import Selection
from fedkd.models import ModelSettings

BATCH_NORM = ModelSettings(name="cnn", options={"channels": [4], "norm": "batch"})
DROPOUT = ModelSettings(name="mlp", options={"hidden": [8], "dropout": 0.5})
AUGMENTED = {"pad_and_crop": 1, "gaussian_noise": 0.1}
GROUPS = ("dml", "mutual", "one", "kdcl", "okddip", "pcl", "codistillation", "co_training")


class Pulled(Group[SoftenedSettings]):
    """Models that pull towards the mean of their logits."""

    def losses(self, step):
        if step.exchange is None:
            return {}
        apart = step.exchange.logits - step.exchange.logits.detach().mean(0)
        return {"kd": step.values.kd_weight * apart.square().sum(-1).mean(-1)}


def weights_of(model):
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


def group_of(shop, count, **settings):
    settings = SoftenedSettings(name="pulled", **settings)
    return Pulled(shop, settings, build_peers(shop, count), peer_names(count))


def run(shop, name, **settings):
    method = METHODS[name]
    return method(method.Settings(name=name, **settings)).run(shop)


@pytest.mark.parametrize("labelled", [12, 48])
@pytest.mark.parametrize("model", [None, BATCH_NORM, DROPOUT])
@pytest.mark.parametrize(
    "training",
    [
        {},
        {"augmentation": AUGMENTED | {"mixup": 0.3}},
        {"early_stopping": {"patience": 1}, "epochs": 6, "optimizer": {"lr": 0.3}},
        {"optimizer": {"name": "sgd", "momentum": 0.9, "warm_up": 0.3}},
        {"objective": {"ce": {"weight": 0.1, "label_smoothing": 0.2}, "kd": 0.9}},
    ],
)
def test_one_model_alone_has_the_bits_of_plain_training(
    workshop, toy_rows, labelled, model, training
):
    shop = workshop(rows=toy_rows(labelled=labelled), model=model, **training)
    group = group_of(shop, 1)
    fit_group(group)
    twin = shop.new_student()
    shop.fit(twin, name="twin", teacher=None, objective=labels_only(shop.objective))
    assert torch.equal(weights_of(group.models[0]), weights_of(twin))
    together, alone = shop.histories["student"], shop.histories["twin"]
    assert together.best_epoch == alone.best_epoch
    for ours, theirs in zip(together.epochs, alone.epochs, strict=True):
        for name in ("epoch", "loss/ce", "validation_accuracy", "validation_loss"):
            assert ours[name] == theirs[name]


@pytest.mark.parametrize("stopping", [None, {"patience": 1}])
def test_a_weight_of_zero_is_independent_training_bit_for_bit(workshop, stopping):
    shop = workshop(model=BATCH_NORM, epochs=6, early_stopping=stopping, optimizer={"lr": 0.1})
    group = group_of(shop, 3, kd_weight=0)
    fit_group(group)
    for number, peer in enumerate(group.models):
        alone = shop.new_student(number)
        shop.fit(alone, name="alone", teacher=None, objective=labels_only(shop.objective))
        assert torch.equal(weights_of(peer), weights_of(alone))
        assert shop.histories[group.names[number]].best_epoch == shop.histories["alone"].best_epoch


def test_while_the_weight_is_zero_transfer_rows_are_not_looked_at(workshop, toy_rows):
    rows = toy_rows()
    rows.inputs[rows.labelled :] = math.nan
    shop = workshop(rows=rows)
    group = group_of(shop, 2, kd_weight=0)
    fit_group(group)
    assert all(weights_of(peer).isfinite().all() for peer in group.models)


@pytest.mark.parametrize("name", GROUPS)
def test_the_same_seed_gives_the_same_bits_and_another_others(workshop, name):
    one, same, other = (
        weights_of(run(workshop(model=DROPOUT, seed=seed, epochs=2), name).student)
        for seed in (3, 3, 4)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.isfinite().all()


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("labelled", [12, 24, 48])
def test_every_model_runs_once_a_step_in_training_mode(workshop, toy_rows, name, labelled):
    # A pass too many, or an epoch in evaluation mode, would show in BatchNorm's counter.
    if name == "co_training" and labelled == 48:
        pytest.skip("co-training needs rows without labels")
    shop = workshop(rows=toy_rows(labelled=labelled), model=BATCH_NORM, epochs=3)
    left = run(shop, name)
    counters = [
        int(module.num_batches_tracked)
        for model in (left.student, *left.others.values())
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    assert set(counters) == {3 * 6}
    assert not any(model.training for model in (left.student, *left.others.values()))


@pytest.mark.parametrize("name", GROUPS)
def test_labels_of_rows_without_labels_are_never_read(workshop, toy_rows, name):
    rows = toy_rows()
    wrong = rows.labels.clone()
    wrong[rows.labelled :] = wrong[rows.labelled :].roll(1)
    settings = {"teacher_rows": "labelled"} if name == "mutual" else {}
    one, other = (
        weights_of(run(workshop(rows=each), name, **settings).student)
        for each in (rows, dataclasses.replace(rows, labels=wrong))
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", GROUPS)
def test_what_they_tell_each_other_changes_the_student(workshop, name):
    alone, together = (
        weights_of(run(workshop(epochs=2), name, kd_weight=weight).student) for weight in (0, 1)
    )
    assert not torch.allclose(alone, together)


@pytest.mark.parametrize("name", GROUPS)
def test_every_model_has_a_history_and_somebody_is_told(workshop, name):
    told = []
    shop = dataclasses.replace(
        workshop(), listener=lambda who, row: told.append((who, row["epoch"]))
    )
    left = run(shop, name)
    names = {"student", *left.others} - {"ensemble"}
    assert set(shop.histories) == names
    for who in names:
        assert [epoch for name, epoch in told if name == who] == [1, 2, 3]
        rows = shop.histories[who].epochs
        assert all(math.isfinite(value) for row in rows for value in row.values())
        assert {"loss/ce", "weight/ce", "weight/kd", "validation_loss"} <= set(rows[0])


@pytest.mark.parametrize("name", GROUPS)
def test_no_epochs_leave_the_first_weights(workshop, name):
    shop = workshop(epochs=0)
    assert torch.equal(weights_of(run(shop, name).student), weights_of(shop.new_student()))


@pytest.mark.parametrize("name", [name for name in GROUPS if name != "one"])
def test_no_two_models_share_a_tensor(workshop, name):
    left = run(workshop(), name)
    members = left.others["ensemble"].members
    pointers = [{tensor.data_ptr() for tensor in member.parameters()} for member in members]
    assert left.student is members[0]
    assert not any(a & b for k, a in enumerate(pointers) for b in pointers[:k])


def test_early_stopping_gives_each_model_its_own_best_weights(workshop):
    shop = workshop(epochs=30, early_stopping={"patience": 2}, optimizer={"lr": 0.02})
    group = group_of(shop, 3, kd_weight=0.1)
    fit_group(group)
    for name, model in zip(group.names, group.models, strict=True):
        history = shop.histories[name]
        best = min(row["validation_loss"] for row in history.epochs[: history.best_epoch + 2])
        logits = model(shop.rows.validation_inputs)
        now = nn.functional.cross_entropy(logits, shop.rows.validation_labels).item()
        assert now == pytest.approx(best, abs=1e-6)
    assert len({shop.histories[name].best_epoch for name in group.names}) > 1
    lengths = {len(shop.histories[name].epochs) for name in group.names}
    assert len(lengths) == 1  # all learn until the last one stops


def seen_by(shop, group):
    """Return what each model's first layer got in every step."""
    seen = [[] for _ in group.models]
    for own, model in zip(seen, group.models, strict=True):
        model.register_forward_pre_hook(
            lambda module, args, own=own: own.append(args[0]) if module.training else None
        )
    fit_group(group)
    return [torch.cat(own) for own in seen]


def test_models_see_one_view_of_a_row_unless_views_are_their_own(workshop, monkeypatch):
    shop = workshop(augmentation=AUGMENTED)
    first, second = seen_by(shop, group_of(shop, 2))
    assert torch.equal(first, second)
    monkeypatch.setattr(Pulled, "own_views", True)
    apart, other = seen_by(shop, group_of(shop, 2))
    assert torch.equal(first, apart)
    assert not torch.equal(apart, other)


def test_models_may_see_the_labels_of_different_rows(workshop, toy_rows):
    rows = toy_rows()
    group = group_of(workshop(rows=rows), 2)
    ids = torch.arange(len(rows.inputs))
    group.own_rows = [ids[:5], ids[5:12]]
    seen = [set(), set()]
    loss = group.label_loss

    def spy(own):
        seen[len(calls) % 2].update(own.labels.tolist())
        calls.append(own)
        return loss(own)

    calls = []
    group.label_loss = spy
    group.workshop.rows.labels.copy_(torch.tensor([0] * 5 + [1] * 7 + [2] * 36))
    fit_group(group)
    assert seen == [{0}, {1}]


def test_dropout_differs_between_equal_peers(workshop):
    shop = workshop(model=DROPOUT, epochs=1)
    group = group_of(shop, 2, kd_weight=0)
    group.models[1].load_state_dict(group.models[0].state_dict())
    fit_group(group)
    assert not torch.equal(*(weights_of(model) for model in group.models))


def test_an_ensemble_is_the_mean_of_probabilities(workshop):
    shop = workshop()
    members = build_peers(shop, 3)
    inputs = shop.rows.test_inputs
    mean = torch.stack([member(inputs).softmax(-1) for member in members]).mean(0)
    assert Ensemble(members)(inputs).softmax(-1).allclose(mean, atol=1e-6)


def test_a_loss_reaches_every_model_that_it_is_about(workshop):
    # Three models towards their mean: they end nearer to each other than they would alone.
    spread = []
    for weight in (0, 1):
        shop = workshop(epochs=10, optimizer={"lr": 0.01})
        group = group_of(shop, 3, kd_weight=weight)
        fit_group(group)
        with torch.no_grad():
            logits = torch.stack([model(shop.rows.inputs) for model in group.models])
        spread.append(logits.std(0).mean())
    assert spread[1] < 0.5 * spread[0]


@pytest.mark.parametrize(
    ("name", "training", "changes", "message"),
    [
        ("dml", {}, {"labelled": 0}, "data.private_rows is 0"),
        ("dml", {"augmentation": {"teacher_view": "clean"}}, {}, "teacher_view must be same"),
        ("kdcl", {"augmentation": {"mixup": 0.2}}, {}, "mixup must be 0 with method 'kdcl'"),
        ("dml", {}, {"selection": 0.9}, "targets"),
    ],
)
def test_settings_that_need_a_trained_teacher_are_refused(
    workshop, toy_rows, name, training, changes, message
):
    shop = workshop(rows=toy_rows(labelled=changes.get("labelled", 12)), **training)
    if "selection" in changes:
        shop = dataclasses.replace(
            shop, selection=Selection(confidence_threshold=changes["selection"])
        )
    with pytest.raises(ValueError, match=message):
        run(shop, name)


def test_peers_of_other_architectures_are_named_one_by_one(workshop):
    shop = workshop()
    wide = ModelSettings(name="mlp", options={"hidden": [5]})
    left = run(shop, "dml", peers=3, models=(wide, BATCH_NORM))
    assert left.others["peer 2"][1].out_features == 5
    with pytest.raises(ValueError, match=r"one model for each peer besides the student \(2\), got"):
        run(shop, "dml", peers=3, models=(wide,))


def test_the_module_can_be_imported_first():
    command = [sys.executable, "-c", "import fedkd.distillation.fit.group"]
    subprocess.run(command, check=True)
