"""A run's folder: settings, environment, metrics, exchange and events, readable at any moment."""

import json
import math
import os
import platform
import secrets
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sim.settings import Settings, SettingsError

Row = dict[str, Any]

SETTINGS_FILE = "settings.yaml"
METRICS_FILE = "metrics.jsonl"
EXCHANGE_FILE = "exchange.jsonl"
EVENTS_FILE = "events.jsonl"
RESULT_FILE = "result.json"


def to_json(row: Mapping[str, Any], *, indent: int | None = None) -> str:
    """Write a row as strict JSON: NaN and infinities, which JSON lacks, become null."""
    return json.dumps(_finite(row), indent=indent, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def read_rows(path: Path) -> list[Row]:
    """Read a JSON-lines file; a last line that was cut off by a crash is left out."""
    rows = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                rows.append(json.loads(line))
    return rows


def new_run_folder(output: Path, name: str) -> Path:
    """Make ``output/name/<time>-<id>``.

    Raises:
        SettingsError: names ``output`` if nothing can be written there.
    """
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return make_folder(output, output / name / f"{stamp}-{secrets.token_hex(3)}")


def make_folder(output: Path, folder: Path) -> Path:
    """Make a folder inside ``output`` and return it.

    Raises:
        SettingsError: if nothing can be written there, or the folder would lie outside.
    """
    if not folder.resolve().is_relative_to(output.resolve()):
        raise SettingsError(f"output: {folder} lies outside {output}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SettingsError(
            f"output: cannot write to {str(output)!r}: {error.strerror or error}"
        ) from None
    return folder


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def environment(device: str) -> Row:
    """Describe what the run ran on."""
    packages = ("fedkd", "flwr", "ray", "torch", "numpy", "scikit-learn", "datasets")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "device": device,
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "packages": {package: version(package) for package in packages},
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        answer = subprocess.run(  # noqa: S603
            ["git", "-C", str(root), "rev-parse", "HEAD"],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


class RunFolder:
    """Writes a run's rows as they come; every row is on disk when the call returns."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder = folder
        write_text(folder / SETTINGS_FILE, settings.to_yaml())
        device = "cuda" if settings.engine.gpus_per_worker else "cpu"
        write_text(folder / "environment.json", to_json(environment(device), indent=2))
        self._files = {
            name: (folder / name).open("w", encoding="utf-8", buffering=1)
            for name in (METRICS_FILE, EXCHANGE_FILE, EVENTS_FILE)
        }

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def metrics(self, rows: Iterable[Row]) -> None:
        """Append rows of (round, scope, ...)."""
        self._append(METRICS_FILE, rows)

    def exchange(self, rows: Iterable[Row]) -> None:
        """Append rows of (round, client, direction, kind, bytes)."""
        self._append(EXCHANGE_FILE, rows)

    def event(self, row: Row) -> None:
        """Append one event."""
        self._append(EVENTS_FILE, [row])

    def result(self, row: Row) -> None:
        """Write the run's result; its presence means that the run has ended."""
        write_text(self.folder / RESULT_FILE, to_json(row, indent=2) + "\n")

    def _append(self, name: str, rows: Iterable[Row]) -> None:
        self._files[name].write("".join(to_json(row) + "\n" for row in rows))
