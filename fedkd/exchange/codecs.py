"""Codecs: how payloads travel. Pure functions of a payload and of what a codec remembers.

A codec keeps nothing: its memory (what was sent before, what was lost by rounding) is a table of
arrays that it gets and returns, one on either side; `fedkd.exchange.pipeline` keeps both in step.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, TypeAlias, TypedDict

import numpy as np
from pydantic import Field, PlainValidator, SerializeAsAny

from fedkd.bounds import Few, PositiveShare
from fedkd.exchange.entropy import changes_read, changes_written, most_bytes
from fedkd.exchange.factors import Factors, as_matrix, factors_by_squares, saves
from fedkd.exchange.kinds import Kinds, Stage
from fedkd.exchange.payload import FLOAT32, Asked, AtMost, Limit, Payload
from fedkd.exchange.payloads.bundle import Bundle
from fedkd.exchange.payloads.class_table import ClassTable
from fedkd.exchange.payloads.encoded import Encoded
from fedkd.exchange.payloads.predictions import Predictions, Scale
from fedkd.exchange.payloads.weights import LARGEST_PARAMETER, Weights
from fedkd.exchange.quantiser import (
    bytes_of,
    delta_symbols,
    packed,
    quantised,
    restored,
    unpacked,
)
from fedkd.exchange.values import Arrays, flatten
from fedkd.targets.scale import are_distributions

LARGEST_HALF = float(np.finfo(np.float16).max)


class Codec(Stage, ABC):
    """One way to write a payload, and to read it again."""

    remembers: ClassVar[bool] = False
    """Whether it has a memory. Where it has none, what is sent to many is encoded once."""
    exact: ClassVar[bool] = False
    """Whether what is decoded is what was encoded, to the bit."""
    follows: ClassVar[bool] = False
    """Whether it codes what changed since what came down in the same call. Its memory on either
    side is then that: the arrays of what the client received, decoded, by place; empty where it
    received nothing. It keeps none, and is for ``exchange.up`` alone."""

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

    def largest_error(self, payload: Payload, memory: Arrays) -> Arrays | None:
        """Return how far at most what is decoded is from what was encoded.

        Args:
            payload: a good one.
            memory: of the sender.

        Returns:
            By place, absolute and in the shape of the array, or one that spreads to it; arrays
            that are not named come back bit for bit. None: nothing is said.
        """
        return None


class Float32(Codec):
    """Everything as it is: no wrapper, no cost."""

    kind: Literal["float32"] = "float32"
    exact: ClassVar[bool] = True

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

    def largest_error(self, payload: Payload, memory: Arrays) -> Arrays:
        """None at all."""
        return {}


_ROUNDING = float(np.finfo(np.float32).eps)
"""What float32 itself rounds by, as a share."""


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
            for place, limit in _float_limits(asked)
        }
        return Encoded.asked(self.kind, asked, coded)

    def encode(
        self, payload: Payload, memory: Arrays, rng: np.random.Generator
    ) -> tuple[Payload, Arrays]:
        """Round."""
        coded = {
            # Of an array without dimensions NumPy makes a scalar.
            place: {"": np.asarray(array.clip(-LARGEST_HALF, LARGEST_HALF), np.float16)}
            for place, array in _float_arrays(payload)
        }
        return Encoded.of(self.kind, payload, coded), memory

    def decode(self, encoded: Payload, memory: Arrays) -> tuple[Payload, Arrays]:
        """Widen."""
        sent = self._encoded(encoded)
        arrays = {place: np.asarray(array, np.float32) for place, array in sent.coded.items()}
        return sent.payload(arrays), memory

    def largest_error(self, payload: Payload, memory: Arrays) -> Arrays:
        """1/2048 of a number or 3e-8; all that is beyond the largest half."""
        sizes = {place: np.abs(array.astype(np.float64)) for place, array in _float_arrays(payload)}
        return {
            place: np.maximum(np.maximum(size / 2048, 3e-8), size - LARGEST_HALF)
            for place, size in sizes.items()
        }


def _float_limits(asked: Asked) -> Iterator[tuple[str, Limit]]:
    """Find the arrays of numbers that may be rounded; what has to be there bit for bit may not."""
    for place, limit in asked.limits.items():
        if limit.dtype == FLOAT32 and limit.constant is None:
            yield place, limit


def _float_arrays(payload: Payload) -> Iterator[tuple[str, np.ndarray]]:
    """Find the arrays of numbers that can be rounded."""
    for place, array in flatten(payload).arrays.items():
        if array.dtype == FLOAT32 and np.isfinite(array).all():
            yield place, array


class Int8(_Coding):
    """Every float32 array in whole numbers from -127 to 127, and a scale for each row: 8 bits each.

    A row is what an entry of the first axis holds: a public row's scores, an output unit's weights.
    Arrays of one axis or none have one scale. Numbers are rounded to the nearest unit, so by at
    most half of it: 1/254 of the largest size in their row. Rows of soft labels are divided by
    their sum, which rounding moves away from 1. Arrays that hold NaN or infinity stay as they are.
    """

    kind: Literal["int8"] = "int8"

    def asked(self, asked: Asked) -> Asked:
        """The same shapes in whole numbers, and their scales."""
        coded = {
            place: {
                "units": Limit(
                    shape=limit.shape, dtype=np.dtype(np.int8), largest=127, smallest=-127
                ),
                "scale": replace(limit, shape=_scale_shape(limit.shape), smallest=0.0),
            }
            for place, limit in _float_limits(asked)
        }
        return Encoded.asked(self.kind, asked, coded)

    def bad(self, encoded: Encoded, asked: Asked) -> str | None:
        """Every row has a scale, and every row of soft labels a share."""
        places = _places_in_units(encoded)
        for place in places:
            units, scale = encoded.array(place, "units"), encoded.array(place, "scale")
            if scale.shape != _scale_shape(units.shape):
                return f"scales {list(scale.shape)} of whole numbers {list(units.shape)}"
        for place, part in _soft_labels(encoded.inner, ""):
            if place in places:
                units, scale = encoded.array(place, "units"), encoded.array(place, "scale")
                share = (units.max(-1, initial=0) > 0) & (scale > 0)
                # Of a class that nobody holds a table has no soft label.
                nothing = (units == 0).all(-1) if isinstance(part, ClassTable) else False
                if (units < 0).any() or not (share | nothing).all():
                    return "soft labels of a row without any share, or with one below 0"
        return None

    def encode(
        self, payload: Payload, memory: Arrays, rng: np.random.Generator
    ) -> tuple[Payload, Arrays]:
        """Divide by the scale, and round."""
        # What are no soft labels must not become some by being divided by their sum.
        none = {place for place, part in _soft_labels(payload, "") if not _holds_soft_labels(part)}
        coded = {
            place: _in_units(array) for place, array in _float_arrays(payload) if place not in none
        }
        return Encoded.of(self.kind, payload, coded), memory

    def decode(self, encoded: Payload, memory: Arrays) -> tuple[Payload, Arrays]:
        """Multiply by the scale; soft labels sum to 1 again."""
        sent = self._encoded(encoded)
        arrays = {
            place: _in_floats(sent.array(place, "units"), sent.array(place, "scale"))
            for place in _places_in_units(sent)
        }
        for place, _ in _soft_labels(sent.inner, ""):
            if place in arrays:
                shares = arrays[place].astype(np.float64)
                sums = shares.sum(-1, keepdims=True)
                arrays[place] = (shares / np.where(sums > 0, sums, 1)).astype(np.float32)
        return sent.payload(arrays), memory

    def largest_error(self, payload: Payload, memory: Arrays) -> Arrays:
        """Half a unit, 1/254 of the largest size in a row; of soft labels their sum moves, too."""
        errors = {}
        for place, array in _float_arrays(payload):
            scale = np.abs(array).max(axis=tuple(range(1, array.ndim)) or None, initial=0.0)
            half = _beside(np.asarray(scale), array) / 254
            errors[place] = half + _ROUNDING * np.abs(array)
        for place, part in _soft_labels(payload, ""):
            if place in errors:
                shift = part.values.shape[1] * errors[place].max(-1, keepdims=True, initial=0.0)
                moved = (errors[place] + shift * part.values) / np.maximum(1 - shift, 1e-9)
                errors[place] = np.minimum(moved + _ROUNDING, 1.0)
        return errors


def _places_in_units(encoded: Encoded) -> list[str]:
    return [name.removesuffix("/units") for name in encoded.coded if name.endswith("/units")]


def _scale_shape(shape: tuple[int | AtMost, ...]) -> tuple[int | AtMost, ...]:
    """Return one number for each entry of the first axis of several, or one for all."""
    return shape[:1] if len(shape) > 1 else ()


def _in_units(array: np.ndarray) -> dict[str, np.ndarray]:
    axes = tuple(range(1, array.ndim)) or None
    scale = np.asarray(np.abs(array).max(axis=axes, initial=0.0), np.float32)
    beside = _beside(scale, array)
    units = np.rint(127 * array / np.where(beside > 0, beside, 1.0))
    return {"units": np.asarray(units, np.int8), "scale": scale}


def _in_floats(units: np.ndarray, scale: np.ndarray) -> np.ndarray:
    # 127 units are the scale itself, to the bit.
    return np.asarray(units / 127.0 * _beside(scale, units), np.float32)


def _beside(scale: np.ndarray, array: np.ndarray) -> np.ndarray:
    """Return scales in float64, one beside each row of an array."""
    return scale.reshape(scale.shape + (1,) * (array.ndim - scale.ndim)).astype(np.float64)


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

    def largest_error(self, payload: Payload, memory: Arrays) -> Arrays:
        """What travels is exact. Others get a mean of theirs, which lies between them."""
        errors = {}
        for prefix, part in _predictions(payload, ""):
            wide = part.values.astype(np.float64)
            falling = np.argsort(-part.values, axis=-1, kind="stable")
            others = np.sort(np.take_along_axis(wide, falling[:, self.k :], -1), -1)
            error = np.zeros_like(wide)
            if others.shape[1]:
                spread = others[:, -1:] - others[:, :1]
                slack = 8 * _ROUNDING * (1 + np.abs(others).max(-1, keepdims=True))
                np.put_along_axis(error, falling[:, self.k :], spread + slack, axis=-1)
            errors[f"{prefix}values"] = error
        return errors


class SoftLabelBits(_Coding):
    """Soft labels in few bits: shares in units of ``1 / (2**bits - 1)`` that still sum to 1.

    One bit keeps the class alone, whose number is all that travels. Needs soft labels: logits are
    refused on the way up and stay as they are on the way down.

    Attributes:
        bits: of each class's share, 1 to 8.

    Source:
        Sattler et al., 2022, equations 10 and 11. https://arxiv.org/abs/2012.00632
    """

    kind: Literal["cfd", "cfd_delta", "one_bit", "hard_label"] = "cfd"
    bits: int = Field(1, ge=1, le=8, description="of each class's share; 1: the class alone")

    def refuses(self, kind: type[Payload]) -> str | None:
        """Only soft labels are shares of something."""
        if kind in (Predictions, Bundle):
            return None
        return f"it quantises soft labels, got {kind.kind}; use float32 or float16"

    def asked(self, asked: Asked) -> Asked:
        """The packed shares, or classes."""
        coded = {}
        for prefix, scale in _asked_predictions(asked, ""):
            if scale != "probabilities":
                raise ValueError(
                    f"{self.kind} quantises soft labels, got {scale}; use top_k or float16, or an "
                    "algorithm whose clients send soft labels, such as cfd or dsfl"
                )
            coded[f"{prefix}values"] = self._limits(asked.limits[f"{prefix}values"])
        if not coded:
            raise ValueError(str(self.refuses(asked.kind) or f"{self.kind} takes predictions"))
        return Encoded.asked(self.kind, asked, coded)

    def _limits(self, limit: Limit) -> dict[str, Limit]:
        rows, classes = limit.shape
        if not isinstance(classes, int):
            raise TypeError("predictions have a fixed number of classes")
        most = rows.size if isinstance(rows, AtMost) else rows
        size = self._bytes_of(most, classes)
        # How many rows there are is not known beforehand where not all of them have to come.
        exactly = isinstance(rows, int) and not self.remembers
        packed = Limit(shape=(size if exactly else AtMost(size),), dtype=np.dtype(np.uint8))
        return {"packed": packed}

    def _bytes_of(self, rows: int, classes: int) -> int:
        width, numbers = self._width(classes)
        return bytes_of(rows * numbers, width)

    def _width(self, classes: int) -> tuple[int, int]:
        """Return the bits of a number, and how many numbers a row has."""
        return (max(classes - 1, 1).bit_length(), 1) if self.bits == 1 else (self.bits, classes)

    def bad(self, encoded: Encoded, asked: Asked) -> str | None:
        """Every row that came has a class that there is, or shares that sum to 1."""
        for prefix, part in _predictions(encoded.inner, ""):
            rows, classes = len(part.rows), part.values.shape[1]
            written = encoded.array(f"{prefix}values", "packed")
            found = self._read(written, rows, classes)
            if found is None:
                return f"{len(written)} bytes that are not those of {rows} rows"
            came, numbers = found
            if not encoded.since and not came.all():
                return "rows are missing that did not travel before"
            if self.bits == 1 and bool((numbers >= classes).any()):
                return f"a class beyond the {classes} that there are"
            if self.bits > 1 and bool((numbers.sum(-1) != 2**self.bits - 1).any()):
                return "shares of a row that do not sum to 1"
        return None

    def _read(
        self, written: np.ndarray, rows: int, classes: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Return which rows came and their numbers; None: nobody can have written this."""
        width, numbers = self._width(classes)
        if len(written) != bytes_of(rows * numbers, width):
            return None
        read = unpacked(written, rows * numbers, bits=width)
        return np.ones(rows, bool), read if self.bits == 1 else read.reshape(rows, classes)

    def encode(
        self, payload: Payload, memory: Arrays, rng: np.random.Generator
    ) -> tuple[Payload, Arrays]:
        """Quantise and pack."""
        coded: dict[str, dict[str, np.ndarray]] = {}
        after: Arrays = {}
        for prefix, part in _predictions(payload, ""):
            if not _holds_soft_labels(part):
                continue
            levels = quantised(part.values, bits=self.bits)
            numbers = levels.argmax(-1) if self.bits == 1 else levels.astype(np.int64)
            known = {
                word: memory[f"{prefix}{word}"] for word in _KNOWN if f"{prefix}{word}" in memory
            }
            coded[f"{prefix}values"] = self._written(numbers, part, known)
            after |= {f"{prefix}rows": part.rows, f"{prefix}numbers": numbers}
        return Encoded.of(self.kind, payload, coded), after if self.remembers else memory

    def _written(
        self, numbers: np.ndarray, part: Predictions, known: Arrays
    ) -> dict[str, np.ndarray]:
        width, _ = self._width(part.values.shape[1])
        return {"packed": packed(numbers.reshape(-1), bits=width)}

    def decode(self, encoded: Payload, memory: Arrays) -> tuple[Payload, Arrays]:
        """Unpack, and fill in what did not travel since it had not changed."""
        sent = self._encoded(encoded)
        arrays: Arrays = {}
        after: Arrays = {}
        for prefix, part in _predictions(sent.inner, ""):
            place = f"{prefix}values"
            if f"{place}/packed" not in sent.coded:
                continue
            rows, classes = len(part.rows), part.values.shape[1]
            found = self._read(sent.array(place, "packed"), rows, classes)
            if found is None:
                raise ValueError(f"{place}: nobody can have written this")
            came, read = found
            shape = (rows,) if self.bits == 1 else (rows, classes)
            numbers = np.zeros(shape, np.int64)
            if np.array_equal(memory.get(f"{prefix}rows", np.zeros(0)), part.rows):
                numbers = memory[f"{prefix}numbers"].copy()
            numbers[came] = read
            levels = np.eye(classes)[numbers] if self.bits == 1 else numbers
            arrays[place] = restored(levels.astype(np.uint8), bits=self.bits)
            after |= {f"{prefix}rows": part.rows, f"{prefix}numbers": numbers}
        return sent.payload(arrays), after if self.remembers else memory

    def largest_error(self, payload: Payload, memory: Arrays) -> Arrays:
        """A unit: a share is rounded up or down."""
        unit = np.float64(1 / (2**self.bits - 1) + 2 * _ROUNDING)
        return {
            f"{prefix}values": np.full(part.values.shape, unit)
            for prefix, part in _predictions(payload, "")
            if _holds_soft_labels(part)
        }


