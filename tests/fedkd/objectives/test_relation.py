"""Terms on relations among rows: of layers or of logits, and the banks of contrast by row id."""

import copy

import pytest
import torch
from torch import nn

from fedkd.losses.relation import (
    pkt_loss,
    rkd_angle_loss,
    rkd_distance_loss,
    similarity_preserving_loss,
)
from fedkd.objectives import Objective, View
from fedkd.targets import Targets

PURE = {
    "rkd_distance": (rkd_distance_loss, 25),
    "rkd_angle": (rkd_angle_loss, 50),
    "sp": (similarity_preserving_loss, 3000),
    "pkt": (pkt_loss, 30000),
}
KINDS = [*PURE, "crd"]
ROWS = torch.tensor([8, 2, 5, 0, 7])


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator)


def net(width):
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.Flatten(), nn.Linear(width * 4, 4))


def bound(table, teacher=True, seed=0):
    """Bind to a student with 3 channels of 2x2 and a teacher with 6."""
    return Objective.model_validate(table).bind(
        net(3), net(6) if teacher else None, drawn(2, 1, 4, 4), num_classes=4, rows=9, seed=seed
    )


def view(ours, theirs, layer="penultimate", rows=ROWS):
    return View(features={layer: ours}, teacher_features={layer: theirs}, rows=rows)


@pytest.mark.parametrize("kind", PURE)
def test_a_term_is_its_pure_function_of_the_embedding(kind):
    pure, weight = PURE[kind]
    ours, theirs = drawn(5, 12).requires_grad_(), drawn(5, 24, seed=1).requires_grad_()
    objective = bound({kind: None})
    assert objective.student_layers == objective.teacher_layers == ("penultimate",)
    loss = objective.losses(view(ours, theirs))[kind]
    assert loss.item() == pytest.approx(weight * pure(ours, theirs).item(), rel=1e-6)
    loss.backward()
    assert ours.grad.abs().sum() > 0
    assert theirs.grad is None


@pytest.mark.parametrize("kind", PURE)
def test_maps_are_averaged_over_space_except_where_published_as_they_are(kind):
    ours, theirs = drawn(5, 3, 2, 2), drawn(5, 6, 2, 2, seed=1)
    loss = bound({kind: {"weight": 1, "layers": ["0"]}}).losses(view(ours, theirs, "0"))[kind]
    flat, mean = (
        PURE[kind][0](reduce(ours), reduce(theirs)).item()
        for reduce in (lambda maps: maps.flatten(1), lambda maps: maps.mean((2, 3)))
    )
    assert flat != pytest.approx(mean, rel=1e-3)
    assert loss.item() == pytest.approx(flat if kind == "sp" else mean, rel=1e-6)


@pytest.mark.parametrize("kind", PURE)
def test_several_layers_add_up(kind):
    features = {"0": drawn(5, 3, 2, 2), "penultimate": drawn(5, 12, seed=1)}
    others = {"0": drawn(5, 6, 2, 2, seed=2), "penultimate": drawn(5, 24, seed=3)}
    seen = View(features=features, teacher_features=others)

    def loss_of(layers):
        return bound({kind: {"layers": layers}}).losses(seen)[kind].item()

    total = loss_of(["0"]) + loss_of(["penultimate"])
    assert loss_of(["0", "penultimate"]) == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_on_logits_a_term_needs_no_layers_of_the_teacher(kind):
    table = {kind: {"on": "logits", "weight": 1}}
    objective = Objective.model_validate(table)
    assert objective.needs("teacher") == (kind,)
    assert objective.needs("features") == ()
    assert Objective.model_validate({kind: 1}).needs("features") == (kind,)
    assert Objective.model_validate({kind: 1}).needs("teacher") == ()
    known = bound(table, teacher=False)
    assert known.student_layers == ()
    ours, theirs = drawn(5, 4).requires_grad_(), drawn(5, 4, seed=1).requires_grad_()
    loss = known.losses(View(logits=ours, targets=Targets(theirs), rows=ROWS))[kind]
    if kind in PURE:
        assert loss.item() == pytest.approx(PURE[kind][0](ours, theirs).item(), rel=1e-6)
    loss.backward()
    assert ours.grad.abs().sum() > 0
    assert theirs.grad is None


