"""What both sides of a round share: streams, an adversary's word, what cannot be used."""

from collections.abc import Mapping

import numpy as np

from fedkd.exchange.adversaries import Adversary, Seen
from fedkd.exchange.payload import Payload
from fedkd.exchange.values import digest

UP, DOWN = 0, 1
"""Sides of the exchange in the keys of streams."""


class BadPayloadError(ValueError):
    """What came cannot be used; the text says why, in a few words."""


class MemoryLostError(RuntimeError):
    """A client does not remember what it needs to decode what came."""


def lies_of(adversary: Adversary, seen: Seen, rng: np.random.Generator) -> Mapping[int, Payload]:
    """Return what an adversary sends, by client.

    Raises:
        ValueError: it speaks for a client that it does not control.
    """
    replaced = adversary.replaces(seen, rng)
    others = replaced.keys() - seen.own.keys()
    if others:
        raise ValueError(
            f"adversary {adversary.kind} replaces what client {min(others)} sends, which it does "
            "not control"
        )
    return replaced


def told_apart(payload: Payload) -> int:
    """Return a number that differs for different content, for the stream of a release."""
    return int(digest(payload)[:8], 16)
