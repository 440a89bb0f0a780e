from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fedkd.distillation.run import search as module
from fedkd.distillation.run.search import (
    Outcome,
    SearchResult,
    Trial,
    search,
    searched_term,
    tried_objective,
)
from fedkd.distillation.settings import DistillSettings
from fedkd.distillation.task.rows import Rows, load_rows
from fedkd.objectives import Objective

Make = Callable[..., DistillSettings]


@pytest.fixture
def make() -> Make:
    def settings(**changes: object) -> DistillSettings:
        table = {
            "data": {"private_rows": 60, "public": {"size": 40}, "validation_fraction": 0.4},
            "teacher": {"models": "mlp", "training": {"epochs": 2}},
            "training": {"epochs": 2},
            "search": {"temperatures": [1.0, 4.0], "weights": [0.0, 0.5, 1.0]},
        }
        return DistillSettings.model_validate({**table, **changes})

    return settings


def rows_of(settings: DistillSettings, seed: int) -> Rows:
    return load_rows(settings.data, seed=seed, device=torch.device("cpu"))


def poisoned(rows: Rows) -> Rows:
    return replace(
        rows,
        test_inputs=torch.full_like(rows.test_inputs, float("nan")),
        test_labels=torch.full_like(rows.test_labels, 10**6),
    )


def values(result: SearchResult) -> list[tuple[float, ...]]:
    return [(c.temperature, c.weight, c.accuracy, c.loss) for c in result.cells]


def test_test_rows_have_no_say(make: Make) -> None:
    settings = make()
    clean = search(settings, rows_of=lambda seed: rows_of(settings, seed))
    blind = search(settings, rows_of=lambda seed: poisoned(rows_of(settings, seed)))
    assert values(clean) == values(blind)
    assert clean.validation_rows == len(rows_of(settings, 0).validation_inputs)


def test_every_cell_is_judged_on_validation_rows_by_accuracy_then_loss(make: Make) -> None:
    result = search(make())
    grid = [(t, w) for t in (1.0, 4.0) for w in (0.0, 0.5, 1.0)]
    assert [(cell.temperature, cell.weight) for cell in result.cells] == grid
    top = max(cell.accuracy for cell in result.cells)
    assert result.best.accuracy == top
    assert result.best.loss == min(c.loss for c in result.cells if c.accuracy == top)
    terms = result.objective.terms
    assert terms["kd"].weight.at(0.0) == result.best.weight
    assert terms["ce"].weight.at(0.0) == 1 - result.best.weight


def test_the_seed_and_the_weights_of_a_cell_are_paired(make: Make) -> None:
    # Without any weight on the teacher, its temperature changes nothing at all.
    cells = search(make()).cells
    first, second = (cell for cell in cells if cell.weight == 0.0)
    assert first.outcomes == second.outcomes
    assert len({cell.loss for cell in cells}) == len(cells) - 1


def test_a_teacher_is_trained_once_a_seed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    real = module.open_workshop

    def counting(settings: DistillSettings, rows: Rows, observe: module.EpochListener) -> object:
        opened.append(settings.seed)
        return real(settings, rows, observe)

    monkeypatch.setattr(module, "open_workshop", counting)
    grid = {"temperatures": [1.0, 2.0], "weights": [0.5], "seeds": 2}
    result = search(make(seed=3, search=grid))
    assert opened == [3, 4]
    assert [set(cell.outcomes) for cell in result.cells] == [{3, 4}] * 2
    for cell in result.cells:
        assert cell.accuracy == sum(o.accuracy for o in cell.outcomes.values()) / 2


def test_what_is_done_is_not_done_again(make: Make) -> None:
    known: dict[Trial, Outcome] = {}
    first = search(make(), finished=lambda trial, outcome: known.update({trial: outcome}))
    told: list[Trial] = []
    again = search(make(), done=known, finished=lambda trial, _: told.append(trial))
    assert told == []
    assert values(again) == values(first)
    del known[Trial(4.0, 0.5, 0)]
    third = search(make(), done=known, finished=lambda trial, _: told.append(trial))
    assert told == [Trial(4.0, 0.5, 0)]
    assert values(third) == values(first)


def test_the_grid_changes_temperatures_and_the_first_softened_weight_only() -> None:
    objective = Objective.model_validate(
        {"ce": {"weight": 0.3, "label_smoothing": 0.1}, "kd": 0.9, "soft_ce": 0.2, "mse": 0.4}
    )
    tried = tried_objective(objective, temperature=3.0, weight=0.25).terms
    weights = {name: term.weight.at(0.0) for name, term in tried.items()}
    assert weights == {"ce": 0.75, "kd": 0.25, "soft_ce": 0.2, "mse": 0.4}
    temperatures = {tried[name].model_dump()["temperature"]["value"] for name in ("kd", "soft_ce")}
    assert temperatures == {3.0}
    assert tried["ce"].model_dump()["label_smoothing"] == 0.1


def test_an_objective_without_a_temperature_is_named() -> None:
    with pytest.raises(ValueError, match=r"needs a term with a temperature .* got ce, mse"):
        searched_term(Objective.model_validate({"ce": 1, "mse": 1}))


def test_a_search_that_would_change_nothing_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="method 'dml' has its own"):
        search(make(method="dml"))
    with pytest.raises(ValueError, match=r"objective\.kd learns its own"):
        search(make(objective={"ce": 1, "kd": {"learned": True}}))
