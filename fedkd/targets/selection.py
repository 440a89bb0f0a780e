"""Which rows count, and how much: by what a target is sure of, or by how hard a row is.

Every weight here is meant as ``sample_weights`` of a loss, which divides by their sum. Weights sum
to the number of rows, so that uniform ones are all 1 and leave a loss as it was; masks hold 0 and
1. No function branches on data, so all of them work under ``torch.func.vmap``.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fedkd.schedules import linear
from fedkd.targets.softening import at_least_float32


def confidence(target: Float[Tensor, "rows classes"]) -> Float[Tensor, "rows"]:
    """Return the probability of each row's most likely class, in [1/classes, 1]."""
    return at_least_float32(target).amax(dim=-1)


def confidence_mask(
    target: Float[Tensor, "rows classes"], threshold: float
) -> Float[Tensor, "rows"]:
    """Mark with 1 the rows whose `confidence` is at least ``threshold``, with 0 the others.

    Meant as ``sample_weights`` of a loss, which then divides by the number of rows kept.

    Args:
        target: class probabilities.
        threshold: >= 0; 0 keeps every row, above 1 keeps none.

    Raises:
        ValueError: if ``threshold`` is negative or NaN.

    Examples:
        >>> import torch
        >>> from fedkd.targets import confidence_mask
        >>> confidence_mask(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), 0.8)
        tensor([1., 0.])
    """
    if not threshold >= 0:
        raise ValueError(f"confidence threshold must be >= 0, got {threshold}")
    row_confidence = confidence(target)
    # A row of NaN stays, so that the loss shows it.
    return (~(row_confidence < threshold)).to(row_confidence.dtype)


def entropy(probabilities: Float[Tensor, "rows classes"]) -> Float[Tensor, "rows"]:
    """Return each row's entropy in nats, from 0 (one class) to log(classes) (uniform).

    Examples:
        >>> import torch
        >>> from fedkd.targets import entropy
        >>> entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))  # ln 2, and 0
        tensor([0.6931, 0.0000])
    """
    terms: Tensor = torch.special.entr(at_least_float32(probabilities))
    return terms.sum(dim=-1)


def ambiguity(probabilities: Float[Tensor, "rows classes"]) -> Float[Tensor, "rows"]:
    """Return each row's L1 distance from the one-hot label of its most likely class.

    That is ``2 (1 - largest probability)``: 0 where one class is certain, ``2 (1 - 1 / classes)``
    where all are equally likely, and never more.

    Source:
        Shao, Wu, Zhang, 2024, Selective-FD, the server's selector. https://arxiv.org/abs/2304.01731
    """
    return 2 * (1 - at_least_float32(probabilities).amax(dim=-1))


def kept_fraction(mask: Float[Tensor, "rows"]) -> Float[Tensor, ""]:
    """Return the fraction of rows that a mask keeps, in [0, 1]; 0 where there is no row."""
    return (mask > 0).to(at_least_float32(mask).dtype).sum() / max(len(mask), 1)


def confidence_weights(target: Float[Tensor, "rows classes"]) -> Float[Tensor, "rows"]:
    """Weigh rows by their `confidence`.

    Args:
        target: class probabilities.

    Returns:
        Weights > 0 that sum to the number of rows.
    """
    return _with_fixed_sum(confidence(target))


def certainty_weights(target: Float[Tensor, "rows classes"]) -> Float[Tensor, "rows"]:
    """Weigh rows by how far their `entropy` is below that of a uniform distribution.

    A row is weighed by ``log(classes) - entropy``: a uniform target teaches nothing and counts
    nothing, unless all of them are uniform, when all count alike.

    Args:
        target: class probabilities of at least two classes.

    Returns:
        Weights >= 0 that sum to the number of rows.

    Raises:
        ValueError: if there are fewer than two classes.
    """
    num_classes = target.shape[-1]
    if num_classes < 2:
        raise ValueError(f"certainty needs at least 2 classes, got {num_classes}")
    # A uniform row misses 0 by one rounding, to either side.
    return _with_fixed_sum((math.log(num_classes) - entropy(target)).clamp_min(0.0))


