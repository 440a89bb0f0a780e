"""Rows whose membership is told: a client's own, and as many of each class that nobody learnt from.

Where clients see few classes, members and non-members of other mixes would be told apart by their
class alone. So a client's candidates are of its own mix on both sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int64

from fedkd.data import FederatedData
from fedkd.randomness import Purpose, generator_for


@dataclass(frozen=True)
class Pool:
    """All rows that can be candidates: the private ones of all clients, then the test rows."""

    inputs: Float32[np.ndarray, "rows *shape"]
    labels: Int64[np.ndarray, "rows"]

    @classmethod
    def of(cls, data: FederatedData) -> "Pool":
        """Return the pool of a run."""
        return cls(
            np.concatenate([data.train_inputs, data.test_inputs]),
            np.concatenate([data.train_labels, data.test_labels]),
        )


@dataclass(frozen=True)
class Candidates:
    """Rows of one client whose membership is to be told.

    Attributes:
        client: partition id.
        rows: positions in the pool: of members, then as many of non-members, class by class.
        members: whether the client learnt from a row.
        always: its other rows, from which all shadows learn as well.
    """

    client: int
    rows: Int64[np.ndarray, "candidates"]
    members: Bool[np.ndarray, "candidates"]
    always: Int64[np.ndarray, "others"]

    def halves(
        self, labels: Int64[np.ndarray, "rows"], shadows: int, rng: np.random.Generator
    ) -> Bool[np.ndarray, "shadows candidates"]:
        """Return which candidates each shadow learns from: half of each class.

        Two shadows in a row have one half each, so that every row is in half of all shadows.

        Args:
            labels: of the pool.
            shadows: how many; even.
            rng: of the draws.
        """
        inside = np.zeros((shadows, len(self.rows)), dtype=bool)
        classes = labels[self.rows]
        for pair in range(0, shadows, 2):
            for label in np.unique(classes):
                places = rng.permutation(np.flatnonzero(classes == label))
                inside[pair, places[: len(places) // 2]] = True
            inside[pair + 1] = ~inside[pair]
        return inside

    def learnt(self, inside: Bool[np.ndarray, "candidates"]) -> Int64[np.ndarray, "own"]:
        """Return the rows of a shadow that has these candidates."""
        return np.sort(np.concatenate([self.always, self.rows[inside]]))


def candidates_of(data: FederatedData, clients: Sequence[int], seed: int) -> list[Candidates]:
    """Draw the candidates of several clients, none of which has a row of another's.

    A class has as many members as there are test rows of it for the client, which are dealt out in
    proportion to what clients hold. Rows with wrong labels (``data.label_noise``, canaries) are
    none: test rows have no such labels, so that the noise would tell. Nor are rows that are on both
    sides, as repeated rows of a source may be: somebody did learn from such a test row.

    Args:
        data: of the run.
        clients: partition ids.
        seed: of the run.

    Returns:
        The candidates of each client that has any.
    """
    wrong = np.empty(0, np.int64) if data.wrong_labels is None else data.wrong_labels.rows
    private, test = _digests(data.train_inputs), _digests(data.test_inputs)
    unusable = np.union1d(wrong, np.flatnonzero(np.isin(private, test)))
    usable = {client: np.setdiff1d(data.client_rows[client], unusable) for client in clients}
    learnt = np.isin(test, private)
    rngs = {client: generator_for(seed, Purpose.ATTACK, client) for client in clients}
    members: dict[int, list[np.ndarray]] = {client: [] for client in clients}
    others: dict[int, list[np.ndarray]] = {client: [] for client in clients}
    dealing = generator_for(seed, Purpose.ATTACK)
    for label in range(data.num_classes):
        mine = {c: usable[c][data.train_labels[usable[c]] == label] for c in clients}
        unseen = dealing.permutation(np.flatnonzero((data.test_labels == label) & ~learnt))
        dealt = _dealt(len(unseen), [len(mine[client]) for client in clients])
        starts = np.cumsum([0, *dealt])
        for client, count, start in zip(clients, dealt, starts, strict=False):
            members[client].append(rngs[client].permutation(mine[client])[:count])
            others[client].append(unseen[start : start + count] + len(data.train_labels))
    found = []
    for client in clients:
        inside = np.sort(np.concatenate(members[client]))
        outside = np.sort(np.concatenate(others[client]))
        if len(inside):
            rows = np.concatenate([inside, outside])
            is_member = np.arange(len(rows)) < len(inside)
            always = np.setdiff1d(data.client_rows[client], inside)
            found.append(Candidates(client, rows, is_member, always))
    return found


def _digests(inputs: Float32[np.ndarray, "rows *shape"]) -> np.ndarray:
    """Return a number for each input that equal ones share, and no others do in practice."""
    return np.array([hash(row.tobytes()) for row in inputs], dtype=np.int64)


def _dealt(rows: int, wanted: Sequence[int]) -> list[int]:
    """Deal rows out in proportion to what is wanted, and nobody more than that."""
    total = sum(wanted)
    if total <= rows:
        return list(wanted)
    shares = [rows * own / total for own in wanted]
    dealt = [int(share) for share in shares]
    # What is left goes to those whose share was cut the most; of equals, to the first.
    by_rest = sorted(range(len(wanted)), key=lambda place: dealt[place] - shares[place])
    for place in by_rest[: rows - sum(dealt)]:
        dealt[place] += 1
    return dealt
