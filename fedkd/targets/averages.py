"""Averages over clients: of probabilities, of logits, of all but oneself, and robust ones."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedkd.targets.scale import Scale
from fedkd.targets.softening import at_least_float32, soften


def mean_probability(
    logits: Float[Tensor, "clients rows classes"],
    *,
    temperature: float = 1.0,
    weights: Sequence[int | float] | None = None,
) -> Float[Tensor, "rows classes"]:
    """Average the clients' softened class probabilities for each row.

    Args:
        logits: unnormalised scores of every client on the same rows.
        temperature: softening divisor, > 0, applied before the average.
        weights: one positive number per client, such as its example count; None is equal.

    Raises:
        ValueError: if ``temperature`` or ``weights`` is out of range.

    Examples:
        >>> import torch
        >>> from fedkd.targets import mean_probability
        >>> two_clients = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]])  # clients, rows, classes
        >>> mean_probability(two_clients)
        tensor([[0.6155, 0.3845]])
    """
    return _weighted_mean(soften(logits, temperature=temperature), weights)


def mean_logit(
    logits: Float[Tensor, "clients rows classes"], *, weights: Sequence[int | float] | None = None
) -> Float[Tensor, "rows classes"]:
    """Average the clients' logits for each row; soften the result to get a target.

    Not the same target as `mean_probability`: one very confident client weighs more here.

    Args:
        logits: unnormalised scores of every client on the same rows.
        weights: one positive number per client; None is equal.

    Raises:
        ValueError: if ``weights`` is out of range.

    Source:
        Li and Wang, 2019, Algorithm 1 (consensus). https://arxiv.org/abs/1910.03581

    Examples:
        >>> import torch
        >>> from fedkd.targets import mean_logit
        >>> mean_logit(torch.tensor([[[2.0, 0.0]], [[0.0, 4.0]]]))
        tensor([[1., 2.]])
    """
    return _weighted_mean(logits, weights)


def leave_one_out(
    values: Float[Tensor, "clients rows classes"], *, weights: Sequence[int | float] | None = None
) -> Float[Tensor, "clients rows classes"]:
    """Give every client the mean of the OTHER clients' values, so none learns from itself.

    Args:
        values: probabilities or logits of every client on the same rows, finite.
        weights: one positive number per client; None is equal.

    Returns:
        At index k, the weighted mean over all clients but k.

    Raises:
        ValueError: if there are fewer than two clients or ``weights`` is out of range.

    Source:
        Jeong et al., 2018, Algorithm 1, line 15. https://arxiv.org/abs/1811.11479

    Examples:
        >>> import torch
        >>> from fedkd.targets import leave_one_out
        >>> clients = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]], [[0.0, 1.0]]])
        >>> leave_one_out(clients)[0]  # what the first hears: the mean of the others
        tensor([[0.2500, 0.7500]])
    """
    num_clients = len(values)
    if num_clients < 2:
        raise ValueError(f"leave-one-out needs at least 2 clients, got {num_clients}")
    client_weights = _client_weights(weights, num_clients, values.device)[:, None, None]
    weighted = client_weights * values.double()
    # The very terms that were summed are taken out again: a rounded sum of numbers >= 0 is never
    # below one of them, so probabilities stay >= 0 and keep a logarithm.
    others = (weighted.sum(dim=0) - weighted) / (client_weights.sum() - client_weights)
    return others.to(at_least_float32(values).dtype)


def coordinate_median(
    values: Float[Tensor, "clients rows classes"], *, scale: Scale = "logits"
) -> Float[Tensor, "rows classes"]:
    """Take the median over the clients of every score; fewer than half of them cannot move it far.

    The median of an even number is the mean of the two in the middle.

    Args:
        values: finite probabilities or logits of every client on the same rows.
        scale: what the values are. Medians of probabilities need not sum to 1, so they are made to;
            where none of a row is positive the row is the clients' mean.

    Returns:
        On the CPU, whatever the order of the clients the same bits.

    Raises:
        ValueError: if there is no client.

    Source:
        Yin, Chen, Ramchandran, Bartlett, 2018, Definition 1. https://arxiv.org/abs/1803.01498

    Examples:
        >>> import torch
        >>> from fedkd.targets import coordinate_median
        >>> coordinate_median(torch.tensor([[[0.1]], [[0.2]], [[9.0]]]))
        tensor([[0.2000]])
    """
    return _mean_of_the_middle(values, drop=(len(values) - 1) // 2, scale=scale)


def trimmed_mean(
    values: Float[Tensor, "clients rows classes"], *, trim: float, scale: Scale = "logits"
) -> Float[Tensor, "rows classes"]:
    """Average every score over the clients without the largest and the smallest ones.

    Args:
        values: finite probabilities or logits of every client on the same rows.
        trim: fraction of the clients left out at EACH end, in [0, 0.5), rounded down to whole
            clients; it withstands as many liars as it leaves out at an end.
        scale: what the values are. Trimmed means of probabilities need not sum to 1, so they are
            made to; where none of a row is positive the row is the clients' mean.

    Returns:
        On the CPU, whatever the order of the clients the same bits.

    Raises:
        ValueError: if there is no client or ``trim`` is out of range.

    Source:
        Yin, Chen, Ramchandran, Bartlett, 2018, Definition 2. https://arxiv.org/abs/1803.01498
    """
    if not 0 <= trim < 0.5:
        raise ValueError(f"trim must be in [0, 0.5), got {trim}")
    # 0.29 of 100 clients are 29, although the product is 28.999999999999996.
    return _mean_of_the_middle(values, drop=int(trim * len(values) + 1e-9), scale=scale)


def _mean_of_the_middle(
    values: Float[Tensor, "clients rows classes"], drop: int, scale: Scale
) -> Float[Tensor, "rows classes"]:
    """Average every score over the clients but the ``drop`` largest and ``drop`` smallest."""
    num_clients = len(values)
    if num_clients == 0:
        raise ValueError("a robust mean needs at least 1 client, got 0")
    wide = at_least_float32(values.detach().cpu())
    # NumPy sorts floats with vector instructions: several times as fast as torch.
    ordered = np.sort(wide.numpy(), axis=0)
    middle = _total(ordered[drop : num_clients - drop]) / (num_clients - 2 * drop)
    if scale == "probabilities":
        sums = middle.sum(axis=-1, keepdims=True)
        nobodys = sums[:, 0] <= 0
        if nobodys.any():
            middle[nobodys] = _total(ordered[:, nobodys])
            sums = middle.sum(axis=-1, keepdims=True)
        middle /= sums
    return torch.from_numpy(middle).to(wide.dtype)


def _total(tables: Float[np.ndarray, "clients rows classes"]) -> Float[np.ndarray, "rows classes"]:
    """Add up in float64, one client after the other.

    A library's sum may split rows differently with their number, and a chunk of rows has to give
    the bits of the whole.
    """
    total = np.zeros(tables.shape[1:])
    for table in tables:
        total += table
    return total


def entropy_reduction(
    mean_probability: Float[Tensor, "rows classes"], *, temperature: float
) -> Float[Tensor, "rows classes"]:
    """Sharpen an averaged target: softmax of the mean PROBABILITIES over ``temperature``.

    A deliberate softmax of probabilities, not of logits. A low temperature counters the high
    entropy of an average over clients that saw different classes.

    Args:
        mean_probability: averaged class probabilities, each row summing to 1.
        temperature: > 0; the paper uses 0.1. At 1 the result is flatter than its input.

    Raises:
        ValueError: if ``temperature`` is not positive and finite.

    Source:
        Itahara et al., 2020, DS-FL with ERA. https://arxiv.org/abs/2008.06180
    """
    return soften(mean_probability, temperature=temperature)


def entropy_reduction_by_power(
    mean_probability: Float[Tensor, "rows classes"], *, power: float
) -> Float[Tensor, "rows classes"]:
    """Sharpen an averaged target: its probabilities to a power, made to sum to 1 again.

    Unlike `entropy_reduction` it keeps the ratios of classes on the scale of logarithms: a softmax
    of ``power * log(mean)``. A power of 1 changes nothing, one below 1 flattens.

    Args:
        mean_probability: averaged class probabilities, each row summing to 1.
        power: > 0; the paper's beta.

    Raises:
        ValueError: if ``power`` is not positive and finite.

    Source:
        Azuma et al., 2025, SCARLET with Enhanced ERA. https://arxiv.org/abs/2504.19602
    """
    if not 0 < power < math.inf:
        raise ValueError(f"power must be > 0 and finite, got {power}")
    # The largest class becomes 1 first, so that no power of a row is 0 altogether.
    relative = mean_probability / mean_probability.max(dim=-1, keepdim=True).values
    powers = relative**power
    return powers / powers.sum(dim=-1, keepdim=True)


def _client_weights(
    weights: Sequence[int | float] | None, num_clients: int, device: torch.device
) -> Float[Tensor, "clients"]:
    if weights is None:
        weights = [1.0] * num_clients
    if len(weights) != num_clients or not all(0 < weight < math.inf for weight in weights):
        raise ValueError(
            f"weights must be one positive finite number per client ({num_clients} clients), "
            f"got {list(weights)}"
        )
    return torch.tensor(weights, dtype=torch.float64, device=device)


def _weighted_mean(
    values: Float[Tensor, "clients rows classes"], weights: Sequence[int | float] | None
) -> Float[Tensor, "rows classes"]:
    if len(values) == 0:
        raise ValueError("a mean needs at least 1 client, got 0")
    client_weights = _client_weights(weights, len(values), values.device)
    shares = client_weights / client_weights.sum()
    mean = (shares[:, None, None] * values.double()).sum(dim=0)
    return mean.to(at_least_float32(values).dtype)
