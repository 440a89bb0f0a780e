"""Run and study folders as a process leaves them while it works, written by hand."""

import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sim.keeping.plans import announced
from sim.keeping.records import sealed
from sim.watching.serving import StudyServer


class HandMade:
    """A run's folder, written as `sim.keeping.records.RunFolder` writes it."""

    def __init__(self, folder: Path, *, rounds: int, seed: int = 0) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        settings = f"rounds: {rounds}\nseed: {seed}\nstrategy: {{name: dml}}\n"
        (folder / "settings.yaml").write_text(settings)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Have the folder as its process has it."""
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.write(f"{os.getpid()}\n")
            lock.flush()
            yield

    def round(self, number: int, accuracy: float | None = None, seconds: float = 2.0) -> None:
        judged = {} if accuracy is None else {"accuracy": accuracy}
        row = {"round": number, "scope": "federation", **judged, "seconds": seconds}
        self._append("metrics.jsonl", row)
        self._append("metrics.jsonl", {"round": number, "scope": "client", "client": 0, **judged})

    def event(self, **row: Any) -> None:
        self._append("events.jsonl", row)

    def ended(self, status: str) -> None:
        (self.folder / "result.json").write_text(json.dumps(sealed({"status": status})))

    def _append(self, name: str, row: dict[str, Any]) -> None:
        with (self.folder / name).open("a") as file:
            file.write(json.dumps(row) + "\n")


@pytest.fixture
def run_at(tmp_path: Path) -> Callable[..., HandMade]:
    """Make a run's folder of some name."""

    def make(name: str, *, rounds: int = 4, seed: int = 0) -> HandMade:
        return HandMade(tmp_path / name, rounds=rounds, seed=seed)

    return make


PLAN = {
    "arms": {"<b>dml</b>": [{"seed": 0, "folder": "dml/seed-0-0", "rounds": 4}]},
    "refused": {"bad": "cannot work"},
}


@pytest.fixture
def server(run_at: Callable[..., Any], tmp_path: Path) -> Iterator[StudyServer]:
    """Serve a study whose run has done two rounds."""
    run = run_at("dml/seed-0-0")
    with announced(tmp_path, PLAN), run.running(), StudyServer(tmp_path, 0) as serving:
        run.round(1, 0.25)
        run.round(2, 0.5)
        run.event(round=2, client=1, event="reply rejected", reason="<script>")
        thread = threading.Thread(target=serving.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()
