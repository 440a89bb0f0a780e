"""What a run survives: killed at any line, stopped by a signal, its checkpoints damaged at random.

Runs on digits in this process (inline backend), each in a child of its own:

- **killed**: SIGKILL at a visit of a source line, the line drawn from all that the driver's modules
  execute in a run; then killed once more while it goes on, then resumed;
- **stopped**: SIGTERM or SIGINT in the same way; then resumed;
- **damaged**: a bit flipped, a file cut, lengthened, deleted, overwritten, swapped or taken from
  another round; the damage has to be named and the checkpoint before it used.

A resumed run is right if its weights' digest, its metrics and its bytes are those of the
uninterrupted one.

    python benchmarks/resilience.py           # about 5 minutes
    python benchmarks/resilience.py --check   # exit status 1 if anything comes out wrong
    python benchmarks/resilience.py --quick   # few of each, to see that it runs
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from measurement import describe, machine, row

import sim
from sim.commands.running import run
from sim.keeping.checkpoints import CheckpointStore
from sim.keeping.records import read_rows
from sim.settings import Settings, load_settings

Visit = tuple[str, int, int]
"""A file, a line of it, and which of the line's visits."""

STRATEGIES = ("dml", "fedavg", "one_way", "dsfl", "fedgkt", "proxyfl")

ROOT = Path(sim.__file__).parents[1]
DRIVER = {
    str((ROOT / module).resolve(strict=True))
    for module in (
        "fedkd/exchange/pipeline/client.py",
        "fedkd/exchange/pipeline/server.py",
        "sim/commands/interruption.py",
        "sim/commands/running.py",
        "sim/engine/grid.py",
        "sim/engine/inline.py",
        "sim/keeping/checkpoints.py",
        "sim/keeping/records.py",
        "sim/keeping/resume.py",
        "sim/server/history.py",
        "sim/server/outbox.py",
        "sim/server/replies.py",
        "sim/server/rounds.py",
    )
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=120, help="runs that are killed")
    parser.add_argument("--stops", type=int, default=40, help="runs that a signal stops")
    parser.add_argument("--damages", type=int, default=2000, help="checkpoints that are damaged")
    parser.add_argument("--seed", type=int, default=0, help="of where and what")
    parser.add_argument("--check", action="store_true", help="exit status 1 if any comes out wrong")
    parser.add_argument("--quick", action="store_true", help="few of each, no verdict")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON as well")
    options = parser.parse_args()
    if options.quick:
        options.kills, options.stops, options.damages = 6, 3, 35
    return options


def main() -> int:
    options = arguments()
    before = machine()
    rng = np.random.default_rng(options.seed)
    places: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tried = {
            "killed and resumed": kills(folder / "kills", options.kills, rng, places),
            "stopped by a signal and resumed": stops(folder / "stops", options.stops, rng),
            "damaged checkpoint seen": damages(folder / "damages", options.damages, rng),
        }
    print(describe(before, os.getloadavg()[0]))
    print(f"{'':34}{'tried':>8}{'right':>8}")
    for what, (count, right) in tried.items():
        print(f"{what:34}{count:>8}{right:>8}")
    killed_in = ", ".join(f"{place} {count}" for place, count in places.most_common())
    print(f"killed in: {killed_in}")
    for what, (count, right) in tried.items():
        row("R", what, f"{right} of {count}", "all", right == count, options)
    count, right = (sum(figures[i] for figures in tried.values()) for i in (0, 1))
    if options.json:
        print(json.dumps({"tried": tried, "places": places, "machine": before}))
    verdict = "met" if right == count else "MISSED"
    if options.quick:
        verdict = "no verdict: --quick tries too few"
    print(f"ratio right outcomes / tried: {right / count:g}; target 1: {verdict}")
    return int(options.check and right < count)


# -- runs that end too early -------------------------------------------------------------------


class Lines:
    """Notes which source lines the driver visits; at one visit it sends this process a signal."""

    def __init__(
        self, fatal: Visit | None = None, number: int = signal.SIGKILL, tell: int = 0
    ) -> None:
        self.visits: Counter[tuple[str, int]] = Counter()
        self.fatal = fatal
        self.number = number
        self.tell = tell

    def __enter__(self) -> "Lines":
        sys.settrace(self.calls)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def calls(self, frame: FrameType, event: str, _: object) -> Any:
        return self.lines if frame.f_code.co_filename in DRIVER else None

    def lines(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "line":
            line = frame.f_code.co_filename, frame.f_lineno
            self.visits[line] += 1
            if (*line, self.visits[line]) == self.fatal:
                if self.tell:
                    place = f"{Path(line[0]).stem}.{frame.f_code.co_name}"
                    os.write(self.tell, place.encode())
                os.kill(os.getpid(), self.number)
        return self.lines


def draw(visits: Counter[tuple[str, int]], rng: np.random.Generator) -> Visit:
    """Draw a line, then one of its visits: what runs seldom counts as much as what runs often."""
    (path, line), count = sorted(visits.items())[int(rng.integers(len(visits)))]
    return path, line, 1 + int(rng.integers(count))


def in_child(
    call: Callable[[], object], fatal: Visit, number: int = signal.SIGKILL
) -> tuple[int, str]:
    """Make a call in a child that gets a signal at a visit; return its end and the place."""
    hear, tell = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        # A shell starts what runs in the background deaf to SIGINT, and children inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with Lines(fatal, number, tell):
                call()
            status = 0
        except KeyboardInterrupt:
            status = 130
        finally:
            os._exit(status)
    os.close(tell)
    place = os.read(hear, 200).decode()
    os.close(hear)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), place


