"""What a run's rounds measured, as far as the end of the run needs it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedkd.metrics.fairness import forgetting
from sim.server.observers import Row


@dataclass
class History:
    """What a run's rounds measured; grows by a row a round, whatever the number of clients.

    The rows of every round and client are in the run folder.

    Attributes:
        federation: a row for each round.
        clients: each client's row of the last round in which it was judged.
        server: the last row of the server's model, the first where it has several.
        bytes_up, bytes_down: totals by client.
        bits: under a budget how many payloads had so many bits a number, by direction.
        networks: what rows of efforts are counted by, see `sim.devices.effort`.
        best_personal: the best accuracy under its own label mix that each client ever had.
    """

    federation: list[Row] = field(default_factory=list)
    clients: dict[int, Row] = field(default_factory=dict)
    server: Row | None = None
    bytes_up: dict[int, int] = field(default_factory=dict)
    bytes_down: dict[int, int] = field(default_factory=dict)
    bits: dict[str, dict[int, int]] = field(default_factory=dict)
    networks: list[Row] = field(default_factory=list)
    best_personal: dict[int, float] = field(default_factory=dict)

    def add_metrics(self, rows: Iterable[Row]) -> None:
        """Take in rows of ``metrics.jsonl``."""
        for row in rows:
            match row["scope"]:
                case "federation":
                    self.federation.append(row)
                case "client" if "accuracy" in row:
                    self.clients[row["client"]] = row
                    self._note_personal(row)
                # Of several models the first leads; the others say which they are.
                case "server" if "model" not in row:
                    self.server = row

    def _note_personal(self, row: Row) -> None:
        # Of a client none of whose classes is in the test split it is NaN; null in the file.
        accuracy = row.get("personal_accuracy")
        if accuracy is not None and not math.isnan(accuracy):
            client = row["client"]
            self.best_personal[client] = max(accuracy, self.best_personal.get(client, accuracy))

    def forgotten(self, client: int, row: Row) -> Row:
        """Return by how much a client is worse on its own label mix than it ever was.

        Args:
            client: that was judged.
            row: what was measured, not taken in yet.

        Returns:
            ``forgetting``; nothing where one of the two accuracies is not known.
        """
        best = self.best_personal.get(client)
        if best is None or math.isnan(row["personal_accuracy"]):
            return {}
        return {"forgetting": forgetting([best], row["personal_accuracy"])}

    def add_exchange(self, rows: Iterable[Row]) -> None:
        """Take in rows of payloads in ``exchange.jsonl``."""
        for row in rows:
            totals = self.bytes_up if row["direction"] == "up" else self.bytes_down
            totals[row["client"]] = totals.get(row["client"], 0) + row["bytes"]
            if "bits" in row:
                counts = self.bits.setdefault(row["direction"], {})
                counts[row["bits"]] = counts.get(row["bits"], 0) + 1


def selected_round(history: History) -> Row:
    """Return the federation's row of the round with the best mean validation accuracy.

    The earliest of equals; the test split has no say in it.
    """
    judged = [row for row in history.federation if row.get("validation_accuracy") is not None]
    if not judged:
        return {}
    best = int(np.argmax([row["validation_accuracy"] for row in judged]))
    return judged[best]


def summary(history: History, num_clients: int, *, selects: bool = True) -> dict[str, Any]:
    """Return the last round, the selected round, each client's last row and bytes by client.

    Args:
        history: of the run.
        num_clients: registered clients.
        selects: whether a round may be selected by validation rows; a guarantee does not cover it.
    """
    judged = [row for row in history.federation if "accuracy" in row]
    return {
        "last": judged[-1] if judged else {},
        "selected": selected_round(history) if selects else {},
        "clients": [row for _, row in sorted(history.clients.items())],
        "server": history.server,
        "bytes_up": [history.bytes_up.get(client, 0) for client in range(num_clients)],
        "bytes_down": [history.bytes_down.get(client, 0) for client in range(num_clients)],
        "networks": history.networks,
        **({"bits": history.bits} if history.bits else {}),
    }
