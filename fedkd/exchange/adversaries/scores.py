"""Where payloads hold scores of classes, and what a lie about them looks like.

Predictions hold them for public rows, class tables for classes, row features for rows of the
sender's own; bundles hold any of these. Logits are lied about as logits, and soft labels so that
they stay distributions, which no check of ranges can tell from honest ones.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64

from fedkd.exchange.payload import Payload
from fedkd.exchange.payloads import Bundle, ClassTable, Predictions
from fedkd.exchange.payloads.row_features import RowFeatures
from fedkd.targets.scale import Scale

SHARED_SCORES: tuple[type[Payload], ...] = (Predictions, ClassTable)
"""Kinds with scores of what all clients have: public rows, classes."""

SCORES: tuple[type[Payload], ...] = (*SHARED_SCORES, RowFeatures)
"""Kinds with scores, also of rows that the sender alone has."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """A table of scores within a payload.

    Attributes:
        place: of the array in the payload, see `fedkd.exchange.values.flatten`.
        of: the kind of payload that holds it.
        ids: int64 ``[rows]``, what each row is about. Of `SHARED_SCORES` they increase, and equal
            ids in equal places of two clients are the same public row, or the same class.
        values: ``[rows, classes]``.
        scale: of the values.
        temperature: that soft labels were softened with.
    """

    place: str
    of: type[Payload]
    ids: Int64[np.ndarray, "rows"]
    values: Float[np.ndarray, "rows classes"]
    scale: Scale
    temperature: int | float = 1.0

    @property
    def probabilities(self) -> Float[np.ndarray, "rows classes"]:
        """The scores as distributions, float64: logits are softened with temperature 1."""
        if self.scale == "probabilities":
            return self.values.astype(np.float64)
        return softmax(self.values)

    @property
    def logits(self) -> Float[np.ndarray, "rows classes"]:
        """The scores as logits, float64; a class that is ruled out has the smallest there is."""
        if self.scale == "logits":
            return self.values.astype(np.float64)
        tiny = np.finfo(np.float32).tiny
        return self.temperature * np.log(np.maximum(self.values.astype(np.float64), tiny))


def softmax(logits: Float[np.ndarray, "*rows classes"]) -> Float[np.ndarray, "*rows classes"]:
    """Return distributions in float64."""
    wide = logits.astype(np.float64)
    powers = np.exp(wide - wide.max(axis=-1, keepdims=True))
    shares: np.ndarray = powers / powers.sum(axis=-1, keepdims=True)
    return shares


def scores_in(payload: Payload, place: str = "") -> Iterator[Scores]:
    """Yield the tables of scores that a payload holds."""
    match payload:
        case Predictions():
            yield Scores(
                place=f"{place}values",
                of=Predictions,
                ids=payload.rows,
                values=payload.values,
                scale=payload.scale,
                temperature=payload.temperature,
            )
        case ClassTable():
            held = payload.held
            yield Scores(
                place=f"{place}values",
                of=ClassTable,
                ids=np.flatnonzero(held),
                values=payload.values[held],
                scale=payload.scale,
            )
        case RowFeatures():
            yield Scores(
                place=f"{place}logits",
                of=RowFeatures,
                ids=payload.rows,
                values=payload.logits,
                scale="logits",
            )
        case Bundle():
            for name, part in payload.parts.items():
                yield from scores_in(part, f"{place}parts/{name}/")


def rewritten(
    payload: Payload,
    lie: Callable[[Scores], np.ndarray],
    kinds: tuple[type[Payload], ...] = SCORES,
) -> Payload:
    """Return a payload with other scores.

    Args:
        payload: an honest one.
        lie: returns the values in the place of a table's, of its shape.
        kinds: whose tables are replaced.
    """
    changed: dict[str, np.ndarray] = {}
    for scores in scores_in(payload):
        if scores.of not in kinds or not scores.values.size:
            continue
        values = lie(scores).astype(np.float32)
        if scores.of is ClassTable:
            # Rows of classes that the sender does not hold stay zero, which says so.
            table = np.zeros((values.shape[1], values.shape[1]), np.float32)
            table[scores.ids] = values
            values = table
        changed[scores.place] = values
    return payload.with_arrays(changed)


def one_hot(
    honest: Float[np.ndarray, "rows classes"], chosen: Int64[np.ndarray, "rows"], scale: Scale
) -> Float32[np.ndarray, "rows classes"]:
    """Return the lie that each row is of one class.

    As a soft label it is one-hot. Logits have no one-hot: the class gets the largest score of the
    honest row, and all others get the smallest, so that the lie is of an honest client's size.

    Args:
        honest: what the client itself would say.
        chosen: the class of each row.
        scale: of the scores.
    """
    is_chosen = np.arange(honest.shape[1]) == chosen[:, None]
    if scale == "probabilities":
        return np.asarray(is_chosen, np.float32)
    high, low = honest.max(axis=1, keepdims=True), honest.min(axis=1, keepdims=True)
    return np.asarray(np.where(is_chosen, high, low), np.float32)


@dataclass(frozen=True, kw_only=True)
class Crowd:
    """What honest clients say in one place of their payloads.

    Attributes:
        ids: int64 ``[rows]``, increasing: the rows of which any of them said something.
        values: as they were sent, zero where a client did not send a row.
        probabilities: the same as distributions.
        sent: who sent which row.
    """

    ids: Int64[np.ndarray, "rows"]
    values: Float32[np.ndarray, "clients rows classes"]
    probabilities: Float[np.ndarray, "clients rows classes"]
    sent: Bool[np.ndarray, "clients rows"]

    @classmethod
    def of(cls, tables: "Iterable[Scores]") -> "Crowd | None":
        """Gather tables of one place, one a client, in client order; None without any row."""
        held = [scores for scores in tables if len(scores.ids)]
        if not held:
            return None
        ids = np.unique(np.concatenate([scores.ids for scores in held]))
        shape = (len(held), len(ids), held[0].values.shape[1])
        values, probabilities = np.zeros(shape, np.float32), np.zeros(shape)
        sent = np.zeros(shape[:2], bool)
        for number, scores in enumerate(held):
            places = np.searchsorted(ids, scores.ids)
            values[number, places] = scores.values
            probabilities[number, places] = scores.probabilities
            sent[number, places] = True
        return cls(ids=ids, values=values, probabilities=probabilities, sent=sent)

    @property
    def mean(self) -> Float[np.ndarray, "rows classes"]:
        """The honest mean of each row, over those who sent it, as a distribution."""
        mean: np.ndarray = self.probabilities.sum(axis=0) / self.sent.sum(axis=0)[:, None]
        return mean
