"""What holds for every variant of response distillation: gradients, invariances, and the edges."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedkd.losses.correlation import dist_loss
from fedkd.losses.distances import annealing_kd, probability_mse
from fedkd.losses.other_classes import decoupled_kd, normalised_kd, not_true_loss
from fedkd.losses.row_temperatures import (
    confidence_temperatures,
    disagreement_temperatures,
    row_temperature_kl,
)
from fedkd.losses.standardised import standardise_logits, standardised_kd

STUDENT = torch.tensor([[1, 2, 3, 0], [0.5, -1, 0, 2]], dtype=torch.float64)
TEACHER = torch.tensor([[2, 1, 4, -1], [0, 0, 1, 3]], dtype=torch.float64)
LABELS = torch.tensor([2, 0])
ROW_TEMPERATURES = torch.tensor([1.5, 4.0], dtype=torch.float64)
Loss = Callable[..., Tensor]
LOSSES: dict[str, Loss] = {
    "probability_mse": lambda s, t, y, **kw: probability_mse(s, t, temperature=2.0, **kw),
    "annealing_kd": lambda s, t, y, **kw: annealing_kd(s, t, progress=0.25, **kw),
    "decoupled_kd": lambda s, t, y, **kw: decoupled_kd(s, t, y, **kw),
    "normalised_kd": lambda s, t, y, **kw: normalised_kd(s, t, y, **kw),
    "not_true_loss": lambda s, t, y, **kw: not_true_loss(s, t, y, **kw),
    "dist_loss": lambda s, t, y, **kw: dist_loss(s, t, beta=1.0, gamma=2.0, **kw),
    "standardised_kd": lambda s, t, y, **kw: standardised_kd(s, t, **kw),
    "row_temperature_kl": lambda s, t, y, **kw: row_temperature_kl(
        s, t, disagreement_temperatures(s, t, temperature=4.0), **kw
    ),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
# annealing_kd aims at a smaller teacher, normalised_kd at the label.
zero_at_equality = pytest.mark.parametrize(
    "loss",
    [loss for name, loss in LOSSES.items() if name not in ("annealing_kd", "normalised_kd")],
    ids=[name for name in LOSSES if name not in ("annealing_kd", "normalised_kd")],
)
# The cosine of raw logits and their mean square do see a shift.
shift_invariant = pytest.mark.parametrize(
    "loss",
    [loss for name, loss in LOSSES.items() if name not in ("annealing_kd", "row_temperature_kl")],
    ids=[name for name in LOSSES if name not in ("annealing_kd", "row_temperature_kl")],
)


def gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    (result,) = torch.autograd.grad(loss(leaf), leaf)
    return result


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_labels(*shape: int, num_classes: int, seed: int = 3) -> Tensor:
    return torch.randint(num_classes, shape, generator=torch.Generator().manual_seed(seed))


@every_loss
def test_gradient_agrees_with_finite_differences(loss: Loss):
    # Row temperatures are constants inside the loss, so a difference quotient must hold them.
    if loss is LOSSES["row_temperature_kl"]:
        loss = lambda s, t, y: row_temperature_kl(s, t, ROW_TEMPERATURES)  # noqa: E731
    leaf = STUDENT.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, TEACHER, LABELS), (leaf,))


@every_loss
def test_gradient_never_reaches_the_teacher(loss: Loss):
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    loss(student, teacher, LABELS).backward()
    assert teacher.grad is None
    assert student.grad.norm() > 1e-3
    constant = torch.func.grad(lambda t: loss(STUDENT, t, LABELS))(TEACHER)
    assert torch.equal(constant, torch.zeros_like(TEACHER))


@zero_at_equality
def test_a_student_that_equals_the_teacher_does_not_move(loss: Loss):
    assert abs(loss(TEACHER, TEACHER, LABELS).item()) < 1e-12
    assert gradient(lambda s: loss(s, TEACHER, LABELS), TEACHER).abs().max() < 1e-12


@shift_invariant
def test_a_constant_added_to_a_row_changes_nothing(loss: Loss):
    # Far below and above any finite number that could stand in for a class that is masked out.
    shift = torch.tensor([[3000.0], [-8000.0]], dtype=torch.float64)
    torch.testing.assert_close(
        loss(STUDENT + shift, TEACHER - 2 * shift, LABELS),
        loss(STUDENT, TEACHER, LABELS),
        rtol=1e-9,
        atol=1e-11,
    )


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_renaming_classes_or_reordering_rows_together_changes_nothing(data: st.DataObject):
    seed = data.draw(st.integers(0, 1000))
    student, teacher = random_logits(5, 4, seed=seed), random_logits(5, 4, seed=seed + 1)
    labels = random_labels(5, num_classes=4, seed=seed)
    rows = data.draw(st.permutations(range(5)))
    classes = data.draw(st.permutations(range(4)))
    new_name = torch.tensor([classes.index(old) for old in range(4)])
    for loss in LOSSES.values():
        original = loss(student, teacher, labels)
        shuffled = loss(
            student[rows][:, classes], teacher[rows][:, classes], new_name[labels[rows]]
        )
        torch.testing.assert_close(shuffled, original)
        assert original.item() >= 0


@pytest.mark.parametrize(
    "loss",
    [loss for name, loss in LOSSES.items() if name != "row_temperature_kl"],
    ids=[name for name in LOSSES if name != "row_temperature_kl"],
)
def test_a_mask_gives_the_loss_of_the_rows_it_keeps(loss: Loss):
    # Row temperatures are left out: their mean is taken before any mask.
    student, teacher = random_logits(5, 4, seed=1), random_logits(5, 4, seed=2)
    labels = random_labels(5, num_classes=4)
    kept = [1, 2, 4]
    mask = torch.tensor([0.0, 1, 1, 0, 1], dtype=torch.float64)
    masked = loss(student, teacher, labels, sample_weights=mask)
    only = loss(student[kept], teacher[kept], labels[kept])
    torch.testing.assert_close(masked, only, rtol=1e-10, atol=1e-12)
    grad = gradient(lambda s: loss(s, teacher, labels, sample_weights=mask), student)
    assert grad[[0, 3]].abs().max() == 0
    torch.testing.assert_close(loss(student, teacher, labels, sample_weights=3 * mask), masked)


@every_loss
def test_weight_2_is_the_same_row_twice(loss: Loss):
    student, teacher = random_logits(3, 4, seed=1), random_logits(3, 4, seed=2)
    labels = random_labels(3, num_classes=4)
    if loss is LOSSES["row_temperature_kl"]:
        fixed = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

        def loss(s: Tensor, t: Tensor, y: Tensor, **kw: Tensor) -> Tensor:
            return row_temperature_kl(s, t, fixed if len(s) == 3 else fixed[[0, 1, 1, 2]], **kw)

    twice = [0, 1, 1, 2]
    weighted = loss(
        student, teacher, labels, sample_weights=torch.tensor([1.0, 2, 1], dtype=torch.float64)
    )
    torch.testing.assert_close(weighted, loss(student[twice], teacher[twice], labels[twice]))


@every_loss
def test_no_row_costs_nothing_and_moves_nothing(loss: Loss):
    nothing = torch.zeros(2, dtype=torch.float64)

    def masked(student: Tensor) -> Tensor:
        return loss(student, TEACHER, LABELS, sample_weights=nothing)

    assert masked(STUDENT).item() == 0.0
    assert torch.equal(gradient(masked, STUDENT), torch.zeros_like(STUDENT))
    empty = torch.zeros(0, 4)
    assert loss(empty, empty, torch.zeros(0, dtype=torch.int64)).item() == 0.0


@every_loss
@pytest.mark.parametrize("size", [50.0, 1000.0])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_extreme_logits_stay_finite(loss: Loss, size: float, label: int):
    student = torch.tensor([[size, -size, 0.0]])
    labels = torch.tensor([label])
    for teacher in (student, -student, torch.zeros(1, 3)):
        assert torch.isfinite(loss(student, teacher, labels))
        assert torch.isfinite(gradient(lambda s, t=teacher: loss(s, t, labels), student)).all()
        assert torch.isfinite(
            gradient(lambda s, t=teacher: loss(s, student, labels), teacher)
        ).all()


@every_loss
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_gives_a_float32_loss(loss: Loss, half: torch.dtype):
    result = loss(STUDENT.to(half), TEACHER.to(half), LABELS)
    assert result.dtype == torch.float32
    # These logits are exact in half precision, so only the arithmetic could differ.
    assert result.item() == pytest.approx(loss(STUDENT, TEACHER, LABELS).item(), rel=2e-5)


@every_loss
def test_autocast_does_not_coarsen_the_loss(loss: Loss):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = loss(STUDENT.float(), TEACHER.float(), LABELS)
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(loss(STUDENT, TEACHER, LABELS).item(), rel=2e-5)


@pytest.mark.parametrize("level", [0.0, 0.3, -71.7])
@pytest.mark.parametrize("num_classes", [3, 7, 10])
def test_rows_of_equal_logits_do_not_blow_the_gradient_up(num_classes: int, level: float):
    flat, teacher = (
        torch.full((4, num_classes), level),
        random_logits(4, num_classes, seed=9).float(),
    )
    assert dist_loss(flat, teacher).item() == pytest.approx(2.0)
    assert gradient(lambda s: dist_loss(s, teacher), flat).abs().max() == 0
    assert torch.isfinite(standardised_kd(flat, teacher))
    assert gradient(lambda s: standardised_kd(s, teacher), flat).abs().max() == 0


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize(
    "loss",
    [
        lambda t: probability_mse(STUDENT, TEACHER, temperature=t),
        lambda t: decoupled_kd(STUDENT, TEACHER, LABELS, temperature=t),
        lambda t: normalised_kd(STUDENT, TEACHER, LABELS, temperature=t),
        lambda t: not_true_loss(STUDENT, TEACHER, LABELS, temperature=t),
        lambda t: dist_loss(STUDENT, TEACHER, temperature=t),
        lambda t: standardised_kd(STUDENT, TEACHER, temperature=t),
        lambda t: confidence_temperatures(STUDENT, temperature=t),
        lambda t: disagreement_temperatures(STUDENT, TEACHER, temperature=t),
    ],
)
def test_refuses_a_temperature_that_softens_nothing(
    loss: Callable[[float], Tensor], temperature: float
):
    with pytest.raises(ValueError, match=r"^temperature must be (> 0|finite), got "):
        loss(temperature)


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("alpha", lambda w: decoupled_kd(STUDENT, TEACHER, LABELS, alpha=w)),
        ("beta", lambda w: decoupled_kd(STUDENT, TEACHER, LABELS, beta=w)),
        ("gamma", lambda w: normalised_kd(STUDENT, TEACHER, LABELS, gamma=w)),
        ("beta", lambda w: dist_loss(STUDENT, TEACHER, beta=w)),
        ("gamma", lambda w: dist_loss(STUDENT, TEACHER, gamma=w)),
        ("beta", lambda w: confidence_temperatures(STUDENT, temperature=4.0, beta=w)),
    ],
)
def test_refuses_a_weight_that_is_negative_or_not_finite(
    name: str, loss: Callable[[float], Tensor], weight: float
):
    with pytest.raises(ValueError, match=rf"^{name} must be >= 0 and finite, got "):
        loss(weight)


def test_refuses_what_lies_outside_its_range():
    with pytest.raises(ValueError, match=r"^progress must be in \[0, 1\], got 1.5"):
        annealing_kd(STUDENT, TEACHER, progress=1.5)
    with pytest.raises(ValueError, match=r"^max_temperature must be >= 1 and finite, got 0.5"):
        annealing_kd(STUDENT, TEACHER, progress=0.5, max_temperature=0.5)
    with pytest.raises(ValueError, match=r"^gamma must be > 0 and finite, got 0.0"):
        disagreement_temperatures(STUDENT, TEACHER, temperature=4.0, gamma=0.0)
    with pytest.raises(ValueError, match=r"^min_temperature must be > 0, got 0.0"):
        confidence_temperatures(STUDENT, temperature=4.0, min_temperature=0.0)
    with pytest.raises(ValueError, match=r"^standardise_logits needs at least 2 classes, got 1"):
        standardise_logits(STUDENT[:, :1])


@every_loss
def test_vmap_equals_a_loop_even_where_one_keeps_no_row(loss: Loss):
    students, teachers = random_logits(3, 5, 4, seed=1), random_logits(3, 5, 4, seed=2)
    labels = random_labels(3, 5, num_classes=4)
    masks = torch.tensor([[0, 0, 0, 0, 0], [1, 0, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.float64)

    def masked(s: Tensor, t: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return loss(s, t, y, sample_weights=mask)

    values = torch.func.vmap(masked)(students, teachers, labels, masks)
    grads = torch.func.vmap(torch.func.grad(masked))(students, teachers, labels, masks)
    for k in range(3):
        alone = masked(students[k], teachers[k], labels[k], masks[k])
        torch.testing.assert_close(values[k], alone)
        own = gradient(lambda s, k=k: masked(s, teachers[k], labels[k], masks[k]), students[k])
        torch.testing.assert_close(grads[k], own)
    unmasked = torch.func.vmap(lambda s, t, y: loss(s, t, y))(students, teachers, labels)
    torch.testing.assert_close(unmasked[2], values[2])


@every_loss
def test_how_scores_lie_in_memory_does_not_matter(loss: Loss):
    rows, teacher = random_logits(5, 3, seed=6), random_logits(5, 3, seed=7)
    labels = random_labels(5, num_classes=3)
    columns = rows.t().contiguous().t()
    assert columns.stride() == (1, 5)
    torch.testing.assert_close(loss(columns, teacher, labels), loss(rows, teacher, labels))
    torch.testing.assert_close(
        torch.func.grad(lambda s: loss(s, teacher, labels))(columns),
        torch.func.grad(lambda s: loss(s, teacher, labels))(rows),
    )
