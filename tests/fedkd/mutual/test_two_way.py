"""A teacher and a student that learn from each other: whose influence grows, who is pulled."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedkd.mutual.pairwise import deep_mutual_losses
from fedkd.mutual.two_way import TwoWayWeights, progressive_weights, two_way_losses

PEERS = torch.tensor(
    [
        [[1, 2, 3, 0], [0.5, -1, 0, 2]],
        [[2, 1, 4, -1], [0, 0, 1, 3]],
        [[-4, 3, 1, 1], [2, 0, -1, 1]],
    ],
    dtype=torch.float64,
)
LABELS = torch.tensor([2, 0])


def test_the_teacher_leads_first_and_the_student_s_influence_grows():
    assert progressive_weights(0.0) == (1.0, 0.0)
    assert progressive_weights(0.5) == pytest.approx((0.75, 0.25))
    assert progressive_weights(1.0) == (0.5, 0.5)
    assert progressive_weights(1.0, kd_weight=4.0, final_share=0.25) == (3.0, 1.0)
    influence = [progressive_weights(step / 10).student_to_teacher for step in range(11)]
    assert influence == sorted(influence)


def test_two_equal_directions_are_deep_mutual_learning():
    terms = two_way_losses(
        PEERS[0], PEERS[1], LABELS, weights=TwoWayWeights(0.5, 0.5), temperature=2.0
    )
    pair = deep_mutual_losses(PEERS[:2], LABELS, kd_weight=0.5, temperature=2.0)
    torch.testing.assert_close(terms["ce_student"] + terms["kd_student"], pair[0])
    torch.testing.assert_close(terms["ce_teacher"] + terms["kd_teacher"], pair[1])


def test_at_the_start_the_teacher_learns_from_labels_only():
    student, teacher = PEERS[0].clone().requires_grad_(), PEERS[1].clone().requires_grad_()
    weights = progressive_weights(0.0)
    terms = two_way_losses(student, teacher, LABELS, weights=weights, temperature=2.0)
    assert terms["kd_student"].item() == pytest.approx(0.25344814, abs=1e-8)
    sum(terms.values()).backward()
    plain = PEERS[1].clone().requires_grad_()
    F.cross_entropy(plain, LABELS).backward()
    torch.testing.assert_close(teacher.grad, plain.grad, rtol=1e-12, atol=0)


def test_each_direction_pulls_on_the_side_that_learns():
    student, teacher = PEERS[0].clone().requires_grad_(), PEERS[1].clone().requires_grad_()
    terms = two_way_losses(student, teacher, LABELS, weights=TwoWayWeights(1.0, 1.0))
    for name, own, other in (("kd_student", student, teacher), ("kd_teacher", teacher, student)):
        pulled, still = torch.autograd.grad(
            terms[name], [own, other], retain_graph=True, allow_unused=True
        )
        assert pulled.any()
        assert still is None


def test_two_way_learning_takes_row_weights_half_precision_and_vmap():
    mask = torch.tensor([1.0, 0.0], dtype=torch.float64)
    weights = TwoWayWeights(0.7, 0.2)
    masked = two_way_losses(PEERS[0], PEERS[1], LABELS, weights=weights, sample_weights=mask)
    kept = two_way_losses(PEERS[0][:1], PEERS[1][:1], LABELS[:1], weights=weights)
    half = two_way_losses(PEERS[0].half(), PEERS[1].bfloat16(), LABELS, weights=weights)
    for name, term in masked.items():
        torch.testing.assert_close(term, kept[name])
        assert half[name].dtype == torch.float32

    def total(student: Tensor, teacher: Tensor) -> Tensor:
        return sum(two_way_losses(student, teacher, LABELS, weights=weights).values())

    stacked = torch.func.vmap(total)(PEERS[:2], PEERS[1:])
    expected = torch.stack([total(PEERS[0], PEERS[1]), total(PEERS[1], PEERS[2])])
    torch.testing.assert_close(stacked, expected)


def test_two_way_learning_refuses_what_is_out_of_range():
    with pytest.raises(ValueError, match="student_to_teacher must be >= 0 and finite, got -1"):
        two_way_losses(PEERS[0], PEERS[1], LABELS, weights=TwoWayWeights(1.0, -1.0))
    with pytest.raises(ValueError, match=r"final_share must be in \[0, 1\], got 1.5"):
        progressive_weights(0.5, final_share=1.5)
    with pytest.raises(ValueError, match="kd_weight must be >= 0 and finite, got -2"):
        progressive_weights(0.5, kd_weight=-2.0)
    with pytest.raises(ValueError, match=r"progress must be in \[0, 1\], got 1.1"):
        progressive_weights(1.1)
