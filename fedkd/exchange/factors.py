"""Low rank: matrices as a few singular vectors, where these are fewer numbers.

Source: Wu, Wu, Lyu, Huang, Xie, 2022, Communication-efficient federated learning via knowledge
distillation (FedKD), equations 7 to 9. https://arxiv.org/abs/2108.13323
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Factors(NamedTuple):
    """A matrix as ``left * values @ right``.

    Attributes:
        left: ``[m, rank]``.
        values: ``[rank]``, falling.
        right: ``[rank, n]``.
    """

    left: np.ndarray
    values: np.ndarray
    right: np.ndarray

    def product(self) -> np.ndarray:
        """Return the matrix, the same bits wherever it is computed."""
        # Not a matrix product, whose last bit depends on threads.
        made: np.ndarray = np.einsum("mr,rn->mn", self.left * self.values, self.right)
        return made


def rank_of(values: np.ndarray, energy: float) -> int:
    """Return the smallest rank whose share of all energy is above a threshold; all if none is.

    Args:
        values: singular values, falling; at least one.
        energy: the threshold on the share of their squares, in [0, 1].
    """
    squares = np.square(values.astype(np.float64))
    total = squares.sum()
    above = np.flatnonzero(np.cumsum(squares) > energy * total)
    # The last sum is the total but for rounding, so that nothing is above the whole of it.
    return len(values) if energy >= 1 or not len(above) else int(above[0]) + 1


def saves(rank: int, rows: int, columns: int) -> bool:
    """Tell whether factors of this rank are fewer numbers than the matrix."""
    return rank * (rows + columns + 1) < rows * columns


def as_matrix(array: np.ndarray) -> np.ndarray:
    """Return an array of two or more dimensions as a matrix: the first one against the others."""
    return array.reshape(len(array), -1)


def factors_of(
    matrix: Float[np.ndarray, "rows columns"], *, energy: float, most: int | None = None
) -> Factors | None:
    """Return the largest singular values of a finite matrix and their vectors, in its type.

    Args:
        matrix: to be written.
        energy: share of the sum of squares that they exceed, in [0, 1]; all of them where no part
            does. The rank is never 0.
        most: singular values, >= 1; None: as many as it takes.

    Returns:
        The factors; None where they would not be fewer numbers than the matrix.
    """
    if not saves(1, *matrix.shape):
        return None
    u, s, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    rank = _saving_rank(s, matrix.shape, energy, most)
    if rank is None:
        return None
    return Factors(
        np.ascontiguousarray(u[:, :rank], matrix.dtype),
        s[:rank].astype(matrix.dtype),
        np.ascontiguousarray(v[:rank], matrix.dtype),
    )


def factors_by_squares(
    matrix: Float[np.ndarray, "rows columns"], *, energy: float, most: int | None = None
) -> Factors | None:
    """The same as `factors_of` but for rounding, in a fifth of the time for a layer of LeNet.

    The squares of the singular values, and the vectors of the shorter side, are those of the matrix
    times its own transpose, which is as small as that side.
    """
    if not saves(1, *matrix.shape):
        return None
    wide = matrix.astype(np.float64)
    upright = len(wide) > wide.shape[1]
    short = wide.T if upright else wide
    squares, vectors = np.linalg.eigh(short @ short.T)
    values = np.sqrt(np.maximum(squares[::-1], 0))
    rank = _saving_rank(values, matrix.shape, energy, most)
    if rank is None:
        return None
    own = vectors[:, ::-1][:, :rank]
    kept = values[:rank]
    other = (own.T @ short) / np.where(kept > 0, kept, 1)[:, None]
    left, right = (other.T, own.T) if upright else (own, other)
    return Factors(
        np.ascontiguousarray(left, matrix.dtype),
        kept.astype(matrix.dtype),
        np.ascontiguousarray(right, matrix.dtype),
    )


def _saving_rank(
    values: np.ndarray, shape: tuple[int, ...], energy: float, most: int | None
) -> int | None:
    """Return the rank that is needed; None where so many factors save nothing."""
    rows, columns = shape
    needed = rank_of(values, energy)
    rank = needed if most is None else min(needed, most)
    return rank if saves(rank, rows, columns) else None
