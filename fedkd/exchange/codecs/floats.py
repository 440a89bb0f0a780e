"""`float32` and `float16`: numbers as they are, or in half the bits."""

from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np

from fedkd.exchange.codecs.base import Codec, Coding, float_arrays, float_limits
from fedkd.exchange.payload import Asked, Payload
from fedkd.exchange.payloads.encoded import Encoded
from fedkd.exchange.values import Arrays

LARGEST_HALF = float(np.finfo(np.float16).max)


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


class Float16(Coding):
    """Every float32 array in half precision: half the bytes.

    Numbers are rounded to the nearest, by at most 1/2048 of their size, or 3e-8 where that is less;
    those beyond 65504 become 65504. Arrays that hold NaN or infinity, such as a mask of -inf, stay
    as they are.

    Examples:
        >>> import numpy as np
        >>> from fedkd.exchange.codecs import Float16, Float32
        >>> from fedkd.exchange.payloads import Predictions
        >>> said = np.array([[1.0, 0.1], [70000.0, 2.0]], np.float32)
        >>> table = Predictions(rows=np.arange(2), values=said)
        >>> sent, memory = Float16().encode(table, {}, np.random.default_rng(0))
        >>> got, memory = Float16().decode(sent, {})
        >>> got.values.tolist()
        [[1.0, 0.0999755859375], [65504.0, 2.0]]
        >>> sent.payload_bytes, table.payload_bytes
        (8, 16)
    """

    kind: Literal["float16"] = "float16"

    def asked(self, asked: Asked) -> Asked:
        """The same shapes and bounds, in half precision."""
        coded = {
            place: {"": replace(limit, dtype=np.dtype(np.float16))}
            for place, limit in float_limits(asked)
        }
        return Encoded.asked(self.kind, asked, coded)

    def encode(
        self, payload: Payload, memory: Arrays, rng: np.random.Generator
    ) -> tuple[Payload, Arrays]:
        """Round."""
        coded = {
            # Of an array without dimensions NumPy makes a scalar.
            place: {"": np.asarray(array.clip(-LARGEST_HALF, LARGEST_HALF), np.float16)}
            for place, array in float_arrays(payload)
        }
        return Encoded.of(self.kind, payload, coded), memory

    def decode(self, encoded: Payload, memory: Arrays) -> tuple[Payload, Arrays]:
        """Widen."""
        sent = self._encoded(encoded)
        arrays = {place: np.asarray(array, np.float32) for place, array in sent.coded.items()}
        return sent.payload(arrays), memory

    def largest_error(self, payload: Payload, memory: Arrays) -> Arrays:
        """1/2048 of a number or 3e-8; all that is beyond the largest half."""
        sizes = {place: np.abs(array.astype(np.float64)) for place, array in float_arrays(payload)}
        return {
            place: np.maximum(np.maximum(size / 2048, 3e-8), size - LARGEST_HALF)
            for place, size in sizes.items()
        }
