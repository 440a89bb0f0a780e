"""A number that is none is never made into one: every term hands it on, and a fit stops at it."""

import math

import pytest
import torch

from fedkd.models import ModelSettings, build_model
from fedkd.objectives import TERMS, Objective, View
from fedkd.objectives.terms import LayerTerm
from fedkd.targets import Targets

NOT_A_NUMBER = {"nan": math.nan, "inf": math.inf}
FROM_TEACHER = [kind for kind in TERMS if TERMS[kind]().needs != ("labels",)]


def model_of(channels, seed):
    settings = ModelSettings(name="cnn", options={"channels": [channels]})
    return build_model(settings, input_shape=(1, 8, 8), num_classes=3, seed=seed)


def a_step(objective, kind):
    """Return a step on five rows, with gradients of nobody."""
    generator = torch.Generator().manual_seed(0)
    view = View(
        labelled_logits=torch.randn(5, 3, generator=generator),
        labels=torch.tensor([0, 1, 2, 0, 1]),
        logits=torch.randn(5, 3, generator=generator),
        targets=Targets(torch.randn(5, 3, generator=generator)),
        transfer_labels=torch.tensor([0, 1, 2, 0, 1]),
        rows=torch.tensor([4, 1, 7, 0, 2]),
        progress=0.5,
    )
    term = TERMS[kind]()
    if not isinstance(term, LayerTerm):
        return view
    shapes = {"penultimate": ((32,), (48,)), "last_map": ((2, 4, 4), (3, 4, 4))}
    ours, theirs = shapes[term.default_layer]
    return view._replace(
        features={objective.student_layers[0]: torch.randn(5, *ours, generator=generator)},
        teacher_features={
            objective.teacher_layers[0]: torch.randn(5, *theirs, generator=generator)
        },
    )


def spoilt(tensor, value):
    """Return a copy with one number replaced."""
    copy = tensor.clone()
    copy.view(-1)[1] = value
    return copy


def loss_of(kind, change):
    objective = Objective.model_validate({"named": {"kind": kind}}).bind(
        model_of(2, 0), model_of(3, 1), torch.randn(2, 1, 8, 8), num_classes=3, rows=9, seed=0
    )
    return objective.losses(change(a_step(objective, kind)))["named"].item()


@pytest.mark.parametrize("value", NOT_A_NUMBER.values(), ids=NOT_A_NUMBER)
@pytest.mark.parametrize("kind", FROM_TEACHER)
def test_what_a_teacher_says_wrongly_is_seen_in_the_loss(kind, value):
    def change(view):
        if view.teacher_features:
            features = {n: spoilt(t, value) for n, t in view.teacher_features.items()}
            return view._replace(teacher_features=features)
        return view._replace(targets=Targets(spoilt(view.targets.values, value)))

    assert math.isfinite(loss_of(kind, lambda view: view))
    assert not math.isfinite(loss_of(kind, change))


@pytest.mark.parametrize("value", NOT_A_NUMBER.values(), ids=NOT_A_NUMBER)
@pytest.mark.parametrize("kind", TERMS)
def test_what_a_student_says_wrongly_is_seen_in_the_loss(kind, value):
    def change(view):
        if view.features:
            features = {name: spoilt(t, value) for name, t in view.features.items()}
            return view._replace(features=features)
        return view._replace(
            logits=spoilt(view.logits, value), labelled_logits=spoilt(view.labelled_logits, value)
        )

    assert not math.isfinite(loss_of(kind, change))
