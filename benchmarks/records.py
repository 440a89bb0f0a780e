"""What rows cost on disk: 1000 clients, as JSON lines and as the parts that checkpoints make.

A run of 1000 digits MLP clients (`dml`, judged each round, a checkpoint each round) writes its
folder; what all its rows take, in lines and in parts, is divided by clients and rounds. Then its
rows are written and read again in both forms, in turn: CPU time a row. Moving rows into parts
begins with their lines, as at a checkpoint; reading ends with rows.

    python benchmarks/records.py           # about a minute
    python benchmarks/records.py --check   # exit status 1 beyond the target
    python benchmarks/records.py --quick   # tiny, to see that it runs; says nothing
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from measurement import Samples, describe, machine, ratios, row

from sim.commands.running import run
from sim.keeping.parts import FOLDER, chunks, header, write_parts
from sim.keeping.records import ROW_FILES, read_rows, to_json
from sim.settings import settings_from_table

MOST_BYTES = 60.0


def cpu_seconds(what: Callable[[], object]) -> float:
    started = time.process_time()
    what()
    return time.process_time() - started


def size_of(folder: Path) -> int:
    files = [folder / name for name in ROW_FILES] + list((folder / FOLDER).glob("*"))
    return sum(file.stat().st_size for file in files)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7, help="of writing and of reading")
    parser.add_argument("--check", action="store_true", help="exit status 1 beyond the target")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, no verdict")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON as well")
    options = parser.parse_args()
    if options.quick:
        options.clients, options.rounds, options.repeats = 20, 2, 1
    before = machine()
    names = ("write lines", "write parts", "read lines", "read parts")
    seconds = {name: Samples() for name in names}
    with TemporaryDirectory() as output:
        settings = settings_from_table(
            {
                "rounds": options.rounds,
                "output": output,
                "clients": {
                    "count": options.clients,
                    "models": ["mlp"],
                    "local": {"epochs": 1},
                },
                "data": {
                    "private_rows": 1000,
                    "test_rows": 300,
                    "public": {"size": 50},
                    "partition": {"kind": "iid", "min_rows": 1},
                },
                "checkpoints": {"every": 1},
                "engine": {"backend": "inline"},
            }
        )
        folder = run(settings).folder
        texts = {name: b"".join(chunks(folder / name)) for name in ROW_FILES}
        rows = {name: read_rows(folder / name) for name in ROW_FILES}
        per = options.clients * options.rounds
        in_lines, on_disk = sum(map(len, texts.values())) / per, size_of(folder) / per
        lines, parts = Path(output) / "lines", Path(output) / "parts"
        lines.mkdir()
        parts.mkdir()

        def as_lines() -> None:
            for name in ROW_FILES:
                text = "".join(to_json(each) + "\n" for each in rows[name])
                (lines / name).write_text(text, encoding="utf-8")

        def as_parts() -> None:
            for name, text in texts.items():
                write_parts(parts / name, 0, text)
                (parts / name).write_bytes(header(len(text)))

        def reading(place: Path) -> None:
            for name in ROW_FILES:
                if read_rows(place / name) != rows[name]:
                    raise SystemExit(f"{place.name} hold other rows of {name}")

        for repeat in range(-1, options.repeats):
            found = [
                cpu_seconds(as_lines),
                cpu_seconds(as_parts),
                cpu_seconds(lambda: reading(lines)),
                cpu_seconds(lambda: reading(parts)),
            ]
            for name, taken in zip(names, found, strict=True):
                if repeat >= 0:  # the first warms up
                    seconds[name].values.append(taken)
    count = sum(map(len, rows.values()))
    print(describe(before, os.getloadavg()[0]))
    print(f"{options.rounds} rounds of {options.clients} clients, {count} rows; bytes for each")
    print(f"client and round: {in_lines:.0f} in lines, {on_disk:.1f} in the run's folder")
    for name in names:
        each = Samples([1e6 * taken / count for taken in seconds[name].values])
        print(f"  {name}: {each.text()} microseconds of CPU time a row")
    for act in ("write", "read"):
        ratio = ratios(seconds[f"{act} parts"], seconds[f"{act} lines"])
        print(f"  {act} parts / {act} lines: {ratio.text()}")
    if options.json:
        taken_s = {name: samples.values for name, samples in seconds.items()}
        print(json.dumps({"lines": in_lines, "disk": on_disk, "seconds": taken_s}))
    met = on_disk <= MOST_BYTES
    row(
        "D1",
        f"rows on disk of {options.clients} clients, for each client and round",
        f"{on_disk:.1f} bytes ({in_lines:.0f} in lines)",
        f"at most {MOST_BYTES:g}",
        met,
        options,
    )
    return int(options.check and not options.quick and not met)


if __name__ == "__main__":
    sys.exit(main())
