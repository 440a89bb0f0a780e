"""`compare --dry-run`: what a study will run, how long that takes and what clients will exchange.

Runs that are finished tell what such a run costs. Of other arms the first two rounds are tried in
this process, without a trace on the disk: the first carries what happens before the others, such as
a teacher's training, the second stands for all that follow. Bytes are those of the trial, so they
are exact where an algorithm's payloads do not change with the rounds.
"""

import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np

from sim.commands.arms import Study
from sim.commands.matching import matched
from sim.commands.packing import saved_s
from sim.commands.planned import PlannedRun
from sim.commands.study import StudyPlan, baseline_arm, plan_study
from sim.commands.trials import RunCost, try_out
from sim.engine.resources import available_cpus
from sim.keeping.identity import fingerprint
from sim.keeping.records import SETTINGS_FILE, is_finished, read_result
from sim.reports.tables import kilobytes
from sim.reports.terminal import NOTHING, Column, FittedTable
from sim.server.observers import Row
from sim.settings import Settings
from sim.settings.tables import read_yaml

MOST_TRIED = 12
"""Of more distinct arms a sample is tried, at least one of each kind."""

TRIAL_S = 60.0
"""After so many seconds of trials no further arm is tried."""

AROUND_S = 0.3
"""Seconds of a run beside its rounds: its folder, a last checkpoint, a digest of all weights."""

REPORT_S = 2.0
"""Seconds until the report is drawn, once in a study."""

RAY_S = 18.0
"""Seconds until Ray and its workers are there, and until they are gone, once in a study.

This and the two above were measured with two cores and two workers.
"""


@dataclass(frozen=True, slots=True)
class ArmEstimate:
    """What is left of an arm.

    Attributes:
        arm: its name.
        left: runs that are not finished.
        finished: runs that are finished already.
        cost: of one run; None where nobody knows: no arm of its kind was tried in time.
        source: where that is from: ``trial``; ``finished``: the arm's own runs; ``like``: the mean
            of arms of its kind that were tried; empty where nothing is left or known.
        refused: why it cannot run; empty where it can.
    """

    arm: str
    left: int
    finished: int
    cost: RunCost | None = None
    source: str = ""
    refused: str = ""


@dataclass(frozen=True, slots=True)
class StudyOutlook:
    """What a study will take.

    Attributes:
        plan: what will run.
        arms: a row for each, refused ones too.
        workers: that the time is for: of Ray, or processes that make whole runs.
        once_s: seconds that a study takes once, beside its runs.
        packed: arms whose runs are made several at a time.
        tried: how many arms were tried.
        distinct: how many arms there were to try.
        notes: what the figures leave out, a sentence each.
    """

    plan: StudyPlan
    arms: Sequence[ArmEstimate]
    workers: int
    once_s: float
    packed: frozenset[str]
    tried: int
    distinct: int
    notes: Sequence[str]

    @property
    def unknown(self) -> list[str]:
        """Arms that nothing is known of."""
        return [arm.arm for arm in self.arms if arm.left and arm.cost is None]

    @property
    def total(self) -> RunCost:
        """All runs that are left together, as far as they are known."""
        known = [(arm.left, arm.cost) for arm in self.arms if arm.cost is not None]
        runs_left = any(arm.left for arm in self.arms)
        together_s, alone_s = (
            sum(
                arm.left * arm.cost.seconds
                for arm in self.arms
                if arm.cost is not None and (arm.arm in self.packed) is packed
            )
            for packed in (True, False)
        )
        # What does not save time is made one after the other.
        together_s -= max(saved_s(together_s, self.plan.division.processes), 0.0)
        return RunCost(
            together_s + alone_s + self.once_s * runs_left,
            sum(left * cost.bytes_up for left, cost in known),
            sum(left * cost.bytes_down for left, cost in known),
        )

    def to_row(self) -> Row:
        """Return it as plain values."""
        total = self.total
        return {
            "folder": str(self.plan.folder),
            "seeds": self.plan.seeds,
            "baseline": self.plan.baseline,
            "runs": len(self.plan.study.arms) * self.plan.seeds,
            "combinations": self.plan.study.combinations,
            "left": len(self.plan.left),
            "finished": self.plan.finished,
            "refused": dict(self.plan.refused),
            **({"match": matching.to_row()} if (matching := self.plan.study.matching) else {}),
            "seconds": total.seconds,
            "bytes_up": round(total.bytes_up),
            "bytes_down": round(total.bytes_down),
            "workers": self.workers,
            "tried": self.tried,
            "distinct": self.distinct,
            "arms": [
                {
                    "arm": each.arm,
                    "left": each.left,
                    "finished": each.finished,
                    "seconds": None if each.cost is None else each.cost.seconds,
                    "bytes_up": None if each.cost is None else round(each.cost.bytes_up),
                    "bytes_down": None if each.cost is None else round(each.cost.bytes_down),
                    "source": each.source,
                }
                for each in self.arms
            ],
            "notes": list(self.notes),
        }

    def table(self) -> FittedTable:
        """Return a line for each arm."""
        cells: dict[str, list[str]] = {
            "runs left": ["refused" if arm.refused else str(arm.left) for arm in self.arms],
            "a run": [
                NOTHING if arm.cost is None else _duration(arm.cost.seconds) for arm in self.arms
            ],
            "kB up": [
                NOTHING if arm.cost is None else kilobytes(arm.cost.bytes_up) for arm in self.arms
            ],
            "kB down": [
                NOTHING if arm.cost is None else kilobytes(arm.cost.bytes_down) for arm in self.arms
            ],
            "finished": [str(arm.finished) for arm in self.arms],
            "known from": [arm.source or NOTHING for arm in self.arms],
        }
        return FittedTable(
            label="arm",
            labels=[arm.arm for arm in self.arms],
            columns=[
                Column(title=title, cells=own, rank=rank)
                for rank, (title, own) in enumerate(cells.items())
            ],
            title=f"{self.plan.study.settings.name}: nothing was run",
            caption="kB are those of one run, of all its clients together",
        )

    def sentences(self) -> list[str]:
        """Return what the table comes to, in words."""
        total = self.total
        least = "at least " if self.unknown else ""
        with_whom = "one core" if self.workers == 1 else f"{self.workers} workers"
        parts = [
            self.plan.told(),
            f"estimated time: {least}{_duration(total.seconds)} with {with_whom}",
            f"clients exchange {least}{_size(total.bytes_up)} up and "
            f"{_size(total.bytes_down)} down",
        ]
        return [*parts, *self.notes]


