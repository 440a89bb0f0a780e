"""Run folders written by the real writer, with numbers that tests choose."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sim.keeping.records import RunFolder
from sim.reports.runs import RunRecord, load_run
from sim.settings import Settings, settings_from_table

CLIENTS = 2


def write_run(
    folder: Path,
    *,
    strategy: str = "dml",
    seed: int = 0,
    accuracies: Sequence[float] = (0.5, 0.6),
    validation: Sequence[float] | None = None,
    status: str | None = "finished",
    silent: bool = False,
    federation: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    bits: dict[str, int] | None = None,
    privacy: dict[str, Any] | None = None,
) -> Path:
    """Write a run of two clients, 0.1 below and above each round's mean accuracy.

    Each client sends 1000 and receives 3000 bytes a round unless ``silent``. ``status`` None
    leaves out the result, as a run does that is killed. ``bits`` are those of a number in the first
    round by direction, twice as many in each round after it. ``privacy`` is the section of the
    settings; the run has then spent the epsilon that it says.
    """
    folder.mkdir(parents=True)
    table = {
        "seed": seed,
        "rounds": max(len(accuracies), 1),
        "strategy": {"name": strategy},
        "clients": {"count": CLIENTS, "models": ["mlp", "gru"]},
        **({"privacy": privacy} if privacy else {}),
        **(settings or {}),
    }
    rows = []
    resolved = settings_from_table(table)
    with RunFolder(folder, resolved) as run:
        for number, accuracy in enumerate(accuracies, start=1):
            chosen = accuracy if validation is None else validation[number - 1]
            row: dict[str, Any] = {
                "round": number,
                "scope": "federation",
                "participants": CLIENTS,
                "replies": CLIENTS,
                "accuracy": accuracy,
                "personal_accuracy": accuracy + 0.05,
                "macro_recall": accuracy,
                "validation_accuracy": chosen,
                "worst_accuracy": accuracy - 0.1,
                "bytes_up": 0 if silent else 1000 * CLIENTS,
                "bytes_down": 0 if silent else 3000 * CLIENTS,
                "seconds": 2.0,
                **(federation or {}),
            }
            rows.append(row)
            clients = [
                {
                    "round": number,
                    "scope": "client",
                    "client": client,
                    "accuracy": accuracy + (0.2 * client - 0.1),
                }
                for client in range(CLIENTS)
            ]
            run.metrics([row, *clients])
            if not silent:
                run.exchange(
                    [
                        {
                            "round": number,
                            "client": client,
                            "direction": direction,
                            "kind": "logits",
                            "bytes": size,
                            **({"bits": 2 ** (number - 1) * bits[direction]} if bits else {}),
                        }
                        for client in range(CLIENTS)
                        for direction, size in (("up", 1000), ("down", 3000))
                    ]
                )
        if status is not None:
            judged = [row for row in rows if math.isfinite(row["accuracy"] or math.nan)]
            run.result(
                {
                    "status": status,
                    "seed": seed,
                    "seconds": 7.5,
                    "weights_sha256": "ab" * 32,
                    "last": judged[-1] if judged else {},
                    "selected": max(judged, key=lambda row: row["validation_accuracy"])
                    if judged and not privacy
                    else {},
                    **({"privacy": spent(resolved)} if privacy else {}),
                }
            )
    return folder


def spent(settings: Settings) -> dict[str, Any]:
    """Return what a run says that has spent the whole of its epsilon."""
    privacy = settings.privacy
    assert privacy.limit is not None
    epsilon = privacy.limit.epsilon
    return {
        "mechanism": privacy.mechanism.kind,
        "where": privacy.where,
        "unit": privacy.promised,
        "delta": privacy.delta,
        "budget": epsilon,
        "promise": privacy.mechanism.told(privacy.where),
        "epsilon": epsilon,
        "renyi": 1.1 * epsilon,
        "pure": None,
        "clients": {str(client): epsilon for client in range(CLIENTS)},
    }


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunRecord]:
    """Write a run with the settings of `write_run` into a new folder and read it back."""
    count = 0

    def make(arm: str | None = None, **options: Any) -> RunRecord:
        nonlocal count
        count += 1
        return load_run(write_run(tmp_path / f"run-{count}", **options), arm)

    return make


@pytest.fixture
def run_folder() -> Callable[..., Path]:
    """Return the writer itself, for tests that choose the folder."""
    return write_run
