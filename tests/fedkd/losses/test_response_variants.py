"""Variants of response distillation: published values, identities, invariances, and the edges."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedkd.losses.response import (
    annealing_kd,
    confidence_temperatures,
    cosine_similarity,
    decoupled_kd,
    disagreement_temperatures,
    dist_loss,
    logit_mse,
    normalised_kd,
    not_true_loss,
    probability_mse,
    row_temperature_kl,
    soft_target_loss,
    standardise_logits,
    standardised_kd,
)

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


# --- values ---------------------------------------------------------------------------------


def test_decoupled_kd_matches_the_reference_values():
    label_part = decoupled_kd(STUDENT, TEACHER, LABELS, beta=0.0)
    other_part = decoupled_kd(STUDENT, TEACHER, LABELS, alpha=0.0, beta=1.0)
    assert label_part.item() == pytest.approx(0.18233894, abs=1e-8)
    assert other_part.item() == pytest.approx(0.23996941, abs=1e-8)
    assert decoupled_kd(STUDENT, TEACHER, LABELS).item() == pytest.approx(2.10209423, abs=1e-8)


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_is_its_two_parts_weighted_by_the_teacher(row: int, temperature: float):
    student, teacher, label = STUDENT[row : row + 1], TEACHER[row : row + 1], LABELS[row : row + 1]
    sureness = torch.softmax(teacher / temperature, dim=1)[0, label].item()
    parts = decoupled_kd(
        student, teacher, label, alpha=1.0, beta=1 - sureness, temperature=temperature
    )
    whole = soft_target_loss(student, teacher, temperature=temperature)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-12)


def test_normalised_kd_matches_the_reference_value():
    assert normalised_kd(STUDENT, TEACHER, LABELS).item() == pytest.approx(1.50242476, abs=1e-8)


def test_normalised_kd_softens_the_other_classes_only():
    # Without them the temperature is nowhere; with them it is squared.
    label_only = normalised_kd(STUDENT, TEACHER, LABELS, gamma=0.0, temperature=5.0)
    by_hand = -(torch.softmax(TEACHER, 1) * torch.log_softmax(STUDENT, 1))[[0, 1], LABELS].mean()
    assert label_only.item() == pytest.approx(by_hand.item(), rel=1e-12)
    others = normalised_kd(STUDENT, TEACHER, LABELS, gamma=2.0, temperature=3.0) - label_only
    kept = [[0, 1, 3], [1, 2, 3]]
    s = torch.log_softmax(torch.stack([STUDENT[i, kept[i]] for i in range(2)]) / 3, 1)
    t = torch.softmax(torch.stack([TEACHER[i, kept[i]] for i in range(2)]) / 3, 1)
    assert others.item() == pytest.approx(-2 * 9 * (t * s).sum(1).mean().item(), rel=1e-12)


def test_not_true_loss_is_the_divergence_with_the_label_s_column_cut_out():
    kept = [[0, 1, 3], [1, 2, 3]]
    student, teacher = (
        torch.stack([logits[i, kept[i]] for i in range(2)]) for logits in (STUDENT, TEACHER)
    )
    expected = soft_target_loss(student, teacher, temperature=3.0, scale_by_t2=False)
    assert expected.item() == pytest.approx(0.0269967590, abs=1e-10)
    assert not_true_loss(STUDENT, TEACHER, LABELS).item() == pytest.approx(
        expected.item(), rel=1e-12
    )
    scaled = not_true_loss(STUDENT, TEACHER, LABELS, scale_by_t2=True)
    assert scaled.item() == pytest.approx(9 * expected.item(), rel=1e-12)


# The values of torchdistill 1.1.5, DISTLoss and LogitStdKDLoss (times T^2), in float64.
@pytest.mark.parametrize(
    ("beta", "gamma", "temperature", "value"),
    [
        (1.0, 1.0, 1.0, 0.5353799498),
        (1.0, 0.0, 1.0, 0.0353799498),
        (0.0, 1.0, 1.0, 0.5),
        (2.0, 2.0, 4.0, 19.5409684103),
    ],
)
def test_dist_loss_matches_another_library(
    beta: float, gamma: float, temperature: float, value: float
):
    loss = dist_loss(STUDENT, TEACHER, beta=beta, gamma=gamma, temperature=temperature)
    assert loss.item() == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize(("temperature", "value"), [(1.0, 0.0606121450), (2.0, 0.0868583596)])
def test_standardised_kd_matches_another_library(temperature: float, value: float):
    loss = standardised_kd(STUDENT, TEACHER, temperature=temperature)
    assert loss.item() == pytest.approx(value, abs=1e-9)


def test_standardised_rows_have_mean_0_and_unbiased_deviation_1():
    rows = standardise_logits(random_logits(3, 5))
    assert rows.mean(dim=1).abs().max() < 1e-12
    torch.testing.assert_close(
        rows.std(dim=1), torch.ones(3, dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_probability_mse_matches_a_value_worked_out_by_hand():
    # (2 ln 3, 0) at T=2 is (3/4, 1/4), the student is uniform: both differ by 1/4.
    teacher, student = torch.tensor([[2 * math.log(3.0), 0.0]]), torch.zeros(1, 2)
    loss = probability_mse(student, teacher, temperature=2.0)
    assert loss.item() == pytest.approx(1 / 16, rel=1e-6)


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.1), (0.5, 0.55), (1.0, 1.0)])
def test_annealing_grows_the_teacher_to_its_full_size(progress: float, share: float):
    # T = 10, 5.5 and 1: the share is 1 - (T - 1) / 10.
    loss = annealing_kd(STUDENT, TEACHER, progress=progress, max_temperature=10.0)
    assert loss.item() == pytest.approx(logit_mse(STUDENT, share * TEACHER).item(), rel=1e-12)


def test_annealing_from_temperature_1_is_the_logit_mse_throughout():
    for progress in (0.0, 0.3, 1.0):
        loss = annealing_kd(STUDENT, TEACHER, progress=progress, max_temperature=1.0)
        assert torch.equal(loss, logit_mse(STUDENT, TEACHER))


# --- a temperature for every row ------------------------------------------------------------


def test_equal_row_temperatures_are_one_temperature():
    for scale_by_t2 in (True, False):
        rows = row_temperature_kl(
            STUDENT,
            TEACHER,
            torch.full((2,), 3.0, dtype=torch.float64),
            scale_by_t2=scale_by_t2,
        )
        whole = soft_target_loss(STUDENT, TEACHER, temperature=3.0, scale_by_t2=scale_by_t2)
        assert rows.item() == pytest.approx(whole.item(), rel=1e-12)


def test_each_row_is_softened_and_scaled_by_its_own_temperature():
    rows = [
        soft_target_loss(STUDENT[i : i + 1], TEACHER[i : i + 1], temperature=temperature)
        for i, temperature in enumerate([1.5, 4.0])
    ]
    loss = row_temperature_kl(STUDENT, TEACHER, ROW_TEMPERATURES)
    assert loss.item() == pytest.approx((rows[0] + rows[1]).item() / 2, rel=1e-12)


def test_disagreement_temperatures_match_values_worked_out_by_hand():
    # Cosines 1, 0 and -1: w = 0, 1, 2 with mean 1, squared 0, 1, 4 with mean 5/3.
    student = torch.tensor([[2.0, 0.0], [1.0, 0.0], [-3.0, 0.0]])
    teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    linear = disagreement_temperatures(student, teacher, temperature=4.0)
    assert linear.tolist() == pytest.approx([5.0, 4.0, 3.0])
    squared = disagreement_temperatures(student, teacher, temperature=4.0, beta=1.5, gamma=2.0)
    assert squared.tolist() == pytest.approx([4 + 2.5, 4 + 1.0, 4 - 3.5])


def test_confidence_temperatures_match_values_worked_out_by_hand():
    # The larger probabilities are 3/4 and 1/2.
    student = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    sure, unsure = 1 / 0.751, 1 / 0.501
    mean = (sure + unsure) / 2
    temperatures = confidence_temperatures(student, temperature=4.0, beta=2.0)
    assert temperatures.tolist() == pytest.approx([4 + 2 * (mean - sure), 4 + 2 * (mean - unsure)])


def test_no_row_s_temperature_falls_below_the_bound():
    student = torch.cat([torch.zeros(1, 50), 30 * torch.eye(50)])
    free = confidence_temperatures(student, temperature=1.0, min_temperature=1e-3)
    assert free[0].item() == pytest.approx(1e-3)
    assert confidence_temperatures(student, temperature=1.0)[0].item() == 0.5
    opposite = disagreement_temperatures(
        STUDENT, -STUDENT * torch.tensor([[1.0], [-1.0]]), temperature=1.0, beta=9.0
    )
    assert opposite.min().item() == 0.5


def test_row_temperatures_carry_no_gradient():
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    assert not disagreement_temperatures(student, teacher, temperature=4.0).requires_grad
    assert not confidence_temperatures(student, temperature=4.0).requires_grad
    temperatures = ROW_TEMPERATURES.clone().requires_grad_()
    row_temperature_kl(student, teacher, temperatures).backward()
    assert temperatures.grad is None


# --- gradients ------------------------------------------------------------------------------


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


def test_normalised_kd_still_pulls_an_equal_student_towards_the_label():
    grad = gradient(lambda s: normalised_kd(s, TEACHER, LABELS), TEACHER)
    p = torch.softmax(TEACHER, dim=1)
    label = F.one_hot(LABELS, 4)
    expected = p[[0, 1], LABELS][:, None] * (p - label) / 2
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)


def test_not_true_loss_leaves_the_label_s_own_score_alone():
    grad = gradient(lambda s: not_true_loss(s, TEACHER, LABELS), STUDENT)
    assert grad[[0, 1], LABELS].abs().max() == 0
    assert (grad != 0).sum() == 6
    moved = STUDENT.clone()
    moved[[0, 1], LABELS] += 7.0
    torch.testing.assert_close(
        not_true_loss(moved, TEACHER, LABELS), not_true_loss(STUDENT, TEACHER, LABELS)
    )


def test_other_classes_weigh_the_same_however_sure_the_teacher_is():
    sure = TEACHER.clone()
    sure[[0, 1], LABELS] += 20.0
    for teacher in (TEACHER, sure):
        part = decoupled_kd(STUDENT, teacher, LABELS, alpha=0.0, beta=1.0)
        assert part.item() == pytest.approx(0.23996941, abs=1e-8)


# --- invariances ----------------------------------------------------------------------------


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


def test_standardised_kd_does_not_see_the_size_of_the_logits():
    torch.testing.assert_close(
        standardised_kd(5 * STUDENT, 0.1 * TEACHER),
        standardised_kd(STUDENT, TEACHER),
        rtol=1e-5,
        atol=0,
    )


def test_dist_loss_does_not_see_the_scale_of_a_row_s_probabilities():
    # p and (p + 1/C) / 2 correlate perfectly, within rows and within classes.
    p = torch.softmax(TEACHER, dim=1)
    flattened = ((p + 0.25) / 2).log()
    assert abs(dist_loss(flattened, TEACHER).item()) < 1e-12
    assert soft_target_loss(flattened, TEACHER, temperature=1.0).item() > 0.1


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


# --- weights and masks ----------------------------------------------------------------------


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


# --- numbers at the edge --------------------------------------------------------------------


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


def test_label_part_of_a_sure_student_keeps_its_slope():
    # 1 - softmax is 0 in float32 here, so its logarithm would have no slope.
    student, teacher = torch.tensor([[60.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.0]])
    label = torch.tensor([0])

    def label_part(logits: Tensor) -> Tensor:
        return decoupled_kd(logits, teacher, label, beta=0.0, temperature=1.0)

    # 1/3 ln(1/3) + 2/3 (ln 2/3 - (ln 2 - 60))
    assert label_part(student).item() == pytest.approx(40 - math.log(3.0), rel=1e-5)
    assert gradient(label_part, student)[0, 0].item() == pytest.approx(2 / 3, rel=1e-5)


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


@pytest.mark.parametrize("loss", [decoupled_kd, normalised_kd, not_true_loss])
def test_two_classes_leave_no_distribution_over_the_others(loss: Loss):
    message = rf"^{loss.__name__} needs at least 3 classes, got 2"
    with pytest.raises(ValueError, match=message):
        loss(STUDENT[:, :2], TEACHER[:, :2], torch.tensor([1, 0]))


def test_a_batch_of_one_has_no_correlation_within_classes():
    row, teacher = STUDENT[:1], TEACHER[:1]
    alone = dist_loss(row, teacher, beta=1.0, gamma=3.0)
    assert alone.item() == pytest.approx(
        dist_loss(row, teacher, beta=1.0, gamma=0.0).item() + 3.0, rel=1e-12
    )
    without = gradient(lambda s: dist_loss(s, teacher, gamma=0.0), row)
    assert torch.equal(gradient(lambda s: dist_loss(s, teacher, gamma=3.0), row), without)


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


def test_a_row_of_zeros_has_cosine_0_and_no_gradient():
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    cosines = cosine_similarity(rows, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert cosines.tolist() == pytest.approx([0.0, 0.6])
    cosines.sum().backward()
    assert rows.grad[0].abs().max() == 0
    assert rows.grad[1].norm() > 0.1


# --- refusals -------------------------------------------------------------------------------


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


# --- vectorised over models, and the layout of the scores -----------------------------------


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
