"""Everything that needs a real Ray; one session serves all tests of this module."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray

from sim.commands.running import open_grid, run
from sim.engine.resources import available_cpus, check_engine
from sim.engine.session import RaySession
from sim.keeping.records import read_rows
from sim.settings import EngineSettings, Settings, SettingsError

# One process of a parallel test run starts Ray, not each of them.
pytestmark = pytest.mark.xdist_group("ray")

Small = Callable[..., Settings]


@pytest.fixture(scope="module")
def session() -> Iterator[RaySession]:
    with RaySession(EngineSettings()) as session:
        yield session


@pytest.fixture
def on_ray(small: Small) -> Small:
    return lambda *overrides: small("engine.backend=ray", "engine.cohort_size=2", *overrides)


def digests(result: object) -> str:
    return str(result.weights_sha256)  # type: ignore[attr-defined]


@pytest.mark.parametrize("strategy", ["dml", pytest.param("fedavg", marks=pytest.mark.slow)])
def test_ray_and_inline_end_with_the_same_bits(
    on_ray: Small, session: RaySession, strategy: str
) -> None:
    overrides = f"strategy.name={strategy}", "clients.count=6", "clients.participants=4", "rounds=3"
    by_ray = run(on_ray(*overrides), session=session)
    inline = run(on_ray(*overrides, "engine.backend=inline"))
    assert by_ray.weights_sha256 == inline.weights_sha256


@pytest.mark.slow
def test_ray_and_inline_keep_the_same_plan_under_a_budget(
    on_ray: Small, session: RaySession
) -> None:
    overrides = "strategy.name=dsfl", "exchange.budget_kb=20", "clients.count=6", "rounds=3"
    by_ray = run(on_ray(*overrides), session=session)
    inline = run(on_ray(*overrides, "engine.backend=inline"))
    assert by_ray.weights_sha256 == inline.weights_sha256
    rows = [read_rows(found.folder / "exchange.jsonl") for found in (by_ray, inline)]
    assert rows[0] == rows[1]
    # Transfers have different numbers of bits, so that something was chosen.
    assert len({row["bits"] for row in rows[0]}) > 1
    assert sum(row["bytes"] for row in rows[0]) <= 20_000


def test_one_worker_and_two_end_with_the_same_bits(on_ray: Small, session: RaySession) -> None:
    two = run(on_ray("clients.count=6"), session=session)
    session_of_one = RaySession(EngineSettings(cpus_per_worker=float(available_cpus())))
    assert session_of_one.worker_limit() == 1
    # Ray's own resources are shared with the other session, so its workers must make room.
    limit, session.worker_limit = session.worker_limit, lambda: 1  # type: ignore[method-assign]
    try:
        one = run(on_ray("clients.count=6"), session=session)
    finally:
        session.worker_limit = limit  # type: ignore[method-assign]
    assert one.weights_sha256 == two.weights_sha256


def test_nothing_listens_beyond_loopback(session: RaySession) -> None:
    ray.get([worker.device.remote() for worker in session.workers(2)])
    me = psutil.Process()
    listening = [
        (process.name(), connection.laddr.ip)
        for process in [me, *me.children(recursive=True)]
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening
    outside = [
        who for who in listening if who[1].removeprefix("::ffff:") not in ("127.0.0.1", "::1")
    ]
    assert not outside


def test_nothing_is_reported_to_anybody() -> None:
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_workers_compute_with_one_thread(session: RaySession) -> None:
    (worker, *_) = session.workers(1)
    assert ray.get(worker.threads.remote()) == 1


def test_a_call_beyond_its_deadline_fails_and_the_run_names_the_clients(
    on_ray: Small, session: RaySession, small: Small
) -> None:
    from sim.server.replies import QuorumError

    with pytest.raises(QuorumError, match=r"engine\.deadline_s"):
        run(
            on_ray("engine.deadline_s=0.000001", "clients.models=[mlp]", "engine.cohort_size=4"),
            session=session,
        )
    # The session is as good as new.
    assert run(on_ray(), session=session).weights_sha256 == run(small()).weights_sha256


def test_a_worker_that_died_is_replaced(on_ray: Small, session: RaySession, small: Small) -> None:
    run(on_ray(), session=session)
    (worker, *_) = session.workers(1)
    # Asked of the worker itself: what a process is called differs between moments and systems.
    victim = ray.get(worker.__ray_call__.remote(lambda _: os.getpid()))
    os.kill(victim, signal.SIGKILL)
    result = run(on_ray("engine.quorum=0"), session=session)
    assert result.status == "finished"
    assert run(on_ray(), session=session).weights_sha256 == run(small()).weights_sha256


def test_what_the_machine_lacks_is_refused_before_ray_starts() -> None:
    with pytest.raises(SettingsError, match=r"engine\.cpus_per_worker must be at most the"):
        check_engine(EngineSettings(cpus_per_worker=1000))
    with pytest.raises(SettingsError, match=r"engine\.gpus_per_worker must be at most the"):
        check_engine(EngineSettings(gpus_per_worker=1000))


def test_states_stay_with_the_driver_when_a_worker_is_lost(
    on_ray: Small, session: RaySession, tmp_path: Path
) -> None:
    from sim.commands.running import load_data
    from sim.server.rounds import RoundLoop

    settings = on_ray("strategy.name=local")
    data = load_data(settings)
    with open_grid(settings, data, session) as grid:
        RoundLoop(grid, settings, data, []).run()
        for worker in session.workers(2):
            session.replace(worker)
        states = list(grid.client_states(range(settings.clients.count)))
    assert all(state is not None and state.models for state in states)


def test_a_worker_asks_ray_for_its_share_of_a_gpu(
    session: RaySession, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, float]] = []

    class Remote:
        def options(self, **resources: float) -> "Remote":
            asked.append(resources)
            return self

        def remote(self, folder: str) -> None: ...

    monkeypatch.setattr(ray, "remote", lambda _: Remote())
    monkeypatch.setattr(session, "_engine", EngineSettings(cpus_per_worker=2, gpus_per_worker=0.5))
    session._start_worker()
    assert asked == [{"num_cpus": 2.0, "num_gpus": 0.5}]


@pytest.mark.parametrize(("gpus", "device"), [([], "cpu"), ([0], "cuda")])
def test_a_worker_trains_on_the_gpu_that_ray_gave_it(
    small: Small, monkeypatch: pytest.MonkeyPatch, gpus: list[int], device: str
) -> None:
    from sim.commands.running import load_data
    from sim.engine import session

    chosen: list[str] = []

    def runtime(settings: object, data: object, device: object) -> None:
        chosen.append(str(device))

    monkeypatch.setattr(ray, "get_gpu_ids", lambda: gpus)
    monkeypatch.setattr(session, "ClientRuntime", runtime)
    settings = small()
    session.Worker(".").configure(settings.to_table(), load_data(settings))
    assert chosen == [device]


@pytest.mark.gpu
@pytest.mark.slow
def test_training_on_half_a_gpu_ends_near_training_on_the_cpu(small: Small) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    on_gpu = run(small("engine.backend=ray", "engine.gpus_per_worker=0.5"))
    on_cpu = run(small())
    pairs = zip(on_gpu.history.federation, on_cpu.history.federation, strict=True)
    assert all(abs(gpu["accuracy"] - cpu["accuracy"]) < 0.05 for gpu, cpu in pairs)
