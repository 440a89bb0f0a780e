"""Ways to deal rows as people bring them: some right, some wrong in one way each."""

import numpy as np

NO_FUNCTION = 3


def in_turn(labels, *, num_clients, rng, first):
    """Give the first client so many rows, and deal the others in turn, the last ones first."""
    rest = np.arange(first, len(labels))
    return [range(first), *(rest[k :: num_clients - 1][::-1] for k in range(num_clients - 1))]


def by_global_lot(labels, *, num_clients, rng):
    return np.array_split(np.random.permutation(len(labels)), num_clients)


def even(labels, num_clients):
    return np.array_split(np.arange(len(labels)), num_clients)


def too_few(labels, *, num_clients, rng):
    return even(labels, num_clients - 1)


def twice(labels, *, num_clients, rng):
    parts = even(labels, num_clients)
    return [parts[0], np.append(parts[1], 0), *parts[2:]]


def outside(labels, *, num_clients, rng):
    parts = even(labels, num_clients)
    return [*parts[:2], np.append(parts[2], len(labels)), *parts[3:]]


def before(labels, *, num_clients, rng):
    parts = even(labels, num_clients)
    return [np.append(parts[0], -1), *parts[1:]]


def fractions(labels, *, num_clients, rng):
    return [part / 2 for part in even(labels, num_clients)]


def nothing(labels, *, num_clients, rng):
    return None


def small(labels, *, num_clients, rng):
    parts = even(labels, num_clients)
    return [*parts[:-1], parts[-1][:3]]


def complains(labels, *, num_clients, rng):
    raise ValueError("7 is no day")
