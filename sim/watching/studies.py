"""A study, or a single run, at one moment: what its folder says of all its runs."""

import json
import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sim.keeping.plans import PLAN_FILES, holder
from sim.keeping.records import SETTINGS_FILE
from sim.reports.distillation import is_distillation
from sim.reports.runs import REPORT_OF, STUDY_FILE
from sim.server.observers import Row, event_words
from sim.settings import SettingsError
from sim.settings.tables import read_yaml
from sim.watching.runs import Point, RunFollower, RunSight

Condition = Literal["running", "finished", "stopped"]

MOST_POINTS = 100
"""Of a longer curve so many points are told."""

MOST_EVENTS = 50
"""The last so many events are told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """A study or a run at one moment.

    Attributes:
        name: of the study, or of the run.
        folder: of the study, or of the run.
        is_study: whether it is a study.
        runs: in the order of the study's arms, by seed.
        held: whether some process works on it.
        events: what happened that is worth knowing, a line each, in the order in which it was seen.
        refused: arms that could not run, each with the reason.
    """

    name: str
    folder: Path
    is_study: bool
    runs: Sequence[RunSight]
    held: bool
    events: Sequence[str] = ()
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def condition(self) -> Condition:
        """What becomes of it; a study is finished when all its runs are."""
        if all(run.status == "finished" for run in self.runs):
            return "finished"
        running = self.held or any(run.status == "running" for run in self.runs)
        return "running" if running else "stopped"

    @property
    def arms(self) -> dict[str, list[RunSight]]:
        """The runs of each arm."""
        arms: dict[str, list[RunSight]] = {}
        for run in self.runs:
            arms.setdefault(run.arm, []).append(run)
        return arms

    @property
    def finished(self) -> int:
        """How many runs are finished."""
        return sum(run.status == "finished" for run in self.runs)

    @property
    def done(self) -> int:
        """Rounds of all runs together that are over."""
        return self.rounds - sum(run.left for run in self.runs)

    @property
    def rounds(self) -> int:
        """Rounds of all runs together."""
        return sum(run.rounds for run in self.runs)

    @property
    def seconds_left(self) -> float | None:
        """About how long it takes until all runs are over; see `seconds_left`."""
        return seconds_left(self.runs) if self.condition == "running" else None

    def told(self) -> str:
        """Say in a line how far it is."""
        if self.is_study:
            parts = [f"{self.finished} of {len(self.runs)} runs finished"]
        else:
            parts = [f"{self.done} of {self.rounds} rounds"]
        if self.condition == "running":
            left = self.seconds_left
            parts.append("time left not known yet" if left is None else f"{duration(left)} left")
        return ", ".join([self.condition, *parts])

    def ended(self) -> str:
        """Say what happened to what is not finished, and how to go on; empty where it is."""
        if self.condition != "stopped":
            return ""
        if not self.is_study:
            (run,) = self.runs
            return (
                f"{self.folder}: {run.status} after round {run.done} of {run.rounds}, and no "
                f"process here works on it; fedkd run --resume {self.folder} goes on"
            )
        kinds = Counter(run.status for run in self.runs if run.status != "finished")
        which = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        return (
            f"{self.folder}: {len(self.runs) - self.finished} of {len(self.runs)} runs are not "
            f"finished ({which}), and no process here works on them; the same fedkd compare goes on"
        )

    def to_row(self) -> Row:
        """Return it as plain values."""
        return {
            "name": self.name,
            "folder": str(self.folder),
            "kind": "study" if self.is_study else "run",
            "status": self.condition,
            "told": self.told(),
            "runs_finished": self.finished,
            "runs": len(self.runs),
            "rounds_done": self.done,
            "rounds": self.rounds,
            "seconds_left": self.seconds_left,
            "arms": [
                {
                    "arm": arm,
                    "accuracy": mean_accuracy(runs),
                    "curve": thinned(mean_curve(runs)),
                    "runs": [_run_row(run) for run in runs],
                }
                for arm, runs in self.arms.items()
            ],
            "refused": dict(self.refused),
            "events_in_all": len(self.events),
            "events": list(self.events[-MOST_EVENTS:]),
        }


def _run_row(run: RunSight) -> Row:
    return {
        "seed": run.seed,
        "status": run.status,
        "round": run.done,
        "rounds": run.rounds,
        "accuracy": run.accuracy,
        "seconds": run.seconds,
        "quiet_s": run.quiet_s,
        "curve": thinned(run.curve),
    }


def seconds_left(runs: Sequence[RunSight]) -> float | None:
    """Estimate how long the rounds that are left take; None before any round is over.

    Rounds of an arm take what its rounds took so far, those of an arm that has not begun what the
    mean round took; a run that begins takes what finished ones took beside their rounds. Runs
    share the time by how many run at once now.
    """
    spent: dict[str, tuple[float, int]] = {}
    for run in runs:
        seconds, rounds = spent.get(run.arm, (0.0, 0))
        spent[run.arm] = seconds + run.seconds, rounds + len(run.measured)
    known = {arm: seconds / rounds for arm, (seconds, rounds) in spent.items() if rounds}
    if not known:
        return None
    mean = statistics.fmean(known.values())
    around = [run.around_s for run in runs if run.status == "finished"]
    beside = statistics.median(around) if around else 0.0
    left = math.fsum(
        run.left * known.get(run.arm, mean) + beside * (run.status != "running")
        for run in runs
        if run.status != "finished"
    )
    return left / max(sum(run.status == "running" for run in runs), 1)


def mean_accuracy(runs: Iterable[RunSight]) -> float | None:
    """Return the mean over runs of the last accuracy; None before any was judged."""
    known = [run.accuracy for run in runs if run.accuracy is not None]
    return statistics.fmean(known) if known else None


def mean_curve(runs: Iterable[RunSight]) -> list[Point]:
    """Return for each judged round the mean over the runs that have come so far."""
    by_round: dict[int, list[float]] = {}
    for run in runs:
        for round, accuracy in run.curve:
            by_round.setdefault(round, []).append(accuracy)
    return [(round, statistics.fmean(values)) for round, values in sorted(by_round.items())]


def thinned(curve: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return at most so many points of a curve, evenly spread, the first and the last among them.

    Args:
        curve: points by round.
        most: >= 2.
    """
    if len(curve) <= most:
        return list(curve)
    step = (len(curve) - 1) / (most - 1)
    return [curve[round(place * step)] for place in range(most)]


