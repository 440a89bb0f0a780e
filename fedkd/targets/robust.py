"""Robust means of soft labels: what a few clients say, whatever it is, moves them little.

Unlike `coordinate_median` and `trimmed_mean` these look at a client's whole prediction of a row,
and average predictions as they are: what they return of distributions are distributions. The two
checks look at all that a client says, and leave out whole clients.
"""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedkd.targets.averages import coordinate_median
from fedkd.targets.softening import at_least_float32

GEOMETRIC_STEPS = 1000
"""Steps of `geometric_median` for a row at most; nearly all rows take fewer than a hundred."""


LEAST_TRUST = 1e-200
"""What a client's trust never falls below."""


def filtered_mean(
    values: Float[Tensor, "clients rows classes"], *, dishonest: float
) -> Float[Tensor, "rows classes"]:
    """Average, for each row, the clients that do not stand out along its widest direction.

    Done twice: those with the largest `outlier_scores` are left out, ``dishonest * clients / 2`` of
    them, rounded down, by the number of *all* clients in both passes.

    Args:
        values: finite probabilities or logits of every client on the same rows.
        dishonest: share of the clients that may lie, in [0, 1); 0 leaves out nobody.

    Returns:
        On the CPU; a row's bits do not depend on the other rows.

    Raises:
        ValueError: if there is no client or ``dishonest`` is out of range.

    Source:
        Chang, Shejwalkar, Shokri, Houmansadr, 2019, Cronus, with the filter of Diakonikolas et al.,
        2017. https://arxiv.org/abs/1912.11279 https://arxiv.org/abs/1703.00893
    """
    by_row, dtype = _by_row(values)
    kept = _kept(by_row, dishonest)
    rows, chosen = kept.shape
    total = np.zeros((rows, by_row.shape[-1]))
    # One client after the other, so that a chunk of rows has the bits of the whole.
    for place in range(chosen):
        total += by_row[np.arange(rows), kept[:, place]]
    return torch.from_numpy(total / chosen).to(dtype)


def kept_by_filter(
    values: Float[Tensor, "clients rows classes"], *, dishonest: float
) -> Int[np.ndarray, "rows kept"]:
    """Return which clients `filtered_mean` averages: their positions in each row, in order.

    Raises:
        ValueError: as `filtered_mean`.
    """
    return _kept(_by_row(values)[0], dishonest)


def outlier_scores(
    by_row: Float[np.ndarray, "rows clients classes"],
) -> Float[np.ndarray, "rows clients"]:
    """Return how far each client is from the row's mean along the direction of most variance.

    The squares of a row's scores, over the clients less one, add up to the largest eigenvalue of
    its covariance. It is solved for, not iterated towards: iterating from a vector of ones, as
    published code does, begins in the null space of every covariance of probabilities.
    """
    centred = by_row - by_row.mean(axis=1, keepdims=True)
    clients, classes = by_row.shape[1:]
    if clients <= classes:
        # The clients' inner products have the same largest eigenvalue, and the scores of a row are
        # their eigenvector times its root.
        sizes, directions = np.linalg.eigh(centred @ centred.transpose(0, 2, 1))
        scores = directions[:, :, -1] * np.sqrt(np.maximum(sizes[:, -1:], 0))
    else:
        _, directions = np.linalg.eigh(centred.transpose(0, 2, 1) @ centred)
        scores = (centred @ directions[:, :, -1:])[:, :, 0]
    distances: np.ndarray = np.abs(scores)
    return distances


def geometric_median(
    values: Float[Tensor, "clients rows classes"], *, tolerance: float = 1e-12
) -> Float[Tensor, "rows classes"]:
    """Return, for each row, the point whose distances (L2) to all clients have the smallest sum.

    Fewer than half of the clients cannot move it far.

    Args:
        values: finite probabilities or logits of every client on the same rows.
        tolerance: a row is done when a step moves none of its numbers by more.

    Returns:
        On the CPU; a row's bits do not depend on the other rows.

    Raises:
        ValueError: if there is no client.

    Source:
        Weiszfeld's steps, which leave a client's own point by the rule of Vardi and Zhang, 2000,
        equation 2.6. https://doi.org/10.1073/pnas.97.4.1423
    """
    by_row, dtype = _by_row(values)
    point = by_row.mean(axis=1)
    moving = np.arange(len(point))
    for _ in range(GEOMETRIC_STEPS):
        new = _weiszfeld(by_row[moving], point[moving])
        moved = np.abs(new - point[moving]).max(axis=-1) > tolerance
        point[moving] = new
        moving = moving[moved]
        if not len(moving):
            break
    return torch.from_numpy(point).to(dtype)


