"""Distances of scores: values worked out by hand."""

import math

import pytest
import torch

from fedkd.losses.distances import annealing_kd, logit_mse, probability_mse

STUDENT = torch.tensor([[1, 2, 3, 0], [0.5, -1, 0, 2]], dtype=torch.float64)
TEACHER = torch.tensor([[2, 1, 4, -1], [0, 0, 1, 3]], dtype=torch.float64)


def test_probability_mse_matches_a_value_worked_out_by_hand():
    # (2 ln 3, 0) at T=2 is (3/4, 1/4), the student is uniform: both differ by 1/4.
    teacher, student = torch.tensor([[2 * math.log(3.0), 0.0]]), torch.zeros(1, 2)
    loss = probability_mse(student, teacher, temperature=2.0)
    assert loss.item() == pytest.approx(1 / 16, rel=1e-6)


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.1), (0.5, 0.55), (1.0, 1.0)])
def test_annealing_grows_the_teacher_to_its_full_size(progress: float, share: float):
    # T = 10, 5.5 and 1: the share is 1 - (T - 1) / 10.
    loss = annealing_kd(STUDENT, TEACHER, progress=progress, max_temperature=10.0)
    assert loss.item() == pytest.approx(logit_mse(STUDENT, share * TEACHER).item(), rel=1e-12)


def test_annealing_from_temperature_1_is_the_logit_mse_throughout():
    for progress in (0.0, 0.3, 1.0):
        loss = annealing_kd(STUDENT, TEACHER, progress=progress, max_temperature=1.0)
        assert torch.equal(loss, logit_mse(STUDENT, TEACHER))
