"""`top_k`: the largest scores of each row of predictions."""

import math
from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field

from fedkd.bounds import Few
from fedkd.exchange.codecs.base import ROUNDING, Coding
from fedkd.exchange.codecs.parts import asked_predictions, predictions_in
from fedkd.exchange.payload import FLOAT32, Asked, Limit, Payload
from fedkd.exchange.payloads.bundle import Bundle
from fedkd.exchange.payloads.encoded import Encoded
from fedkd.exchange.payloads.predictions import Predictions
from fedkd.exchange.values import Arrays


class TopK(Coding):
    """Of each row of predictions the k largest scores and the classes that have them.

    All other classes of a row share what is left evenly, so that soft labels still sum to 1 (zeros
    in their place, as in much of the literature, do not: https://arxiv.org/abs/2509.01750). Of
    logits one more number travels, the log of the sum of the others' exponentials: at temperature
    1 the soft labels of the classes that travel are then exactly the sender's.

    Of classes with equal scores the first ones travel. A class costs a byte, or two beyond 256.

    Attributes:
        k: how many classes of a row travel.
    """

    kind: Literal["top_k"] = "top_k"
    k: Few = Field(description="how many classes of a row travel")

    def refuses(self, kind: type[Payload]) -> str | None:
        """Only scores have largest ones that say most of the rest."""
        if kind in (Predictions, Bundle):
            return None
        return (
            f"it keeps the largest scores of each row of predictions, got {kind.kind}; use "
            "float32 or float16"
        )

    def asked(self, asked: Asked) -> Asked:
        """Scores, their classes and, of logits, the rest."""
        coded = {
            f"{prefix}values": self._limits(asked.limits[f"{prefix}values"], scale)
            for prefix, scale in asked_predictions(asked, "")
        }
        if not coded:
            parts = " + ".join(part.kind.kind for part in asked.parts.values())
            raise ValueError(
                str(self.refuses(asked.kind) or f"top_k takes predictions, got {parts} without any")
            )
        return Encoded.asked(self.kind, asked, coded)

    def _limits(self, limit: Limit, scale: str) -> dict[str, Limit]:
        rows, classes = limit.shape
        if not isinstance(classes, int):
            raise TypeError("predictions have a fixed number of classes")
        kept = min(self.k, classes)
        limits = {
            "top": replace(limit, shape=(rows, kept)),
            "classes": Limit(
                shape=(rows, kept),
                dtype=_type_for(classes),
                largest=classes - 1,
                subject="a class",
            ),
        }
        if scale == "logits" and kept < classes:
            largest = limit.largest + math.log(classes)
            limits["rest"] = replace(limit, shape=(rows,), largest=largest)
        return limits

    def bad(self, encoded: Encoded, asked: Asked) -> str | None:
        """Classes of a row come in order, none twice."""
        for prefix, _ in asked_predictions(asked.about["inner"], ""):
            named = encoded.array(f"{prefix}values", "classes").astype(np.int64)
            if (np.diff(named, axis=-1) <= 0).any():
                return "classes of a row are not in order, or one comes twice"
        return None

    def encode(
        self, payload: Payload, memory: Arrays, rng: np.random.Generator
    ) -> tuple[Payload, Arrays]:
        """Choose the largest."""
        coded = {
            f"{prefix}values": self._chosen(part)
            for prefix, part in predictions_in(payload, "")
            if part.values.dtype == FLOAT32
            and part.values.ndim == 2
            and part.values.shape[1]
            and np.isfinite(part.values).all()
        }
        return Encoded.of(self.kind, payload, coded), memory

    def _chosen(self, sent: Predictions) -> dict[str, np.ndarray]:
        values = sent.values
        classes = values.shape[1]
        kept = min(self.k, classes)
        order = np.argsort(-values, axis=-1, kind="stable")
        named = np.sort(order[:, :kept], axis=-1)
        made = {
            "top": np.take_along_axis(values, named, axis=-1),
            "classes": named.astype(_type_for(classes)),
        }
        if sent.scale == "logits" and kept < classes:
            others = np.take_along_axis(values, order[:, kept:], axis=-1).astype(np.float64)
            largest = others[:, :1]
            powers = np.log(np.exp(others - largest).sum(-1)) + largest[:, 0]
            made["rest"] = powers.astype(np.float32)
        return made

    def decode(self, encoded: Payload, memory: Arrays) -> tuple[Payload, Arrays]:
        """Spread what is left evenly over the classes that did not travel."""
        sent = self._encoded(encoded)
        arrays = {
            f"{prefix}values": _spread(
                sent.array(f"{prefix}values", "top"),
                sent.array(f"{prefix}values", "classes"),
                sent.coded.get(f"{prefix}values/rest"),
                part.values.shape[1],
            )
            for prefix, part in predictions_in(sent.inner, "")
            if f"{prefix}values/top" in sent.coded
        }
        return sent.payload(arrays), memory

    def largest_error(self, payload: Payload, memory: Arrays) -> Arrays:
        """What travels is exact. Others get a mean of theirs, which lies between them."""
        errors = {}
        for prefix, part in predictions_in(payload, ""):
            wide = part.values.astype(np.float64)
            falling = np.argsort(-part.values, axis=-1, kind="stable")
            others = np.sort(np.take_along_axis(wide, falling[:, self.k :], -1), -1)
            error = np.zeros_like(wide)
            if others.shape[1]:
                spread = others[:, -1:] - others[:, :1]
                slack = 8 * ROUNDING * (1 + np.abs(others).max(-1, keepdims=True))
                np.put_along_axis(error, falling[:, self.k :], spread + slack, axis=-1)
            errors[f"{prefix}values"] = error
        return errors


def _spread(
    top: np.ndarray, named: np.ndarray, rest: np.ndarray | None, classes: int
) -> np.ndarray:
    """Fill a table from the scores that travelled.

    Args:
        top: ``[rows, k]``, the scores.
        named: ``[rows, k]``, their classes.
        rest: ``[rows]``, of logits: the log of the sum of the other classes' exponentials.
        classes: how many there are.
    """
    others = max(classes - top.shape[1], 1)
    if rest is None:
        each = np.maximum(1 - top.sum(-1, dtype=np.float64), 0) / others
    else:
        each = rest.astype(np.float64) - math.log(others)
    values = np.repeat(each.astype(np.float32)[:, None], classes, axis=1)
    np.put_along_axis(values, named.astype(np.int64), top, axis=-1)
    return values


def _type_for(classes: int) -> np.dtype:
    """Return the smallest type that numbers so many classes."""
    return np.min_scalar_type(max(classes - 1, 0))
