"""Density ratios tell rows like the known ones from others."""

import numpy as np
import pytest
import torch

from fedkd.targets import density_ratio, density_weights

CORNERS = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]], dtype=torch.float64)
KNOWN = torch.tensor([[0.9, 0.8], [1, 0.9], [0.8, 1]], dtype=torch.float64)
ASKED = torch.tensor([[1.0, 1], [0, 0], [0.5, 0.5]], dtype=torch.float64)


def test_weights_and_ratios_by_hand():
    weights = density_weights(KNOWN, CORNERS, width=0.5, ridge=0.5)
    assert np.allclose(weights, [-0.01348486, -0.10333801, -0.10289432, -0.61464804], atol=1e-8)
    ratios = density_ratio(ASKED, KNOWN, CORNERS, width=0.5, ridge=0.5)
    assert np.allclose(ratios, [1.22929609, 0.02696973, 0.72877372], atol=1e-8)


def test_the_system_is_solved_and_not_multiplied_by():
    """Published fault: the matrix of the system is inverted, and then the matrix itself is used."""

    def kernel(rows, others):
        return torch.exp(-torch.cdist(rows, others).square() / (2 * 0.5**2))

    matrix = kernel(CORNERS, CORNERS) / 4 + 0.5 * torch.eye(4)
    right = -kernel(CORNERS, KNOWN).sum(1) / (4 * 3 * 0.5)
    weights = density_weights(KNOWN, CORNERS, width=0.5, ridge=0.5)
    assert torch.allclose(matrix @ weights, right)
    share = kernel(ASKED, KNOWN).sum(1) / (3 * 0.5)
    published = kernel(ASKED, CORNERS) @ (matrix @ right) + share
    assert np.allclose(published, [1.48915179, 0.02459270, 0.82819673], atol=1e-8)
    ours = density_ratio(ASKED, KNOWN, CORNERS, width=0.5, ridge=0.5)
    assert (ours - published).abs().max() > 0.09


def test_the_ridge_falls_with_the_auxiliary_rows():
    given = density_ratio(ASKED, KNOWN, CORNERS, width=0.5, ridge=0.5)
    assert torch.equal(density_ratio(ASKED, KNOWN, CORNERS, width=0.5), given)


def test_rows_of_the_known_kind_have_the_larger_ratios():
    generator = torch.Generator().manual_seed(0)
    blind = torch.rand(200, 8, generator=generator) * 4 - 2
    known, alike = 0.3 * torch.randn(2, 60, 8, generator=generator) + 1
    other = 0.3 * torch.randn(60, 8, generator=generator) - 1
    ratios = density_ratio(torch.cat([alike, other]), known, blind, width=1.0)
    assert ratios[:60].min() > ratios[60:].max()


def test_a_part_of_the_rows_has_the_ratios_of_the_whole():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(2100, 3, generator=generator)
    whole = density_ratio(rows, rows[:50], rows[50:90], width=1.0)
    assert len(whole) == 2100
    assert np.allclose(density_ratio(rows[2000:], rows[:50], rows[50:90], width=1.0), whole[2000:])
    assert len(density_ratio(rows[:0], rows[:50], rows[50:90], width=1.0)) == 0


def test_what_no_ratio_can_be_made_of_is_refused():
    with pytest.raises(ValueError, match="at least 1 known row, got 0"):
        density_ratio(ASKED, KNOWN[:0], CORNERS, width=1.0)
    with pytest.raises(ValueError, match="at least 1 auxiliary row, got 0"):
        density_ratio(ASKED, KNOWN, CORNERS[:0], width=1.0)
    with pytest.raises(ValueError, match="width must be > 0 and finite, got 0"):
        density_ratio(ASKED, KNOWN, CORNERS, width=0.0)
    with pytest.raises(ValueError, match="ridge must be > 0 and finite, got -1"):
        density_ratio(ASKED, KNOWN, CORNERS, width=1.0, ridge=-1.0)
