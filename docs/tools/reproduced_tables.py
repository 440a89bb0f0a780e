"""The tables of reproduced.md, from the studies that were run.

Published figures are written here, with what they measure; ours are read from run folders and never
typed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from sim.reports.runs import load_study
from sim.reports.statistics import estimate


class Published(NamedTuple):
    """What a source says of an arm."""

    figure: str
    key: str = "accuracy"
    """The column of ours that measures the same: of the last judged round."""


WAYS = ("bytes_up", "bytes_down")
OWN, SERVER = "personal_accuracy", "server_accuracy"
STUDIES: dict[str, dict[str, Published]] = {
    "fd": {
        "fd-2": Published("72.30"),
        "fd-6": Published("69.51"),
        "fd-10": Published("75.24"),
        "fl-2": Published("80.77"),
        "fl-6": Published("87.38"),
        "fl-10": Published("90.60"),
    },
    "fedgen": {
        "fedavg-0.1": Published("90.16 ± 0.59"),
        "fedprox-0.1": Published("90.10"),
        "feddistill-0.1": Published("64.11 ± 1.36"),
        "feddistill_plus-0.1": Published("90.28"),
        "feddfusion-0.1": Published("91.11 ± 0.43"),
        "fedgen-0.1": Published("93.03 ± 0.32"),
        "fedavg-1": Published("93.84 ± 0.25"),
        "fedprox-1": Published("93.83"),
        "feddistill-1": Published("79.88 ± 0.66"),
        "feddistill_plus-1": Published("94.73"),
        "feddfusion-1": Published("93.37 ± 0.40"),
        "fedgen-1": Published("95.52 ± 0.07"),
    },
    "fedproto": {
        "local-3": Published("94.05", OWN),
        "fedavg-3": Published("95.04", OWN),
        "fedproto-3": Published("97.13", OWN),
        "local-4": Published("93.35", OWN),
        "fedavg-4": Published("94.32", OWN),
        "fedproto-4": Published("96.80", OWN),
        "local-5": Published("92.92", OWN),
        "fedavg-5": Published("93.22", OWN),
        "fedproto-5": Published("96.70", OWN),
    },
    "cfd": {
        "32-32-0.1": Published("no figure", SERVER),
        "1-1-0.1": Published("no less than 32-32", SERVER),
        "32-32-100": Published("no figure", SERVER),
        "1-1-100": Published("at most 1 point less", SERVER),
    },
    "scarlet": {
        "dsfl": Published("no figure"),
        "scarlet-5": Published("about equal"),
        "scarlet-20": Published("about equal, up to half of the bytes less"),
    },
    "proxyfl": {
        "regular": Published("curves"),
        "fedavg": Published("curves"),
        "fml": Published("curves"),
        "proxyfl": Published("curves"),
        "joint": Published("curves"),
        "fedavg-dp": Published("curves"),
    },
    "heterogeneous": {
        "local": Published("no figure", OWN),
        "fml": Published("85.88 ± 0.08", OWN),
        "fedkd": Published("86.45 ± 0.10", OWN),
        "fd": Published("86.01 ± 0.31", OWN),
    },
}


def _of_each_client(runs: list[Mapping[int, int]]) -> float:
    """Return the bytes of a client in a run, in the mean over clients and runs."""
    return sum(sum(run.values()) / len(run) for run in runs) / len(runs)


def _shown(values: list[float], digits: int = 1) -> str:
    found = estimate(values, (0, 100))
    if found is None:
        return ""
    if found.low is None or found.high is None:
        return f"{found.mean:.{digits}f}"
    return f"{found.mean:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"


def table(study: Path) -> str:
    """Return the table of a study, whose folder has its name in `STUDIES`."""
    lines = [
        "| arm | published, % | ours, % (95 % interval) | seeds | bytes up | bytes down | s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    seconds = 0.0
    found = load_study(study)
    for arm, published in STUDIES[study.name].items():
        runs = [run for run in found.get(arm, []) if run.status == "finished"]
        if not runs:
            lines.append(f"| `{arm}` | {published.figure} | not run | 0 | | | |")
            continue
        up, down = (_of_each_client([getattr(run, way) for run in runs]) for way in WAYS)
        took = [run.seconds or 0.0 for run in runs]
        seconds += sum(took)
        measured = _shown([100 * float(run.last[published.key]) for run in runs])
        lines.append(
            f"| `{arm}` | {published.figure} | {measured} | {len(runs)} | {up:,.0f} | "
            f"{down:,.0f} | {sum(took) / len(took):.0f} |"
        )
    return "\n".join(lines) + f"\n\nSeconds of all rounds of these runs: {seconds:,.0f}.\n"
