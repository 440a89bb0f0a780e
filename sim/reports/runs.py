"""Run and study folders read back: everything a report knows comes from these files."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import ValidationError

from fedkd.models import ModelSettings
from sim.devices.effort import operations
from sim.keeping.parts import DamagedFileError
from sim.keeping.records import (
    EXCHANGE_FILE,
    METRICS_FILE,
    PEERS_FILE,
    RESULT_FILE,
    SETTINGS_FILE,
    SPLIT_FILE,
    is_charge,
    read_result,
    read_rows,
)
from sim.reports.grids import Grid
from sim.reports.power import PRECISION
from sim.server.observers import Row
from sim.settings import SettingsError
from sim.settings.tables import fill_in, read_yaml

STUDY_FILE = "study.json"
REPORT_OF = "study-"
"""Begins the name of a folder inside a study's that holds a report on other runs of it."""
ENVIRONMENT_FILE = "environment.json"
ATTACKS_FILE = "attacks.json"
"""What attacks on a run found; see `sim.attacks`."""
VALUE_FILE = "value.json"
"""What a run's clients are worth; see `sim.counterfactual`."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run as its folder tells it.

    Attributes:
        folder: where it was read from.
        arm: the name under which runs that differ only in their seed are averaged.
        seed: pairs the runs of different arms.
        settings: as resolved, plain values.
        status: ``finished``; or ``interrupted``, which includes failed and still going on.
        result: content of ``result.json``; empty if there is none.
        federation: the federation's row of each round.
        clients: the clients' rows of each round.
        server: rows of the server's model, where there is one.
        bytes_up, bytes_down: totals over the run for each client; 0 for a client that took no
            part.
        bits: under a budget the mean bits of a number, by direction.
        attacks: content of ``attacks.json``; empty if there is none.
        value: content of ``value.json``; empty if there is none.
        split: content of ``split.json``; empty if there is none.
        peers: content of ``peers.json``; empty if there is none.
        environment: content of ``environment.json``; empty if there is none.
    """

    folder: Path
    arm: str
    seed: int
    settings: Mapping[str, Any]
    status: str
    result: Mapping[str, Any]
    federation: tuple[Row, ...]
    clients: tuple[Row, ...]
    server: tuple[Row, ...]
    bytes_up: Mapping[int, int]
    bytes_down: Mapping[int, int]
    environment: Mapping[str, Any] = field(default_factory=dict)
    bits: Mapping[str, float] = field(default_factory=dict)
    attacks: Mapping[str, Any] = field(default_factory=dict)
    value: Mapping[str, Any] = field(default_factory=dict)
    split: Mapping[str, Any] = field(default_factory=dict)
    peers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def backends(self) -> dict[str, list[str]]:
        """What trained the clients of each model: ``loop``, ``vmap`` or both; empty if unknown."""
        told = self.result.get("backends")
        return (
            {str(model): [str(name) for name in names] for model, names in told.items()}
            if isinstance(told, dict) and all(isinstance(names, list) for names in told.values())
            else {}
        )

    @property
    def num_clients(self) -> int:
        """Registered clients, whether they took part or not."""
        return max(len(self.bytes_up), 1)

    @property
    def last(self) -> Row:
        """The federation's row of the last round that was judged; empty if none was."""
        known = self.result.get("last")
        if known:
            return dict(known)
        judged = [row for row in self.federation if number(row, "accuracy") is not None]
        return judged[-1] if judged else {}

    @property
    def selected(self) -> Row:
        """The federation's row of the round with the best mean validation accuracy.

        The earliest of equals; empty if there is none. The test split has no say in it. Under a
        mechanism of privacy no round is selected: no guarantee covers validation rows.
        """
        if self.protected:
            return {}
        known = self.result.get("selected")
        if known:
            return dict(known)
        best: Row = {}
        highest = -math.inf
        for row in self.federation:
            value = number(row, "validation_accuracy")
            if value is not None and value > highest:
                best, highest = row, value
        return best

    @property
    def protected(self) -> bool:
        """Whether a mechanism of privacy was asked for."""
        privacy = self.settings.get("privacy")
        mechanism = privacy.get("mechanism") if isinstance(privacy, dict) else None
        return isinstance(mechanism, dict) and mechanism.get("kind", "none") != "none"

    @property
    def privacy(self) -> Row:
        """What was promised and spent, as ``result.json`` says; empty where nothing is known."""
        told = self.result.get("privacy")
        return dict(told) if isinstance(told, dict) else {}

    @property
    def epsilon(self) -> float | None:
        """The largest that any client has spent; None where nothing was promised, or nobody knows.

        Accountants report infinity where they find no bound, which is no number to show.
        """
        return number(self.privacy, "epsilon")

    @property
    def last_clients(self) -> tuple[Row, ...]:
        """The rows of the clients that were judged in the last judged round."""
        return tuple(
            row
            for row in self.clients
            if row["round"] == self.last.get("round") and number(row, "accuracy") is not None
        )

    @property
    def seconds(self) -> float | None:
        """Wall time of the rounds."""
        total = number(self.result, "seconds")
        if total is not None:
            return total
        spent = [value for row in self.federation if (value := number(row, "seconds")) is not None]
        return sum(spent) if spent else None

    def effort(self, name: str, *whose: str) -> float | None:
        """Return the steps or rows that learning took over the whole run; None if unknown.

        Args:
            name: ``steps`` or ``rows``.
            whose: ``client`` and ``server``; both by default.
        """
        keys = [f"{each}_{name}" for each in whose or ("client", "server")]
        known = [number(row, key) for row in self.federation for key in keys if key in row]
        return math.fsum(value for value in known if value is not None) if known else None

    @property
    def gflops(self) -> float | None:
        """10^9 operations that learning took, of all networks; None if they cannot be counted.

        Computed where it is asked for: torch's counter takes seconds to load.
        """
        networks = self.result.get("networks")
        if not isinstance(networks, list) or not networks:
            return None
        total = operations(self.federation, networks)
        return None if total is None else total / 1e9

    @property
    def simulated_s(self) -> float | None:
        """What the simulated clock showed at the end; None without one."""
        return number(self.federation[-1], "simulated_s") if self.federation else None

    @property
    def target_accuracy(self) -> float | None:
        """What ``clock.target_accuracy`` is."""
        clock = self.settings.get("clock")
        return number(clock, "target_accuracy") if isinstance(clock, dict) else None

    @property
    def simulated_s_to_target(self) -> float | None:
        """What the clock showed when the mean client first had the target accuracy.

        At the end of the round, on the test split; None where it never had it.
        """
        target = self.target_accuracy
        if target is None:
            return None
        for row in self.federation:
            accuracy = number(row, "accuracy")
            if accuracy is not None and accuracy >= target:
                return number(row, "simulated_s")
        return None

    @property
    def model_labels(self) -> tuple[str, ...]:
        """A short text for the architecture of each client."""
        labels = [model_label(model) for model in self.settings["clients"]["models"]]
        return tuple(labels[client % len(labels)] for client in range(self.num_clients))


