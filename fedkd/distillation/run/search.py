"""Search: which temperature and weight of distillation are best on the validation split."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fedkd.distillation.fit.group import GroupSettings
from fedkd.distillation.fit.method import Method
from fedkd.distillation.fit.workshop import EpochListener, Workshop
from fedkd.distillation.methods import method_class
from fedkd.distillation.run.finishing import finish_student
from fedkd.distillation.run.running import choose_device, open_workshop
from fedkd.distillation.settings import DistillSettings
from fedkd.distillation.task.predicting import predict_logits
from fedkd.distillation.task.rows import Rows, load_rows
from fedkd.losses.response import hard_label_loss
from fedkd.objectives import Objective
from fedkd.objectives.basic import HardLabels, SoftTargets
from fedkd.objectives.terms import SoftenedTerm, Term
from fedkd.schedules import ConstantSchedule
from fedkd.training.steps import DivergedError


class Trial(NamedTuple):
    """One student of a search: what was tried, with which seed."""

    temperature: float
    weight: float
    seed: int


class Outcome(NamedTuple):
    """What a trial's student is worth on the validation rows.

    Attributes:
        accuracy: in [0, 1]; NaN for a student that diverged.
        loss: cross-entropy in nats.
    """

    accuracy: float
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One cell of the grid.

    Attributes:
        temperature: of every softened term.
        weight: of the first softened term; cross-entropy has the rest up to 1.
        accuracy: on validation rows, mean over seeds.
        loss: the same.
        outcomes: by seed.
    """

    temperature: float
    weight: float
    accuracy: float
    loss: float
    outcomes: Mapping[int, Outcome]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """A grid that was searched.

    Attributes:
        cells: in the order of ``search.temperatures``, then ``search.weights``.
        best: the cell with the highest validation accuracy; of equals, the lowest loss.
        objective: of the best cell.
        validation_rows: that decided.
    """

    cells: tuple[Cell, ...]
    best: Cell
    objective: Objective
    validation_rows: int


Loader = Callable[[int], Rows]
"""Returns the rows of a seed."""


def search(
    settings: DistillSettings,
    *,
    rows_of: Loader | None = None,
    done: Mapping[Trial, Outcome] | None = None,
    finished: Callable[[Trial, Outcome], None] | None = None,
    observe: Callable[[Trial], EpochListener] | None = None,
) -> SearchResult:
    """Train a student in every cell of ``settings.search`` and judge it on validation rows.

    The teacher is trained once a seed and serves all cells; seeds are paired: in every cell the
    student starts from the same weights and takes the same batches. Test rows are never read.

    Args:
        settings: what is distilled, and the grid.
        rows_of: the rows of each seed; None loads what ``settings.data`` names.
        done: outcomes of trials that need not be repeated.
        finished: told about every other trial when it is over.
        observe: makes who is told after every epoch of a trial; the teacher's epochs belong to
            the first trial of its seed.

    Raises:
        ValueError: naming a setting that cannot work, such as an objective without temperature.
    """
    if isinstance(settings.method, GroupSettings):
        raise ValueError(
            "a search tries weights and temperatures of objective, but method "
            f"{settings.method.name!r} has its own: use method=offline, or vary method.kd_weight "
            "and method.temperature yourself"
        )
    load = rows_of or (
        lambda seed: load_rows(settings.data, seed=seed, device=choose_device(settings.device))
    )
    objectives = {
        (temperature, weight): tried_objective(
            settings.objective, temperature=temperature, weight=weight
        )
        for temperature in settings.search.temperatures
        for weight in settings.search.weights
    }
    outcomes = dict(done or {})
    validation_rows = 0
    seeds = [settings.seed + number for number in range(settings.search.seeds)]
    for seed in seeds:
        rows = load(seed)
        validation_rows = len(rows.validation_inputs)
        trials = [Trial(*cell, seed) for cell in objectives if Trial(*cell, seed) not in outcomes]
        if not trials:
            continue
        watch = [observe(trial) if observe is not None else _nobody for trial in trials]
        of_seed = settings.model_copy(update={"seed": seed})
        workshop = open_workshop(of_seed, rows, watch[0])
        method = method_class(settings.method.name)(settings.method)
        for trial, watcher in zip(trials, watch, strict=True):
            bench = replace(
                workshop,
                # A copy: whatever a method does to its teacher, the next cell has a fresh one.
                teacher=copy.deepcopy(workshop.teacher),
                objective=objectives[trial.temperature, trial.weight],
                listener=watcher,
                histories={},
            )
            outcomes[trial] = _tried(method, bench)
            if finished is not None:
                finished(trial, outcomes[trial])
    cells = [_cell(temperature, weight, seeds, outcomes) for temperature, weight in objectives]
    best = min(cells, key=_rank)
    if not math.isfinite(best.accuracy):
        raise DivergedError(
            "the student diverged in every cell of the search: a smaller training.optimizer.lr "
            "or training.optimizer.warm_up may help"
        )
    return SearchResult(
        cells=tuple(cells),
        best=best,
        objective=objectives[best.temperature, best.weight],
        validation_rows=validation_rows,
    )


