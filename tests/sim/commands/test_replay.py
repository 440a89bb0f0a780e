"""`fedkd replay`: what it prints and keeps, and what it says of words that it cannot use."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sim.commands.running import run
from sim.settings import load_settings

Fedkd = Callable[..., tuple[int, str, str]]

WORDS = (
    "rounds=2",
    "clients.count=4",
    "clients.models=[mlp]",
    "clients.local.epochs=1",
    "data.private_rows=120",
    "data.test_rows=60",
    "data.public.size=40",
    "data.partition.min_rows=2",
    "engine.backend=inline",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return run(load_settings(None, [*WORDS, f"output={tmp_path}"])).folder


def test_the_command_prints_and_keeps(fedkd: Fedkd, folder: Path) -> None:
    code, out, err = fedkd("replay", folder, "--without-client", "1", "--without-client", "3")
    assert code == 0, err
    assert "replay without clients 1, 3" in out
    assert "client 3 (left out)" in out
    assert err.count("left out") == 2
    code, out, _ = fedkd("replay", folder, "--without-client", "1,3", "--json", "--report")
    assert code == 0
    found = json.loads(out)
    assert found["without"] == [1, 3]
    kept = json.loads((Path(found["replay"]) / "replay.json").read_text())
    assert kept == {key: value for key, value in found.items() if key != "report"}
    assert "<html" in Path(found["report"]).read_text()
    for words, said in (
        (("--without-client", "x"), "--without-client takes clients by number"),
        (("--without-client", "1,1"), "names client 1 twice"),
        (("--set", "rounds"), "--set takes key=value"),
    ):
        code, _, err = fedkd("replay", folder, *words)
        assert code == 2
        assert said in err
