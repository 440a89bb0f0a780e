"""The demo as a whole process: how long it takes, and by how much mutual learning beats local.

    python benchmarks/demo.py            # about 40 s
    python benchmarks/demo.py --check    # exit status 1 where a target is missed

Runs ``fedkd compare conf/quickstart.yaml`` (3 arms x 6 seeds, 6 clients of 3 architectures, digits,
Dirichlet 0.3) into an empty folder. Timed from the start of the process to its end: imports, Ray's
start, all rounds, the report.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measurement import machine

ROOT = Path(__file__).resolve().parent.parent
MOST_SECONDS = 45.0
FEWEST_POINTS = 5.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    options = parser.parse_args()
    before = machine()
    seconds, arms = run_demo()
    for name, row in arms.items():
        low, high = row["accuracy_low"], row["accuracy_high"]
        print(f"{name:10} {100 * row['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f})")
    points = 100 * (arms["dml"]["accuracy"] - arms["local"]["accuracy"])
    print(before)
    print(f"seconds {seconds:.1f}, target at most {MOST_SECONDS:g}")
    print(f"dml minus local {points:.1f} points, target at least {FEWEST_POINTS:g}")
    met = seconds <= MOST_SECONDS and points >= FEWEST_POINTS
    return int(options.check and not met)


def run_demo(*words: str) -> tuple[float, dict[str, dict[str, Any]]]:
    """Run the demo into an empty folder; its seconds of wall time, and a row for each arm."""
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", "fedkd", "compare", str(ROOT / "conf/quickstart.yaml")]
        started = time.perf_counter()
        done = subprocess.run(
            [*command, *words, "--json", f"output={output}"],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
        seconds = time.perf_counter() - started
    return seconds, {row["arm"]: row for row in json.loads(done.stdout)["arms"]}


if __name__ == "__main__":
    raise SystemExit(main())
