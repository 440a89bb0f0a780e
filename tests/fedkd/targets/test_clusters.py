"""Clients are grouped row by row, in the best of all ways where there are few."""

from itertools import product

import numpy as np
import pytest
import torch

from fedkd.targets import centroids_by_row, clusters_by_row, nearest_centroid
from fedkd.targets.clusters import EXACT

LOGITS = torch.tensor(
    [
        [[1.0, 2, 3, 0], [0.5, -1, 0, 2]],
        [[2.0, 1, 4, -1], [0, 0, 1, 3]],
        [[-4.0, 3, 1, 1], [2, 0, -1, 1]],
        [[-3.0, 2, 1, 0], [3, 0, -1, 1]],
    ],
    dtype=torch.float64,
)
SOFT = torch.softmax(LOGITS, -1)
CENTROIDS = [
    [
        [0.10034697, 0.13932769, 0.74146938, 0.01885595],
        [0.09938054, 0.03783508, 0.10284642, 0.75993796],
    ],
    [
        [0.00258974, 0.72434704, 0.17503350, 0.09802971],
        [0.73743346, 0.06425751, 0.02363902, 0.17467002],
    ],
]


def rng(seed=0):
    return np.random.default_rng(seed)


def random_points(clients, rows=12, features=4, seed=0):
    return torch.randn(clients, rows, features, generator=torch.Generator().manual_seed(seed))


def within(points, groups, clusters):
    means = centroids_by_row(points, groups, clusters=clusters)
    own = torch.gather(
        means, 0, torch.from_numpy(groups)[:, :, None].expand(-1, -1, points.shape[-1])
    )
    return (points.double() - own).square().sum(dim=(0, 2))


def test_four_clients_by_hand():
    groups = clusters_by_row(SOFT, clusters=2, rng=rng())
    assert groups.tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert np.allclose(within(SOFT, groups, 2), [0.05603265, 0.03847005], atol=1e-8)
    assert np.allclose(centroids_by_row(SOFT, groups, clusters=2), CENTROIDS, atol=1e-8)


@pytest.mark.parametrize("clients", [2, 3, 5, 8])
def test_two_groups_of_few_clients_are_the_best_there_are(clients):
    points = random_points(clients)
    found = within(points, clusters_by_row(points, clusters=2, rng=rng()), 2)
    best = torch.full((12,), torch.inf, dtype=torch.float64)
    for groups in product([0, 1], repeat=clients):
        every = np.tile(np.array(groups)[:, None], (1, 12))
        best = torch.minimum(best, within(points, every, 2))
    assert torch.allclose(found, best)


def test_the_groups_of_few_clients_draw_nothing():
    generator = rng()
    before = generator.bit_generator.state
    clusters_by_row(random_points(EXACT), clusters=2, rng=generator)
    assert generator.bit_generator.state == before


@pytest.mark.parametrize(("clients", "clusters"), [(EXACT + 1, 2), (8, 3), (30, 4)])
def test_more_groups_or_clients_are_seeded_and_near_the_best(clients, clusters):
    points = random_points(clients)
    one, same = (clusters_by_row(points, clusters=clusters, rng=rng(3)) for _ in range(2))
    assert np.array_equal(one, same)
    assert one.max() == clusters - 1
    chance = np.stack([rng(seed).integers(clusters, size=12) for seed in range(clients)])
    assert (within(points, one, clusters) < within(points, chance, clusters)).all()


def test_seeded_groups_find_what_lies_apart():
    centres = 10 * torch.eye(4)[:3]
    which = np.tile(np.arange(20) % 3, (6, 1)).T
    points = centres[which] + 0.1 * random_points(20, rows=6)
    assert np.array_equal(clusters_by_row(points, clusters=3, rng=rng()), which)


@pytest.mark.parametrize("clients", [1, 2, 5, EXACT + 3])
@pytest.mark.parametrize("clusters", [1, 2, 3])
@pytest.mark.parametrize("distinct", [1, 2])
def test_fewer_distinct_points_than_groups_are_no_error(clients, clusters, distinct):
    """Published fault: k-means breaks down where clients say the same."""
    points = torch.eye(3)[np.arange(clients) % distinct][:, None].repeat(1, 4, 1)
    groups = clusters_by_row(points, clusters=clusters, rng=rng())
    means = centroids_by_row(points, groups, clusters=clusters)
    assert torch.isfinite(means).all()
    assert torch.allclose(means.sum(-1), torch.ones(clusters, 4, dtype=torch.float64))
    if clusters > 1:
        nearest = nearest_centroid(points[0], means)
        assert torch.allclose(means[nearest, torch.arange(4)], points[0].double())


def test_groups_are_numbered_by_their_first_client():
    points = random_points(6)
    groups = clusters_by_row(points, clusters=2, rng=rng())
    assert (groups[0] == 0).all()
    assert (clusters_by_row(random_points(20), clusters=4, rng=rng())[0] == 0).all()


def test_the_nearest_of_equals_is_the_first():
    means = torch.tensor([[[1.0, 0]], [[0, 1]], [[1, 0]]])
    assert nearest_centroid(torch.tensor([[0.5, 0.5]]), means).tolist() == [0]
    assert nearest_centroid(torch.tensor([[0.1, 0.9]]), means).tolist() == [1]


def test_what_cannot_be_grouped_is_refused():
    with pytest.raises(ValueError, match="at least 1 client, got 0"):
        clusters_by_row(SOFT[:0], clusters=2, rng=rng())
    with pytest.raises(ValueError, match="clusters must be >= 1, got 0"):
        clusters_by_row(SOFT, clusters=0, rng=rng())
