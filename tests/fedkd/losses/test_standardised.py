"""Standardised logits: values of another library, and sizes they do not see."""

import pytest
import torch
from torch import Tensor

from fedkd.losses.standardised import standardise_logits, standardised_kd

STUDENT = torch.tensor([[1, 2, 3, 0], [0.5, -1, 0, 2]], dtype=torch.float64)
TEACHER = torch.tensor([[2, 1, 4, -1], [0, 0, 1, 3]], dtype=torch.float64)


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("temperature", "value"), [(1.0, 0.0606121450), (2.0, 0.0868583596)])
def test_standardised_kd_matches_another_library(temperature: float, value: float):
    loss = standardised_kd(STUDENT, TEACHER, temperature=temperature)
    assert loss.item() == pytest.approx(value, abs=1e-9)


def test_standardised_rows_have_mean_0_and_unbiased_deviation_1():
    rows = standardise_logits(random_logits(3, 5))
    assert rows.mean(dim=1).abs().max() < 1e-12
    torch.testing.assert_close(
        rows.std(dim=1), torch.ones(3, dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_standardised_kd_does_not_see_the_size_of_the_logits():
    torch.testing.assert_close(
        standardised_kd(5 * STUDENT, 0.1 * TEACHER),
        standardised_kd(STUDENT, TEACHER),
        rtol=1e-5,
        atol=0,
    )
