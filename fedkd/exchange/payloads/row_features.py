"""Row features: what a layer puts out for the sender's own rows, with logits and labels."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedkd.exchange.payload import INT64, Asked, AtMost, Extent, Limit, Payload, ids_bytes
from fedkd.exchange.payloads.predictions import LARGEST_SCORE
from fedkd.exchange.payloads.prototypes import LARGEST_FEATURE


@dataclass(frozen=True, kw_only=True)
class RowFeatures(Payload):
    """Features, logits and labels of rows that the sender alone has; all of them leave him.

    Attributes:
        rows: int64 ids of the sender's own, all different; four bytes each.
        features: float32 ``[rows, ...]``: of each row what one layer puts out.
        logits: float32 ``[rows, classes]``.
        labels: int64 ``[rows]``; four bytes each.
    """

    kind: ClassVar[str] = "row_features"

    rows: np.ndarray
    features: np.ndarray
    logits: np.ndarray
    labels: np.ndarray

    @property
    def payload_bytes(self) -> int:
        """Bytes of features and logits, and of each row's id and label."""
        rows = ids_bytes("own", len(self.rows)) + 4 * len(self.labels)
        return self.features.nbytes + self.logits.nbytes + rows

    @classmethod
    def asked(cls, most_rows: int, feature_shape: tuple[int, ...], classes: int) -> Asked:
        """Describe one client's features.

        Args:
            most_rows: how many rows it has.
            feature_shape: of one row's features.
            classes: how many logits a row has.
        """
        rows = AtMost(most_rows, "rows")
        limits = {
            "rows": Limit(shape=(rows,), dtype=INT64, smallest=0, subject="a row's id"),
            "features": Limit(
                shape=(rows, *feature_shape),
                largest=LARGEST_FEATURE,
                subject="a feature",
                where="among the features",
            ),
            "logits": Limit(
                shape=(rows, classes),
                largest=LARGEST_SCORE,
                subject="a score",
                where="among the scores",
            ),
            "labels": Limit(
                shape=(rows,), dtype=INT64, smallest=0, largest=classes - 1, subject="a label"
            ),
        }
        return Asked(kind=cls, limits=limits)

    def not_kept(self, extent: Extent) -> str | None:
        """Each row has an id, features, a score for each class, and a label."""
        rows = self.rows.shape
        if len(rows) != 1 or self.labels.shape != rows or self.features.shape[:1] != rows:
            return "row features, labels and ids of different rows"
        if self.logits.shape != (*rows, extent.classes):
            return f"logits of {rows[0]} rows are {self.logits.shape}"
        if self.labels.size and not 0 <= self.labels.min() <= self.labels.max() < extent.classes:
            return f"labels that are not 0 to {extent.classes - 1}"
        return None

    def problem(self, asked: Asked) -> str | None:
        """Return why a client cannot have sent this, or None."""
        reason = super().problem(asked)
        if reason is None and len(np.unique(self.rows)) < len(self.rows):
            return "a row that is named twice"
        return reason
