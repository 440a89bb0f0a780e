"""Averages of peers: reference values, and one rule for a step and for a stream."""

import pytest
import torch

from fedkd.mutual.averages import (
    ensemble_target,
    entering,
    leave_one_out_losses,
    leave_one_out_targets,
)
from fedkd.mutual.pairwise import mutual_losses, pairwise_kl

# The reference values' inputs: peers s, t and u, two rows, four classes.
PEERS = torch.tensor(
    [
        [[1, 2, 3, 0], [0.5, -1, 0, 2]],
        [[2, 1, 4, -1], [0, 0, 1, 3]],
        [[-4, 3, 1, 1], [2, 0, -1, 1]],
    ],
    dtype=torch.float64,
)
AVERAGES = pytest.mark.parametrize("average", ["probability", "logit"])


def test_a_peer_learns_the_mean_of_the_others():
    (target, *_) = leave_one_out_targets(PEERS, temperature=1.0)
    expected = [
        [0.05713337, 0.41409712, 0.47272755, 0.05604195],
        [0.34211532, 0.06373035, 0.07082493, 0.52332940],
    ]
    torch.testing.assert_close(
        target, torch.tensor(expected, dtype=torch.float64), atol=1e-8, rtol=0
    )


def test_the_loss_to_the_others_mean_matches_the_reference_value():
    # The reference has the sum with the cross-entropy.
    own = leave_one_out_losses(PEERS)[0].item()
    assert 1.14126964 + own == pytest.approx(1.24723729, abs=1e-8)


def test_one_kl_to_the_others_mean_pulls_like_the_mean_of_the_pairs():
    leaf = PEERS.clone().requires_grad_()
    (pairs,) = torch.autograd.grad(mutual_losses(leaf, temperature=2.0).sum(), leaf)
    (mean,) = torch.autograd.grad(leave_one_out_losses(leaf, temperature=2.0).sum(), leaf)
    torch.testing.assert_close(mean, pairs)


def test_each_peer_pays_for_itself_only():
    leaf = PEERS.clone().requires_grad_()
    (slope,) = torch.autograd.grad(leave_one_out_losses(leaf)[0], leaf)
    assert slope[0].any()
    assert not slope[1:].any()


def test_peers_in_a_ring_match_the_reference_values():
    # Each learns from the one before it: entry [other, own] of the pairs.
    pairs = pairwise_kl(PEERS)
    ring = [pairs[2, 0].item(), pairs[0, 1].item(), pairs[1, 2].item()]
    assert ring == pytest.approx([0.78128359, 0.18976181, 1.57778006], abs=1e-8)


@AVERAGES
def test_arrays_are_as_good_as_tensors(average):
    arrays = PEERS.float().numpy()
    arrays.flags.writeable = False  # as what a client sent
    options = {"temperature": 2.0, "average": average}
    for rule in (ensemble_target, leave_one_out_targets):
        assert torch.equal(rule(arrays, **options), rule(PEERS.float(), **options))
    for array, tensor in zip(arrays, PEERS.float(), strict=True):
        assert torch.equal(entering(array, **options), entering(tensor, **options))


@AVERAGES
def test_targets_are_constants(average):
    leaf = PEERS.clone().requires_grad_()
    options = {"temperature": 2.0, "average": average}
    assert not ensemble_target(leaf, **options).requires_grad
    assert not leave_one_out_targets(leaf, **options).requires_grad
    assert not entering(leaf[0], **options).requires_grad


def test_averages_of_probabilities_and_of_logits_are_different_targets():
    probabilities = ensemble_target(PEERS, temperature=1.0)
    logits = ensemble_target(PEERS, temperature=1.0, average="logit")
    torch.testing.assert_close(logits, PEERS.mean(dim=0))
    assert (probabilities - logits.softmax(-1)).abs().max() > 0.05


def test_refuses_a_peer_without_others():
    with pytest.raises(ValueError, match="at least 2 clients, got 1"):
        leave_one_out_targets(PEERS[:1], temperature=1.0)
