"""Runs that several processes make: the bits of one alone, whatever happens to a process."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from sim.commands import packing
from sim.commands.arms import study_of
from sim.commands.packing import MOST_LOSSES, Division, Nursery, divide, run_packed, why_alone
from sim.commands.planned import PlannedRun
from sim.commands.running import run
from sim.commands.study import compare, plan_study
from sim.commands.warm import carried_out
from sim.engine.grid import EngineLostError
from sim.keeping.records import is_finished, read_result, read_rows, turn
from sim.server.observers import Observer, Row
from sim.server.validation import AuthorError
from sim.settings import Settings, SettingsError

Small = Callable[..., Settings]
Fedkd = Callable[..., tuple[int, str, str]]

TWO = "study={seeds: 2, parallel: 2, arms: {alone: {strategy: local}, mutual: {strategy: dml}}}"


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    """Import once for all tests what the processes need."""
    made = Nursery()
    yield made
    made.close()


def division_of(settings: Settings) -> Division:
    return plan_study(study_of(settings)).division


def digests(division: Division) -> list[str]:
    return [read_result(each.folder)["weights_sha256"] for each in division.packed]


class Told(Observer):
    """Keeps what it is told, and does something at a round's end."""

    def __init__(self, at_round: Callable[[], None] = lambda: None) -> None:
        self.rows: list[Row] = []
        self.events: list[Row] = []
        self.calls: list[str] = []
        self._at_round = at_round

    def started(self, settings: Settings, data: object) -> None:
        self.calls.append("started")
        assert data is not None

    def returned(self, round: int) -> None:
        self.calls.append(f"returned {round}")

    def metrics(self, rows: Sequence[Row]) -> None:
        self.rows.extend(rows)
        self._at_round()

    def event(self, row: Row) -> None:
        self.events.append(row)

    def completed(self, round: int) -> None:
        self.calls.append(f"completed {round}")


def kill_whoever_makes(folder: Path) -> None:
    with suppress(ProcessLookupError):
        os.kill(int((folder / ".lock").read_text()), signal.SIGKILL)


# -- which runs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("engine.backend=ray", "engine.backend is ray"),
        ("engine.address=auto", "engine.address is set"),
        ("engine.gpus_per_worker=0.5", "engine.gpus_per_worker is set"),
        ("faults=[{kind: kill}]", "faults of kind kill need Ray"),
        ("clients.count=201", "more than 200 clients"),
        ("clients.count=200", ""),
        ("faults=[{kind: dropout}]", ""),
    ],
)
def test_a_run_that_one_process_cannot_make_whole_is_made_alone(
    small: Small, word: str, reason: str
) -> None:
    assert why_alone(small("engine.backend=auto", word)) == reason


def planned(settings: Settings, count: int) -> list[PlannedRun]:
    return [PlannedRun("a", settings, Path(str(seed))) for seed in range(count)]


def test_as_many_processes_as_there_are_cpus_or_runs(small: Small) -> None:
    auto = small("engine.backend=auto")
    assert divide(planned(auto, 12), "auto", cpus=4).processes == 4
    assert divide(planned(auto, 3), "auto", cpus=4).processes == 3
    # A worker of two CPUs' size leaves room for two processes of that size.
    wide = small("engine.backend=auto", "engine.cpus_per_worker=2")
    assert divide(planned(wide, 12), "auto", cpus=4).processes == 2
    # Asked for by number, so it is so.
    assert divide(planned(auto, 12), 5, cpus=4).processes == 5
    assert {each.settings.engine.backend for each in divide(planned(auto, 2), 2).packed} == {
        "inline"
    }


def test_what_is_made_alone_says_why(small: Small) -> None:
    auto = small("engine.backend=auto")
    few = divide(planned(auto, 3), "auto", cpus=8)
    assert (few.packed, few.told()) == (
        (),
        "one after the other (they are fewer than half of 8 CPUs)",
    )
    one = divide(planned(auto, 3), 1, cpus=8)
    assert one.told() == "one after the other (study.parallel is 1)"
    assert [each.settings for each in one.alone] == [auto] * 3
    mixed = divide([*planned(auto, 2), *planned(small("engine.backend=ray"), 1)], 2)
    assert mixed.told() == (
        "2 at a time, each whole in a process, 1 one after the other (engine.backend is ray)"
    )
    assert divide(planned(small("engine.backend=ray"), 2), 2).told() == (
        "one after the other (engine.backend is ray)"
    )
    assert divide(planned(auto, 1), 2).told() == ""
    assert divide(planned(auto, 12), "auto", cpus=2).told().startswith("up to 2 at a time")