def number(row: Mapping[str, Any], key: str) -> float | None:
    """Return a finite number of a row, or None where it is missing, null or not finite."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def model_label(model: Any) -> str:
    """Name an entry of ``clients.models``: the model and the options that are not defaults."""
    try:
        return ModelSettings.model_validate(model).label
    except ValidationError:
        # A run of another version, or with a model of the user's own that is not installed here.
        return json.dumps(model, ensure_ascii=False) if not isinstance(model, str) else model


def load_run(folder: Path, arm: str | None = None) -> RunRecord:
    """Read a run folder, finished or not.

    Args:
        folder: holds ``settings.yaml``, ``metrics.jsonl`` and ``exchange.jsonl``.
        arm: by default the study's arm if the run is part of a study, else the strategy's name.

    Raises:
        SettingsError: names the folder, if it is not a run folder or a file in it is damaged.
    """
    settings = _read_settings(folder)
    try:
        seed = int(settings["seed"])
        strategy = str(settings["strategy"]["name"])
        count = int(settings["clients"]["count"])
        models = settings["clients"]["models"]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(folder, SETTINGS_FILE, f"{type(error).__name__}: {error}") from None
    if not isinstance(models, list) or not models:
        raise _damaged(folder, SETTINGS_FILE, "clients.models must name models")
    metrics = _read_jsonl(folder, METRICS_FILE, ("round", "scope"))
    exchanged = _read_jsonl(folder, EXCHANGE_FILE, ("round", "client", "direction", "bytes"))
    try:
        result = read_result(folder, rows=True)
    except DamagedFileError as error:
        raise _damaged(folder, error.path.name, error.reason) from None
    for key in ("last", "selected"):
        if not isinstance(result.get(key, {}), dict):
            raise _damaged(folder, RESULT_FILE, f"{key!r} is not a table")
    totals = {direction: dict.fromkeys(range(count), 0) for direction in ("up", "down")}
    for row in exchanged:
        if row["direction"] not in totals:
            raise _damaged(folder, EXCHANGE_FILE, f"direction {row['direction']!r}")
        of_clients = totals[row["direction"]]
        of_clients[row["client"]] = of_clients.get(row["client"], 0) + row["bytes"]
    bits: dict[str, list[float]] = {}
    for row in exchanged:
        if (found := number(row, "bits")) is not None:
            bits.setdefault(row["direction"], []).append(found)
    scopes = {
        scope: tuple(row for row in metrics if row["scope"] == scope)
        for scope in ("federation", "client", "server")
    }
    return RunRecord(
        folder=folder,
        arm=arm if arm is not None else _study_arm(folder) or strategy,
        seed=seed,
        settings=settings,
        status="finished" if result.get("status") == "finished" else "interrupted",
        result=result,
        federation=scopes["federation"],
        clients=scopes["client"],
        server=scopes["server"],
        bytes_up=totals["up"],
        bytes_down=totals["down"],
        environment=_read_json(folder, ENVIRONMENT_FILE),
        bits={direction: fmean(found) for direction, found in bits.items()},
        attacks=_read_json(folder, ATTACKS_FILE),
        value=_read_json(folder, VALUE_FILE),
        split=_read_json(folder, SPLIT_FILE),
        peers=_read_json(folder, PEERS_FILE),
    )


def load_study(folder: Path) -> dict[str, list[RunRecord]]:
    """Read the runs of a study by arm, in the order of the study.

    Raises:
        SettingsError: names the folder, if it is not a study folder, a file in it is damaged, or
            one of its runs is missing.
    """
    table = _read_json(folder, STUDY_FILE)
    if not table:
        raise SettingsError(f"{str(folder)!r} is not a study folder: it has no {STUDY_FILE}")
    arms = table.get("arms")
    if not isinstance(arms, dict) or not arms:
        raise _damaged(folder, STUDY_FILE, "'arms' must be a table with at least one arm")
    runs: dict[str, list[RunRecord]] = {}
    for arm, paths in arms.items():
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise _damaged(folder, STUDY_FILE, f"arm {arm!r} must be a list of run folders")
        for path in paths:
            if not (folder / path).resolve().is_relative_to(_study_root(folder)):
                raise _damaged(folder, STUDY_FILE, f"{path!r} lies outside the study")
        runs[arm] = [load_run(folder / path, arm) for path in paths]
    return runs


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedArms:
    """The runs of a folder by arm, and how its study lays them out.

    Attributes:
        name: of the study or the run.
        runs: of each arm.
        baseline: the arm that the study compares its others with; None where it names none.
        precision: the half width of an interval that the study wants, a share.
        grid: how the arms of a sweep lie side by side.
    """

    name: str
    runs: Mapping[str, Sequence[RunRecord]]
    baseline: str | None = None
    precision: float = PRECISION
    grid: Grid | None = None


def load_arms(folder: Path) -> LoadedArms:
    """Read a study folder, or a run folder as a study of one arm.

    Raises:
        SettingsError: names the folder, if it is neither or damaged.
    """
    if (folder / SETTINGS_FILE).is_file():
        run = load_run(folder)
        return LoadedArms(name=str(run.settings.get("name", run.arm)), runs={run.arm: [run]})
    runs = load_study(folder)
    name = _read_json(folder, STUDY_FILE).get("name")
    return LoadedArms(
        name=name if isinstance(name, str) else folder.resolve().name,
        runs=runs,
        baseline=study_baseline(folder),
        precision=study_precision(folder),
        grid=study_grid(folder),
    )


def study_precision(folder: Path) -> float:
    """Return the half width of an interval that a study wants, a share."""
    return number(_read_json(folder, STUDY_FILE), "precision") or PRECISION


def study_notes(folder: Path) -> tuple[str, ...]:
    """Return what a reader of a study's tables has to know, a sentence each."""
    notes = _read_json(folder, STUDY_FILE).get("notes", [])
    if not isinstance(notes, list):
        raise _damaged(folder, STUDY_FILE, "'notes' must be a list of sentences")
    return tuple(map(str, notes))


