"""`int8`: whole numbers, and a scale for each row."""

from dataclasses import replace
from typing import Literal

import numpy as np

from fedkd.exchange.codecs.base import ROUNDING, Coding, float_arrays, float_limits
from fedkd.exchange.codecs.parts import holds_soft_labels, soft_labels_in
from fedkd.exchange.payload import Asked, AtMost, Limit, Payload
from fedkd.exchange.payloads.class_table import ClassTable
from fedkd.exchange.payloads.encoded import Encoded
from fedkd.exchange.values import Arrays


class Int8(Coding):
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
            for place, limit in float_limits(asked)
        }
        return Encoded.asked(self.kind, asked, coded)

    def bad(self, encoded: Encoded, asked: Asked) -> str | None:
        """Every row has a scale, and every row of soft labels a share."""
        places = _places_in_units(encoded)
        for place in places:
            units, scale = encoded.array(place, "units"), encoded.array(place, "scale")
            if scale.shape != _scale_shape(units.shape):
                return f"scales {list(scale.shape)} of whole numbers {list(units.shape)}"
        for place, part in soft_labels_in(encoded.inner, ""):
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
        none = {place for place, part in soft_labels_in(payload, "") if not holds_soft_labels(part)}
        coded = {
            place: _in_units(array) for place, array in float_arrays(payload) if place not in none
        }
        return Encoded.of(self.kind, payload, coded), memory

    def decode(self, encoded: Payload, memory: Arrays) -> tuple[Payload, Arrays]:
        """Multiply by the scale; soft labels sum to 1 again."""
        sent = self._encoded(encoded)
        arrays = {
            place: _in_floats(sent.array(place, "units"), sent.array(place, "scale"))
            for place in _places_in_units(sent)
        }
        for place, _ in soft_labels_in(sent.inner, ""):
            if place in arrays:
                shares = arrays[place].astype(np.float64)
                sums = shares.sum(-1, keepdims=True)
                arrays[place] = (shares / np.where(sums > 0, sums, 1)).astype(np.float32)
        return sent.payload(arrays), memory

    def largest_error(self, payload: Payload, memory: Arrays) -> Arrays:
        """Half a unit, 1/254 of the largest size in a row; of soft labels their sum moves, too."""
        errors = {}
        for place, array in float_arrays(payload):
            scale = np.abs(array).max(axis=tuple(range(1, array.ndim)) or None, initial=0.0)
            half = _beside(np.asarray(scale), array) / 254
            errors[place] = half + ROUNDING * np.abs(array)
        for place, part in soft_labels_in(payload, ""):
            if place in errors:
                shift = part.values.shape[1] * errors[place].max(-1, keepdims=True, initial=0.0)
                moved = (errors[place] + shift * part.values) / np.maximum(1 - shift, 1e-9)
                errors[place] = np.minimum(moved + ROUNDING, 1.0)
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
