"""Pruned, inherited and int8 students in a whole distillation, and what every model costs."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from fedkd.compression import (
    PruningSettings,
    apply_masks,
    dense_state,
    load_quantised,
    model_file,
    prune_weights,
    pruning_masks,
)
from fedkd.distillation.fit import workshop as workshop_module
from fedkd.distillation.fit.epochs import FitHistory
from fedkd.distillation.run.checking import check
from fedkd.distillation.run.finishing import QUANTISED_STUDENT
from fedkd.distillation.run.running import distill
from fedkd.distillation.run.search import search
from fedkd.distillation.settings import DistillSettings
from fedkd.exchange.payloads import Weights
from fedkd.exchange.views import RunningMean
from fedkd.models import build_model

SMALL = {"name": "mlp", "options": {"hidden": [8]}}
OTHER = {"name": "mlp", "options": {"hidden": [5, 5]}}
DEEP = {"name": "mlp", "options": {"hidden": [8, 8]}}
TRAINING = {"epochs": 2, "batch_size": 8, "optimizer": {"lr": 0.01, "weight_decay": 0.01}}


def settings(*, student=None, teacher=None, training=None, **others):
    return DistillSettings.model_validate(
        {
            "student": {"model": SMALL, **(student or {})},
            "teacher": {"models": DEEP, "training": TRAINING, **(teacher or {})},
            "training": {**TRAINING, **(training or {})},
            **others,
        }
    )


def zeros(model):
    state = dense_state(model)
    return {name: tensor == 0 for name, tensor in state.items() if name.endswith("weight")}


def share(model):
    found = torch.cat([zero.flatten() for zero in zeros(model).values()])
    return found.double().mean().item()


def plain(model):
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


# --- Pruning -----------------------------------------------------------------------------------


def test_a_pruned_teacher_teaches_with_its_zeros(toy_rows):
    done = distill(
        settings(teacher={"prune": {"amount": 0.75, "finetune_epochs": 2}}), rows=toy_rows()
    )
    assert share(done.models["teacher"]) == pytest.approx(0.75, abs=0.01)
    assert done.scores["teacher"]["sparsity"] == pytest.approx(0.75, abs=0.01)
    assert [row["epoch"] for row in done.histories["teacher finetuned"]] == [1, 2]
    assert share(done.models["student"]) == 0
    assert "sparsity" not in done.scores["student"]


def test_fine_tuning_moves_the_weights_that_are_left(toy_rows):
    rows = toy_rows()
    whole, cut, tuned = (
        distill(settings(teacher={"prune": prune}, training={"epochs": 0}), rows=rows).models[
            "teacher"
        ]
        for prune in (None, {"finetune_epochs": 0}, {"finetune_epochs": 1})
    )
    masks = {name: ~zero for name, zero in zeros(cut).items()}
    for name, kept in masks.items():
        before, after = cut.state_dict()[name], tuned.state_dict()[name]
        assert torch.equal(before[kept], whole.state_dict()[name][kept])
        assert (after[kept] != before[kept]).all()
        assert not after[~kept].any()


@pytest.mark.parametrize("when", ["start", "end"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
def test_pruned_students_keep_their_zeros_through_every_optimiser(toy_rows, when, optimizer):
    momentum = {"momentum": 0.9} if optimizer in ("sgd", "rmsprop") else {}
    chosen = {"name": optimizer, "lr": 0.01, "weight_decay": 0.1, **momentum}
    prune = {"amount": 0.6, "when": when, "finetune_epochs": 2}
    done = distill(
        settings(student={"prune": prune}, training={"optimizer": chosen}), rows=toy_rows()
    )
    for name in ("student", "twin"):
        assert share(done.models[name]) == pytest.approx(0.6, abs=0.01)
        assert (f"{name} finetuned" in done.histories) == (when == "end")
        assert done.notes["sparsity"][name]["total"] == pytest.approx(0.6, abs=0.01)
        assert done.scores[name]["sparsity"] == done.notes["sparsity"][name]["total"]
    if when == "start":
        # The same first weights, so the same masks.
        student, twin = (zeros(done.models[name]) for name in ("student", "twin"))
        assert all(torch.equal(student[name], twin[name]) for name in student)


def test_a_student_pruned_at_the_end_is_fine_tuned_by_the_teacher_and_its_twin_by_labels(toy_rows):
    done = distill(settings(student={"prune": {"finetune_epochs": 1}}), rows=toy_rows())
    assert "loss/kd" in done.histories["student finetuned"][0]
    assert "loss/kd" not in done.histories["twin finetuned"][0]


def test_saved_weights_of_pruned_models_have_plain_names(toy_rows):
    pruned = settings(
        student={"prune": {"when": "start"}}, teacher={"prune": {}}, training={"epochs": 1}
    )
    whole = distill(settings(training={"epochs": 0}), rows=toy_rows())
    for name, model in distill(pruned, rows=toy_rows()).models.items():
        assert sorted(model.state_dict()) == sorted(whole.models[name].state_dict())


def test_online_peers_can_be_pruned_too(toy_rows):
    for method in ("dml", "pcl", "born_again"):
        done = distill(
            settings(student={"prune": {"when": "start"}}, method=method), rows=toy_rows()
        )
        assert share(done.models["student"]) == pytest.approx(0.5, abs=0.01), method
        assert all("mask" not in name for m in done.models.values() for name in m.state_dict())


def test_a_loaded_teacher_can_be_pruned(toy_rows, tmp_path):
    first = distill(settings(training={"epochs": 0}), rows=toy_rows()).models["teacher"]
    save_file(first.state_dict(), tmp_path / "teacher.safetensors")
    given = {"weights": str(tmp_path / "teacher.safetensors"), "prune": {"finetune_epochs": 1}}
    done = distill(settings(teacher=given, training={"epochs": 0}), rows=toy_rows())
    assert "teacher" not in done.histories
    assert len(done.histories["teacher finetuned"]) == 1
    assert share(done.models["teacher"]) == pytest.approx(0.5, abs=0.01)


def test_a_random_choice_of_weights_follows_the_seed(toy_rows):
    rows = toy_rows()
    one, same, other = (
        distill(
            settings(student={"prune": {"method": "random", "scope": "layer"}}, seed=seed),
            rows=rows,
        ).models["student"]
        for seed in (3, 3, 4)
    )
    assert torch.equal(plain(one), plain(same))
    assert not torch.equal(plain(one), plain(other))


def test_masks_empty_the_mean_of_clients_that_pruned_differently():
    clients = []
    for seed in (1, 2):
        shape = DistillSettings.model_validate({"student": {"model": SMALL}}).student.model
        client = build_model(shape, input_shape=(1, 8, 8), num_classes=3, seed=seed)
        prune_weights(client, PruningSettings(amount=0.5), seed=seed)
        clients.append(client)
    mean = RunningMean()
    for weight, client in zip((3, 1), clients, strict=True):
        arrays = {name: t.numpy() for name, t in dense_state(client).items()}
        mean.add(Weights(arrays=arrays), weight)
    averaged, masks = mean.mean().arrays, pruning_masks(clients[0])
    kept = apply_masks(averaged, masks)
    for name, mask in masks.items():
        assert averaged[name][~mask.numpy()].any()
        assert not kept[name][~mask.numpy()].any()
        assert np.array_equal(kept[name][mask.numpy()], averaged[name][mask.numpy()])


# --- Int8 --------------------------------------------------------------------------------------


def test_the_int8_student_is_a_row_of_its_own(toy_rows, tmp_path):
    rows = toy_rows()
    done = distill(settings(student={"quantise": "int8", "prune": {"amount": 0.5}}), rows=rows)
    student, small = done.models["student"], done.models[QUANTISED_STUDENT]
    with torch.no_grad():
        before, after = student(rows.test_inputs).argmax(-1), small(rows.test_inputs).argmax(-1)
    measured = done.scores[QUANTISED_STUDENT]
    right = (after == rows.test_labels).double().mean().item()
    assert measured["accuracy"] == pytest.approx(right)
    assert measured["agreement_with_student"] == pytest.approx(
        (before == after).double().mean().item()
    )
    assert done.costs[QUANTISED_STUDENT].size_bytes < 0.5 * done.costs["student"].size_bytes
    (tmp_path / "small.safetensors").write_bytes(model_file(small))
    assert (tmp_path / "small.safetensors").stat().st_size == done.notes["int8"]["int8_bytes"]
    with torch.no_grad():
        loaded = load_quantised(tmp_path / "small.safetensors", student)
        assert torch.equal(loaded(rows.test_inputs), small(rows.test_inputs))


def test_int8_changes_no_other_number(toy_rows):
    rows = toy_rows()
    plain_run, with_int8 = (
        distill(settings(student={"quantise": kind}), rows=rows) for kind in (None, "int8")
    )
    assert QUANTISED_STUDENT not in plain_run.models
    for name, row in plain_run.scores.items():
        assert with_int8.scores[name] == row


# --- Inheritance -------------------------------------------------------------------------------


def test_a_student_inherits_layers_and_its_twin_does_not(toy_rows):
    rows = toy_rows()
    done = distill(
        settings(student={"inherit": {"1": "1", "3": "5"}}, training={"epochs": 0}), rows=rows
    )
    teacher, student, twin = (
        done.models[name].state_dict() for name in ("teacher", "student", "twin")
    )
    assert done.notes["inherited"]["copied"] == {
        "1.weight": "1.weight",
        "1.bias": "1.bias",
        "3.weight": "5.weight",
        "3.bias": "5.bias",
    }
    assert not done.notes["inherited"]["skipped"]
    for own, given in done.notes["inherited"]["copied"].items():
        assert torch.equal(student[own], teacher[given])
        assert not torch.equal(twin[own], teacher[given])


def test_equal_names_are_inherited_where_they_fit_and_training_goes_on(toy_rows):
    done = distill(settings(student={"inherit": True}), rows=toy_rows())
    inherited = done.notes["inherited"]
    assert list(inherited["copied"]) == ["1.weight", "1.bias"]
    assert list(inherited["skipped"]) == ["3.weight", "3.bias"]
    student, teacher = (done.models[name].state_dict() for name in ("student", "teacher"))
    assert not torch.equal(student["1.weight"], teacher["1.weight"])


def test_student_and_twin_start_from_the_file_given(toy_rows, tmp_path):
    rows = toy_rows()
    first = distill(settings(), rows=rows).models["student"]
    path = tmp_path / "first.safetensors"
    save_file(first.state_dict(), path)
    done = distill(settings(student={"weights": str(path)}, training={"epochs": 0}), rows=rows)
    for name in ("student", "twin"):
        for key, tensor in load_file(path).items():
            assert torch.equal(done.models[name].state_dict()[key], tensor)


# --- Refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {"inherit": {"9": "1"}}}, "student.inherit: layers: the student has no"),
        (
            {"student": {"inherit": True}, "teacher": {"models": OTHER}},
            r"student.inherit: no tensor of the student fits the teacher \(1.weight",
        ),
        ({"student": {"inherit": True}, "method": "dml"}, "student.inherit needs a teacher"),
        ({"student": {"weights": "none.safetensors"}}, "student.weights: 'none.safetensors'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_trains(toy_rows, changes, message):
    with pytest.raises(ValueError, match=message):
        check(settings(**changes), toy_rows())


@pytest.mark.parametrize(
    "changes",
    [
        {"inherit": True, "weights": "a.safetensors"},
        {"quantise": "int4"},
        {"prune": {"when": "sometimes"}},
        {"prune": {"amount": 1}},
    ],
)
def test_wrong_settings_of_a_student_are_refused(changes):
    with pytest.raises(ValidationError):
        settings(student=changes)


def test_a_check_trains_nothing(toy_rows, monkeypatch):
    epochs = []

    def watched(student, lesson, watch):
        epochs.append(lesson.training.epochs)
        return FitHistory()

    monkeypatch.setattr(workshop_module, "fit", watched)
    chosen = settings(student={"prune": {}, "quantise": "int8"}, teacher={"prune": {}})
    check(chosen, toy_rows())
    assert epochs
    assert not any(epochs)


def test_fine_tuning_on_rows_is_refused_where_a_method_may_use_none(toy_rows):
    with pytest.raises(ValueError, match=r"student.prune.finetune_epochs"):
        check(settings(student={"prune": {}}, method="dafl"), toy_rows())


def test_a_search_judges_students_that_are_pruned(toy_rows):
    seen = []
    chosen = settings(
        student={"prune": {"finetune_epochs": 1}},
        search={"temperatures": [2.0], "weights": [0.5]},
    )
    search(
        chosen,
        rows_of=lambda seed: toy_rows(),
        observe=lambda trial: lambda name, row: seen.append(name),
    )
    assert seen[-1] == "student finetuned"


# --- Costs and schedules -----------------------------------------------------------------------


def test_every_model_has_its_costs_apart_from_what_a_seed_repeats(toy_rows):
    rows = toy_rows()
    done, again = (distill(settings(student={"quantise": "int8"}), rows=rows) for _ in range(2))
    assert done.costs.keys() == done.models.keys() == done.scores.keys()
    # 64 pixels, 8 hidden, 3 classes.
    assert done.costs["student"].parameters == 64 * 8 + 8 + 8 * 3 + 3
    assert done.costs["student"].flops == 2 * (64 * 8 + 8 * 3)
    assert list(done.costs["student"].latency_s) == [1, 64]
    kept = [json.dumps([run.scores, run.notes, run.histories]) for run in (done, again)]
    assert kept[0] == kept[1]
    assert "latency" not in kept[0]
    assert {"size_bytes", "latency_s"} <= asdict(done.costs["teacher"]).keys()


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop"])
def test_every_optimiser_trains_and_its_learning_rate_is_logged(toy_rows, name):
    rate = {"sgd": 0.1}.get(name, 0.01)
    done = distill(
        settings(
            training={
                "epochs": 4,
                "optimizer": {
                    "name": name,
                    "lr": rate,
                    "warm_up": 0.5,
                    "decay": {"kind": "cosine", "start": 1.0, "end": 0.1},
                },
            }
        ),
        rows=toy_rows(),
    )
    history = done.histories["student"]
    rates = [row["learning_rate"] for row in history]
    assert rates[0] < rates[1] > rates[2] > rates[3] == pytest.approx(0.1 * rate)
    assert history[-1]["loss/kd"] < history[0]["loss/kd"]


def test_a_step_of_the_learning_rate_is_logged(toy_rows):
    decay = {"kind": "step", "values": [1.0, 0.5], "milestones": [0.5]}
    done = distill(
        settings(training={"epochs": 4, "optimizer": {"lr": 0.02, "decay": decay}}),
        rows=toy_rows(),
    )
    rates = [row["learning_rate"] for row in done.histories["student"]]
    assert rates == [0.02, 0.02, 0.01, 0.01]


def test_early_stopping_goes_back_to_the_best_weights(toy_rows):
    rows = toy_rows()
    # No later epoch can be better by 1: training stops after two, and the first one counts.
    never = {"patience": 1, "mode": "max", "min_delta": 1.0}
    stopped = distill(settings(training={"epochs": 4, "early_stopping": never}), rows=rows)
    assert len(stopped.histories["twin"]) == 2
    kept, later = (row["validation_accuracy"] for row in stopped.histories["twin"])
    assert kept != later
    with torch.no_grad():
        said = stopped.models["twin"](rows.validation_inputs).argmax(-1)
    assert (said == rows.validation_labels).double().mean().item() == pytest.approx(kept)


def test_peers_log_their_learning_rate(toy_rows):
    chosen = settings(method="dml", training={"optimizer": {"lr": 0.01, "warm_up": 0.9}})
    rates = [row["learning_rate"] for row in distill(chosen, rows=toy_rows()).histories["student"]]
    assert 0 < rates[0] < rates[1]