def study_baseline(folder: Path) -> str | None:
    """Return the arm that a study compares its others with, where its file names one."""
    baseline = _read_json(folder, STUDY_FILE).get("baseline")
    return baseline if isinstance(baseline, str) else None


def study_matched(folder: Path) -> tuple[str, str] | None:
    """Return what the arms of a study were made equal in, and to which; None if in nothing."""
    match = _read_json(folder, STUDY_FILE).get("match")
    if not isinstance(match, dict):
        return None
    return str(match.get("budget")), str(match.get("reference"))


def study_refused(folder: Path) -> dict[str, str]:
    """Return the reason of each arm of a study that could not run."""
    refused = _read_json(folder, STUDY_FILE).get("refused", {})
    if not isinstance(refused, dict):
        raise _damaged(folder, STUDY_FILE, "'refused' must be a table of arms")
    return {str(arm): str(reason) for arm, reason in refused.items()}


def study_grid(folder: Path) -> Grid | None:
    """Return how the arms of a study lie side by side, where they come from a sweep."""
    row = _read_json(folder, STUDY_FILE).get("grid")
    try:
        return None if row is None else Grid.of_row(row)
    except ValueError as error:
        raise _damaged(folder, STUDY_FILE, error) from None


def study_families(folder: Path) -> dict[str, list[str]]:
    """Return the arms of a study that belong to one question, by its name."""
    families = _read_json(folder, STUDY_FILE).get("families", {})
    if not isinstance(families, dict) or not all(
        isinstance(arms, list) for arms in families.values()
    ):
        raise _damaged(folder, STUDY_FILE, "'families' must be a table of lists of arms")
    return {str(name): [str(arm) for arm in arms] for name, arms in families.items()}