def _tried(method: Method[Any], bench: Workshop) -> Outcome:
    """Train a student and judge it on the validation rows; one that diverged comes last."""
    try:
        tried = method.run(bench)
        finish_student(tried.student, bench)
    except DivergedError:
        return Outcome(accuracy=math.nan, loss=math.nan)
    rows = bench.rows
    logits = predict_logits(tried.student, rows.validation_inputs)
    right = (logits.argmax(-1) == rows.validation_labels).double().mean()
    return Outcome(float(right), float(hard_label_loss(logits, rows.validation_labels)))


def tried_objective(objective: Objective, *, temperature: float, weight: float) -> Objective:
    """Return an objective as a cell of the grid tries it.

    Args:
        objective: with at least one term that has a temperature.
        temperature: of every softened term, > 0.
        weight: of the first softened term, in [0, 1]; every cross-entropy on labels has
            ``1 - weight``. Other terms keep theirs.

    Raises:
        ValueError: if no term has a temperature, or one learns it.
    """
    first = searched_term(objective)
    for name, term in objective.terms.items():
        if isinstance(term, SoftTargets) and term.learned:
            raise ValueError(
                f"a search tries temperatures, but objective.{name} learns its own: set "
                f"objective.{name}.learned=false"
            )
    terms: dict[str, Term] = {}
    for name, term in objective.terms.items():
        changes = {}
        if isinstance(term, SoftenedTerm):
            changes["temperature"] = ConstantSchedule(value=temperature)
        if name == first:
            changes["weight"] = ConstantSchedule(value=weight)
        elif isinstance(term, HardLabels):
            changes["weight"] = ConstantSchedule(value=1 - weight)
        terms[name] = term.model_copy(update=changes)
    return Objective(terms)


def searched_term(objective: Objective) -> str:
    """Return the name of the term whose weight is searched: the first one with a temperature.

    Raises:
        ValueError: if there is none.
    """
    for name, term in objective.terms.items():
        if isinstance(term, SoftenedTerm):
            return name
    raise ValueError(
        "a search needs a term with a temperature in objective, such as kd, got "
        f"{', '.join(objective.terms)}"
    )


def _cell(
    temperature: float, weight: float, seeds: Sequence[int], outcomes: Mapping[Trial, Outcome]
) -> Cell:
    of_cell = {seed: outcomes[Trial(temperature, weight, seed)] for seed in seeds}
    return Cell(
        temperature=temperature,
        weight=weight,
        accuracy=math.fsum(outcome.accuracy for outcome in of_cell.values()) / len(seeds),
        loss=math.fsum(outcome.loss for outcome in of_cell.values()) / len(seeds),
        outcomes=of_cell,
    )


def _rank(cell: Cell) -> tuple[float, float]:
    accuracy = cell.accuracy if math.isfinite(cell.accuracy) else -math.inf
    return -accuracy, cell.loss if math.isfinite(cell.loss) else math.inf


def _nobody(_name: str, _row: object) -> None:
    return None
