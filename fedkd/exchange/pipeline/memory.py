"""What codecs remember on both sides, and where the exchange with a client stands."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from fedkd.exchange.budget import NO_BUDGET, Levels
from fedkd.exchange.ledger import Ledger
from fedkd.exchange.payload import Payload
from fedkd.exchange.values import Arrays, Value, flatten

PREFIX = "exchange/"
"""What the names of all arrays begin with that a client keeps for its codecs."""

_ROUNDS = f"{PREFIX}rounds"


@dataclass(frozen=True)
class Remembered(Value):
    """What codecs remember of one client at the server.

    Attributes:
        round: that its last good answer belongs to.
        up: memory of the codec of what it sends.
        down: memory of the codec of what it is sent.
    """

    round: int
    up: Mapping[str, np.ndarray]
    down: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class ExchangeState(Value):
    """What the exchange remembers between two rounds; part of a run's boundary.

    Attributes:
        changed: the last round that was complete; what the server sends is of that round.
        clients: what codecs remember, of those of whom they do.
        ledger: what was released so far.
        spent: bytes that were exchanged so far, both ways.
    """

    changed: int = 0
    clients: Mapping[int, Remembered] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    spent: int = 0


class Standing(NamedTuple):
    """Where the exchange with a client stands when it is called.

    Attributes:
        arrays: that it keeps, by name; others than ours are passed over.
        since: the round that the server names.
        levels: that the server has chosen under a budget.
        releases: planned of it in the whole run.
    """

    arrays: Mapping[str, np.ndarray] = MappingProxyType({})
    since: int = 0
    levels: Levels = NO_BUDGET
    releases: int = 1


@dataclass(frozen=True)
class Snapshot:
    """A client's memories after one round."""

    up: Arrays = field(default_factory=dict)
    down: Arrays = field(default_factory=dict)


def snapshots_in(arrays: Mapping[str, np.ndarray]) -> dict[int, Snapshot]:
    """Return a client's memories by round, from the arrays that it keeps."""
    if _ROUNDS not in arrays:
        return {}
    found = {int(round): Snapshot() for round in arrays[_ROUNDS]}
    for name, array in arrays.items():
        if name.startswith(PREFIX) and name != _ROUNDS:
            round, side, inner = name.removeprefix(PREFIX).split("/", 2)
            snapshot = found[int(round)]
            (snapshot.up if side == "up" else snapshot.down)[inner] = array
    return found


def arrays_of(snapshots: Mapping[int, Snapshot]) -> Arrays:
    """Return the arrays that a client keeps, from its memories by round."""
    arrays = {_ROUNDS: np.array(sorted(snapshots), np.int64)}
    for round, snapshot in snapshots.items():
        for side, memory in (("up", snapshot.up), ("down", snapshot.down)):
            arrays |= {f"{PREFIX}{round}/{side}/{name}": array for name, array in memory.items()}
    return arrays


def arrays_in(payload: Payload | None) -> Arrays:
    """Return the arrays of a payload; none of nothing."""
    return {} if payload is None else flatten(payload).arrays
