"""`fedkd attack`: what it prints and keeps, and what it says of folders that it cannot attack."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sim.commands.running import run
from sim.settings import load_settings

Fedkd = Callable[..., tuple[int, str, str]]

WORDS = (
    "rounds=2",
    "clients.count=3",
    "clients.models=[mlp]",
    "data.public.size=40",
    "data.private_rows=120",
    "data.partition.kind=iid",
    "engine.backend=inline",
    "attacks.student_epochs=2",
    "exchange.keep=true",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return run(load_settings(None, [*WORDS, f"output={tmp_path}"])).folder


def test_figures_are_printed_and_kept(fedkd: Fedkd, folder: Path) -> None:
    code, out, _ = fedkd("attack", str(folder), "--attack", "labels,stealing")
    assert code == 0
    assert "label distribution" in out
    assert "model stealing" in out
    assert "membership" not in out
    kept = json.loads((folder / "attacks.json").read_text())
    assert kept["attacks"]["kinds"] == ["labels", "stealing"]
    assert kept["clients"] == [0, 1, 2]
    code, out, _ = fedkd("attack", str(folder), "--attack", "labels", "--json")
    found = json.loads(out)
    assert found["labels"] == kept["labels"]
    assert "stealing" not in found


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--attack", "everything"], "attacks must be all or some of membership, labels"),
        (["attacks.shadows=5"], "attacks.shadows must be even"),
        (["attacks.clients=[7]"], "attacks.clients must name clients from 0 to 2"),
        (["attacks.clients=[1, 1]"], "attacks.clients must name one client or several, each once"),
        (["rounds=9"], "rounds: a resumed run cannot change it"),
    ],
)
def test_settings_that_cannot_be_are_named(
    fedkd: Fedkd, folder: Path, words: list[str], said: str
) -> None:
    code, _, err = fedkd("attack", str(folder), *words)
    assert code == 2
    assert said in err
    assert not (folder / "attacks.json").exists()


def test_folders_that_hold_no_finished_run_are_named(fedkd: Fedkd, folder: Path) -> None:
    code, _, err = fedkd("attack", str(folder.parent))
    assert code == 2
    assert "is not the folder of a run" in err
    (folder / "result.json").unlink()
    code, _, err = fedkd("attack", str(folder))
    assert code == 2
    assert f"fedkd run --resume {folder} ends it" in err


def test_what_was_changed_since_is_named(fedkd: Fedkd, folder: Path) -> None:
    path = folder / "exchange" / "clients.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    code, _, err = fedkd("attack", str(folder), "--attack", "labels")
    assert code == 1
    assert "clients.safetensors is damaged" in err
