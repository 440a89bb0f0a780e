import errno
import hashlib
import json
import os
import subprocess
import threading
from pathlib import Path

import pytest

from sim.keeping.parts import DamagedFileError
from sim.keeping.records import (
    FolderBusyError,
    RunFolder,
    StorageError,
    cpu_model,
    environment,
    git_commit,
    is_finished,
    make_folder,
    new_run_folder,
    read_result,
    read_rows,
    to_json,
    turn,
    write_text,
)
from sim.settings import Settings, SettingsError, load_settings


def test_what_json_lacks_becomes_null() -> None:
    text = to_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": -float("inf")}})
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "c": {"d": None}}
    assert "NaN" not in text


def test_every_row_is_on_disk_when_the_call_returns(tmp_path: Path) -> None:
    with RunFolder(tmp_path, Settings()) as folder:
        folder.metrics([{"round": 1}, {"round": 2}])
        folder.exchange([{"round": 1, "bytes": 3}])
        folder.event({"round": 1, "event": "rejected"})
        assert read_rows(tmp_path / "metrics.jsonl") == [{"round": 1}, {"round": 2}]
        assert read_rows(tmp_path / "exchange.jsonl") == [{"round": 1, "bytes": 3}]
        assert read_rows(tmp_path / "events.jsonl") == [{"round": 1, "event": "rejected"}]
        assert not (tmp_path / "result.json").exists()
        folder.result({"status": "finished"})
    assert read_result(tmp_path, rows=True) == {"status": "finished"}


def finished(folder: Path) -> Path:
    with RunFolder(folder, Settings()) as recorder:
        recorder.metrics([{"round": 1}])
        recorder.result({"status": "finished", "loss": float("nan"), "bytes": {"0": [1, 2.5]}})
    return folder


