"""One training loop: what it sends where, what it leaves alone, and that a seed repeats it."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedkd.distillation.task.combining import Combination
from fedkd.distillation.task.selection import Selection
from fedkd.distillation.task.teachers import Teacher, TeacherCache
from fedkd.models import ModelSettings
from fedkd.objectives import Objective

BATCH_NORM = ModelSettings(name="cnn", options={"channels": [4], "norm": "batch"})
DROPOUT = ModelSettings(name="mlp", options={"hidden": [8], "dropout": 0.5})


def weights_of(model):
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


def distilled(shop, teacher, *, student=None, **options):
    student = student or shop.new_student()
    history = shop.fit(student, name="student", teacher=teacher, **options)
    return student, history


@pytest.mark.parametrize("model", [None, BATCH_NORM, DROPOUT])
def test_the_same_seed_gives_the_same_bits_and_another_others(workshop, trained_teacher, model):
    teacher = trained_teacher()
    one, same, other = (
        weights_of(distilled(workshop(model=model, seed=seed), teacher)[0]) for seed in (3, 3, 4)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("labelled", [12, 48])
def test_a_kd_weight_of_zero_is_plain_training_bit_for_bit(
    workshop, trained_teacher, toy_rows, labelled
):
    rows = toy_rows(labelled=labelled)
    shop = workshop(rows=rows, objective={"ce": 1, "kd": 0})
    student, _ = distilled(shop, trained_teacher())
    twin = shop.new_student()
    shop.fit(twin, name="twin", teacher=None, objective=Objective.model_validate({"ce": 1}))
    assert torch.equal(weights_of(student), weights_of(twin))


def test_without_the_label_term_labels_decide_nothing(workshop, trained_teacher, toy_rows):
    teacher = trained_teacher()
    rows = toy_rows(labelled=48)
    wrong = dataclasses.replace(rows, labels=rows.labels.roll(1))
    one, other = (
        weights_of(distilled(workshop(rows=each, objective={"kd": 1}), teacher)[0])
        for each in (rows, wrong)
    )
    assert torch.equal(one, other)


def test_labels_that_the_student_may_not_see_decide_nothing(workshop, trained_teacher, toy_rows):
    teacher, rows = trained_teacher(), toy_rows(labelled=12)
    labels = rows.labels.clone()
    labels[12:] = labels[12:].roll(1)
    poisoned = dataclasses.replace(rows, labels=labels)
    one, other = (
        weights_of(distilled(workshop(rows=each), teacher)[0]) for each in (rows, poisoned)
    )
    assert torch.equal(one, other)


def test_test_rows_decide_nothing(workshop, trained_teacher, toy_rows):
    teacher, rows = trained_teacher(), toy_rows()
    poison = dataclasses.replace(rows, test_inputs=torch.full_like(rows.test_inputs, torch.nan))
    one, other = (weights_of(distilled(workshop(rows=each), teacher)[0]) for each in (rows, poison))
    assert torch.equal(one, other)


@pytest.mark.parametrize("model", [BATCH_NORM, DROPOUT])
def test_a_teacher_never_changes_and_is_never_in_training_mode(
    workshop, trained_teacher, toy_rows, model
):
    teacher = trained_teacher(model)
    before = weights_of(teacher)
    objective = {"ce": 1, "probe": {"kind": "kd"}}
    augmentation = {"gaussian_noise": 0.1}  # so that it is asked anew at every step
    distilled(workshop(objective=objective, augmentation=augmentation), teacher)
    teacher.train()
    nn.Sequential(teacher).train()
    assert not any(module.training for module in teacher.modules())
    assert torch.equal(weights_of(teacher), before)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    inputs = toy_rows().inputs
    assert torch.equal(teacher.member_logits(inputs), teacher.member_logits(inputs))


def test_a_student_trains_in_training_mode_in_every_step_and_is_left_in_evaluation_mode(
    workshop, trained_teacher
):
    shop = workshop(model=BATCH_NORM)
    student = shop.new_student()
    modes = []
    student.register_forward_pre_hook(
        lambda module, inputs: modes.append((module.training, len(inputs[0])))
    )
    _, history = distilled(shop, trained_teacher(), student=student)
    steps = 3 * 6
    training = [rows for mode, rows in modes if mode]
    assert len(training) == steps  # one forward pass a step, in every epoch
    assert set(training) == {8 + 8, 8 + 4}  # transfer and labelled rows together
    batches = next(b for name, b in student.named_buffers() if name.endswith("num_batches_tracked"))
    assert batches.item() == steps
    assert not student.training
    assert len(history.epochs) == 3


def test_steps_are_those_of_a_loop_written_by_hand(workshop, trained_teacher, toy_rows):
    rows = toy_rows(labelled=48)
    teacher = trained_teacher(rows=rows)
    shop = workshop(rows=rows, epochs=1, batch_size=48, optimizer={"name": "sgd", "lr": 0.1})
    student, _ = distilled(shop, teacher)
    by_hand = shop.new_student()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    logits, taught = by_hand(rows.inputs), teacher.member_logits(rows.inputs)[0]
    soft = F.kl_div(F.log_softmax(logits / 2, -1), F.softmax(taught / 2, -1), reduction="batchmean")
    (0.1 * F.cross_entropy(logits, rows.labels) + 0.9 * 4 * soft).backward()
    optimizer.step()
    assert torch.allclose(weights_of(student), weights_of(by_hand), atol=1e-6)


def test_a_cache_is_asked_by_row_id_so_no_order_can_misalign_it(toy_rows):
    rows = toy_rows()

    class Oracle(nn.Module):
        """Knows every row's label: the logits are the one-hot label."""

        def forward(self, inputs):
            distance = torch.cdist(inputs.flatten(1), rows.inputs.flatten(1))
            return 10 * F.one_hot(rows.labels[distance.argmin(1)], 3).float()

    cache = TeacherCache(Teacher([Oracle()], Combination()), rows.inputs)
    shuffled = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    for batch in shuffled.split(7):
        assert torch.equal(cache.logits(batch)[0].argmax(-1), rows.labels[batch])


