"""A toy problem: three classes of 8x8 images that a line can tell apart, mostly."""

import dataclasses

import pytest
import torch

from fedkd.distillation.fit.workshop import Workshop
from fedkd.distillation.task.participants import StudentSettings, TrainingSettings
from fedkd.distillation.task.rows import Rows
from fedkd.distillation.task.selection import Selection
from fedkd.models import ModelSettings
from fedkd.objectives import Objective


def images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centres = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(9))
    return centres[labels] + 1.2 * torch.randn(count, 1, 8, 8, generator=generator), labels


@pytest.fixture
def toy_rows():
    def make(*, count=48, labelled=12):
        inputs, labels = images(count, 1)
        validation, test = images(30, 2), images(60, 3)
        return Rows(
            inputs=inputs,
            labels=labels,
            labelled=labelled,
            validation_inputs=validation[0],
            validation_labels=validation[1],
            test_inputs=test[0],
            test_labels=test[1],
            num_classes=3,
            class_names=("a", "b", "c"),
            mean=torch.full((1, 1, 1), 0.5),
            std=torch.full((1, 1, 1), 0.25),
        )

    return make


@pytest.fixture
def hard_rows(toy_rows):
    """Return a function that makes the toy problem so noisy that models disagree about it."""

    def make(**options):
        rows = toy_rows(**options)
        noise = torch.Generator().manual_seed(4)

        def noisy(inputs):
            return inputs + 2.0 * torch.randn(inputs.shape, generator=noise)

        return dataclasses.replace(
            rows,
            inputs=noisy(rows.inputs),
            validation_inputs=noisy(rows.validation_inputs),
            test_inputs=noisy(rows.test_inputs),
        )

    return make


@pytest.fixture
def workshop(toy_rows):
    """Return a function that opens a workshop on the toy problem."""

    def make(*, rows=None, teacher=None, model=None, objective=None, seed=0, **training):
        return Workshop(
            rows=rows if rows is not None else toy_rows(),
            teacher=teacher,
            student=StudentSettings(
                model=model or ModelSettings(name="mlp", options={"hidden": [8]})
            ),
            training=TrainingSettings(**{"epochs": 3, "batch_size": 8, **training}),
            objective=Objective.model_validate(
                objective or {"ce": 0.1, "kd": {"weight": 0.9, "temperature": 2}}
            ),
            selection=Selection(),
            seed=seed,
            listener=lambda name, row: None,
        )

    return make


@pytest.fixture
def trained_teacher(workshop):
    """Return a function that trains a teacher on the toy problem."""
    from fedkd.distillation.task.combining import Combination
    from fedkd.distillation.task.teachers import Teacher

    def make(*models, rows=None):
        shop = workshop(rows=rows)
        members = []
        for number, model in enumerate(models or (ModelSettings(name="mlp"),)):
            member = shop.build(model, 1, number)
            shop.fit(
                member,
                name=f"teacher {number}",
                teacher=None,
                objective=Objective.model_validate({"ce": 1}),
                rows=shop.rows.all_labelled(),
                key=(1, number),
            )
            members.append(member)
        return Teacher(members, Combination())

    return make
