import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sim.watching.runs import BEGINS_S, GrowingRows, RunFollower

Row = dict[str, Any]


def rows(*rounds: int, scope: str = "federation") -> str:
    told = [{"round": round, "scope": scope, "seconds": 1.0} for round in rounds]
    return "".join(json.dumps(row) + "\n" for row in told)


def numbers(read: tuple[list[Row], bool]) -> tuple[list[int], bool]:
    return [row["round"] for row in read[0]], read[1]


def test_only_what_is_new_is_read_and_a_line_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    growing = GrowingRows(path)
    assert growing.read() == ([], False)
    path.write_text(rows(1, 2))
    assert numbers(growing.read()) == ([1, 2], False)
    assert numbers(growing.read()) == ([], False)
    text = rows(1, 2, 3)
    path.write_text(text[:-9])
    assert numbers(growing.read()) == ([], False)
    path.write_text(text)
    assert numbers(growing.read()) == ([3], False)


@pytest.mark.parametrize("then", [(1,), (1, 20, 30, 40)], ids=["shorter", "as long and longer"])
def test_a_file_that_was_cut_back_is_read_anew(tmp_path: Path, then: tuple[int, ...]) -> None:
    path = tmp_path / "metrics.jsonl"
    growing = GrowingRows(path)
    path.write_text(rows(1, 2, 3))
    growing.read()
    path.write_text(rows(*then))
    assert numbers(growing.read()) == (list(then), True)
    path.unlink()
    assert growing.read() == ([], True)
    assert growing.read() == ([], False)


def test_rows_that_nobody_wants_are_not_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(rows(1) + rows(1, scope="server") + "no row\n" + rows(2))
    assert numbers(GrowingRows(path, b'"federation"').read()) == ([1, 2], False)


def test_a_run_is_followed_from_before_it_begins_to_its_end(run_at: Callable[..., Any]) -> None:
    run = run_at("dml/seed-0-1a2b3c4d")
    follower = RunFollower(arm="dml", seed=0, folder=run.folder, rounds=4)
    now = time.time()
    # Its data is being loaded; later nobody can believe that.
    assert follower.look(now).status == "running"
    assert follower.look(now + 2 * BEGINS_S).status == "planned"
    with run.running():
        assert follower.look(now).status == "running"
        run.round(1, accuracy=0.0)
        run.round(2)
        run.event(round=2, client=3, event="reply rejected", reason="not finite")
        sight = follower.look(now + 600)
        assert (sight.done, sight.left, sight.curve) == (2, 2, [(1, 0.0)])
        # The last round that was judged, be its accuracy zero.
        assert sight.accuracy == 0.0
        assert sight.seconds == 4.0
        assert [row["event"] for row in sight.events] == ["reply rejected"]
        assert 500 < sight.quiet_s < 700
    assert follower.look(now).status == "stopped"
    run.ended("failed")
    assert follower.look(now).status == "failed"
    with run.running():
        # It was resumed: the rounds since its checkpoint are run again.
        (run.folder / "result.json").unlink()
        (run.folder / "metrics.jsonl").write_text("")
        run.round(1, accuracy=0.5)
        assert [follower.look(now).done, follower.look(now).accuracy] == [1, 0.5]
        run.ended("finished")
        ended = follower.look(now)
    # Finished before its last round, as a spent budget of privacy does it: nothing is left.
    assert (ended.status, ended.done, ended.left) == ("finished", 1, 0)
    assert follower.look(now) is ended


def test_a_finished_run_tells_what_it_took_beside_its_rounds(run_at: Callable[..., Any]) -> None:
    run = run_at("run")
    with run.running():
        run.round(1, 0.5, seconds=2.0)
        run.ended("finished")
    os.utime(run.folder / ".lock", (1000.0, 1000.0))
    os.utime(run.folder / "result.json", (1005.0, 1005.0))
    follower = RunFollower(arm="dml", seed=0, folder=run.folder, rounds=1)
    assert follower.look(2000.0).around_s == pytest.approx(3.0)
