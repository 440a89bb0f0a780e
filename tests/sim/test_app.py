"""The same federation in Flower's own runtimes."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid

from sim import app
from sim.engine.flower import Run, empty_run, identify_process
from sim.records import read_rows
from sim.running import run
from sim.settings import Settings, load_settings

ROOT = Path(__file__).resolve().parents[2]


class ForeignGrid(Grid):
    """Stands for Flower's runtime: odd node ids, replies in any order, one client a message."""

    def __init__(self, config: dict[str, str], count: int) -> None:
        identify_process(1)
        self.contexts = {
            1000 + 37 * (count - partition): Context(
                run_id=1,
                node_id=1000 + 37 * (count - partition),
                node_config={"partition-id": partition, "num-partitions": count},
                state=RecordDict(),
                run_config=dict(config),
            )
            for partition in range(count)
        }

    def set_run(self, run: Run) -> None: ...

    @property
    def run(self) -> Run:
        return empty_run(1)

    def create_message(self, *_: object, **__: object) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies = [
            app.client_app(message, self.contexts[message.metadata.dst_node_id])
            for message in messages
        ]
        random.shuffle(replies)
        return replies


@pytest.mark.parametrize("strategy", ["dml", "fedavg"])
def test_flower_s_runtimes_compute_what_fedkd_run_computes(
    small: Callable[..., Settings], tmp_path: Path, small_words: tuple[str, ...], strategy: str
) -> None:
    ours = run(small(f"strategy.name={strategy}"))
    words = [*small_words, f"strategy.name={strategy}", f"output={tmp_path / 'flower'}"]
    config = {"config": "", "overrides": " ".join(word.replace(" ", "") for word in words)}
    grid = ForeignGrid(config, ours.settings.clients.count)
    context = Context(1, 1, {}, RecordDict(), dict(config))
    app.server_app(grid, context)
    (folder,) = (tmp_path / "flower" / "default").iterdir()
    theirs = [row for row in read_rows(folder / "metrics.jsonl") if row["scope"] == "federation"]
    timeless = [
        {key: value for key, value in row.items() if "seconds" not in key} for row in theirs
    ]
    assert timeless == [
        {key: value for key, value in row.items() if "seconds" not in key}
        for row in ours.history.federation
    ]


def test_the_number_of_clients_is_the_runtime_s(
    tmp_path: Path, small_words: tuple[str, ...]
) -> None:
    config = {"config": "", "overrides": " ".join([*small_words, f"output={tmp_path}"])}
    app.server_app(ForeignGrid(config, 3), Context(1, 1, {}, RecordDict(), dict(config)))
    (folder,) = (tmp_path / "default").iterdir()
    assert load_settings(folder / "settings.yaml").clients.count == 3


@pytest.mark.slow
def test_flwr_run_completes_two_rounds_from_the_project_s_root(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(tmp_path / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    overrides = f"rounds=2 output={tmp_path / 'runs'}"
    try:
        done = subprocess.run(
            ["flwr", "run", ".", "--stream", "--run-config", f'overrides="{overrides}"'],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    finally:
        # The local SuperLink outlives the command that started it.
        subprocess.run(["pkill", "-f", str(tmp_path / "home")], check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = (tmp_path / "runs").glob("*/*/result.json")
    assert json.loads(result.read_text())["rounds"] == 2
