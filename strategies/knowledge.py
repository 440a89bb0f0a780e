"""What federations exchange: predictions on public rows, or parameters.

A piece of knowledge knows its kind and its bytes, and turns into Flower records and back.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedkd.targets import Targets, soften
from fedkd.training import Arrays, as_tensor

PredictionKind = Literal["logits", "mean_logit", "mean_probability"]
"""``logits``: one model's own; ``mean_logit`` and ``mean_probability``: an average of several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """Scores or soft labels of public rows.

    Attributes:
        kind: what the values are; probabilities are softened already.
        rows: int64 positions in the public set, strictly increasing; both sides derive them
            from the round, so they cost no bytes on the wire.
        values: float32 ``[rows, classes]``, or ``[members, rows, classes]`` where a cohort's
            members each received their own.
        temperature: what probabilities were softened with, and what logits are to be softened
            with, > 0.
    """

    kind: PredictionKind
    rows: np.ndarray
    values: np.ndarray
    temperature: float = 1.0

    @property
    def payload_bytes(self) -> int:
        """Bytes on the wire for one client: the values, uncompressed."""
        return self.values.nbytes if self.values.ndim == 2 else self.values[0].nbytes

    def targets(self) -> Targets:
        """Return the values as what is to be learnt."""
        if self.kind == "mean_probability":
            return Targets(self.values, scale="probabilities", temperature=self.temperature)
        return Targets(self.values)

    def probabilities(self) -> np.ndarray:
        """Return the values as soft labels: logits are softened with ``temperature``."""
        if self.kind == "mean_probability":
            return self.values
        return soften(as_tensor(self.values), temperature=self.temperature).numpy()


@dataclass(frozen=True, slots=True)
class Parameters:
    """A model's parameters and buffers by name."""

    arrays: Arrays
    kind: Literal["parameters"] = "parameters"

    @property
    def payload_bytes(self) -> int:
        """Bytes on the wire: all arrays, uncompressed."""
        return sum(array.nbytes for array in self.arrays.values())


Knowledge = Predictions | Parameters


@dataclass(frozen=True, slots=True)
class Broadcast:
    """What the server answers with after a round.

    Attributes:
        shared: for every client without an entry of its own; None where it receives nothing.
        personal: by partition id, None for a client that receives nothing. Clients may share
            one object: it then travels once.
        by_architecture: for clients without an entry of their own; a federation of many
            clients has few architectures.
        architectures: each client's, by partition id; needed beside ``by_architecture``.
    """

    shared: Knowledge | None = None
    personal: Mapping[int, Knowledge | None] = field(default_factory=dict)
    by_architecture: Mapping[str, Knowledge | None] = field(default_factory=dict)
    architectures: Sequence[str] = ()

    def to(self, client: int) -> Knowledge | None:
        """Return what this client receives."""
        if client in self.personal:
            return self.personal[client]
        if self.by_architecture:
            return self.by_architecture.get(self.architectures[client], self.shared)
        return self.shared

    def received(self, num_clients: int) -> list[Knowledge]:
        """Return what any of so many clients receives; a piece that several receive stands once.

        Asks no client by itself: there may be a hundred thousand, and every round comes here.
        """
        pieces = list(self.personal.values())
        if len(self.personal) < num_clients:
            others: Iterable[str] = self.architectures
            if self.personal:
                named = enumerate(self.architectures)
                others = [key for client, key in named if client not in self.personal]
            pieces += [self.by_architecture.get(key, self.shared) for key in dict.fromkeys(others)]
            if not self.by_architecture:
                pieces.append(self.shared)
        return list({id(piece): piece for piece in pieces if piece is not None}.values())

    def __iter__(self) -> Iterator[Knowledge]:
        """Iterate over all pieces, also those that nobody receives."""
        pieces = (*self.personal.values(), *self.by_architecture.values(), self.shared)
        for knowledge in pieces:
            if knowledge is not None:
                yield knowledge


@dataclass(frozen=True, slots=True)
class ClientUpload:
    """One client's validated answer, as the aggregator sees it."""

    client: int
    knowledge: Knowledge
    num_examples: int


_META = "knowledge"
_ARRAYS = "knowledge-arrays"


def write_knowledge(records: RecordDict, knowledge: Knowledge | None) -> None:
    """Put a piece of knowledge into a Flower record; None leaves the record as it is."""
    if knowledge is None:
        return
    meta: dict[str, str | float] = {"kind": knowledge.kind}
    if isinstance(knowledge, Predictions):
        meta["temperature"] = knowledge.temperature
        arrays = {"rows": knowledge.rows, "values": knowledge.values}
    else:
        arrays = knowledge.arrays
    records[_META] = ConfigRecord(meta)  # type: ignore[arg-type]
    records[_ARRAYS] = to_array_record(arrays)


def read_knowledge(records: RecordDict) -> Knowledge | None:
    """Return the knowledge in a Flower record, or None where there is none."""
    if _META not in records:
        return None
    meta = records.config_records[_META]
    arrays = from_array_record(records.array_records[_ARRAYS])
    kind = str(meta["kind"])
    if kind == "parameters":
        return Parameters(arrays)
    if kind not in ("logits", "mean_logit", "mean_probability"):
        raise ValueError(f"unknown kind of knowledge {kind!r}")
    return Predictions(
        kind=kind,  # type: ignore[arg-type]
        rows=arrays["rows"],
        values=arrays["values"],
        temperature=float(meta["temperature"]),  # type: ignore[arg-type]
    )


def to_array_record(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """Turn named NumPy arrays into a Flower record."""
    # Not np.ascontiguousarray: it turns the 0-d counters of BatchNorm into vectors.
    return ArrayRecord({name: Array(np.asarray(a, order="C")) for name, a in arrays.items()})


def from_array_record(record: ArrayRecord) -> Arrays:
    """Turn a Flower record into named NumPy arrays."""
    return {name: array.numpy() for name, array in record.items()}
