"""Whatever holds for all terms: a whole distillation by each, half precision, what is left over."""

import math

import numpy as np
import pytest
import torch

from fedkd.distillation.fit.fitting import Lesson, fit
from fedkd.distillation.run.running import distill
from fedkd.distillation.settings import DistillSettings
from fedkd.distillation.task.combining import Combination
from fedkd.distillation.task.participants import TrainingSettings
from fedkd.distillation.task.rows import Rows
from fedkd.distillation.task.teachers import Teacher
from fedkd.models import ModelSettings, build_model
from fedkd.objectives import TERMS, Objective, View
from fedkd.objectives.terms import LayerTerm
from fedkd.targets import Targets
from fedkd.training import (
    PARTS,
    ClientState,
    ComposedObjective,
    Learner,
    LoopCohort,
    Member,
    ModelPool,
    OptimizerSettings,
    Passes,
    Streams,
    TrainingData,
)

LABELS_OF_TRANSFER_ROWS = {kind for kind in TERMS if "transfer_labels" in TERMS[kind]().needs}
COMPARING = [kind for kind in TERMS if issubclass(TERMS[kind], LayerTerm)]
CNN = {"name": "cnn", "options": {"channels": [2]}}
WIDE_CNN = {"name": "cnn", "options": {"channels": [3]}}
TRAINING = {"epochs": 2, "batch_size": 8}


def images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centres = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(9))
    return centres[labels] + torch.randn(count, 1, 8, 8, generator=generator), labels


def toy_rows(labelled=8, count=24):
    inputs, labels = images(count, 1)
    validation, test = images(9, 2), images(12, 3)
    return Rows(
        inputs=inputs,
        labels=labels,
        labelled=labelled,
        validation_inputs=validation[0],
        validation_labels=validation[1],
        test_inputs=test[0],
        test_labels=test[1],
        num_classes=3,
        class_names=("a", "b", "c"),
        mean=torch.full((1, 1, 1), 0.5),
        std=torch.full((1, 1, 1), 0.25),
    )


def model_of(model, seed=0):
    settings = ModelSettings.model_validate(model)
    return build_model(settings, input_shape=(1, 8, 8), num_classes=3, seed=seed)


def lesson(objective, teacher, **fields):
    return Lesson(
        rows=fields.pop("rows", toy_rows()),
        objective=Objective.model_validate(objective),
        training=TrainingSettings.model_validate(TRAINING),
        teacher=Teacher([teacher], Combination()),
        **fields,
    )


@pytest.mark.parametrize("kind", TERMS)
def test_a_distillation_by_a_term_ends_with_finite_numbers_and_another_student(kind):
    rows = toy_rows(labelled=24 if kind in LABELS_OF_TRANSFER_ROWS else 8)
    settings = DistillSettings.model_validate(
        {
            "objective": {"named": {"kind": kind}},
            "teacher": {"models": [WIDE_CNN], "training": TRAINING},
            "student": {"model": CNN},
            "training": TRAINING,
        }
    )
    result = distill(settings, rows=rows)
    history = result.histories["student"]
    assert len(history) == 2
    assert all(math.isfinite(value) for row in history for value in row.values())
    assert "loss/named" in history[0]
    for name in ("student", "twin"):
        assert math.isfinite(result.scores[name]["accuracy"])
    student, twin = (dict(result.models[name].named_parameters()) for name in ("student", "twin"))
    assert (kind == "ce") == all(torch.equal(student[name], twin[name]) for name in student)


@pytest.mark.parametrize("kind", COMPARING)
def test_what_is_trained_beside_the_student_is_no_part_of_it_and_no_hook_is_left(kind):
    student, teacher = model_of(CNN), model_of(WIDE_CNN, seed=1)
    names = list(student.state_dict())
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    fit(student, lesson({"ce": 1, kind: None}, teacher))
    assert list(student.state_dict()) == names
    for model in (student, teacher):
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("kind", ["hint", "cosine"])
def test_a_projector_learns_with_the_student(kind, monkeypatch):
    bound = []
    bind = Objective.bind

    def remembered(self, *args, **options):
        bound.append(bind(self, *args, **options))
        projector = bound[-1].parts[kind]["projector_0"]
        bound.append(projector.layer.weight.detach().clone())
        return bound[0]

    monkeypatch.setattr(Objective, "bind", remembered)
    fit(model_of(CNN), lesson({kind: None}, model_of(WIDE_CNN, seed=1)))
    objective, first = bound
    assert not torch.equal(objective.parts[kind]["projector_0"].layer.weight, first)