class OneBit(SoftLabelBits):
    """`cfd` with one bit by its name: a row's one unit goes to its largest share."""

    kind: Literal["cfd", "cfd_delta", "one_bit", "hard_label"] = "one_bit"
    bits: int = Field(1, ge=1, le=1, description="always 1")


class HardLabels(SoftLabelBits):
    """The most likely class of each row: another name of `one_bit`, without any difference."""

    kind: Literal["cfd", "cfd_delta", "one_bit", "hard_label"] = "hard_label"
    bits: int = Field(1, ge=1, le=1, description="always 1")


class _Numbers(TypedDict):
    largest: int
    classes: int | None


class SoftLabelDeltas(SoftLabelBits):
    """Soft labels in few bits, of those rows alone whose labels have changed since they travelled.

    Which rows those are, and what they hold now, is written by an adaptive arithmetic coder
    (`fedkd.exchange.entropy`): a row that has not changed costs a fraction of a bit where most have
    not, a class that comes often less than one that is rare. It saves bytes where the rows are the
    same in every round; where they are not, all of them travel.

    Source:
        Sattler et al., 2022, equation 13. https://arxiv.org/abs/2012.00632. The paper writes the
        symbols with CABAC; the coder here is of that family.
    """

    kind: Literal["cfd", "cfd_delta", "one_bit", "hard_label"] = "cfd_delta"
    remembers: ClassVar[bool] = True

    def _bytes_of(self, rows: int, classes: int) -> int:
        return most_bytes(rows, **self._numbers(classes))

    def _numbers(self, classes: int) -> _Numbers:
        """Return the largest number of a row, and how many sum to it; None: it has one."""
        if self.bits == 1:
            return {"largest": classes - 1, "classes": None}
        return {"largest": 2**self.bits - 1, "classes": classes}

    def _read(
        self, written: np.ndarray, rows: int, classes: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        return changes_read(written, rows, **self._numbers(classes))

    def _written(
        self, numbers: np.ndarray, part: Predictions, known: Arrays
    ) -> dict[str, np.ndarray]:
        same_rows = np.array_equal(known.get("rows", np.zeros(0)), part.rows)
        before = known["numbers"] if same_rows else None
        if self.bits == 1:
            changed = delta_symbols(before, numbers) > 0
        elif before is None:
            changed = np.ones(len(numbers), bool)
        else:
            changed = (before != numbers).any(-1)
        largest = self._numbers(part.values.shape[1])["largest"]
        return {"packed": changes_written(changed, numbers, largest=largest)}


class LowRankChanges(_Coding):
    """Of each matrix of weights how it changed since it came down, as a few singular vectors.

    A matrix is an array of two or more dimensions, the first one against the others. It travels as
    ``rank (m + n + 1)`` numbers where these are fewer than its own ``m n``, and as it is where not,
    as does everything else. What a client received is what both sides know, so nothing has to be
    remembered; a client that received no weights sends its own as they are.

    The sum of squares of what is left out of a matrix's change is at most ``1 - energy`` of the
    whole, unless ``rank`` cuts it off before.

    Attributes:
        energy: share of the sum of squares of a change that its factors exceed.
        rank: singular values of a matrix at most; None: as many as that takes. Never 0.

    Source:
        Wu et al., 2022, equations 7 to 9. https://arxiv.org/abs/2108.13323
    """

    kind: Literal["low_rank"] = "low_rank"
    energy: PositiveShare = Field(
        0.95, description="share of a change's squares that its factors exceed"
    )
    rank: Few | None = Field(None, description="singular values of a matrix at most")
    follows: ClassVar[bool] = True

    def refuses(self, kind: type[Payload]) -> str | None:
        """Only weights change a little from what was received."""
        if kind in (Weights, Bundle):
            return None
        return (
            f"it codes how weights changed since they were received, got {kind.kind}; use float32 "
            "or float16"
        )

    def asked(self, asked: Asked) -> Asked:
        """A matrix, or its factors beside each other."""
        coded = {}
        for prefix in _asked_weights(asked, ""):
            for place, limit in _float_limits(asked):
                if place.startswith(f"{prefix}arrays/") and len(limit.shape) > 1:
                    rows, columns = _matrix_shape(limit)
                    shape = (AtMost(rows), AtMost(rows + columns + 1))
                    coded[place] = {"": replace(limit, shape=shape, smallest=-LARGEST_PARAMETER)}
        if not coded:
            parts = " + ".join(part.kind.kind for part in asked.parts.values())
            raise ValueError(
                str(
                    self.refuses(asked.kind)
                    or f"low_rank takes weights, got {parts or 'weights'} without any matrix"
                )
            )
        return Encoded.asked(self.kind, asked, coded)

    def bad(self, encoded: Encoded, asked: Asked) -> str | None:
        """Every matrix is whole, or has as many numbers as factors of some rank."""
        for place, array in encoded.coded.items():
            rows, columns = _matrix_shape(asked.about["inner"].limits[place])
            whole = array.shape == (rows, columns)
            factored = array.shape[1] == rows + columns + 1 and len(array) > 0
            if not whole and not (factored and saves(len(array), rows, columns)):
                return f"{place!r} is neither {rows} x {columns} numbers nor factors of these"
        return None

    def encode(
        self, payload: Payload, memory: Arrays, rng: np.random.Generator
    ) -> tuple[Payload, Arrays]:
        """Take each matrix's change apart."""
        places = {f"{prefix}arrays/" for prefix, _ in _weights(payload, "")}
        coded = {}
        for place, array in _float_arrays(payload):
            if array.ndim > 1 and array.size and place.startswith(tuple(places)):
                before = _followed(memory, place, array.shape)
                coded[place] = {"": self._written(as_matrix(array), before)}
        return Encoded.of(self.kind, payload, coded), memory

    def _written(self, matrix: np.ndarray, before: np.ndarray | None) -> np.ndarray:
        change = None if before is None else matrix - as_matrix(before)
        if change is None or not np.isfinite(change).all():
            return matrix
        factors = factors_by_squares(change, energy=self.energy, most=self.rank)
        if factors is None:
            return matrix
        return np.concatenate(
            [factors.left.T, factors.values[:, None], factors.right], axis=1, dtype=np.float32
        )

    def decode(self, encoded: Payload, memory: Arrays) -> tuple[Payload, Arrays]:
        """Add the changes to what was received."""
        sent = self._encoded(encoded)
        left = flatten(sent.inner).arrays
        arrays = {}
        for place, array in sent.coded.items():
            rest = left[place].shape[1:]
            columns = math.prod(rest)
            rows = len(array) if array.shape[1] == columns else array.shape[1] - columns - 1
            if array.shape[1] == columns:
                arrays[place] = array.reshape(rows, *rest)
                continue
            written = np.split(array, [rows, rows + 1], axis=1)
            change = Factors(written[0].T, written[1][:, 0], written[2]).product()
            before = _followed(memory, place, (rows, *rest))
            # Who says that it changed what it never received means a change of nothing.
            given = 0.0 if before is None else before
            arrays[place] = np.asarray(given + change.reshape(rows, *rest), np.float32)
        return sent.payload(arrays), memory

    def largest_error(self, payload: Payload, memory: Arrays) -> Arrays:
        """Of a matrix's change the root of what share of its squares may be left out."""
        errors = {}
        share = 1.0 if self.rank is not None else math.sqrt(1 - self.energy)
        for prefix, part in _weights(payload, ""):
            for name, array in part.arrays.items():
                place = f"{prefix}arrays/{name}"
                before = None if array.ndim < 2 else _followed(memory, place, array.shape)
                if before is not None and array.dtype == FLOAT32:
                    change = float(np.linalg.norm(array.astype(np.float64) - before))
                    # Factors are rounded as well.
                    size = float(np.abs(before).max(initial=0.0))
                    rounded = 8 * _ROUNDING * (size + change * len(array))
                    errors[place] = np.full(array.shape, share * change + rounded)
        return errors


def _matrix_shape(limit: Limit) -> tuple[int, int]:
    sizes = [size.size if isinstance(size, AtMost) else size for size in limit.shape]
    return sizes[0], math.prod(sizes[1:])


def _followed(memory: Arrays, place: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return the array that came down for one place: at that place, or the first of its name.

    Several models come down in a bundle where one goes up; the first is the one to go on from.
    """
    name = place[place.rfind("arrays/") :]
    same = [place, *(other for other in memory if other == name or other.endswith(f"/{name}"))]
    fitting = (memory[other] for other in same if other in memory)
    return next((array for array in fitting if array.shape == shape), None)


def _weights(payload: Payload, prefix: str) -> Iterator[tuple[str, Weights]]:
    """Find weights, alone or in a bundle, each with the beginning of its arrays' places."""
    if isinstance(payload, Weights):
        yield prefix, payload
    elif isinstance(payload, Bundle):
        for name, part in payload.parts.items():
            yield from _weights(part, f"{prefix}parts/{name}/")


def _asked_weights(asked: Asked, prefix: str) -> Iterator[str]:
    """Find weights that are asked for."""
    if asked.kind is Weights:
        yield prefix
    for name, part in asked.parts.items():
        yield from _asked_weights(part, f"{prefix}parts/{name}/")


_KNOWN = ("rows", "numbers")
"""What is remembered of predictions: which rows travelled, and what was last said of them."""


def _holds_soft_labels(sent: Predictions | ClassTable) -> bool:
    values = sent.values
    return (
        sent.scale == "probabilities"
        and values.dtype == FLOAT32
        and values.ndim == 2
        and values.shape[1] > 0
        and bool(np.isfinite(values).all())
        and are_distributions(values[sent.held] if isinstance(sent, ClassTable) else values)
    )


def _soft_labels(payload: Payload, prefix: str) -> Iterator[tuple[str, Predictions | ClassTable]]:
    """Find tables of soft labels, alone or in a bundle, each with the place of its values."""
    if isinstance(payload, Predictions | ClassTable):
        if payload.scale == "probabilities":
            yield f"{prefix}values", payload
    elif isinstance(payload, Bundle):
        for name, part in payload.parts.items():
            yield from _soft_labels(part, f"{prefix}parts/{name}/")


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
    "codec",
    Codec,
    {
        "float32": Float32,
        "float16": Float16,
        "int8": Int8,
        "top_k": TopK,
        "one_bit": OneBit,
        "hard_label": HardLabels,
        "cfd": SoftLabelBits,
        "cfd_delta": SoftLabelDeltas,
        "low_rank": LowRankChanges,
    },
)
"""Codecs by the name that a settings file uses."""

CodecField: TypeAlias = Annotated[SerializeAsAny[Codec], PlainValidator(CODECS.read)]
"""A codec in settings: its kind, or a table with its kind and settings."""
