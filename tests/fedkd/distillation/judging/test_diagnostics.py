"""Diagnostics: that they measure the right models on the right rows, and move nothing."""

import dataclasses
import json
from typing import ClassVar

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from fedkd.distillation.fit.probes import TargetEntropy, spread_ids
from fedkd.distillation.judging.diagnostics import diagnose
from fedkd.distillation.judging.figures import draw
from fedkd.distillation.judging.result import Distillation
from fedkd.distillation.judging.scores import finished_logits
from fedkd.distillation.methods.peers import Ensemble
from fedkd.distillation.run.running import distill
from fedkd.distillation.settings import DistillSettings
from fedkd.distillation.task.combining import Combination
from fedkd.distillation.task.measures import DiagnosticsSettings
from fedkd.distillation.task.teachers import Teacher
from fedkd.metrics import agreement_matrix, linear_cka
from fedkd.models import ModelSettings
from fedkd.objectives import tapped
from fedkd.objectives.terms import Term
from fedkd.targets import Targets, soften

DROPOUT = {"hidden": [8], "dropout": 0.5}
BATCH_NORM = {"name": "cnn", "options": {"channels": [4], "norm": "batch"}}


def settings(**changes):
    training = {"epochs": 2, "batch_size": 8}
    return DistillSettings.model_validate(
        {
            "teacher": {"models": "mlp", "training": training},
            "student": {"model": {"name": "mlp", "options": {"hidden": [8]}}},
            "training": training,
            **changes,
        }
    )


def weights_of(model):
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


def as_read_from_json(tables):
    text = json.dumps(tables)
    return json.loads(text, parse_constant=lambda name: None)


def finished(rows, models, teacher, **changes):
    return Distillation(
        settings=settings(**changes),
        rows=rows,
        predictions=finished_logits(rows),
        models=models,
        scores={},
        costs={},
        histories={},
        teacher=teacher,
    )