def test_processes_save_time_where_their_start_is_the_smaller_part() -> None:
    # 40 s in one process are 10 in four, and the start of them.
    assert packing.saved_s(40.0, 4) == 30.0 - packing.START_S
    assert packing.saved_s(40.0, 1) < 0


# -- bits, and what is told --------------------------------------------------------------------


def test_bits_and_rows_are_those_of_the_run_alone(small: Small, nursery: Nursery) -> None:
    told: dict[tuple[str, int], Told] = {}
    division = division_of(small(TWO))

    def observers(arm: str, seed: int) -> list[Observer]:
        told[arm, seed] = Told()
        return [told[arm, seed]]

    run_packed(division, observers, nursery=nursery)
    # Two processes begin at once, so either may be heard first.
    assert sorted(told) == [("alone", 0), ("alone", 1), ("mutual", 0), ("mutual", 1)]
    for each, digest in zip(division.packed, digests(division), strict=True):
        assert digest == run(each.settings).weights_sha256
        own = told[each.arm, each.settings.seed]
        assert own.rows == read_rows(each.folder / "metrics.jsonl")
        assert own.calls == ["started", "completed 1", "completed 2"]
        assert own.events == []
    # A study takes what was made.
    found = compare(small(TWO)).to_row()["weights_sha256"]
    assert [*found["alone"], *found["mutual"]] == [digests(division)[at] for at in (0, 2, 1, 3)]


