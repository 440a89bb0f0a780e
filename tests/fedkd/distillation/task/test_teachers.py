"""Teachers: frozen, combined by their settings, regularised on their own."""

import pytest
import torch
from torch import nn

from fedkd.distillation.run.checking import check
from fedkd.distillation.run.running import distill
from fedkd.distillation.settings import DistillSettings
from fedkd.distillation.task.combining import Combination
from fedkd.distillation.task.teachers import Teacher

LOGITS = 2 * torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def settings_with(teacher=None, *, combine=None, models=("mlp",), **changes):
    return DistillSettings.model_validate(
        {
            "teacher": {
                "models": [{"name": name, "options": {"hidden": [16]}} for name in models],
                "training": {"epochs": 3, "batch_size": 8},
                "combine": combine or {},
                **(teacher or {}),
            },
            "student": {"model": {"name": "mlp", "options": {"hidden": [8]}}},
            "training": {"epochs": 1, "batch_size": 8},
            **changes,
        }
    )


def weights_of(model):
    return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])


def teacher_of(**combine):
    return Teacher([nn.Identity(), nn.Identity()], Combination(**combine))


def test_a_teacher_stays_in_evaluation_mode_and_without_gradients():
    teacher = Teacher([nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))], Combination())
    nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_teacher_without_a_model_is_refused():
    with pytest.raises(ValueError, match="at least one model"):
        Teacher([], Combination())


def test_one_teacher_is_its_own_target_unless_era_sharpens_it():
    one = Teacher([nn.Identity()], Combination(by="confidence"))
    assert torch.equal(one.combine(LOGITS[:1], temperature=4.0).logits(), LOGITS[0])
    sharp = Teacher([nn.Identity()], Combination(average="era"))
    target = sharp.combine(LOGITS[:1], temperature=4.0).probabilities(4.0)
    assert target == pytest.approx((LOGITS[0].softmax(-1) / 0.1).softmax(-1), abs=1e-6)


def test_an_opinion_about_unknown_rows_uses_no_labels():
    by_labels, uniform = teacher_of(by="labels"), teacher_of()
    expected = uniform.combine(LOGITS, temperature=1.0).logits()
    assert torch.equal(by_labels.opinion(LOGITS), expected)
    routed = Teacher([nn.Identity()], Combination(), torch.tensor([0, 0, 1]))
    assert torch.equal(routed.opinion(LOGITS[:1]), LOGITS[0])


def test_only_a_target_of_inputs_alone_suffices_without_rows():
    teacher_of(by="entropy").check_inputs_suffice("dafl")
    with pytest.raises(ValueError, match=r"combine.by: labels .* 'dafl'"):
        teacher_of(by="labels").check_inputs_suffice("dafl")
    routed = Teacher([nn.Identity()], Combination(), torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match=r"set teacher.heads=all"):
        routed.check_inputs_suffice("dafl")


def test_by_labels_is_refused_before_anything_trains_where_rows_have_none(toy_rows):
    settings = settings_with(combine={"by": "labels"}, models=("mlp", "mlp"))
    message = r"teacher.combine.by: labels needs the labels .* 36 of 48 .* use uniform"
    with pytest.raises(ValueError, match=message):
        check(settings, toy_rows())
    check(settings, toy_rows(labelled=48))


@pytest.mark.parametrize("by", ["confidence", "entropy", "labels"])
def test_a_student_learns_something_else_from_teachers_that_are_weighed(
    toy_rows, workshop, trained_teacher, by
):
    rows = toy_rows(labelled=48)
    members = [trained_teacher().first, workshop(rows=rows).new_student()]
    students = []
    for rule in ("uniform", by, by):
        shop = workshop(rows=rows, epochs=1)
        student = shop.new_student()
        teacher = Teacher(members, Combination(by=rule))
        shop.fit(student, name="student", teacher=teacher)
        students.append(weights_of(student))
    assert torch.equal(students[1], students[2])
    assert not torch.allclose(students[0], students[1], atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"models": {"name": "mlp", "options": {"hidden": [16], "dropout": 0.5}}},
        {"training": {"epochs": 3, "batch_size": 8, "optimizer": {"weight_decay": 0.1}}},
        {"label_smoothing": 0.2},
    ],
    ids=["dropout", "weight_decay", "label_smoothing"],
)
def test_each_regularisation_acts_on_the_teacher_only(toy_rows, changes):
    rows = toy_rows()
    plain = distill(settings_with(), rows=rows)
    regularised = distill(settings_with(changes), rows=rows)
    teachers, twins, students = (
        [weights_of(result.models[name]) for result in (plain, regularised)]
        for name in ("teacher", "twin", "student")
    )
    assert not torch.allclose(*teachers, atol=1e-4)
    assert torch.equal(*twins)
    # The student, trained without it, hears of it through its teacher.
    assert not torch.equal(*students)
    assert not any(isinstance(part, nn.Dropout) for part in regularised.models["student"].modules())
    # How to see what it does to calibration: the teacher's error before and after.
    calibration = [result.scores["teacher"]["ece"] for result in (plain, regularised)]
    assert all(0 <= error <= 1 for error in calibration)


def test_label_smoothing_makes_a_teacher_less_sure(toy_rows):
    rows = toy_rows()
    sureness = []
    for smoothing in (0.0, 0.4):
        result = distill(
            settings_with(
                {"label_smoothing": smoothing, "training": {"epochs": 15, "batch_size": 8}}
            ),
            rows=rows,
        )
        logits = result.models["teacher"](rows.inputs)
        sureness.append(logits.softmax(-1).amax(-1).mean().item())
    assert sureness[1] < sureness[0] - 0.1
