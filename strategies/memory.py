"""What has to outlive a round: named arrays and plain values, from which a resumed run goes on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedkd.training import Arrays
from strategies.knowledge import Broadcast, Knowledge, Parameters, Predictions


@dataclass(frozen=True, slots=True)
class Memory:
    """A part of a run between two rounds.

    Attributes:
        arrays: by name. Not copies: whoever remembers an array replaces it and never writes
            into it.
        values: what JSON can hold.
    """

    arrays: Arrays = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)


def remember_knowledge(pieces: Sequence[Knowledge]) -> Memory:
    """Flatten pieces of knowledge; `recall_knowledge` makes them again, in the same order."""
    arrays: Arrays = {}
    table: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        entry: dict[str, Any] = {"kind": piece.kind}
        if isinstance(piece, Predictions):
            entry["temperature"] = piece.temperature
            parts = {"rows": piece.rows, "values": piece.values}
        else:
            parts = piece.arrays
        table.append(entry)
        arrays.update({f"{number}/{name}": array for name, array in parts.items()})
    return Memory(arrays, {"pieces": table})


def recall_knowledge(memory: Memory) -> list[Knowledge]:
    """Return what `remember_knowledge` flattened."""
    parts: list[Arrays] = [{} for _ in memory.values["pieces"]]
    for key, array in memory.arrays.items():
        number, name = key.split("/", 1)
        parts[int(number)][name] = array
    return [
        Parameters(arrays)
        if entry["kind"] == "parameters"
        else Predictions(
            kind=entry["kind"],
            rows=arrays["rows"],
            values=arrays["values"],
            temperature=entry["temperature"],
        )
        for entry, arrays in zip(memory.values["pieces"], parts, strict=True)
    ]


def remember_table(table: Mapping[str, Knowledge]) -> Memory:
    """Flatten a table of knowledge by name."""
    pieces = remember_knowledge(list(table.values()))
    return Memory(pieces.arrays, {**pieces.values, "names": list(table)})


def recall_table(memory: Memory) -> dict[str, Knowledge]:
    """Return what `remember_table` flattened."""
    return dict(zip(memory.values["names"], recall_knowledge(memory), strict=True))


def remember_broadcast(broadcast: Broadcast) -> Memory:
    """Flatten what the next round receives; a piece that several clients share is kept once."""
    pieces: dict[int, Knowledge] = {}
    numbers: dict[int, int] = {}

    def number(piece: Knowledge | None) -> int | None:
        if piece is None:
            return None
        pieces.setdefault(id(piece), piece)
        return numbers.setdefault(id(piece), len(numbers))

    values = {
        "shared": number(broadcast.shared),
        "personal": [[client, number(piece)] for client, piece in broadcast.personal.items()],
        "by_architecture": [
            [architecture, number(piece)]
            for architecture, piece in broadcast.by_architecture.items()
        ],
    }
    flat = remember_knowledge(list(pieces.values()))
    return Memory(flat.arrays, {**flat.values, **values})


def recall_broadcast(memory: Memory, architectures: Sequence[str]) -> Broadcast:
    """Return what `remember_broadcast` flattened.

    Args:
        memory: what it returned.
        architectures: each client's, by partition id.

    Raises:
        ValueError: for a client, an architecture or a piece that there is not, or one named twice.
    """
    pieces = recall_knowledge(memory)

    def piece(number: int | None) -> Knowledge | None:
        if number is None:
            return None
        if type(number) is not int or not 0 <= number < len(pieces):
            raise ValueError(f"there is no piece {str(number)[:20]}")
        return pieces[number]

    clients = [client for client, _ in memory.values["personal"]]
    known = all(type(client) is int and client >= 0 for client in clients)
    named = [key for key, _ in memory.values["by_architecture"]]
    if not known or len(set(clients)) < len(clients):
        raise ValueError("it is for clients that there are not, or for one twice")
    if not set(named) <= set(architectures) or len(set(named)) < len(named):
        raise ValueError("it is for architectures that there are not, or for one twice")
    by_architecture = {key: piece(number) for key, number in memory.values["by_architecture"]}
    return Broadcast(
        shared=piece(memory.values["shared"]),
        personal={client: piece(number) for client, number in memory.values["personal"]},
        by_architecture=by_architecture,
        architectures=architectures if by_architecture else (),
    )
