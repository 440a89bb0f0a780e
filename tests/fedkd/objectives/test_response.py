"""Terms on the teacher's predictions are their pure functions, with every setting handed on."""

import pytest
import torch
from torch import nn

from fedkd.losses.correlation import dist_loss
from fedkd.losses.distances import annealing_kd, probability_mse
from fedkd.losses.other_classes import decoupled_kd, normalised_kd, not_true_loss
from fedkd.losses.row_temperatures import (
    confidence_temperatures,
    disagreement_temperatures,
    row_temperature_kl,
)
from fedkd.losses.standardised import standardised_kd
from fedkd.objectives import Objective, View
from fedkd.targets import Targets

ROWS, CLASSES = 5, 4
LABELS = torch.tensor([3, 0, 1, 1, 2])
WEIGHTS = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.5], dtype=torch.float64)
RAMP = {"kind": "linear", "start": 4, "end": 2}  # 3 halfway

TERMS = {
    "prob_mse": (
        {"temperature": RAMP},
        lambda s, t: probability_mse(s, t, temperature=3.0, sample_weights=WEIGHTS),
    ),
    "annealing": (
        {"max_temperature": 6, "until": 0.8},
        lambda s, t: annealing_kd(
            s, t, progress=0.625, max_temperature=6.0, sample_weights=WEIGHTS
        ),
    ),
    "dkd": (
        {"temperature": RAMP, "alpha": 0.5, "beta": 3, "scale_by_t2": False},
        lambda s, t: decoupled_kd(
            s,
            t,
            LABELS,
            alpha=0.5,
            beta=3.0,
            temperature=3.0,
            scale_by_t2=False,
            sample_weights=WEIGHTS,
        ),
    ),
    "nkd": (
        {"temperature": RAMP, "gamma": 0.7, "scale_by_t2": False},
        lambda s, t: normalised_kd(
            s, t, LABELS, gamma=0.7, temperature=3.0, scale_by_t2=False, sample_weights=WEIGHTS
        ),
    ),
    "ntd": (
        {"temperature": RAMP, "scale_by_t2": True},
        lambda s, t: not_true_loss(
            s, t, LABELS, temperature=3.0, scale_by_t2=True, sample_weights=WEIGHTS
        ),
    ),
    "dist": (
        {"temperature": RAMP, "beta": 0.5, "gamma": 3, "scale_by_t2": False},
        lambda s, t: dist_loss(
            s, t, beta=0.5, gamma=3.0, temperature=3.0, scale_by_t2=False, sample_weights=WEIGHTS
        ),
    ),
    "logit_std": (
        {"temperature": RAMP, "scale_by_t2": False},
        lambda s, t: standardised_kd(
            s, t, temperature=3.0, scale_by_t2=False, sample_weights=WEIGHTS
        ),
    ),
    "flsw": (
        {"temperature": RAMP, "beta": 2, "gamma": 0.5, "min_temperature": 2.9},
        lambda s, t: row_temperature_kl(
            s,
            t,
            disagreement_temperatures(
                s, t, temperature=3.0, beta=2.0, gamma=0.5, min_temperature=2.9
            ),
            sample_weights=WEIGHTS,
        ),
    ),
    "cwsm": (
        {"temperature": RAMP, "beta": 2, "min_temperature": 2.5, "scale_by_t2": False},
        lambda s, t: row_temperature_kl(
            s,
            t,
            confidence_temperatures(s, temperature=3.0, beta=2.0, min_temperature=2.5),
            scale_by_t2=False,
            sample_weights=WEIGHTS,
        ),
    ),
}


def logits():
    generator = torch.Generator().manual_seed(5)
    student = 2 * torch.randn(ROWS, CLASSES, generator=generator, dtype=torch.float64)
    teacher = 2 * torch.randn(ROWS, CLASSES, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher.requires_grad_()


def bound(table, num_classes=CLASSES):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, num_classes))
    return Objective.model_validate(table).bind(
        model, None, torch.randn(2, 1, 2, 2), num_classes=num_classes, rows=10, seed=0
    )


@pytest.mark.parametrize("kind", TERMS)
def test_a_term_is_its_pure_function_times_its_weight(kind):
    options, pure = TERMS[kind]
    student, teacher = logits()
    view = View(
        logits=student,
        targets=Targets(teacher),
        transfer_labels=LABELS,
        weights=WEIGHTS,
        progress=0.5,
    )
    loss = bound({"named": {"kind": kind, "weight": 1.5, **options}}).losses(view)["named"]
    expected = 1.5 * pure(student, teacher)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert bound({kind: 1}).losses(view)[kind].item() != pytest.approx(expected.item() / 1.5)
    loss.backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("kind", "pure"),
    [
        ("prob_mse", lambda s, t: probability_mse(s, t)),
        ("annealing", lambda s, t: annealing_kd(s, t, progress=0.5)),
        ("dkd", lambda s, t: decoupled_kd(s, t, LABELS)),
        ("nkd", lambda s, t: normalised_kd(s, t, LABELS)),
        ("ntd", lambda s, t: not_true_loss(s, t, LABELS)),
        ("dist", lambda s, t: 2 * dist_loss(s, t)),  # its published weight
        ("logit_std", lambda s, t: 9 * standardised_kd(s, t)),
    ],
)
def test_defaults_are_those_of_the_paper(kind, pure):
    student, teacher = logits()
    view = View(logits=student, targets=Targets(teacher), transfer_labels=LABELS, progress=0.5)
    loss = bound({kind: None}).losses(view)[kind]
    assert loss.item() == pytest.approx(pure(student, teacher).item(), rel=1e-12)


@pytest.mark.parametrize("kind", ["dkd", "nkd", "ntd"])
def test_two_classes_are_refused_when_the_objective_is_bound(kind):
    message = r"objective.late: needs at least 3 classes, got 2.*use kd"
    with pytest.raises(ValueError, match=message):
        bound({"late": {"kind": kind}}, num_classes=2)
    assert Objective.model_validate({kind: 1}).needs("transfer_labels") == (kind,)
    student, teacher = logits()
    with pytest.raises(ValueError, match="no labels of the transfer rows"):
        bound({kind: 1}).losses(View(logits=student, targets=Targets(teacher)))


def test_annealing_ends_with_the_teacher_as_it_is():
    student, teacher = logits()
    table = {"annealing": {"until": 0.5}, "mse": 1}
    for progress in (0.5, 0.8):
        view = View(logits=student, targets=Targets(teacher), progress=progress)
        losses = bound(table).losses(view)
        assert losses["annealing"].item() == pytest.approx(losses["mse"].item(), rel=1e-12)
