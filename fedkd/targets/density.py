"""Density ratios: how much more often rows like this one are known than drawn blindly."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

PART = 1024
"""Rows that are compared with all others at a time."""


def density_ratio(
    rows: Float[Tensor, "rows features"],
    known: Float[Tensor, "known features"],
    auxiliary: Float[Tensor, "auxiliary features"],
    *,
    width: float,
    ridge: float | None = None,
) -> Float[Tensor, "rows"]:
    """Estimate the density of known rows over that of auxiliary ones, at some rows (KuLSIF).

    ``sum_i alpha_i k(row, auxiliary_i) + sum_j k(row, known_j) / (known ridge)`` with the Gaussian
    kernel ``k(a, b) = exp(-|a - b|^2 / (2 width^2))`` and the ``alpha`` of `density_weights`. An
    estimate may be negative.

    Args:
        rows: where it is estimated.
        known: rows drawn from the density above the line.
        auxiliary: rows drawn from the one below, such as uniform ones.
        width: of the kernel, > 0, in the units of the features.
        ridge: > 0, against overfitting; None: ``auxiliary ** -0.5``.

    Returns:
        float64 on the CPU.

    Raises:
        ValueError: if there are no known or no auxiliary rows, or a number is out of range.

    Source:
        Kanamori, Suzuki, Sugiyama, 2012, Statistical analysis of kernel-based least-squares
        density-ratio estimation, section 3. https://doi.org/10.1007/s10994-011-5266-3
    """
    weights = density_weights(known, auxiliary, width=width, ridge=ridge)
    share = 1 / (len(known) * _ridge(ridge, len(auxiliary)))
    parts = [
        _kernel(part, auxiliary, width) @ weights + share * _kernel(part, known, width).sum(dim=1)
        for part in rows.split(PART)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def density_weights(
    known: Float[Tensor, "known features"],
    auxiliary: Float[Tensor, "auxiliary features"],
    *,
    width: float,
    ridge: float | None = None,
) -> Float[Tensor, "auxiliary"]:
    """Return the weight of each auxiliary row in `density_ratio`.

    Solves ``(K_xx / n + ridge I) alpha = -K_xy 1 / (n m ridge)``, ``x`` the ``n`` auxiliary rows
    and ``y`` the ``m`` known ones. (The code of Selective-FD multiplies by the matrix instead.)

    Raises:
        ValueError: as `density_ratio`.
    """
    for name, given in (("known", known), ("auxiliary", auxiliary)):
        if len(given) == 0:
            raise ValueError(f"a density ratio needs at least 1 {name} row, got 0")
    if not 0 < width < math.inf:
        raise ValueError(f"width must be > 0 and finite, got {width}")
    ridge, rows = _ridge(ridge, len(auxiliary)), len(auxiliary)
    matrix = _kernel(auxiliary, auxiliary, width) / rows
    matrix += ridge * torch.eye(rows, dtype=torch.float64)
    right = -_kernel(auxiliary, known, width).sum(dim=1) / (rows * len(known) * ridge)
    solved: Tensor = torch.linalg.solve(matrix, right)
    return solved


def _ridge(given: float | None, auxiliary: int) -> float:
    ridge = auxiliary**-0.5 if given is None else given
    if not 0 < ridge < math.inf:
        raise ValueError(f"ridge must be > 0 and finite, got {ridge}")
    return ridge


def _kernel(
    rows: Float[Tensor, "rows features"], others: Float[Tensor, "others features"], width: float
) -> Float[Tensor, "rows others"]:
    one, other = rows.detach().cpu().double(), others.detach().cpu().double()
    # Differences, not products: a row's kernel with itself is exactly 1.
    distances = torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.exp(-(distances**2) / (2 * width**2))