def estimates(
    plan: StudyPlan,
    known: Mapping[str, RunCost],
    tried: Mapping[str, RunCost],
    kinds: Mapping[str, Hashable],
) -> list[ArmEstimate]:
    """Put together what is known of every arm.

    Args:
        plan: of the study.
        known: arms of which runs are finished.
        tried: arms that were tried.
        kinds: what arms of like cost have in common, by arm.
    """
    left = dict.fromkeys(plan.study.arms, 0)
    for run in plan.left:
        left[run.arm] += 1
    found = []
    for arm in plan.study.arms:
        finished = len(plan.folders.get(arm, ())) - left[arm]
        if arm in plan.refused:
            found.append(ArmEstimate(arm, 0, 0, refused=plan.refused[arm]))
            continue
        alike = [tried[other] for other in tried if kinds.get(other) == kinds.get(arm)]
        cost, source = None, ""
        if arm in known:
            cost, source = known[arm], "finished"
        elif arm in tried:
            cost, source = tried[arm], "trial"
        elif alike:
            cost, source = RunCost.mean(alike), "like"
        found.append(ArmEstimate(arm, left[arm], finished, cost, source))
    return found


def sample(kinds: Sequence[Hashable], most: int = MOST_TRIED) -> list[int]:
    """Choose positions to try: the first of each kind, then more of each, spread out.

    Args:
        kinds: of all that could be tried.
        most: how many are chosen, unless there are more kinds.

    Returns:
        Positions, the first of each kind before all others.
    """
    of_kind: dict[Hashable, list[int]] = {}
    for place, kind in enumerate(kinds):
        of_kind.setdefault(kind, []).append(place)
    firsts = [places[0] for places in of_kind.values()]
    others = [place for places in of_kind.values() for place in places[1:]]
    room = min(max(most - len(firsts), 0), len(others))
    # The first of each kind is there already: from one before the others up to the last.
    spread = np.linspace(-1, len(others) - 1, room + 1).round().astype(int)[1:] if room else ()
    return [*firsts, *(others[place] for place in spread)]


def kind_of(settings: Settings) -> Hashable:
    """Return what arms of like cost have in common: an algorithm, clients, what travels."""
    table = settings.to_table()
    parts = (table["clients"], table["exchange"], table["data"]["public"], table["evaluation"])
    return (settings.strategy.name, settings.rounds, repr(parts))


def _finished_cost(folders: Sequence[Path], settings: Settings) -> RunCost | None:
    """Return the mean of an arm's finished runs; None where none ran in the engine asked for."""
    costs = []
    for folder in folders:
        if not is_finished(folder):
            continue
        before = read_yaml(folder / SETTINGS_FILE, fast=True).get("engine", {})
        now = settings.to_table()["engine"]
        if any(before.get(key) != now[key] for key in ("backend", "cpus_per_worker", "address")):
            continue
        row = read_result(folder)
        costs.append(
            RunCost(row["seconds"] + AROUND_S, sum(row["bytes_up"]), sum(row["bytes_down"]))
        )
    return RunCost.mean(costs) if costs else None


