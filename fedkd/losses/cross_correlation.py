"""FCCL: what a model says of each class goes with what others say of it, and with nothing else.

Conventions: the student's logits get the gradient, whatever they are compared with is a constant;
everything is in float32 or wider. The loss compares the rows of a batch, so it is no mean of rows.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fedkd.losses.rows import check_weights
from fedkd.targets import at_least_float32


def cross_correlation_loss(
    student_logits: Float[Tensor, "batch classes"],
    target_logits: Float[Tensor, "batch classes"],
    *,
    off_diagonal_weight: float = 0.0051,
) -> Float[Tensor, ""]:
    """Make the cross-correlation of two tables of logits 1 on the diagonal and -1 beside it.

    Computes ``sum_i (c_ii - 1)**2 + off_diagonal_weight * sum_{i != j} (c_ij + 1)**2`` of
    `cross_correlation`. Constants and scales of a class's logits make no difference.

    Args:
        student_logits: unnormalised scores; gradients flow through these.
        target_logits: unnormalised scores of the same rows; treated as constants.
        off_diagonal_weight: of the pairs of different classes, >= 0.

    Returns:
        Loss >= 0, without unit; 0, without gradient, of fewer than two rows.

    Raises:
        ValueError: if the weight is out of range.

    Source:
        Huang, Ye, Du, 2022, Learn from Others and Be Yourself in Heterogeneous Federated Learning,
        equation 4; the weight is that of the authors' code.
    """
    check_weights(off_diagonal_weight=off_diagonal_weight)
    matrix = cross_correlation(student_logits, target_logits)
    if len(student_logits) < 2:
        return matrix.sum()
    diagonal = torch.diagonal(matrix)
    beside = (matrix + 1).square().sum() - (diagonal + 1).square().sum()
    return (diagonal - 1).square().sum() + off_diagonal_weight * beside


def cross_correlation(
    student_logits: Float[Tensor, "batch classes"],
    target_logits: Float[Tensor, "batch classes"],
) -> Float[Tensor, "classes classes"]:
    """Correlate each class's logits of one table with each class's of another, over the batch.

    As in the authors' code each column is divided by its unbiased standard deviation and the
    product by the number of rows B, so that equal tables have ``(B - 1) / B`` on the diagonal.

    Args:
        student_logits: unnormalised scores; gradients flow through these.
        target_logits: unnormalised scores of the same rows; treated as constants.

    Returns:
        Within [-1, 1]; 0, without gradient, for a class whose logits are the same in all rows, and
        everywhere with fewer than two rows.
    """
    own, other = at_least_float32(student_logits), at_least_float32(target_logits.detach())
    if len(own) < 2:
        return 0 * (own.t() @ other)
    return _standardised(own).t() @ _standardised(other) / len(own)


def _standardised(logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
    """Take the mean off each column and divide by its deviation; constant ones become 0."""
    centred = logits - logits.mean(dim=0)
    # What is left of a constant column is rounding, and would be blown up to the size of others.
    rounding = 8 * torch.finfo(logits.dtype).eps * logits.abs().amax(dim=0)
    # Not `> rounding`, which NaN fails: it would be taken for a constant column.
    constant = centred.abs().amax(dim=0) <= rounding
    variance = centred.square().sum(dim=0) / (len(logits) - 1)
    # The root of 0 has no gradient, whatever is chosen afterwards.
    deviation = torch.where(constant, torch.ones_like(variance), variance).sqrt()
    return torch.where(constant, torch.zeros_like(centred), centred / deviation)
