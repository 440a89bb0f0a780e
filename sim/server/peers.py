"""How clients' models compare at the end: who agrees with whom, what confidence is worth."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Integer

from fedkd.metrics.calibration import ReliabilityBins
from sim.server.observers import Row

MOST_PEERS = 40
"""Clients whose agreement is written down, those of the lowest numbers: pairs grow as a square."""


class Peers:
    """Collects the answers of clients on the test split, in whatever order they come.

    Args:
        clients: that are going to be judged.
        labels: of the test split.
    """

    def __init__(self, clients: Iterable[int], labels: Integer[np.ndarray, " rows"]) -> None:
        self._shown = frozenset(sorted(clients)[:MOST_PEERS])
        self._labels = labels
        self._answers: dict[int, np.ndarray] = {}
        self._bins: dict[int, ReliabilityBins] = {}

    def add(self, client: int, probabilities: Float[np.ndarray, "rows classes"]) -> None:
        """Take note of what a client's model says; again, in the place of what it said before."""
        answers = probabilities.argmax(-1)
        # A probability that was rounded up lies above 1 by less than any interval is wide.
        confidence = np.minimum(probabilities.max(-1).astype(np.float64), 1.0)
        bins = ReliabilityBins()
        bins.add_answers(confidence, answers == self._labels)
        self._bins[client] = bins
        if client in self._shown:
            self._answers[client] = answers

    def row(self, round: int) -> Row:
        """Return what was found, in the order of clients.

        Returns:
            ``round``; ``rows`` of the test split; ``judged`` clients; ``clients``, those of
            ``agreement``, which holds the share of rows on which two of them rank the same class
            first; and ``reliability``, of all judged clients together: of each interval of
            confidence its ``rows``, how many were ``correct``, and the sum of their ``confidence``.
            Empty if nobody answered.
        """
        if not self._bins:
            return {}
        clients = sorted(self._answers)
        answers = np.stack([self._answers[client] for client in clients])
        agreement = [[_share((one == other).mean()) for other in answers] for one in answers]
        of_each = [self._bins[client] for client in sorted(self._bins)]
        return {
            "round": round,
            "rows": len(self._labels),
            "judged": len(of_each),
            "clients": clients,
            "agreement": agreement,
            "reliability": {
                "rows": np.sum([bins.counts for bins in of_each], axis=0).tolist(),
                "correct": np.sum([bins.correct_counts for bins in of_each], axis=0).tolist(),
                "confidence": np.sum([bins.confidence_sums for bins in of_each], axis=0).tolist(),
            },
        }


def _share(value: np.floating) -> float:
    """Return a share in as many digits as anybody reads."""
    return float(f"{value:.6g}")
