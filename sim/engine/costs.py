"""What serving a client takes, learnt from what it took.

Only the order and the size of calls follow from it, never what is computed in them.
"""

from collections.abc import Sequence

import numpy as np

from fedkd.data import FederatedData
from sim.settings import Settings
from sim.wire.messages import Phase

_FIRST_GUESS = {"query": 1e-6, "train": 1e-3, "evaluate": 1e-3}
"""Seconds for a client and row before anything was measured."""


class Costs:
    """Expected seconds of clients in each phase; a few bytes a client."""

    def __init__(self, settings: Settings, data: FederatedData) -> None:
        count = settings.clients.count
        numbers: dict[str, int] = {}
        models = [settings.model_of(client).key for client in range(count)]
        self._family = np.array([numbers.setdefault(key, len(numbers)) for key in models])
        rows = np.fromiter((max(len(rows), 1) for rows in data.client_rows), np.float64)
        # Everybody is judged on the same rows, and everybody is asked the same question.
        self._work = {"query": np.ones(count), "train": rows, "evaluate": np.ones(count)}
        self._seconds = {
            phase: np.full(count, np.nan, np.float32) for phase in ("query", "train", "evaluate")
        }
        self._rates: dict[tuple[Phase, int], float] = {}

    def expect(self, phase: Phase, clients: Sequence[int]) -> float:
        """Return the expected seconds of these clients, who share an architecture."""
        seconds = self._seconds[phase][list(clients)]
        known = ~np.isnan(seconds)
        if known.all():
            return float(seconds.sum())
        family = int(self._family[clients[0]])
        rate = self._rates.get((phase, family), self._rates.get((phase, -1), _FIRST_GUESS[phase]))
        unknown = self._work[phase][list(clients)][~known]
        return float(seconds[known].sum() + rate * unknown.sum())

    def learn(self, phase: Phase, clients: Sequence[int], seconds: float) -> None:
        """Note that these clients took so long together."""
        index = list(clients)
        work = self._work[phase][index]
        rate = seconds / float(work.sum())
        self._seconds[phase][index] = rate * work
        self._rates[phase, int(self._family[clients[0]])] = rate
        self._rates[phase, -1] = rate

    def measured(self, phase: Phase) -> bool:
        """Tell whether expectations of this phase rest on measurements."""
        return (phase, -1) in self._rates
