"""What a codec is, and what all of them share."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from fedkd.exchange.kinds import Stage
from fedkd.exchange.payload import FLOAT32, Asked, Limit, Payload
from fedkd.exchange.payloads.encoded import Encoded
from fedkd.exchange.values import Arrays, flatten

ROUNDING = float(np.finfo(np.float32).eps)
"""What float32 itself rounds by, as a share."""


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


class Coding(Codec):
    """A codec that makes an `Encoded`."""

    def _encoded(self, encoded: Payload) -> Encoded:
        if not isinstance(encoded, Encoded):
            raise TypeError(f"{self.kind} decodes an Encoded, got {encoded.kind}")
        return encoded


def float_limits(asked: Asked) -> Iterator[tuple[str, Limit]]:
    """Find the arrays of numbers that may be rounded; what has to be there bit for bit may not."""
    for place, limit in asked.limits.items():
        if limit.dtype == FLOAT32 and limit.constant is None:
            yield place, limit


def float_arrays(payload: Payload) -> Iterator[tuple[str, np.ndarray]]:
    """Find the arrays of numbers that can be rounded."""
    for place, array in flatten(payload).arrays.items():
        if array.dtype == FLOAT32 and np.isfinite(array).all():
            yield place, array