def duration(seconds: int | float) -> str:
    """Write a time: ``about 40 s``, ``about 12 min``, ``about 3 h 20 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"about {max(whole, 1)} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"about {minutes} min"
    return f"about {minutes // 60} h {minutes % 60} min"


@dataclass(frozen=True, slots=True)
class _Planned:
    """A run that a study's folder speaks of."""

    arm: str
    seed: int
    folder: Path
    rounds: int


class Follower:
    """Looks at a study's or a run's folder again and again; see `Sight`.

    Args:
        folder: of a study, also one that has only just begun, or of a run.

    Raises:
        SettingsError: it is no such folder, or a file in it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._followers: dict[_Planned, RunFollower] = {}
        self._events: list[str] = []
        self._seen: dict[Path, int] = {}
        self._is_study = not (folder / SETTINGS_FILE).is_file()
        if is_distillation(folder):
            raise SettingsError(
                f"{str(folder)!r} is the folder of a distillation; watched are federations: runs "
                "of fedkd run and studies of fedkd compare"
            )
        self.look()

    def look(self) -> Sight:
        """Return what the folder tells now."""
        now = time.time()
        plans = sorted(self._folder.glob(PLAN_FILES)) if self._is_study else []
        held = [plan for plan in plans if holder(plan) is not None]
        planned, refused = self._planned(plans, held)
        followers = {
            run: self._followers.get(run)
            or RunFollower(arm=run.arm, seed=run.seed, folder=run.folder, rounds=run.rounds)
            for run in planned
        }
        self._followers = followers
        runs = tuple(follower.look(now) for follower in followers.values())
        self._note_events(runs)
        return Sight(
            name=self._folder.resolve().name,
            folder=self._folder,
            is_study=self._is_study,
            runs=runs,
            held=bool(held),
            events=tuple(self._events),
            refused=refused,
        )

    def _note_events(self, runs: Sequence[RunSight]) -> None:
        """Add what is new to what was seen; of a run that was cut back all is new."""
        if any(len(run.events) < self._seen.get(run.folder, 0) for run in runs):
            self._events, self._seen = [], {}
        for run in runs:
            new = run.events[self._seen.get(run.folder, 0) :]
            self._events += [f"{run.label}, {event_words(row)}" for row in new]
            self._seen[run.folder] = len(run.events)

    def _planned(
        self, plans: Sequence[Path], held: Sequence[Path]
    ) -> tuple[list[_Planned], dict[str, str]]:
        """Return the runs that there are or are going to be, and arms that were refused."""
        if not self._is_study:
            return [_of_settings(self._folder, None)], {}
        ended = [*self._folder.glob(STUDY_FILE), *self._folder.glob(f"{REPORT_OF}*/{STUDY_FILE}")]
        # What is running; else what was begun last; else all runs, of whatever study.
        newest = sorted([*ended, *plans], key=_time_of)[-1:]
        runs: dict[Path, _Planned] = {}
        refused: dict[str, str] = {}
        for path in held or newest:
            table = _read_table(path)
            refused |= {str(arm): str(why) for arm, why in table.get("refused", {}).items()}
            runs |= {run.folder: run for run in _runs_of(path, table, self._folder)}
        if not runs:
            there = sorted(self._folder.glob(f"*/seed-*/{SETTINGS_FILE}"))
            runs = {path.parent: _of_settings(path.parent, path.parts[-3]) for path in there}
        if not runs:
            raise SettingsError(_what_else(self._folder))
        by_arm = list(dict.fromkeys(run.arm for run in runs.values()))
        return sorted(runs.values(), key=lambda run: (by_arm.index(run.arm), run.seed)), refused


def _time_of(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _read_table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        # The command that comes next has removed it.
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"{path} is damaged: {' '.join(str(error).split())}") from None
    if not isinstance(table, dict) or not isinstance(table.get("refused", {}), dict):
        raise SettingsError(f"{path} is damaged: it is not the table of a study")
    return table


def _runs_of(path: Path, table: Mapping[str, Any], study: Path) -> Iterator[_Planned]:
    """Yield the runs in a plan, or in a ``study.json``, which only names their folders."""
    known: list[_Planned] = []
    lost: list[tuple[str, Path]] = []
    try:
        for arm, of_arm in table.get("arms", {}).items():
            for run in of_arm:
                told = run if isinstance(run, dict) else {"folder": run}
                folder = path.parent / told["folder"]
                if not folder.resolve().is_relative_to(study.resolve()):
                    raise SettingsError(f"{path} is damaged: {folder} lies outside the study")
                if "rounds" in told:
                    known.append(_Planned(arm, int(told["seed"]), folder, int(told["rounds"])))
                elif folder.is_dir():
                    known.append(_of_settings(folder, arm))
                else:
                    lost.append((arm, folder))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    yield from known
    for arm, folder in lost:
        # The study makes it again; until then it is one of its runs, as long as those beside it.
        seed = _SEED.match(folder.name)
        rounds = {run.arm: run.rounds for run in reversed(known)}
        if seed is None or not known:
            yield _of_settings(folder, arm)  # which says what is wrong
        else:
            yield _Planned(arm, int(seed[1]), folder, rounds.get(arm, known[0].rounds))


_SEED = re.compile(r"seed-(\d{1,9})")


def _of_settings(folder: Path, arm: str | None) -> _Planned:
    """Read from a run's settings what a plan says of it."""
    try:
        settings = read_yaml(folder / SETTINGS_FILE, fast=True)
        strategy = settings["strategy"]["name"]
        return _Planned(arm or strategy, int(settings["seed"]), folder, int(settings["rounds"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"{folder} cannot be read as the folder of a run: {reason}") from None


def _what_else(folder: Path) -> str:
    """Say why there is nothing to watch."""
    if not folder.is_dir():
        return f"{str(folder)!r}: there is no such folder"
    runs = sorted(folder.glob(f"*/{SETTINGS_FILE}"))
    if runs:
        return f"{str(folder)!r} is a folder of runs; the newest: fedkd watch {runs[-1].parent}"
    return (
        f"{str(folder)!r} is neither a study's folder, with plans or runs in it, nor a run's, "
        f"which has a {SETTINGS_FILE}"
    )
