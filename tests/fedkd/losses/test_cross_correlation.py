"""FCCL's loss: published values, and what would divide by zero."""

import pytest
import torch

from fedkd.losses.cross_correlation import cross_correlation, cross_correlation_loss

OWN = torch.tensor([[1, 2, 0], [0, 1, 3], [2, 0, 1]], dtype=torch.float64)
OTHER = torch.tensor([[2, 1, 0], [1, 0, 2], [0, 2, 1]], dtype=torch.float64)
MEAN = (OWN + OTHER) / 2


def test_matches_the_published_value():
    # Against the mean of all, itself included: 1.00125845 on the diagonal, 4.69762155 beside it.
    on = cross_correlation_loss(OWN, MEAN, off_diagonal_weight=0.0)
    both = cross_correlation_loss(OWN, MEAN, off_diagonal_weight=1.0)
    assert on.item() == pytest.approx(1.00125845, abs=1e-8)
    assert (both - on).item() == pytest.approx(4.69762155, abs=1e-8)
    assert cross_correlation_loss(OWN, MEAN).item() == pytest.approx(1.02521632, abs=1e-8)


def test_equal_tables_correlate_by_less_than_one():
    """Published fault: an unbiased deviation and a division by B make the diagonal (B - 1) / B.

    Kept, since all of the authors' numbers are of it; with a biased one the golden example would
    be 0.52564572.
    """
    diagonal = torch.diagonal(cross_correlation(OWN, OWN))
    assert diagonal.tolist() == pytest.approx([2 / 3] * 3, abs=1e-12)


def test_scale_and_shift_of_a_class_make_no_difference():
    moved = OWN * torch.tensor([2.0, 0.5, 7.0]) + torch.tensor([1.0, -3.0, 0.0])
    assert cross_correlation_loss(moved, MEAN).item() == pytest.approx(
        cross_correlation_loss(OWN, MEAN).item(), abs=1e-12
    )


@pytest.mark.parametrize("rows", [0, 1])
def test_fewer_than_two_rows_cost_nothing(rows):
    """Published fault: a batch of one row has no deviation, and the loss is NaN."""
    own = OWN[:rows].clone().requires_grad_()
    loss = cross_correlation_loss(own, MEAN[:rows])
    loss.backward()
    assert loss.item() == 0
    assert own.grad is not None
    assert torch.equal(own.grad, torch.zeros_like(own))


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
@pytest.mark.parametrize("whose", ["own", "others"])
def test_a_class_with_the_same_score_everywhere_is_uncorrelated(whose, value):
    """Published fault: a constant column of logits divides by zero, and the loss is NaN."""
    own, others = OWN.float(), MEAN.float()
    table = own if whose == "own" else others
    table[:, 1] = value
    own.requires_grad_()
    matrix = cross_correlation(own, others)
    line = matrix[1] if whose == "own" else matrix[:, 1]
    assert line.tolist() == [0, 0, 0]
    loss = cross_correlation_loss(own, others)
    loss.backward()
    assert torch.isfinite(loss)
    assert own.grad is not None
    assert torch.isfinite(own.grad).all()
    if whose == "own":
        assert own.grad[:, 1].tolist() == [0, 0, 0]


def test_the_target_gets_no_gradient():
    own, others = OWN.clone().requires_grad_(), MEAN.clone().requires_grad_()
    cross_correlation_loss(own, others).backward()
    assert others.grad is None
    assert own.grad is not None
    assert own.grad.abs().sum() > 0


def test_works_stacked():
    stacked = torch.vmap(cross_correlation_loss)(torch.stack([OWN, OTHER]), torch.stack([MEAN] * 2))
    each = [cross_correlation_loss(own, MEAN).item() for own in (OWN, OTHER)]
    assert stacked.tolist() == pytest.approx(each, abs=1e-12)


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match="off_diagonal_weight must be >= 0 and finite, got -1"):
        cross_correlation_loss(OWN, MEAN, off_diagonal_weight=-1.0)
