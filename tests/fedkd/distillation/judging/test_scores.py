"""What a table of scores says of a model whose answers are known."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from fedkd.distillation.judging.scores import (
    finished_logits,
    score,
    teacher_on_training_rows,
    training_ids,
)
from fedkd.distillation.task.combining import Combination
from fedkd.distillation.task.teachers import Teacher

LOG3 = math.log(3.0)


class Says(nn.Module):
    """Reads the class to answer from the first pixel, at a confidence of 3/5 of 3 classes."""

    def __init__(self, shift: int = 0) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, inputs):
        classes = (inputs[:, 0, 0, 0].long() + self.shift) % 3
        return LOG3 * nn.functional.one_hot(classes, 3).float()


def says(classes):
    inputs = torch.zeros(len(classes), 1, 2, 2)
    inputs[:, 0, 0, 0] = torch.tensor(classes).float()
    return inputs


@pytest.fixture
def known_rows(toy_rows):
    """Return rows on which `Says` is right in 3 of 4 test rows and in every second validation row.

    Class 2 is never recognised.
    """
    return dataclasses.replace(
        toy_rows(count=6, labelled=2),
        inputs=says([0, 1, 2, 0, 1, 2]),
        labels=torch.tensor([0, 1, 2, 0, 1, 2]),
        validation_inputs=says([0, 1, 2, 0]),
        validation_labels=torch.tensor([0, 1, 0, 1]),
        test_inputs=says([0, 1, 0, 1]),
        test_labels=torch.tensor([0, 1, 2, 1]),
    )


def test_scores_of_a_model_whose_answers_are_known(known_rows):
    found = score(Says(), known_rows, None)
    assert found["accuracy"] == 0.75
    assert found["macro_recall"] == pytest.approx(2 / 3)
    assert found["worst_class_recall"] == 0.0
    assert found["per_class_recall"] == [1.0, 1.0, 0.0]
    # Every row has confidence 3/5, so there is one interval: |3/4 - 3/5|.
    for name in ("ece", "mce", "rmsce"):
        assert found[name] == pytest.approx(0.15, abs=1e-6)
    # Right: (2/5)^2 + 2 (1/5)^2 = 6/25; wrong: (3/5)^2 + (4/5)^2 + (1/5)^2 = 26/25.
    assert found["brier"] == pytest.approx((3 * 6 + 26) / 100, abs=1e-6)
    assert found["nll"] == pytest.approx(-(3 * math.log(3 / 5) + math.log(1 / 5)) / 4, abs=1e-6)
    # Validation rows are right half of the time: e^(ln 3 / T) = 2, whatever the test rows say.
    assert found["fitted_temperature"] == pytest.approx(LOG3 / math.log(2), rel=1e-6)
    assert found["ece_scaled"] == pytest.approx(0.75 - 0.5, abs=1e-6)
    assert not [name for name in found if "agreement" in name or "kl" in name]


def test_fidelity_is_split_by_whether_the_teacher_is_right(known_rows):
    class Follower(nn.Module):
        """Answers as the teacher where the first pixel is 0, else the next class."""

        def forward(self, inputs):
            logits = Says()(inputs)
            follows = inputs[:, :1, 0, 0] == 0
            return torch.where(follows, logits, logits.roll(1, dims=1))

    teacher = Teacher([Says()], Combination())
    taught = teacher.opinion(teacher.member_logits(known_rows.test_inputs)).numpy()
    found = score(Follower(), known_rows, taught, teacher_on_training_rows(teacher, known_rows))
    # Another class than the teacher's costs (3/5 - 1/5) ln 3 nats.
    apart = 0.4 * LOG3
    assert found["agreement"] == 0.5
    assert found["kl_to_teacher"] == pytest.approx(apart / 2, abs=1e-6)
    assert found["teacher_wrong_rows"] == 1
    assert found["agreement_teacher_right"] == pytest.approx(1 / 3)
    assert found["kl_teacher_right"] == pytest.approx(apart * 2 / 3, abs=1e-6)
    assert found["agreement_teacher_wrong"] == 1.0
    assert found["kl_teacher_wrong"] == pytest.approx(0, abs=1e-9)
    # Labelled rows begin with 0, 1; the others with 2, 0, 1, 2.
    assert found["agreement_labelled"] == 0.5
    assert found["agreement_unlabelled"] == 0.25
    assert found["kl_unlabelled"] == pytest.approx(apart * 3 / 4, abs=1e-6)


def test_what_has_no_rows_is_left_out(known_rows):
    rows = dataclasses.replace(known_rows, labelled=6, test_labels=torch.tensor([0, 1, 0, 1]))
    teacher = Teacher([Says()], Combination())
    taught = teacher.opinion(teacher.member_logits(rows.test_inputs)).numpy()
    found = score(Says(), rows, taught, teacher_on_training_rows(teacher, rows))
    assert found["teacher_wrong_rows"] == 0
    assert "agreement_teacher_wrong" not in found
    assert "agreement_unlabelled" not in found
    assert found["agreement_labelled"] == found["agreement_teacher_right"] == 1.0
    assert math.isnan(found.pop("per_class_recall")[2])
    assert np.isfinite(list(found.values())).all()


def test_many_training_rows_are_sampled_evenly_and_by_id(known_rows, monkeypatch):
    monkeypatch.setattr("fedkd.distillation.judging.scores.FIDELITY_ROWS", 2)
    ids = training_ids(known_rows)
    assert ids["labelled"].tolist() == [0, 1]
    assert ids["unlabelled"].tolist() == [2, 4]
    teacher = Teacher([Says()], Combination())
    assert teacher_on_training_rows(teacher, known_rows)["unlabelled"].argmax(1).tolist() == [2, 1]


def test_a_target_that_goes_by_labels_gets_those_of_its_rows(known_rows):
    by_labels = Teacher([Says(), Says(shift=1)], Combination(by="labels"))
    # The first teacher is right on every transfer row and the second on none.
    taught = teacher_on_training_rows(by_labels, known_rows)
    assert np.concatenate(list(taught.values())).argmax(1).tolist() == known_rows.labels.tolist()


def test_a_model_is_asked_once_for_a_set_of_rows(known_rows):
    class Counting(Says):
        asked = 0

        def forward(self, inputs):
            Counting.asked += 1
            return super().forward(inputs)

    predictions, model = finished_logits(known_rows), Counting()
    teacher = Teacher([model], Combination())
    taught = teacher_on_training_rows(teacher, known_rows, predictions)
    one = score(model, known_rows, None, taught, predictions)
    asked = Counting.asked
    assert score(model, known_rows, None, taught, predictions) == one
    assert Counting.asked == asked == 4  # test, validation, labelled and unlabelled rows
    assert score(model, known_rows, None, taught) == one


def test_a_model_that_diverged_has_scores_that_are_no_numbers(known_rows):
    class Diverged(Says):
        def forward(self, inputs):
            return super().forward(inputs) * float("nan")

    found = score(Diverged(), known_rows, np.zeros((4, 3), np.float32))
    assert all(math.isnan(found[name]) for name in ("accuracy", "ece", "agreement"))
    sound = score(Says(), known_rows, np.zeros((4, 3), np.float32))
    assert set(found) <= set(sound)
    told = score(Says(), known_rows, np.full((4, 3), np.nan, np.float32))
    assert told["accuracy"] == 0.75
    assert math.isnan(told["agreement"])
