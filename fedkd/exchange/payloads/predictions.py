"""Predictions: scores or soft labels of public rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np

from fedkd.exchange.payload import (
    FLOAT32,
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
from fedkd.metrics.diversity import target_entropies, target_entropy
from fedkd.targets import Targets, soften
from fedkd.targets.scale import are_distributions, pass_for_soft_labels
from fedkd.tensors import as_tensor

LARGEST_SCORE = 1e4
"""Logits beyond this are refused: honest training does not produce them, attacks do."""

MOST_TOGETHER = 16_384
"""Numbers of soft labels that are looked at together: as many as a cache holds."""

Scale = Literal["logits", "probabilities"]


def _softmax(sent: "Predictions") -> "Predictions":
    values = sent.values
    if values.dtype.kind != "f" or values.ndim != 2 or not values.size:
        return sent
    with np.errstate(invalid="ignore"):
        powers = np.exp(values - values.max(axis=-1, keepdims=True))
        return replace(sent, values=powers / powers.sum(axis=-1, keepdims=True))


@dataclass(frozen=True, kw_only=True)
class Predictions(Payload):
    """Scores or soft labels of public rows.

    Attributes:
        rows: int64 positions in the public set, strictly increasing.
        values: float32 ``[rows, classes]``.
        scale: what the values are; probabilities are softened already.
        temperature: what probabilities were softened with, and what logits are to be softened
            with, > 0.
        averaged: whether they are an average of several models' and not one model's own.
        ids: how the rows relate to those that were planned, which decides what their ids cost.
        planned: how many were planned, where these are a subset.
        weights: float32 ``[rows]``, how much each row counts; None: all the same.
    """

    kind: ClassVar[str] = "predictions"
    adds_up: ClassVar[bool] = True
    lies: ClassVar[Any] = {
        "probabilities": _softmax,
        "reversed_rows": lambda sent: replace(sent, rows=sent.rows[::-1].copy()),
        "other_rows": lambda sent: replace(sent, rows=sent.rows + 1),
        "softened": lambda sent: replace(sent, temperature=4.0),
        "averaged": lambda sent: replace(sent, averaged=True),
    }

    rows: np.ndarray
    values: np.ndarray
    scale: Scale = "logits"
    temperature: float = 1.0
    averaged: bool = False
    ids: RowIds = "planned"
    planned: int = 0
    weights: np.ndarray | None = None

    @property
    def label(self) -> str:
        """``logits``, ``probabilities``, ``mean_logits`` or ``mean_probabilities``."""
        return f"mean_{self.scale}" if self.averaged else self.scale

    @property
    def payload_bytes(self) -> int:
        """Bytes of the values and weights, and of the rows' ids where they cost any."""
        weights = 0 if self.weights is None else self.weights.nbytes
        return self.values.nbytes + weights + ids_bytes(self.ids, len(self.rows), self.planned)

    @cached_property
    def targets(self) -> Targets:
        """The values as what is to be learnt."""
        if self.scale == "probabilities":
            return Targets(self.values, scale="probabilities", temperature=self.temperature)
        return Targets(self.values)

    def probabilities(self) -> np.ndarray:
        """Return the values as soft labels: logits are softened with ``temperature``."""
        if self.scale == "probabilities":
            return self.values
        return soften(as_tensor(self.values), temperature=self.temperature).numpy()

    @classmethod
    def asked(
        cls,
        rows: np.ndarray,
        classes: int,
        *,
        ids: RowIds = "planned",
        scale: Scale = "logits",
        weighted: bool = False,
    ) -> Asked:
        """Describe a client's own predictions of planned rows.

        Args:
            rows: those that were planned.
            classes: how many scores a row has.
            ids: ``planned``: exactly these; ``subset``: some of them, also none.
            scale: logits, or soft labels at temperature 1.
            weighted: whether the sender may say how much each row counts. Nobody else's business
                is who counts how much: a sum that the server sees would hold its weights.

        Raises:
            ValueError: for rows of the client's own: public rows are everybody's.
        """
        if ids == "own":
            raise ValueError("predictions are of public rows, of which nobody has his own")
        size: int | AtMost = len(rows) if ids == "planned" else AtMost(len(rows), "rows")
        limits = {
            "rows": Limit(shape=(size,), dtype=INT64),
            "values": Limit(
                shape=(size, classes),
                largest=LARGEST_SCORE,
                subject="a score",
                where="among the scores",
            ),
            "weights": Limit(
                shape=(size,), smallest=0.0, largest=1e6, subject="a weight", where="in the weights"
            ),
        }
        if not weighted:
            del limits["weights"]
        about = {"rows": rows, "ids": ids, "scale": scale}
        optional = frozenset({"weights"} & limits.keys())
        return Asked(kind=cls, limits=limits, optional=optional, about=about)

    def problem(self, asked: Asked) -> str | None:
        """Return why a client cannot have sent this, or None."""
        rows, scale = asked.about["rows"], asked.about["scale"]
        if self.averaged:
            return "an average of several models, expected the client's own predictions"
        if self.scale != scale:
            return f"scale {self.scale!r}, expected {scale!r}"
        if self.temperature != 1:
            return f"temperature {self.temperature:g}, expected 1"
        if self.ids != asked.about["ids"]:
            return f"ids {self.ids!r}, expected {asked.about['ids']!r}"
        if self.ids == "subset" and self.planned != len(rows):
            return f"a subset of planned = {self.planned} rows, expected planned = {len(rows)}"
        reason = super().problem(asked)
        if reason is not None:
            return reason
        if not _are_of(self.rows, rows, self.ids):
            kind = "the" if self.ids == "planned" else "of the"
            return f"rows are not {kind} {len(rows)} public rows of the round"
        # What a release rule made of soft labels is no distribution any more.
        return None if asked.about.get("released") else self._bad_scale()

    def not_kept(self, extent: Extent) -> str | None:
        """They are of rows of the public set, in order, with a score for each class."""
        if not in_order(self.rows, extent.public_rows):
            return "predictions of rows that are not of the public set, in order"
        if self.values.shape != (len(self.rows), extent.classes) or self.values.dtype != FLOAT32:
            return f"predictions are {self.values.dtype} {self.values.shape}"
        if self.weights is not None and self.weights.shape != (len(self.rows),):
            return f"the weights of {len(self.rows)} predictions are {self.weights.shape}"
        if not 0 < self.temperature < np.inf:
            return f"predictions have temperature {self.temperature!r}"
        return None

    def _bad_scale(self) -> str | None:
        """Name a table that is of the other scale.

        Nothing is said of few rows, nor of a single class: see `pass_for_soft_labels`. A model that
        ends in a softmax of its own is named as well: its outputs are no logits.
        """
        if self.scale == "probabilities":
            if not are_distributions(self.values):
                return "soft labels are no distributions: negative, or a sum other than 1"
        elif pass_for_soft_labels(self.values):
            return "every row of scores sums to 1: probabilities, expected logits"
        return None

    def votes(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the rows and the class that each is given; None without rows."""
        return (self.rows, self.values.argmax(-1)) if len(self.rows) else None

    def answers(self) -> tuple[np.ndarray, np.ndarray, bool] | None:
        """Return the rows, the values, and whether these are logits; None without rows.

        None as well for soft labels that codecs or mechanisms of privacy made something else of.
        """
        logits = self.scale == "logits"
        good = len(self.rows) > 0 and (logits or are_distributions(self.values))
        return (self.rows, self.values, logits) if good else None

    def targets_entropy(self) -> float | None:
        """Return the mean entropy of the soft labels, in nats; None without rows."""
        return target_entropy(self.probabilities()) if len(self.rows) else None

    @classmethod
    def targets_entropies(cls, pieces: Sequence[Payload]) -> list[float | None]:
        """Take soft labels of equal shapes together: there may be a table for every client."""
        # A kind derived from this one may mean something else by its entropy.
        tables = [
            piece.values
            for piece in pieces
            if type(piece) is Predictions and piece.scale == "probabilities"
        ]
        alike = len(tables) == len(pieces) > 0 and len({each.shape for each in tables}) == 1
        if not alike or not tables[0].size:
            return super().targets_entropies(pieces)
        width = max(1, MOST_TOGETHER // tables[0].size)
        found: list[float | None] = []
        for start in range(0, len(tables), width):
            found.extend(target_entropies(np.stack(tables[start : start + width])))
        return found

    # A sum holds for each row the sum of the weights in `weights`: not everybody sends every row.

    def weighted(self, weight: int | float) -> "Predictions":
        """Return the values times each row's weight, beside these."""
        own = np.ones(len(self.rows)) if self.weights is None else self.weights.astype(np.float64)
        weights = weight * own
        values = weights[:, None] * self.values.astype(np.float64)
        return replace(self, values=values, weights=weights)

    def plus(self, other: Payload) -> "Predictions":
        """Add up row by row; a row that only one of them has is taken as it is."""
        if not isinstance(other, Predictions):
            raise TypeError(f"expected predictions, got {other.kind}")
        mine, its = (self.scale, self.temperature), (other.scale, other.temperature)
        if mine != its:
            raise ValueError(f"predictions of two scales cannot be added up: {mine} and {its}")
        if np.array_equal(self.rows, other.rows):
            return replace(
                self, values=self.values + other.values, weights=self._sums + other._sums
            )
        rows = np.union1d(self.rows, other.rows)
        values, weights = np.zeros((len(rows), self.values.shape[1])), np.zeros(len(rows))
        for one in (self, other):
            places = np.searchsorted(rows, one.rows)
            values[places] += one.values
            weights[places] += one._sums
        return replace(self, rows=rows, values=values, weights=weights)

    def over(self, weight: int | float, like: Payload) -> "Predictions":
        """Return the mean of each row over those who sent it.

        Its ``weights`` say which share of all the weight that was, and are left out where everybody
        sent every row. The row of nobody is zero.
        """
        held = self._sums
        values = self.values / np.where(held > 0, held, 1)[:, None]
        everybody = bool((held == weight).all())
        return replace(
            self,
            values=values.astype(np.float32),
            weights=None if everybody else (held / weight).astype(np.float32),
            averaged=True,
        )

    @property
    def _sums(self) -> np.ndarray:
        if self.weights is None:
            raise ValueError("predictions have to be weighted before they are added up")
        return self.weights


def _are_of(rows: np.ndarray, planned: np.ndarray, ids: RowIds) -> bool:
    if ids == "planned":
        return np.array_equal(rows, planned)
    rising = bool((np.diff(rows) > 0).all())
    return rising and bool(np.isin(rows, planned, assume_unique=True).all())
