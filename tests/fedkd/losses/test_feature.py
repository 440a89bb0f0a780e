"""Feature losses: values, who gets the gradient, invariances, and features that do not fit."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedkd.losses.feature import attention_transfer, cosine_feature_loss, hint_loss

# Batch, channels, height and width all differ.
STUDENT = torch.sin(torch.arange(60, dtype=torch.float64)).reshape(2, 3, 5, 2)
TEACHER = torch.cos(0.7 * torch.arange(60, dtype=torch.float64)).reshape(2, 3, 5, 2)

Loss = Callable[..., Tensor]

LOSSES: dict[str, Loss] = {
    "hint_loss": hint_loss,
    "cosine_feature_loss": cosine_feature_loss,
    "attention_code": lambda s, t, **kw: attention_transfer(s, t, mode="code", **kw),
    "attention_paper": lambda s, t, **kw: attention_transfer(s, t, mode="paper", **kw),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def gradient(loss: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    leaf = features.clone().requires_grad_()
    (result,) = torch.autograd.grad(loss(leaf), leaf)
    return result


def random_maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- values ---------------------------------------------------------------------------------


def test_hint_loss_is_the_mean_over_all_elements():
    # Differences 1, -2, 0, 3, 1, 1: squares sum to 16 over 6 elements.
    student = torch.tensor([[1.0, 0.0, 2.0], [3.0, 1.0, 0.0]])
    teacher = torch.tensor([[0.0, 2.0, 2.0], [0.0, 0.0, -1.0]])
    assert hint_loss(student, teacher).item() == pytest.approx(16 / 6, rel=1e-6)
    assert hint_loss(STUDENT, TEACHER).item() == pytest.approx(
        F.mse_loss(STUDENT, TEACHER).item(), rel=1e-12
    )


def test_cosine_feature_loss_matches_values_worked_out_by_hand():
    # Cosines 1, 0 and -1.
    student = torch.tensor([[2.0, 0.0], [1.0, 0.0], [-3.0, 0.0]])
    teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    for row, loss in enumerate([0.0, 1.0, 2.0]):
        value = cosine_feature_loss(student[row : row + 1], teacher[row : row + 1])
        assert value.item() == pytest.approx(loss, abs=1e-6)
    assert cosine_feature_loss(STUDENT, TEACHER).item() == pytest.approx(
        F.cosine_embedding_loss(STUDENT.flatten(1), TEACHER.flatten(1), torch.ones(2)).item(),
        rel=1e-10,
    )


@pytest.mark.parametrize(
    ("mode", "value"),
    # Attention vectors (3, 4) / 5 and (1, 0): the difference is (-0.4, 0.8).
    [("code", 0.8 / 2), ("paper", math.sqrt(0.8))],
)
def test_attention_transfer_matches_values_worked_out_by_hand(mode: str, value: float):
    # Channels square to (1, 4) + (2, 0) = (3, 4).
    student = torch.tensor([[[[1.0, 2.0]], [[math.sqrt(2), 0.0]]]])
    teacher = torch.tensor([[[[7.0, 0.0]], [[0.0, 0.0]], [[1.0, 0.0]]]])
    assert attention_transfer(student, teacher, mode=mode).item() == pytest.approx(value, rel=1e-6)


# The values of torchdistill 1.1.5, ATLoss, in float64.
@pytest.mark.parametrize(("mode", "value"), [("code", 0.0165281227), ("paper", 0.4065024579)])
def test_attention_transfer_matches_another_library(mode: str, value: float):
    student = torch.sin(torch.arange(60, dtype=torch.float64)).reshape(2, 3, 2, 5)
    teacher = torch.cos(0.7 * torch.arange(80, dtype=torch.float64)).reshape(2, 4, 2, 5)
    loss = attention_transfer(student, teacher, mode=mode)
    assert loss.item() == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("mode", ["code", "paper"])
@pytest.mark.parametrize("teacher_size", [(4, 3), (7, 6), (3, 6), (7, 2)])
def test_maps_of_another_size_are_pooled_to_the_smaller(mode: str, teacher_size: tuple[int, int]):
    student, teacher = random_maps(2, 3, 6, 4), random_maps(2, 5, *teacher_size, seed=1)
    size = min(6, teacher_size[0]), min(4, teacher_size[1])
    expected = attention_transfer(
        F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size), mode=mode
    )
    torch.testing.assert_close(attention_transfer(student, teacher, mode=mode), expected)


# --- gradients ------------------------------------------------------------------------------


@every_loss
def test_gradient_agrees_with_finite_differences(loss: Loss):
    leaf = STUDENT.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, TEACHER), (leaf,))


def test_gradient_through_pooling_agrees_with_finite_differences():
    small = random_maps(2, 4, 3, 2, seed=1)
    leaf = STUDENT.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: attention_transfer(s, small), (leaf,))


@every_loss
def test_gradient_never_reaches_the_teacher(loss: Loss):
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.norm() > 1e-3
    constant = torch.func.grad(lambda t: loss(STUDENT, t))(TEACHER)
    assert torch.equal(constant, torch.zeros_like(TEACHER))


@every_loss
def test_a_student_that_equals_the_teacher_does_not_move(loss: Loss):
    assert abs(loss(TEACHER, TEACHER).item()) < 1e-12
    assert gradient(lambda s: loss(s, TEACHER), TEACHER).abs().max() < 1e-12


# --- invariances ----------------------------------------------------------------------------


@every_loss
def test_reordering_rows_channels_or_space_together_changes_nothing(loss: Loss):
    original = loss(STUDENT, TEACHER)
    assert original.item() > 0
    for axis, order in ((0, [1, 0]), (1, [2, 0, 1]), (2, [3, 1, 4, 0, 2]), (3, [1, 0])):
        index = torch.tensor(order)
        student, teacher = STUDENT.index_select(axis, index), TEACHER.index_select(axis, index)
        torch.testing.assert_close(loss(student, teacher), original)


@every_loss
def test_reordering_rows_of_one_side_changes_the_loss(loss: Loss):
    assert not torch.allclose(loss(STUDENT.flip(0), TEACHER), loss(STUDENT, TEACHER), rtol=1e-3)


@pytest.mark.parametrize("name", ["cosine_feature_loss", "attention_code", "attention_paper"])
def test_the_size_of_the_features_does_not_matter(name: str):
    loss = LOSSES[name]
    torch.testing.assert_close(loss(30 * STUDENT, 0.2 * TEACHER), loss(STUDENT, TEACHER))


@pytest.mark.parametrize("name", ["attention_code", "attention_paper"])
def test_attention_does_not_see_which_channel_looks_nor_with_which_sign(name: str):
    loss = LOSSES[name]
    other = torch.cat([-STUDENT[:, [2, 0, 1]], torch.zeros(2, 4, 5, 2)], dim=1)
    torch.testing.assert_close(loss(other, TEACHER), loss(STUDENT, TEACHER))


# --- weights and masks ----------------------------------------------------------------------


@every_loss
def test_a_mask_gives_the_loss_of_the_rows_it_keeps(loss: Loss):
    student, teacher = random_maps(4, 3, 5, 2), random_maps(4, 3, 5, 2, seed=1)
    mask = torch.tensor([1.0, 0, 0, 1], dtype=torch.float64)
    masked = loss(student, teacher, sample_weights=mask)
    torch.testing.assert_close(masked, loss(student[[0, 3]], teacher[[0, 3]]))
    grad = gradient(lambda s: loss(s, teacher, sample_weights=mask), student)
    assert grad[[1, 2]].abs().max() == 0


@every_loss
def test_no_row_costs_nothing_and_moves_nothing(loss: Loss):
    nothing = torch.zeros(2, dtype=torch.float64)
    assert loss(STUDENT, TEACHER, sample_weights=nothing).item() == 0.0
    grad = gradient(lambda s: loss(s, TEACHER, sample_weights=nothing), STUDENT)
    assert torch.equal(grad, torch.zeros_like(STUDENT))
    assert loss(torch.zeros(0, 3, 5, 2), torch.zeros(0, 3, 5, 2)).item() == 0.0


# --- numbers at the edge --------------------------------------------------------------------


@every_loss
def test_features_of_zero_are_finite(loss: Loss):
    dead = torch.zeros_like(STUDENT)
    for student, teacher in ((dead, TEACHER), (STUDENT, dead), (dead, dead)):
        assert torch.isfinite(loss(student, teacher))
        assert torch.isfinite(gradient(lambda s, t=teacher: loss(s, t), student)).all()


def test_a_row_of_zeros_costs_1_and_has_no_gradient():
    student = STUDENT.clone()
    student[0] = 0.0
    alone = cosine_feature_loss(student[1:], TEACHER[1:])
    both = cosine_feature_loss(student, TEACHER)
    assert both.item() == pytest.approx((1 + alone.item()) / 2, rel=1e-12)
    grad = gradient(lambda s: cosine_feature_loss(s, TEACHER), student)
    assert grad[0].abs().max() == 0
    assert grad[1].norm() > 1e-3


@every_loss
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_gives_a_float32_loss(loss: Loss, half: torch.dtype):
    student, teacher = STUDENT.to(half), TEACHER.to(half)
    result = loss(student, teacher)
    assert result.dtype == torch.float32
    exact = loss(student.double(), teacher.double())
    assert result.item() == pytest.approx(exact.item(), rel=1e-5)


@every_loss
def test_half_precision_does_not_overflow(loss: Loss):
    # 300 squared is more than float16 holds.
    result = loss((300 * STUDENT).half(), (300 * TEACHER).half())
    assert torch.isfinite(result)
    assert result.item() > 0


def test_autocast_does_not_coarsen_the_pooling():
    student, teacher = random_maps(2, 3, 6, 4), random_maps(2, 5, 4, 3, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = attention_transfer(student.float(), teacher.float())
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(attention_transfer(student, teacher).item(), rel=1e-5)


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [hint_loss, cosine_feature_loss])
@pytest.mark.parametrize("teacher", [TEACHER[:, :2], TEACHER[:, :, :1], TEACHER.flatten(1)])
def test_features_of_another_shape_need_a_projector(loss: Loss, teacher: Tensor):
    with pytest.raises(ValueError, match="projector") as caught:
        loss(STUDENT, teacher)
    assert str(caught.value).startswith(f"{loss.__name__} needs features of one shape")
    assert "(2, 3, 5, 2)" in str(caught.value)
    assert str(tuple(teacher.shape)) in str(caught.value)


@pytest.mark.parametrize(
    ("student", "teacher", "text"),
    [
        (STUDENT.flatten(1), TEACHER, r"got \(2, 30\) from the student"),
        (STUDENT, TEACHER.flatten(1), r"got \(2, 30\) from the teacher"),
        (STUDENT, TEACHER.flatten(2), r"got \(2, 3, 10\) from the teacher"),
    ],
)
def test_attention_needs_maps(student: Tensor, teacher: Tensor, text: str):
    with pytest.raises(ValueError, match=rf"\(batch, channels, height, width\), {text}"):
        attention_transfer(student, teacher)


# --- vectorised over models -----------------------------------------------------------------


@every_loss
def test_vmap_equals_a_loop_even_where_one_keeps_no_row(loss: Loss):
    students, teachers = random_maps(3, 4, 3, 5, 2), random_maps(3, 4, 3, 5, 2, seed=1)
    masks = torch.tensor([[0, 0, 0, 0], [1, 0, 1, 1], [1, 1, 1, 1]], dtype=torch.float64)

    def masked(s: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        return loss(s, t, sample_weights=mask)

    values = torch.func.vmap(masked)(students, teachers, masks)
    grads = torch.func.vmap(torch.func.grad(masked))(students, teachers, masks)
    assert torch.isfinite(grads).all()
    for k in range(3):
        torch.testing.assert_close(values[k], masked(students[k], teachers[k], masks[k]))
        own = gradient(lambda s, k=k: masked(s, teachers[k], masks[k]), students[k])
        torch.testing.assert_close(grads[k], own)


def test_vmap_equals_a_loop_where_maps_are_pooled():
    students, teachers = random_maps(3, 2, 4, 6, 5), random_maps(3, 2, 3, 4, 7, seed=1)
    values = torch.func.vmap(attention_transfer)(students, teachers)
    grads = torch.func.vmap(torch.func.grad(attention_transfer))(students, teachers)
    for k in range(3):
        torch.testing.assert_close(values[k], attention_transfer(students[k], teachers[k]))
        own = gradient(lambda s, k=k: attention_transfer(s, teachers[k]), students[k])
        torch.testing.assert_close(grads[k], own)
