"""OKDDip: targets pull on no peer, attention learns."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedkd.mutual.okddip import PeerAttention, okddip_losses

LABELS = torch.tensor([2, 0])
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
GROUP_LABELS = torch.tensor([2, 0, 1, 3, 3])
ATTENTION = torch.softmax(torch.randn(5, 3, 3, generator=_generator, dtype=torch.float64), dim=2)


@pytest.mark.parametrize("average", ["prob", "logit"])
def test_okddip_equals_its_definition_read_aloud(average: str):
    terms = okddip_losses(GROUP, LEADER, ATTENTION, GROUP_LABELS, average=average)

    def blend(weights: Tensor, row: int) -> Tensor:
        if average == "prob":
            return sum(
                w * torch.softmax(peer[row] / 3, 0) for w, peer in zip(weights, GROUP, strict=True)
            )
        return torch.softmax(
            sum(w * peer[row] for w, peer in zip(weights, GROUP, strict=True)) / 3, 0
        )

    def distance(own: Tensor, target: Tensor) -> Tensor:
        return 9 * (target * (target.log() - torch.log_softmax(own / 3, 0))).sum() / 5

    peers = sum(
        distance(GROUP[a, row], blend(ATTENTION[row, a], row)) for a in range(3) for row in range(5)
    )
    leader = sum(distance(LEADER[row], blend([1 / 3] * 3, row)) for row in range(5))
    torch.testing.assert_close(terms["kd_peers"], peers)
    torch.testing.assert_close(terms["kd_leader"], leader)


def test_okddip_averages_of_probabilities_and_of_logits_differ():
    by_prob = okddip_losses(GROUP, LEADER, ATTENTION, GROUP_LABELS)
    by_logit = okddip_losses(GROUP, LEADER, ATTENTION, GROUP_LABELS, average="logit")
    assert (by_prob["kd_peers"] - by_logit["kd_peers"]).abs() > 0.01
    assert (by_prob["kd_leader"] - by_logit["kd_leader"]).abs() > 0.01


def test_okddip_peers_that_attend_to_themselves_only_do_not_move():
    leaf = GROUP.clone().requires_grad_()
    itself = torch.eye(3, dtype=torch.float64).repeat(5, 1, 1)
    kd = okddip_losses(leaf, LEADER, itself, GROUP_LABELS)["kd_peers"]
    assert kd.abs() < 1e-13
    assert torch.autograd.grad(kd, leaf)[0].abs().max() < 1e-14


def test_okddip_targets_pull_on_no_peer_and_teach_the_attention():
    leaf, attention = GROUP.clone().requires_grad_(), ATTENTION.clone().requires_grad_()
    terms = okddip_losses(leaf, LEADER.clone().requires_grad_(), attention, GROUP_LABELS)
    assert torch.autograd.grad(terms["kd_leader"], leaf, retain_graph=True, allow_unused=True) == (
        None,
    )
    soft = torch.softmax(GROUP / 3, dim=2)
    targets = torch.einsum("bak,kbc->abc", ATTENTION, soft)
    slope, taught = torch.autograd.grad(terms["kd_peers"], [leaf, attention])
    torch.testing.assert_close(slope, 3 / 5 * (soft - targets))
    assert taught.any()

    def of_attention(attention: Tensor) -> Tensor:
        return okddip_losses(GROUP, LEADER, attention, GROUP_LABELS)["kd_peers"]

    assert torch.autograd.gradcheck(of_attention, (attention,))


def test_attention_that_sees_certain_peers_gets_a_finite_gradient():
    certain = 1e5 * F.one_hot(torch.tensor([[0, 1], [2, 1], [3, 0]]), 4).float()
    attention = torch.softmax(torch.zeros(2, 3, 3), dim=2).requires_grad_()
    kd = okddip_losses(certain, certain[0], attention, LABELS)["kd_peers"]
    assert torch.isfinite(torch.autograd.grad(kd, attention)[0]).all()


def test_attention_learns_and_its_features_do_not():
    attend = PeerAttention(16)
    assert attend.query.weight.shape == attend.key.weight.shape == (2, 16)
    assert PeerAttention(3).query.weight.shape == (1, 3)
    features = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    attention = attend(features)
    assert attention.shape == (5, 3, 3)
    torch.testing.assert_close(attention.sum(2), torch.ones(5, 3))
    kd = okddip_losses(GROUP.float(), LEADER.float(), attention, GROUP_LABELS)["kd_peers"]
    kd.backward()
    assert features.grad is None
    assert attend.query.weight.grad.any()
    assert attend.key.weight.grad.any()
    # Entry [row, a, b] is what a takes from b: a softmax over the keys.
    row, a = 3, 1
    queries, keys = attend.query(features[a, row]), attend.key(features[:, row])
    torch.testing.assert_close(attention[row, a], torch.softmax(keys @ queries, dim=0))


@pytest.mark.parametrize(("average", "value"), [("logit", 1.87671771), ("prob", 1.88872238)])
def test_okddip_matches_the_reference_values(average: str, value: float):
    queries = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.float64)
    keys = torch.tensor([[1, 0], [0.5, 0.5], [0, 1]], dtype=torch.float64)
    attention = torch.softmax(queries @ keys.t(), dim=1)
    assert attention[0].tolist() == pytest.approx([0.50648039, 0.30719589, 0.18632372], abs=1e-8)
    every_row = attention.expand(2, 3, 3)
    terms = okddip_losses(REFERENCE, REFERENCE[0], every_row, None, average=average)
    assert terms["kd_peers"].item() == pytest.approx(value, abs=1e-8)


def test_attention_without_oneself_is_shared_among_the_others():
    attention, features = PeerAttention(4), torch.randn(3, 5, 4, dtype=torch.float32)
    whole, others = attention(features), attention(features, include_self=False)
    assert (others.diagonal(dim1=1, dim2=2) == 0).all()
    rest = whole.masked_fill(torch.eye(3, dtype=torch.bool), 0.0)
    torch.testing.assert_close(others, rest / rest.sum(2, keepdim=True))
    with pytest.raises(ValueError, match="needs at least 2 peers, got 1"):
        attention(features[:1], include_self=False)
