"""A learned temperature: the usual loss, and a temperature whose gradient is reversed."""

import math

import pytest
import torch

from fedkd.losses.curriculum_temperature import LearnedTemperature, learned_temperature_kl
from fedkd.losses.response import soft_target_loss

STUDENT = torch.tensor([[1.0, 2, 3, 0], [0.5, -1, 0, 2]], dtype=torch.float64)
TEACHER = torch.tensor([[2.0, 1, 4, -1], [0, 0, 1, 3]], dtype=torch.float64)


@pytest.mark.parametrize(("temperature", "golden"), [(2.0, 0.25344814), (4.0, 0.32085861)])
def test_at_a_constant_temperature_it_is_the_usual_loss(temperature, golden):
    tensor = torch.tensor(temperature, dtype=torch.float64)
    loss = learned_temperature_kl(STUDENT, TEACHER, tensor)
    assert loss.item() == pytest.approx(golden, abs=1e-8)
    plain = learned_temperature_kl(STUDENT, TEACHER, tensor, scale_by_t2=False)
    assert plain.item() == pytest.approx(golden / temperature**2, abs=1e-8)
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64)
    one_row = learned_temperature_kl(STUDENT, TEACHER, tensor, sample_weights=weights)
    expected = soft_target_loss(STUDENT[:1], TEACHER[:1], temperature=temperature)
    assert one_row.item() == pytest.approx(expected.item(), abs=1e-12)


def test_gradients_reach_student_and_temperature_but_no_teacher():
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    temperature = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    learned_temperature_kl(student, teacher, temperature).backward()
    assert teacher.grad is None
    fixed = STUDENT.clone().requires_grad_()
    soft_target_loss(fixed, TEACHER, temperature=3.0).backward()
    assert torch.allclose(student.grad, fixed.grad, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda s, t: learned_temperature_kl(s, TEACHER, t),
        (STUDENT.clone().requires_grad_(), temperature.detach().clone().requires_grad_()),
    )


def test_the_temperature_starts_as_published_and_its_gradient_is_reversed_by_degrees():
    temperature = LearnedTemperature(until=0.5)
    # 1 + 20 * sigmoid(1)
    assert temperature(0.0).item() == pytest.approx(15.6212, abs=1e-4)
    slope = (
        20 * torch.sigmoid(torch.tensor(1.0)).item() * (1 - torch.sigmoid(torch.tensor(1.0)).item())
    )
    for progress, reversal in ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (1.0, 1.0)):
        temperature.theta.grad = None
        temperature(progress).backward()
        assert temperature.theta.grad.item() == pytest.approx(-reversal * slope, abs=1e-5)
        assert temperature(progress).item() == pytest.approx(15.6212, abs=1e-4)
    assert math.isfinite(temperature(1.0).item())


@pytest.mark.parametrize("until", [0.0, 1.5])
def test_the_share_of_the_reversal_has_a_range(until):
    with pytest.raises(ValueError, match="until must be in"):
        LearnedTemperature(until=until)


def test_members_of_a_stack_agree_with_each_alone():
    students = torch.stack([STUDENT, STUDENT.flip(0)])
    temperatures = torch.tensor([2.0, 4.0], dtype=torch.float64)
    stacked = torch.vmap(lambda s, t: learned_temperature_kl(s, TEACHER, t))(students, temperatures)
    alone = [
        learned_temperature_kl(s, TEACHER, t) for s, t in zip(students, temperatures, strict=True)
    ]
    assert torch.allclose(stacked, torch.stack(alone))
