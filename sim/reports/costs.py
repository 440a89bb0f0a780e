"""Accuracy at a cost, and the cost of an accuracy: arms side by side at what they were given.

A run is a staircase: after each judged round it has an accuracy and has spent so much. Nothing is
drawn between two steps: an accuracy was reached at the first judged round that had it, and a budget
buys the last judged round that kept to it. What a teacher learnt before round 1 is part of round 1.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from fedkd.names import nearest
from sim.devices.effort import operations
from sim.reports.power import PRECISION
from sim.reports.runs import RunRecord, load_arms, number
from sim.reports.statistics import (
    ACCURACIES,
    SHARES,
    Difference,
    Estimate,
    baseline_of,
    corrected,
    counted,
    difference_by_seed,
    estimate,
)
from sim.reports.tables import FEW, difference_row, flat, p_text, percent
from sim.reports.terminal import NOTHING, Column, FittedTable
from sim.server.observers import Row
from sim.settings import SettingsError

NOT_NEGATIVE = (0.0, math.inf)


@dataclass(frozen=True, slots=True)
class Cost:
    """Something that a run spends, round by round.

    Attributes:
        title: of a column.
        spent: returns what a run has spent at the end of each of its rounds; nothing where that
            is not known.
        units: what may stand behind a number, and its size; the first is what tables are in.
        decimals: of a number in a table.
    """

    title: str
    spent: Callable[[RunRecord], Sequence[float]]
    units: Mapping[str, int | float]
    decimals: int = 0


def _rounds(run: RunRecord) -> Sequence[float]:
    return [float(row["round"]) for row in run.federation]


def _steps(run: RunRecord) -> Sequence[float]:
    keys = ("client_steps", "server_steps")
    if not any(key in row for row in run.federation for key in keys):
        return ()
    return _summed(sum(number(row, key) or 0.0 for key in keys) for row in run.federation)


def _bytes(run: RunRecord) -> Sequence[float]:
    keys = ("bytes_up", "bytes_down")
    return _summed(
        sum(number(row, key) or 0.0 for key in keys) / run.num_clients for row in run.federation
    )


def _time(run: RunRecord) -> Sequence[float]:
    shown = [number(row, "simulated_s") for row in run.federation]
    known = [seconds for seconds in shown if seconds is not None]
    return known if len(known) == len(shown) else ()


def _gflop(run: RunRecord) -> Sequence[float]:
    networks = run.result.get("networks")
    if not isinstance(networks, list) or not networks:
        return ()
    of_rounds = [operations([row], networks) for row in run.federation]
    known = [count / 1e9 for count in of_rounds if count is not None]
    return _summed(known) if len(known) == len(of_rounds) else ()


def _summed(amounts: Iterable[float]) -> Sequence[float]:
    return [*itertools.accumulate(amounts)]


COSTS: Mapping[str, Cost] = MappingProxyType(
    {
        "rounds": Cost("rounds", _rounds, {"": 1}),
        "steps": Cost("steps", _steps, {"": 1, "k": 1e3, "M": 1e6}),
        "bytes": Cost("kB", _bytes, {"kB": 1e3, "B": 1, "MB": 1e6, "GB": 1e9}, decimals=1),
        "time": Cost("sim. s", _time, {"s": 1, "min": 60, "h": 3600}, decimals=1),
        "gflop": Cost("GFLOP", _gflop, {"": 1, "k": 1e3, "M": 1e6}, decimals=1),
    }
)
"""What can be spent: rounds; optimizer steps and 10^9 operations of all clients and the server
together; bytes up and down of a client, the mean over clients; seconds of the simulated clock."""


@dataclass(frozen=True, slots=True)
class Step:
    """A run at the end of a judged round.

    Attributes:
        cost: spent until then.
        accuracy: a share.
    """

    cost: int | float
    accuracy: int | float


def staircase(run: RunRecord, cost: str, measure: str = "accuracy") -> tuple[Step, ...]:
    """Return what a run had spent and reached at the end of each judged round, in their order."""
    spent = COSTS[cost].spent(run)
    return tuple(
        Step(amount, value)
        for row, amount in zip(run.federation, spent, strict=bool(spent))
        if (value := number(row, measure)) is not None
    )


def cost_to(steps: Sequence[Step], target: int | float) -> int | float | None:
    """Return what was spent at the first judged round with an accuracy; None if there is none."""
    # Means of shares differ from the same number by rounding.
    return next((step.cost for step in steps if step.accuracy >= target - 1e-12), None)


def accuracy_at(steps: Sequence[Step], budget: int | float) -> int | float | None:
    """Return the accuracy of the last judged round within a budget; None if there is none."""
    within = [step.accuracy for step in steps if step.cost <= budget * (1 + 1e-12)]
    return within[-1] if within else None


def has_budget_left(steps: Sequence[Step], budget: int | float) -> bool:
    """Tell whether a run ended although a round more, as dear as its last, would have fitted."""
    if not steps:
        return False
    before = steps[-2].cost if len(steps) > 1 else 0.0
    return 2 * steps[-1].cost - before <= budget * (1 + 1e-12)


@dataclass(frozen=True, slots=True)
class Budget:
    """So much of a cost.

    Attributes:
        cost: a key of `COSTS`.
        amount: bytes, seconds or a count, > 0.
        text: as it was given.
    """

    cost: str
    amount: float
    text: str

    @classmethod
    def of_text(cls, text: str) -> "Budget":
        """Read ``bytes=500kB``.

        Raises:
            SettingsError: says what would work.
        """
        cost, _, amount = (part.strip() for part in text.partition("="))
        if cost not in COSTS:
            raise SettingsError(
                f"a budget is one of {', '.join(COSTS)} and a number, such as bytes=500kB, got "
                f"{text!r}{nearest(cost, COSTS)}"
            )
        units = COSTS[cost].units
        found = re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)\s*([A-Za-z]*)", amount)
        # Plain numbers are bytes, not the kB of tables.
        factor = None if found is None else {**units, "": 1}.get(found[2])
        if found is None or factor is None or not 0 < float(found[1]) * factor < math.inf:
            known = [unit for unit in units if unit]
            raise SettingsError(
                f"{cost} must be a number above 0"
                + (f", alone or with {', '.join(known)}" if known else "")
                + f", got {amount!r}"
            )
        return cls(cost, float(found[1]) * factor, text)


@dataclass(frozen=True, slots=True)
class Spending:
    """What arms spend for accuracies, and reach within budgets.

    Attributes:
        runs: of each arm that has some, those that count.
        baseline: the arm that the others are compared with.
        targets: accuracies, shares.
        budgets: of costs.
        measure: a key of `ACCURACIES`.
        precision: the half width of an interval that is wanted, a share.
    """

    runs: Mapping[str, Sequence[RunRecord]]
    baseline: str
    targets: Sequence[float]
    budgets: Sequence[Budget]
    measure: str = "accuracy"
    precision: float = PRECISION

    def needed(self, arm: str, cost: str, target: float) -> list[float]:
        """Return what each run that reached an accuracy had spent by then."""
        found = (cost_to(staircase(run, cost, self.measure), target) for run in self.runs[arm])
        return [spent for spent in found if spent is not None]

    def reached(self, arm: str, budget: Budget) -> dict[int, float]:
        """Return the accuracy of each run within a budget, by seed."""
        return {
            run.seed: value
            for run in self.runs[arm]
            if (value := accuracy_at(self._steps(run, budget), budget.amount)) is not None
        }

    def left(self, arm: str, budget: Budget) -> int:
        """Return how many runs ended with some of a budget left."""
        return sum(
            has_budget_left(self._steps(run, budget), budget.amount) for run in self.runs[arm]
        )

    def _steps(self, run: RunRecord, budget: Budget) -> tuple[Step, ...]:
        return staircase(run, budget.cost, self.measure)

    def differences(self, budget: Budget) -> dict[str, Difference | None]:
        """Return each arm minus the baseline within a budget, paired by seed."""
        of_baseline = self.reached(self.baseline, budget)
        return {
            arm: difference_by_seed(of_baseline, self.reached(arm, budget))
            for arm in self.runs
            if arm != self.baseline
        }

    def to_row(self) -> Row:
        """Return it as plain values."""
        return {
            "baseline": self.baseline,
            "measure": self.measure,
            "to": [row for target in self.targets for row in self._to_rows(target)],
            "at": [row for budget in self.budgets for row in self._at_rows(budget)],
        }

    def _to_rows(self, target: float) -> list[Row]:
        rows = []
        for arm, of_arm in self.runs.items():
            row: Row = {"target": target, "arm": arm, "runs": len(of_arm)}
            row["reached"] = len(self.needed(arm, "rounds", target))
            for cost in COSTS:
                row.update(flat(cost, estimate(self.needed(arm, cost, target), NOT_NEGATIVE)))
            rows.append(row)
        return rows

    def _at_rows(self, budget: Budget) -> list[Row]:
        differences = self.differences(budget)
        p_holm = corrected(differences)
        rows = []
        for arm, of_arm in self.runs.items():
            values = [*self.reached(arm, budget).values()]
            rows.append(
                {
                    "cost": budget.cost,
                    "budget": budget.amount,
                    "arm": arm,
                    "runs": len(of_arm),
                    "judged": len(values),
                    "budget_left": self.left(arm, budget),
                    **flat("accuracy", estimate(values, SHARES)),
                    **difference_row(
                        "difference", differences.get(arm), p_holm.get(arm), self.precision
                    ),
                }
            )
        return rows

    def tables(self) -> list[FittedTable]:
        """Return a table for each accuracy and each budget, for the terminal."""
        return [
            *(self._to_table(target) for target in self.targets),
            *(self._at_table(budget) for budget in self.budgets),
        ]

    def _to_table(self, target: float) -> FittedTable:
        reached = {arm: len(self.needed(arm, "rounds", target)) for arm in self.runs}
        some = any(0 < reached[arm] < len(of_arm) for arm, of_arm in self.runs.items())
        cells = {
            cost: [
                _amount(
                    estimate(self.needed(arm, cost, target), NOT_NEGATIVE),
                    next(iter(what.units.values())),
                    what.decimals,
                )
                for arm in self.runs
            ]
            for cost, what in COSTS.items()
        }
        return FittedTable(
            label="arm",
            labels=[*self.runs],
            columns=[
                Column(
                    title="reached",
                    cells=[
                        f"{reached[arm]} of {len(of_arm)}" if reached[arm] else "never"
                        for arm, of_arm in self.runs.items()
                    ],
                    rank=0,
                ),
                *(
                    Column(title=COSTS[cost].title, cells=own, rank=rank)
                    for rank, (cost, own) in enumerate(cells.items(), start=1)
                ),
            ],
            title=f"cost to {_percent(target)} ({ACCURACIES[self.measure]}): the first judged "
            "round that had it",
            caption="mean over seeds ± 95 % t-interval"
            + ("; of the runs that reached it alone, which flatters arms" if some else "")
            + f"; {_UNITS}",
        )

    def _at_table(self, budget: Budget) -> FittedTable:
        differences = self.differences(budget)
        p_holm = corrected(differences)
        values = {arm: [*self.reached(arm, budget).values()] for arm in self.runs}

        def against(text: Callable[[str], str]) -> list[str]:
            return ["" if arm == self.baseline else text(arm) for arm in self.runs]

        def p_of(arm: str) -> str:
            value = differences[arm]
            return NOTHING if value is None else p_text(value.p_value, few=value.few)

        def p_holm_of(arm: str) -> str:
            value = differences[arm]
            return p_text(p_holm[arm], few=value is not None and value.few)

        minus = f"minus {self.baseline}"
        several = sum(p is not None for p in p_holm.values()) > 1
        columns = [
            Column(
                title=ACCURACIES[self.measure],
                cells=[percent(estimate(values[arm], SHARES)) for arm in self.runs],
                rank=0,
            ),
            Column(
                title=minus,
                cells=against(lambda arm: percent(differences[arm], signed=True)),
                rank=1,
            ),
            Column(title="p", cells=against(p_of), rank=2, needs=minus),
        ]
        if several:
            columns.append(Column(title="p (Holm)", cells=against(p_holm_of), rank=3, needs="p"))
        columns += [
            Column(
                title="judged",
                cells=[f"{len(values[arm])} of {len(of_arm)}" for arm, of_arm in self.runs.items()],
                rank=5,
            ),
            Column(
                title="budget left",
                cells=[
                    f"{left} of {len(of_arm)}" if (left := self.left(arm, budget)) else NOTHING
                    for arm, of_arm in self.runs.items()
                ],
                rank=4,
            ),
        ]
        return FittedTable(
            label="arm",
            labels=[*self.runs],
            columns=columns,
            title=f"accuracy within {budget.text}: the last judged round that kept to it, %",
            caption="budget left: runs that ended although another round would have fitted; "
            f"{_UNITS}",
        )


_UNITS = "steps and GFLOP: all clients and the server; bytes: of a client, up and down"


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _amount(value: Estimate | None, unit: int | float, decimals: int) -> str:
    if value is None:
        return NOTHING

    def shown(amount: float) -> str:
        return f"{amount / unit:,.{decimals}f}"

    if value.low is None or value.high is None:
        return shown(value.mean)
    half = value.half_width
    interval = f"[{shown(value.low)}, {shown(value.high)}]" if half is None else f"±{shown(half)}"
    return f"{shown(value.mean)} {interval}{FEW if value.few else ''}"


def cost(
    path: Path,
    *,
    to: Sequence[int | float] = (),
    at: Sequence[str] = (),
    baseline: str | None = None,
    measure: str = "accuracy",
) -> Spending:
    """Say what a study's arms spend to reach accuracies, and what they reach within budgets.

    Args:
        path: a study's folder, or a run's.
        to: accuracies in percent. Without these and ``at`` it is the highest whole percent that
            every run reached.
        at: budgets such as ``bytes=500kB``, see `COSTS`.
        baseline: the arm that the others are compared with; by default the study's.
        measure: whose accuracy, a key of `ACCURACIES`.

    Raises:
        SettingsError: names what cannot be read, or is no accuracy or budget.
    """
    if measure not in ACCURACIES:
        raise SettingsError(
            f"measure must be one of {', '.join(ACCURACIES)}, got {measure!r}"
            + nearest(measure, ACCURACIES)
        )
    for each in to:
        if not 0 < each <= 100:
            raise SettingsError(f"an accuracy must be above 0 and at most 100 %, got {each:g}")
    loaded = load_arms(path)
    runs = {arm: counted(of_arm) for arm, of_arm in loaded.runs.items() if of_arm}
    if not any(staircase(run, "rounds", measure) for of_arm in runs.values() for run in of_arm):
        raise SettingsError(f"no run in {str(path)!r} has a judged round with {measure}")
    wanted = loaded.baseline if baseline is None and loaded.baseline in runs else baseline
    targets = [each / 100 for each in to]
    if not to and not at:
        targets = [_reached_by_all(runs, measure)]
    return Spending(
        runs=runs,
        baseline=baseline_of(runs, wanted),
        targets=targets,
        budgets=[Budget.of_text(text) for text in at],
        measure=measure,
        precision=loaded.precision,
    )


def to_common_accuracy(
    runs: Mapping[str, Sequence[RunRecord]], baseline: str | None = None
) -> FittedTable | None:
    """Return what arms spent to the highest whole percent that every run reached.

    Args:
        runs: of each arm.
        baseline: as for `Spending`; the first arm by default.

    Returns:
        None for a single arm, and where some run reached not even one percent.
    """
    counting = {arm: counted(of_arm) for arm, of_arm in runs.items() if of_arm}
    target = _reached_by_all(counting, "accuracy") if len(counting) > 1 else 0.0
    if not target:
        return None
    spending = Spending(counting, baseline_of(counting, baseline), [target], [])
    return spending.tables()[0]


def _reached_by_all(runs: Mapping[str, Sequence[RunRecord]], measure: str) -> float:
    best = [
        max((step.accuracy for step in staircase(run, "rounds", measure)), default=0.0)
        for of_arm in runs.values()
        for run in of_arm
    ]
    return math.floor(100 * min(best) + 1e-9) / 100