def test_no_bit_of_a_result_changes_unseen(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    path = folder / "result.json"
    content = path.read_bytes()
    whole = read_result(folder)
    assert whole == {"status": "finished", "loss": None, "bytes": {"0": [1, 2.5]}}
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            read = read_result(folder)
        except DamagedFileError:
            assert not is_finished(folder)
        else:
            assert read == whole
    for other in (b"", b"[]", b"[" * 100_000, b'{"status": "finished"}', b"\xff", b"1" * 5000):
        path.write_bytes(other)
        with pytest.raises(DamagedFileError) as raised:
            read_result(folder)
        assert str(raised.value).startswith(f"{path} is damaged: ")
        assert not is_finished(folder)
    path.unlink()
    assert read_result(folder) == {}


@pytest.mark.parametrize("damage", ["flipped", "longer", "gone"])
def test_rows_that_are_not_those_of_the_result_are_named(tmp_path: Path, damage: str) -> None:
    folder = finished(tmp_path)
    metrics = folder / "metrics.jsonl"
    content = metrics.read_bytes()
    metrics.unlink()
    if damage != "gone":
        metrics.write_bytes(content.replace(b"1", b"2") if damage == "flipped" else 2 * content)
    with pytest.raises(DamagedFileError) as raised:
        read_result(folder, rows=True)
    assert str(raised.value) == f"{metrics} is damaged: it is not what the run wrote"
    assert read_result(folder)["status"] == "finished"


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"round": 1}\n{"rou')
    assert read_rows(rows) == [{"round": 1}]


def test_a_replaced_file_is_never_half_written(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")
    write_text(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    folders = {new_run_folder(tmp_path, "a", "rounds: 3\n") for _ in range(20)}
    assert len(folders) == 20
    assert all(folder.parent == tmp_path / "a" for folder in folders)


def test_nothing_is_written_outside_the_output_folder(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="lies outside"):
        make_folder(tmp_path / "runs", tmp_path / "runs" / ".." / "elsewhere")
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(outside)
    with pytest.raises(SettingsError, match="lies outside"):
        make_folder(tmp_path / "runs", tmp_path / "runs" / "link" / "a")
    assert not any(outside.iterdir())


def test_the_environment_names_versions_and_no_person_or_host() -> None:
    row = environment("cpu")
    assert row["packages"]["torch"]
    assert row["device"] == "cpu"
    assert "hostname" not in row
    assert "user" not in row
    # The last bits of a sum depend on both.
    assert row["cpu"] == cpu_model()
    assert row["cpu"] is None or row["cpu"].strip()
    assert row["cpu_instructions"]


def test_a_commit_is_dirty_where_the_code_is_not_the_commit_s(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        names = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false")
        answer = subprocess.run(
            ["git", "-C", str(tmp_path), *names, *words], capture_output=True, text=True, check=True
        )
        return answer.stdout.strip()

    assert git_commit(tmp_path) is None
    git("init", "-q")
    code = tmp_path / "fedkd" / "losses.py"
    code.parent.mkdir()
    code.write_text("x = 1\n")
    git("add", "-A")
    git("commit", "-q", "-m", "first")
    head = git("rev-parse", "HEAD")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "result.json").write_text("{}")
    assert git_commit(tmp_path) == head
    code.write_text("x = 2\n")
    assert git_commit(tmp_path) == f"{head}-dirty"
    git("checkout", "-q", "--", ".")
    (tmp_path / "fedkd" / "new.py").write_text("x = 1\n")
    assert git_commit(tmp_path) == f"{head}-dirty"


def test_rows_can_be_cut_back_to_a_mark_and_go_on_from_there(tmp_path: Path) -> None:
    with RunFolder(tmp_path, Settings()) as folder:
        folder.metrics([{"round": 1}])
        folder.completed(1)
        marks = folder.marks
        folder.metrics([{"round": 2}])
        folder.event({"round": 2})
        folder.result({"status": "interrupted"})
    with RunFolder(tmp_path, Settings()) as folder:
        assert folder.reason_not_to_rewind(marks) is None
        folder.rewind(marks)
        assert read_rows(tmp_path / "metrics.jsonl") == [{"round": 1}]
        assert read_rows(tmp_path / "events.jsonl") == []
        assert not (tmp_path / "result.json").exists()
        folder.metrics([{"round": 2}])
        folder.completed(2)
        later = folder.marks
    content = (tmp_path / "metrics.jsonl").read_bytes()
    assert later["metrics.jsonl"]["sha256"] == hashlib.sha256(content).hexdigest()
    with RunFolder(tmp_path, Settings()) as folder:
        folder.rewind(None)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_rows_that_changed_since_a_mark_are_noticed(tmp_path: Path) -> None:
    with RunFolder(tmp_path, Settings()) as folder:
        folder.exchange([{"round": 1, "bytes": 3}])
        folder.completed(1)
        marks = folder.marks
    path = tmp_path / "exchange.jsonl"
    for damaged in (path.read_bytes().replace(b"3", b"4"), b"", path.read_bytes()[:-1]):
        path.write_bytes(damaged)
        with RunFolder(tmp_path, Settings()) as folder:
            assert "exchange.jsonl" in str(folder.reason_not_to_rewind(marks))


def test_a_run_folder_is_one_process_s_at_a_time(tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path, Settings()),
        pytest.raises(FolderBusyError, match=f"in use by process {os.getpid()}"),
    ):
        RunFolder(tmp_path, Settings(rounds=3))
    # The one who came too late has changed nothing, and has not kept the folder busy.
    assert load_settings(tmp_path / "settings.yaml").rounds == Settings().rounds
    RunFolder(tmp_path, Settings()).__exit__()


def test_a_turn_is_waited_for_or_given_up(tmp_path: Path) -> None:
    told: list[str] = []
    seen: list[str] = []

    def late() -> None:
        with turn(tmp_path, waiting=told.append) as ours:
            seen.append(f"late {ours}")

    with turn(tmp_path, waiting=None) as ours:
        assert ours
        with turn(tmp_path, waiting=None) as second:
            assert not second
        # Who has the turn may open the folder.
        RunFolder(tmp_path, Settings()).__exit__()
        thread = threading.Thread(target=late)
        thread.start()
        thread.join(0.1)
        seen.append("first")
    thread.join()
    assert seen == ["first", "late True"]
    assert told == [str(os.getpid())]


def test_a_turn_waits_for_who_goes_on_with_the_run_alone(tmp_path: Path) -> None:
    with RunFolder(tmp_path, Settings()), turn(tmp_path, waiting=None) as ours:
        assert not ours
    with turn(tmp_path, waiting=None) as ours:
        assert ours


def test_what_the_disk_refuses_is_one_error_that_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with RunFolder(tmp_path, Settings()) as folder:
        folder.metrics([{"round": 1}])
        monkeypatch.setattr(os, "write", refuse)
        with pytest.raises(StorageError, match=r"metrics\.jsonl: No space left .* --resume"):
            folder.metrics([{"round": 2}])
        monkeypatch.undo()
    assert read_rows(tmp_path / "metrics.jsonl") == [{"round": 1}]


def test_a_file_that_cannot_be_replaced_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="Read-only"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_has_its_settings_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    for step in ("fsync", "replace", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(f"sim.keeping.records.os.{step}", kill)
            with pytest.raises(Killed):
                new_run_folder(tmp_path, "runs", "rounds: 3\n")
        # What has no settings does not look like a run.
        assert not list(tmp_path.glob("runs/[!.]*"))
    folder = new_run_folder(tmp_path, "runs", "rounds: 3\n")
    assert (folder / "settings.yaml").read_text() == "rounds: 3\n"
    assert list(tmp_path.glob("runs/[!.]*")) == [folder]
