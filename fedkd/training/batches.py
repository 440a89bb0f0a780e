"""Which rows make up each step: shuffled passes cut into batches, or rows drawn one by one."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """How long to train: whole epochs over the rows, or a number of steps.

    Attributes:
        batch_size: rows a step, >= 1.
        epochs: passes over the rows, >= 0; used when ``steps`` is None.
        steps: optimizer steps, >= 0; passes are repeated, reshuffled, as far as needed.
    """

    batch_size: int
    epochs: int = 1
    steps: int | None = None

    def batches(self, rows: int, rng: np.random.Generator) -> list[np.ndarray]:
        """Return one int64 array of positions in [0, rows) for each step.

        A pass visits every row once. A last batch of a single row joins the batch before it,
        because BatchNorm cannot train on one row and a lone row makes the noisiest step; where
        ``batch_size`` is 1 that is what was asked for.
        """
        _check_rows(rows)
        batches: list[np.ndarray] = []
        passes = 0
        while passes < self.epochs if self.steps is None else len(batches) < self.steps:
            batches.extend(_one_pass(rows, self.batch_size, rng))
            passes += 1
        return batches[: self.steps]

    def count(self, rows: int) -> int:
        """Return how many steps `batches` cuts these rows into."""
        if self.steps is not None:
            return self.steps
        return self.epochs * (1 + len(_cuts(rows, self.batch_size)))

    def smallest(self, rows: int) -> int | None:
        """Return the rows of the smallest step that `batches` cuts; None where there is no step."""
        if not (self.epochs if self.steps is None else self.steps):
            return None
        cuts = [0, *_cuts(rows, self.batch_size), rows]
        return min(stop - start for start, stop in pairwise(cuts))

    def spread_over(self, steps: int, rows: int) -> "Passes":
        """Return passes that hand out these rows over ``steps`` steps of another feed.

        Every row is handed out equally often, ``epochs`` times, and no two steps differ by more
        than one row. Where that leaves fewer than two rows a step there are more passes than
        ``epochs``: BatchNorm cannot train on one row, and the mean of one is a noisy lesson.
        """
        at_least = min(2, rows) * steps
        epochs = max(self.epochs, -(-at_least // max(rows, 1)))
        return _Spread(batch_size=self.batch_size, epochs=epochs, steps=steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoissonPasses(Passes):
    """As many steps as passes have, each of which draws every row by itself with one probability.

    Whether a row is drawn says nothing about any other row or step, which is what the accounting of
    subsampled noise assumes. Batches differ in size, and may be empty.
    """

    @classmethod
    def of(cls, passes: Passes) -> "PoissonPasses":
        """Return the same number of steps, with batches of the same size on average."""
        return cls(batch_size=passes.batch_size, epochs=passes.epochs, steps=passes.steps)

    def batches(self, rows: int, rng: np.random.Generator) -> list[np.ndarray]:
        """Return one int64 array of rising positions in [0, rows) for each step."""
        _check_rows(rows)
        rate = min(1.0, self.batch_size / rows)
        return [np.flatnonzero(rng.random(rows) < rate) for _ in range(self.count(rows))]

    def smallest(self, rows: int) -> int | None:
        """Return 0: a step may draw no row; None where there is no step."""
        return 0 if self.count(rows) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spread(Passes):
    """All passes in a row, cut into ``steps`` parts of equal size; ``batch_size`` has no say."""

    def batches(self, rows: int, rng: np.random.Generator) -> list[np.ndarray]:
        _check_rows(rows)
        order = np.concatenate([rng.permutation(rows) for _ in range(self.epochs)])
        # NumPy's own `array_split` takes longer than the draw.
        size, longer = divmod(len(order), self.steps or 1)
        ends = [size * part + min(part, longer) for part in range((self.steps or 0) + 1)]
        return [order[start:stop] for start, stop in pairwise(ends)]


def _check_rows(rows: int) -> None:
    if rows < 1:
        raise ValueError(f"need at least one row to train on, got {rows}")


def _one_pass(rows: int, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    order, ends = rng.permutation(rows), [0, *_cuts(rows, batch_size), rows]
    return [order[start:stop] for start, stop in pairwise(ends)]


def _cuts(rows: int, batch_size: int) -> list[int]:
    """Return where a pass is cut; a lone last row stays with the batch before it."""
    cuts = list(range(batch_size, rows, batch_size))
    if batch_size > 1 and cuts and rows - cuts[-1] == 1:
        cuts.pop()
    return cuts
