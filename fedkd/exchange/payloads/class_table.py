"""Class tables: for each class, what a client's model says of the rows that have it."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedkd.exchange.payload import Asked, Extent, Limit, Payload
from fedkd.exchange.payloads.predictions import LARGEST_SCORE, Scale
from fedkd.targets.scale import are_distributions


@dataclass(frozen=True, kw_only=True)
class ClassTable(Payload):
    """The mean prediction of each class's rows.

    Attributes:
        values: float32 ``[classes, classes]``; the row of a class that the sender does not hold
            is zero, which says so without a flag.
        counts: float32 ``[classes]``, how many rows each mean is of, where the receiver weights by
            it; None: he does not, and it costs nothing.
        scale: mean soft labels at temperature 1, or mean logits.
    """

    kind: ClassVar[str] = "class_table"

    values: np.ndarray
    counts: np.ndarray | None = None
    scale: Scale = "probabilities"

    @property
    def held(self) -> np.ndarray:
        """Which classes the sender holds: bool ``[classes]``."""
        if self.counts is not None:
            return self.counts > 0
        return np.asarray((self.values != 0).any(-1))

    @classmethod
    def asked(cls, classes: int, *, counts: bool = False, scale: Scale = "probabilities") -> Asked:
        """Describe one client's table.

        Args:
            classes: how many there are.
            counts: whether the number of rows of each class comes with it.
            scale: of the means.
        """
        limits = {
            "values": Limit(
                shape=(classes, classes),
                largest=LARGEST_SCORE,
                subject="a score",
                where="in the class table",
            )
        }
        if counts:
            limits["counts"] = Limit(
                shape=(classes,), smallest=0.0, largest=2.0**24, subject="a count"
            )
        return Asked(kind=cls, limits=limits, about={"scale": scale})

    def not_kept(self, extent: Extent) -> str | None:
        """It has a row and a column for each class."""
        classes = extent.classes
        if self.values.shape != (classes, classes):
            return f"a class table is {self.values.shape}, and there are {classes} classes"
        if self.counts is not None and self.counts.shape != (classes,):
            return f"counts are {self.counts.shape}, and there are {classes} classes"
        return None

    def problem(self, asked: Asked) -> str | None:
        """Return why a client cannot have sent this, or None."""
        if self.scale != asked.about["scale"]:
            return f"scale {self.scale!r}, expected {asked.about['scale']!r}"
        reason = super().problem(asked)
        if reason is None and self.scale == "probabilities" and not asked.about.get("released"):
            held = self.values[self.held]
            if len(held) and not are_distributions(held):
                return "class means are no distributions: negative, or a sum other than 1"
        return reason