def foresee(
    study: Study,
    *,
    seeds: int | None = None,
    baseline: str | None = None,
    accept_code: bool = False,
    tell: Callable[[str], None] | None = None,
    trying: Callable[[str, int, int], None] | None = None,
) -> StudyOutlook:
    """Say what `sim.commands.study.compare` would run with the same arguments, and what that takes.

    Nothing is written.

    Args:
        study: whose arms are settled.
        seeds: how many seeds.
        baseline: the arm that the others are compared with.
        accept_code: take runs whose code or libraries have changed since.
        tell: is told what there is to know of arms and earlier runs.
        trying: is told the arm that is tried next, how many were tried before, and of how many.

    Raises:
        SettingsError: what would end the study before anything runs.
    """
    study, trials = matched(
        study, baseline_arm(study.settings, study.arms, baseline, study.grid), trying=trying
    )
    plan = plan_study(
        study, seeds=seeds, baseline=baseline, accept_code=accept_code, tell=tell, writes=False
    )
    first: dict[str, PlannedRun] = {}
    for run in plan.left:
        first.setdefault(run.arm, run)
    made_as = {run.arm: run.settings for run in (*plan.division.alone, *plan.division.packed)}
    known = {
        arm: cost
        for arm in first
        if (cost := _finished_cost(plan.folders[arm], made_as[arm])) is not None
    }
    # Arms that are equal are tried once.
    distinct: dict[str, list[str]] = {}
    for arm, run in first.items():
        if arm not in known:
            distinct.setdefault(fingerprint(run.settings), []).append(arm)
    groups = list(distinct.values())
    kinds = {arm: kind_of(run.settings) for arm, run in first.items()}
    tried: dict[str, RunCost] = {}
    count = 0
    division = plan.division
    packed = frozenset(run.arm for run in division.packed)
    workers = division.processes if packed else _workers(study.settings)
    begun = time.perf_counter()
    # What was tried to be matched is known of every arm.
    chosen = range(len(groups)) if trials else sample([kinds[arms[0]] for arms in groups])
    for place in chosen:
        arms = groups[place]
        if count and not trials and time.perf_counter() - begun > TRIAL_S:
            break
        if trying is not None and not trials:
            trying(arms[0], count, len(chosen))
        settings = first[arms[0]].settings
        try:
            trial = trials.get(arms[0]) or try_out(settings)
        except Exception as error:
            error.add_note(f"when arm {arms[0]} was tried")
            raise
        cost = trial.cost(
            rounds=settings.rounds,
            every=settings.evaluation.every,
            workers=1 if arms[0] in packed else _workers(settings),
        )
        tried |= dict.fromkeys(arms, replace(cost, seconds=cost.seconds + AROUND_S))
        count += 1
    outlook = StudyOutlook(
        plan,
        estimates(plan, known, tried, kinds),
        workers,
        REPORT_S + RAY_S * any(run.settings.engine.on_ray for run in division.alone),
        packed,
        count,
        len(groups),
        (),
    )
    return replace(outlook, notes=_notes(outlook))


def _workers(settings: Settings) -> int:
    """Return how many workers the engine would have on this machine."""
    engine = settings.engine
    if not engine.on_ray:
        return 1
    return max(1, math.floor(available_cpus() / engine.cpus_per_worker))


def _notes(outlook: StudyOutlook) -> list[str]:
    """Say what the figures leave out."""
    runs = outlook.plan.left
    notes = []
    if outlook.tried < outlook.distinct:
        notes.append(
            f"{outlook.tried} of {outlook.distinct} distinct arms were tried; the others are taken "
            "to cost what those of the same algorithm, clients and exchange do in the mean"
        )
    if outlook.unknown:
        named = ", ".join(outlook.unknown[:6])
        more = f" and {len(outlook.unknown) - 6} more" if len(outlook.unknown) > 6 else ""
        notes.append(f"nothing is known of {named}{more}: the time for trials was over")
    if any(run.begun for run in runs):
        notes.append("runs that have begun are counted whole")
    if any(run.settings.attacks.kinds for run in runs):
        notes.append("attacks on finished runs take their time on top")
    if any(run.settings.engine.gpus_per_worker or run.settings.engine.address for run in runs):
        notes.append("the time is that of this machine's CPUs, not of GPUs or of a cluster")
    if any(rule.kind != "dropout" for run in runs for rule in run.settings.faults):
        notes.append("faults other than dropouts are left out")
    return notes


def _size(amount: int | float) -> str:
    """Write bytes in the unit that leaves few digits; a MB is 1000 kB."""
    return f"{amount / 1e6:,.1f} MB" if amount >= 1e7 else f"{kilobytes(amount)} kB"


def _duration(seconds: int | float) -> str:
    """Write seconds so that a person can read them."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return str(timedelta(seconds=round(seconds)))
