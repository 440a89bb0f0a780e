import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedkd as library
from sim.commands import watch as module
from sim.commands.running import run
from sim.keeping.plans import announced
from sim.server.observers import Observer
from sim.settings import Settings

Command = Callable[..., tuple[int, str, str]]


class Interrupt(Observer):
    def completed(self, round: int) -> None:
        raise KeyboardInterrupt


@pytest.fixture
def stopped(small: Callable[..., Settings]) -> Path:
    """Make the folder of a run that was stopped after its first round."""
    settings = small("clients.models=[mlp]", "strategy.name=local")
    with pytest.raises(KeyboardInterrupt):
        run(settings, observers=[Interrupt()])
    (folder,) = (settings.output / settings.name).iterdir()
    return folder


def test_a_real_run_is_watched_to_its_end(fedkd: Command, stopped: Path) -> None:
    code, out, err = fedkd("watch", stopped)
    assert code == 1
    assert f"{stopped.name}: stopped, 1 of 2 rounds" in out
    assert f"fedkd run --resume {stopped} goes on" in err
    before = {path: path.stat().st_mtime_ns for path in stopped.rglob("*")}
    code, out, _ = fedkd("watch", stopped, "--once", "--json")
    row = json.loads(out)
    assert (code, row["status"], row["rounds_done"]) == (1, "stopped", 1)
    assert {path: path.stat().st_mtime_ns for path in stopped.rglob("*")} == before
    result = run(resume=stopped)
    code, out, err = fedkd("watch", stopped)
    assert (code, err) == (0, "")
    assert out == f"{stopped.name}: finished, 2 of 2 rounds\n"
    sight = next(library.watch(stopped))
    assert sight.runs[0].accuracy == result.history.federation[-1]["accuracy"]


def test_a_study_is_followed_by_lines_while_another_makes_it(
    fedkd: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = {"arms": {"dml": [{"seed": 0, "folder": "dml/seed-0-0", "rounds": 2}]}}
    looks = threading.Semaphore(0)
    monkeypatch.setattr(module.time, "sleep", lambda _: looks.release())
    held = announced(tmp_path, plan)
    held.__enter__()

    def work() -> None:
        folder = tmp_path / "dml" / "seed-0-0"
        folder.mkdir(parents=True)
        looks.acquire()
        event = {"round": 1, "client": 0, "event": "reply rejected", "reason": "not finite"}
        (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
        looks.acquire()
        held.__exit__(None, None, None)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    code, out, err = fedkd("watch", tmp_path)
    thread.join()
    assert code == 1
    assert out.splitlines() == [
        f"{tmp_path.name}: running, 0 of 1 runs finished, time left not known yet",
        "dml seed 0: round 1, client 0: reply rejected: not finite",
        f"{tmp_path.name}: stopped, 0 of 1 runs finished",
    ]
    assert "1 of 1 runs are not finished (1 planned)" in err


def test_for_programs_each_change_is_an_object_and_the_last_is_all(
    fedkd: Command, stopped: Path
) -> None:
    code, out, _ = fedkd("watch", stopped, "--json")
    rows: list[dict[str, Any]] = [json.loads(line) for line in out.splitlines()]
    assert code == 1
    assert [row["status"] for row in rows] == ["stopped"]
    assert rows[-1]["arms"][0]["runs"][0]["round"] == 1


def test_a_mistake_is_one_line(fedkd: Command, tmp_path: Path) -> None:
    code, out, err = fedkd("watch", tmp_path / "nowhere")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "there is no such folder" in err
