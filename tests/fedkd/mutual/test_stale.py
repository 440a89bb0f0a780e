"""Codistillation: peers as they were at the last exchange."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkd.losses.response import soft_target_loss
from fedkd.mutual.averages import ensemble_target
from fedkd.mutual.stale import StalePeers, codistillation_loss

# Two students of four classes on two rows, and a third: the reference values' inputs.
PEERS = torch.tensor(
    [
        [[1, 2, 3, 0], [0.5, -1, 0, 2]],
        [[2, 1, 4, -1], [0, 0, 1, 3]],
        [[-4, 3, 1, 1], [2, 0, -1, 1]],
    ],
    dtype=torch.float64,
)
# Distinct sizes for every axis: 3 peers, 5 rows, 4 classes.
_generator = torch.Generator().manual_seed(7)
LEADER = 3 * torch.randn(5, 4, generator=_generator, dtype=torch.float64)
TEACHERS = 3 * torch.randn(3, 5, 4, generator=_generator, dtype=torch.float64)


def kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    return soft_target_loss(student, teacher, temperature=temperature)


def small_network() -> nn.Sequential:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(generator=generator)
    return network


def test_codistillation_with_one_peer_is_the_reference_value():
    assert codistillation_loss(PEERS[0], PEERS[1:2]).item() == pytest.approx(0.12034999, abs=1e-8)
    # Two peers: KL to the average of their probabilities. The reference has the sum with the CE,
    # as a cross-entropy without the target's entropy: 1.24723729 - 1.14126964.
    two = codistillation_loss(PEERS[0], PEERS[1:]).item()
    assert two == pytest.approx(1.24723729 - 1.14126964, abs=1e-8)


def test_codistillation_of_identical_peers_is_that_of_one():
    many = TEACHERS[:1].repeat(4, 1, 1)
    torch.testing.assert_close(
        codistillation_loss(LEADER, many, temperature=2.0), kl(LEADER, TEACHERS[0], 2.0)
    )


def test_codistillation_pulls_on_the_student_only():
    leaf, peers = LEADER.clone().requires_grad_(), TEACHERS.clone().requires_grad_()
    loss = codistillation_loss(leaf, peers, temperature=2.0)
    slope, none = torch.autograd.grad(loss, [leaf, peers], allow_unused=True)
    assert none is None
    target = torch.softmax(TEACHERS / 2, dim=2).mean(0)
    torch.testing.assert_close(slope, 2 / 5 * (torch.softmax(LEADER / 2, dim=1) - target))
    assert torch.autograd.gradcheck(lambda x: codistillation_loss(x, TEACHERS), (leaf,))
    with pytest.raises(ValueError, match="at least 1 other model, got 0"):
        codistillation_loss(LEADER, TEACHERS[:0])


def test_stale_peers_keep_what_was_exchanged_until_the_interval_is_over():
    peers = [small_network(), small_network(), nn.Linear(3, 2).double()]
    stale = StalePeers(peers, interval=3)
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at_start = stale.others(inputs, leave_out=0)
    with torch.no_grad():
        expected = torch.stack([copy.deepcopy(peer).eval()(inputs) for peer in peers[1:]])
        for peer in peers:
            for parameter in peer.parameters():
                parameter.add_(1.0)
    torch.testing.assert_close(at_start, expected)
    refreshed = []
    for step in (1, 2):
        refreshed.append(stale.refresh(peers, step=step))
        assert torch.equal(stale.others(inputs, leave_out=0), at_start)
    refreshed.append(stale.refresh(peers, step=3))
    assert refreshed == [False, False, True]
    with torch.no_grad():
        expected = torch.stack([copy.deepcopy(peer).eval()(inputs) for peer in peers[1:]])
    torch.testing.assert_close(stale.others(inputs, leave_out=0), expected)
    assert not torch.equal(expected, at_start)


def test_stale_peers_share_nothing_train_nothing_and_stay_in_evaluation_mode():
    peers = [small_network().train(), small_network().train()]
    holder = nn.ModuleDict({"stale": StalePeers(peers, interval=1)})
    holder.train()
    ours = {tensor.data_ptr() for peer in peers for tensor in peer.state_dict().values()}
    assert ours.isdisjoint(tensor.data_ptr() for tensor in holder.state_dict().values())
    assert not any(parameter.requires_grad for parameter in holder.parameters())
    assert not any(module.training for module in holder["stale"].modules())
    assert all(peer.training for peer in peers)
    tracked = holder["stale"].copies[1][1].num_batches_tracked.clone()
    logits = holder["stale"].others(torch.ones(5, 3, dtype=torch.float64), leave_out=0)
    assert logits.shape == (1, 5, 2)
    assert not logits.requires_grad
    assert torch.equal(holder["stale"].copies[1][1].num_batches_tracked, tracked)


def test_stale_peers_come_back_from_a_checkpoint():
    peers = [small_network(), small_network()]
    stale = StalePeers(peers, interval=10)
    with torch.no_grad():
        peers[1][2].bias.add_(1.0)
    resumed = StalePeers(peers, interval=10)
    resumed.load_state_dict(stale.state_dict())
    inputs = torch.ones(2, 3, dtype=torch.float64)
    assert torch.equal(resumed.others(inputs, leave_out=0), stale.others(inputs, leave_out=0))


def test_stale_peers_refuse_what_makes_no_sense():
    peers = [nn.Linear(3, 2), nn.Linear(3, 2)]
    with pytest.raises(ValueError, match="at least 2 peers, got 1"):
        StalePeers(peers[:1], interval=1)
    with pytest.raises(ValueError, match="interval must be >= 1, got 0"):
        StalePeers(peers, interval=0)
    stale = StalePeers(peers, interval=1)
    with pytest.raises(ValueError, match="step must be >= 0, got -1"):
        stale.refresh(peers, step=-1)
    with pytest.raises(ValueError, match="the 2 of the start, got 1"):
        stale.refresh(peers[:1], step=1)
    with pytest.raises(ValueError, match=r"leave_out must be in \[0, 2\), got 2"):
        stale.others(torch.zeros(1, 3), leave_out=2)


def test_codistillation_with_two_stale_peers_matches_the_reference_value():
    # The paper's cross-entropy: the divergence and the target's entropy.
    target = ensemble_target(PEERS[1:], temperature=1.0)
    entropy = -torch.xlogy(target, target).sum(dim=1).mean()
    own = codistillation_loss(PEERS[0], PEERS[1:])
    total = F.cross_entropy(PEERS[0], torch.tensor([2, 0])) + own + entropy
    assert (own + entropy).item() == pytest.approx(1.16252144, abs=1e-8)
    assert total.item() == pytest.approx(2.30379108, abs=1e-8)
