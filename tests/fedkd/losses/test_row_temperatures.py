"""A temperature for each row: values worked out by hand, and bounds."""

import math

import pytest
import torch

from fedkd.losses.response import soft_target_loss
from fedkd.losses.row_temperatures import (
    confidence_temperatures,
    disagreement_temperatures,
    row_temperature_kl,
)

STUDENT = torch.tensor([[1, 2, 3, 0], [0.5, -1, 0, 2]], dtype=torch.float64)
TEACHER = torch.tensor([[2, 1, 4, -1], [0, 0, 1, 3]], dtype=torch.float64)
ROW_TEMPERATURES = torch.tensor([1.5, 4.0], dtype=torch.float64)


def test_equal_row_temperatures_are_one_temperature():
    for scale_by_t2 in (True, False):
        rows = row_temperature_kl(
            STUDENT,
            TEACHER,
            torch.full((2,), 3.0, dtype=torch.float64),
            scale_by_t2=scale_by_t2,
        )
        whole = soft_target_loss(STUDENT, TEACHER, temperature=3.0, scale_by_t2=scale_by_t2)
        assert rows.item() == pytest.approx(whole.item(), rel=1e-12)


def test_each_row_is_softened_and_scaled_by_its_own_temperature():
    rows = [
        soft_target_loss(STUDENT[i : i + 1], TEACHER[i : i + 1], temperature=temperature)
        for i, temperature in enumerate([1.5, 4.0])
    ]
    loss = row_temperature_kl(STUDENT, TEACHER, ROW_TEMPERATURES)
    assert loss.item() == pytest.approx((rows[0] + rows[1]).item() / 2, rel=1e-12)


def test_disagreement_temperatures_match_values_worked_out_by_hand():
    # Cosines 1, 0 and -1: w = 0, 1, 2 with mean 1, squared 0, 1, 4 with mean 5/3.
    student = torch.tensor([[2.0, 0.0], [1.0, 0.0], [-3.0, 0.0]])
    teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    linear = disagreement_temperatures(student, teacher, temperature=4.0)
    assert linear.tolist() == pytest.approx([5.0, 4.0, 3.0])
    squared = disagreement_temperatures(student, teacher, temperature=4.0, beta=1.5, gamma=2.0)
    assert squared.tolist() == pytest.approx([4 + 2.5, 4 + 1.0, 4 - 3.5])


def test_confidence_temperatures_match_values_worked_out_by_hand():
    # The larger probabilities are 3/4 and 1/2.
    student = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    sure, unsure = 1 / 0.751, 1 / 0.501
    mean = (sure + unsure) / 2
    temperatures = confidence_temperatures(student, temperature=4.0, beta=2.0)
    assert temperatures.tolist() == pytest.approx([4 + 2 * (mean - sure), 4 + 2 * (mean - unsure)])


def test_no_row_s_temperature_falls_below_the_bound():
    student = torch.cat([torch.zeros(1, 50), 30 * torch.eye(50)])
    free = confidence_temperatures(student, temperature=1.0, min_temperature=1e-3)
    assert free[0].item() == pytest.approx(1e-3)
    assert confidence_temperatures(student, temperature=1.0)[0].item() == 0.5
    opposite = disagreement_temperatures(
        STUDENT, -STUDENT * torch.tensor([[1.0], [-1.0]]), temperature=1.0, beta=9.0
    )
    assert opposite.min().item() == 0.5


def test_row_temperatures_carry_no_gradient():
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    assert not disagreement_temperatures(student, teacher, temperature=4.0).requires_grad
    assert not confidence_temperatures(student, temperature=4.0).requires_grad
    temperatures = ROW_TEMPERATURES.clone().requires_grad_()
    row_temperature_kl(student, teacher, temperatures).backward()
    assert temperatures.grad is None
