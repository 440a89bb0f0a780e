"""Ray's start and end: what is left behind, what a signal does, what a lost process says."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from ray._private import worker as ray_worker

from sim.commands.interruption import interruptible
from sim.engine.grid import EngineLostError
from sim.engine.session import _Watch

pytestmark = pytest.mark.xdist_group("ray")


def test_a_process_of_ray_s_that_ends_calls_the_run_off() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    watch = _Watch({"raylet": process})
    process.kill()
    with pytest.raises(EngineLostError) as raised, interruptible():
        time.sleep(60)
    watch.stop()
    assert str(raised.value).startswith(f"Ray's raylet (process {process.pid}) ended by SIGKILL")
    assert watch.lost is raised.value


def test_what_is_used_of_ray_s_own_is_there() -> None:
    assert ray_worker._worker_logs_enabled in (True, False)


# -- a run in a process of its own -----------------------------------------------------------

Started = tuple["subprocess.Popen[str]", Path]


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Started]:
    def run(*words: str, **environment: str) -> Started:
        small = (
            "clients.count=2",
            "clients.models=mlp",
            "data.private_rows=100",
            "data.test_rows=100",
            "data.public.size=20",
            f"output={tmp_path / 'runs'}",
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "fedkd", "run", *small, *words, "-q"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        return process, tmp_path / "runs"

    return run


def wait_for(what: Callable[[], object], within_s: float = 120.0) -> None:
    end = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.1)


def rounds(runs: Path) -> int:
    return sum(file.read_text().count('"federation"') for file in runs.glob("*/*/metrics.jsonl"))


def folders_of(process: psutil.Process) -> set[str]:
    """Return the private folders that a run's processes were told of."""
    words: list[str] = []
    for child in process.children(recursive=True):
        # One that ends meanwhile says nothing any more.
        with suppress(psutil.Error):
            words += child.cmdline()
    return set(re.findall(r"/\S*?/fedkd-\w{8}", " ".join(words)))


@pytest.mark.slow
def test_after_sigkill_nothing_of_ray_is_left_for_long(start: Callable[..., Started]) -> None:
    run, runs = start("rounds=1000")
    wait_for(lambda: rounds(runs) >= 1)
    process = psutil.Process(run.pid)
    children, folders = process.children(recursive=True), folders_of(process)
    assert len(children) > 4
    assert folders
    run.kill()
    run.wait()
    _, alive = psutil.wait_procs(children, timeout=15)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
    assert not [folder for folder in folders if Path(folder).exists()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_a_lost_process_of_ray_s_is_one_line_an_event_and_the_way_on(
    start: Callable[..., Started], name: str
) -> None:
    run, runs = start("rounds=1000")
    wait_for(lambda: rounds(runs) >= 2)
    children = psutil.Process(run.pid).children(recursive=True)
    next(child for child in children if child.name() == name).kill()
    _, said = run.communicate(timeout=120)
    assert run.returncode == 1
    (line,) = [line for line in said.splitlines() if line.startswith("fedkd: ")]
    assert f"Ray's {name} (process " in line
    assert "Traceback" not in said
    (folder,) = runs.glob("*/*")
    assert line.endswith(f"fedkd run --resume {folder} goes on after the last complete round")
    events = [json.loads(text) for text in (folder / "events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "engine lost"
    assert json.loads((folder / "result.json").read_text())["status"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.0, 2.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0])
def test_sigterm_while_ray_starts_is_one_line(
    start: Callable[..., Started], after_s: float
) -> None:
    run, _ = start("rounds=1000")
    process = psutil.Process(run.pid)
    wait_for(lambda: folders_of(process))
    folders = folders_of(process)
    time.sleep(after_s)
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 143, said
    assert said.startswith("fedkd: interrupted"), said
    assert len(said.splitlines()) == 1, said
    assert not [folder for folder in folders if Path(folder).exists()]


@pytest.mark.slow
def test_a_long_temporary_folder_is_no_obstacle(
    start: Callable[..., Started], tmp_path: Path
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    run, runs = start("rounds=1", TMPDIR=str(long))
    _, said = run.communicate(timeout=120)
    assert run.returncode == 0, said
    (folder,) = runs.glob("*/*")
    told = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [row["event"] for row in told] == ["temporary folder"]
    assert list(long.glob("fedkd-*")) == []
