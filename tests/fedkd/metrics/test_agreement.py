import math

import numpy as np
import pytest
import torch

from fedkd.metrics import mean_kl, top1_agreement

STUDENT = np.array([[1, 2, 3, 0], [0.5, -1, 0, 2]])
TEACHER = np.array([[2, 1, 4, -1], [0, 0, 1, 3.0]])


def test_kl_has_the_teacher_first():
    assert mean_kl(TEACHER, STUDENT) == pytest.approx(0.12034999, abs=1e-8)
    assert mean_kl(STUDENT, TEACHER) == pytest.approx(0.18976181, abs=1e-8)


def test_kl_agrees_with_torch():
    teacher, student = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(0)).double()
    expected = torch.nn.functional.kl_div(
        student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True
    )
    assert mean_kl(teacher, student) == pytest.approx(expected.item())


def test_kl_is_zero_between_equal_predictions_whatever_the_shift():
    assert mean_kl(TEACHER, TEACHER + 1000.0) == pytest.approx(0, abs=1e-12)


def test_agreement_counts_rows_with_the_same_first_class():
    assert top1_agreement(TEACHER, STUDENT) == 1
    assert top1_agreement(torch.tensor(TEACHER), torch.tensor(STUDENT[::-1].copy())) == 0
    assert top1_agreement(np.eye(4), np.eye(4)[[0, 1, 3, 2]]) == 0.5


def test_no_rows_agree_on_nothing():
    assert math.isnan(top1_agreement(np.zeros((0, 3)), np.zeros((0, 3))))
    assert math.isnan(mean_kl(np.zeros((0, 3)), np.zeros((0, 3))))
