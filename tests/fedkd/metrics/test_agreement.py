import math

import numpy as np
import pytest
import torch

from fedkd.metrics import (
    agreement_matrix,
    fidelity,
    fidelity_by_correctness,
    kl_matrix,
    mean_kl,
    top1_agreement,
)

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


def test_fidelity_is_split_by_whether_the_teacher_is_right():
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 40, 6, generator=generator).double()
    labels = torch.randint(6, (40,), generator=generator)
    labels[:15] = teacher[:15].argmax(1)
    right = teacher.argmax(1) == labels
    split = fidelity_by_correctness(teacher, student, labels)
    assert split.teacher_right == fidelity(teacher[right], student[right])
    assert split.teacher_wrong == fidelity(teacher[~right], student[~right])
    assert split.teacher_right.rows >= 15
    assert split.teacher_right.rows + split.teacher_wrong.rows == 40
    weighted = [part.rows * part.kl / 40 for part in (split.teacher_right, split.teacher_wrong)]
    assert sum(weighted) == pytest.approx(mean_kl(teacher, student))


def test_a_copied_mistake_shows_on_the_rows_that_the_teacher_gets_wrong():
    # The student agrees on rows 0 (teacher right) and 2 (teacher wrong), not on 1 (right).
    teacher, student = 5 * np.eye(3), 5 * np.eye(3)[[0, 0, 2]]
    split = fidelity_by_correctness(teacher, student, np.array([0, 1, 0]))
    assert (split.teacher_right.rows, split.teacher_wrong.rows) == (2, 1)
    assert split.teacher_right.agreement == 0.5
    assert split.teacher_wrong.agreement == 1
    assert split.teacher_wrong.kl == 0


def test_a_teacher_without_mistakes_leaves_that_half_unknown():
    split = fidelity_by_correctness(np.eye(3), np.eye(3), np.arange(3))
    assert split.teacher_wrong.rows == 0
    assert math.isnan(split.teacher_wrong.agreement)
    assert math.isnan(split.teacher_wrong.kl)


def test_matrices_hold_what_every_two_models_have():
    logits = np.random.default_rng(0).normal(size=(4, 9, 5))
    agreement, kl = agreement_matrix(logits), kl_matrix(torch.tensor(logits))
    for one in range(4):
        for other in range(4):
            assert agreement[one, other] == top1_agreement(logits[one], logits[other])
            assert kl[one, other] == pytest.approx(mean_kl(logits[one], logits[other]))
    assert (np.diagonal(agreement) == 1).all()
    assert (np.diagonal(kl) == 0).all()
    assert (agreement == agreement.T).all()
    assert abs(kl - kl.T).max() > 0.05


def test_the_matrix_has_p_in_rows_and_q_in_columns():
    matrix = kl_matrix(np.stack([TEACHER, STUDENT]))
    assert matrix[0, 1] == pytest.approx(0.12034999, abs=1e-8)
    assert matrix[1, 0] == pytest.approx(0.18976181, abs=1e-8)


def test_matrices_of_no_rows_are_unknown():
    assert np.isnan(agreement_matrix(np.zeros((2, 0, 3)))).all()
    assert np.isnan(kl_matrix(np.zeros((2, 0, 3)))).all()
