"""500 rounds in which 1 % of the clients' trainings kill their worker: does anything pile up?

10 digits MLP clients, one local step a round, two workers; whether a training kills its worker is
drawn from the run's seed. Watched are the driver's own memory (unique to it, without what it
shares with the object store) every 20 rounds, open files, and the processes that are left in the
end. The slope is that of a straight line through the memory after the first 100 rounds.

    python benchmarks/soak.py           # about 10 minutes
    python benchmarks/soak.py --check   # exit status 1 beyond a target
    python benchmarks/soak.py --quick   # a few rounds, to see that it runs
"""

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import psutil
from measurement import describe, machine, row

from sim.commands.running import run
from sim.keeping.records import EVENTS_FILE, read_rows
from sim.server.observers import Observer
from sim.settings import settings_from_table

MOST_MIB = 1.0
"""Growth in 100 rounds."""
WARM_UP = 100


class Watch(Observer):
    """Reads the driver's memory every few rounds."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._process = psutil.Process()
        self.rounds: list[int] = []
        self.mib: list[float] = []
        self.files: list[int] = []

    def metrics(self, rows: Sequence[dict[str, Any]]) -> None:
        if rows[0]["round"] % self._every:
            return
        gc.collect()
        self.rounds.append(rows[0]["round"])
        self.mib.append(self._process.memory_full_info().uss / 2**20)
        self.files.append(self._process.num_fds())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--kills", type=float, default=0.01, help="fraction of trainings")
    parser.add_argument("--check", action="store_true", help="exit status 1 beyond a target")
    parser.add_argument("--quick", action="store_true", help="a few rounds, no verdict")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.kills = 6, 0.0
    before = machine()
    watch = Watch(every=2 if options.quick else 20)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as output:
        settings = settings_from_table(
            {
                "rounds": options.rounds,
                "output": output,
                "clients": {"count": 10, "models": ["mlp"], "local": {"steps": 1}},
                "evaluation": {"every": 50},
                "faults": [{"kind": "kill", "probability": options.kills}],
            }
        )
        result = run(settings, observers=[watch])
        kinds = [event["event"] for event in read_rows(result.folder / EVENTS_FILE)]
    left = leftovers()
    warm = 2 if options.quick else WARM_UP
    late = [place for place, round in enumerate(watch.rounds) if round >= warm]
    slope = 100 * float(
        np.polyfit([watch.rounds[i] for i in late], [watch.mib[i] for i in late], 1)[0]
    )
    print(describe(before, os.getloadavg()[0]))
    print(
        f"{options.rounds} rounds in {time.perf_counter() - started:.0f} s, "
        f"{kinds.count('worker lost')} workers lost; driver "
        f"{watch.mib[late[0]]:.1f} to {watch.mib[-1]:.1f} MiB, "
        f"{watch.files[late[0]]} to {watch.files[-1]} open files; left: {left or 'no process'}"
    )
    good = slope < MOST_MIB and not left
    row(
        "R",
        f"{options.rounds} rounds, {kinds.count('worker lost')} workers killed: driver memory",
        f"{slope:+.2f} MiB per 100 rounds, {len(left)} processes left",
        f"below {MOST_MIB:g}, none",
        good,
        options,
    )
    return int(options.check and not options.quick and not good)


def leftovers() -> list[str]:
    """Return the processes that are still there, after the patience that Ray needs to leave."""
    me = psutil.Process()
    deadline = time.monotonic() + 20
    while (children := me.children(recursive=True)) and time.monotonic() < deadline:
        time.sleep(0.5)
    # One that has ended and only waits to be asked for its status does nothing any more.
    running = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
    return [child.name() for child in running]


if __name__ == "__main__":
    sys.exit(main())
