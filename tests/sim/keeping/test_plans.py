import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sim.keeping.plans import PLAN_FILES, announced, holder
from sim.keeping.records import StorageError

HOLDS = """
import sys
from pathlib import Path
from sim.keeping.plans import announced

with announced(Path(sys.argv[1]), {"name": "theirs"}):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_plan_is_there_and_held_while_its_study_runs(tmp_path: Path) -> None:
    with announced(tmp_path, {"name": "a"}) as plan:
        assert json.loads(plan.read_text()) == {"name": "a"}
        assert list(tmp_path.glob(PLAN_FILES)) == [plan]
        assert holder(plan) == os.getpid()
    # It stays, for whoever asks what was to come.
    assert plan.is_file()
    assert holder(plan) is None
    assert [path.name for path in tmp_path.iterdir()] == [plan.name]


def test_a_plan_of_a_study_that_is_over_gives_way_and_that_of_another_stays(tmp_path: Path) -> None:
    with announced(tmp_path, {"name": "old"}) as old:
        pass
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        (theirs,) = tmp_path.glob(PLAN_FILES)
        assert theirs != old
        assert holder(theirs) == other.pid
        with announced(tmp_path, {"name": "mine"}) as mine:
            assert set(tmp_path.glob(PLAN_FILES)) == {theirs, mine}
        other.stdin.close()
    with announced(tmp_path, {"name": "mine"}):
        assert list(tmp_path.glob(PLAN_FILES)) == [mine]


def test_nobody_holds_what_is_not_there(tmp_path: Path) -> None:
    assert holder(tmp_path / "plan-0.json") is None


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match=r"cannot write .*nowhere"),
        announced(tmp_path / "nowhere", {}),
    ):
        pass
