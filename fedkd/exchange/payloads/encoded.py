"""Encoded: a payload as a codec lets it travel."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from fedkd.exchange.payload import Asked, Limit, Payload
from fedkd.exchange.values import Arrays, flatten


def _left_of(array: np.ndarray) -> np.ndarray:
    """Return what stands where an array was that has been coded: no rows, of the same form."""
    return array[:0].copy() if array.ndim else array.reshape(1)[:0].copy()


@dataclass(frozen=True, kw_only=True)
class Encoded(Payload):
    """A payload without the arrays that were coded, and what was made of them.

    Attributes:
        codec: its kind; the receiver has the same from the settings.
        inner: the payload; of each array that was coded it has no rows.
        coded: what was made of those, by the array's place and, where there are several, a word.
        since: the round whose memory the codec went on from; 0: from none.
    """

    kind: ClassVar[str] = "encoded"

    codec: str
    inner: Payload
    coded: Mapping[str, np.ndarray]
    since: int = 0

    @property
    def label(self) -> str:
        """What is inside, and the codec."""
        return f"{self.inner.label} ({self.codec})"

    @property
    def payload_bytes(self) -> int:
        """Bytes of what was coded, and of what the payload inside costs without those arrays."""
        return self.inner.payload_bytes + sum(array.nbytes for array in self.coded.values())

    @classmethod
    def of(
        cls, codec: str, payload: Payload, coded: Mapping[str, Mapping[str, np.ndarray]]
    ) -> "Encoded":
        """Take arrays out of a payload.

        Args:
            codec: kind of the codec.
            payload: what is to travel.
            coded: for each place what was made of its array, by word; the word is "" where it is
                one array.
        """
        whole = flatten(payload).arrays
        inner = payload.with_arrays({place: _left_of(whole[place]) for place in coded})
        arrays = {
            _name(place, word): array
            for place, words in coded.items()
            for word, array in words.items()
        }
        return cls(codec=codec, inner=inner, coded=arrays)

    def array(self, place: str, word: str = "") -> np.ndarray:
        """Return one array that was made of that at a place."""
        return self.coded[_name(place, word)]

    def payload(self, arrays: Mapping[str, np.ndarray]) -> Payload:
        """Return the payload with arrays in the places of those that were coded."""
        return self.inner.with_arrays(arrays)

    @classmethod
    def asked(
        cls, codec: str, asked: Asked, coded: Mapping[str, Mapping[str, Limit]], **about: Any
    ) -> Asked:
        """Describe a payload of which some arrays are coded.

        Args:
            codec: kind of the codec.
            asked: what is to be inside.
            coded: for each place that is coded the limits of what is made of its array, by word.
            about: whatever else there is to compare with.
        """
        limits: dict[str, Limit] = {}
        optional: set[str] = set()
        for place, limit in asked.limits.items():
            words = coded.get(place)
            inside = limit if words is None else replace(limit, shape=(0, *limit.shape[1:]))
            names = {f"inner/{place}": inside}
            for word, made in (words or {}).items():
                names[f"coded/{_name(place, word)}"] = made
            limits |= names
            if place in asked.optional:
                optional |= names.keys()
        places = {place: tuple(_name(place, word) for word in coded[place]) for place in coded}
        return Asked(
            kind=cls,
            limits=limits,
            optional=frozenset(optional),
            about={"codec": codec, "inner": asked, "places": places, **about},
        )

    def problem(self, asked: Asked) -> str | None:
        """Return why this cannot be decoded, or None; what is inside is looked at thereafter."""
        inside: Asked = asked.about["inner"]
        if self.codec != asked.about["codec"]:
            return f"coded by {self.codec[:40]!r}, expected {asked.about['codec']!r}"
        if type(self.inner) is not inside.kind:
            return f"{self.inner.kind} inside, expected {inside.kind.kind}"
        left = flatten(self.inner).arrays
        return (
            self._not_coded(left, inside, asked.about["places"])
            or super().problem(asked)
            or self._half_there(left, asked.about["places"])
        )

    def _not_coded(
        self, left: Arrays, inside: Asked, places: Mapping[str, tuple[str, ...]]
    ) -> str | None:
        """Say what is wrong with an array that no codec takes, which is why it came as it was."""
        for place, names in places.items():
            if place in left and not any(name in self.coded for name in names):
                limit, array = inside.limits[place], left[place]
                reason = limit.bad_layout(array.shape, array.dtype, {})
                if reason is not None:
                    return f"{place!r} has {reason}"
                return limit.bad_numbers(array) or f"{place!r} is not coded"
        return None

    def _half_there(self, left: Arrays, places: Mapping[str, tuple[str, ...]]) -> str | None:
        for place, names in places.items():
            if {name in self.coded for name in names} - {place in left}:
                return f"a part of {place!r} is missing"
        return None


def _name(place: str, word: str) -> str:
    return f"{place}/{word}" if word else place
