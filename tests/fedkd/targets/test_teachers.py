"""Several teachers: who is trusted for which row, and which head answers for which task."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedkd.losses.response import soft_target_kl
from fedkd.targets import (
    HEAD_PADDING,
    mean_by_row,
    mean_logit,
    mean_probability,
    route_to_heads,
    shares_by_confidence,
    shares_by_entropy,
    soften,
)

# 3 teachers, 2 rows, 4 classes.
TEACHERS = torch.tensor(
    [
        [[1, 2, 3, 0], [0.5, -1, 0, 2]],
        [[2, 1, 4, -1], [0, 0, 1, 3]],
        [[-4, 3, 1, 1], [2, 0, -1, 1]],
    ],
    dtype=torch.float64,
)
LABELS = torch.tensor([2, 0])


def shares_of(name: str, logits: Tensor) -> Tensor:
    if name == "entropy":
        return shares_by_entropy(logits)
    return shares_by_confidence(logits, LABELS)


RULES = pytest.mark.parametrize("name", ["confidence", "entropy"])


def test_shares_by_confidence_by_hand():
    # Cross-entropies log 2 and log 4: their softmax is (1/3, 2/3), and with two teachers the
    # shares are what is missing to 1.
    teachers = torch.tensor([[[0.0, 0.0]], [[0.0, math.log(3.0)]]])
    shares = shares_by_confidence(teachers, torch.tensor([0]))
    torch.testing.assert_close(shares, torch.tensor([[2 / 3], [1 / 3]]))


def test_shares_by_confidence_equal_a_loop_over_rows():
    shares = shares_by_confidence(TEACHERS, LABELS)
    for row in range(2):
        errors = [F.cross_entropy(teacher[row], LABELS[row]).item() for teacher in TEACHERS]
        total = sum(math.exp(error) for error in errors)
        expected = [(1 - math.exp(error) / total) / 2 for error in errors]
        assert shares[:, row].tolist() == pytest.approx(expected)


def test_shares_by_entropy_by_hand():
    # Entropies log 2 and 0: their softmax is (2/3, 1/3).
    teachers = torch.tensor([[[0.0, 0.0]], [[1000.0, 0.0]]])
    torch.testing.assert_close(shares_by_entropy(teachers), torch.tensor([[1 / 3], [2 / 3]]))
    # A temperature that flattens everything trusts all alike.
    flat = shares_by_entropy(TEACHERS, temperature=1e6)
    torch.testing.assert_close(flat, torch.full((3, 2), 1 / 3, dtype=torch.float64))


@RULES
def test_shares_sum_to_one_and_none_takes_more_than_its_bound(name: str):
    shares = shares_of(name, TEACHERS)
    torch.testing.assert_close(shares.sum(0), torch.ones(2, dtype=torch.float64))
    assert (shares >= 0).all()
    assert (shares <= 0.5).all()


@RULES
def test_identical_teachers_are_one(name: str):
    same = TEACHERS[:1].repeat(5, 1, 1)
    shares = shares_of(name, same)
    torch.testing.assert_close(shares, torch.full((5, 2), 0.2, dtype=torch.float64))
    torch.testing.assert_close(mean_by_row(same, shares), TEACHERS[0])


@RULES
def test_order_of_teachers_and_a_shift_of_a_row_do_not_matter(name: str):
    order = torch.tensor([2, 0, 1])
    shares = shares_of(name, TEACHERS)
    torch.testing.assert_close(shares_of(name, TEACHERS[order]), shares[order])
    shift = torch.tensor([[3.0, -7.0], [0.0, 40.0], [-9.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(shares_of(name, TEACHERS + shift[:, :, None]), shares)


@RULES
def test_shares_need_two_teachers_and_are_constants(name: str):
    with pytest.raises(ValueError, match="shares of teachers need at least 2 of them, got 1"):
        shares_of(name, TEACHERS[:1])
    assert not shares_of(name, TEACHERS.clone().requires_grad_()).requires_grad
    assert shares_of(name, TEACHERS.half()).dtype == torch.float32


def test_a_mean_by_row_with_the_same_shares_everywhere_is_the_weighted_mean():
    shares = torch.tensor([1.0, 3.0, 2.0])[:, None].expand(3, 2)
    torch.testing.assert_close(
        mean_by_row(TEACHERS, shares), mean_logit(TEACHERS, weights=[1, 3, 2])
    )
    softened = soften(TEACHERS, temperature=4.0)
    torch.testing.assert_close(
        mean_by_row(softened, shares),
        mean_probability(TEACHERS, temperature=4.0, weights=[1, 3, 2]),
    )


def test_a_mean_by_row_takes_every_row_by_itself():
    shares = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    mean = mean_by_row(TEACHERS, shares)
    torch.testing.assert_close(mean[0], (TEACHERS[0, 0] + TEACHERS[2, 0]) / 2)
    assert torch.equal(mean[1], torch.zeros(4, dtype=torch.float64))
    assert mean_by_row(TEACHERS.half(), shares).dtype == torch.float32
    with pytest.raises(ValueError, match="at least 1 teacher, got 0"):
        mean_by_row(TEACHERS[:0], shares[:0])


def test_shares_and_means_work_under_vmap():
    groups = torch.stack([TEACHERS, TEACHERS.flip(2)])
    labels = torch.stack([LABELS, LABELS.flip(0)])

    def target(logits: Tensor, labels: Tensor) -> Tensor:
        by_entropy = mean_by_row(logits, shares_by_entropy(logits))
        return by_entropy + mean_by_row(logits, shares_by_confidence(logits, labels))

    stacked = torch.func.vmap(target)(groups, labels)
    for k in range(2):
        torch.testing.assert_close(stacked[k], target(groups[k], labels[k]))


# --- one head per task ----------------------------------------------------------------------

TASKS = torch.tensor([1, 0, 1, 2, 0])


def heads(*widths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, width, generator=generator, dtype=torch.float64) for width in widths]


def test_every_row_is_answered_by_the_head_of_its_task():
    equal = heads(4, 4, 4)
    routed = route_to_heads(equal, TASKS)
    expected = torch.stack([equal[task][row] for row, task in enumerate(TASKS.tolist())])
    assert torch.equal(routed, expected)
    assert torch.equal(route_to_heads(torch.stack(equal), TASKS), expected)


def test_a_narrower_head_gives_no_probability_to_classes_it_does_not_have():
    widths = (2, 4, 3)
    teacher, student = heads(*widths), [head.flip(0).clone() for head in heads(*widths)]
    routed = route_to_heads(teacher, TASKS)
    assert routed.shape == (5, 4)
    assert (routed[1, 2:] == HEAD_PADDING).all()
    probabilities = soften(routed, temperature=4.0)
    assert not probabilities[1, 2:].any()
    loss = soft_target_kl(route_to_heads(student, TASKS), probabilities, temperature=4.0)
    expected = sum(
        soft_target_kl(
            student[task][row : row + 1],
            soften(teacher[task][row : row + 1], temperature=4.0),
            temperature=4.0,
        )
        for row, task in enumerate(TASKS.tolist())
    )
    torch.testing.assert_close(loss, expected / 5)


def test_gradients_reach_only_the_head_that_answered():
    leaves = [head.requires_grad_() for head in heads(4, 4, 4)]
    slopes = torch.autograd.grad(route_to_heads(leaves, TASKS).sum(), leaves)
    for task, slope in enumerate(slopes):
        assert torch.equal(slope, (task == TASKS).double()[:, None].expand(5, 4))


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match=r"task_ids must be in \[0, 2\), one head .* got -1, 2, 7"):
        route_to_heads(heads(4, 4), torch.tensor([7, 0, 2, -1, 2]))
    with pytest.raises(ValueError, match="at least 1 head, got 0"):
        route_to_heads([], TASKS)