def test_a_students_accuracy_follows_an_oracle(workshop, toy_rows):
    # The end-to-end twin of the test above: batches are shuffled, labels are unseen, and the
    # student can only become right through the targets of the right rows.
    rows = toy_rows(count=96, labelled=6)

    class Oracle(nn.Module):
        def forward(self, inputs):
            distance = torch.cdist(inputs.flatten(1), rows.inputs.flatten(1))
            return 10 * F.one_hot(rows.labels[distance.argmin(1)], 3).float()

    teacher = Teacher([Oracle()], Combination())
    shop = workshop(rows=rows, objective={"kd": 1}, epochs=30, optimizer={"lr": 0.01})
    student, _ = distilled(shop, teacher)
    agreement = (student(rows.inputs).argmax(-1) == rows.labels).double().mean()
    assert agreement == 1.0


def test_identical_teachers_are_one(workshop, trained_teacher):
    teacher = trained_teacher()
    three = Teacher([teacher.first] * 3, Combination())
    one, other = (distilled(workshop(epochs=1), each)[0].state_dict() for each in (teacher, three))
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], atol=1e-5)


def test_early_stopping_goes_back_to_the_best_weights(workshop, trained_teacher):
    seen = []
    shop = dataclasses.replace(
        workshop(
            epochs=40,
            optimizer={"lr": 0.05},
            early_stopping={"patience": 2, "mode": "min"},
        ),
        listener=lambda name, row: seen.append(dict(row)),
    )
    student, history = distilled(shop, trained_teacher())
    losses = [row["validation_loss"] for row in seen]
    assert len(losses) < 40
    assert history.best_epoch == losses.index(min(losses)) + 1
    logits = student(shop.rows.validation_inputs)
    now = F.cross_entropy(logits, shop.rows.validation_labels).item()
    assert now == pytest.approx(min(losses), rel=1e-6)
    assert now < losses[-1]


def test_rows_say_what_was_in_force(workshop, trained_teacher):
    table = {
        "ce": {"weight": {"kind": "linear", "start": 0, "end": 1}},
        "kd": {"temperature": {"kind": "linear", "start": 4, "end": 1}},
    }
    _, history = distilled(workshop(objective=table), trained_teacher())
    last = history.epochs[-1]
    assert last["weight/ce"] == 1.0
    assert last["temperature/kd"] == 1.0
    assert 1.0 < history.epochs[0]["temperature/kd"] < 4.0
    assert {"epoch", "loss/ce", "loss/kd", "validation_accuracy", "validation_loss"} <= set(last)


def test_no_hook_is_left_on_student_or_teacher(workshop, trained_teacher):
    teacher = trained_teacher()
    student, _ = distilled(workshop(), teacher)
    for model in (student, teacher):
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks


def test_what_a_term_needs_is_asked_for_before_the_first_step(workshop, trained_teacher, toy_rows):
    no_labels = workshop(rows=toy_rows(labelled=0))
    with pytest.raises(ValueError, match=r"objective.ce needs labelled rows.*private_rows"):
        distilled(no_labels, trained_teacher())
    student, _ = distilled(
        no_labels, trained_teacher(), objective=Objective.model_validate({"kd": 1})
    )
    assert torch.isfinite(weights_of(student)).all()


