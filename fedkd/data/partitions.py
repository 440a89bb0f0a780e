"""Deal the private rows to the clients, with the partitioners of flwr-datasets."""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64

from fedkd.data.settings import PartitionSettings

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

# Dirichlet and pathological shares are random, so another draw may satisfy ``min_rows`` where the
# first did not. Few enough that settings which cannot work fail within seconds.
MAX_DRAWS = 20


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
    make_partitioner = _partitioner_factory(settings, num_clients)
    # The partitioners cut classes into consecutive pieces, so the order decides who gets which row.
    order = rng.permutation(len(labels))

    sizes_are_random = settings.kind in ("dirichlet", "pathological")
    sizes: list[int] = []
    for _ in range(MAX_DRAWS if sizes_are_random else 1):
        parts = _deal(labels[order], make_partitioner(int(rng.integers(2**31))))
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


def _partitioner_factory(
    settings: PartitionSettings, num_clients: int
) -> "Callable[[int], Partitioner]":
    # Imported late: it takes seconds, and reading settings should not.
    from flwr_datasets.partitioner import (
        DirichletPartitioner,
        IidPartitioner,
        PathologicalPartitioner,
        ShardPartitioner,
    )

    def make(seed: int) -> "Partitioner":
        if settings.kind == "iid":
            return IidPartitioner(num_clients)
        if settings.kind == "dirichlet":
            # Its own check of the least size redraws and then fails without naming anybody, so it
            # is switched off (0) and done above.
            return DirichletPartitioner(
                num_clients, "label", settings.alpha, min_partition_size=0, shuffle=False, seed=seed
            )
        if settings.kind == "pathological":
            return PathologicalPartitioner(
                num_clients,
                "label",
                settings.classes_per_client,
                class_assignment_mode="first-deterministic",
                shuffle=False,
                seed=seed,
            )
        return ShardPartitioner(
            num_clients,
            "label",
            num_shards_per_partition=settings.shards_per_client,
            shuffle=False,
            seed=seed,
        )

    return make


def _deal(
    labels: Int64[np.ndarray, "rows"], partitioner: "Partitioner"
) -> list[Int64[np.ndarray, "_"]]:
    """Run one partitioner over labels and row ids alone, so that no image is touched."""
    from datasets import Dataset

    with warnings.catch_warnings():
        # Unheld classes are documented here and shown in the split table; the rest is about the
        # library's own use of pyarrow.
        warnings.simplefilter("ignore")
        partitioner.dataset = Dataset.from_dict({"row": np.arange(len(labels)), "label": labels})
        try:
            parts = [
                partitioner.load_partition(client) for client in range(partitioner.num_partitions)
            ]
        except ValueError as error:
            # What is left after our own checks: a class with fewer rows than clients to hold it.
            raise ValueError(
                f"data.partition cannot be dealt: {error} Use fewer clients, fewer "
                "data.partition.classes_per_client, or more private rows"
            ) from error
        return [
            np.asarray(part.with_format("numpy")["row"][:], dtype=np.int64).reshape(-1)
            for part in parts
        ]


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
