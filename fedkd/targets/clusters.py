"""Groups of clients that say alike: k-means over few points, row by row."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

EXACT = 12
"""Up to so many clients are cut into two groups in the best of all ways: 2047 of them at most."""

RESTARTS = 8
STEPS = 50
"""How often k-means begins anew, and how long it goes on, where not all ways are tried."""

_VALUES = 2**22
"""Numbers in memory at once while all ways are tried."""


def clusters_by_row(
    points: Float[Tensor, "clients rows features"], *, clusters: int, rng: np.random.Generator
) -> Int[np.ndarray, "clients rows"]:
    """Group, for each row, the clients' points so that squared distances within are small.

    Two groups of at most `EXACT` clients are the best ones there are; others are the best of
    `RESTARTS` runs of k-means, which begin by k-means++. Groups are numbered by their first client;
    where a row has fewer distinct points than ``clusters``, groups may be empty.

    Args:
        points: finite; of at least one client.
        clusters: groups of each row, >= 1.
        rng: of the runs; nothing is drawn where all ways are tried.

    Raises:
        ValueError: if there is no client, or ``clusters`` is below 1.

    Source:
        Arthur, Vassilvitskii, 2007, k-means++. https://dl.acm.org/doi/10.5555/1283383.1283494
    """
    if clusters < 1:
        raise ValueError(f"clusters must be >= 1, got {clusters}")
    if len(points) == 0:
        raise ValueError("clusters need at least 1 client, got 0")
    by_row = points.detach().cpu().double().transpose(0, 1).contiguous()
    by_row = by_row - by_row.mean(dim=1, keepdim=True)
    if clusters == 1 or len(points) == 1:
        groups = np.zeros(by_row.shape[:2], np.int64)
    elif clusters == 2 and len(points) <= EXACT:
        groups = _best_of_all(by_row)
    else:
        groups = _best_of_some(by_row.numpy(), clusters, rng)
    return np.ascontiguousarray(_numbered_by_first(groups, clusters).T)


def centroids_by_row(
    points: Float[Tensor, "clients rows features"],
    groups: Int[np.ndarray, "clients rows"],
    *,
    clusters: int,
) -> Float[Tensor, "clusters rows features"]:
    """Average each row's points within each group; a group of nobody repeats the first one.

    Args:
        points: of every client.
        groups: which group each is in, as `clusters_by_row` returns them.
        clusters: how many groups there are.
    """
    wide = points.detach().cpu().double()
    belongs = torch.from_numpy(groups[None] == np.arange(clusters)[:, None, None]).double()
    sizes = belongs.sum(dim=1)
    total = torch.zeros(clusters, *wide.shape[1:], dtype=torch.float64)
    # One client after the other: memory of the centroids alone.
    for client, own in enumerate(wide):
        total += belongs[:, client, :, None] * own
    means = total / sizes.clamp_min(1)[:, :, None]
    return torch.where((sizes > 0)[:, :, None], means, means[:1])


def nearest_centroid(
    points: Float[Tensor, "rows features"], centroids: Float[Tensor, "clusters rows features"]
) -> Int[Tensor, "rows"]:
    """Return which of a row's centroids is nearest (L2) to its point; of equals the first."""
    distances = (centroids.double() - points.double()).square().sum(dim=-1)
    return distances.argmin(dim=0)


def _best_of_all(by_row: Float[Tensor, "rows clients features"]) -> Int[np.ndarray, "rows clients"]:
    """Try every way to cut the centred points in two; the first client is always in group 0."""
    clients = by_row.shape[1]
    ways = np.arange(1, 2 ** (clients - 1))
    second = np.zeros((len(ways), clients))
    second[:, 1:] = ways[:, None] >> np.arange(clients - 1) & 1
    apart = torch.from_numpy(second)
    # Of centred points both groups' sums are equal but for the sign, and what lies between the
    # groups is the square of that sum times this.
    inverse = torch.from_numpy(1 / second.sum(1) + 1 / (clients - second.sum(1)))
    groups = np.empty(by_row.shape[:2], np.int64)
    height = max(1, _VALUES // (len(ways) * clients))
    for start in range(0, len(by_row), height):
        part = by_row[start : start + height]
        products = part @ part.transpose(1, 2)
        squares = ((apart @ products) * apart).sum(dim=-1)
        best = (squares * inverse).argmax(dim=1).numpy()
        groups[start : start + height] = second[best]
    return groups


def _best_of_some(
    by_row: Float[np.ndarray, "rows clients features"], clusters: int, rng: np.random.Generator
) -> Int[np.ndarray, "rows clients"]:
    best, within = np.zeros(by_row.shape[:2], np.int64), np.full(len(by_row), np.inf)
    for _ in range(RESTARTS):
        groups, found = _kmeans(by_row, _spread(by_row, clusters, rng))
        better = found < within
        best[better], within[better] = groups[better], found[better]
    return best


def _spread(
    by_row: Float[np.ndarray, "rows clients features"], clusters: int, rng: np.random.Generator
) -> Float[np.ndarray, "rows clusters features"]:
    """Draw first centroids among a row's points, the likelier the farther from those drawn."""
    rows, clients, _ = by_row.shape
    every = np.arange(rows)
    chosen = [by_row[every, rng.integers(clients, size=rows)]]
    nearest = np.full((rows, clients), np.inf)
    for _ in range(clusters - 1):
        nearest = np.minimum(nearest, ((by_row - chosen[-1][:, None]) ** 2).sum(-1))
        reached = np.cumsum(nearest, axis=1)
        drawn = (reached < rng.random((rows, 1)) * reached[:, -1:]).sum(axis=1)
        chosen.append(by_row[every, np.minimum(drawn, clients - 1)])
    return np.stack(chosen, axis=1)


def _kmeans(
    by_row: Float[np.ndarray, "rows clients features"],
    centroids: Float[np.ndarray, "rows clusters features"],
) -> tuple[Int[np.ndarray, "rows clients"], Float[np.ndarray, "rows"]]:
    """Move centroids until no row's groups change; return the groups and what is within them."""
    clusters = centroids.shape[1]
    groups = np.full(by_row.shape[:2], -1)
    within = np.zeros(len(by_row))
    for _ in range(STEPS):
        distances = np.stack(
            [((by_row - centroids[:, group, None]) ** 2).sum(-1) for group in range(clusters)], -1
        )
        nearest = distances.argmin(-1)
        within = distances.min(-1).sum(-1)
        if np.array_equal(nearest, groups):
            break
        groups = nearest
        belongs = (groups[:, None] == np.arange(clusters)[:, None]).astype(np.float64)
        sizes = belongs.sum(-1)[:, :, None]
        centroids = np.where(sizes > 0, belongs @ by_row / np.maximum(sizes, 1), centroids)
    return groups, within


def _numbered_by_first(
    groups: Int[np.ndarray, "rows clients"], clusters: int
) -> Int[np.ndarray, "rows clients"]:
    """Number each row's groups by the first client in them; empty ones come last."""
    clients = groups.shape[1]
    belongs = groups[:, None] == np.arange(clusters)[:, None]
    first = np.where(belongs.any(-1), belongs.argmax(-1), clients)
    numbers = first.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    renumbered: np.ndarray = np.take_along_axis(numbers, groups, axis=1)
    return renumbered
