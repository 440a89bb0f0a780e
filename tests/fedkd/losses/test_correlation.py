"""DIST: values of another library, scales it does not see, and rows without variance."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedkd.losses.correlation import dist_loss
from fedkd.losses.response import soft_target_loss

STUDENT = torch.tensor([[1, 2, 3, 0], [0.5, -1, 0, 2]], dtype=torch.float64)
TEACHER = torch.tensor([[2, 1, 4, -1], [0, 0, 1, 3]], dtype=torch.float64)


def gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    (result,) = torch.autograd.grad(loss(leaf), leaf)
    return result


# The values of torchdistill 1.1.5, DISTLoss and LogitStdKDLoss (times T^2), in float64.
@pytest.mark.parametrize(
    ("beta", "gamma", "temperature", "value"),
    [
        (1.0, 1.0, 1.0, 0.5353799498),
        (1.0, 0.0, 1.0, 0.0353799498),
        (0.0, 1.0, 1.0, 0.5),
        (2.0, 2.0, 4.0, 19.5409684103),
    ],
)
def test_dist_loss_matches_another_library(
    beta: float, gamma: float, temperature: float, value: float
):
    loss = dist_loss(STUDENT, TEACHER, beta=beta, gamma=gamma, temperature=temperature)
    assert loss.item() == pytest.approx(value, abs=1e-9)


def test_dist_loss_does_not_see_the_scale_of_a_row_s_probabilities():
    # p and (p + 1/C) / 2 correlate perfectly, within rows and within classes.
    p = torch.softmax(TEACHER, dim=1)
    flattened = ((p + 0.25) / 2).log()
    assert abs(dist_loss(flattened, TEACHER).item()) < 1e-12
    assert soft_target_loss(flattened, TEACHER, temperature=1.0).item() > 0.1


def test_a_batch_of_one_has_no_correlation_within_classes():
    row, teacher = STUDENT[:1], TEACHER[:1]
    alone = dist_loss(row, teacher, beta=1.0, gamma=3.0)
    assert alone.item() == pytest.approx(
        dist_loss(row, teacher, beta=1.0, gamma=0.0).item() + 3.0, rel=1e-12
    )
    without = gradient(lambda s: dist_loss(s, teacher, gamma=0.0), row)
    assert torch.equal(gradient(lambda s: dist_loss(s, teacher, gamma=3.0), row), without)
