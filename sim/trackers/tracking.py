"""What a run tells its trackers: each round once, when it is final, resumed or not.

How far each tracker is stands in the run's folder. So a run that goes on, in whatever process, goes
on in the tracker's run; rounds that are run again are not told again, and what a tracker has missed
is told from the folder's rows.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedkd.data import FederatedData
from sim.keeping.records import METRICS_FILE, federated_row, iterate_rows, to_json, write_text
from sim.server.observers import Observer, Row, event_words
from sim.settings import Settings, SettingsError
from sim.settings.tables import dotted
from sim.trackers.base import Tracked, Tracker, TrackerRun

TRACKERS_FILE = "trackers.json"
"""In a run's folder: by the kind of tracker, its name of the run and the last round told."""


def check_trackers(settings: Settings, *, nodes: bool = False) -> None:
    """See before anything runs whether the trackers can be used.

    Args:
        settings: of the run.
        nodes: whether clients are nodes of Flower's own runtimes.

    Raises:
        ValueError: names what is missing.
    """
    if nodes and settings.trackers:
        raise ValueError("trackers need fedkd run; Flower's own runtimes have their own logs")
    for tracker in settings.trackers:
        tracker.check()


def tracking_of(
    folder: Path, settings: Settings, tell: Callable[[Row], None]
) -> Sequence["Tracking"]:
    """Return what tells a run's trackers; nothing where nobody asked for any.

    Args:
        folder: of the run.
        settings: of the run.
        tell: is told of a tracker that fails, as an event.
    """
    return [Tracking(folder, settings, tell)] if settings.trackers else []


class Tracking(Observer):
    """Tells the trackers of a run.

    A tracker that fails is left, with an event: a run of hours shall not end for it.
    """

    def __init__(self, folder: Path, settings: Settings, tell: Callable[[Row], None]) -> None:
        self._folder = folder
        self._settings = settings
        self._tell = tell
        self._open: dict[str, tuple[Tracker, TrackerRun]] = {}
        self._told = _read(folder / TRACKERS_FILE)
        self._rows: list[Row] = []
        self._events: list[Row] = []
        self._round = 0

    def started(self, settings: Settings, data: FederatedData) -> None:
        """Open the trackers' runs.

        Raises:
            SettingsError: names the tracker that cannot be opened.
        """
        for tracker in self._settings.trackers:
            known = self._told.setdefault(tracker.kind, {"known_as": None, "round": 0})
            try:
                run = tracker.open(tracked(self._folder, self._settings, known["known_as"]))
            except Exception as error:
                reason = " ".join(str(error).split())
                raise SettingsError(
                    f"trackers: {tracker.kind} cannot be opened: {reason}"
                ) from error
            known["known_as"] = run.known_as
            self._open[tracker.kind] = tracker, run
        self._save()

    def returned(self, round: int) -> None:
        """The run goes on after a round: what was told of later ones is told no second time."""
        self._rows, self._events, self._round = [], [], round
        behind = min((self._told[kind]["round"] for kind in self._open), default=round)
        if behind >= round:
            return
        missed: dict[int, list[Row]] = {}
        for row in iterate_rows(self._folder / METRICS_FILE, federated_row):
            if behind < row["round"] <= round:
                missed.setdefault(row["round"], []).append(row)
        for number, rows in sorted(missed.items()):
            self._log(number, rows, [])

    def metrics(self, rows: Sequence[Row]) -> None:
        """A round was measured; until it is complete it may be run again."""
        self._rows = list(rows)

    def event(self, row: Row) -> None:
        """Something happened."""
        self._events.append(row)

    def completed(self, round: int) -> None:
        """The round is over for good."""
        self._log(round, self._rows, self._events)
        self._rows, self._events, self._round = [], [], round

    def close(self, result: Row) -> None:
        """Write how the run ended, and close the trackers.

        Args:
            result: what ``result.json`` says.
        """
        plain = json.loads(to_json(result))
        late = [event_words(row) for row in self._events]

        def end(_: Tracker, run: TrackerRun) -> None:
            if late:
                run.note(self._round, late)
            run.finish(plain["status"], plain)

        self._each(end)
        self._open.clear()

    def _log(self, round: int, rows: Sequence[Row], events: Sequence[Row]) -> None:
        lines = [event_words(row) for row in events]

        def log(tracker: Tracker, run: TrackerRun) -> None:
            known = self._told[tracker.kind]
            if round > known["round"]:
                run.log(round, dict(measured(rows, clients=tracker.clients)))
                if lines:
                    run.note(round, lines)
                known["round"] = round

        self._each(log)
        self._save()

    def _each(self, do: Callable[[Tracker, TrackerRun], None]) -> None:
        for kind, (tracker, run) in list(self._open.items()):
            try:
                do(tracker, run)
            except Exception as error:
                del self._open[kind]
                reason = f"{kind}: {type(error).__name__}: {' '.join(str(error).split())}"
                self._tell({"round": self._round, "event": "tracker failed", "reason": reason})

    def _save(self) -> None:
        write_text(self._folder / TRACKERS_FILE, to_json(self._told, indent=1) + "\n")


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Return how far trackers are; where that cannot be read they begin anew."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(kind): {"known_as": str(own["known_as"]), "round": int(own["round"])}
            for kind, own in table.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def tracked(folder: Path, settings: Settings, known_as: str | None) -> Tracked:
    """Say which run this is; of a study's run its folder tells the arm."""
    study = (settings.output / settings.name).resolve()
    above = folder.resolve().parent
    return Tracked(
        folder=folder,
        output=settings.output,
        name=settings.name,
        arm=above.name if above.parent == study else "",
        seed=settings.seed,
        settings=dotted(settings.to_table()),
        known_as=known_as,
    )


def measured(rows: Iterable[Mapping[str, Any]], *, clients: bool) -> Iterator[tuple[str, float]]:
    """Yield the finite numbers of a round by the names that trackers group them by.

    Args:
        rows: of ``metrics.jsonl``.
        clients: whether those of single clients are among them.
    """
    for row in rows:
        scope = row["scope"]
        if scope == "client" and not clients:
            continue
        # Of several models of a server all but the first say which they are.
        model = f"{row['model']}/" if scope == "server" and "model" in row else ""
        for key, value in row.items():
            if key in ("round", "client") or isinstance(value, bool | str):
                continue
            if value is not None and math.isfinite(value):
                is_client = scope == "client"
                name = f"client_{key}/{row['client']}" if is_client else f"{scope}/{model}{key}"
                yield name, float(value)
