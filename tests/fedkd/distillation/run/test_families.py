"""Every family of models can teach and can learn."""

import pytest
import torch

from fedkd.distillation.task.combining import Combination
from fedkd.distillation.task.teachers import Teacher
from fedkd.models import ModelSettings, known_models
from fedkd.objectives import Objective

SMALL = ModelSettings(name="mlp", options={"hidden": [4]})


def one_step(shop, student_model, teacher_model):
    teacher = Teacher([shop.build(teacher_model, 1, 0)], Combination())
    student = shop.build(student_model, 0, 0)
    before = torch.cat([weight.flatten() for weight in student.parameters()]).clone()
    history = shop.fit(
        student,
        name="student",
        teacher=teacher,
        objective=Objective.model_validate({"kd": {"temperature": 2}, "cosine": 0.1}),
    )
    after = torch.cat([weight.flatten() for weight in student.parameters()])
    return history.epochs[0], (after - before).abs()


@pytest.mark.parametrize("name", known_models())
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_step_of_distillation_moves_the_student(name, role, workshop, toy_rows):
    model = ModelSettings(name=name)
    shop = workshop(rows=toy_rows(count=6, labelled=6), epochs=1, batch_size=6)
    pair = (SMALL, model) if role == "teacher" else (model, SMALL)
    row, moved = one_step(shop, *pair)
    assert row["loss/kd"] > 0
    assert torch.isfinite(moved).all()
    assert moved.max() > 0
