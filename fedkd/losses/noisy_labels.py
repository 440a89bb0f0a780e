"""Losses that forgive wrong labels.

Conventions: the logits get the gradient; the result is averaged over the batch, in float32 or
wider; an empty batch costs 0. Everything works under ``torch.func.vmap`` and ``torch.func.grad``.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedkd.losses.response import hard_label_rows
from fedkd.losses.rows import check_weights, row_mean
from fedkd.targets import at_least_float32

LOG_OF_ZERO = math.log(1e-4)
"""What stands for the logarithm of 0 in a label, as in the authors' code; the paper's A is -4 or
-6."""


def symmetric_cross_entropy(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
    *,
    ce_weight: float = 0.1,
    reverse_weight: float = 1.0,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy in both directions: of the label by the model, and of the model by the label.

    Computes ``ce_weight * CE + reverse_weight * RCE`` with ``RCE = -sum_c p_c log(label_c)``, where
    the logarithm of a label's zeros is ``LOG_OF_ZERO``: so it is ``9.21 * (1 - p_label)``, whose
    gradient vanishes where the model is sure that the label is wrong. That of cross-entropy is
    largest there.

    Args:
        logits: unnormalised scores; gradients flow through these.
        labels: class of each row, in [0, classes).
        ce_weight: weight of cross-entropy, >= 0.
        reverse_weight: weight of the reverse cross-entropy, >= 0.
        sample_weights: >= 0, one per row, as in `fedkd.losses.response.soft_target_kl`.

    Returns:
        Loss in nats per example, >= 0.

    Raises:
        ValueError: if a weight is out of range.

    Source:
        Wang, Ma, Chen, Luo, Yi, Bailey, 2019, Symmetric Cross Entropy for Robust Learning with
        Noisy Labels. https://arxiv.org/abs/1908.06112
    """
    rows = symmetric_rows(logits, labels, ce_weight=ce_weight, reverse_weight=reverse_weight)
    return row_mean(rows, sample_weights)


def symmetric_rows(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
    *,
    ce_weight: float = 0.1,
    reverse_weight: float = 1.0,
) -> Float[Tensor, "batch"]:
    """Return what `symmetric_cross_entropy` averages, a number for each row."""
    check_weights(ce_weight=ce_weight, reverse_weight=reverse_weight)
    probabilities = torch.softmax(at_least_float32(logits), dim=-1)
    others = 1 - probabilities.gather(1, labels[:, None]).squeeze(1)
    reverse = -LOG_OF_ZERO * others
    return ce_weight * hard_label_rows(logits, labels) + reverse_weight * reverse
