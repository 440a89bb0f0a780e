"""Settings in the words of a paper: what captions and the methods paragraph share."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from fedkd.names import nearest
from sim.publishing.studies import Study, common
from sim.reports.runs import RunRecord, model_label
from sim.settings import SettingsError

DATA_SETS: Mapping[str, str] = {
    "digits": "the digits of scikit-learn",
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "fashion-mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "cifar-10": "CIFAR-10",
}
"""Data sets by the last part of ``data.source``, in small letters."""


MEANT = {"md": "markdown", "tex": "latex", "bib": "bibtex", "txt": "text"}
"""Formats by the endings of their files, which people write for them."""


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Refuse what is none of an option's values.

    Raises:
        SettingsError: names the option, what it got and what there is.
    """
    if value not in known:
        meant = MEANT.get(value.casefold(), "")
        hint = f"; did you mean {meant!r}?" if meant in known else nearest(value, known)
        raise SettingsError(f"--{name} must be one of {', '.join(known)}, got {value!r}{hint}")


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


def own_models(runs: Iterable[RunRecord]) -> dict[str, tuple[str, str]]:
    """Return the model that an algorithm has beside its clients', which may be larger than theirs.

    Returns:
        By algorithm: what the model is, such as ``teacher``, and its label. Algorithms without one,
        and those whose arms differ in it, are left out.
    """
    found: dict[str, set[tuple[str, str]]] = {}
    for run in runs:
        strategy = run.settings["strategy"]
        model = strategy.get("model") or strategy.get("server_model")
        if model is not None:
            teaches = strategy.get("direction") == "teacher_to_clients"
            told = ("teacher" if teaches else "server model", model_label(model))
            found.setdefault(str(strategy["name"]), set()).add(told)
    return {name: next(iter(told)) for name, told in found.items() if len(told) == 1}


def matching_words(study: Study, written: Callable[[str], str] = str) -> str:
    """Say how arms were made equal beforehand; empty where they were not.

    Args:
        study: whose arms.
        written: returns an arm's name as it is written.
    """
    if study.matched is None:
        return ""
    budget, reference = study.matched
    what = "optimizer steps" if budget == "steps" else "bytes exchanged"
    return (
        f"the rounds of each arm were set beforehand so that all take as many {what} as "
        f"{written(reference)}, "
        "as near as whole rounds allow"
    )


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
    parts += [f"{strategy}: {role} {label}" for strategy, (role, label) in own_models(runs).items()]
    if rounds is not None:
        parts.append(counted(rounds, "round"))
    return "; ".join(parts)
