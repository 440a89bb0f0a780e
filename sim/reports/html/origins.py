"""Where numbers come from: runs, machines, versions, sources, and how to have them again."""

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sim.keeping.records import SETTINGS_FILE
from sim.reports.html.tables import Table
from sim.reports.runs import STUDY_FILE, RunRecord, model_label, number
from sim.reports.terminal import NOTHING
from sim.settings.tables import dotted

_PACKAGES = "packages."


def run_table(runs: Mapping[str, Sequence[RunRecord]], folder: Path) -> Table:
    """List every run, those that do not count as well."""
    rows = []
    for arm, of_arm in runs.items():
        for run in of_arm:
            missing = sum(
                int((number(row, "participants") or 0) - (number(row, "replies") or 0))
                for row in run.federation
            )
            rows.append(
                [
                    arm,
                    relative_path(run.folder, folder),
                    str(run.result.get("status", run.status)),
                    str(run.seed),
                    f"{len(run.federation)} of {run.settings.get('rounds', NOTHING)}",
                    str(missing),
                    str(run.result.get("weights_sha256") or NOTHING)[:12],
                ]
            )
    header = ["arm", "folder", "status", "seed", "rounds", "replies missing", "weights (SHA-256)"]
    return Table(header, rows, left=3, caption="Every run")


def relative_path(path: Path, start: Path) -> str:
    """Return the way from one folder to another, where there is one."""
    try:
        return Path(os.path.relpath(path.resolve(), start.resolve())).as_posix()
    except ValueError:  # another drive
        return str(path)


def machines_of(environments: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return what runs ran on, by name; several values where runs differ."""
    return _told(environments, packages=False)


def versions_of(environments: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return the packages that runs ran with, by name; several versions where runs differ."""
    return _told(environments, packages=True)


def _told(environments: Iterable[Mapping[str, Any]], *, packages: bool) -> list[tuple[str, str]]:
    found: dict[str, dict[str, None]] = {}
    for environment in environments:
        for key, value in dotted(environment).items():
            if value is not None and key.startswith(_PACKAGES) == packages:
                name = key.removeprefix(_PACKAGES).replace("_", " ")
                found.setdefault(name, {})[str(value)] = None
    return [(name, " | ".join(values)) for name, values in found.items()]


def model_table(runs: Mapping[str, Sequence[RunRecord]]) -> Table | None:
    """Return the networks that learnt, by arm: how large they are and what trained them."""
    from sim.devices.effort import parameters  # it imports torch

    found: dict[tuple[str, str, str], dict[str, None]] = {}
    for arm, of_arm in runs.items():
        for run in of_arm:
            networks = run.result.get("networks")
            for network in networks if isinstance(networks, list) else ():
                label = model_label(network.get("model"))
                count = parameters(network)
                size = NOTHING if count is None else f"{count:,}"
                inputs = " x ".join(map(str, network.get("sides", ())))
                found.setdefault((label, inputs, size), {})[arm] = None
    if not found:
        return None
    backends: dict[str, dict[str, None]] = {}
    for run in (run for of_arm in runs.values() for run in of_arm):
        for model, names in run.backends.items():
            backends.setdefault(model, {}).update(dict.fromkeys(names))
    rows = [
        [
            label,
            "every arm" if len(arms) == len(runs) else ", ".join(arms),
            inputs,
            size,
            " | ".join(backends.get(label, {})) or NOTHING,
        ]
        for (label, inputs, size), arms in found.items()
    ]
    header = ["model", "of", "inputs", "parameters", "trained by"]
    return Table(header, rows, left=2, caption="Networks that learnt")


@dataclass(frozen=True, slots=True)
class Reference:
    """Where the idea of an algorithm comes from.

    Attributes:
        name: what settings call it.
        source: as its module's docstring says it, without its address.
        address: a web address; empty where there is none.
    """

    name: str
    source: str
    address: str


def references_of(runs: Mapping[str, Sequence[RunRecord]]) -> list[Reference]:
    """Return the sources of the algorithms that ran, as their modules name them.

    Algorithms of one's own are left out: reading a record runs nobody's code.
    """
    from strategies import STRATEGIES, strategy_class
    from strategies.contract.card import description_of

    names = dict.fromkeys(
        str(run.settings["strategy"]["name"]) for of_arm in runs.values() for run in of_arm
    )
    found = []
    for name in names:
        source = description_of(strategy_class(name)).source if name in STRATEGIES else ""
        if source:
            text, _, rest = source.partition("https://")
            address, *more = rest.split(maxsplit=1) or [""]
            ends = address.rstrip(".,;")
            text = " ".join([text.strip(), *more]).strip()
            found.append(Reference(name, text, f"https://{ends}" if ends else ""))
    return found


def commands_of(runs: Mapping[str, Sequence[RunRecord]], folder: Path) -> list[tuple[str, str]]:
    """Return what has the numbers again: a command, and what it does."""
    first = next(run for of_arm in runs.values() for run in of_arm)
    of_run = relative_path(first.folder, folder)
    settings = f"{of_run}/{SETTINGS_FILE}" if of_run != "." else SETTINGS_FILE
    folders = [relative_path(run.folder, folder) for of_arm in runs.values() for run in of_arm]
    given = ["."] if (folder / STUDY_FILE).is_file() else folders
    return [
        (
            f"fedkd run {shlex.quote(settings)}",
            "one run again; with the same code, libraries and kind of processor it has the same "
            "weights, digit for digit"
            + ("" if len(folders) == 1 else "; so has every other run of the list"),
        ),
        (f"fedkd report {shlex.join(given)}", "this page again, from the runs' folders"),
    ]
