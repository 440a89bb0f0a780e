"""S1 to S4: what a process costs before it works.

    python benchmarks/startup.py            # about 3 minutes on two idle CPUs
    python benchmarks/startup.py --quick    # tiny; shows that it runs
    python benchmarks/startup.py --check    # exit status 1 where a target is missed

- S1: CPU time, user and system, of ``fedkd run rounds=1 engine.backend=inline`` as a whole process
  (imports, data, one round of 10 clients, run folder), over that of ``python -c "import torch"``.
  Both in turn; what Python compiles once is compiled before.
- S2: Ray's start: from its import to the moment at which every worker has the run's data. A process
  of its own each time.
- S3: the demo, ``fedkd compare conf/quickstart.yaml`` as a whole process, by `demo.py`.
- S4: CPU time of ``fedkd --help`` and of ``fedkd compare --help`` as whole processes, whichever
  takes longer.

S2 and S3 are wall time and mean something on idle CPUs only; the load is printed beside them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

from demo import run_demo
from measurement import (
    Samples,
    add_common_arguments,
    describe,
    exit_status,
    machine,
    ratios,
    row,
    verdict,
)

MOST_RAY_SECONDS = 8.0
MOST_DEMO_SECONDS = 45.0
MOST_HELP_SECONDS = 0.3

IMPORT_TORCH = [sys.executable, "-c", "import torch"]
RAY_START = """
import time
from sim import load_settings
from sim.commands.running import load_data, open_grid
settings = load_settings(None, ["rounds=1"])
data = load_data(settings)
started = time.perf_counter()
with open_grid(settings, data):
    print(time.perf_counter() - started)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser, repeats=7, at_most=2.5)
    options = parser.parse_args()
    repeats = 1 if options.quick else options.repeats
    # As for anybody who runs it a second time: with the bytecode that Python keeps.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    before = machine()

    whole, bare, ray, helped = Samples(), Samples(), Samples(), Samples()
    with tempfile.TemporaryDirectory() as output:
        run = [sys.executable, "-m", "fedkd", "run", "rounds=1", "engine.backend=inline", "--quiet"]
        run.append(f"output={output}")
        if options.quick:
            run += ["clients.count=2", "data.private_rows=40", "data.public.size=20"]
        for command in (run, IMPORT_TORCH):
            cpu_seconds(command)
        for _ in range(repeats):
            whole.values.append(cpu_seconds(run))
            bare.values.append(cpu_seconds(IMPORT_TORCH))
    commands = [
        [sys.executable, "-m", "fedkd", *words] for words in (["--help"], ["compare", "-h"])
    ]
    for _ in range(repeats):
        helped.values.append(max(cpu_seconds(command, quiet=True) for command in commands))
    for _ in range(1 if options.quick else 3):
        ray.values.append(ray_seconds())
    demo, _ = run_demo("rounds=1", "--seeds", "1") if options.quick else run_demo()

    ratio = ratios(whole, bare)
    print(describe(before, os.getloadavg()[0]))
    print(f"whole process {whole.text()} s of CPU, import torch {bare.text()} s")
    print(f"ratio {ratio.text()}; {verdict(ratio, options)}")
    print(f"Ray's start {ray.text()} s, target at most {MOST_RAY_SECONDS:g} on two idle CPUs")
    print(f"help {helped.text()} s of CPU, target at most {MOST_HELP_SECONDS:g}")
    print(f"the demo {demo:.1f} s, target at most {MOST_DEMO_SECONDS:g} on two idle CPUs")
    row(
        "S1",
        "`fedkd run rounds=1 engine.backend=inline`, against `import torch`, CPU time",
        f"{ratio.median:.2f} times ({min(ratio.values):.2f} to {max(ratio.values):.2f})",
        f"at most {options.at_most:g} times",
        ratio.median <= options.at_most,
        options,
    )
    row(
        "S2",
        "Ray's start, two workers",
        f"{ray.text(2)} s",
        f"at most {MOST_RAY_SECONDS:g} s",
        ray.median <= MOST_RAY_SECONDS,
        options,
    )
    row(
        "S3",
        "the demo",
        f"{demo:.1f} s",
        f"at most {MOST_DEMO_SECONDS:g} s",
        demo <= MOST_DEMO_SECONDS,
        options,
    )
    row(
        "S4",
        "`fedkd --help`, CPU time",
        f"{helped.text(2)} s",
        f"at most {MOST_HELP_SECONDS:g} s",
        helped.median <= MOST_HELP_SECONDS,
        options,
    )
    if options.json:
        sides = {
            "whole": whole,
            "import_torch": bare,
            "ratio": ratio,
            "ray_start": ray,
            "help": helped,
        }
        table = {name: samples.to_table() for name, samples in sides.items()}
        print(json.dumps({**table, "demo": demo, "machine": before}))
    return exit_status(ratio, options)


def cpu_seconds(command: list[str], *, quiet: bool = False) -> float:
    """Return the CPU time, user and system, of a process and all that it waited for."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL if quiet else None)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"exit status {process.returncode}: {' '.join(command)}")
    return used.ru_utime + used.ru_stime


def ray_seconds() -> float:
    """Start Ray and its workers in a process of its own and return the wall time."""
    command = [sys.executable, "-c", RAY_START]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


if __name__ == "__main__":
    sys.exit(main())
