import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.commands.running import run
from sim.keeping import parts, records
from sim.keeping.parts import (
    DamagedFileError,
    chunks,
    parts_of,
    read_part,
    write_parts,
)
from sim.keeping.records import METRICS_FILE, RunFolder, read_result, read_rows, to_json
from sim.publishing.bundle import bundle, check_bundle
from sim.server.observers import Observer, Row
from sim.settings import Settings, load_settings
from sim.watching.runs import GrowingRows

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([2**63, -(2**63), 2**63 - 1, -0.0, 5e-324, 1e308, 1e16, "\u2028", "\r\n"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(["round", "loss/ce", "a", "a int", "_shape", "_line", "", "\x00", "Ü"])
rows_of_any_kind = st.lists(st.dictionaries(keys, values, max_size=6), max_size=12)


# The first part imports its writer.
@settings(deadline=None)
@given(rows=rows_of_any_kind)
def test_a_part_gives_back_the_rows_that_its_lines_hold(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row]
) -> None:
    path = tmp_path_factory.mktemp("rows") / "metrics.jsonl"
    # Half of a surrogate pair is no text that a file can hold.
    texts = [to_json(row).encode("utf-8", "replace") + b"\n" for row in rows]
    as_lines = [json.loads(text) for text in texts]
    path.write_bytes(b"".join(texts))
    write_parts(path, 0, b"".join(texts))
    assert b"".join(map(read_part, parts_of(path))) == path.read_bytes()
    path.write_bytes(parts.header(len(path.read_bytes())))
    found = read_rows(path)
    # As texts: 1 is not 1.0, and -0.0 is not 0.0.
    assert list(map(json.dumps, found)) == list(map(json.dumps, as_lines))


@pytest.mark.parametrize(
    "line",
    [
        b'{"a":1}\n', b'{"a": 1, "a": 2}\n', b'{"a": NaN}\n', b'{"a": 1e999}\n', b"\xff\x00\n",
        b"[1]\n", b"\n", b'{"a": "\\ud800"}\n', b'{"a": 1.0e0}\n', b'{"a": "\r"}\n',
        b"[" * 9999 + b"\n",
    ],
)  # fmt: skip
def test_a_line_that_is_no_row_of_ours_stays_as_it_is(tmp_path: Path, line: bytes) -> None:
    text = b'{"a": 1}\n' + line + b'{"a": 2.5}\n'
    write_parts(tmp_path / "metrics.jsonl", 0, text)
    assert b"".join(map(read_part, parts_of(tmp_path / "metrics.jsonl"))) == text


def test_many_shapes_and_long_texts_take_several_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, most in {"_MOST_SHAPES": 3, "_MOST_COLUMNS": 4, "MOST_ROWS": 7}.items():
        monkeypatch.setattr(parts, name, most)
    path = tmp_path / "metrics.jsonl"
    text = b"".join(f'{{"k{n % 5}": {n}, "l{n % 3}": {n / 7}}}\n'.encode() for n in range(20))
    write_parts(path, 0, text)
    assert len(parts_of(path)) == 3
    assert b"".join(map(read_part, parts_of(path))) == text


def test_columns_are_what_any_reader_of_parquet_sees(tmp_path: Path) -> None:
    from pyarrow import parquet

    path = tmp_path / "metrics.jsonl"
    write_parts(path, 0, b'{"round": 1, "accuracy": 0.5}\n{"round": 2, "bits": [1]}\n')
    table = parquet.read_table(parts_of(path)[0].path)
    assert table.column("round").to_pylist() == [1, 2]
    assert table.column("accuracy").to_pylist() == [0.5, None]
    assert table.column("bits").to_pylist() == [None, "[1]"]


# -- a run's folder ------------------------------------------------------------------------------


def rows_of(round: int) -> list[Row]:
    return [
        {"round": round, "scope": "client", "client": client, "accuracy": 1 / (round + client)}
        for client in range(5)
    ]


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are made of 8 rows or more."""
    monkeypatch.setattr(records, "LEAST_ROWS", 8)


def fill(folder: RunFolder, first: int, last: int, *, packs: bool) -> dict[int, records.Marks]:
    marks = {}
    for round in range(first, last + 1):
        folder.metrics(rows_of(round))
        folder.completed(round)
        marks[round] = folder.marks
        if packs:
            folder.pack()
    return marks


def test_what_the_rows_say_does_not_depend_on_where_they_are(tmp_path: Path, early: None) -> None:
    twins = []
    for packs in (True, False):
        (place := tmp_path / str(packs)).mkdir()
        with RunFolder(place, Settings()) as folder:
            fill(folder, 1, 7, packs=packs)
        with RunFolder(place, Settings()) as folder:
            marks = fill(folder, 8, 9, packs=packs)
            folder.result({"status": "finished"})
        twins.append((read_rows(place / METRICS_FILE), marks))
        assert read_result(place, rows=True)["status"] == "finished"
    assert twins[0] == twins[1]
    assert twins[0][0] == [row for round in range(1, 10) for row in rows_of(round)]
    assert len(parts_of(tmp_path / "True" / METRICS_FILE)) == 4
    assert not (tmp_path / "False" / "parts").exists()


def test_few_rows_stay_lines(tmp_path: Path) -> None:
    with RunFolder(tmp_path, Settings()) as folder:
        fill(folder, 1, 9, packs=True)
    assert not (tmp_path / "parts").exists()


def test_rows_of_the_round_that_is_not_complete_stay_lines(tmp_path: Path, early: None) -> None:
    with RunFolder(tmp_path, Settings()) as folder:
        fill(folder, 1, 2, packs=False)
        folder.metrics(rows_of(3))
        folder.pack()
    assert [part.end for part in parts_of(tmp_path / METRICS_FILE)] == [
        len("".join(to_json(row) + "\n" for round in (1, 2) for row in rows_of(round)))
    ]
    assert len(read_rows(tmp_path / METRICS_FILE)) == 15


@pytest.mark.parametrize("back", range(1, 10))
def test_the_rows_are_cut_back_to_any_round(tmp_path: Path, early: None, back: int) -> None:
    with RunFolder(tmp_path, Settings()) as folder:
        marks = fill(folder, 1, 9, packs=True)
    with RunFolder(tmp_path, Settings()) as folder:
        assert folder.reason_not_to_rewind(marks[back]) is None
        folder.rewind(marks[back])
        assert read_rows(tmp_path / METRICS_FILE) == [
            row for round in range(1, back + 1) for row in rows_of(round)
        ]
        # Going on from there gives what there was.
        again = fill(folder, back + 1, 9, packs=True)
        assert {back: marks[back], **again}[9] == marks[9]
        folder.rewind(None)
        assert read_rows(tmp_path / METRICS_FILE) == []
        assert parts_of(tmp_path / METRICS_FILE) == []


class Killed(BaseException):
    pass


STEPS = ("fsync", "replace", "open", "ftruncate", "unlink")


def killed_at(nth: int, monkeypatch: pytest.MonkeyPatch, what: Callable[[], object]) -> bool:
    """Do something in a process that is killed before its n-th system call; tell whether it was."""
    left = nth

    def dying(step: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return step(*arguments, **options)

        return called

    with monkeypatch.context() as patch:
        for step in STEPS:
            patch.setattr(f"os.{step}", dying(getattr(records.os, step)))
        try:
            what()
        except Killed:
            return True
    return False


@pytest.mark.parametrize("act", ["pack", "rewind", "mend"])
def test_a_process_that_is_killed_anywhere_loses_no_row_and_doubles_none(
    tmp_path: Path, early: None, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    before = [row for round in range(1, 10) for row in rows_of(round)]
    after = before[:15] if act == "rewind" else before
    for nth in range(100):
        (place := tmp_path / str(nth)).mkdir()
        path = place / METRICS_FILE
        with RunFolder(place, Settings()) as folder:
            marks = fill(folder, 1, 7, packs=True)
            marks |= fill(folder, 8, 9, packs=False)
            if act == "mend":
                path.write_bytes(path.read_bytes().replace(b'"round": 9', b'"Round": 9', 1))
            acts = {"pack": folder.pack, "rewind": partial(folder.rewind, marks[3])}
            acts["mend"] = partial(folder.mend, dict(marks[9]), 9)
            killed = killed_at(nth, monkeypatch, acts[act])
        if act != "mend":
            assert read_rows(path) in (before, after)
        with RunFolder(place, Settings()) as folder:
            if act == "mend":
                folder.mend(dict(marks[9]), 9)
                assert read_rows(path) == [*before[:40], *before[41:]]
            else:
                assert folder.reason_not_to_rewind(marks[3]) is None
                folder.rewind(marks[3])
                fill(folder, 4, 9, packs=True)
                assert folder.reason_not_to_rewind(marks[9]) is None
                assert read_rows(path) == before
        if not killed:
            assert nth > 3
            return
    pytest.fail("it never came to its end")


def test_a_damaged_part_is_named_and_costs_its_own_rows_alone(tmp_path: Path, early: None) -> None:
    path = tmp_path / METRICS_FILE
    with RunFolder(tmp_path, Settings()) as folder:
        marks = fill(folder, 1, 9, packs=True)[9]
        folder.result({"status": "finished"})
    part = parts_of(path)[1]
    content = bytearray(part.path.read_bytes())
    content[len(content) // 3] ^= 4
    part.path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=part.path.name):
        read_rows(path)
    with pytest.raises(DamagedFileError, match="not what the run wrote"):
        read_result(tmp_path, rows=True)
    with RunFolder(tmp_path, Settings()) as folder:
        assert "metrics.jsonl" in str(folder.reason_not_to_rewind(marks))
        (told,) = folder.mend(marks, 9)
        assert "metrics.jsonl.damaged-1" in told
    assert {row["round"] for row in read_rows(path)} == {1, 2, 5, 6, 7, 8, 9}
    assert len(list((tmp_path / "parts").glob("*.damaged-1"))) == 4


def test_a_part_that_is_gone_is_missed(tmp_path: Path, early: None) -> None:
    with RunFolder(tmp_path, Settings()) as folder:
        fill(folder, 1, 9, packs=True)
    parts_of(tmp_path / METRICS_FILE)[1].path.unlink()
    with pytest.raises(DamagedFileError, match=r"metrics.jsonl .* is not there"):
        read_rows(tmp_path / METRICS_FILE)


def test_a_reader_may_begin_anywhere(tmp_path: Path, early: None) -> None:
    path = tmp_path / METRICS_FILE
    with RunFolder(tmp_path, Settings()) as folder:
        fill(folder, 1, 9, packs=True)
    whole = b"".join(chunks(path))
    for start in range(0, len(whole) + 5, 17):
        assert b"".join(chunks(path, start)) == whole[start:]


@pytest.mark.parametrize("looks", [(), (3,), (2, 5), (1, 2, 3, 4, 5, 6, 7, 8)])
def test_who_watches_is_told_each_row_once(
    tmp_path: Path, early: None, looks: tuple[int, ...]
) -> None:
    growing = GrowingRows(tmp_path / METRICS_FILE)
    told: list[Row] = []
    with RunFolder(tmp_path, Settings()) as folder:
        for round in range(1, 10):
            fill(folder, round, round, packs=True)
            if round in (*looks, 9):
                rows, anew = growing.read()
                assert not anew
                told += rows
        assert told == [row for round in range(1, 10) for row in rows_of(round)]
        assert growing.read() == ([], False)
        folder.rewind(None)
        fill(folder, 1, 1, packs=True)
        assert growing.read() == (rows_of(1), True)


def test_a_run_is_the_same_with_parts_and_goes_on_from_them(
    tmp_path: Path, early: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Observer):
        def metrics(self, rows: Any) -> None:
            if rows[0]["round"] == 4:
                raise KeyboardInterrupt

    wanted = load_settings(
        None,
        [
            "rounds=5", "clients={count: 4, models: [mlp]}", "engine.backend=inline",
            "data={private_rows: 120, test_rows: 40, public: {size: 20}}", "checkpoints.every=1",
            f"output={tmp_path / 'runs'}", "data.partition.kind=iid",
        ],
    )  # fmt: skip

    def timeless(folder: Path) -> list[Row]:
        rows = [row for name in records.ROW_FILES for row in read_rows(folder / name)]
        return [{key: row[key] for key in row if "seconds" not in key} for row in rows]

    (tmp_path / "stopped").mkdir()
    with pytest.raises(KeyboardInterrupt):
        run(wanted, folder=tmp_path / "stopped", observers=[Stop()])
    resumed = run(resume=tmp_path / "stopped")
    assert len(parts_of(tmp_path / "stopped" / METRICS_FILE)) >= 2
    archive = bundle(tmp_path / "stopped", tmp_path / "bundle.zip")
    assert check_bundle(archive) > 5
    monkeypatch.setattr(records, "LEAST_ROWS", math.inf)
    whole = run(wanted)
    assert not (whole.folder / "parts").exists()
    assert resumed.weights_sha256 == whole.weights_sha256
    assert timeless(tmp_path / "stopped") == timeless(whole.folder)
