"""Students that are trained to the end in one line: linear ridge, kernel ridge, kernel smoothing.

Each minimises ``a * |f(X) - Y|^2 + b * |f(P) - t|^2 + ridge * |f|^2`` over its private rows X with
labels Y and the public rows P with targets t, or averages labels and targets around a row. What
it says is then ``base + pull @ t``: linear in the targets. Everything is NumPy in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

Array = np.ndarray

Kernel = Callable[
    [Float[Array, "rows features"], Float[Array, "others features"]], Float[Array, "rows others"]
]
"""How alike two rows are: a symmetric positive semi-definite function."""


@dataclass(frozen=True, slots=True)
class Student:
    """What a student says of some rows once it is trained, by the targets that it is given.

    Attributes:
        base: float64 ``[rows, classes]``, what it says where all targets are 0.
        pull: float64 ``[rows, public]``, how what it says follows the targets; 0 for a student
            that learns nothing from public rows.
    """

    base: Float[Array, "rows classes"]
    pull: Float[Array, "rows public"]

    def says(self, targets: Float[Array, "public classes"]) -> Float[Array, "rows classes"]:
        """Return its scores of the rows after training towards these targets."""
        said: Float[Array, "rows classes"] = self.base + self.pull @ targets
        return said


def linear_student(
    private: Float[Array, "private features"],
    labels: Float[Array, "private classes"],
    public: Float[Array, "public features"],
    *,
    ridge: int | float,
    private_weight: int | float = 1.0,
    public_weight: int | float = 1.0,
    at: Float[Array, "rows features"] | None = None,
) -> Student:
    """Train a linear model without an intercept; a column of ones gives it one that shrinks too.

    Args:
        private: its own rows.
        labels: one-hot, or any scores.
        public: everybody's rows.
        ridge: of the squared norm of all weights, > 0.
        private_weight: of the squared error of each private row, >= 0.
        public_weight: the same of each public row.
        at: rows that it is asked about; the public ones by default.

    Raises:
        ValueError: for a ridge or a weight out of range.
    """
    _check(ridge, private_weight, public_weight)
    seen = private_weight * private.T @ private + public_weight * public.T @ public
    seen += ridge * np.eye(private.shape[1])
    solved = np.linalg.solve(
        seen, np.hstack([private_weight * private.T @ labels, public_weight * public.T])
    )
    said = (public if at is None else at) @ solved
    classes = labels.shape[1]
    return Student(said[:, :classes], said[:, classes:])


def kernel_student(
    private: Float[Array, "private features"],
    labels: Float[Array, "private classes"],
    public: Float[Array, "public features"],
    *,
    kernel: Kernel,
    ridge: int | float,
    private_weight: int | float = 1.0,
    public_weight: int | float = 1.0,
    at: Float[Array, "rows features"] | None = None,
) -> Student:
    """Train kernel ridge regression: `linear_student` in the space of the kernel.

    Args:
        private: its own rows.
        labels: one-hot, or any scores.
        public: everybody's rows.
        kernel: such as `rbf`.
        ridge: of the squared norm in the kernel's space, > 0.
        private_weight: of the squared error of each private row, >= 0.
        public_weight: the same of each public row.
        at: rows that it is asked about; the public ones by default.

    Raises:
        ValueError: for a ridge or a weight out of range.
    """
    _check(ridge, private_weight, public_weight)
    asked, rows = public if at is None else at, np.concatenate([private, public])
    weights = np.repeat([float(private_weight), public_weight], [len(private), len(public)])
    # With W the weights, (K + ridge W^-1)^-1 is W^1/2 (W^1/2 K W^1/2 + ridge I)^-1 W^1/2, in which
    # rows without a weight have no part.
    roots = np.sqrt(weights)[:, None]
    gram = roots * kernel(rows, rows) * roots.T + ridge * np.eye(len(rows))
    smooth = (roots * np.linalg.solve(gram, roots * kernel(rows, asked))).T
    own, others = smooth[:, : len(private)], smooth[:, len(private) :]
    return Student(own @ labels, others)


def smoothing_student(
    private: Float[Array, "private features"],
    labels: Float[Array, "private classes"],
    public: Float[Array, "public features"],
    *,
    kernel: Kernel,
    private_weight: int | float = 1.0,
    public_weight: int | float = 1.0,
    at: Float[Array, "rows features"] | None = None,
) -> Student:
    """Average labels and targets of the rows around, by the kernel (Nadaraya-Watson).

    Of distributions it makes distributions: the student for rules that average probabilities.

    Args:
        private: its own rows.
        labels: one-hot, or other distributions.
        public: everybody's rows.
        kernel: > 0 everywhere.
        private_weight: of each private row in an average, >= 0.
        public_weight: the same of each public row.
        at: rows that it is asked about; the public ones by default.

    Raises:
        ValueError: for a weight out of range, or a row to which no other is near at all.
    """
    _check(1.0, private_weight, public_weight)
    asked = public if at is None else at
    own, others = (
        private_weight * kernel(asked, private),
        public_weight * kernel(asked, public),
    )
    total = own.sum(1, keepdims=True) + others.sum(1, keepdims=True)
    if not (total > 0).all():
        raise ValueError("a row has no neighbour with a weight: use a wider kernel")
    return Student(own @ labels / total, others / total)


def rbf(width: int | float) -> Kernel:
    """Return ``exp(-|x - z|^2 / (2 width^2))``.

    Args:
        width: in the units of the features, > 0.
    """
    if not width > 0:
        raise ValueError(f"width must be > 0, got {width}")

    def kernel(
        rows: Float[Array, "rows features"], others: Float[Array, "others features"]
    ) -> Float[Array, "rows others"]:
        squares = np.square(rows).sum(1)[:, None] + np.square(others).sum(1)
        distances = np.maximum(squares - 2 * rows @ others.T, 0.0)
        alike: Float[Array, "rows others"] = np.exp(-distances / (2 * width**2))
        return alike

    return kernel


def linear_kernel(
    rows: Float[Array, "rows features"], others: Float[Array, "others features"]
) -> Float[Array, "rows others"]:
    """Return inner products: with it `kernel_student` is `linear_student`."""
    products: Float[Array, "rows others"] = rows @ others.T
    return products


def _check(ridge: int | float, private_weight: int | float, public_weight: int | float) -> None:
    if not 0 < ridge < np.inf:
        raise ValueError(f"ridge must be > 0, got {ridge}")
    for name, weight in (("private_weight", private_weight), ("public_weight", public_weight)):
        if not 0 <= weight < np.inf:
            raise ValueError(f"{name} must be >= 0, got {weight}")