def difficulty(
    logits: Float[Tensor, "rows classes"], labels: Int[Tensor, "rows"]
) -> Float[Tensor, "rows"]:
    """Return how hard each row is for a model, teacher or student: its cross-entropy in nats.

    Args:
        logits: unnormalised scores; treated as constants.
        labels: class of each row, in [0, classes).
    """
    return F.cross_entropy(at_least_float32(logits.detach()), labels.long(), reduction="none")


def difficulty_weights(
    row_losses: Float[Tensor, "rows"], *, power: float = 1.0
) -> Float[Tensor, "rows"]:
    """Weigh rows by their difficulty, ``row_losses ** power``.

    Args:
        row_losses: finite and >= 0, such as `difficulty`; treated as constants.
        power: >= 0; 0 weighs all rows alike, above 1 the hardest ones stand out more.

    Returns:
        Weights >= 0 that sum to the number of rows; all 1 where no row has a loss.

    Raises:
        ValueError: if ``power`` is negative or not finite.
    """
    if not 0 <= power < math.inf:
        raise ValueError(f"power must be >= 0 and finite, got {power}")
    losses = at_least_float32(row_losses.detach())
    if power == 0 or len(losses) == 0:
        return torch.ones_like(losses)
    largest = losses.amax()
    # Divided first: a power of a large loss overflows, one of a number in [0, 1] cannot.
    relative = losses / torch.where(largest > 0, largest, torch.ones_like(largest))
    return _with_fixed_sum(relative**power)


def hardest_mask(row_losses: Float[Tensor, "rows"], *, share: float) -> Float[Tensor, "rows"]:
    """Mark with 1 the hardest ``share`` of the rows, with 0 the others.

    Args:
        row_losses: one number per row, larger is harder, such as `difficulty`.
        share: in (0, 1], rounded up to whole rows, so at least one is kept. Among equals the
            earlier row is kept.

    Raises:
        ValueError: if ``share`` is out of range.
    """
    return _first_share(at_least_float32(row_losses.detach()), share, hardest=True)


def curriculum_mask(
    row_losses: Float[Tensor, "rows"], *, progress: float, start_share: float = 0.2
) -> Float[Tensor, "rows"]:
    """Mark with 1 the easiest rows, a share that grows until all rows count.

    The share goes from ``start_share`` to 1 along a straight line.

    Args:
        row_losses: one number per row, larger is harder, such as `difficulty` for the teacher.
        progress: how much of the training is done, in [0, 1].
        start_share: share of the rows at progress 0, in (0, 1], rounded up to whole rows. Among
            equals the earlier row is kept.

    Raises:
        ValueError: if ``progress`` or ``start_share`` is out of range.

    Source:
        Bengio, Louradour, Collobert, Weston, 2009, Curriculum Learning, section 3.
        https://doi.org/10.1145/1553374.1553380
    """
    _check_share(start_share, "start_share")
    share = linear(progress, start=float(start_share), end=1.0)
    return _first_share(at_least_float32(row_losses.detach()), share, hardest=False)


def _first_share(
    row_losses: Float[Tensor, "rows"], share: float, *, hardest: bool
) -> Float[Tensor, "rows"]:
    _check_share(share, "share")
    order = torch.argsort(row_losses, stable=True, descending=hardest)
    # 0.07 of 100 rows are 7, although the product is 7.000000000000001.
    kept = math.ceil(share * len(row_losses) - 1e-9)
    return (torch.argsort(order) < kept).to(row_losses.dtype)


def _check_share(share: float, name: str) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {share}")


def _with_fixed_sum(weights: Float[Tensor, "rows"]) -> Float[Tensor, "rows"]:
    """Scale weights >= 0 to sum to the number of rows; all 1 where every weight is 0.

    One weight that is NaN makes all of them NaN.
    """
    total = weights.sum()
    nothing = total == 0
    scaled = weights * (len(weights) / torch.where(nothing, torch.ones_like(total), total))
    return torch.where(nothing, torch.ones_like(scaled), scaled)