def _study_root(folder: Path) -> Path:
    """Return the folder that holds a study's runs: a report on others of them lies inside it."""
    folder = folder.resolve()
    return folder.parent if folder.name.startswith(REPORT_OF) else folder


def _study_arm(folder: Path) -> str | None:
    """Return the arm under which the study two folders up lists this run."""
    study = folder.resolve().parent.parent
    try:
        arms = _read_json(study, STUDY_FILE).get("arms")
    except SettingsError:
        # Somebody else's file is no reason to refuse a run that is whole.
        return None
    for arm, paths in arms.items() if isinstance(arms, dict) else ():
        if isinstance(paths, list) and any(
            isinstance(path, str) and (study / path).resolve() == folder.resolve() for path in paths
        ):
            return str(arm)
    return None


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise SettingsError(
            f"{str(folder)!r} is not a run folder: it has no {SETTINGS_FILE}"
            + (
                ""
                if folder.is_dir()
                else " (no such folder; of a study, the study's command makes a lost run again)"
            )
        )
    try:
        return fill_in(read_yaml(path, fast=True))
    except ValueError as error:
        raise _damaged(folder, SETTINGS_FILE, error) from None


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a table; empty where there is no such file."""
    path = folder / name
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(folder, name, error) from None
    if not isinstance(table, dict):
        raise _damaged(folder, name, "it is not a table")
    return table


def _read_jsonl(folder: Path, name: str, keys: tuple[str, ...]) -> list[Row]:
    path = folder / name
    if not path.is_file():
        raise SettingsError(f"{str(folder)!r} is not a run folder: it has no {name}")
    try:
        rows = [row for row in read_rows(path) if not is_charge(row)]
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(folder, name, error) from None
    texts = ("scope", "direction")
    for row in rows:
        if not isinstance(row, dict) or not all(
            isinstance(row.get(key), str if key in texts else int) for key in keys
        ):
            raise _damaged(folder, name, f"a row lacks {', '.join(keys)}")
        if row.get("scope") == "client" and not isinstance(row.get("client"), int):
            raise _damaged(folder, name, "a client's row lacks client")
    return rows


def _damaged(folder: Path, name: str, reason: object) -> SettingsError:
    return SettingsError(
        f"{name} in run or study folder {str(folder)!r} is damaged: {' '.join(str(reason).split())}"
    )