class Constant(nn.Module):
    """Gives every row its own logits from a table, by the number in the first pixel."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.tensor(table)

    def forward(self, inputs):
        return self.table[inputs[:, 0, 0, 0].long()]


def numbered(count):
    inputs = torch.zeros(count, 1, 8, 8)
    inputs[:, 0, 0, 0] = torch.arange(count).float()
    return inputs


@pytest.fixture
def known(toy_rows):
    """Return a distillation of models that answer from tables, on 4 numbered rows everywhere."""

    def make(table_of, *, teachers=("teacher",), others=(), **changes):
        rows = dataclasses.replace(
            toy_rows(count=4, labelled=2),
            inputs=numbered(4),
            labels=torch.tensor([0, 1, 2, 0]),
            validation_inputs=numbered(4).flip(0),
            validation_labels=torch.tensor([0, 2, 1, 0]),
            test_inputs=numbered(4),
            test_labels=torch.tensor([0, 1, 2, 0]),
        )
        models = {name: Constant(table) for name, table in table_of.items()}
        teacher = Teacher([models[name] for name in teachers], Combination())
        if others:
            models["ensemble"] = Ensemble([models[name] for name in others])
        return finished(rows, models, teacher, **changes)

    return make


RIGHT = [[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0], [2.0, 0.0, 0.0]]
LAST_WRONG = [*RIGHT[:3], [0.0, 2.0, 0.0]]
FIRST_WRONG = [[0.0, 0.0, 2.0], *RIGHT[1:]]


def test_pairs_are_those_of_the_named_models_on_the_same_rows(known):
    tables = diagnose(known({"teacher": RIGHT, "student": LAST_WRONG, "twin": FIRST_WRONG}))
    pairs = tables["pairs"]
    assert pairs["names"] == ["teacher", "student", "twin"]
    assert pairs["agreement"] == [[1, 0.75, 0.75], [0.75, 1, 0.5], [0.75, 0.5, 1]]
    assert pairs["disagreement"] == [[0, 0.25, 0.25], [0.25, 0, 0.5], [0.25, 0.5, 0]]
    # One error each, on different rows of 4: covariance -1/16, variance 3/16.
    assert pairs["error_correlation"][1][2] == pytest.approx(-1 / 3)
    assert np.isnan(pairs["error_correlation"][0]).all()  # the teacher never errs
    assert pairs["q_statistic"][1][2] == -1
    # Another class than the other's costs (p_high - p_low) 2 nats on 1 row of 4.
    high, low = torch.softmax(torch.tensor(RIGHT[0]).double(), 0)[:2]
    assert pairs["kl"][0][1] == pytest.approx(float((high - low) * 2 / 4), rel=1e-9)
    assert tables["models"]["student"]["confusion"] == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert tables["models"]["student"]["geometry"]["row_range"] == pytest.approx(2.0)
    assert sum(tables["models"]["student"]["reliability"]["correct_counts"]) == 3


def test_peers_of_an_ensemble_and_teachers_are_measured_together(known):
    first, second = ([row[:] for row in table] for table in (LAST_WRONG, FIRST_WRONG))
    first[0], second[3] = [6.0, 0.0, 0.0], [6.0, 0.0, 0.0]  # surer than the one who errs
    distillation = known(
        {"teacher 1": RIGHT, "teacher 2": RIGHT, "student": first, "twin": RIGHT, "peer 2": second},
        teachers=("teacher 1", "teacher 2"),
        others=("student", "peer 2"),
    )
    ensembles = diagnose(distillation)["ensembles"]
    assert ensembles["ensemble"]["members"] == ["student", "peer 2"]
    assert ensembles["ensemble"]["gain"] == pytest.approx(0.25)
    assert ensembles["ensemble"]["disagreement"] == 0.5
    between = ensembles["ensemble"]["entropy"] - np.mean(ensembles["ensemble"]["member_entropy"])
    assert ensembles["ensemble"]["jensen_shannon"] == pytest.approx(between)
    assert ensembles["teachers"]["members"] == ["teacher 1", "teacher 2"]
    assert ensembles["teachers"]["gain"] == 0
    assert ensembles["teachers"]["jensen_shannon"] == pytest.approx(0, abs=1e-12)


def test_a_threshold_keeps_the_rows_that_the_run_would_keep(known):
    unsure = [[0.1, 0.0, 0.0], *RIGHT[1:]]  # confidence 0.36, the others 0.79
    tables = diagnose(
        known(
            {"teacher": unsure, "student": RIGHT, "twin": RIGHT},
            targets={"confidence_threshold": 0.5},
        )
    )
    target = tables["target"]
    assert target["kept_by_class"] == [0.5, 1, 1]  # of class 0 one row of two
    curve = target["threshold_curve"]
    kept = dict(zip(np.round(curve["thresholds"], 2).tolist(), curve["kept"], strict=True))
    assert kept[0.3] == 1
    assert kept[0.5] == 0.75
    assert kept[0.99] == 0
    assert sum(target["confidence"]["counts"]) == 4
    entropies = torch.special.entr(soften(torch.tensor(unsure), temperature=1.0)).sum(-1)
    assert target["entropy"] == pytest.approx(float(entropies.mean()), rel=1e-6)


def test_the_split_that_is_named_is_looked_at_and_the_other_is_not(known):
    distillation = known({"teacher": RIGHT, "student": LAST_WRONG, "twin": RIGHT})
    rows = distillation.rows
    poisoned = dataclasses.replace(
        distillation,
        rows=dataclasses.replace(rows, test_inputs=torch.full_like(rows.test_inputs, 1e9)),
    )
    tables = diagnose(poisoned, DiagnosticsSettings(split="validation"))
    assert tables["split"] == "validation"
    # Validation rows are numbered from the end: the wrong one comes first.
    assert tables["models"]["student"]["confusion"] == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
    poisoned = dataclasses.replace(
        distillation,
        rows=dataclasses.replace(
            rows, validation_inputs=torch.full_like(rows.validation_inputs, 1e9)
        ),
    )
    assert diagnose(poisoned)["split"] == "test"


def test_a_student_that_is_its_teacher_computes_alike_in_every_layer(toy_rows, workshop):
    shop = workshop()
    same, other = (
        shop.build(ModelSettings(name="mlp", options={"hidden": [16, 8]}), number)
        for number in (3, 4)
    )
    models = {"teacher": same, "student": same, "twin": other}
    tables = diagnose(finished(shop.rows, models, Teacher([same], Combination())))
    similarity = tables["similarity"]
    assert similarity["rows"] == 48
    assert similarity["teacher_layers"] == similarity["student_layers"]
    assert np.diagonal(similarity["matrix"]) == pytest.approx(1)
    assert not any("dropout" in layer for layer in similarity["teacher_layers"])
    inputs = shop.rows.inputs
    first, last = similarity["teacher_layers"][0], similarity["student_layers"][-1]
    with tapped(same, [first, last]) as features:
        same(inputs)
    expected = linear_cka(features[first], features[last], unbiased=True)
    assert similarity["matrix"][0][-1] == pytest.approx(expected)
    assert expected < 0.99
    assert np.abs(np.array(tables["class_correlation"]["student"])).max() == 0
    assert np.abs(np.array(tables["class_correlation"]["twin"])).max() > 0
    assert all(not module._forward_hooks for module in same.modules())


def test_everything_on_leaves_every_bit_as_it_is(toy_rows):
    rows = toy_rows()
    every = {"flatness": True, "gradients": True, "noise_draws": 2}
    changes = {
        "student": {"model": BATCH_NORM},
        "training": {
            "epochs": 2,
            "batch_size": 8,
            "augmentation": {"gaussian_noise": 0.1, "horizontal_flip": 0.5},
        },
    }
    plain, measured = (
        distill(settings(**changes, diagnostics=each), rows=rows) for each in ({}, every)
    )
    before = {name: weights_of(model) for name, model in measured.models.items()}
    tables = diagnose(measured)
    for name, weights in before.items():
        assert torch.equal(weights, weights_of(plain.models[name]))
        assert torch.equal(weights, weights_of(measured.models[name]))
    without = [
        {key: value for key, value in row.items() if not key.startswith("gradients/")}
        for row in measured.histories["student"]
    ]
    assert without == plain.histories["student"]
    assert without != measured.histories["student"]
    assert json.dumps(diagnose(measured)) == json.dumps(tables)  # the same noise again
    still = tables["flatness"]["student"][0]
    assert still["sigma"] == 0
    assert {point["draws"] for point in tables["flatness"]["twin"]} == {2}


OFF = {"kind": "kd", "weight": 0}


def test_gradients_of_a_term_beside_that_of_the_labels(workshop, trained_teacher, toy_rows):
    rows = toy_rows(labelled=48)
    # The same term twice: its gradient is three times as long and points the same way.
    shop = workshop(
        rows=rows, objective={"ce": 1, "again": {"kind": "ce", "weight": 3}, "kd": 1, "off": OFF}
    )
    shop = dataclasses.replace(shop, compares_gradients=True)
    student = shop.new_student()
    history = shop.fit(student, name="student", teacher=trained_teacher(rows=rows))
    for row in history.epochs:
        assert row["gradients/again/norm_ratio"] == pytest.approx(3, rel=1e-5)
        assert row["gradients/again/cosine"] == pytest.approx(1, rel=1e-5)
        assert -1 <= row["gradients/kd/cosine"] < 0.9999
        assert not [name for name in row if "gradients/off" in name]


class Drawn(Term):
    """A term that draws a number in every step."""

    source: ClassVar[str] = "this test"

    def value(self, view, parts, pairs):
        return view.logits.square().mean() * torch.rand(())


@pytest.mark.parametrize(
    "terms",
    [
        {"crd": {"num_negatives": 8}},  # keeps a memory bank
        {"adversarial": {}},  # trains a second network
        {"hint": {}},  # trains a projector and taps layers
        {"drawn": Drawn()},
    ],
)
def test_comparing_gradients_moves_nothing_that_trains(workshop, trained_teacher, terms):
    teacher = trained_teacher()
    shop = workshop(
        objective={"ce": 1, "kd": 1, **terms}, model=ModelSettings(name="mlp", options=DROPOUT)
    )
    students, rows = [], []
    for compares in (False, True):
        shop = dataclasses.replace(shop, compares_gradients=compares)
        student = shop.new_student()
        rows.append(shop.fit(student, name="student", teacher=teacher).epochs)
        students.append(student)
    assert torch.equal(*map(weights_of, students))
    for plain, compared in zip(*rows, strict=True):
        assert {key: compared[key] for key in plain} == plain
        assert {f"gradients/{name}/cosine" for name in ("kd", *terms)} <= set(compared)


@pytest.mark.parametrize("labelled", [0, 12, 48])
def test_the_entropy_of_the_target_is_that_at_the_temperature_in_force(
    workshop, trained_teacher, toy_rows, labelled
):
    rows = toy_rows(labelled=labelled)
    shop = workshop(rows=rows, objective={"kd": {"temperature": 3}})
    teacher = trained_teacher()
    history = shop.fit(shop.new_student(), name="student", teacher=teacher)
    logits = teacher.member_logits(rows.inputs)[0].double()
    expected = torch.special.entr(soften(logits, temperature=3.0)).sum(-1).mean()
    for row in history.epochs:
        assert row["targets/entropy"] == pytest.approx(float(expected), rel=1e-6)


def test_the_entropy_of_an_epoch_counts_every_row_once_when_the_temperature_moves():
    tracked = TargetEntropy()
    assert tracked.take() is None
    logits = torch.randn(150, 5, generator=torch.Generator().manual_seed(0))
    expected = []
    for step, batch in enumerate(logits.split(1)):  # more steps than are kept back
        temperature = 1.0 if step < 100 else 4.0
        tracked.add(Targets.from_model(batch), temperature=temperature)
        expected.append(torch.special.entr(soften(batch.double(), temperature=temperature)).sum())
    assert tracked.take() == pytest.approx(float(torch.stack(expected).mean()), rel=1e-9)
    assert tracked.take() is None


def test_targets_that_no_epoch_changes_are_looked_at_once():
    uniform = Targets.from_model(torch.zeros(2, 5))
    sure = Targets.from_model(torch.tensor([[50.0, 0, 0, 0, 0]]))
    known, moving = TargetEntropy(same_every_epoch=True), TargetEntropy()
    found = []
    for tracked in (known, moving):
        tracked.add(uniform, temperature=2.0)
        found.append(tracked.take())
        tracked.add(sure, temperature=2.0)
        found.append(tracked.take())
    assert found == pytest.approx([np.log(5), np.log(5), np.log(5), 0], abs=1e-8)


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": {"kd": {"temperature": {"kind": "linear", "start": 8, "end": 1}}}},
        {"objective": {"kd": 1}, "augmentation": {"gaussian_noise": 2.0}},
    ],
)
def test_the_entropy_follows_targets_that_change(workshop, trained_teacher, changes):
    shop = workshop(**changes)
    history = shop.fit(shop.new_student(), name="student", teacher=trained_teacher())
    assert len({row["targets/entropy"] for row in history.epochs}) == 3


def test_ids_are_spread_over_the_whole_range():
    assert spread_ids(3, 6, 10).tolist() == [3, 4, 5]
    assert spread_ids(10, 20, 4).tolist() == [10, 12, 15, 17]
    assert len(spread_ids(5, 5, 4)) == 0


def test_every_table_is_drawn_from_json_too(toy_rows):
    distillation = distill(
        settings(
            teacher={"models": ["mlp", "mlp"], "training": {"epochs": 1}},
            diagnostics={"flatness": True, "gradients": True, "noise_draws": 1},
            targets={"confidence_threshold": 0.4},
        ),
        rows=toy_rows(),
    )
    tables = diagnose(distillation)
    drawn = draw(as_read_from_json(tables))
    assert set(drawn) == {
        *(f"reliability_{name}" for name in ("teacher_1", "teacher_2", "student", "twin")),
        "confusion_student",
        "class_correlation_student",
        "class_correlation_twin",
        "agreement",
        "kl",
        "error_correlation",
        "confidence",
        "threshold",
        "cka",
        "flatness",
        "target_entropy_student",
        "schedules_student",
        "gradients_student",
    }
    assert "targets/kept" in tables["epochs"]["student"]["kept"]
    matrix = np.array(tables["pairs"]["agreement"])
    shown = drawn["agreement"].axes[0].images[0].get_array()
    assert np.asarray(shown) == pytest.approx(100 * matrix)


def test_what_costs_time_is_off_and_what_is_off_is_not_measured(toy_rows):
    defaults = DistillSettings().diagnostics
    assert (defaults.similarity, defaults.flatness, defaults.gradients) == (True, False, False)
    distillation = distill(settings(diagnostics={"similarity": False}), rows=toy_rows())
    tables = diagnose(distillation)
    assert tables["similarity"] is None
    assert tables["flatness"] is None
    assert tables["epochs"]["student"]["gradients"] == {}
    assert set(tables["epochs"]) == {"student"}  # teacher and twin were taught nothing
    assert {"cka", "flatness", "gradients_student"}.isdisjoint(draw(tables))


def test_a_method_without_a_teacher_is_diagnosed_by_its_peers(toy_rows):
    distillation = distill(settings(method="dml"), rows=toy_rows())
    tables = diagnose(distillation)
    assert tables["target"] is None
    assert tables["similarity"] is None
    assert tables["class_correlation"] is None
    assert tables["ensembles"]["ensemble"]["members"] == ["student", "peer 2"]
    logits = [
        distillation.models[name](distillation.rows.test_inputs).detach().numpy()
        for name in tables["pairs"]["names"]
    ]
    assert np.array(tables["pairs"]["agreement"]) == pytest.approx(
        agreement_matrix(np.stack(logits))
    )
    drawn = draw(tables)
    assert {"agreement", "schedules_student"} <= set(drawn)
    assert "target_entropy_student" not in drawn


def test_noise_must_be_positive():
    with pytest.raises(ValidationError, match=r"noise\.1\n.*input_value=-0\.1"):
        DiagnosticsSettings(noise=(0.1, -0.1))


@pytest.mark.parametrize("diverges", ["student", "teacher"])
def test_models_that_diverged_are_left_out(toy_rows, diverges):
    settings = DistillSettings.model_validate(
        {"training": {"epochs": 1}, "teacher": {"models": "mlp", "training": {"epochs": 1}}}
    )
    finished = distill(settings, rows=toy_rows())
    with torch.no_grad():
        next(finished.models[diverges].parameters()).fill_(float("nan"))
    # What the models said before is no longer what they say.
    finished = dataclasses.replace(finished, predictions=finished_logits(finished.rows))
    tables = diagnose(finished)
    assert list(tables["models"]) == [name for name in finished.models if name != diverges]
    assert (tables["target"] is None) == (diverges == "teacher")
    assert draw(tables)
