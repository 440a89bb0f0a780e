"""DKD, NKD and NTD: published values, and what the label has no part in."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedkd.losses.other_classes import decoupled_kd, normalised_kd, not_true_loss
from fedkd.losses.response import soft_target_loss

STUDENT = torch.tensor([[1, 2, 3, 0], [0.5, -1, 0, 2]], dtype=torch.float64)
TEACHER = torch.tensor([[2, 1, 4, -1], [0, 0, 1, 3]], dtype=torch.float64)
LABELS = torch.tensor([2, 0])
Loss = Callable[..., Tensor]


def gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    (result,) = torch.autograd.grad(loss(leaf), leaf)
    return result


def test_decoupled_kd_matches_the_reference_values():
    label_part = decoupled_kd(STUDENT, TEACHER, LABELS, beta=0.0)
    other_part = decoupled_kd(STUDENT, TEACHER, LABELS, alpha=0.0, beta=1.0)
    assert label_part.item() == pytest.approx(0.18233894, abs=1e-8)
    assert other_part.item() == pytest.approx(0.23996941, abs=1e-8)
    assert decoupled_kd(STUDENT, TEACHER, LABELS).item() == pytest.approx(2.10209423, abs=1e-8)


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_is_its_two_parts_weighted_by_the_teacher(row: int, temperature: float):
    student, teacher, label = STUDENT[row : row + 1], TEACHER[row : row + 1], LABELS[row : row + 1]
    sureness = torch.softmax(teacher / temperature, dim=1)[0, label].item()
    parts = decoupled_kd(
        student, teacher, label, alpha=1.0, beta=1 - sureness, temperature=temperature
    )
    whole = soft_target_loss(student, teacher, temperature=temperature)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-12)


def test_normalised_kd_matches_the_reference_value():
    assert normalised_kd(STUDENT, TEACHER, LABELS).item() == pytest.approx(1.50242476, abs=1e-8)


def test_normalised_kd_softens_the_other_classes_only():
    # Without them the temperature is nowhere; with them it is squared.
    label_only = normalised_kd(STUDENT, TEACHER, LABELS, gamma=0.0, temperature=5.0)
    by_hand = -(torch.softmax(TEACHER, 1) * torch.log_softmax(STUDENT, 1))[[0, 1], LABELS].mean()
    assert label_only.item() == pytest.approx(by_hand.item(), rel=1e-12)
    others = normalised_kd(STUDENT, TEACHER, LABELS, gamma=2.0, temperature=3.0) - label_only
    kept = [[0, 1, 3], [1, 2, 3]]
    s = torch.log_softmax(torch.stack([STUDENT[i, kept[i]] for i in range(2)]) / 3, 1)
    t = torch.softmax(torch.stack([TEACHER[i, kept[i]] for i in range(2)]) / 3, 1)
    assert others.item() == pytest.approx(-2 * 9 * (t * s).sum(1).mean().item(), rel=1e-12)


def test_not_true_loss_is_the_divergence_with_the_label_s_column_cut_out():
    kept = [[0, 1, 3], [1, 2, 3]]
    student, teacher = (
        torch.stack([logits[i, kept[i]] for i in range(2)]) for logits in (STUDENT, TEACHER)
    )
    expected = soft_target_loss(student, teacher, temperature=3.0, scale_by_t2=False)
    assert expected.item() == pytest.approx(0.0269967590, abs=1e-10)
    assert not_true_loss(STUDENT, TEACHER, LABELS).item() == pytest.approx(
        expected.item(), rel=1e-12
    )
    scaled = not_true_loss(STUDENT, TEACHER, LABELS, scale_by_t2=True)
    assert scaled.item() == pytest.approx(9 * expected.item(), rel=1e-12)


def test_normalised_kd_still_pulls_an_equal_student_towards_the_label():
    grad = gradient(lambda s: normalised_kd(s, TEACHER, LABELS), TEACHER)
    p = torch.softmax(TEACHER, dim=1)
    label = F.one_hot(LABELS, 4)
    expected = p[[0, 1], LABELS][:, None] * (p - label) / 2
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)


def test_not_true_loss_leaves_the_label_s_own_score_alone():
    grad = gradient(lambda s: not_true_loss(s, TEACHER, LABELS), STUDENT)
    assert grad[[0, 1], LABELS].abs().max() == 0
    assert (grad != 0).sum() == 6
    moved = STUDENT.clone()
    moved[[0, 1], LABELS] += 7.0
    torch.testing.assert_close(
        not_true_loss(moved, TEACHER, LABELS), not_true_loss(STUDENT, TEACHER, LABELS)
    )


def test_other_classes_weigh_the_same_however_sure_the_teacher_is():
    sure = TEACHER.clone()
    sure[[0, 1], LABELS] += 20.0
    for teacher in (TEACHER, sure):
        part = decoupled_kd(STUDENT, teacher, LABELS, alpha=0.0, beta=1.0)
        assert part.item() == pytest.approx(0.23996941, abs=1e-8)


def test_label_part_of_a_sure_student_keeps_its_slope():
    # 1 - softmax is 0 in float32 here, so its logarithm would have no slope.
    student, teacher = torch.tensor([[60.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.0]])
    label = torch.tensor([0])

    def label_part(logits: Tensor) -> Tensor:
        return decoupled_kd(logits, teacher, label, beta=0.0, temperature=1.0)

    # 1/3 ln(1/3) + 2/3 (ln 2/3 - (ln 2 - 60))
    assert label_part(student).item() == pytest.approx(40 - math.log(3.0), rel=1e-5)
    assert gradient(label_part, student)[0, 0].item() == pytest.approx(2 / 3, rel=1e-5)


@pytest.mark.parametrize("loss", [decoupled_kd, normalised_kd, not_true_loss])
def test_two_classes_leave_no_distribution_over_the_others(loss: Loss):
    message = rf"^{loss.__name__} needs at least 3 classes, got 2"
    with pytest.raises(ValueError, match=message):
        loss(STUDENT[:, :2], TEACHER[:, :2], torch.tensor([1, 0]))
