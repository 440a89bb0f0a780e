"""Workers that die, hang and freeze on purpose, and what becomes of the run."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from sim.commands.running import RunResult, run
from sim.engine.session import RaySession, Worker
from sim.keeping.records import EVENTS_FILE, read_rows
from sim.settings import EngineSettings, Settings

pytestmark = pytest.mark.xdist_group("ray")

Small = Callable[..., Settings]
Faulty = Callable[..., RunResult]


@pytest.fixture(scope="module")
def session() -> Iterator[RaySession]:
    with RaySession(EngineSettings()) as session:
        yield session


@pytest.fixture
def faulty(small: Small, session: RaySession) -> Faulty:
    def start(faults: str, *overrides: str) -> RunResult:
        words = ["engine.backend=ray", "clients.count=5", "rounds=3", f"faults={faults}"]
        return run(small(*words, *overrides), session=session)

    return start


def events(result: RunResult) -> list[tuple[str, int, int]]:
    rows = read_rows(result.folder / EVENTS_FILE)
    return [(row["event"], row["round"], row.get("client", -1)) for row in rows]


def reasons(result: RunResult) -> str:
    return "\n".join(str(row["reason"]) for row in read_rows(result.folder / EVENTS_FILE))


@pytest.mark.parametrize("vectorize", ["loop", pytest.param("vmap", marks=pytest.mark.slow)])
def test_workers_that_die_cost_a_retry_and_no_bit(faulty: Faulty, vectorize: str) -> None:
    mode = f"engine.vectorize={vectorize}"
    whole = faulty("[]", mode)
    deaths = (
        "[{kind: kill, clients: [1], rounds: [1]}, {kind: segfault, clients: [2], rounds: [2]},"
        "{kind: exit, clients: [0], rounds: [3]}]"
    )
    broken = faulty(deaths, mode)
    assert broken.weights_sha256 == whole.weights_sha256
    retried = {(round, client) for event, round, client in events(broken) if event == "retried"}
    assert {(1, 1), (2, 2), (3, 0)} <= retried
    assert all(row["replies"] == 5 for row in broken.history.federation)


def test_a_client_that_always_kills_its_worker_is_excluded_and_the_others_go_on(
    faulty: Faulty,
) -> None:
    result = faulty("[{kind: kill, clients: [3], attempts: null}]", "engine.retries=1")
    absent = faulty("[{kind: dropout, clients: [3], attempts: null}]")
    assert result.weights_sha256 == absent.weights_sha256
    told = [event for event in events(result) if event[0] in ("retried", "excluded")]
    assert told == [("retried", 1, 3), ("excluded", 1, 3)]
    assert "the worker died 2 times over this client" in reasons(result)


def test_of_a_stack_that_kills_its_worker_only_the_guilty_is_excluded(faulty: Faulty) -> None:
    result = faulty(
        "[{kind: kill, clients: [2], attempts: null}]",
        "engine.retries=0",
        "engine.vectorize=vmap",
        "clients.models=[mlp]",
    )
    excluded = {client for event, _, client in events(result) if event == "excluded"}
    assert excluded == {2}
    assert all(row["replies"] == 4 for row in result.history.federation)


def test_a_client_that_hangs_ends_at_the_deadline(faulty: Faulty) -> None:
    started = time.monotonic()
    result = faulty("[{kind: hang, clients: [1], rounds: [2]}]", "engine.deadline_s=1", "rounds=2")
    assert "no answer within engine.deadline_s = 1" in reasons(result)
    assert [row["replies"] for row in result.history.federation] == [5, 4]
    slow = result.history.federation[1]["train_seconds"]
    assert 1 <= slow < 1 + 2, f"the round took {slow} s, the run {time.monotonic() - started} s"


def test_a_frozen_worker_is_given_up_and_replaced(faulty: Faulty) -> None:
    result = faulty(
        "[{kind: freeze, clients: [1], rounds: [1]}]", "engine.deadline_s=1", "rounds=2"
    )
    assert "could not be interrupted" in reasons(result)
    assert [row["replies"] for row in result.history.federation] == [4, 5]


@pytest.mark.slow
def test_of_a_stack_that_freezes_only_the_guilty_is_left_out(faulty: Faulty) -> None:
    result = faulty(
        "[{kind: freeze, clients: [1], rounds: [1]}]",
        "engine.deadline_s=0.5",
        "engine.vectorize=vmap",
        "clients.models=[mlp]",
        "rounds=1",
    )
    assert [row["replies"] for row in result.history.federation] == [4]
    assert [client for event, _, client in events(result) if event == "rejected"] == [1]


def test_a_run_with_faults_repeats_bit_for_bit(faulty: Faulty) -> None:
    faults = (
        "[{kind: kill, probability: 0.1}, {kind: crash, probability: 0.1},"
        "{kind: dropout, probability: 0.1}, {kind: bad_reply, probability: 0.1}]"
    )
    first, second = faulty(faults, "seed=8"), faulty(faults, "seed=8")
    assert first.weights_sha256 == second.weights_sha256
    assert sorted(events(first)) == sorted(events(second))
    assert {event for event, *_ in events(first)} >= {"rejected", "retried"}


ALONE = """
import sys, time
import psutil
from sim.commands.running import run
from sim.settings import load_settings
result = run(load_settings(None, sys.argv[1:]))
deadline = time.monotonic() + 15
def running():
    # One that has ended and only waits to be asked for its status does nothing any more.
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
while (left := running()) and time.monotonic() < deadline:
    time.sleep(0.2)
sys.exit(f"left: {[process.name() for process in left]}" if left else 0)
"""


@pytest.mark.slow
def test_no_process_is_left_when_a_run_with_deaths_ends(
    small_words: tuple[str, ...], tmp_path: Path
) -> None:
    words = [*small_words, "engine.backend=ray", "faults=[{kind: kill, clients: [1]}]"]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *words, f"output={tmp_path}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_workers_that_die_while_they_start_end_the_run_instead_of_dying_for_ever(
    small: Small, session: RaySession, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sim.engine import dispatch
    from sim.server.replies import QuorumError

    class Stillborn(Worker):
        def configure(self, settings: object, data: object, folders: object = ()) -> None:
            os._exit(1)

    monkeypatch.setattr(dispatch, "DEATHS_IN_A_ROW", 3)
    monkeypatch.setattr(session, "_start_worker", lambda: ray.remote(Stillborn).remote("."))
    # One client has one worker, and none of those that take its place comes to life.
    one = ["clients.count=1", "engine.retries=1", "engine.below_quorum=abort"]
    with pytest.raises(QuorumError, match="workers died 4 times in a row"):
        run(small("engine.backend=ray", "faults=[{kind: kill}]", *one), session=session)


def test_bundles_of_which_little_is_needed_are_packed_anew(
    small: Small, session: RaySession
) -> None:
    from sim.commands.running import load_data, open_grid
    from sim.server.rounds import RoundLoop

    settings = small(
        "engine.backend=ray",
        "clients.count=8",
        "clients.participants=3",
        "clients.models=[mlp]",
        "rounds=8",
    )
    data = load_data(settings)
    with open_grid(settings, data, session) as grid:
        RoundLoop(grid, settings, data, []).run()
        bundles = {id(handle.bundle): handle.bundle for handle in grid._committed.values()}
        needed = {
            key: sum(handle.bundle is bundle for handle in grid._committed.values())
            for key, bundle in bundles.items()
        }
    assert all(bundle.live == needed[key] for key, bundle in bundles.items())
    assert all(2 * bundle.live > bundle.size for bundle in bundles.values())
