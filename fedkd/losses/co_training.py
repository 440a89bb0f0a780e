"""Co-training: models that see different views of the same rows and teach each other.

Agreement is pulled on rows without labels. What one view tells another is a constant; agreement
as a divergence is symmetric and moves all views. Results are float32 or wider, averaged over the
batch; an empty batch costs 0. All losses work under ``torch.func.vmap`` and ``torch.func.grad``.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedkd.losses.response import hard_label_loss, soft_cross_entropy
from fedkd.losses.rows import row_mean
from fedkd.targets import at_least_float32, check_temperature, confidence_mask, soften


class PseudoLabels(NamedTuple):
    """Labels that a model gives to rows, and which of them it is sure about.

    Attributes:
        labels: most likely class of each row; constants.
        mask: 1 for rows whose confidence reaches the threshold, else 0: ``sample_weights`` of a
            loss, which then divides by the number of rows kept.
        kept_fraction: mean of the mask, in [0, 1]; 0 for an empty batch.
    """

    labels: Int[Tensor, "batch"]
    mask: Float[Tensor, "batch"]
    kept_fraction: Float[Tensor, ""]


class PseudoLabelLosses(NamedTuple):
    """What each view pays for differing from the labels the other views are sure about.

    Attributes:
        losses: nats per row kept, one per view; 0 with a zero gradient where none is kept.
        kept_fractions: share of the rows that count, one per view, in [0, 1].
    """

    losses: Float[Tensor, "views"]
    kept_fractions: Float[Tensor, "views"]


def jensen_shannon_divergence(
    logits: Float[Tensor, "views batch classes"],
    *,
    temperature: float = 1.0,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """Make views agree: entropy of their mean prediction minus the mean of their entropies.

    Symmetric: the gradient reaches all views.

    Args:
        logits: unnormalised scores of two views or more for the same rows; gradients flow through
            all of these.
        temperature: softening divisor, > 0. No factor ``temperature**2`` is applied.
        sample_weights: >= 0, one per row; the loss is then the weighted mean.

    Returns:
        Loss in nats per row, in [0, log(views)]; 0 for a single view.

    Raises:
        ValueError: if ``temperature`` is not positive and finite, or there is no view.

    Source:
        Qiao et al., 2018, Deep Co-Training, equation 3. https://arxiv.org/abs/1803.05984
    """
    check_temperature(temperature)
    if len(logits) == 0:
        raise ValueError("co-training needs at least 1 view, got 0")
    log_p = torch.log_softmax(at_least_float32(logits) / temperature, dim=-1)
    # In logarithms, because p * log p of a probability that underflows has no finite gradient.
    mean_log_p = log_p.logsumexp(dim=0) - math.log(len(logits))
    row_losses = (log_p.exp() * (log_p - mean_log_p)).sum(dim=-1).mean(dim=0)
    return row_mean(row_losses, sample_weights)


def view_difference_loss(
    logits: Float[Tensor, "views batch classes"],
    crossed_logits: Float[Tensor, "views batch classes"],
    *,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """Keep views different: each resists the examples that mislead the view before it.

    View i has to give the prediction that view i - 1 makes on clean rows to the version of those
    rows that misleads view i - 1; the first follows the last. For two views that is the paper's
    constraint, the sum of both cross-entropies.

    Args:
        logits: unnormalised scores of every view on clean rows; treated as constants.
        crossed_logits: scores of view i on the adversarial examples of view i - 1 (see
            `fast_gradient_examples`); gradients flow through these.
        sample_weights: >= 0, one per row; the loss is then the weighted mean.

    Returns:
        Loss in nats per row, >= 0, summed over views.

    Raises:
        ValueError: if there are fewer than two views.

    Source:
        Qiao et al., 2018, Deep Co-Training, equation 5. https://arxiv.org/abs/1803.05984
    """
    if len(logits) < 2:
        raise ValueError(f"view difference needs at least 2 views, got {len(logits)}")
    targets = soften(logits.detach(), temperature=1.0).roll(1, dims=0)
    losses = [
        soft_cross_entropy(scores, target, sample_weights=sample_weights)
        for scores, target in zip(crossed_logits, targets, strict=True)
    ]
    return torch.stack(losses).sum()


def fast_gradient_examples(
    model: Callable[[Float[Tensor, "batch *features"]], Float[Tensor, "batch classes"]],
    inputs: Float[Tensor, "batch *features"],
    *,
    epsilon: float = 0.02,
) -> Float[Tensor, "batch *features"]:
    """Move inputs a small step in the direction that most misleads a model.

    ``inputs + epsilon * sign(gradient)`` of the cross-entropy against the model's own prediction.
    The model's parameters get no gradient. Put it in evaluation mode, else batch statistics move.

    Args:
        model: from inputs to logits.
        inputs: finite numbers; not changed.
        epsilon: step in the inputs' own unit, >= 0; the paper takes 0.02 of the pixel range.

    Returns:
        Constants, neither clipped nor scaled.

    Raises:
        ValueError: if ``epsilon`` is negative.

    Source:
        Goodfellow, Shlens, Szegedy, 2015, section 4. https://arxiv.org/abs/1412.6572
    """
    if not epsilon >= 0:
        raise ValueError(f"epsilon must be >= 0, got {epsilon}")
    with torch.enable_grad():
        leaf = inputs.detach().clone().requires_grad_()
        logits = model(leaf)
        loss = hard_label_loss(logits, logits.detach().argmax(dim=-1))
        (gradient,) = torch.autograd.grad(loss, leaf)
    return inputs.detach() + epsilon * gradient.sign()


def pseudo_labels(logits: Float[Tensor, "batch classes"], *, threshold: float) -> PseudoLabels:
    """Take a model's most likely classes as labels, with a mask of those it is sure about.

    Args:
        logits: unnormalised scores; treated as constants.
        threshold: least probability of the most likely class, >= 0; 0 keeps every row, above 1
            keeps none.

    Raises:
        ValueError: if ``threshold`` is negative or NaN.

    Source:
        Lee, 2013, Pseudo-Label; the threshold from Sohn et al., 2020, FixMatch (0.95).
        https://arxiv.org/abs/2001.07685
    """
    return _labels_of(soften(logits.detach(), temperature=1.0), threshold)


def cross_pseudo_label_losses(
    logits: Float[Tensor, "views batch classes"], *, threshold: float = 0.95
) -> PseudoLabelLosses:
    """Each view learns the labels that the OTHER views are sure about.

    With two views one teaches the other; with more, the mean of the others' probabilities does.

    Args:
        logits: unnormalised scores of every view for the same rows; as targets they are
            constants, so the losses of all views can be sent back together.
        threshold: least probability of the others' most likely class, as in `pseudo_labels`.

    Raises:
        ValueError: if there are fewer than two views, or ``threshold`` is negative or NaN.

    Source:
        Blum and Mitchell, 1998, Combining Labeled and Unlabeled Data with Co-Training;
        for networks Chen et al., 2021. https://arxiv.org/abs/2106.01226
    """
    num_views = len(logits)
    if num_views < 2:
        raise ValueError(f"co-training needs at least 2 views, got {num_views}")
    probabilities = soften(logits.detach(), temperature=1.0)
    # Summed anew for each view: the sum of all minus its own would round a sure view above 1.
    targets = [
        _labels_of(
            torch.stack([probabilities[j] for j in range(num_views) if j != i]).mean(dim=0),
            threshold,
        )
        for i in range(num_views)
    ]
    losses = [
        hard_label_loss(at_least_float32(scores), target.labels, sample_weights=target.mask)
        for scores, target in zip(logits, targets, strict=True)
    ]
    return PseudoLabelLosses(
        torch.stack(losses), torch.stack([target.kept_fraction for target in targets])
    )


def _labels_of(probabilities: Float[Tensor, "batch classes"], threshold: float) -> PseudoLabels:
    mask = confidence_mask(probabilities, threshold)
    return PseudoLabels(probabilities.argmax(dim=-1), mask, mask.sum() / max(len(mask), 1))