def test_the_same_view_makes_teacher_and_student_agree_where_they_are_the_same(
    workshop, trained_teacher
):
    teacher = trained_teacher()
    noise = {"gaussian_noise": 0.3, "horizontal_flip": 0.5, "cutout": 3}
    first = {}
    for view in ("same", "clean", "independent"):
        shop = workshop(
            objective={"kd": 1},
            epochs=1,
            batch_size=48,
            optimizer={"name": "sgd", "lr": 1e-9},
            augmentation={**noise, "teacher_view": view},
        )
        student = shop.build(ModelSettings(name="mlp"), 1, 0)
        student.load_state_dict(teacher.first.state_dict())
        _, history = distilled(shop, teacher, student=student)
        first[view] = history.epochs[0]["loss/kd"]
    assert first["same"] == pytest.approx(0, abs=1e-6)
    assert first["clean"] > 0.01
    assert first["independent"] > 0.01


@pytest.mark.parametrize("view", ["same", "clean"])
def test_mixed_images_have_mixed_targets(workshop, trained_teacher, toy_rows, view):
    rows = toy_rows(labelled=48)
    shop = workshop(
        rows=rows,
        epochs=12,
        augmentation={"mixup": 1.0, "teacher_view": view},
        optimizer={"lr": 0.01},
    )
    student, history = distilled(shop, trained_teacher(rows=rows))
    assert history.epochs[-1]["loss/kd"] < history.epochs[0]["loss/kd"]
    accuracy = (student(rows.test_inputs).argmax(-1) == rows.test_labels).double().mean()
    assert accuracy > 0.6


def ensemble(trained_teacher, **combination):
    small = ModelSettings(name="mlp", options={"hidden": [5]})
    members = trained_teacher(ModelSettings(name="mlp"), small).members
    return Teacher(list(members), Combination(**combination))


def test_a_step_in_which_no_term_is_in_force_changes_nothing(workshop, trained_teacher):
    late = {"kind": "step", "values": [0, 1], "milestones": [0.7]}
    shop = workshop(objective={"kd": {"weight": late}})
    _, history = distilled(shop, trained_teacher())
    assert ["loss/kd" in row for row in history.epochs] == [False, False, True]


def test_a_threshold_sees_the_target_without_temperature(workshop, trained_teacher):
    teacher = ensemble(trained_teacher, average="era", era_temperature=0.5)
    kept = []
    for temperature in (1, 4):
        shop = dataclasses.replace(
            workshop(objective={"kd": {"temperature": temperature}}),
            selection=Selection(confidence_threshold=0.75),
        )
        kept.append(distilled(shop, teacher)[1].epochs[0]["targets/kept"])
    assert kept[0] == kept[1] < 0.5


def test_an_ensembles_target_is_made_for_the_temperature_that_is_learned(
    workshop, trained_teacher, monkeypatch
):
    asked = []
    combine = Teacher.combine

    def noted(self, logits, **options):
        asked.append(options["temperature"])
        return combine(self, logits, **options)

    monkeypatch.setattr(Teacher, "combine", noted)
    shop = workshop(objective={"kd": {"learned": True}}, epochs=1)
    _, history = distilled(shop, ensemble(trained_teacher))
    assert asked[0] == pytest.approx(15.62, abs=0.01)
    assert history.epochs[0]["temperature/kd"] > 15


def test_an_ensembles_target_for_terms_of_two_temperatures_is_refused(workshop, trained_teacher):
    table = {"kd": {"temperature": 4}, "prob_mse": {"temperature": 1}}
    with pytest.raises(ValueError, match=r"objective.kd and objective.prob_mse have different"):
        distilled(workshop(objective=table), ensemble(trained_teacher))
    distilled(workshop(objective=table), ensemble(trained_teacher, average="logit"))
    distilled(workshop(objective=table), trained_teacher())


@pytest.mark.parametrize(
    ("objective", "teacher_view"),
    [({"dkd": 1}, "same"), ({"crd": 1}, "same"), ({"hint": 1}, "clean")],
)
def test_mixed_rows_have_no_label_no_id_and_no_features_of_one_row(
    workshop, trained_teacher, toy_rows, objective, teacher_view
):
    augmentation = {"mixup": 1.0, "teacher_view": teacher_view}
    shop = workshop(rows=toy_rows(labelled=48), objective=objective, augmentation=augmentation)
    with pytest.raises(ValueError, match=r"goes by single rows, which training.augmentation.mixup"):
        distilled(shop, trained_teacher())


def test_targets_that_no_term_follows_are_refused(workshop, trained_teacher):
    table = {"ce": 1, "rkd_distance": {"on": "logits"}}
    shop = dataclasses.replace(
        workshop(objective=table), selection=Selection(confidence_threshold=0.9)
    )
    with pytest.raises(ValueError, match=r"objective.rkd_distance compares rows with each other"):
        distilled(shop, trained_teacher())
