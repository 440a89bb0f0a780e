"""PCL: the ensemble and the mean teachers of the others teach."""

import pytest
import torch
from torch import Tensor

from fedkd.losses.response import hard_label_loss, soft_target_loss
from fedkd.mutual.pairwise import mutual_losses
from fedkd.mutual.pcl import pcl_losses

# The reference values' inputs: three peers, two rows, four classes.
REFERENCE = torch.tensor(
    [
        [[1, 2, 3, 0], [0.5, -1, 0, 2]],
        [[2, 1, 4, -1], [0, 0, 1, 3]],
        [[-4, 3, 1, 1], [2, 0, -1, 1]],
    ],
    dtype=torch.float64,
)
# Distinct sizes for every axis: 3 peers, 5 rows, 4 classes.
_generator = torch.Generator().manual_seed(7)
GROUP = 3 * torch.randn(3, 5, 4, generator=_generator, dtype=torch.float64)
LEADER = 3 * torch.randn(5, 4, generator=_generator, dtype=torch.float64)
TEACHERS = 3 * torch.randn(3, 5, 4, generator=_generator, dtype=torch.float64)
GROUP_LABELS = torch.tensor([2, 0, 1, 3, 3])


def kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    return soft_target_loss(student, teacher, temperature=temperature)


def test_pcl_equals_its_definition_read_aloud():
    terms = pcl_losses(GROUP, LEADER, TEACHERS, GROUP_LABELS)
    torch.testing.assert_close(terms["kd_ensemble"], sum(kl(peer, LEADER, 3.0) for peer in GROUP))
    others = sum(kl(GROUP[k], TEACHERS[j], 3.0) / 2 for k in range(3) for j in range(3) if j != k)
    torch.testing.assert_close(terms["kd_mean_teachers"], others)
    torch.testing.assert_close(terms["ce_ensemble"], hard_label_loss(LEADER, GROUP_LABELS))


def test_pcl_with_the_peers_as_their_own_mean_teachers_is_mutual_learning():
    terms = pcl_losses(GROUP, LEADER, GROUP, GROUP_LABELS, temperature=2.0)
    expected = mutual_losses(GROUP, temperature=2.0).sum()
    torch.testing.assert_close(terms["kd_mean_teachers"], expected)


def test_pcl_teachers_are_constants():
    leader, teachers = LEADER.clone().requires_grad_(), TEACHERS.clone().requires_grad_()
    terms = pcl_losses(GROUP.clone().requires_grad_(), leader, teachers, GROUP_LABELS)
    distilled = terms["kd_ensemble"] + terms["kd_mean_teachers"]
    slopes = torch.autograd.grad(
        distilled, [leader, teachers], retain_graph=True, allow_unused=True
    )
    assert slopes == (None, None)
    assert torch.autograd.grad(terms["ce_ensemble"], leader)[0].any()


def test_a_peer_alone_has_no_other_mean_teacher():
    assert pcl_losses(GROUP[:1], LEADER, TEACHERS[:1], GROUP_LABELS)["kd_mean_teachers"] == 0


def test_pcl_matches_the_reference_values():
    # Three peers that are their own mean teachers; the ensemble is the mean of their logits.
    labels = torch.tensor([2, 0])
    terms = pcl_losses(REFERENCE, REFERENCE.mean(dim=0), REFERENCE, labels)
    expected = {
        "kd_ensemble": 1.55113136,
        "kd_mean_teachers": 4.49256224,
        "ce": 4.17475206,
        "ce_ensemble": 1.04554155,
    }
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, abs=1e-8)
