"""Terms on layers: projectors where models differ, several layers, maps and vectors."""

import pytest
import torch
from torch import nn

from fedkd.losses.feature import attention_transfer, cosine_feature_loss, hint_loss, pool_maps
from fedkd.objectives import Objective, View
from fedkd.randomness import seeded_torch
from fedkd.targets import Targets

INPUTS = torch.randn(5, 2, 8, 8, generator=torch.Generator().manual_seed(1))
PURE = {"hint": hint_loss, "cosine": cosine_feature_loss}


def net(channels, width, stride=1):
    """Layers: "0" maps [channels, 6, 6] (or [channels, 3, 3]), "3" vectors [width]."""
    return nn.Sequential(
        nn.Conv2d(2, channels, 3, stride=stride),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(width),
        nn.Tanh(),
        nn.Linear(width, 4),
    )


def built(channels, width, stride=1, seed=0):
    with seeded_torch(seed):
        model = net(channels, width, stride)
        model(INPUTS)
    return model


def seen(objective, student, teacher, **fields):
    with objective.tapping(student, teacher) as (ours, theirs):
        logits = student(INPUTS)
        with torch.no_grad():
            teacher_logits = teacher(INPUTS)
    return View(
        logits=logits,
        targets=Targets(teacher_logits),
        features=ours,
        teacher_features=theirs,
        **fields,
    )


def bound(table, student, teacher, seed=0):
    return Objective.model_validate(table).bind(
        student, teacher, INPUTS[:2], num_classes=4, rows=9, seed=seed
    )


@pytest.mark.parametrize("kind", PURE)
def test_equal_shapes_are_compared_as_they_are(kind):
    student, teacher = built(3, 7), built(3, 7, seed=1)
    objective = bound({kind: {"weight": 1, "layers": ["0"]}}, student, teacher)
    assert not len(objective.parts)
    weights = torch.tensor([1.0, 0, 2, 1, 1])
    view = seen(objective, student, teacher, weights=weights)
    expected = PURE[kind](student[0](INPUTS), teacher[0](INPUTS), sample_weights=weights)
    assert objective.losses(view)[kind].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("kind", PURE)
def test_unequal_widths_are_projected_to_the_teachers(kind):
    student, teacher = built(3, 6), built(5, 7, seed=1)
    objective = bound({kind: 1}, student, teacher)  # the embedding
    projector = objective.parts[kind]["projector_0"]
    assert projector.layer.weight.shape == (7, 6)
    view = seen(objective, student, teacher)
    expected = PURE[kind](projector(student[:5](INPUTS)), teacher[:5](INPUTS))
    assert objective.losses(view)[kind].item() == pytest.approx(expected.item(), rel=1e-6)
    again = bound({kind: 1}, student, teacher).parts[kind]["projector_0"].layer.weight
    other = bound({kind: 1}, student, teacher, seed=1).parts[kind]["projector_0"].layer.weight
    assert torch.equal(again, projector.layer.weight)
    assert not torch.equal(other, projector.layer.weight)


@pytest.mark.parametrize("strides", [(2, 1), (1, 2)])
@pytest.mark.parametrize("channels", [(3, 5), (3, 3)])
def test_maps_of_unequal_size_are_averaged_down_to_the_smaller(strides, channels):
    student = built(channels[0], 6, strides[0])
    teacher = built(channels[1], 6, strides[1], seed=1)
    objective = bound({"hint": {"weight": 1, "layers": {"0": "0"}}}, student, teacher)
    ours, theirs = student[0](INPUTS), teacher[0](INPUTS)
    if strides[0] == 1:
        ours = pool_maps(ours, (3, 3))
    else:
        theirs = pool_maps(theirs, (3, 3))
    if channels == (3, 5):
        projector = objective.parts["hint"]["projector_0"]
        assert projector.layer.weight.shape == (5, 3, 1, 1)
        ours = projector(ours)
    else:
        assert not len(objective.parts)
    loss = objective.losses(seen(objective, student, teacher))["hint"]
    assert loss.item() == pytest.approx(hint_loss(ours, theirs).item(), rel=1e-6)


def test_a_vector_can_be_compared_with_maps():
    student, teacher = built(3, 6), built(5, 7, seed=1)
    table = {"to_vector": {"kind": "hint", "layers": {"0": "3"}, "weight": 1}}
    objective = bound(table, student, teacher)
    projector = objective.parts["to_vector"]["projector_0"]
    expected = hint_loss(projector(student[0](INPUTS).mean((2, 3))), teacher[:4](INPUTS))
    loss = objective.losses(seen(objective, student, teacher))["to_vector"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["hint", "cosine", "at"])
def test_several_layers_add_up_each_with_its_own_projector(kind):
    student, teacher = built(3, 6, 2), built(5, 7, seed=1)
    second = "1" if kind == "at" else "3"

    def loss_of(layers):
        objective = bound({kind: {"weight": 1, "layers": layers}}, student, teacher)
        if kind != "at":
            modules = objective.parts[kind]
            assert len(modules) == len(layers)
            with torch.no_grad():
                for module in modules.values():
                    module.layer.weight.fill_(0.1)
                    module.layer.bias.fill_(0.2)
        return objective.losses(seen(objective, student, teacher))[kind].item()

    one, other = loss_of({"0": "0"}), loss_of({second: second})
    assert loss_of({"0": "0", second: second}) == pytest.approx(one + other, rel=1e-5)


@pytest.mark.parametrize("mode", ["code", "paper"])
def test_attention_needs_no_projector_whatever_width_and_size(mode):
    student, teacher = built(3, 6, 2), built(5, 7, seed=1)
    objective = bound({"at": {"weight": 2, "mode": mode}}, student, teacher)
    assert not len(objective.parts)
    assert objective.student_layers == ("1",)  # the last maps
    expected = attention_transfer(student[:2](INPUTS), teacher[:2](INPUTS), mode=mode)
    loss = objective.losses(seen(objective, student, teacher))["at"]
    assert loss.item() == pytest.approx(2 * expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"late": {"kind": "at", "layers": {"0": "3"}}}, r"objective.late: .*teacher's layer '3'"),
        ({"hint": {"layers": ["9"]}}, r"objective.hint: the student has no layer '9'"),
        ({"hint": {"layers": []}}, r"objective.hint.layers: must name at least one layer"),
    ],
)
def test_layers_that_do_not_fit_are_refused_by_the_terms_name(table, message):
    with pytest.raises(ValueError, match=message):
        bound(table, built(3, 6), built(5, 7))


def test_a_step_without_the_layer_says_which_one():
    student, teacher = built(3, 6), built(5, 7)
    with pytest.raises(ValueError, match="no features of the student's layer 'penultimate'"):
        bound({"hint": 1}, student, teacher).losses(View())


@pytest.mark.parametrize("kind", ["hint", "cosine", "at"])
def test_gradients_reach_student_and_projector_but_no_teacher(kind):
    student, teacher = built(3, 6, 2), built(5, 7, seed=1)
    objective = bound({kind: {"layers": ["0"]}}, student, teacher)
    with objective.tapping(student, teacher) as (ours, theirs):
        student(INPUTS), teacher(INPUTS)  # the teacher with gradients on
    objective.losses(View(features=ours, teacher_features=theirs))[kind].backward()
    assert student[0].weight.grad.abs().sum() > 0
    assert all(weight.grad.abs().sum() > 0 for weight in objective.parts.parameters())
    assert all(weight.grad is None for weight in teacher.parameters())
