"""What a phase costs in which 1000 clients of one architecture do nothing.

Our `RayGrid` against the simulation runtime of Flower itself, unchanged, with as many worker
processes: the seconds that `send_and_receive` takes to carry a ``query`` message to every
client and every reply back. Neither start-up nor the making of the messages counts.

The two take turns in processes of their own, because a process can hold only one Ray. Each start
discards its first phase and contributes the median of the others as one repeat.

    python benchmarks/orchestration.py           # about 4 minutes
    python benchmarks/orchestration.py --check   # exit status 1 above the target
    python benchmarks/orchestration.py --quick   # tiny, to see that it runs; says nothing
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

from measurement import (
    Samples,
    add_common_arguments,
    describe,
    exit_status,
    machine,
    ratios,
    row,
    stopwatch,
    verdict,
)

SIDES = ("flower", "ours")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2, help="worker processes on either side")
    parser.add_argument("--phases", type=int, default=3, help="timed phases in each start")
    add_common_arguments(parser, repeats=5, at_most=1 / 100)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.clients, options.workers, options.repeats, options.phases = 8, 1, 1, 1
    return options


def main() -> int:
    options = arguments()
    if options.side is not None:
        seconds = (flower_phases if options.side == "flower" else our_phases)(options)
        sys.stdout.write(json.dumps(seconds) + "\n")
        return 0
    before = machine()
    samples = {side: Samples() for side in SIDES}
    for repeat in range(options.repeats):
        # Turned round each time, so that neither side always follows the other.
        for side in SIDES if repeat % 2 == 0 else reversed(SIDES):
            samples[side].values.append(median(phases_of(side, options)[1:]))
    ratio = ratios(samples["ours"], samples["flower"])
    print(describe(before, os.getloadavg()[0]))
    print(
        f"a phase of {options.clients} idle clients, worker processes: {options.workers}, seconds:"
    )
    print(f"  Flower's runtime  {samples['flower'].text()}")
    print(f"  RayGrid           {samples['ours'].text()}")
    print(f"ratio {ratio.text()}, that is 1/{1 / ratio.median:.0f}; {verdict(ratio, options)}")
    row(
        "B1",
        f"empty phase, {options.clients} clients, against Flower's simulation",
        f"1/{1 / ratio.median:.0f} ({samples['ours'].text()} s)",
        f"at most 1/{1 / options.at_most:.0f}",
        ratio.median <= options.at_most,
        options,
    )
    if options.json:
        tables = {side: samples[side].to_table() for side in SIDES}
        print(json.dumps({**before, **tables, "ratio": ratio.to_table()}))
    return exit_status(ratio, options)


def phases_of(side: str, options: argparse.Namespace) -> list[float]:
    """Measure one side's phases in a new process; the first one is the warm-up."""
    command = [sys.executable, __file__, "--side", side]
    for name in ("clients", "workers", "phases"):
        command += [f"--{name}", str(getattr(options, name))]
    if options.quick:
        command.append("--quick")
    # Nothing is reported to anybody, Ray stays on the loopback, a process computes with one thread.
    quiet = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the side {side!r} failed:\n{done.stderr}")
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def timed_phases(
    options: argparse.Namespace,
    nodes: Iterable[int],
    send_and_receive: Callable[[list[Any]], Iterable[Any]],
) -> list[float]:
    """Send a ``query`` to every node, again and again, and check that every client answered."""
    from flwr.app import ConfigRecord, Message, RecordDict

    nodes = list(nodes)
    seconds: list[float] = []
    for _ in range(1 + options.phases):
        content = RecordDict({"plan": ConfigRecord({"round": 0})})
        messages = [Message(content, node, "query", group_id="0") for node in nodes]
        with stopwatch(seconds):
            replies = list(send_and_receive(messages))
        answers = [reply.content.metric_records["metrics"]["partition"] for reply in replies]
        if sorted(answers) != list(range(options.clients)):
            raise RuntimeError(f"asked {options.clients} clients, got answers from {answers}")
    return seconds


# -- Flower's own runtime ----------------------------------------------------------------------


def flower_phases(options: argparse.Namespace) -> list[float]:
    from flwr.app import Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    client, server = ClientApp(), ServerApp()
    seconds: list[float] = []

    @client.query()
    def do_nothing(message: Message, context: Context) -> Message:
        partition = float(context.node_config["partition-id"])
        return Message(
            RecordDict({"metrics": MetricRecord({"partition": partition})}), reply_to=message
        )

    @server.main()
    def time_phases(grid: Grid, _: Context) -> None:
        while len(list(grid.get_node_ids())) < options.clients:
            time.sleep(0.1)
        seconds.extend(timed_phases(options, grid.get_node_ids(), grid.send_and_receive))

    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=options.clients,
        backend_config={
            "init_args": {"num_cpus": options.workers},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    return seconds


# -- RayGrid -----------------------------------------------------------------------------------


def our_phases(options: argparse.Namespace) -> list[float]:
    from sim.engine.ray_grid import RayGrid
    from sim.engine.resources import available_cpus
    from sim.engine.session import RaySession
    from sim.settings import settings_from_table

    settings = settings_from_table(
        {
            "clients": {"count": options.clients, "models": ["mlp"]},
            "engine": {"cpus_per_worker": available_cpus() / options.workers},
        }
    )
    with RaySession(settings.engine) as session:
        grid = RayGrid(session, settings, idle_data(options.clients))
        try:
            return timed_phases(options, grid.get_node_ids(), grid.send_and_receive)
        finally:
            grid.close()


def idle_data(clients: int) -> Any:
    """Return data of the digits' shape, one private row a client; nobody looks at it."""
    import numpy as np

    from fedkd.data import FederatedData

    images, labels = np.zeros((clients, 1, 8, 8), np.float32), np.arange(clients) % 10
    return FederatedData(
        name="idle",
        class_names=tuple("0123456789"),
        channel_mean=np.zeros(1, np.float32),
        channel_std=np.ones(1, np.float32),
        train_inputs=images,
        train_labels=labels,
        client_rows=tuple(np.arange(clients).reshape(-1, 1)),
        public_inputs=images[:1],
        public_labels=None,
        validation_inputs=images[:1],
        validation_labels=labels[:1],
        test_inputs=images[:1],
        test_labels=labels[:1],
    )


if __name__ == "__main__":
    sys.exit(main())
