"""Codecs: how payloads travel. Pure functions of a payload and of what a codec remembers.

A codec keeps nothing: its memory (what was sent before, what was lost by rounding) is a table of
arrays that it gets and returns, one on either side; `fedkd.exchange.pipeline` keeps both in step.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, TypeAlias

import numpy as np
from pydantic import Field, PlainValidator, SerializeAsAny

from fedkd.bounds import Few
from fedkd.exchange.kinds import Kinds, Stage
from fedkd.exchange.payload import FLOAT32, Asked, Limit, Payload
from fedkd.exchange.payloads.bundle import Bundle
from fedkd.exchange.payloads.encoded import Encoded
from fedkd.exchange.payloads.predictions import Predictions, Scale
from fedkd.exchange.values import Arrays, flatten

LARGEST_HALF = float(np.finfo(np.float16).max)


class Codec(Stage, ABC):
    """One way to write a payload, and to read it again."""

    remembers: ClassVar[bool] = False
    """Whether it has a memory. Where it has none, what is sent to many is encoded once."""

    def refuses(self, kind: type[Payload]) -> str | None:
        """Return, in a few words, why it cannot take this kind of payload; None: it can."""
        return None

    @abstractmethod
    def asked(self, asked: Asked) -> Asked:
        """Describe what a good payload looks like once it is encoded.

        Raises:
            ValueError: it cannot take this kind.
        """

    @abstractmethod
    def encode(
        self, payload: Payload, memory: Arrays, rng: np.random.Generator
    ) -> tuple[Payload, Arrays]:
        """Write a payload.

        It may be anything that somebody hands in: what the codec cannot take it leaves as it is,
        and the receiver refuses it. A codec that remembers makes an `Encoded`.

        Args:
            payload: what is to travel.
            memory: of the sender; empty at first.
            rng: for codecs that draw.

        Returns:
            What travels, and the sender's memory thereafter.
        """

    @abstractmethod
    def decode(self, encoded: Payload, memory: Arrays) -> tuple[Payload, Arrays]:
        """Read what `encode` wrote; it was looked at before.

        Args:
            encoded: what came.
            memory: of the receiver; empty at first.

        Returns:
            The payload, and the receiver's memory thereafter.
        """

    def bad(self, encoded: Encoded, asked: Asked) -> str | None:
        """Return what is wrong with coded arrays beyond their layout and numbers, or None."""
        return None


class Float32(Codec):
    """Everything as it is: no wrapper, no cost."""

    kind: Literal["float32"] = "float32"

    def asked(self, asked: Asked) -> Asked:
        """Nothing changes."""
        return asked

    def encode(
        self, payload: Payload, memory: Arrays, rng: np.random.Generator
    ) -> tuple[Payload, Arrays]:
        """Hand on the same object."""
        return payload, memory

    def decode(self, encoded: Payload, memory: Arrays) -> tuple[Payload, Arrays]:
        """Hand on the same object."""
        return encoded, memory


class _Coding(Codec):
    """A codec that makes an `Encoded`."""

    def _encoded(self, encoded: Payload) -> Encoded:
        if not isinstance(encoded, Encoded):
            raise TypeError(f"{self.kind} decodes an Encoded, got {encoded.kind}")
        return encoded


class Float16(_Coding):
    """Every float32 array in half precision: half the bytes.

    Numbers are rounded to the nearest, by at most 1/2048 of their size, or 3e-8 where that is less;
    those beyond 65504 become 65504. Arrays that hold NaN or infinity, such as a mask of -inf, stay
    as they are.
    """

    kind: Literal["float16"] = "float16"

    def asked(self, asked: Asked) -> Asked:
        """The same shapes and bounds, in half precision."""
        coded = {
            place: {"": replace(limit, dtype=np.dtype(np.float16))}
            for place, limit in asked.limits.items()
            if limit.dtype == FLOAT32 and limit.constant is None
        }
        return Encoded.asked(self.kind, asked, coded)

    def encode(
        self, payload: Payload, memory: Arrays, rng: np.random.Generator
    ) -> tuple[Payload, Arrays]:
        """Round."""
        coded = {
            # Of an array without dimensions NumPy makes a scalar.
            place: {"": np.asarray(array.clip(-LARGEST_HALF, LARGEST_HALF), np.float16)}
            for place, array in flatten(payload).arrays.items()
            if array.dtype == FLOAT32 and np.isfinite(array).all()
        }
        return Encoded.of(self.kind, payload, coded), memory

    def decode(self, encoded: Payload, memory: Arrays) -> tuple[Payload, Arrays]:
        """Widen."""
        sent = self._encoded(encoded)
        arrays = {place: np.asarray(array, np.float32) for place, array in sent.coded.items()}
        return sent.payload(arrays), memory


class TopK(_Coding):
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
            for prefix, scale in _asked_predictions(asked, "")
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
        for prefix, _ in _asked_predictions(asked.about["inner"], ""):
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
            for prefix, part in _predictions(payload, "")
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
            for prefix, part in _predictions(sent.inner, "")
            if f"{prefix}values/top" in sent.coded
        }
        return sent.payload(arrays), memory


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


def _predictions(payload: Payload, prefix: str) -> Iterator[tuple[str, Predictions]]:
    """Find predictions, alone or in a bundle, each with the beginning of its arrays' places."""
    if isinstance(payload, Predictions):
        yield prefix, payload
    elif isinstance(payload, Bundle):
        for name, part in payload.parts.items():
            yield from _predictions(part, f"{prefix}parts/{name}/")


def _asked_predictions(asked: Asked, prefix: str) -> Iterator[tuple[str, Scale]]:
    """Find predictions that are asked for, each with its scale."""
    if asked.kind is Predictions:
        yield prefix, asked.about["scale"]
    for name, part in asked.parts.items():
        yield from _asked_predictions(part, f"{prefix}parts/{name}/")


CODECS: Kinds[Codec] = Kinds(
    "codec", Codec, {"float32": Float32, "float16": Float16, "top_k": TopK}
)
"""Codecs by the name that a settings file uses."""

CodecField: TypeAlias = Annotated[SerializeAsAny[Codec], PlainValidator(CODECS.read)]
"""A codec in settings: its kind, or a table with its kind and settings."""
