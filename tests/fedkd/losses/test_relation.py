"""Relation losses: naive loops, invariances, and batches that have no relations."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fedkd.losses.relation import (
    ContrastiveMemory,
    contrastive_representation_loss,
    noise_contrastive_loss,
    pkt_loss,
    rkd_angle_loss,
    rkd_distance_loss,
    similarity_preserving_loss,
)
from fedkd.randomness import seeded_torch

Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "rkd_distance": rkd_distance_loss,
    "rkd_angle": rkd_angle_loss,
    "similarity_preserving": similarity_preserving_loss,
    "pkt": pkt_loss,
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


STUDENT, TEACHER = draw(5, 3, seed=1), draw(5, 4, seed=2)


def gradient(loss: Callable[[Tensor], Tensor], embedding: Tensor) -> Tensor:
    leaf = embedding.clone().requires_grad_()
    (result,) = torch.autograd.grad(loss(leaf), leaf)
    return result


def huber(difference: float) -> float:
    size = abs(difference)
    return 0.5 * size**2 if size < 1 else size - 0.5


# --- values ---------------------------------------------------------------------------------


def test_rkd_distance_matches_a_value_worked_out_by_hand():
    # Student on a line at 0, 1, 3: distances 1, 2, 3, mean 2. Teacher: an equilateral triangle.
    # Relative: (1/2, 1, 3/2) against (1, 1, 1); each pair counts twice among nine entries.
    student = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
    teacher = torch.eye(3, dtype=torch.float64)
    by_hand = 2 * (0.125 + 0.0 + 0.125) / 9
    assert rkd_distance_loss(student, teacher).item() == pytest.approx(by_hand, rel=1e-12)


def test_rkd_angle_matches_a_value_worked_out_by_hand():
    # Student on a line: cosines 1, -1, 1 at the three corners. Teacher's corners: all 1/2.
    # Each corner appears as (i, j, k) and (i, k, j) among 27 triplets.
    student = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
    teacher = torch.eye(3, dtype=torch.float64)
    by_hand = 2 * (huber(0.5) + huber(1.5) + huber(0.5)) / 27
    assert rkd_angle_loss(student, teacher).item() == pytest.approx(by_hand, rel=1e-12)


def test_rkd_matches_loops_over_pairs_and_triplets():
    def distances(x: np.ndarray) -> dict[tuple[int, int], float]:
        pairs = list(itertools.permutations(range(len(x)), 2))
        raw = {(i, j): float(np.linalg.norm(x[i] - x[j])) for i, j in pairs}
        mean = sum(raw.values()) / len(raw)
        return {pair: distance / mean for pair, distance in raw.items()}

    def angle(x: np.ndarray, i: int, j: int, k: int) -> float:
        a, b = x[j] - x[i], x[k] - x[i]
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    s, t = STUDENT.numpy(), 3 * TEACHER.numpy()
    student, teacher = distances(s), distances(t)
    distance = sum(huber(student[pair] - teacher[pair]) for pair in student) / 25
    angles = (
        sum(
            huber(angle(s, i, j, k) - angle(t, i, j, k))
            for i, j, k in itertools.permutations(range(5), 3)
        )
        / 125
    )
    assert rkd_distance_loss(STUDENT, 3 * TEACHER).item() == pytest.approx(distance, rel=1e-12)
    assert rkd_angle_loss(STUDENT, 3 * TEACHER).item() == pytest.approx(angles, rel=1e-12)


def test_similarity_preserving_matches_a_loop():
    total = 0.0
    s, t = STUDENT.numpy() @ STUDENT.numpy().T, TEACHER.numpy() @ TEACHER.numpy().T
    for i in range(5):
        total += np.sum((s[i] / np.linalg.norm(s[i]) - t[i] / np.linalg.norm(t[i])) ** 2)
    loss = similarity_preserving_loss(STUDENT, TEACHER)
    assert loss.item() == pytest.approx(total / 25, rel=1e-12)


def test_similarity_preserving_matches_a_value_worked_out_by_hand():
    # Orthogonal student: identity. Equal teacher rows: 1/sqrt(2) everywhere.
    student = torch.eye(2, dtype=torch.float64)
    teacher = torch.ones(2, 3, dtype=torch.float64)
    half = math.sqrt(0.5)
    by_hand = 2 * ((1 - half) ** 2 + half**2) / 4
    assert similarity_preserving_loss(student, teacher).item() == pytest.approx(by_hand)


def test_pkt_matches_a_value_worked_out_by_hand():
    # Orthogonal student rows: (1, 1/2) / 1.5; equal teacher rows: (1/2, 1/2).
    # Each of two rows costs 1/2 ln(3/4) + 1/2 ln(3/2) nats, four entries share them.
    student, teacher = torch.eye(2, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
    by_hand = 2 * (0.5 * math.log(0.75) + 0.5 * math.log(1.5)) / 4
    assert pkt_loss(student, teacher).item() == pytest.approx(by_hand, abs=1e-6)
    assert pkt_loss(teacher, student).item() == pytest.approx(
        2 * (2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)) / 4, abs=1e-6
    )


def test_pkt_matches_a_loop():
    def neighbours(x: np.ndarray) -> np.ndarray:
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        similarity = (unit @ unit.T + 1) / 2
        return similarity / similarity.sum(axis=1, keepdims=True)

    s, t = neighbours(STUDENT.numpy()), neighbours(TEACHER.numpy())
    assert pkt_loss(STUDENT, TEACHER).item() == pytest.approx(
        np.mean(t * np.log(t / s)).item(), abs=1e-6
    )


# --- properties -----------------------------------------------------------------------------


@every_loss
def test_a_student_that_agrees_pays_nothing_and_stays(loss: Loss):
    assert abs(loss(STUDENT, STUDENT).item()) < 1e-14
    assert gradient(lambda s: loss(s, STUDENT), STUDENT).abs().max() < 1e-14
    assert loss(STUDENT, TEACHER).item() > 1e-4


@every_loss
def test_a_change_of_scale_or_a_rotation_of_one_side_changes_nothing(loss: Loss):
    rotation = torch.linalg.qr(draw(3, 3, seed=3)).Q
    expected = loss(STUDENT, TEACHER)
    torch.testing.assert_close(loss(7.0 * STUDENT @ rotation, TEACHER), expected)
    torch.testing.assert_close(loss(STUDENT, 0.01 * TEACHER), expected)


@pytest.mark.parametrize("loss", [rkd_distance_loss, rkd_angle_loss])
def test_moving_all_rows_changes_no_distance_and_no_angle(loss: Loss):
    shift = draw(1, 3, seed=4)
    torch.testing.assert_close(loss(STUDENT + shift, TEACHER), loss(STUDENT, TEACHER))


@every_loss
def test_reordering_rows_together_changes_nothing_but_one_side_alone_does(loss: Loss):
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(loss(STUDENT[order], TEACHER[order]), loss(STUDENT, TEACHER))
    assert abs(loss(STUDENT[order], TEACHER).item() - loss(STUDENT, TEACHER).item()) > 1e-5


@every_loss
def test_gradient_reaches_the_student_alone(loss: Loss):
    to_student, to_teacher = torch.func.grad(loss, argnums=(0, 1))(STUDENT, TEACHER)
    assert torch.equal(to_teacher, torch.zeros_like(TEACHER))
    assert to_student.norm() > 1e-4
    teacher = TEACHER.clone().requires_grad_()
    loss(STUDENT.clone().requires_grad_(), teacher).backward()
    assert teacher.grad is None


@every_loss
def test_gradient_agrees_with_finite_differences(loss: Loss):
    student = STUDENT.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, TEACHER), (student,))


@every_loss
def test_a_step_downhill_lowers_the_loss(loss: Loss):
    before = loss(STUDENT, TEACHER)
    direction = gradient(lambda s: loss(s, TEACHER), STUDENT)
    assert loss(STUDENT - 0.01 * direction / direction.norm(), TEACHER) < before


@every_loss
def test_a_stack_of_students_gives_what_each_gives(loss: Loss):
    students = draw(2, 5, 3, seed=5)
    values, gradients = torch.func.vmap(torch.func.grad_and_value(loss), in_dims=(0, None))(
        students, TEACHER
    )[::-1]
    for student, value, grad in zip(students, values, gradients, strict=True):
        torch.testing.assert_close(value, loss(student, TEACHER))
        torch.testing.assert_close(grad, gradient(lambda s: loss(s, TEACHER), student))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@every_loss
def test_half_precision_gives_a_float32_loss(loss: Loss, half: torch.dtype):
    student, teacher = STUDENT.to(half), TEACHER.to(half)
    result = loss(student, teacher)
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(loss(student.double(), teacher.double()).item(), rel=1e-4)


@every_loss
def test_autocast_does_not_coarsen_the_loss(loss: Loss):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = loss(STUDENT.float(), TEACHER.float())
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(loss(STUDENT, TEACHER).item(), rel=1e-4)


# --- batches without relations --------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1])
@every_loss
def test_a_batch_without_pairs_costs_nothing_and_moves_nothing(loss: Loss, rows: int):
    student, teacher = STUDENT[:rows], TEACHER[:rows]
    assert loss(student, teacher).item() == pytest.approx(0.0, abs=1e-12)
    assert gradient(lambda s: loss(s, teacher), student).abs().sum().item() < 1e-12


@pytest.mark.parametrize("loss", [rkd_distance_loss, rkd_angle_loss])
def test_two_rows_have_one_distance_and_no_angle(loss: Loss):
    assert loss(STUDENT[:2], TEACHER[:2]).item() == pytest.approx(0.0, abs=1e-12)
    assert gradient(lambda s: loss(s, TEACHER[:2]), STUDENT[:2]).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_loss
def test_rows_that_coincide_or_vanish_stay_finite(loss: Loss, dtype: torch.dtype):
    zeros = torch.zeros(4, 3, dtype=dtype)
    twins = torch.tensor([[1.0, 2, 3], [1, 2, 3], [0, 0, 0], [1, 0, 2]], dtype=dtype)
    for student in (zeros, zeros + 1, twins):
        for teacher in (TEACHER[:4].to(dtype), zeros):
            assert math.isfinite(loss(student, teacher).item())
            # No blow-up either: a division by a tiny length would give 1e12.
            assert gradient(lambda s, t=teacher: loss(s, t), student).abs().max() < 10


# --- contrast -------------------------------------------------------------------------------


def unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)


def test_noise_contrast_matches_a_value_worked_out_by_hand():
    # p = e^score / Z with Z = 2: positive 1, negatives 1/2 and 1/2; q = 2 / 4.
    # -log(1 / 1.5) - 2 log(0.5 / 1)
    loss = noise_contrastive_loss(
        torch.tensor([math.log(2.0)], dtype=torch.float64),
        torch.zeros(1, 2, dtype=torch.float64),
        num_rows=4,
        log_normaliser=math.log(2.0),
    )
    assert loss.item() == pytest.approx(math.log(1.5) + 2 * math.log(2.0), rel=1e-12)


def test_contrast_matches_a_loop_in_both_directions():
    student, teacher = unit(draw(2, 3, seed=1)), unit(draw(2, 3, seed=2))
    student_memory, teacher_memory = unit(draw(6, 3, seed=3)), unit(draw(6, 3, seed=4))
    rows, negatives = torch.tensor([4, 1]), torch.tensor([[0, 2, 3, 5], [5, 3, 2, 0]])
    total = 0.0
    for embedding, memory, z in ((student, teacher_memory, 9.0), (teacher, student_memory, 5.0)):
        for b in range(2):

            def p(row: int, b: int = b, e: Tensor = embedding, m: Tensor = memory, z=z) -> float:
                return math.exp(float(e[b] @ m[row]) / 0.07) / z

            noise = 4 / 6
            total -= math.log(p(int(rows[b])) / (p(int(rows[b])) + noise))
            total -= sum(math.log(noise / (p(int(n)) + noise)) for n in negatives[b])
    loss = contrastive_representation_loss(
        student,
        teacher,
        student_memory,
        teacher_memory,
        row_ids=rows,
        negative_ids=negatives,
        student_log_normaliser=math.log(9.0),
        teacher_log_normaliser=math.log(5.0),
    )
    assert loss.item() == pytest.approx(total / 2, rel=1e-10)


STUDENT_MEMORY, TEACHER_MEMORY = unit(draw(6, 3, seed=3)), unit(draw(6, 3, seed=4))


def pure_contrast(student: Tensor, teacher: Tensor) -> Tensor:
    return contrastive_representation_loss(
        student,
        teacher,
        STUDENT_MEMORY,
        TEACHER_MEMORY,
        row_ids=torch.tensor([4, 1]),
        negative_ids=torch.tensor([[0, 2, 3, 5], [5, 3, 2, 0]]),
        student_log_normaliser=2.0,
        teacher_log_normaliser=1.0,
        temperature=0.5,
    )


def test_contrast_gradients_agree_with_finite_differences_and_a_stack_with_its_members():
    students, teacher = unit(draw(3, 2, 3, seed=1)), unit(draw(2, 3, seed=2))
    leaves = (students[0].clone().requires_grad_(), teacher.clone().requires_grad_())
    assert torch.autograd.gradcheck(pure_contrast, leaves)
    stacked = torch.func.vmap(pure_contrast, in_dims=(0, None))(students, teacher)
    torch.testing.assert_close(stacked, torch.stack([pure_contrast(s, teacher) for s in students]))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_contrast_in_half_precision_gives_float32_and_huge_scores_stay_finite(half: torch.dtype):
    student, teacher = unit(draw(2, 3, seed=1)), unit(draw(2, 3, seed=2))
    assert pure_contrast(student.to(half), teacher.to(half)).dtype == torch.float32
    scores = torch.tensor([-1e4])
    loss = noise_contrastive_loss(scores, -scores[:, None], num_rows=3, log_normaliser=0.0)
    assert loss.item() == pytest.approx(2e4, rel=1e-3)


def test_contrast_without_negatives_or_rows_costs_nothing():
    scores = draw(2, seed=1)
    no_negatives = torch.zeros(2, 0, dtype=torch.float64)
    for positive, negative in ((scores, no_negatives), (scores[:0], draw(0, 3, seed=2))):
        loss = noise_contrastive_loss(positive, negative, num_rows=5, log_normaliser=0.0)
        assert loss.item() == 0.0


def memory(num_rows: int = 7, **settings: object) -> ContrastiveMemory:
    with seeded_torch(0):
        return ContrastiveMemory(3, 4, num_rows, dim=5, **settings)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_negatives_are_other_rows_each_at_most_once():
    rows = torch.tensor([6, 0, 3])
    drawn = memory(num_negatives=4).draw_negatives(rows, generator())
    assert drawn.shape == (3, 4)
    for row, negatives in zip(rows.tolist(), drawn.tolist(), strict=True):
        assert row not in negatives
        assert len(set(negatives)) == 4
        assert set(negatives) <= set(range(7))


def test_negatives_are_limited_to_the_rows_that_exist():
    assert memory(num_negatives=16384).num_negatives == 6
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    bank = memory(num_negatives=16384, row_labels=labels)
    assert bank.num_negatives == 3
    rows = torch.tensor([0, 4, 6])
    drawn = bank.draw_negatives(rows, generator())
    assert (labels[drawn] != labels[rows][:, None]).all()


def test_the_same_seed_draws_the_same_and_another_seed_does_not():
    rows, bank = torch.arange(20), memory(50, num_negatives=9)
    first = bank.draw_negatives(rows, generator(1))
    assert torch.equal(first, bank.draw_negatives(rows, generator(1)))
    assert not torch.equal(first, bank.draw_negatives(rows, generator(2)))


def test_the_bank_follows_row_ids_whatever_their_order():
    student, teacher, rows = draw(3, 3, seed=1), draw(3, 4, seed=2), torch.tensor([5, 0, 2])
    order = torch.tensor([2, 0, 1])
    plain, shuffled = memory(), memory()
    plain(student.float(), teacher.float(), rows, generator=generator())
    shuffled(student[order].float(), teacher[order].float(), rows[order], generator=generator())
    torch.testing.assert_close(plain.student_memory, shuffled.student_memory)
    torch.testing.assert_close(plain.teacher_memory, shuffled.teacher_memory)


def test_the_bank_moves_by_the_momentum_and_only_for_the_batch():
    bank = memory().double()
    before, rows = bank.student_memory.clone(), torch.tensor([5, 2])
    student = draw(2, 3, seed=1)
    bank(student, draw(2, 4, seed=2), rows, generator=generator())
    new = unit(bank.student_projection(student).detach())
    torch.testing.assert_close(bank.student_memory[rows], unit(0.5 * before[rows] + 0.5 * new))
    others = torch.tensor([0, 1, 3, 4, 6])
    assert torch.equal(bank.student_memory[others], before[others])


def test_normalisers_are_estimated_once_from_the_first_batch():
    bank = memory().double()
    teacher_memory, rows = bank.teacher_memory.clone(), torch.tensor([5, 2])
    student = draw(2, 3, seed=1)
    negatives = bank.draw_negatives(rows, generator(3))
    bank(student, draw(2, 4, seed=2), rows, generator=generator(3))
    embedding = unit(bank.student_projection(student).detach())
    candidates = teacher_memory[torch.cat([rows[:, None], negatives], dim=1)]
    densities = (torch.einsum("bd,bcd->bc", embedding, candidates) / 0.07).exp()
    by_hand = (densities.mean() * 7).log()
    torch.testing.assert_close(bank.student_log_normaliser, by_hand)
    settled = bank.student_log_normaliser.clone()
    bank(2 - student, draw(2, 4, seed=5), rows, generator=generator(4))
    assert torch.equal(bank.student_log_normaliser, settled)


def test_evaluation_leaves_the_memory_alone():
    bank = memory().eval()
    before = {name: tensor.clone() for name, tensor in bank.state_dict().items()}
    bank(torch.ones(2, 3), torch.ones(2, 4), torch.tensor([0, 1]), generator=generator())
    for name, tensor in bank.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


def test_contrast_trains_the_student_and_both_projections_but_not_the_teacher():
    bank = memory()
    student, teacher = torch.randn(2, 3, generator=generator()), torch.ones(2, 4)
    student.requires_grad_()
    teacher.requires_grad_()
    bank(student, teacher, torch.tensor([0, 1]), generator=generator()).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.norm() > 0
    for name, parameter in bank.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.norm() > 0, name


def test_training_brings_rows_of_both_models_together():
    bank = memory(20, num_negatives=8)
    student, teacher = draw(20, 3, seed=1).float(), draw(20, 4, seed=2).float()
    optimizer = torch.optim.Adam(bank.parameters(), lr=0.05)
    losses, source = [], generator(7)
    for _ in range(40):
        rows = torch.randperm(20, generator=source)[:10]
        loss = bank(student[rows], teacher[rows], rows, generator=source)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize("row", [-1, 7])
def test_refuses_a_row_that_the_bank_does_not_have(row: int):
    with pytest.raises(ValueError, match=r"^row ids must be in \[0, 7\), got ids from"):
        memory()(torch.ones(1, 3), torch.ones(1, 4), torch.tensor([row]), generator=generator())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_rows": 1}, "num_rows must be >= 2"),
        ({"num_negatives": 0}, "num_negatives must be >= 1, got 0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"row_labels": torch.zeros(7, dtype=torch.long)}, "row_labels must name at least 2"),
        ({"row_labels": torch.arange(6)}, "row_labels must be 7 classes, got 6"),
    ],
)
def test_refuses_a_memory_that_cannot_work(settings: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        memory(**settings)  # type: ignore[arg-type]


def test_an_empty_batch_costs_nothing():
    rows = torch.zeros(0, dtype=torch.long)
    loss = memory()(torch.zeros(0, 3), torch.zeros(0, 4), rows, generator=generator())
    assert loss.item() == 0.0
