"""Orders: what the server decided for one client in one round."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedkd.exchange.payload import Extent, Payload, RowIds, ids_bytes, in_order


@dataclass(frozen=True, kw_only=True)
class Orders(Payload):
    """What a client cannot derive from the settings, since the server decides it as it goes.

    Attributes:
        rows: int64 positions in the public set to predict, strictly increasing; None: those of the
            round, which everybody derives.
        ids: ``subset`` of the round's rows, or ``own``, any rows of the public set.
        planned: rows of the round.
        peers: partition ids, four bytes each.
        phase: a word of the algorithm's own, a byte a letter.
    """

    kind: ClassVar[str] = "orders"

    rows: np.ndarray | None = None
    ids: RowIds = "subset"
    planned: int = 0
    peers: tuple[int, ...] = ()
    phase: str = ""

    def not_kept(self, extent: Extent) -> str | None:
        """They are about rows of the public set, in order, and about clients that there are."""
        if self.rows is not None and not in_order(self.rows, extent.public_rows):
            return "orders of rows that are not of the public set, in order"
        if not all(0 <= peer < extent.clients for peer in self.peers):
            return f"orders name peers that are not 0 to {extent.clients - 1}"
        return None

    @property
    def payload_bytes(self) -> int:
        """Bytes of the ids and the word."""
        rows = 0 if self.rows is None else ids_bytes(self.ids, len(self.rows), self.planned)
        return rows + 4 * len(self.peers) + len(self.phase.encode())
