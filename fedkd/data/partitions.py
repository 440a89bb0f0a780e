"""Deal the private rows to the clients.

The four ways are those of flwr-datasets, row for row: a seed gives the parts that its partitioners
give. They stand here in NumPy because importing it takes seconds (datasets, seaborn, pandas), and
what it would do here is cut one array of labels.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from fedkd.data.settings import PartitionSettings

# Dirichlet and pathological shares are random, so another draw may satisfy ``min_rows`` where the
# first did not. Few enough that settings which cannot work fail within seconds.
MAX_DRAWS = 20

Rows = Int64[np.ndarray, "_"]


def partition_rows(
    labels: Int64[np.ndarray, "rows"],
    settings: PartitionSettings,
    *,
    num_clients: int,
    rng: np.random.Generator,
) -> tuple[Int64[np.ndarray, "_"], ...]:
    """Return the rows of each client: sorted, disjoint, at least ``settings.min_rows`` of them.

    ``iid`` and ``dirichlet`` deal every row. ``pathological`` leaves out the classes that nobody
    was given (possible with few clients), ``shard`` the remainder that fills no shard.

    Args:
        labels: class of each private row.
        settings: kind of partition and its parameters.
        num_clients: how many parts.
        rng: decides the parts; the same state gives the same parts.

    Raises:
        ValueError: if the rows cannot be dealt as asked; names the setting and what would work.

    Source:
        dirichlet: Yurochkin et al., 2019. https://arxiv.org/abs/1905.12022
        pathological (first class dealt in turn, so that all classes are held where the clients
        suffice): Li et al., 2021. https://arxiv.org/abs/2102.02079
        shard: McMahan et al., 2017. https://arxiv.org/abs/1602.05629
    """
    _check_feasible(labels, settings, num_clients)
    # Classes are cut into consecutive pieces, so the order decides who gets which row.
    order = rng.permutation(len(labels))

    sizes_are_random = settings.kind in ("dirichlet", "pathological")
    sizes: list[int] = []
    for _ in range(MAX_DRAWS if sizes_are_random else 1):
        parts = _deal(
            labels[order], settings, num_clients, np.random.default_rng(int(rng.integers(2**31)))
        )
        sizes = [len(part) for part in parts]
        if min(sizes) >= settings.min_rows:
            return tuple(np.sort(order[part]) for part in parts)
    raise ValueError(_too_small(sizes, settings))


def _check_feasible(
    labels: Int64[np.ndarray, "rows"], settings: PartitionSettings, num_clients: int
) -> None:
    if num_clients < 1:
        raise ValueError(f"clients.count must be >= 1, got {num_clients}")
    rows = len(labels)
    if num_clients > rows:
        raise ValueError(
            f"clients.count must be at most the {rows} private rows, got {num_clients}: lower it, "
            "or raise data.private_rows or lower data.public.size"
        )
    if num_clients * settings.min_rows > rows:
        raise ValueError(
            f"data.partition.min_rows must be at most {rows // num_clients} for {num_clients} "
            f"clients and {rows} private rows, got {settings.min_rows}"
        )
    held_classes = len(np.unique(labels))
    if settings.kind == "pathological" and settings.classes_per_client > held_classes:
        raise ValueError(
            "data.partition.classes_per_client must be at most the "
            f"{held_classes} classes of the private rows, got {settings.classes_per_client}"
        )
    if settings.kind == "shard" and settings.shards_per_client * num_clients > rows:
        raise ValueError(
            f"data.partition.shards_per_client must be at most {rows // num_clients} for "
            f"{num_clients} clients and {rows} private rows, got {settings.shards_per_client}"
        )


def _deal(
    labels: Int64[np.ndarray, "rows"],
    settings: PartitionSettings,
    num_clients: int,
    rng: np.random.Generator,
) -> Sequence[Rows]:
    match settings.kind:
        case "iid":
            return np.array_split(np.arange(len(labels)), num_clients)
        case "dirichlet":
            return dirichlet_parts(labels, num_clients, alpha=settings.alpha, rng=rng)
        case "pathological":
            return pathological_parts(
                labels, num_clients, classes_per_client=settings.classes_per_client, rng=rng
            )
        case "shard":
            return shard_parts(
                labels, num_clients, shards_per_client=settings.shards_per_client, rng=rng
            )


def dirichlet_parts(
    labels: Int64[np.ndarray, "rows"], num_clients: int, *, alpha: float, rng: np.random.Generator
) -> Sequence[Rows]:
    """Cut the rows of each class into consecutive pieces with shares from Dirichlet(alpha)."""
    pieces: list[list[Rows]] = [[] for _ in range(num_clients)]
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        shares = rng.dirichlet(np.full(num_clients, alpha))
        ends = (np.cumsum(shares) * len(rows)).astype(int)[:-1]
        for part, piece in zip(pieces, np.split(rows, ends), strict=True):
            part.append(piece)
    return [np.concatenate(part) for part in pieces]


def pathological_parts(
    labels: Int64[np.ndarray, "rows"],
    num_clients: int,
    *,
    classes_per_client: int,
    rng: np.random.Generator,
) -> Sequence[Rows]:
    """Give each client its classes, the first in turn and the others by lot, in equal pieces.

    Raises:
        ValueError: if a class has fewer rows than clients to hold it.
    """
    classes = np.unique(labels)
    held: list[list[int]] = []
    for client in range(num_clients):
        own = [int(classes[client % len(classes)])]
        while len(own) < classes_per_client:
            drawn = int(rng.choice(classes, size=1)[0])
            if drawn not in own:
                own.append(drawn)
        held.append(own)

    pieces: list[list[Rows]] = [[] for _ in range(num_clients)]
    for label in classes:
        rows = np.flatnonzero(labels == label)
        holders = [client for client, own in enumerate(held) if label in own]
        if len(holders) > len(rows):
            raise ValueError(
                f"data.partition cannot be dealt: {len(holders)} clients are to hold class "
                f"{label}, which has {len(rows)} private rows. Use fewer clients, fewer "
                "data.partition.classes_per_client, or more private rows"
            )
        if holders:
            for client, piece in zip(holders, np.array_split(rows, len(holders)), strict=True):
                pieces[client].append(piece)
    return [np.concatenate(part) for part in pieces]


def shard_parts(
    labels: Int64[np.ndarray, "rows"],
    num_clients: int,
    *,
    shards_per_client: int,
    rng: np.random.Generator,
) -> Sequence[Rows]:
    """Sort the rows by class, cut them into equal shards and deal these by lot."""
    in_order = np.argsort(labels, kind="stable")
    needed = num_clients * shards_per_client
    size = len(labels) // needed
    # More shards than needed fit where the remainder is long; the lot decides among them all.
    drawn = rng.permutation(len(labels) // size)[:needed]
    shards = in_order[: len(labels) // size * size].reshape(-1, size)
    return list(shards[drawn].reshape(num_clients, -1))


def _too_small(sizes: list[int], settings: PartitionSettings) -> str:
    short = [client for client, size in enumerate(sizes) if size < settings.min_rows]
    named = ", ".join(f"client {client} ({sizes[client]})" for client in short[:8])
    if len(short) > 8:
        named += f" and {len(short) - 8} more"
    remedy = {
        "iid": "fewer clients",
        "dirichlet": f"a larger data.partition.alpha (now {settings.alpha}), fewer clients",
        "pathological": (
            f"a larger data.partition.classes_per_client (now {settings.classes_per_client}), "
            "fewer clients"
        ),
        "shard": "fewer clients",
    }[settings.kind]
    return (
        f"data.partition ({settings.kind}) gives {len(short)} of {len(sizes)} clients fewer rows "
        f"than data.partition.min_rows={settings.min_rows}: {named}. "
        f"Use {remedy}, more private rows, or a smaller data.partition.min_rows"
    )
