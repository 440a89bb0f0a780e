"""Adversarial losses: the game's known values, and steps that leave the other side alone."""

import math

import pytest
import torch
from torch import Tensor

from fedkd.losses.adversarial import (
    Discriminator,
    discriminator_accuracy,
    discriminator_loss,
    generator_loss,
)
from fedkd.randomness import seeded_torch


def draw(*shape: int, seed: int) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, generator=source, dtype=torch.float64)


STUDENT_SCORES, TEACHER_SCORES = draw(5, seed=1), draw(5, seed=2)


def discriminator(seed: int = 0) -> Discriminator:
    with seeded_torch(seed):
        return Discriminator(4, width=8).double()


def test_a_discriminator_that_cannot_tell_pays_log_4_and_its_student_log_2():
    zeros = torch.zeros(3, dtype=torch.float64)
    assert discriminator_loss(zeros, zeros).item() == pytest.approx(math.log(4), rel=1e-12)
    assert generator_loss(zeros).item() == pytest.approx(math.log(2), rel=1e-12)


def test_matches_the_logarithms_of_the_probabilities():
    d_student, d_teacher = torch.sigmoid(STUDENT_SCORES), torch.sigmoid(TEACHER_SCORES)
    game = -(d_teacher.log() + (1 - d_student).log()).mean()
    torch.testing.assert_close(discriminator_loss(STUDENT_SCORES, TEACHER_SCORES), game)
    torch.testing.assert_close(generator_loss(STUDENT_SCORES), -d_student.log().mean())


def test_the_sides_pull_in_opposite_directions():
    leaf = STUDENT_SCORES.clone().requires_grad_()
    (down,) = torch.autograd.grad(discriminator_loss(leaf, TEACHER_SCORES), leaf)
    (up,) = torch.autograd.grad(generator_loss(leaf), leaf)
    assert (down > 0).all()
    assert (up < 0).all()


def test_gradients_agree_with_finite_differences():
    leaves = (STUDENT_SCORES.clone().requires_grad_(), TEACHER_SCORES.clone().requires_grad_())
    assert torch.autograd.gradcheck(discriminator_loss, leaves)
    assert torch.autograd.gradcheck(generator_loss, leaves[:1])


def test_reordering_rows_changes_nothing():
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(
        discriminator_loss(STUDENT_SCORES[order], TEACHER_SCORES[order]),
        discriminator_loss(STUDENT_SCORES, TEACHER_SCORES),
    )


def test_a_mask_divides_by_the_rows_it_keeps():
    mask = torch.tensor([1.0, 0, 0, 1, 0], dtype=torch.float64)
    kept = mask.bool()
    torch.testing.assert_close(
        discriminator_loss(STUDENT_SCORES, TEACHER_SCORES, sample_weights=mask),
        discriminator_loss(STUDENT_SCORES[kept], TEACHER_SCORES[kept]),
    )
    torch.testing.assert_close(
        generator_loss(STUDENT_SCORES, sample_weights=mask), generator_loss(STUDENT_SCORES[kept])
    )
    nothing = torch.zeros_like(mask)
    assert generator_loss(STUDENT_SCORES, sample_weights=nothing).item() == 0.0


def test_sure_scores_stay_finite():
    sure = torch.tensor([1e4])
    assert discriminator_loss(sure, -sure).item() == pytest.approx(2e4)
    assert generator_loss(-sure).item() == pytest.approx(1e4)
    assert generator_loss(sure).item() == 0.0


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_gives_a_float32_loss(half: torch.dtype):
    student, teacher = STUDENT_SCORES.to(half), TEACHER_SCORES.to(half)
    exact = discriminator_loss(student.double(), teacher.double())
    loss = discriminator_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert generator_loss(student).dtype == torch.float32


def test_a_stack_gives_what_each_gives():
    students = draw(3, 5, seed=3)
    stacked = torch.func.vmap(discriminator_loss, in_dims=(0, None))(students, TEACHER_SCORES)
    looped = torch.stack([discriminator_loss(s, TEACHER_SCORES) for s in students])
    torch.testing.assert_close(stacked, looped)
    torch.testing.assert_close(
        torch.func.vmap(generator_loss)(students),
        torch.stack([generator_loss(s) for s in students]),
    )


def test_an_empty_batch_costs_nothing():
    empty = torch.zeros(0)
    assert discriminator_loss(empty, empty).item() == 0.0
    assert generator_loss(empty).item() == 0.0
    assert discriminator_accuracy(empty, empty).item() == 0.0


def test_accuracy_counts_right_answers_on_both_sides():
    student, teacher = torch.tensor([-1.0, 2.0, -3.0]), torch.tensor([1.0, 1.0, -1.0])
    assert discriminator_accuracy(student, teacher).item() == pytest.approx(4 / 6)


def test_accuracy_is_a_half_where_both_models_are_the_same():
    logits = draw(7, 4, seed=5)
    scores = discriminator()(logits)
    assert discriminator_accuracy(scores, scores).item() == 0.5
    assert discriminator_accuracy(torch.zeros(3), torch.zeros(3)).item() == 0.5


def test_the_discriminator_s_step_leaves_both_models_without_a_gradient():
    student, teacher = draw(5, 4, seed=1).requires_grad_(), draw(5, 4, seed=2).requires_grad_()
    judge = discriminator()
    judge.loss(student, teacher).backward()
    assert student.grad is None
    assert teacher.grad is None
    assert all(weight.grad is not None for weight in judge.parameters())


def test_the_student_s_step_leaves_the_discriminator_without_a_gradient():
    student, judge = draw(5, 4, seed=1).requires_grad_(), discriminator()
    judge.fooling_loss(student).backward()
    assert student.grad is not None
    assert student.grad.norm() > 0
    assert all(weight.grad is None for weight in judge.parameters())
    torch.testing.assert_close(judge.fooling_loss(student), generator_loss(judge(student)))


def test_a_trained_discriminator_tells_two_models_apart():
    student, teacher = draw(64, 4, seed=1), draw(64, 4, seed=2) + 1.5
    judge = discriminator()
    optimizer = torch.optim.Adam(judge.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        judge.loss(student, teacher).backward()
        optimizer.step()
    assert discriminator_accuracy(judge(student), judge(teacher)).item() > 0.75


@pytest.mark.parametrize(("layers", "expected"), [(0, 5), (1, 4 * 8 + 8 + 9), (2, 4 * 8 + 8 + 81)])
def test_layers_and_width_are_what_was_asked_for(layers: int, expected: int):
    judge = Discriminator(4, width=8, num_layers=layers)
    assert sum(weight.numel() for weight in judge.parameters()) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 0}, "num_classes must be >= 1, got 0"),
        ({"num_classes": 3, "width": 0}, "width must be >= 1, got 0"),
        ({"num_classes": 3, "num_layers": -1}, "num_layers must be >= 0, got -1"),
    ],
)
def test_refuses_a_discriminator_of_no_size(settings: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        Discriminator(**settings)
