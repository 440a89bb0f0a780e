"""An objective is the sum of its named, weighted terms; settings say which."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from fedkd.objectives import TERMS, Objective, View, describe_terms
from fedkd.targets import Targets

STUDENT = torch.tensor([[1.0, 2, 3, 0], [0.5, -1, 0, 2]], dtype=torch.float64)
TEACHER = torch.tensor([[2.0, 1, 4, -1], [0, 0, 1, 3]], dtype=torch.float64)
LABELS = torch.tensor([2, 0])


def net(width=6):
    return nn.Sequential(nn.Flatten(), nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 4))


def bound(table, student=None, teacher=None):
    objective = Objective.model_validate(table)
    return objective.bind(
        student or net(), teacher, torch.randn(2, 1, 2, 2), num_classes=4, rows=10, seed=0
    )


def view(progress=0.0):
    student = STUDENT.clone().requires_grad_()
    return View(
        labelled_logits=student,
        labels=LABELS,
        logits=student,
        targets=Targets(TEACHER),
        transfer_labels=LABELS,
        progress=progress,
    )


def test_the_golden_sum_of_labels_and_soft_targets():
    # 0.1 * 1.14126964 + 0.9 * 0.32085861 (reference values at T = 4)
    losses = bound({"ce": 0.1, "kd": {"weight": 0.9, "temperature": 4}}).losses(view())
    assert list(losses) == ["ce", "kd"]
    assert sum(losses.values()).item() == pytest.approx(0.40289972, abs=1e-8)


def test_a_weight_and_a_temperature_take_schedules():
    table = {
        "ce": {"weight": {"kind": "linear", "start": 1, "end": 0}},
        "kd": {"temperature": {"kind": "linear", "start": 4, "end": 2}},
    }
    objective = bound(table)
    start, end = objective.losses(view(0.0)), objective.losses(view(1.0))
    assert start["ce"].item() == pytest.approx(1.14126964, abs=1e-8)
    assert start["kd"].item() == pytest.approx(0.32085861, abs=1e-8)
    assert end["kd"].item() == pytest.approx(0.25344814, abs=1e-8)
    assert "ce" not in end  # a weight of 0 leaves the term out


def test_the_same_kind_may_stand_twice_under_names_of_its_own():
    losses = bound({"soft": {"kind": "kd", "temperature": 2}, "kd": {"temperature": 4}}).losses(
        view()
    )
    assert losses["soft"].item() == pytest.approx(0.25344814, abs=1e-8)
    assert losses["kd"].item() == pytest.approx(0.32085861, abs=1e-8)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"kdd": 1}, r"unknown term 'kdd' in objective.*did you mean 'kd'"),
        ({"kd": {"temprature": 2}}, r"unknown setting 'objective.kd.temprature'.*temperature"),
        (
            {"kd": {"temperature": 0}},
            r"objective.kd.temperature: must be >= 0.001 and .*, got 0",
        ),
        ({"kd": -1}, r"objective.kd.weight: must be >= 0 and .*, got -1"),
        ({"kd": "much"}, r"objective.kd must be a weight or a table of settings, got 'much'"),
        ({}, r"needs at least one term"),
    ],
)
def test_a_mistake_is_named_with_its_value_and_what_would_work(table, message):
    with pytest.raises(ValidationError, match=message):
        Objective.model_validate(table)


def test_an_objective_survives_the_way_through_a_file():
    objective = Objective.model_validate({"ce": 0.1, "late": {"kind": "kd", "temperature": 2}})
    again = Objective.model_validate_json(objective.model_dump_json())
    assert again == objective
    assert type(again.terms["late"]) is TERMS["kd"]


@pytest.mark.parametrize("kind", TERMS)
def test_every_term_can_be_built_with_its_defaults_and_says_whose_idea_it_is(kind):
    term = TERMS[kind]()
    assert term.kind == kind
    assert term.source
    assert term.__doc__
    assert Objective.model_validate({kind: None}).terms[kind] == term


def test_the_listing_names_every_term_with_its_defaults():
    listed = {row["name"]: row for row in describe_terms()}
    assert set(listed) == set(TERMS)
    assert listed["kd"]["defaults"]["temperature"] == {"kind": "constant", "value": 4.0}


def test_mixed_rows_have_both_their_labels():
    from fedkd.data.augmentation import Mix

    mixed = view()._replace(mix=Mix(torch.tensor([1, 0]), 0.25))
    loss = bound({"ce": 1}).losses(mixed)["ce"]
    expected = 0.25 * F.cross_entropy(STUDENT, LABELS) + 0.75 * F.cross_entropy(
        STUDENT, LABELS.flip(0)
    )
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)


def test_a_learned_temperature_is_a_part_and_climbs_where_the_student_descends():
    objective = bound({"kd": {"learned": True, "learned_until": 1.0}})
    (theta,) = objective.parts.parameters()
    at_start = objective.losses(view(0.0))["kd"]
    at_start.backward()
    assert theta.grad.item() == 0  # the reversal sets in slowly
    temperature = 1 + 20 * torch.sigmoid(torch.tensor(1.0)).item()
    fixed = bound({"kd": {"temperature": temperature}}).losses(view())["kd"]
    assert at_start.item() == pytest.approx(fixed.item(), rel=1e-5)
    theta.grad = None
    late = objective.losses(view(1.0))["kd"]
    late.backward()
    downhill = theta.grad.item()
    with torch.no_grad():
        theta -= 1e-2 * downhill / abs(downhill)
    assert objective.losses(view(1.0))["kd"].item() > late.item()


@pytest.mark.parametrize("name", ["a.b", "a/b", "keys", "type"])
def test_a_name_that_no_module_or_column_can_have_is_refused(name):
    with pytest.raises(ValidationError, match=r"a name in objective must be"):
        Objective.model_validate({name: {"kind": "kd"}})


def test_layers_may_be_numbers_as_yaml_reads_them():
    for layers, pairs in (({3: 6}, (("3", "6"),)), ([3], (("3", "3"),))):
        objective = Objective.model_validate({"hint": {"layers": layers}})
        assert objective.terms["hint"].layer_pairs() == pairs


def test_a_learned_temperature_leaves_no_say_to_the_teachers_own():
    with pytest.raises(ValidationError, match="teacher_temperature has no say with learned"):
        Objective.model_validate({"kd": {"learned": True, "teacher_temperature": 2}})


def test_temperatures_in_force_are_the_learned_ones_and_those_of_the_teacher():
    learned = bound({"kd": {"learned": True}})
    assert learned.temperatures(0.5) == pytest.approx({"kd": 15.62}, abs=0.01)
    assert learned.target_temperature(0.5) == pytest.approx(15.62, abs=0.01)
    apart = bound({"mse": 1, "kd": {"temperature": 4, "teacher_temperature": 2}})
    assert apart.temperatures(0.0) == {"kd": 4.0}
    assert apart.target_temperature(0.0) == 2.0
    assert bound({"mse": 1}).target_temperature(0.0) == 1.0
