"""Row logits: what a server says about rows that one client alone has."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedkd.exchange.payload import Extent, Payload


@dataclass(frozen=True, kw_only=True)
class RowLogits(Payload):
    """Logits of the receiver's own rows, in the order in which it named them.

    Attributes:
        rows: int64 ids of the receiver's own, all different. It knows them, so they cost nothing.
        values: float32 ``[rows, classes]``.
    """

    kind: ClassVar[str] = "row_logits"

    rows: np.ndarray
    values: np.ndarray

    @property
    def payload_bytes(self) -> int:
        """Bytes of the values."""
        return self.values.nbytes

    def not_kept(self, extent: Extent) -> str | None:
        """Each row has an id and a score for each class."""
        if self.rows.ndim != 1 or self.values.shape != (len(self.rows), extent.classes):
            return f"logits of rows {self.rows.shape} are {self.values.shape}"
        return None

    def of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the logits of rows of any order, zeros where there are none, and which there are.

        Args:
            rows: int64 ids.

        Returns:
            float32 ``[rows, classes]``, and bool ``[rows]``.
        """
        places = {int(row): place for place, row in enumerate(self.rows)}
        found = np.array([places.get(int(row), -1) for row in rows], np.int64)
        known = found >= 0
        values = np.zeros((len(rows), self.values.shape[1]), np.float32)
        values[known] = self.values[found[known]]
        return values, known