def norm_checked_mean(
    values: Float[Tensor, "clients rows classes"], *, factor: int | float
) -> Float[Tensor, "rows classes"]:
    """Average the clients whose predictions are not much larger than the median client's.

    A client's size is the root of the mean, over rows, of `squared_deviations`. Those of more than
    ``factor`` times the median size are left out, with all that they say. Where all are equal
    nobody is. It sees scores that are scaled up, and no lie of an honest size.

    Args:
        values: finite probabilities or logits of every client on the same rows.
        factor: >= 1.

    Returns:
        On the CPU.

    Raises:
        ValueError: if there is no client or ``factor`` is out of range.

    Source:
        After Sun, Kairouz, Suresh, McMahan, 2019 (norm thresholding of updates), with a
        threshold that follows the clients. https://arxiv.org/abs/1911.07963
    """
    return _mean_of_kept(values, kept_within(squared_deviations(values), factor=factor))


def outlier_checked_mean(
    values: Float[Tensor, "clients rows classes"], *, factor: int | float
) -> Float[Tensor, "rows classes"]:
    """Average the clients that are not much farther from the median than the median client.

    A client's distance is the root of the mean, over rows, of `squared_distances` to the coordinate
    median. Those of more than ``factor`` times the median distance are left out, with all that they
    say. Where all are equal nobody is.

    Args:
        values: finite probabilities or logits of every client on the same rows.
        factor: >= 1.

    Returns:
        On the CPU.

    Raises:
        ValueError: if there is no client or ``factor`` is out of range.

    Source:
        The rule "more than so many times the median distance from the median" is Hampel's, 1974,
        https://doi.org/10.1080/01621459.1974.10482962, of whole tables instead of numbers.
    """
    return _mean_of_kept(values, kept_within(squared_distances(values), factor=factor))


def squared_deviations(
    values: Float[Tensor, "clients rows classes"],
) -> Float[np.ndarray, "clients rows"]:
    """Return how unequal a client's scores of each row are: squared L2 distance to their mean.

    Of probabilities it is the squared distance to the uniform distribution, largest if one-hot.
    """
    wide = values.detach().cpu().double().numpy()
    deviations = wide - wide.mean(axis=-1, keepdims=True)
    squares: np.ndarray = (deviations**2).sum(axis=-1)
    return squares


def squared_distances(
    values: Float[Tensor, "clients rows classes"],
) -> Float[np.ndarray, "clients rows"]:
    """Return each client's squared L2 distance, row by row, to the clients' coordinate median.

    Raises:
        ValueError: if there is no client.
    """
    away = (values.detach().cpu().double() - coordinate_median(values).double()).numpy()
    squares: np.ndarray = (away**2).sum(axis=-1)
    return squares


def kept_within(
    squares: Float[np.ndarray, "clients rows"],
    sent: Bool[np.ndarray, "clients rows"] | None = None,
    *,
    factor: int | float,
) -> Bool[np.ndarray, " clients"]:
    """Tell which clients are at most ``factor`` times as far as the median client.

    Args:
        squares: each client's squared distance in each row, >= 0.
        sent: which rows each client spoke of; None: all. A client's distance is the root of the
            mean over these; one that spoke of none is not kept, and does not count.
        factor: >= 1, so that half of the clients are kept at least.

    Raises:
        ValueError: if ``factor`` is out of range.
    """
    if not factor >= 1:
        raise ValueError(f"factor must be >= 1, got {factor}")
    spoken = np.ones(squares.shape, bool) if sent is None else sent
    rows = spoken.sum(axis=1)
    distances = np.sqrt((squares * spoken).sum(axis=1) / np.maximum(rows, 1))
    spoke: np.ndarray = rows > 0
    if not spoke.any():
        return spoke
    kept: np.ndarray = spoke & (distances <= factor * np.median(distances[spoke]))
    return kept


