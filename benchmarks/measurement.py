"""What the benchmarks share: medians with their spread, and what machine they were taken on."""

import os
import platform
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

PACKAGES = ("flwr", "numpy", "ray", "torch")


@dataclass
class Samples:
    """Repeats of one measurement; seconds, or ratios without a unit."""

    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.values)

    def text(self, digits: int = 3) -> str:
        """Return the median and, as the spread, the smallest and the largest repeat."""
        low, high = min(self.values), max(self.values)
        return (
            f"{self.median:.{digits}g} (median of {len(self.values)}, "
            f"{low:.{digits}g} to {high:.{digits}g})"
        )

    def to_table(self) -> dict[str, Any]:
        return {"median": self.median, "repeats": self.values}


def ratios(numerators: Samples, denominators: Samples) -> Samples:
    """Divide repeats pair by pair: what was measured together shared the machine's mood."""
    pairs = zip(numerators.values, denominators.values, strict=True)
    return Samples([numerator / denominator for numerator, denominator in pairs])


@contextmanager
def stopwatch(seconds: list[float]) -> Iterator[None]:
    """Append the wall time of the block to ``seconds``."""
    started = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - started)


def machine() -> dict[str, Any]:
    """Describe the machine without naming it."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def describe(before: dict[str, Any], load_after: float) -> str:
    """Return `machine` as a line to print; the load tells whether others were at work too."""
    packages = ", ".join(f"{name} {before[name]}" for name in ("python", *PACKAGES))
    return (
        f"{before['date']}, {before['cpus']} CPUs ({before['processor']}), {packages}; "
        f"load {before['load']:.1f} before, {load_after:.1f} after"
    )


def verdict(ratio: Samples, options: Namespace) -> str:
    """Say whether the median ratio keeps to the target."""
    if options.quick:
        return "no verdict: --quick measures nothing but whether the script runs"
    word = "met" if ratio.median <= options.at_most else "MISSED"
    return f"target at most {options.at_most:g}: {word}"


def exit_status(ratio: Samples, options: Namespace) -> int:
    """Return 1 where ``--check`` was given and the target is missed."""
    return int(options.check and not options.quick and ratio.median > options.at_most)


def row(figure: str, what: str, measured: str, target: str, met: bool, options: Namespace) -> None:
    """Print a line of the table that ``benchmarks/table.py`` gathers."""
    word = "no verdict" if options.quick else "met" if met else "MISSED"
    print(f"| {figure} | {what} | {measured} | {target} | {word} |")


def add_common_arguments(parser: ArgumentParser, *, repeats: int, at_most: float) -> None:
    """Add the options that every benchmark has."""
    parser.add_argument("--repeats", type=int, default=repeats, help="measurements of each side")
    parser.add_argument("--at-most", type=float, default=at_most, help="target of the ratio")
    parser.add_argument("--check", action="store_true", help="exit status 1 above the target")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, no verdict")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON as well")