def test_layers_beside_logits_are_refused():
    with pytest.raises(ValueError, match=r"objective.sp: layers has no say with on: logits"):
        Objective.model_validate({"sp": {"on": "logits", "layers": ["0"]}})


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_one_is_finite(kind):
    ours, theirs = drawn(1, 12).requires_grad_(), drawn(1, 24, seed=1)
    loss = bound({kind: None}).losses(view(ours, theirs, rows=ROWS[:1]))[kind]
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(ours.grad).all()
    if kind != "crd":
        assert loss.item() == 0
        assert not ours.grad.any()


@pytest.mark.parametrize("kind", PURE)
def test_the_order_of_the_rows_does_not_matter(kind):
    ours, theirs, order = drawn(5, 12), drawn(5, 24, seed=1), torch.tensor([3, 0, 4, 2, 1])
    objective = bound({kind: 1})
    one = objective.losses(view(ours, theirs))[kind]
    other = objective.losses(view(ours[order], theirs[order]))[kind]
    assert one.item() == pytest.approx(other.item(), rel=1e-5)


def memory_of(objective):
    return objective.parts["crd"]["memory_0"].memory


def test_banks_are_kept_by_row_id_whatever_the_order():
    ours, theirs, order = drawn(5, 12), drawn(5, 24, seed=1), torch.tensor([3, 0, 4, 2, 1])
    one, other = bound({"crd": None}), bound({"crd": None})
    before = memory_of(one).student_memory.clone()
    one.losses(view(ours, theirs))
    other.losses(view(ours[order], theirs[order], rows=ROWS[order]))
    after = memory_of(one).student_memory
    torch.testing.assert_close(after, memory_of(other).student_memory)
    moved = (after != before).any(dim=1)
    assert moved.nonzero().flatten().tolist() == sorted(ROWS.tolist())


def test_only_training_moves_the_banks():
    objective = bound({"crd": None})
    objective.parts.eval()
    before = copy.deepcopy(objective.parts.state_dict())
    objective.losses(view(drawn(5, 12), drawn(5, 24, seed=1)))
    after = objective.parts.state_dict()
    assert all(torch.equal(after[name].nan_to_num(), before[name].nan_to_num()) for name in before)


def test_the_rows_to_contrast_with_are_another_draw_each_step_and_the_same_after_a_restore():
    ours, theirs = drawn(5, 12), drawn(5, 24, seed=1)
    table = {"crd": {"num_negatives": 2, "momentum": 0.0}}

    def losses(objective, count):
        return [objective.losses(view(ours, theirs))["crd"].item() for _ in range(count)]

    straight, cut, resumed = bound(table), bound(table), bound(table, seed=7)
    expected = losses(straight, 4)
    assert losses(cut, 2) == expected[:2]
    resumed.parts.load_state_dict(cut.parts.state_dict())
    assert losses(resumed, 2) == expected[2:]
    assert expected[2] != expected[3]  # the banks have settled, what is drawn has not
    assert losses(bound(table, seed=7), 2) != expected[:2]


def test_the_teachers_projection_learns_and_the_teacher_does_not():
    ours, theirs = drawn(5, 12).requires_grad_(), drawn(5, 24, seed=1).requires_grad_()
    objective = bound({"crd": None})
    objective.losses(view(ours, theirs))["crd"].backward()
    assert memory_of(objective).teacher_projection.weight.grad.abs().sum() > 0
    assert ours.grad.abs().sum() > 0
    assert theirs.grad is None


def test_contrast_without_row_ids_says_so():
    with pytest.raises(ValueError, match="no ids of the transfer rows"):
        bound({"crd": None}).losses(view(drawn(5, 12), drawn(5, 24), rows=None))
