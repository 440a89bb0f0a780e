"""What averaging soft labels converges to, where every student is linear in its targets.

A round lets every client train towards its target and makes the next targets of what they say:
``t_k = sum_j M[k, j] * (base_j + pull_j @ t_j)`` with a mixing matrix M whose rows sum to 1. The
derivation is in docs/closed-forms.md.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from fedkd.closed_forms.students import Student

Array = np.ndarray

LARGEST_RATE = 1 - 1e-9
"""Of a round that brings targets no nearer to each other there is no one fixed point."""


def fixed_point(
    students: Sequence[Student], weights: Sequence[int | float] | None = None
) -> Float[Array, "public classes"]:
    """Return the soft labels that a (weighted) mean of all students reproduces.

    Args:
        students: on the public rows.
        weights: how much each counts, >= 0, not all 0; None: all the same.

    Returns:
        ``(I - sum_k w_k pull_k)^-1 sum_k w_k base_k``.

    Raises:
        ValueError: there is none, or more than one: somewhere nobody's private rows have a say.
    """
    shares = mean_of(len(students), weights)[0]
    pull = np.einsum("k,kpq->pq", shares, np.stack([student.pull for student in students]))
    base = np.einsum("k,kpc->pc", shares, np.stack([student.base for student in students]))
    return _solved(pull, base, students)


def fixed_points(
    students: Sequence[Student], mixing: Float[Array, "clients clients"]
) -> Float[Array, "clients public classes"]:
    """Return the target of each client that a round reproduces, where clients differ in theirs.

    Args:
        students: on the public rows.
        mixing: row k holds how much each student counts in client k's target.

    Raises:
        ValueError: a row does not sum to 1; there is no single fixed point.
    """
    _check(mixing, len(students))
    rows, classes = students[0].base.shape
    pull = _mixed(students, mixing)
    base = np.einsum("kj,jpc->kpc", mixing, np.stack([student.base for student in students]))
    solved = _solved(pull, base.reshape(-1, classes), students)
    return solved.reshape(len(students), rows, classes)


def rate(students: Sequence[Student], mixing: Float[Array, "clients clients"]) -> float:
    """Return by which factor a round brings targets nearer to the fixed point, in the long run.

    The spectral radius of the round; below 1 there is one fixed point, and every start leads there.

    Args:
        students: on the public rows.
        mixing: as in `fixed_points`.
    """
    _check(mixing, len(students))
    if (mixing == mixing[0]).all():
        # All have one target: the round is one of the mean.
        pulls = np.stack([student.pull for student in students])
        return _radius(np.einsum("k,kpq->pq", mixing[0], pulls))
    return _radius(_mixed(students, mixing))


def mean_of(
    count: int, weights: Sequence[int | float] | None = None
) -> Float[Array, "clients clients"]:
    """Return the mixing in which everybody's target is the mean of all, oneself included.

    Args:
        count: clients, >= 1.
        weights: how much each counts, >= 0, not all 0; None: all the same.

    Examples:
        >>> from fedkd.closed_forms import mean_of
        >>> mean_of(2)
        array([[0.5, 0.5],
               [0.5, 0.5]])
    """
    counted = np.ones(count) if weights is None else np.asarray(weights, float)
    if counted.shape != (count,) or (counted < 0).any() or not counted.sum() > 0:
        raise ValueError(f"weights must be {count} numbers >= 0, not all of them 0")
    return np.tile(counted / counted.sum(), (count, 1))


def mean_of_others(count: int) -> Float[Array, "clients clients"]:
    """Return the mixing in which everybody's target is the mean of the others.

    Args:
        count: clients, >= 2.

    Examples:
        >>> from fedkd.closed_forms import mean_of_others
        >>> mean_of_others(3)
        array([[0. , 0.5, 0.5],
               [0.5, 0. , 0.5],
               [0.5, 0.5, 0. ]])
    """
    if count < 2:
        raise ValueError(f"a client alone has no others, got {count}")
    mixing: Float[Array, "clients clients"] = (np.ones((count, count)) - np.eye(count)) / (
        count - 1
    )
    return mixing


def one_before(count: int) -> Float[Array, "clients clients"]:
    """Return the mixing in which everybody's target is what the client before it says: a ring.

    Examples:
        >>> from fedkd.closed_forms import one_before
        >>> one_before(3)
        array([[0., 0., 1.],
               [1., 0., 0.],
               [0., 1., 0.]])
    """
    return np.roll(np.eye(count), -1, axis=1)


def _check(mixing: Float[Array, "clients clients"], count: int) -> None:
    if mixing.shape != (count, count):
        raise ValueError(f"mixing must be [{count}, {count}], got {list(mixing.shape)}")
    if (mixing < 0).any() or not np.allclose(mixing.sum(1), 1):
        raise ValueError("every row of mixing must be >= 0 and sum to 1")


def _mixed(
    students: Sequence[Student], mixing: Float[Array, "clients clients"]
) -> Float[Array, "all all"]:
    """Return the round as one matrix: block (k, j) is ``mixing[k, j] * pull_j``."""
    blocks = [
        [share * student.pull for share, student in zip(row, students, strict=True)]
        for row in mixing
    ]
    return np.block(blocks)


def _radius(matrix: Float[Array, "all all"]) -> float:
    symmetric = np.allclose(matrix, matrix.T, rtol=0, atol=1e-12)
    values = np.linalg.eigvalsh(matrix) if symmetric else np.linalg.eigvals(matrix)
    return float(np.abs(values).max(initial=0.0))


def _all_contract(students: Sequence[Student]) -> bool:
    """Tell whether every student brings any two targets nearer, by one norm for all of them.

    Then so does every mixing of them: its rows are averages.
    """
    return any(
        all(np.linalg.norm(student.pull, norm) < LARGEST_RATE for student in students)
        for norm in (np.inf, 2)
    )


def _solved(
    pull: Float[Array, "all all"], base: Float[Array, "all classes"], students: Sequence[Student]
) -> Float[Array, "all classes"]:
    # Cheaper than the spectral radius of all together, which decides where this does not.
    if not _all_contract(students):
        radius = _radius(pull)
        if radius > LARGEST_RATE:
            raise ValueError(
                f"there is no single fixed point: a round's spectral radius is {radius:.12g}; "
                "private rows with a weight, or a ridge, decide it"
            )
    return np.linalg.solve(np.eye(len(pull)) - pull, base)
