"""Several teachers -> one target, where some know more about a row than others do."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fedkd.targets.selection import entropy
from fedkd.targets.softening import at_least_float32, soften

HEAD_PADDING = -1e4
"""Logit of a class that a head does not have: its probability is 0, its logarithm finite."""


def shares_by_confidence(
    logits: Float[Tensor, "teachers rows classes"], labels: Int[Tensor, "rows"]
) -> Float[Tensor, "teachers rows"]:
    """Give each teacher a share of each row, the larger the nearer its prediction to the label.

    ``(1 - softmax(CE)) / (teachers - 1)``, the softmax over the teachers' cross-entropies of that
    row.

    Args:
        logits: unnormalised scores of every teacher on the same rows; treated as constants.
        labels: class of each row, in [0, classes).

    Returns:
        Shares in [0, 1 / (teachers - 1)] that sum to 1 over the teachers.

    Raises:
        ValueError: if there are fewer than two teachers.

    Source:
        Zhang, Chen, Wang, 2022, Confidence-Aware Multi-Teacher Knowledge Distillation (CA-MKD),
        equation 3. https://arxiv.org/abs/2201.00007
    """
    log_p = torch.log_softmax(at_least_float32(logits.detach()), dim=-1)
    known = labels.long()[None, :, None].expand(len(logits), -1, 1)
    return _shares_of_the_small(-log_p.gather(2, known).squeeze(2))


def shares_by_entropy(
    logits: Float[Tensor, "teachers rows classes"], *, temperature: float = 1.0
) -> Float[Tensor, "teachers rows"]:
    """Give each teacher a share of each row, the larger the surer it is; needs no labels.

    The rule of `shares_by_confidence` with the entropy of a prediction, in nats, in the place of
    its cross-entropy. A teacher that is sure and wrong gets a large share.

    Args:
        logits: unnormalised scores of every teacher on the same rows; treated as constants.
        temperature: softening divisor of the predictions whose entropy counts, > 0.

    Returns:
        Shares in [0, 1 / (teachers - 1)] that sum to 1 over the teachers.

    Raises:
        ValueError: if there are fewer than two teachers or ``temperature`` is out of range.
    """
    probabilities = soften(logits.detach(), temperature=temperature)
    num_teachers, num_rows, _ = probabilities.shape
    entropies = entropy(probabilities.flatten(0, 1)).reshape(num_teachers, num_rows)
    return _shares_of_the_small(entropies)


def mean_by_row(
    values: Float[Tensor, "teachers rows classes"], shares: Float[Tensor, "teachers rows"]
) -> Float[Tensor, "rows classes"]:
    """Average the teachers' probabilities or logits with a share of its own for every row.

    With the same shares in all rows this is `mean_logit`, or `mean_probability` of what `soften`
    returns.

    Args:
        values: probabilities or logits of every teacher on the same rows.
        shares: >= 0, one per teacher and row, such as `shares_by_confidence`; only their ratios
            within a row count.

    Returns:
        The averages; 0 in a row where no teacher has a share.

    Raises:
        ValueError: if there is no teacher.
    """
    if len(values) == 0:
        raise ValueError("a mean needs at least 1 teacher, got 0")
    weights = shares.double()
    total = weights.sum(dim=0)
    weights = weights / torch.where(total > 0, total, torch.ones_like(total))
    return (weights[:, :, None] * values.double()).sum(dim=0).to(at_least_float32(values).dtype)


def route_to_heads(
    head_logits: Sequence[Float[Tensor, "rows _"]] | Float[Tensor, "tasks rows classes"],
    task_ids: Int[Tensor, "rows"],
) -> Float[Tensor, "rows widest"]:
    """Take each row's logits from the head of its own task.

    The heads of a multi-task teacher may differ in their number of classes. Rows of a narrower
    head are filled up with `HEAD_PADDING`, for which any softmax gives probability 0: route the
    student's heads the same way, and losses of probabilities are those of the unpadded rows. Losses
    of logits need heads of one width.

    Args:
        head_logits: what each head says about all rows, in the order of the tasks.
        task_ids: for each row the index of its task, in [0, tasks).

    Returns:
        One row of logits per row, as wide as the widest head. Gradients flow to the head that a
        row was taken from.

    Raises:
        ValueError: if there is no head, or a row asks for a task that has none. Reading the ids
            makes this the one target that does not work under ``torch.func.vmap``.
    """
    num_tasks = len(head_logits)
    if num_tasks == 0:
        raise ValueError("a multi-task teacher needs at least 1 head, got 0")
    unknown = sorted(set(task_ids.tolist()) - set(range(num_tasks)))
    if unknown:
        raise ValueError(
            f"task_ids must be in [0, {num_tasks}), one head per task; "
            f"got {', '.join(map(str, unknown))}"
        )
    widest = max(logits.shape[1] for logits in head_logits)
    stacked = torch.stack(
        [
            F.pad(at_least_float32(logits), (0, widest - logits.shape[1]), value=HEAD_PADDING)
            for logits in head_logits
        ]
    )
    chosen = task_ids.long()[None, :, None].expand(1, -1, widest)
    return stacked.gather(0, chosen).squeeze(0)


def _shares_of_the_small(
    row_scores: Float[Tensor, "teachers rows"],
) -> Float[Tensor, "teachers rows"]:
    num_teachers = len(row_scores)
    if num_teachers < 2:
        raise ValueError(f"shares of teachers need at least 2 of them, got {num_teachers}")
    return (1 - torch.softmax(row_scores, dim=0)) / (num_teachers - 1)
