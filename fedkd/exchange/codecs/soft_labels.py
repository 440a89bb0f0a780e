"""`cfd`, `cfd_delta`, `one_bit` and `hard_label`: soft labels in few bits."""

from typing import ClassVar, Literal, TypedDict

import numpy as np
from pydantic import Field

from fedkd.exchange.codecs.base import ROUNDING, Coding
from fedkd.exchange.codecs.parts import asked_predictions, holds_soft_labels, predictions_in
from fedkd.exchange.entropy import changes_read, changes_written, most_bytes
from fedkd.exchange.payload import Asked, AtMost, Limit, Payload
from fedkd.exchange.payloads.bundle import Bundle
from fedkd.exchange.payloads.encoded import Encoded
from fedkd.exchange.payloads.predictions import Predictions
from fedkd.exchange.quantiser import (
    bytes_of,
    delta_symbols,
    packed,
    quantised,
    restored,
    unpacked,
)
from fedkd.exchange.values import Arrays

_KNOWN = ("rows", "numbers")
"""What is remembered of predictions: which rows travelled, and what was last said of them."""


class SoftLabelBits(Coding):
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
        for prefix, scale in asked_predictions(asked, ""):
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
        for prefix, part in predictions_in(encoded.inner, ""):
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
        for prefix, part in predictions_in(payload, ""):
            if not holds_soft_labels(part):
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
        for prefix, part in predictions_in(sent.inner, ""):
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
        unit = np.float64(1 / (2**self.bits - 1) + 2 * ROUNDING)
        return {
            f"{prefix}values": np.full(part.values.shape, unit)
            for prefix, part in predictions_in(payload, "")
            if holds_soft_labels(part)
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
