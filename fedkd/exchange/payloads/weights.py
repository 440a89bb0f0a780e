"""Weights: a model's parameters and buffers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedkd.exchange.payload import Asked, Limit, Payload, bad_arrays, of_type

LARGEST_PARAMETER = 1e8
"""Weights and statistics beyond this are refused: one of them ruins every client's model."""


def only_counts(name: str) -> bool:
    """Tell whether an array cannot be negative: BatchNorm's variance and its counter."""
    return name.endswith(("running_var", "num_batches_tracked"))


@dataclass(frozen=True, kw_only=True)
class Weights(Payload):
    """A model's parameters and buffers, by name.

    Attributes:
        arrays: of the types and shapes that the model has.
    """

    kind: ClassVar[str] = "weights"
    adds_up: ClassVar[bool] = True

    arrays: Mapping[str, np.ndarray]

    @property
    def payload_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    @classmethod
    def asked(cls, like: Mapping[str, np.ndarray]) -> Asked:
        """Describe the weights of one model.

        Args:
            like: any weights of that model. Its arrays that hold NaN or infinity, such as a mask of
                -inf, have to come back as they are.
        """
        limits = {}
        for name, array in like.items():
            subject = f"parameter {name!r}"
            finite = array.dtype.kind != "f" or bool(np.isfinite(array).all())
            is_count = only_counts(name)
            limits[f"arrays/{name}"] = Limit(
                shape=array.shape,
                dtype=array.dtype,
                largest=LARGEST_PARAMETER,
                smallest=0.0 if is_count else -LARGEST_PARAMETER,
                subject=subject,
                where=f"in {subject}",
                constant=None if finite else array,
            )
        return Asked(kind=cls, limits=limits)

    # Written out: every upload of every averaging algorithm passes here.

    def problem(self, asked: Asked) -> str | None:
        """Return why this is no good answer, or None; what `Payload.problem` says."""
        arrays = self.arrays
        if not all(type(n) is str and type(a) is np.ndarray for n, a in arrays.items()):
            return super().problem(asked)
        return bad_arrays({f"arrays/{name}": array for name, array in arrays.items()}, asked)

    def weighted(self, weight: int | float) -> "Weights":
        """Return the arrays times a weight, in float64."""
        # Of an array without dimensions NumPy's products are scalars, which torch refuses.
        return Weights(
            arrays={n: np.asarray(weight * a.astype(np.float64)) for n, a in self.arrays.items()}
        )

    def plus(self, other: Payload) -> "Weights":
        """Add up array by array."""
        if not isinstance(other, Weights) or other.arrays.keys() != self.arrays.keys():
            raise ValueError("weights of two forms cannot be added up")
        return Weights(arrays={n: np.asarray(a + other.arrays[n]) for n, a in self.arrays.items()})

    def over(self, weight: int | float, like: Payload) -> "Weights":
        """Return the mean in the model's own types; counters and flags are rounded."""
        if not isinstance(like, Weights):
            raise TypeError(f"expected weights, got {like.kind}")
        return Weights(
            arrays={
                name: of_type(np.asarray(total / weight), like.arrays[name].dtype)
                for name, total in self.arrays.items()
            }
        )
