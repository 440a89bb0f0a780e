"""Every federated algorithm on digits: accuracy, bytes and seconds of ten rounds with defaults.

    python benchmarks/algorithms.py                  # all of them, about ten minutes
    python benchmarks/algorithms.py --only dml fml   # some of them
    python benchmarks/algorithms.py --check          # exit status 1 where one takes too long

Ten clients with one model hold digits by Dirichlet 0.3; each algorithm runs in a process of its
own, in a single thread, with the settings of its card. One seed: the table says what works, not
what is better than what; `fedkd compare conf/examples/all-algorithms.yaml` does.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from measurement import describe, machine

from sim.commands.algorithms import Algorithm, algorithms

MOST_SECONDS = 60
SETTINGS = (
    "rounds=10",
    "clients.count=10",
    "clients.models=[cnn]",
    "data.partition.alpha=0.3",
    "engine.backend=inline",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = {each.name: each for each in algorithms()}
    parser.add_argument("--only", nargs="+", choices=every, default=list(every), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="exit status 1 if one takes too long")
    parser.add_argument("--quick", action="store_true", help="one round, no verdict")
    parser.add_argument("words", nargs="*", help="settings for all of them, after --")
    options = parser.parse_args()
    before = machine()
    words = [*SETTINGS, f"seed={options.seed}", *["rounds=1"] * options.quick, *options.words]
    rows = []
    for name in options.only:
        rows.append(measured(every[name], words))
        print(f"{name}: {rows[-1]['seconds']:.0f} s", file=sys.stderr, flush=True)
    print(describe(before, os.getloadavg()[0]))
    print("| name | clients | server | ensemble | bytes up | bytes down | seconds |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        print("| " + " | ".join(cells_of(row)) + " |")
    slow = [row["name"] for row in rows if row["seconds"] > MOST_SECONDS]
    failed = [row["name"] for row in rows if "error" in row]
    for row in rows:
        if "error" in row:
            print(f"failed: {row['name']}: {row['error']}")
    if not options.quick:
        word = f"MISSED by {', '.join(slow)}" if slow else "met"
        print(f"ten rounds in at most {MOST_SECONDS} s: {word}")
    return int(bool(failed) or (options.check and not options.quick and bool(slow)))


def measured(algorithm: Algorithm, words: list[str]) -> dict[str, Any]:
    """Run an algorithm in a process of its own; return what its last round came to."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fedkd", *algorithm.command.split()[1:], *words]
        ran = subprocess.run(
            [*command, "--json", f"output={folder}"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    if ran.returncode:
        told = ran.stderr.strip().splitlines() or ["nothing was said"]
        return {"name": algorithm.name, "seconds": float("nan"), "error": told[-1]}
    run = json.loads(ran.stdout)
    return {
        "name": algorithm.name,
        "seconds": run["seconds"],
        "clients": run["last"]["accuracy"],
        "server": run["last"].get("server_accuracy"),
        "ensemble": run["last"].get("ensemble_accuracy"),
        "up": sum(run["bytes_up"]),
        "down": sum(run["bytes_down"]),
    }


def cells_of(row: dict[str, Any]) -> list[str]:
    """Return a line of the table: percent, bytes of all clients and rounds, seconds."""
    shares = [row.get(name) for name in ("clients", "server", "ensemble")]
    sizes = [row.get(name) for name in ("up", "down")]
    return [
        f"`{row['name']}`",
        *("" if share is None else f"{100 * share:.1f} %" for share in shares),
        *("" if size is None else f"{size / 1e6:.2f} MB" for size in sizes),
        f"{row['seconds']:.1f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