def settings_for(output: Path, number: int) -> Settings:
    return load_settings(
        None,
        [
            f"strategy.name={STRATEGIES[number % len(STRATEGIES)]}",
            f"output={output}",
            "rounds=4",
            "clients.count=5",
            "clients.participants=4",
            "clients.models=[mlp,cnn]",
            "clients.local.epochs=1",
            "data.private_rows=200",
            "data.test_rows=100",
            "data.public.size=60",
            "data.partition.min_rows=2",
            "engine.backend=inline",
            "checkpoints.every=1",
        ],
    )


def bits(folder: Path) -> tuple[Any, ...]:
    """Return what a seed decides of a finished run."""
    result = json.loads((folder / "result.json").read_text())
    metrics = [
        {key: value for key, value in row.items() if "seconds" not in key}
        for row in read_rows(folder / "metrics.jsonl")
    ]
    exchanged = read_rows(folder / "exchange.jsonl")
    return result["status"], result["weights_sha256"], metrics, exchanged


class Reference:
    """Uninterrupted runs: their bits, and the lines that they visit."""

    def __init__(self, output: Path) -> None:
        self.bits: list[tuple[Any, ...]] = []
        self.visits: list[Counter[tuple[str, int]]] = []
        for number in range(len(STRATEGIES)):
            folder = output / f"whole-{number}"
            folder.mkdir(parents=True)
            with Lines() as lines:
                run(settings_for(output, number), folder=folder)
            self.bits.append(bits(folder))
            self.visits.append(lines.visits)


def finish(settings: Settings, folder: Path) -> None:
    """Go on with what is there, as a person would."""
    if (folder / "settings.yaml").exists():
        run(resume=folder)
    else:
        run(settings, folder=folder)


def kills(
    output: Path, count: int, rng: np.random.Generator, places: Counter[str]
) -> tuple[int, int]:
    reference = Reference(output)
    right = 0
    for number in range(count):
        case = number % len(STRATEGIES)
        settings, visits = settings_for(output, number), reference.visits[case]
        folder = output / f"run-{number}"
        folder.mkdir()
        ended, place = in_child(lambda: run(settings, folder=folder), draw(visits, rng))  # noqa: B023
        in_child(lambda: finish(settings, folder), draw(visits, rng))  # noqa: B023
        finish(settings, folder)
        places[place] += 1
        right += ended == -signal.SIGKILL and bits(folder) == reference.bits[case]
        shutil.rmtree(folder)
    return count, right


def stops(output: Path, count: int, rng: np.random.Generator) -> tuple[int, int]:
    reference = Reference(output)
    right = 0
    for number in range(count):
        case = number % len(STRATEGIES)
        settings = settings_for(output, number)
        folder = output / f"run-{number}"
        folder.mkdir()
        fatal = draw(reference.visits[case], rng)
        which = (signal.SIGINT, signal.SIGTERM)[number % 2]
        ended, _ = in_child(lambda: run(settings, folder=folder), fatal, which)  # noqa: B023
        finish(settings, folder)
        # Outside the rounds SIGTERM is not ours and ends the process as it always does.
        stopped = ended in (130, -which)
        right += stopped and bits(folder) == reference.bits[case]
        shutil.rmtree(folder)
    return count, right


# -- checkpoints that are not what was written -------------------------------------------------


def flip(path: Path, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    bit = int(rng.integers(8 * len(content)))
    content[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(content)


def cut(path: Path, rng: np.random.Generator) -> None:
    os.truncate(path, int(rng.integers(path.stat().st_size)))


def lengthen(path: Path, rng: np.random.Generator) -> None:
    with path.open("ab") as file:
        file.write(rng.bytes(int(rng.integers(1, 64))))


def delete(path: Path, _: np.random.Generator) -> None:
    path.unlink()


def overwrite(path: Path, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    start = int(rng.integers(len(content)))
    length = min(len(content) - start, int(rng.integers(1, 512)))
    old = bytes(content[start : start + length])
    content[start : start + length] = bytes(byte ^ 0xFF for byte in old)
    path.write_bytes(content)


def swap(path: Path, rng: np.random.Generator) -> None:
    other = rng.choice([file for file in sorted(path.parent.iterdir()) if file != path])
    mine = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(mine)


def borrow(path: Path, _: np.random.Generator) -> None:
    (other,) = (folder for folder in path.parent.parent.iterdir() if folder != path.parent)
    shutil.copy(other / path.name, path)


DAMAGES = (flip, cut, lengthen, delete, overwrite, swap, borrow)


def damages(output: Path, count: int, rng: np.random.Generator) -> tuple[int, int]:
    """Damage the newer of two checkpoints of a run in many ways; only naming it is right."""
    folder = output / "run"
    folder.mkdir(parents=True)
    run(settings_for(output, 0), folder=folder)
    checkpoints = folder / "checkpoints"
    newest = max(checkpoints.iterdir())
    manifest = json.loads((newest / "MANIFEST.json").read_text())
    store = CheckpointStore(checkpoints, identity=manifest["identity"], packages={})
    spare = output / "spare"
    shutil.copytree(newest, spare)
    right = 0
    for number in range(count):
        path = Path(rng.choice(sorted(newest.iterdir())))
        DAMAGES[number % len(DAMAGES)](path, rng)
        found, problems = store.newest()
        named = len(problems) == 1 and newest.name in problems[0]
        right += found is not None and found.folder != newest and named
        shutil.rmtree(newest)
        shutil.copytree(spare, newest)
    found, problems = store.newest()
    if found is None or found.folder != newest or problems:
        raise RuntimeError("the check refuses what is whole")
    return count, right


if __name__ == "__main__":
    sys.exit(main())
