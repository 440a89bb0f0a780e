"""A training whose loss is no number ends with the name of the model and of what may help."""

import math

import pytest

from fedkd.distillation.run.running import distill
from fedkd.distillation.run.search import Trial, search
from fedkd.distillation.settings import DistillSettings
from fedkd.training.steps import DivergedError

FAR_TOO_FAST = {"name": "sgd", "lr": 1e3}
MLP = {"name": "mlp", "options": {"hidden": [8]}}


def settings(**changes):
    table = {
        "teacher": {"models": [MLP], "training": {"epochs": 2}},
        "student": {"model": MLP},
        "training": {"epochs": 3},
        "objective": {"ce": 1, "mse": 1},
        **changes,
    }
    return DistillSettings.model_validate(table)


def test_a_student_that_diverges_ends_the_run_and_its_last_epoch_is_told(toy_rows):
    told = []
    with pytest.raises(DivergedError, match=r"^student diverged: loss/.* training\.optimizer\.lr"):
        distill(
            settings(training={"epochs": 3, "optimizer": FAR_TOO_FAST}),
            rows=toy_rows(),
            observe=lambda name, row: told.append((name, row)),
        )
    name, row = told[-1]
    assert name == "student"
    assert not all(math.isfinite(value) for key, value in row.items() if key.startswith("loss/"))


def test_a_teacher_that_diverges_names_its_own_settings(toy_rows):
    training = {"epochs": 3, "optimizer": FAR_TOO_FAST}
    teacher = {"models": [{"name": "cnn"}], "training": training}
    with pytest.raises(DivergedError, match=r"^teacher diverged: .* teacher\.training\.optimizer"):
        distill(settings(teacher=teacher), rows=toy_rows())


def test_a_finite_teacher_that_predicts_no_numbers_is_refused(toy_rows, tmp_path):
    from safetensors.torch import save_file

    from fedkd.models import ModelSettings, build_model

    model = build_model(
        ModelSettings.model_validate(MLP),
        input_shape=toy_rows().input_shape,
        num_classes=toy_rows().num_classes,
        seed=0,
    )
    weights = {key: tensor.clone().fill_(3e38) for key, tensor in model.state_dict().items()}
    save_file(weights, tmp_path / "huge.safetensors")
    teacher = {"models": [MLP], "weights": [str(tmp_path / "huge.safetensors")]}
    with pytest.raises(ValueError, match="predicts NaN or infinity for"):
        distill(settings(teacher=teacher), rows=toy_rows())


def test_a_cell_of_a_search_that_diverged_is_never_the_best(toy_rows):
    grid = {"temperatures": [1.0, 1e3], "weights": [1.0]}
    tried = settings(
        search=grid,
        objective={"kd": {"weight": 1}},
        training={"epochs": 2, "optimizer": {"name": "sgd", "lr": 0.5}},
    )
    outcomes = search(tried, rows_of=lambda _: toy_rows()).cells
    assert all(math.isfinite(cell.accuracy) for cell in outcomes)
    done = {Trial(1.0, 1.0, 0): outcomes[0].outcomes[0]._replace(accuracy=math.nan)}
    found = search(tried, rows_of=lambda _: toy_rows(), done=done)
    assert found.best.temperature == 1e3
    assert math.isnan(found.cells[0].accuracy)


def test_a_search_in_which_every_student_diverged_has_no_best_cell(toy_rows):
    hopeless = settings(
        search={"temperatures": [1.0], "weights": [0.5]},
        objective={"ce": 1, "kd": 1, "mse": 1},
        training={"epochs": 3, "optimizer": FAR_TOO_FAST},
    )
    with pytest.raises(DivergedError, match="diverged in every cell"):
        search(hopeless, rows_of=lambda _: toy_rows())
