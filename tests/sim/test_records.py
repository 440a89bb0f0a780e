import json
from pathlib import Path

import pytest

from sim.records import (
    RunFolder,
    environment,
    make_folder,
    new_run_folder,
    read_rows,
    to_json,
    write_text,
)
from sim.settings import Settings, SettingsError


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
    assert json.loads((tmp_path / "result.json").read_text()) == {"status": "finished"}


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
    folders = {new_run_folder(tmp_path, "a") for _ in range(20)}
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
