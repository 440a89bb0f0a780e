"""Several machines, two of them simulated on this one: joining, training on both, losing one."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sim.engine.session import RaySession
from sim.keeping.records import EVENTS_FILE, METRICS_FILE, read_rows
from sim.settings import EngineSettings, Settings, SettingsError

pytestmark = pytest.mark.xdist_group("ray")

LOSE_A_MACHINE = """
import sys
from pathlib import Path

import sim
import ray
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
machine = cluster.add_node(num_cpus=1)

from sim.engine.session import RaySession
from sim.server.observers import Observer
from sim.commands.running import run
from sim.settings import load_settings

folder, *words = sys.argv[1:]
settings = load_settings(None, [*words, f"engine.address={cluster.address}"])


class Lightning(Observer):
    struck = False

    def completed(self, round):
        if round == 4 and not self.struck:
            self.struck = True
            cluster.remove_node(machine, allow_graceful=False)


with RaySession(settings.engine) as session:
    workers = session.workers(2)
    assert len(workers) == 2, workers
    nodes = ray.get([worker.node.remote() for worker in workers])
    assert len(set(nodes)) == 2, nodes
    result = run(settings, folder=Path(folder), observers=[Lightning()], session=session)
print(result.weights_sha256)
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_run_over_two_machines_survives_the_loss_of_one(
    small: Callable[..., Settings], small_words: tuple[str, ...], tmp_path: Path
) -> None:
    from sim.commands.running import run

    words = [
        *small_words,
        "rounds=6",
        "clients.count=6",
        # States of half a megabyte, which stay on the machine where they were made.
        "clients.models=[{name: mlp, options: {hidden: [256, 128]}}]",
        "engine.vectorize=loop",
        # Long enough that both workers get their share.
        "faults=[{kind: delay, seconds: 0.1}]",
        "evaluation.every=6",
        # The first round is always written; the loss comes three rounds later.
        "checkpoints.every=3",
        f"output={tmp_path}",
    ]
    whole = run(small(*words))
    folder = tmp_path / "lost"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", LOSE_A_MACHINE, str(folder), *words, "engine.backend=ray"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == whole.weights_sha256
    events = [row["event"] for row in read_rows(folder / EVENTS_FILE)]
    assert "states lost" in events
    rounds = [r["round"] for r in read_rows(folder / METRICS_FILE) if r["scope"] == "federation"]
    assert rounds == [1, 2, 3, 4, 5, 6]


def test_an_address_where_nobody_is_says_so() -> None:
    with pytest.raises(SettingsError, match=r"engine\.address: no Ray cluster answers at '127"):
        RaySession(EngineSettings(address="127.0.0.1:9"))


@pytest.mark.parametrize("address", ["here", "ray://x", "host:port"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(SettingsError, match=r"engine\.address must be auto or HOST:PORT"):
        RaySession(EngineSettings(address=address))
