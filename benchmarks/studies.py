"""What a study costs beside its rounds: 40 tiny runs, and what packing them gains.

Three sides, in turn: the bare rounds (one warm process, whose start is not counted, makes the
rounds of all runs and writes nothing), the study with its runs one after the other in one process,
and the study with its runs packed over the CPUs. A side's CPU time is that of all its processes;
studies are counted from the command to its exit: imports, plan, folders, checkpoints, report.
"""

import json
import os
import resource
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

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

WORDS = ("clients.count=6", "clients.models=[mlp,cnn]", "data.public.size=300", "name=tiny")
ARMS = ("local", "dml", "fedmd", "one_way")


def words_of(options: Namespace, output: str) -> list[str]:
    """Return the settings of every run."""
    return [*WORDS, f"rounds={options.rounds}", f"output={output}"]


def bare(options: Namespace) -> tuple[float, float]:
    """Make the rounds of all runs in this process; return CPU and wall seconds of the rounds."""
    from sim.commands.arms import load_study
    from sim.commands.running import load_data
    from sim.engine.inline import InlineGrid
    from sim.server.rounds import RoundLoop

    words = [*words_of(options, "unused"), "engine.backend=inline"]
    arms = load_study(None, words, arms=ARMS).arms
    cpu_s = wall_s = 0.0
    for seed in range(-1, options.seeds):
        for of_arm in arms.values():
            settings = of_arm.model_copy(update={"seed": max(seed, 0)})
            data = load_data(settings)
            loop = RoundLoop(InlineGrid(settings, data), settings, data, [])
            cpu, wall = time.process_time(), time.perf_counter()
            loop.run()
            if seed >= 0:  # those before are to warm up
                cpu_s += time.process_time() - cpu
                wall_s += time.perf_counter() - wall
    return cpu_s, wall_s


def study(options: Namespace, parallel: str) -> tuple[float, float]:
    """Make the study by its command; return CPU and wall seconds of all its processes."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fedkd", "compare", "--arms", ",".join(ARMS), "--quiet"]
        command += ["--seeds", str(options.seeds), "--parallel", parallel]
        command += words_of(options, folder)
        if parallel == "1":
            command.append("engine.backend=inline")
        return timed(command)


def timed(command: list[str]) -> tuple[float, float]:
    """Run a command; return CPU seconds of it and of what it started, and wall seconds."""
    # What is installed is compiled once, not at every start.
    others = {
        name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
    }
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=others)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu_s, time.perf_counter() - wall


def main() -> int:
    """Measure, print, judge."""
    parser = ArgumentParser(description=__doc__)
    add_common_arguments(parser, repeats=3, at_most=1.2)
    parser.add_argument("--seeds", type=int, default=10, help="of each of the four arms")
    parser.add_argument("--rounds", type=int, default=4, help="of each run")
    parser.add_argument("--bare", action="store_true", help="only the bare rounds, as JSON")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.rounds, options.repeats = 1, 1, 1
    if options.bare:
        print(json.dumps(bare(options)))
        return 0
    before = machine()
    names = ("bare rounds", "one after the other", "packed")
    cpu, wall = ({name: Samples() for name in names} for _ in range(2))
    for _ in range(options.repeats):
        sizes = ["--seeds", str(options.seeds), "--rounds", str(options.rounds)]
        script = [sys.executable, str(Path(__file__)), "--bare", *sizes]
        told = subprocess.run(script, check=True, capture_output=True, text=True)
        found = [json.loads(told.stdout), study(options, "1"), study(options, "auto")]
        for name, (cpu_s, wall_s) in zip(names, found, strict=True):
            cpu[name].values.append(cpu_s)
            wall[name].values.append(wall_s)
    print(describe(before, os.getloadavg()[0]))
    print(f"{len(ARMS) * options.seeds} runs of {options.rounds} rounds; seconds:")
    for name in names:
        print(f"  {name}: CPU {cpu[name].text()}, wall {wall[name].text()}")
    beside = ratios(cpu["packed"], cpu["bare rounds"])
    apart = ratios(cpu["one after the other"], cpu["bare rounds"])
    waited = ratios(wall["packed"], wall["bare rounds"])
    gain = ratios(wall["one after the other"], wall["packed"])
    print(f"  packed / bare, CPU: {beside.text()}; {verdict(beside, options)}")
    print(f"  one after the other / bare, CPU: {apart.text()}")
    print(f"  packed / bare, wall: {waited.text()}")
    print(f"  one after the other / packed, wall: {gain.text()}")
    if options.json:
        sides = {name: {"cpu": cpu[name].values, "wall": wall[name].values} for name in names}
        print(json.dumps(sides))
    row(
        "T1",
        "study of 40 tiny runs, packed, against their rounds, CPU time",
        beside.text(),
        f"at most {options.at_most:g} times",
        beside.median <= options.at_most,
        options,
    )
    return exit_status(beside, options)


if __name__ == "__main__":
    sys.exit(main())