def less_trusted(
    trust: Float[np.ndarray, "clients"],
    values: Float[Tensor, "clients rows classes"],
    target: Float[Tensor, "rows classes"],
    *,
    rate: float,
) -> Float[np.ndarray, "clients"]:
    """Return how much each client is trusted after a round: less, the farther from the target.

    Trust falls by ``exp(-rate * distance)``, the distance (L2) a mean over rows, and keeps its sum.

    Args:
        trust: before the round, >= 0, of which one is positive.
        values: what each client said.
        target: what was made of it.
        rate: >= 0; 0 changes nothing.

    Source:
        Exponential weights over rounds, as the code of Roux, Zimmer, Pokutta, 2024, has them for
        ExpGuard. https://arxiv.org/abs/2402.12265
    """
    away = (values.detach().cpu().double() - target.detach().cpu().double()).norm(dim=-1)
    distances = away.mean(dim=1).numpy()
    # The nearest client's factor is 1, so that not all of them round to 0.
    # Nobody's trust ever is 0 either: those who were trusted more may be away in some round.
    fallen = np.maximum(trust * np.exp(-rate * (distances - distances.min())), LEAST_TRUST)
    kept: np.ndarray = fallen * (trust.sum() / fallen.sum())
    return kept


def _mean_of_kept(
    values: Float[Tensor, "clients rows classes"], kept: Bool[np.ndarray, " clients"]
) -> Float[Tensor, "rows classes"]:
    return filtered_mean(values[torch.from_numpy(kept)], dishonest=0.0)


def _weiszfeld(
    by_row: Float[np.ndarray, "rows clients classes"], point: Float[np.ndarray, "rows classes"]
) -> Float[np.ndarray, "rows classes"]:
    """Take one step towards the geometric median of each row."""
    away = by_row - point[:, None]
    distances = np.sqrt((away**2).sum(axis=-1))
    there = distances == 0
    pulls = np.where(there, 0.0, 1 / np.where(there, 1.0, distances))
    total = pulls.sum(axis=1)
    towards = (pulls[:, :, None] * away).sum(axis=1)
    # Clients at the very point hold it, as strongly as there are many of them.
    pull = np.sqrt((towards**2).sum(axis=-1))
    held = there.sum(axis=1)
    free = np.where(pull > held, 1 - held / np.where(pull > 0, pull, 1.0), 0.0)
    step = (free / np.where(total > 0, total, 1.0))[:, None]
    new: np.ndarray = point + step * towards
    return new


def _kept(
    by_row: Float[np.ndarray, "rows clients classes"], dishonest: float
) -> Int[np.ndarray, "rows kept"]:
    if not 0 <= dishonest < 1:
        raise ValueError(f"dishonest must be in [0, 1), got {dishonest}")
    rows, clients, _ = by_row.shape
    # 0.58 of 100 clients are twice 29, although the product is 28.999999999999996.
    leave = min(math.floor(dishonest * clients / 2 + 1e-9), (clients - 1) // 2)
    kept = np.tile(np.arange(clients), (rows, 1))
    for _ in range(2 if leave else 0):
        scores = outlier_scores(np.take_along_axis(by_row, kept[:, :, None], axis=1))
        # Of equals the later client is left out.
        order = np.argsort(scores, axis=1, kind="stable")[:, : kept.shape[1] - leave]
        kept = np.take_along_axis(kept, np.sort(order, axis=1), axis=1)
    return kept


def _by_row(
    values: Float[Tensor, "clients rows classes"],
) -> tuple[Float[np.ndarray, "rows clients classes"], torch.dtype]:
    """Return the values in float64, row by row, and in which type to return what they come to."""
    if len(values) == 0:
        raise ValueError("a robust mean needs at least 1 client, got 0")
    wide = at_least_float32(values.detach().cpu())
    by_row = np.ascontiguousarray(wide.double().numpy().transpose(1, 0, 2))
    return by_row, wide.dtype
