import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fedkd.distillation.run.checking import check
from fedkd.distillation.settings import DistillSettings
from fedkd.distillation.task.rows import load_rows
from fedkd.training.optimizers import Optimizer


def checked(**changes: Any) -> None:
    table = {"data": {"private_rows": 60, "public": {"size": 40}}, **changes}
    settings = DistillSettings.model_validate(table)
    check(settings, load_rows(settings.data, seed=0, device=torch.device("cpu")))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "missing weights": (
        {"teacher": {"weights": "nowhere.safetensors"}},
        "teacher.weights: 'nowhere.safetensors' does not exist",
    ),
    "batch of one": (
        {"student": {"model": "tutorial_teacher"}, "training": {"batch_size": 1}},
        "training.batch_size must be >= 2 for a model with BatchNorm",
    ),
    "model too deep for the image": (
        {"student": {"model": {"name": "cnn", "options": {"channels": [8, 8, 8, 8, 8]}}}},
        "model 'cnn",
    ),
}


@pytest.mark.parametrize("mistake", BAD)
def test_what_cannot_work_is_found_before_anything_trains(mistake: str) -> None:
    changes, complaint = BAD[mistake]
    with pytest.raises(ValueError, match=re.escape(complaint)):
        checked(**changes)


def test_nothing_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[object] = []
    monkeypatch.setattr(Optimizer, "step", lambda *_: steps.append(1))
    checked()
    assert not steps


def test_weights_that_fit_pass_and_others_are_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from fedkd.models import ModelSettings, build_model

    model = build_model(ModelSettings(name="mlp"), input_shape=(1, 8, 8), num_classes=10, seed=0)
    path = tmp_path / "teacher.safetensors"
    save_file(model.state_dict(), path)
    checked(teacher={"models": "mlp", "weights": str(path)})
    with pytest.raises(ValueError, match=r"teacher\.weights: .* does not fit the model"):
        checked(teacher={"models": "cnn", "weights": str(path)})
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"teacher\.weights: cannot read"):
        checked(teacher={"models": "mlp", "weights": str(path)})


def test_too_many_labelled_rows_are_refused_with_the_number_there_is() -> None:
    with pytest.raises(ValueError, match=r"data\.private_rows must be at most \d+, got 5000"):
        checked(data={"private_rows": 5000, "public": {"size": 40}})


def spoilt_weights(name: str, value: float | torch.dtype) -> dict[str, torch.Tensor]:
    """Return an mlp's weights, one number of a tensor replaced, or the tensor cast."""
    from fedkd.models import ModelSettings, build_model

    model = build_model(ModelSettings(name="mlp"), input_shape=(1, 8, 8), num_classes=10, seed=0)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    if isinstance(value, torch.dtype):
        weights[name] = weights[name].to(value)
    else:
        weights[name].view(-1)[3] = value
    return weights


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (float("nan"), "holds NaN or infinity"),
        (float("inf"), "holds NaN or infinity"),
        (torch.int8, "holds int8, the model's float32"),
        (torch.bool, "holds bool, the model's float32"),
        (torch.float16, "holds float16, the model's float32"),
    ],
    ids=str,
)
@pytest.mark.parametrize("who", ["teacher", "student"])
def test_weights_that_are_no_numbers_of_the_model_are_refused_by_tensor(
    who: str, value: float | torch.dtype, complaint: str, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "spoilt.safetensors"
    weights = spoilt_weights("1.weight", value)
    save_file(weights, path)
    model = "models" if who == "teacher" else "model"
    with pytest.raises(ValueError, match=rf"^{who}\.weights: .*: 1\.weight {complaint}"):
        checked(**{who: {model: "mlp", "weights": str(path)}})


def odd(kind: str) -> dict[str, Any]:
    return {"name": "odd_models:make", "options": {"kind": kind}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {"model": odd("HiddenMean")}}, "keeps something outside its state_dict"),
        ({"teacher": {"models": odd("Auxiliary")}}, "got tuple in training mode"),
        ({"teacher": {"models": odd("Softmax")}}, "returns probabilities"),
        ({"student": {"model": odd("BFloat")}}, "as bfloat16"),
        (
            {"student": {"model": odd("Batched")}, "training": {"batch_size": 1}},
            "cannot train on a single row",
        ),
        (
            {"student": {"model": {"name": "mlp", "options": {"hidden": [2**16] * 90}}}},
            "of memory: make it smaller",
        ),
        (
            {"method": {"name": "dml", "models": [odd("SharedCount")]}},
            "method.models: model .* does not compute the same numbers twice",
        ),
    ],
)
def test_models_of_ones_own_are_tried(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked(**changes)


def test_odd_models_teach_and_learn_and_leave_the_rows_alone() -> None:
    from fedkd.distillation.run.running import distill

    table = {
        "data": {"private_rows": 40, "public": {"size": 20}},
        "teacher": {"models": odd("InPlace"), "training": {"epochs": 1}},
        "student": {"model": odd("PythonDepth")},
        "training": {"epochs": 1},
    }
    settings = DistillSettings.model_validate(table)
    rows = load_rows(settings.data, seed=0, device=torch.device("cpu"))
    before = rows.test_inputs.clone()
    first, second = (distill(settings, rows=rows) for _ in range(2))
    assert torch.equal(rows.test_inputs, before)
    assert first.scores == second.scores
    table["teacher"]["models"] = odd("OutOfPlace")
    third = distill(DistillSettings.model_validate(table), rows=rows)
    assert third.scores == first.scores
