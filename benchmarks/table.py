"""Runs all benchmarks one after the other and prints one table of what they measured.

    python benchmarks/table.py                       # about an hour
    python benchmarks/table.py --data FOLDER         # B2, X2, X3 on a Parquet folder of images
    python benchmarks/table.py --only balance scale  # some of them
    python benchmarks/table.py --quick               # tiny, to see that they run; says nothing

A benchmark that fails is named and the others go on; exit status 1 then.
"""

import argparse
import subprocess
import sys
from pathlib import Path

SCRIPTS = (
    "startup",
    "studies",
    "orchestration",
    "loop_ratio",
    "simulators",
    "vectorized",
    "stacked_rounds",
    "kernels",
    "scale",
    "aggregation",
    "balance",
    "resilience",
    "faults",
    "soak",
    "records",
    "judging",
    "objective_overhead",
    "gradients",
    "private_steps",
    "privacy",
    "codecs",
    "traffic",
    "defences",
    "attacks",
)
ON_IMAGES = ("loop_ratio", "traffic")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS, metavar="NAME")
    parser.add_argument(
        "--data", metavar="FOLDER", help="Parquet files of 28x28 images: B2, X2, X3"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, no verdict")
    options = parser.parse_args()
    table: list[str] = []
    failed: list[str] = []
    for name in options.only:
        command = [sys.executable, str(Path(__file__).with_name(f"{name}.py"))]
        if options.quick:
            command.append("--quick")
        if options.data is not None and name in ON_IMAGES:
            command += ["--data", options.data]
        print(f"== {name}", flush=True)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                if line.startswith("| "):
                    table.append(line)
        if process.returncode:
            failed.append(name)
    print("\n| figure | what | measured | target | verdict |\n|---|---|---|---|---|")
    print("".join(table))
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
