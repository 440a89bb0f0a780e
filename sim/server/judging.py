"""In which rounds models are judged."""

import math
from collections.abc import Iterable

from sim.server.observers import Row

MOST_OF_TIME = 0.2
"""The share of a run's time that judging may take where the settings leave it open."""

BACKWARDS = 2
"""What the way back through a network costs, in ways forth."""

COUNTED_ROUND = 2
"""Whose learning is taken for that of later rounds; the first has what was prepared as well."""


def rounds_between(rows: Iterable[Row], judged_rows: int) -> int:
    """Return how many rounds lie between two in which models are judged.

    Counted and not timed, so a run repeats on any machine: a row that is judged goes through a
    network once, a row that is learnt from three times. A step of a small batch takes longer than
    that, so judging takes less of the time than is counted.

    Args:
        rows: of the federation, as far as the rounds went.
        judged_rows: rows that go through a network when all models are judged, >= 0.

    Returns:
        1 as long as nobody knows, and where nobody learns.
    """
    for row in rows:
        if row["round"] >= COUNTED_ROUND and (passes := _passes(row)):
            return max(1, math.ceil(judged_rows * (1 / MOST_OF_TIME - 1) / passes))
    return 1


def _passes(row: Row) -> int:
    """Return ways forth through a network that a round's learning stands for."""
    trained, predicted = (
        sum(int(value) for key, value in row.items() if key.startswith(kind))
        for kind in ("trained_", "predicted_")
    )
    return (1 + BACKWARDS) * trained + predicted
