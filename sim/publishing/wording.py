"""Settings in the words of a paper: what captions and the methods paragraph share."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from sim.publishing.studies import common
from sim.reports.runs import RunRecord, model_label

DATA_SETS: Mapping[str, str] = {
    "digits": "the digits of scikit-learn",
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "fashion-mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "cifar-10": "CIFAR-10",
}
"""Data sets by the last part of ``data.source``, in small letters."""


def data_set(source: Any) -> str:
    """Return the last part of a ``data.source``, in small letters: of a folder its name alone."""
    return PurePath(str(source)).stem.lower()


def data_words(source: Any) -> str:
    """Name a data set; of a path only its end, which tells nothing of whose machine it is."""
    return DATA_SETS.get(data_set(source), PurePath(str(source)).name)


def partition_words(partition: Mapping[str, Any]) -> str:
    """Say how rows are dealt, as what follows "dealt to clients"."""
    kind = partition.get("kind")
    told = _PARTITIONS.get(str(kind))
    if told is None:
        return f"by the partition {kind}" + options_words(partition, "kind", "min_rows")
    return told.format(**partition)


_PARTITIONS = {
    "iid": "at random",
    "dirichlet": "by a Dirichlet distribution over classes with concentration {alpha:g}",
    "pathological": "so that each client has {classes} classes",
    "shard": "in {shards} shards of sorted rows per client",
    "natural": "as the data have them",
}


def options_words(table: Mapping[str, Any], *left_out: str) -> str:
    """Write the plain options of a setting in brackets; nothing where there are none."""
    shown = [
        f"{key.replace('_', ' ')} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in table.items()
        if key not in left_out and isinstance(value, str | int | float)
    ]
    return f" ({', '.join(shown)})" if shown else ""


def listed(words: Sequence[str]) -> str:
    """Join words as English does: ``a, b and c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def counted(count: int, noun: str) -> str:
    """Write a number with its noun."""
    return f"{count} {noun}{'s' * (count != 1)}"


def setting_words(records: Iterable[RunRecord]) -> str:
    """Say in a line what all runs have in common: data, split, clients, models, rounds."""
    runs = list(records)
    parts = []
    source, partition = common(runs, "data.source"), common(runs, "data.partition")
    clients, models = common(runs, "clients.count"), common(runs, "clients.models")
    rounds = common(runs, "rounds")
    if source is not None:
        parts.append(f"data: {data_words(source)}")
    if partition is not None:
        parts.append(f"dealt {partition_words(partition)}")
    if clients is not None:
        parts.append(counted(clients, "client"))
    if models is not None:
        parts.append(f"models: {listed([model_label(model) for model in models])}")
    if rounds is not None:
        parts.append(counted(rounds, "round"))
    return "; ".join(parts)
