"""Response losses: published values, gradients, invariances, and the slips that others shipped."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from fedkd.losses.distances import logit_l1, logit_mse
from fedkd.losses.response import (
    hard_label_loss,
    soft_cross_entropy,
    soft_target_kl,
    soft_target_loss,
)
from fedkd.targets import confidence_mask, soften

STUDENT = torch.tensor([[1, 2, 3, 0], [0.5, -1, 0, 2]], dtype=torch.float64)
TEACHER = torch.tensor([[2, 1, 4, -1], [0, 0, 1, 3]], dtype=torch.float64)
LABELS = torch.tensor([2, 0])
TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 16.0)

quick = settings(max_examples=30, deadline=None, derandomize=True, database=None)


@st.composite
def logit_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    shape = (draw(st.integers(1, 4)), draw(st.integers(2, 5)))
    tables = hnp.arrays(np.float64, shape, elements=st.floats(-20, 20))
    return torch.from_numpy(draw(tables)), torch.from_numpy(draw(tables))


temperatures = st.sampled_from([0.5, 1.0, 3.0, 10.0])

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "soft_target_loss": lambda s, t: soft_target_loss(s, t, temperature=3.0),
    "soft_target_kl": lambda s, t: soft_target_kl(s, soften(t, temperature=3.0), temperature=3.0),
    "soft_cross_entropy": lambda s, t: soft_cross_entropy(s, soften(t, temperature=1.0)),
    "logit_mse": logit_mse,
    "logit_l1": logit_l1,
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    (result,) = torch.autograd.grad(loss(leaf), leaf)
    return result


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)


# --- values ---------------------------------------------------------------------------------


def test_matches_a_value_worked_out_by_hand():
    # T=2 softens (2 ln 3, 0) to (3/4, 1/4); the student is uniform.
    # KL = 3/4 ln(3/2) + 1/4 ln(1/2) = 0.130812, times T^2 = 0.523248
    teacher, student = torch.tensor([[2 * math.log(3.0), 0.0]]), torch.zeros(1, 2)
    loss = soft_target_loss(student, teacher, temperature=2.0)
    assert loss.item() == pytest.approx(0.523248, rel=1e-5)


@pytest.mark.parametrize(
    ("temperature", "value"),
    [(1.0, 0.12034999), (2.0, 0.25344814), (3.0, 0.30066511), (4.0, 0.32085861)],
)
def test_matches_the_reference_values(temperature: float, value: float):
    loss = soft_target_loss(STUDENT, TEACHER, temperature=temperature)
    assert loss.item() == pytest.approx(value, abs=1e-8)


def test_is_the_forward_divergence_not_the_reverse():
    assert soft_target_loss(STUDENT, TEACHER, temperature=1.0).item() == pytest.approx(
        0.12034999, abs=1e-8
    )
    assert soft_target_loss(TEACHER, STUDENT, temperature=1.0).item() == pytest.approx(
        0.18976181, abs=1e-8
    )


def test_weighted_with_the_labels_matches_the_reference_value():
    total = 0.1 * F.cross_entropy(STUDENT, LABELS) + 0.9 * soft_target_loss(
        STUDENT, TEACHER, temperature=4.0
    )
    assert total.item() == pytest.approx(0.40289972, abs=1e-8)


@pytest.mark.parametrize(
    ("logits", "value"),
    [
        (STUDENT, 1.14126964),
        (TEACHER, 1.69325649),
        (
            torch.tensor([[-4, 3, 1, 1], [2, 0, -1, 1]], dtype=torch.float64),
            1.34022592,
        ),
    ],
)
def test_soft_cross_entropy_of_labels_is_cross_entropy(logits: Tensor, value: float):
    one_hot = F.one_hot(LABELS, 4).double()
    assert soft_cross_entropy(logits, one_hot).item() == pytest.approx(value, abs=1e-8)
    # A target without entropy makes the divergence and the cross-entropy the same number.
    assert soft_target_kl(logits, one_hot, temperature=1.0).item() == pytest.approx(value, abs=1e-8)


def test_logit_distances_match_values_worked_out_by_hand():
    # Differences are (-1, 1, -1, 1) and (0.5, -1, -1, -1).
    assert logit_mse(STUDENT, TEACHER).item() == pytest.approx((4 + 3.25) / 8)
    assert logit_l1(STUDENT, TEACHER).item() == pytest.approx((4 + 3.5) / 8)


def test_logit_mse_compares_logits_not_probabilities():
    # A constant added to a row's logits leaves its probabilities alone, but not its logits.
    assert logit_mse(STUDENT + 3.0, STUDENT).item() == pytest.approx(9.0)


def test_padding_with_impossible_classes_changes_nothing():
    # An average over classes as well as rows would halve here.
    padding = torch.full((2, 4), -200.0, dtype=torch.float64)
    padded = soft_target_loss(
        torch.cat([STUDENT, padding], dim=1), torch.cat([TEACHER, padding], dim=1), temperature=4.0
    )
    assert padded.item() == pytest.approx(0.32085861, abs=1e-8)


def test_scale_by_t2_off_leaves_exactly_the_square_out():
    for scaled, bare in (
        (
            soft_target_loss(STUDENT, TEACHER, temperature=4.0),
            soft_target_loss(STUDENT, TEACHER, temperature=4.0, scale_by_t2=False),
        ),
        (
            soft_cross_entropy(STUDENT, soften(TEACHER, temperature=4.0), temperature=4.0),
            soft_cross_entropy(
                STUDENT, soften(TEACHER, temperature=4.0), temperature=4.0, scale_by_t2=False
            ),
        ),
    ):
        assert scaled.item() == pytest.approx(16 * bare.item(), rel=1e-12)


def test_target_rows_enter_as_they_are():
    # The student already predicts the target, so any further softmax of it would show.
    target = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], dtype=torch.float64)
    assert soft_target_kl(target.log(), target, temperature=1.0).item() == pytest.approx(
        0.0, abs=1e-15
    )


def test_high_temperature_tends_to_half_the_logit_mse():
    student = STUDENT - STUDENT.mean(dim=1, keepdim=True)
    teacher = TEACHER - TEACHER.mean(dim=1, keepdim=True)
    at_1000 = soft_target_loss(student, teacher, temperature=1000.0)
    limit = logit_mse(student, teacher) / 2
    assert limit.item() == pytest.approx((student - teacher).square().sum(1).mean().item() / 8)
    assert at_1000.item() == pytest.approx(0.355424, abs=1e-6)
    assert limit.item() == pytest.approx(0.355469, abs=1e-6)


# --- gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradient_is_the_scaled_difference_of_probabilities(temperature: float):
    # (T / batch) * (p_student - p_teacher): a lost square or a class mean changes the factor.
    expected = (temperature / 2) * (
        torch.softmax(STUDENT / temperature, 1) - torch.softmax(TEACHER / temperature, 1)
    )
    actual = gradient(lambda s: soft_target_loss(s, TEACHER, temperature=temperature), STUDENT)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    target = torch.softmax(TEACHER / temperature, 1)
    same = gradient(lambda s: soft_cross_entropy(s, target, temperature=temperature), STUDENT)
    torch.testing.assert_close(same, expected, rtol=1e-12, atol=1e-14)


def test_gradient_with_two_temperatures_is_scaled_by_the_student_s():
    expected = (3.0 / 2) * (torch.softmax(STUDENT / 3.0, 1) - torch.softmax(TEACHER / 5.0, 1))
    scaled = gradient(
        lambda s: soft_target_loss(s, TEACHER, temperature=3.0, teacher_temperature=5.0), STUDENT
    )
    torch.testing.assert_close(scaled, expected, rtol=1e-12, atol=1e-14)
    bare = gradient(
        lambda s: soft_target_loss(
            s, TEACHER, temperature=3.0, teacher_temperature=5.0, scale_by_t2=False
        ),
        STUDENT,
    )
    torch.testing.assert_close(bare, expected / 9.0, rtol=1e-12, atol=1e-14)


def test_gradient_size_hardly_depends_on_the_temperature():
    student, teacher = random_logits(64, 10, seed=1), random_logits(64, 10, seed=2)
    sizes = [
        gradient(lambda s, t=t: soft_target_loss(s, teacher, temperature=t), student).norm().item()
        for t in TEMPERATURES
    ]
    assert max(sizes) < 2 * min(sizes)


def test_a_step_raises_the_probability_where_the_teacher_s_is_higher():
    student, teacher = random_logits(8, 5, seed=1), random_logits(8, 5, seed=2)
    grad = gradient(lambda s: soft_target_loss(s, teacher, temperature=2.0), student)
    teacher_is_higher = soften(teacher, temperature=2.0) > soften(student, temperature=2.0)
    assert torch.equal(grad < 0, teacher_is_higher)


@every_loss
def test_gradient_never_reaches_the_teacher(loss: Callable[[Tensor, Tensor], Tensor]):
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.norm() > 0.1


@every_loss
def test_gradient_never_reaches_the_teacher_under_torch_func(
    loss: Callable[[Tensor, Tensor], Tensor],
):
    to_student, to_teacher = torch.func.grad(loss, argnums=(0, 1))(STUDENT, TEACHER)
    assert torch.equal(to_teacher, torch.zeros_like(TEACHER))
    torch.testing.assert_close(to_student, gradient(lambda s: loss(s, TEACHER), STUDENT))


@every_loss
def test_gradient_agrees_with_finite_differences(loss: Callable[[Tensor, Tensor], Tensor]):
    student, teacher = random_logits(3, 4, seed=3).requires_grad_(), random_logits(3, 4, seed=4)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), (student,))


def test_gradient_agrees_with_finite_differences_under_weights():
    student, teacher = random_logits(3, 4, seed=3).requires_grad_(), random_logits(3, 4, seed=4)
    weights = torch.tensor([0.2, 0.0, 1.7], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda s: soft_target_loss(
            s, teacher, temperature=2.0, teacher_temperature=1.0, sample_weights=weights
        ),
        (student,),
    )


def test_mean_of_divergences_pulls_like_the_divergence_from_the_mean():
    targets = [soften(random_logits(4, 5, seed=seed), temperature=1.0) for seed in (1, 2, 3)]
    student, mean_target = random_logits(4, 5), sum(targets) / 3

    def mean_of_kls(s: Tensor) -> Tensor:
        return sum(soft_target_kl(s, target, temperature=1.0) for target in targets) / 3

    def kl_to_mean(s: Tensor) -> Tensor:
        return soft_target_kl(s, mean_target, temperature=1.0)

    torch.testing.assert_close(
        gradient(mean_of_kls, student), gradient(kl_to_mean, student), rtol=0, atol=1e-15
    )
    # What the average target's extra entropy hides from the second one.
    assert mean_of_kls(student) > kl_to_mean(student) + 0.1


# --- invariances ----------------------------------------------------------------------------


@quick
@given(pair=logit_pairs(), temperature=temperatures)
def test_never_negative(pair: tuple[Tensor, Tensor], temperature: float):
    student, teacher = pair
    assert soft_target_loss(student, teacher, temperature=temperature) >= -1e-12
    target = soften(teacher, temperature=temperature)
    assert soft_cross_entropy(student, target, temperature=temperature) >= 0
    assert logit_mse(student, teacher) >= 0
    assert logit_l1(student, teacher) >= 0


@quick
@given(pair=logit_pairs(), temperature=temperatures)
def test_a_student_that_agrees_pays_nothing_and_stays(
    pair: tuple[Tensor, Tensor], temperature: float
):
    student, _ = pair
    for loss in (
        lambda s: soft_target_loss(s, student, temperature=temperature),
        lambda s: logit_mse(s, student),
        lambda s: logit_l1(s, student),
    ):
        assert abs(loss(student).item()) < 1e-12
        assert gradient(loss, student).abs().max() < 1e-12


@quick
@given(pair=logit_pairs(), temperature=temperatures, shift=st.floats(-50, 50))
def test_a_constant_added_to_a_row_changes_nothing(
    pair: tuple[Tensor, Tensor], temperature: float, shift: float
):
    student, teacher = pair
    shifted = soft_target_loss(student + shift, teacher - 2 * shift, temperature=temperature)
    original = soft_target_loss(student, teacher, temperature=temperature)
    torch.testing.assert_close(shifted, original, rtol=1e-9, atol=1e-10)


@quick
@given(pair=logit_pairs(), data=st.data())
def test_renaming_classes_or_reordering_rows_together_changes_nothing(
    pair: tuple[Tensor, Tensor], data: st.DataObject
):
    student, teacher = pair
    rows = data.draw(st.permutations(range(student.shape[0])))
    classes = data.draw(st.permutations(range(student.shape[1])))
    for loss in LOSSES.values():
        torch.testing.assert_close(
            loss(student[rows][:, classes], teacher[rows][:, classes]), loss(student, teacher)
        )


@quick
@given(pair=logit_pairs(), temperature=temperatures)
def test_gradient_only_moves_probability_between_classes(
    pair: tuple[Tensor, Tensor], temperature: float
):
    student, teacher = pair
    grad = gradient(lambda s: soft_target_loss(s, teacher, temperature=temperature), student)
    assert grad.sum(dim=1).abs().max() < 1e-12


def test_a_row_s_gradient_does_not_depend_on_the_other_rows():
    # A softmax over the batch would mix them.
    other = torch.cat([STUDENT[:1], random_logits(1, 4)])
    first = gradient(lambda s: soft_target_loss(s, TEACHER, temperature=2.0), STUDENT)[0]
    again = gradient(lambda s: soft_target_loss(s, TEACHER, temperature=2.0), other)[0]
    assert torch.equal(first, again)


def test_different_temperatures_disagree_even_for_equal_logits():
    equal = soft_target_loss(STUDENT, STUDENT, temperature=4.0, teacher_temperature=4.0)
    unequal = soft_target_loss(STUDENT, STUDENT, temperature=4.0, teacher_temperature=1.0)
    assert abs(equal.item()) < 1e-12
    assert unequal.item() > 0.1


# --- weights and masks ----------------------------------------------------------------------


def test_a_mask_divides_by_the_rows_it_keeps():
    mask = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for masked, kept in (
        (
            soft_target_loss(STUDENT, TEACHER, temperature=2.0, sample_weights=mask),
            soft_target_loss(STUDENT[1:], TEACHER[1:], temperature=2.0),
        ),
        (
            soft_cross_entropy(STUDENT, soften(TEACHER, temperature=1.0), sample_weights=mask),
            soft_cross_entropy(STUDENT[1:], soften(TEACHER[1:], temperature=1.0)),
        ),
        (
            logit_mse(STUDENT, TEACHER, sample_weights=mask),
            logit_mse(STUDENT[1:], TEACHER[1:]),
        ),
        (logit_l1(STUDENT, TEACHER, sample_weights=mask), logit_l1(STUDENT[1:], TEACHER[1:])),
    ):
        assert masked.item() == pytest.approx(kept.item(), rel=1e-12)


@pytest.mark.parametrize("weight", [0.25, 1.0, 7.0])
def test_uniform_weights_are_no_weights(weight: float):
    weights = torch.full((2,), weight, dtype=torch.float64)
    weighted = soft_target_loss(STUDENT, TEACHER, temperature=2.0, sample_weights=weights)
    assert weighted.item() == pytest.approx(
        soft_target_loss(STUDENT, TEACHER, temperature=2.0).item(), rel=1e-12
    )


def test_a_mask_that_keeps_nothing_costs_nothing_and_moves_nothing():
    target = soften(TEACHER, temperature=1.0)
    nothing = confidence_mask(target, 1.01)
    for loss in (
        lambda s: soft_target_kl(s, target, temperature=1.0, sample_weights=nothing),
        lambda s: soft_cross_entropy(s, target, sample_weights=nothing),
        lambda s: logit_mse(s, TEACHER, sample_weights=nothing),
        lambda s: logit_l1(s, TEACHER, sample_weights=nothing),
    ):
        assert loss(STUDENT).item() == 0.0
        assert torch.equal(gradient(loss, STUDENT), torch.zeros_like(STUDENT))


def test_weights_get_no_gradient():
    weights = torch.ones(2, dtype=torch.float64, requires_grad=True)
    student = STUDENT.clone().requires_grad_()
    soft_target_loss(student, TEACHER, temperature=2.0, sample_weights=weights).backward()
    assert weights.grad is None


def test_an_empty_batch_costs_nothing():
    empty = torch.zeros(0, 4)
    assert soft_target_loss(empty, empty, temperature=2.0).item() == 0.0
    assert logit_mse(empty, empty).item() == 0.0


# --- numbers at the edge --------------------------------------------------------------------


def test_zeros_in_the_target_are_finite():
    target = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]], dtype=torch.float64)
    student = random_logits(2, 3)
    loss = soft_target_kl(student, target, temperature=1.0)
    grad = gradient(lambda s: soft_target_kl(s, target, temperature=1.0), student)
    log_p = torch.log_softmax(student, 1)
    by_hand = (-log_p[0, 1] + math.log(0.5) - 0.5 * (log_p[1, 0] + log_p[1, 1])) / 2
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-12)
    assert torch.isfinite(grad).all()


def test_extreme_logits_stay_finite():
    student = torch.tensor([[1000.0, -1000.0, 0.0]])
    grad = gradient(lambda s: soft_target_loss(s, -student, temperature=1.0), student)
    assert soft_target_loss(student, -student, temperature=1.0).item() == pytest.approx(2000.0)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@every_loss
def test_half_precision_gives_a_float32_loss(
    loss: Callable[[Tensor, Tensor], Tensor], half: torch.dtype
):
    student, teacher = STUDENT.to(half), TEACHER.to(half)
    result = loss(student, teacher)
    assert result.dtype == torch.float32
    # These logits are exact in half precision, so only the arithmetic could differ.
    assert result.item() == pytest.approx(loss(STUDENT, TEACHER).item(), rel=1e-5)


@every_loss
def test_autocast_does_not_coarsen_the_loss(loss: Callable[[Tensor, Tensor], Tensor]):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = loss(STUDENT.float(), TEACHER.float())
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(loss(STUDENT, TEACHER).item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_refuses_a_temperature_that_softens_nothing(temperature: float):
    target = soften(TEACHER, temperature=1.0)
    with pytest.raises(ValueError, match=r"^temperature must be (> 0|finite), got "):
        soft_target_kl(STUDENT, target, temperature=temperature)
    with pytest.raises(ValueError, match=r"^temperature must be (> 0|finite), got "):
        soft_target_loss(STUDENT, TEACHER, temperature=temperature)
    with pytest.raises(ValueError, match=r"^temperature must be (> 0|finite), got "):
        soft_cross_entropy(STUDENT, target, temperature=temperature)
    with pytest.raises(ValueError, match=r"^teacher_temperature must be (> 0|finite), got "):
        soft_target_loss(STUDENT, TEACHER, temperature=1.0, teacher_temperature=temperature)


# --- vectorised over models -----------------------------------------------------------------


@every_loss
def test_vmap_equals_a_loop(loss: Callable[[Tensor, Tensor], Tensor]):
    students, teachers = random_logits(3, 2, 4, seed=1), random_logits(3, 2, 4, seed=2)
    values = torch.func.vmap(loss)(students, teachers)
    grads = torch.func.vmap(torch.func.grad(loss))(students, teachers)
    for k in range(3):
        torch.testing.assert_close(values[k], loss(students[k], teachers[k]))
        torch.testing.assert_close(
            grads[k], gradient(lambda s, k=k: loss(s, teachers[k]), students[k])
        )


def test_vmap_over_masks_equals_a_loop_even_where_one_keeps_nothing():
    students, teachers = random_logits(3, 2, 4, seed=1), random_logits(3, 2, 4, seed=2)
    masks = torch.tensor([[0, 0], [1, 0], [1, 1]], dtype=torch.float64)

    def masked(s: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        return soft_target_loss(s, t, temperature=2.0, sample_weights=mask)

    values = torch.func.vmap(masked)(students, teachers, masks)
    grads = torch.func.vmap(torch.func.grad(masked))(students, teachers, masks)
    assert torch.isfinite(grads).all()
    for k in range(3):
        torch.testing.assert_close(values[k], masked(students[k], teachers[k], masks[k]))


# --- hard labels, and the layout of the scores ----------------------------------------------


def test_hard_label_loss_is_the_mean_negative_log_probability_of_the_labels():
    # softmax of (ln 3, 0) is (3/4, 1/4); the other row is uniform.
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    loss = hard_label_loss(logits, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2, rel=1e-6)
    assert torch.equal(loss, F.cross_entropy(logits, torch.tensor([0, 1])))


def test_rows_with_weight_zero_have_no_part_in_the_mean_of_hard_label_losses():
    logits, labels = random_logits(4, 3, seed=5).requires_grad_(), torch.tensor([2, 0, 1, 1])
    masked = hard_label_loss(logits, labels, sample_weights=torch.tensor([1.0, 0, 1, 0]))
    only = hard_label_loss(logits[[0, 2]], labels[[0, 2]])
    torch.testing.assert_close(masked, only)
    masked.backward()
    assert logits.grad[[1, 3]].abs().max() == 0
    assert logits.grad[[0, 2]].abs().max() > 0


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0])])
def test_how_scores_lie_in_memory_does_not_matter(weights):
    rows, targets = random_logits(5, 3, seed=6), F.softmax(random_logits(5, 3, seed=7), -1)
    labels = torch.tensor([2, 0, 1, 1, 0])
    columns = rows.t().contiguous().t()
    assert columns.stride() == (1, 5)
    for loss in (
        lambda scores: hard_label_loss(scores, labels, sample_weights=weights),
        lambda scores: soft_target_kl(scores, targets, temperature=2.0, sample_weights=weights),
    ):
        results = []
        for scores in (rows, columns):
            student = scores.detach().requires_grad_()
            value = loss(student)
            value.backward()
            results.append((value.detach(), student.grad))
        torch.testing.assert_close(*results)
