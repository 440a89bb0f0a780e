"""Low-rank updates: what changed in a model's weights, matrices as factors where these are smaller.

Source: Wu, Wu, Lyu, Huang, Xie, 2022, Communication-efficient federated learning via knowledge
distillation (FedKD), equations 7 to 9. https://arxiv.org/abs/2108.13323
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from fedkd.exchange.factors import Factors, as_matrix, factors_of
from fedkd.exchange.payload import Asked, AtMost, Limit, Payload
from fedkd.exchange.payloads.weights import LARGEST_PARAMETER


@dataclass(frozen=True, kw_only=True)
class LowRank(Payload):
    """What is added to a model's weights.

    Attributes:
        base: number of the weights that it is added to; 0: it stands for the weights themselves.
        made: number of the weights that it makes; 0 where nobody asks.
        whole: arrays that travel as they are, by name. Of weights that are floating-point and
            finite they are differences, of others values.
        left: ``[m, rank]`` of a matrix, by name.
        values: singular values ``[rank]`` of the same.
        right: ``[rank, n]`` of the same.
    """

    kind: ClassVar[str] = "low_rank"
    is_added: ClassVar[bool] = True

    base: int
    made: int = 0
    whole: Mapping[str, np.ndarray] = field(default_factory=dict)
    left: Mapping[str, np.ndarray] = field(default_factory=dict)
    values: Mapping[str, np.ndarray] = field(default_factory=dict)
    right: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def payload_bytes(self) -> int:
        """Bytes of all arrays."""
        parts = (self.whole, self.left, self.values, self.right)
        return sum(array.nbytes for part in parts for array in part.values())

    @classmethod
    def between(
        cls,
        before: Mapping[str, np.ndarray],
        after: Mapping[str, np.ndarray],
        *,
        energy: float,
        base: int,
        made: int = 0,
    ) -> "LowRank":
        """Return how weights changed; as factors where ``rank * (m + n + 1) < m * n``.

        Args:
            before: weights.
            after: weights of the same model.
            energy: share of a matrix's energy that its factors have to exceed, in [0, 1].
            base: number of the weights before.
            made: number of the weights after.
        """
        whole, left, values, right = {}, {}, {}, {}
        for name, now in after.items():
            if not _differs(before[name]):
                whole[name] = now
                continue
            change = now - before[name]
            if change.ndim < 2 or not np.isfinite(change).all():
                # Of a model that diverged there are no factors; who checks it names it.
                whole[name] = change
                continue
            factors = factors_of(as_matrix(change), energy=energy)
            if factors is None:
                whole[name] = change
                continue
            left[name], values[name], right[name] = factors
        return cls(base=base, made=made, whole=whole, left=left, values=values, right=right)

    @classmethod
    def itself(cls, weights: Mapping[str, np.ndarray], *, made: int) -> "LowRank":
        """Return the weights as they are, for who has nothing that could be added to."""
        return cls(base=0, made=made, whole=dict(weights))

    def added_to(self, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the weights with the change, the same bits wherever it is computed."""
        if not self.base:
            return dict(self.whole)
        changed = {}
        for name, array in weights.items():
            if not _differs(array):
                changed[name] = self.whole[name]
            elif name in self.whole:
                changed[name] = array + self.whole[name]
                # A change that was rounded may miss 0, and BatchNorm takes the root of this.
                if name.endswith("running_var"):
                    changed[name] = np.maximum(changed[name], 0)
            else:
                change = Factors(self.left[name], self.values[name], self.right[name]).product()
                changed[name] = array + change.reshape(array.shape)
        return changed

    @classmethod
    def asked(cls, like: Mapping[str, np.ndarray], *, base: int) -> Asked:
        """Describe an update of one model.

        Args:
            like: any weights of that model.
            base: number of the weights that it has to be an update of.
        """
        limits = {}
        for name, array in like.items():
            subject = f"change of {name!r}" if _differs(array) else f"parameter {name!r}"
            finite = array.dtype.kind != "f" or bool(np.isfinite(array).all())
            limits[f"whole/{name}"] = Limit(
                shape=array.shape,
                dtype=array.dtype,
                largest=LARGEST_PARAMETER,
                smallest=0.0 if name.endswith("num_batches_tracked") else -LARGEST_PARAMETER,
                subject=subject,
                where=f"in the {subject}",
                constant=None if finite else array,
            )
            if not _differs(array) or array.ndim < 2:
                continue
            rows, columns = as_matrix(array).shape
            rank = AtMost(min(rows, columns), f"rank of {name!r}")
            for part, shape in (
                ("left", (rows, rank)),
                ("values", (rank,)),
                ("right", (rank, columns)),
            ):
                limits[f"{part}/{name}"] = Limit(
                    shape=shape,
                    dtype=array.dtype,
                    largest=LARGEST_PARAMETER if part == "values" else 2.0,
                    subject=f"a factor of the {subject}",
                    where=f"in a factor of the {subject}",
                )
        about = {"base": base, "names": tuple(like)}
        return Asked(kind=cls, limits=limits, optional=frozenset(limits), about=about)

    def problem(self, asked: Asked) -> str | None:
        """Return why a client cannot have sent this, or None."""
        if self.base != asked.about["base"]:
            return f"an update of weights {self.base}, expected of {asked.about['base']}"
        reason = super().problem(asked)
        if reason is not None:
            return reason
        for name in asked.about["names"]:
            factors = [name in part for part in (self.left, self.values, self.right)]
            if [name in self.whole, all(factors), any(factors)] not in (
                [True, False, False],
                [False, True, True],
            ):
                return f"{name!r} is neither there as it is nor as three factors"
            if all(factors) and not len(self.values[name]):
                return f"{name!r} has rank 0"
        return None

    def ranks(self) -> dict[str, int]:
        """Return the rank of each matrix that travels as factors."""
        return {name: len(values) for name, values in self.values.items()}


def _differs(array: np.ndarray) -> bool:
    """Tell whether weights are such that a difference of them says something."""
    return array.dtype.kind == "f" and (not array.size or math.isfinite(float(array.sum())))
