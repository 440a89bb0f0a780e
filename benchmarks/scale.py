"""What registered clients cost that do not take part: 100 a round out of 10^2 to 10^5.

The same 100-client rounds (FedAvg, MLP, 4 rows a client, one local epoch; two workers) in
federations of different size, each in a process of its own. Timed are whole rounds without
evaluation of others than the participants; memory is what the driver has to itself once the rounds
are over, less the rows themselves, per client.

    python benchmarks/scale.py           # about 3 minutes
    python benchmarks/scale.py --check   # exit status 1 beyond a target
    python benchmarks/scale.py --quick   # tiny, to see that it runs; says nothing
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
from measurement import Samples, describe, machine, row

TIME_AT_MOST = 1.15
BYTES_AT_MOST = 1000.0
PARTICIPANTS = 100
ROWS = 4


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=5, help="starts of each size")
    parser.add_argument("--rounds", type=int, default=12, help="timed rounds in each start")
    parser.add_argument("--check", action="store_true", help="exit status 1 beyond a target")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, no verdict")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON as well")
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.repeats, options.rounds = [100, 200], 1, 2
    return options


def main() -> int:
    options = arguments()
    if options.size is not None:
        sys.stdout.write(json.dumps(federation(options.size, options.rounds)) + "\n")
        return 0
    before = machine()
    seconds = {size: Samples() for size in options.sizes}
    memory = {size: Samples() for size in options.sizes}
    for repeat in range(options.repeats):
        for size in options.sizes if repeat % 2 == 0 else reversed(options.sizes):
            measured = in_process(size, options)
            seconds[size].values.append(measured["seconds"])
            memory[size].values.append(measured["bytes"])
    print(describe(before, os.getloadavg()[0]))
    print(f"rounds of {PARTICIPANTS} clients out of:")
    smallest = options.sizes[0]
    good = True
    rows = []
    for size in options.sizes:
        ratio = seconds[size].median / seconds[smallest].median
        good &= ratio <= TIME_AT_MOST
        rows.append({"clients": size, "ratio": ratio, "bytes": memory[size].median})
        print(
            f"  {size:>7}  {seconds[size].text()} s a round, {ratio:.3f} of the first; driver "
            f"{memory[size].median / 2**20:.0f} MiB"
        )
    row(
        "B5",
        f"a round of {PARTICIPANTS} clients out of {options.sizes[-1]:,}, against {smallest}",
        f"{max(line['ratio'] for line in rows):.3f} times as long at most",
        f"at most {TIME_AT_MOST:g}",
        all(line["ratio"] <= TIME_AT_MOST for line in rows),
        options,
    )
    # A straight line through all sizes: the smallest differ by less than memory scatters.
    most_bytes = float(np.polyfit(options.sizes, [line["bytes"] for line in rows], 1)[0])
    good &= most_bytes <= BYTES_AT_MOST
    row(
        "B5",
        "driver memory for an idle client",
        f"{most_bytes:.0f} bytes",
        f"at most {BYTES_AT_MOST:g}",
        most_bytes <= BYTES_AT_MOST,
        options,
    )
    if options.quick:
        print("no verdict: --quick measures nothing but whether the script runs")
        return 0
    print(
        f"targets: time at most {TIME_AT_MOST:g} of the first, at most {BYTES_AT_MOST:g} bytes "
        f"a client: {'met' if good else 'MISSED'}"
    )
    if options.json:
        print(json.dumps({**before, "sizes": rows}))
    return int(options.check and not good)


def in_process(size: int, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--size", str(size), "--rounds", str(options.rounds)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{size} clients failed:\n{done.stderr}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def federation(size: int, rounds: int) -> dict[str, float]:
    import gc

    import psutil

    from sim.commands.running import open_grid
    from sim.server.observers import Observer
    from sim.server.rounds import RoundLoop
    from sim.settings import settings_from_table

    settings = settings_from_table(
        {
            "rounds": rounds + 2,
            "clients": {
                "count": size,
                "participants": PARTICIPANTS,
                "models": ["mlp"],
                "local": {"epochs": 1},
            },
            "strategy": {"name": "fedavg"},
            "evaluation": {"clients": "participants"},
        }
    )
    data = sparse_data(size)
    seconds: list[float] = []

    class Clock(Observer):
        def metrics(self, rows: Sequence[dict[str, Any]]) -> None:
            seconds.append(rows[0]["seconds"])

    with open_grid(settings, data) as grid:
        RoundLoop(grid, settings, data, [Clock()]).run()
        gc.collect()
        time.sleep(0.5)
        # What it shares with the object store is the data once more.
        own = psutil.Process().memory_full_info().uss - data.train_inputs.nbytes
    # The first rounds warm up.
    return {"seconds": median(seconds[2:]), "bytes": float(own)}


def sparse_data(clients: int) -> Any:
    """Return data of the digits' shape, a few rows a client."""
    from fedkd.data import FederatedData

    rng = np.random.default_rng(0)
    images = rng.standard_normal((clients * ROWS, 1, 8, 8), dtype=np.float32)
    labels = np.arange(clients * ROWS) % 10
    return FederatedData(
        name="sparse",
        class_names=tuple("0123456789"),
        channel_mean=np.zeros(1, np.float32),
        channel_std=np.ones(1, np.float32),
        train_inputs=images,
        train_labels=labels,
        client_rows=tuple(np.arange(len(labels)).reshape(clients, ROWS)),
        public_inputs=images[:50],
        public_labels=None,
        validation_inputs=images[:50],
        validation_labels=labels[:50],
        test_inputs=images[:50],
        test_labels=labels[:50],
    )


if __name__ == "__main__":
    sys.exit(main())
