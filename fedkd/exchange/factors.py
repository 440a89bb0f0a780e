"""Low rank: matrices as a few singular vectors, where these are fewer numbers.

Source: Wu, Wu, Lyu, Huang, Xie, 2022, Communication-efficient federated learning via knowledge
distillation (FedKD), equations 7 to 9. https://arxiv.org/abs/2108.13323
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float

_SINGLE_BELOW = 0.9999
"""Share of all squares up to which single precision finds them: it is off by a millionth of all."""
_SMALLEST, _LARGEST = 1e-15, 1e15
"""Sizes of numbers whose squares and their sums single precision holds."""


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
    return _rank_of_squares(np.square(values.astype(np.float64)), energy)


def _rank_of_squares(squares: Float[np.ndarray, " values"], energy: float) -> int:
    sums = squares.cumsum()
    # The last sum is the total but for rounding, so that nothing is above the whole of it.
    if energy >= 1:
        return len(squares)
    return min(int(sums.searchsorted(energy * sums[-1], side="right")) + 1, len(squares))


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
    rank = _saving_rank(np.square(s), matrix.shape, energy, most)
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
    """The same as `factors_of` but for rounding, in a fourth of the time for a layer of LeNet.

    The squares of the singular values, and the vectors of the shorter side, are those of the matrix
    times its own transpose, which is as small as that side.

    They are found in single precision unless ``energy`` or the sizes ask for more. The share of the
    squares that is left out is then above ``1 - energy`` by at most a millionth, and the product
    is that of `factors_of` to two millionths of the largest singular value, where ranks are equal.
    """
    if not saves(1, *matrix.shape):
        return None
    upright = len(matrix) > matrix.shape[1]
    short = matrix.T if upright else matrix
    size = max(float(short.max()), -float(short.min()))
    if energy > _SINGLE_BELOW or not _SMALLEST < size < _LARGEST:
        short = short.astype(np.float64)
    found, vectors = (part.numpy() for part in torch.linalg.eigh(torch.from_numpy(short @ short.T)))
    squares = np.maximum(found[::-1].astype(np.float64), 0)
    rank = _saving_rank(squares, matrix.shape, energy, most)
    if rank is None:
        return None
    # In one piece, or NumPy would multiply without BLAS.
    own = np.ascontiguousarray(vectors.T[: -rank - 1 : -1])
    kept = np.sqrt(squares[:rank])
    other = own @ short
    other /= np.where(kept > 0, kept, 1)[:, None].astype(short.dtype)
    left, right = (other.T, own) if upright else (own.T, other)
    return Factors(
        np.ascontiguousarray(left, matrix.dtype),
        kept.astype(matrix.dtype),
        np.ascontiguousarray(right, matrix.dtype),
    )


def _saving_rank(
    squares: np.ndarray, shape: tuple[int, ...], energy: float, most: int | None
) -> int | None:
    """Return the rank that is needed; None where so many factors save nothing."""
    rows, columns = shape
    needed = _rank_of_squares(squares, energy)
    rank = needed if most is None else min(needed, most)
    return rank if saves(rank, rows, columns) else None
