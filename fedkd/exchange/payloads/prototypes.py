"""Prototypes: for each class, the mean feature of the rows that have it."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedkd.exchange.payload import (
    INT64,
    Asked,
    AtMost,
    Extent,
    Limit,
    Payload,
    RowIds,
    ids_bytes,
    in_order,
)

LARGEST_FEATURE = 1e6
"""Features beyond this are refused."""


@dataclass(frozen=True, kw_only=True)
class Prototypes(Payload):
    """The mean feature of each class that the sender holds.

    Attributes:
        classes: int64 ``[held]``, strictly increasing.
        values: float32 ``[held, features]``.
        counts: float32 ``[held]``, how many rows each mean is of, where the receiver weights by it.
        num_classes: how many classes there are; which of them are held costs a bit each, or four
            bytes for each that is.
    """

    kind: ClassVar[str] = "prototypes"

    classes: np.ndarray
    values: np.ndarray
    num_classes: int
    counts: np.ndarray | None = None

    def by_class(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the values of all classes, zero for those not held, and which of them are held.

        float32 ``[num_classes, features]`` and bool ``[num_classes]``.
        """
        values = np.zeros((self.num_classes, self.values.shape[1]), np.float32)
        held = np.zeros(self.num_classes, bool)
        values[self.classes], held[self.classes] = self.values, True
        return values, held

    @property
    def payload_bytes(self) -> int:
        """Bytes of the means and counts, and of saying which classes they are of."""
        held = len(self.classes)
        ids: RowIds = "planned" if held == self.num_classes else "subset"
        counts = 0 if self.counts is None else self.counts.nbytes
        return self.values.nbytes + counts + ids_bytes(ids, held, self.num_classes)

    @classmethod
    def asked(cls, num_classes: int, features: int, *, counts: bool = False) -> Asked:
        """Describe one client's prototypes.

        Args:
            num_classes: how many classes there are; a client may hold some of them.
            features: numbers of one prototype.
            counts: whether the number of rows of each class comes with it.
        """
        held = AtMost(num_classes, "held")
        limits = {
            "classes": Limit(shape=(held,), dtype=INT64),
            "values": Limit(
                shape=(held, features),
                largest=LARGEST_FEATURE,
                subject="a feature",
                where="in the prototypes",
            ),
        }
        if counts:
            limits["counts"] = Limit(
                shape=(held,), smallest=0.0, largest=2.0**24, subject="a count"
            )
        return Asked(kind=cls, limits=limits, about={"num_classes": num_classes})

    def not_kept(self, extent: Extent) -> str | None:
        """They are of some of the classes, in order."""
        held = len(self.classes)
        if self.num_classes != extent.classes or not in_order(self.classes, extent.classes):
            return f"prototypes of classes that are not some of 0 to {extent.classes - 1}, in order"
        if self.values.ndim != 2 or len(self.values) != held:
            return f"prototypes of {held} classes are {self.values.shape}"
        if self.counts is not None and self.counts.shape != (held,):
            return f"counts of {held} prototypes are {self.counts.shape}"
        return None

    def problem(self, asked: Asked) -> str | None:
        """Return why a client cannot have sent this, or None."""
        classes = asked.about["num_classes"]
        if self.num_classes != classes:
            return f"prototypes of {self.num_classes} classes, expected {classes}"
        reason = super().problem(asked)
        if reason is not None:
            return reason
        held = self.classes
        if len(held) and (held[0] < 0 or held[-1] >= classes or bool((np.diff(held) <= 0).any())):
            return f"classes are not some of 0 to {classes - 1}, in order"
        return None
