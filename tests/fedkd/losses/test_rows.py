"""What the losses share: cosines at the edge."""

import pytest
import torch

from fedkd.losses.rows import cosine_similarity


def test_a_row_of_zeros_has_cosine_0_and_no_gradient():
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    cosines = cosine_similarity(rows, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert cosines.tolist() == pytest.approx([0.0, 0.6])
    cosines.sum().backward()
    assert rows.grad[0].abs().max() == 0
    assert rows.grad[1].norm() > 0.1
