"""Which run is the same run: what may differ without a bit of the result being different."""

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from fedkd.data import FederatedData
from sim.settings import Settings, SettingsError
from sim.settings.tables import leaves

if TYPE_CHECKING:
    from fedkd.distillation.settings import DistillSettings

HARMLESS = (
    *("name", "output", "study", "checkpoints", "search", "nodes", "attacks", "trackers"),
    *("keep_models", "keep_round"),
)
"""Sections that say where results go and how they are kept, not what they are."""

HARMLESS_ENGINE = (
    "backend",
    "cpus_per_worker",
    "address",
    "deadline_s",
    "retries",
    "quorum",
    "below_quorum",
    "round_retries",
)
"""Settings of the engine that say where clients run and what to do when one fails."""


def _harmless(path: tuple[str, ...]) -> bool:
    section, *rest = path
    return (
        section in HARMLESS
        or (section == "engine" and rest[0] in HARMLESS_ENGINE)
        or path == ("exchange", "keep")
    )


def numbers_of(settings: "Settings | DistillSettings") -> dict[str, Any]:
    """Return every setting that changes numbers, by its path."""
    return {
        ".".join(path): value for path, value in leaves(settings.to_table()) if not _harmless(path)
    }


def fingerprint(settings: "Settings | DistillSettings") -> str:
    """Return a SHA-256 that changes with every setting that changes numbers."""
    table = numbers_of(settings)
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def check_same_run(ours: Settings, wanted: Settings) -> None:
    """Refuse to go on with a run under settings that would have given other numbers.

    Args:
        ours: what the run was started with.
        wanted: what it shall go on with.

    Raises:
        SettingsError: names the first setting that must not change.
    """
    before, after = (dict(leaves(settings.to_table())) for settings in (ours, wanted))
    for path in [*before, *(path for path in after if path not in before)]:
        old, new = before.get(path), after.get(path)
        if old == new or (_harmless(path) and path != ("name",)):
            continue
        name = ".".join(path)
        why = (
            "schedules run over all rounds, so the rounds before would have been others"
            if name == "rounds"
            else "only checkpoints.*, keep_*, trackers and engine.* that changes no number may"
        )
        raise SettingsError(
            f"{name}: a resumed run cannot change it (it has {old!r}, got {new!r}): {why}"
        )


def data_digest(data: FederatedData) -> str:
    """Return a SHA-256 of the public set, the labels, and how the rows are dealt.

    The pictures of private rows are represented by their labels and by the mean and the standard
    deviation of all of them, which saves reading gigabytes at every start.
    """
    digest = hashlib.sha256()
    arrays = [
        array
        for each in (data, *data.views)
        for array in (
            each.public_inputs,
            each.public_labels,
            each.train_labels,
            each.validation_labels,
            each.test_labels,
            each.channel_mean,
            each.channel_std,
            *each.client_rows,
        )
    ]
    for array in arrays:
        if array is None:
            digest.update(b"none")
            continue
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