def test_code_of_one_s_own_runs_in_every_process(
    small: Small, nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nets_of_mine.py").write_text(
        "from torch import nn\n\n\ndef net(input_shape, num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = small(TWO, "clients.models=['nets_of_mine:net']")
    division = division_of(settings)
    run_packed(division, nursery=nursery)
    assert all(is_finished(each.folder) for each in division.packed)


# -- what goes wrong ---------------------------------------------------------------------------


def test_a_process_that_is_killed_costs_its_run_a_resume(small: Small, nursery: Nursery) -> None:
    division = division_of(small(TWO, "checkpoints.every=1"))
    first = division.packed[0]
    killed: list[Path] = []

    def kill() -> None:
        if not killed:
            killed.append(first.folder)
            kill_whoever_makes(first.folder)

    told = Told(kill)
    run_packed(
        division,
        lambda arm, seed: [told] if (arm, seed) == ("alone", 0) else [],
        nursery=nursery,
    )
    (event,) = [row for row in told.events if row["event"] == "process lost"]
    assert "too little memory" in event["reason"]
    assert event in read_rows(first.folder / "events.jsonl")
    assert read_result(first.folder)["weights_sha256"] == run(first.settings).weights_sha256
    assert all(is_finished(each.folder) for each in division.packed)


def test_a_run_that_takes_every_process_with_it_ends_the_study(
    small: Small, nursery: Nursery
) -> None:
    division = division_of(small(TWO, "rounds=50"))
    first = division.packed[0]
    times: list[int] = []

    def kill() -> None:
        times.append(1)
        kill_whoever_makes(first.folder)

    class Killing(Told):
        def started(self, settings: Settings, data: object) -> None:
            kill()

    with pytest.raises(EngineLostError, match=rf"alone seed 0: {MOST_LOSSES} processes"):
        run_packed(
            division,
            lambda arm, seed: [Killing()] if (arm, seed) == ("alone", 0) else [],
            nursery=nursery,
        )
    assert len(times) == MOST_LOSSES


def test_stopped_runs_are_saved_and_gone_on_with(small: Small, nursery: Nursery) -> None:
    division = division_of(small(TWO, "rounds=4"))

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_packed(division, lambda *_: [Told(stop)], nursery=nursery)
    begun = [each for each in division.packed if each.begun and not each.finished]
    # Another process may have been stopped before its first round: it has nothing to save.
    ends = [read_result(each.folder).get("status") for each in begun]
    assert "interrupted" in ends
    assert set(ends) <= {"interrupted", None}
    again = division_of(small(TWO, "rounds=4"))
    assert {each.folder for each in begun} <= {each.folder for each in again.packed}
    run_packed(again, nursery=nursery)
    first = division.packed[0]
    assert read_result(first.folder)["weights_sha256"] == run(first.settings).weights_sha256


def test_an_author_s_mistake_ends_the_study_with_its_traceback(
    small: Small, nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rule_of_mine.py").write_text(
        "from strategies.baselines.local import Local, LocalSettings\n\n\n"
        "class OddSettings(LocalSettings):\n    name: str = 'odd'\n\n\n"
        "class Odd(Local):\n    Settings = OddSettings\n\n"
        "    def client(self, cohort, received, call):\n        return 1 / 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arms = "arms: {odd: {strategy: 'rule_of_mine:Odd'}, alone: {strategy: local}}"
    division = division_of(small(f"study={{seeds: 1, parallel: 2, {arms}}}"))
    with pytest.raises(AuthorError, match=r"(?s)return 1 / 0.*ZeroDivisionError"):
        run_packed(division, nursery=nursery)
    sys.modules.pop("rule_of_mine", None)


def test_a_run_that_another_command_makes_comes_last(small: Small, nursery: Nursery) -> None:
    division = division_of(small(TWO))
    notes: list[str] = []
    finished: list[str] = []
    first = division.packed[0]
    held = turn(first.folder, waiting=None)

    class Releasing(Told):
        def completed(self, round: int) -> None:
            if round == 2:
                finished.append("other")
                if len(finished) == 3:
                    held.__exit__(None, None, None)

    first.folder.mkdir(parents=True)
    assert held.__enter__()
    started: list[str] = []

    def observers(arm: str, seed: int) -> list[Observer]:
        started.append(f"{arm} {seed}")
        return [Releasing()]

    run_packed(division, observers, tell=notes.append, nursery=nursery)
    assert started[-1] == "alone 0"
    assert notes == [f"alone seed 0: process {os.getpid()} is making this run; waiting for it"]
    assert is_finished(first.folder)


def test_errors_are_named_here_as_they_were_there(small: Small, tmp_path: Path) -> None:
    settings = small()
    order = {
        "arm": "a",
        "settings": settings.to_table() | {"rounds": -1},
        "folder": str(settings.output / "a"),
        "accept_code": False,
        "code": [],
        "waits": False,
        "lost": "",
    }
    ended = carried_out(order, lambda _: None)
    assert json.loads(json.dumps(ended))["kind"] == "SettingsError"
    error = packing._error_of(ended)
    assert type(error) is SettingsError
    assert "rounds" in str(error)
    odd = packing._error_of({"kind": "KeyError", "text": "3", "notes": [], "trace": "where"})
    assert type(odd) is RuntimeError
    assert "where" in str(odd)


# -- whether it pays ---------------------------------------------------------------------------


def test_processes_are_started_only_where_they_save_time(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    monkeypatch.setattr(packing.Pack, "open", lambda _, count: opened.append(count))
    settings = small(TWO, "study.parallel=auto")
    division = divide(plan_study(study_of(settings)).left, "auto", cpus=2)
    run_packed(division)
    # What was there to be made was made here, one run after the other.
    assert all(is_finished(each.folder) for each in division.packed)
    assert opened == [2]


def test_this_process_makes_the_first_run_and_others_the_rest(
    small: Small, nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "START_S", -1.0)
    monkeypatch.setattr(packing, "Nursery", lambda: nursery)
    monkeypatch.setattr(nursery, "close", lambda: None)
    settings = small(TWO, "study.parallel=auto")
    division = divide(plan_study(study_of(settings)).left, "auto", cpus=2)
    run_packed(division)
    makers = [int((each.folder / ".lock").read_text()) for each in division.packed]
    assert makers[0] == os.getpid()
    assert os.getpid() not in makers[1:]
    assert all(is_finished(each.folder) for each in division.packed)


FORKED = """
import sys
from sim.commands import packing
from sim.commands.cli import main

def never(requests):
    raise AssertionError("imported anew")

packing._imported_anew = never
sys.argv = ["fedkd", *sys.argv[1:]]
main()
"""


def test_the_command_forks_its_processes_from_itself(
    small: Small, small_words: Sequence[str], tmp_path: Path
) -> None:
    # A process of its own: a test runner has threads, and is not forked.
    command = [sys.executable, "-c", FORKED, "compare", "--arms", "local,dml", "--json"]
    command += [*small_words, f"output={tmp_path}", "study.seeds=1", "study.parallel=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0), done.stderr
    makers = {path.read_text() for path in tmp_path.glob("default/*/*/.lock")}
    assert len(makers) == 2
    alone = run(small("strategy=dml")).weights_sha256
    assert json.loads(done.stdout)["weights_sha256"]["dml"] == [alone]


def test_the_command_takes_a_number_or_auto(fedkd: Fedkd, small_words: Sequence[str]) -> None:
    code, _, err = fedkd("compare", *small_words, "--arms", "local,dml", "--parallel", "0")
    assert code == 2
    assert "study.parallel" in err
