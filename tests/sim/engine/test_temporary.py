"""Ray's folder: nobody else's, short enough, and gone with the process, however that ends."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sim.engine.temporary import LONGEST_FOLDER, PrivateFolder
from sim.settings import SettingsError


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path leaves room for sockets, as pytest's do not."""
    with tempfile.TemporaryDirectory(prefix="f", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", None)


def gone(*paths: Path, within_s: float = 15.0) -> bool:
    end = time.monotonic() + within_s
    while any(path.exists() for path in paths) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(path.exists() for path in paths)


def test_nobody_else_can_look_into_it_and_it_goes(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(short))
    private = PrivateFolder()
    assert private.folder.parent.parent == short
    assert stat.S_IMODE(private.folder.parent.stat().st_mode) == 0o700
    assert (private.note, private.spill) == ("", None)
    (private.folder / "logs").mkdir(parents=True)
    (private.folder / "logs" / "raylet.out").write_text("much")
    private.remove()
    assert list(short.iterdir()) == []


def test_a_long_folder_is_left_to_what_has_long_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    private = PrivateFolder()
    try:
        assert len(str(private.folder.parent.parent)) <= LONGEST_FOLDER
        assert private.note.startswith(f"TMPDIR {str(long)!r} has more than the ")
        assert private.note.endswith(f"; Ray uses {private.folder.parent}")
        assert private.spill is not None
        assert private.spill.parent == long
    finally:
        private.remove()
    assert not private.folder.parent.exists()
    assert list(long.iterdir()) == []


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_where_nothing_can_be_written_another_place_is_found(
    short: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    place = short / "p"
    if kind == "a file":
        place.touch()
    monkeypatch.setenv("RAY_TMPDIR", str(place))
    monkeypatch.setenv("TMPDIR", str(short))
    private = PrivateFolder()
    private.remove()
    assert private.folder.parent.parent == short
    assert private.note.startswith(f"RAY_TMPDIR {str(place)!r} cannot be used: ")


def test_without_any_place_each_is_named_and_what_would_be_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("TMPDIR", "/tmp")  # noqa: S108
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(SettingsError) as raised:
        PrivateFolder()
    text = str(raised.value)
    assert "TMPDIR '/tmp' cannot be used: Permission denied" in text
    assert text.endswith(f"of at most {LONGEST_FOLDER} letters, or engine.backend=inline")


OWNER = """
import subprocess, sys, time
from sim.engine.temporary import PrivateFolder
private = PrivateFolder()
private.folder.mkdir()
sleeper = "import sys; print(sys.argv[1]); sys.stdout.flush(); import time; time.sleep(600)"
with open(private.folder / "agent.out", "w") as log:
    left = subprocess.Popen([sys.executable, "-c", sleeper, "x"], stdout=log)
print(private.folder.parent, left.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found by /proc")
def test_after_sigkill_of_the_process_its_folder_and_what_lives_there_are_gone(
    short: Path,
) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(short)},
    )
    # Reads in the folder, but does not live there.
    reader = None
    try:
        assert owner.stdout is not None
        folder, left = owner.stdout.readline().split()
        log = Path(folder) / "r" / "agent.out"
        reader = subprocess.Popen(["tail", "-f", str(log)], stdout=subprocess.DEVNULL)
        owner.send_signal(signal.SIGKILL)
        assert gone(Path(folder), Path(f"/proc/{left}"))
        assert reader.poll() is None
    finally:
        owner.kill()
        owner.wait()
        if reader is not None:
            reader.kill()
            reader.wait()