def test_the_discriminators_accuracy_and_the_learned_temperature_are_logged():
    teacher = model_of(WIDE_CNN, seed=1)
    table = {"adversarial": None, "kd": {"learned": True}}
    history = fit(model_of(CNN), lesson(table, teacher))
    for row in history.epochs:
        assert 0 <= row["notes/adversarial/accuracy"] <= 1
        assert 1 < row["notes/kd/temperature"] < 21
    assert history.epochs[0]["notes/kd/temperature"] == pytest.approx(15.62, abs=0.1)


def test_a_term_that_needs_labels_of_unlabelled_rows_is_refused_by_its_name():
    with pytest.raises(ValueError, match=r"objective.dkd needs the labels of all transfer rows"):
        fit(model_of(CNN), lesson({"dkd": 1}, model_of(CNN, seed=1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", TERMS)
def test_half_precision_gives_a_float32_loss(kind, dtype):
    objective = Objective.model_validate({kind: 1}).bind(
        model_of(CNN), model_of(WIDE_CNN), torch.randn(2, 1, 8, 8), num_classes=3, rows=9, seed=0
    )
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    logits = drawn(5, 3).requires_grad_()
    layers = {"penultimate": (2 * 4 * 4, 3 * 4 * 4), "last_map": ((2, 4, 4), (3, 4, 4))}
    term = TERMS[kind]()
    ours, theirs = {}, {}
    if isinstance(term, LayerTerm):
        shapes = layers[term.default_layer]
        for mine, features, layer in zip(
            shapes,
            (ours, theirs),
            (objective.student_layers[0], objective.teacher_layers[0]),
            strict=True,
        ):
            shape = mine if isinstance(mine, tuple) else (mine,)
            features[layer] = drawn(5, *shape).requires_grad_()
    view = View(
        labelled_logits=logits,
        labels=torch.tensor([0, 1, 2, 0, 1]),
        logits=logits,
        targets=Targets(drawn(5, 3)),
        transfer_labels=torch.tensor([0, 1, 2, 0, 1]),
        features=ours,
        teacher_features=theirs,
        rows=torch.tensor([4, 1, 7, 0, 2]),
    )
    loss = objective.losses(view)[kind]
    assert loss.dtype == torch.float32
    loss.backward()
    (learner,) = ours.values() if ours else (logits,)
    assert torch.isfinite(learner.grad).all()
    assert learner.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["crd", "adversarial"])
def test_what_a_term_remembers_stays_with_the_client_whoever_is_beside(kind):
    table = {"ce": 1, kind: None}
    mutual = ComposedObjective(
        learners={
            "private": Learner(objective=Objective.model_validate(table), teacher="meme"),
            "meme": Learner(objective=Objective.model_validate({"ce": 1}), teacher="private"),
        }
    )
    inputs, labels = images(15, 1)
    data = TrainingData(
        train_inputs=inputs,
        train_labels=labels,
        public_inputs=inputs[:0],
        public_labels=None,
        num_classes=3,
    )
    optimizer = OptimizerSettings()

    def round_of(clients, first):
        members = [
            Member(client, np.arange(5 * client, 5 * client + 5), first.get(client))
            for client in clients
        ]
        cohort = LoopCohort(
            members,
            model={name: ModelSettings.model_validate(CNN) for name in ("private", "meme")},
            optimizer=optimizer,
            data=data,
            pool=ModelPool(data, optimizer),
            streams=Streams(seed=7, round=2 if first else 1, rounds=3),
        )
        cohort.fit(mutual, private=Passes(batch_size=5))
        return dict(zip(clients, cohort.states(), strict=True))

    first = round_of((0, 1, 2), {})
    first = {client: ClientState.from_arrays(state.to_arrays()) for client, state in first.items()}
    together, alone = round_of((0, 1, 2), first)[2], round_of((2,), first)[2]
    one, other = together.to_arrays(), alone.to_arrays()
    assert one.keys() == other.keys()
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)
    parts = [state.models[PARTS].weights for state in (first[2], alone)]
    (steps,) = (name for name in parts[0] if name.endswith("steps"))
    assert [int(weights[steps]) for weights in parts] == [1, 2]
