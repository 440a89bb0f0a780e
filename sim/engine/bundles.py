"""Where clients' states are in Ray's object store."""

from dataclasses import dataclass
from typing import Any


class Bundle:
    """The states that one parcel returned: one object, freed when no client needs it any more."""

    __slots__ = ("live", "reference", "size")

    def __init__(self, reference: Any, size: int) -> None:
        self.reference = reference
        self.size = size
        self.live = size


@dataclass(frozen=True, slots=True)
class StatePlace:
    """Where a client's state is."""

    bundle: Bundle
    place: int
