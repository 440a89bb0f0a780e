"""Deep mutual learning: published values, one backward pass for all, and gradients not sent."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from fedkd.losses.response import soft_target_kl, soft_target_loss
from fedkd.mutual.pairwise import deep_mutual_losses, mutual_losses, pairwise_kl
from fedkd.targets import leave_one_out, mean_logit, mean_probability, soften

PEERS = torch.tensor(
    [
        [[1, 2, 3, 0], [0.5, -1, 0, 2]],
        [[2, 1, 4, -1], [0, 0, 1, 3]],
        [[-4, 3, 1, 1], [2, 0, -1, 1]],
    ],
    dtype=torch.float64,
)
LABELS = torch.tensor([2, 0])
quick = settings(max_examples=30, deadline=None, derandomize=True, database=None)
peer_tables = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(2, 5)),
    elements=st.floats(-20, 20),
).map(torch.from_numpy)


def mutual_losses_one_pair_at_a_time(
    logits: Tensor, temperature: float, peer_reduction: str
) -> Tensor:
    """The definition, read aloud: for each peer, each other peer is its teacher once."""
    losses = []
    for k, own in enumerate(logits):
        others = [other for index, other in enumerate(logits) if index != k]
        pulls = [soft_target_loss(own, other, temperature=temperature) for other in others]
        total = sum(pulls, start=0 * own.sum())  # a peer alone: 0, with a gradient of 0
        losses.append(total / max(len(pulls), 1) if peer_reduction == "mean" else total)
    return torch.stack(losses)


def peer_gradients(losses: Tensor, logits: Tensor) -> list[Tensor]:
    return [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in losses]


@quick
@given(
    logits=peer_tables,
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    peer_reduction=st.sampled_from(["mean", "sum"]),
)
def test_equals_one_pair_at_a_time(logits: Tensor, temperature: float, peer_reduction: str):
    leaf, twin = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    losses = mutual_losses(leaf, temperature=temperature, peer_reduction=peer_reduction)
    expected = mutual_losses_one_pair_at_a_time(twin, temperature, peer_reduction)
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-12)
    losses.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(leaf.grad, twin.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("reduction", "value"), [("mean", 1.59208643), ("sum", 2.04290322)])
def test_matches_the_reference_values(reduction: str, value: float):
    losses = deep_mutual_losses(PEERS, LABELS, peer_reduction=reduction)
    assert losses[0].item() == pytest.approx(value, abs=1e-8)


def test_pairwise_rows_are_targets_and_columns_are_students():
    divergence = pairwise_kl(PEERS)
    assert divergence[1, 0].item() == pytest.approx(0.12034999, abs=1e-8)
    assert divergence[0, 1].item() == pytest.approx(0.18976181, abs=1e-8)
    assert divergence.diagonal().abs().max() < 1e-15


def test_average_targets_match_the_reference_values():
    ce = F.cross_entropy(PEERS[0], LABELS)
    by_probability = soft_target_kl(PEERS[0], mean_probability(PEERS[1:]), temperature=1.0)
    by_logit = soft_target_loss(PEERS[0], mean_logit(PEERS[1:]), temperature=1.0)
    assert (ce + by_probability).item() == pytest.approx(1.24723729, abs=1e-8)
    assert (ce + by_logit).item() == pytest.approx(1.19922457, abs=1e-8)


def test_pulls_like_one_divergence_from_the_others_average_probability():
    leaf = PEERS.clone().requires_grad_()
    mutual_losses(leaf, temperature=2.0).sum().backward()
    others = leave_one_out(soften(PEERS, temperature=2.0))
    twin = PEERS.clone().requires_grad_()
    for own, target in zip(twin, others, strict=True):
        soft_target_kl(own, target, temperature=2.0).backward()
    torch.testing.assert_close(leaf.grad, twin.grad, rtol=0, atol=1e-15)


def test_averaging_logits_instead_pulls_elsewhere():
    leaf = PEERS.clone().requires_grad_()
    mutual_losses(leaf)[0].backward()
    twin = PEERS[0].clone().requires_grad_()
    soft_target_loss(twin, mean_logit(PEERS[1:]), temperature=1.0).backward()
    assert (leaf.grad[0] - twin.grad).norm() > 0.3 * leaf.grad[0].norm()


def test_gradient_never_reaches_another_peer():
    leaf = PEERS.clone().requires_grad_()
    for k, grad in enumerate(peer_gradients(deep_mutual_losses(leaf, LABELS), leaf)):
        others = [index for index in range(3) if index != k]
        assert torch.equal(grad[others], torch.zeros_like(grad[others]))
        assert grad[k].norm() > 0.1


def test_one_backward_pass_equals_a_pass_per_peer():
    leaf = PEERS.clone().requires_grad_()
    losses = deep_mutual_losses(leaf, LABELS, temperature=3.0)
    separate = sum(peer_gradients(losses, leaf))
    (together,) = torch.autograd.grad(losses.sum(), leaf)
    torch.testing.assert_close(together, separate, rtol=0, atol=1e-15)


def test_gradient_never_reaches_another_peer_under_torch_func():
    jacobian = torch.func.jacrev(lambda x: deep_mutual_losses(x, LABELS))(PEERS)
    for loss_of in range(3):
        for peer in range(3):
            assert (jacobian[loss_of, peer].norm() > 0.1) == (loss_of == peer)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_gradient_is_the_scaled_distance_to_the_others_mean(temperature: float):
    leaf = PEERS.clone().requires_grad_()
    mutual_losses(leaf, temperature=temperature).sum().backward()
    p = torch.softmax(PEERS / temperature, dim=-1)
    others = torch.stack([(p[1] + p[2]) / 2, (p[0] + p[2]) / 2, (p[0] + p[1]) / 2])
    torch.testing.assert_close(leaf.grad, temperature / 2 * (p - others), rtol=0, atol=1e-14)


def test_gradient_agrees_with_finite_differences():
    # The targets are constants, so each peer is varied while the others are held.
    for k in range(3):

        def own_loss(own: Tensor, k: int = k) -> Tensor:
            stacked = [own if index == k else peer for index, peer in enumerate(PEERS)]
            return deep_mutual_losses(torch.stack(stacked), LABELS, temperature=2.0)[k]

        assert torch.autograd.gradcheck(own_loss, (PEERS[k].clone().requires_grad_(),))


@pytest.mark.parametrize("num_peers", [2, 3, 5])
def test_sum_is_the_mean_times_the_number_of_others(num_peers: int):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_peers, 4, 6, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        mutual_losses(logits, peer_reduction="sum"), (num_peers - 1) * mutual_losses(logits)
    )


@pytest.mark.parametrize("copies", [1, 4])
def test_identical_others_pull_like_one(copies: int):
    logits = torch.cat([PEERS[:1], PEERS[1:2].expand(copies, -1, -1)])
    assert mutual_losses(logits)[0].item() == pytest.approx(0.12034999, abs=1e-8)


def test_identical_peers_do_not_move():
    leaf = PEERS[:1].repeat(3, 1, 1).requires_grad_()
    losses = mutual_losses(leaf, temperature=2.0)
    losses.sum().backward()
    assert losses.abs().max() < 1e-14
    assert leaf.grad.abs().max() < 1e-15


def test_a_peer_alone_learns_from_labels_only():
    alone = PEERS[:1].clone().requires_grad_()
    mutual = mutual_losses(alone)
    assert torch.equal(mutual, torch.zeros(1, dtype=torch.float64))
    assert torch.equal(torch.autograd.grad(mutual.sum(), alone)[0], torch.zeros_like(alone))
    assert deep_mutual_losses(alone, LABELS)[0].item() == pytest.approx(1.14126964, abs=1e-8)


def test_cross_entropy_never_sees_the_temperature():
    at_1 = deep_mutual_losses(PEERS, LABELS, kd_weight=0.0, temperature=1.0)
    at_8 = deep_mutual_losses(PEERS, LABELS, kd_weight=0.0, temperature=8.0)
    expected = torch.tensor([1.14126964, 1.69325649, 1.34022592], dtype=torch.float64)
    assert torch.equal(at_1, at_8)
    torch.testing.assert_close(at_1, expected, rtol=0, atol=1e-8)


def test_without_distillation_it_is_plain_training_bit_for_bit():
    leaf, plain = PEERS.clone().requires_grad_(), PEERS.clone().requires_grad_()
    deep_mutual_losses(leaf, LABELS, kd_weight=0.0, temperature=2.0).sum().backward()
    for own in plain:
        F.cross_entropy(own, LABELS).backward()
    assert torch.equal(leaf.grad, plain.grad)


def test_without_cross_entropy_labels_do_not_matter():
    losses = deep_mutual_losses(PEERS, LABELS, ce_weight=0.0, temperature=2.0)
    assert torch.equal(
        losses, deep_mutual_losses(PEERS, LABELS.flip(0), ce_weight=0.0, temperature=2.0)
    )
    assert torch.equal(losses, mutual_losses(PEERS, temperature=2.0))


def test_weights_multiply_their_own_term():
    ce = deep_mutual_losses(PEERS, LABELS, kd_weight=0.0)
    expected = 0.1 * ce + 0.9 * mutual_losses(PEERS, temperature=4.0)
    weighted = deep_mutual_losses(PEERS, LABELS, ce_weight=0.1, kd_weight=0.9, temperature=4.0)
    torch.testing.assert_close(weighted, expected, rtol=1e-12, atol=0)


def test_scale_by_t2_off_leaves_exactly_the_square_out():
    bare = mutual_losses(PEERS, temperature=4.0, scale_by_t2=False)
    torch.testing.assert_close(mutual_losses(PEERS, temperature=4.0), 16 * bare)
    unscaled = deep_mutual_losses(PEERS, LABELS, ce_weight=0.0, temperature=4.0, scale_by_t2=False)
    assert torch.equal(unscaled, bare)


@quick
@given(logits=peer_tables, data=st.data())
def test_order_of_peers_rows_and_classes_does_not_matter(logits: Tensor, data: st.DataObject):
    peers, rows, classes = (data.draw(st.permutations(range(size))) for size in logits.shape)
    shuffled = mutual_losses(logits[peers][:, rows][:, :, classes])
    torch.testing.assert_close(shuffled, mutual_losses(logits)[peers], rtol=1e-9, atol=1e-11)
    assert shuffled.min() >= -1e-11


def test_a_constant_added_to_a_row_changes_nothing():
    shift = torch.tensor([[3.0, -7.0], [0.0, 40.0], [-9.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(mutual_losses(PEERS + shift[:, :, None]), mutual_losses(PEERS))


def test_vmap_equals_a_loop():
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(3, 2, 5, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (3, 5), generator=generator)

    def total(x: Tensor, y: Tensor) -> Tensor:
        return deep_mutual_losses(x, y, temperature=2.0).sum()

    values = torch.func.vmap(deep_mutual_losses)(groups, labels)
    grads = torch.func.vmap(torch.func.grad(total))(groups, labels)
    for k in range(3):
        torch.testing.assert_close(values[k], deep_mutual_losses(groups[k], labels[k]))
        leaf = groups[k].clone().requires_grad_()
        torch.testing.assert_close(grads[k], torch.autograd.grad(total(leaf, labels[k]), leaf)[0])


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_gives_a_float32_loss(half: torch.dtype):
    losses = deep_mutual_losses(PEERS.to(half), LABELS)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(
        losses.double(), deep_mutual_losses(PEERS, LABELS), rtol=1e-5, atol=0
    )


def test_autocast_does_not_coarsen_the_loss():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = mutual_losses(PEERS.float())
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), mutual_losses(PEERS), rtol=1e-5, atol=0)


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[[1000.0, -1000.0]], [[-1000.0, 1000.0]]])
    torch.testing.assert_close(mutual_losses(logits), torch.tensor([2000.0, 2000.0]))


def test_an_empty_batch_costs_nothing():
    losses = deep_mutual_losses(torch.zeros(2, 0, 4), torch.zeros(0, dtype=torch.int64))
    assert torch.equal(losses, torch.zeros(2))


@pytest.mark.parametrize("temperature", [0.0, -2.0, math.nan, math.inf])
def test_refuses_a_temperature_that_softens_nothing(temperature: float):
    with pytest.raises(ValueError, match=r"^temperature must be (> 0|finite), got "):
        mutual_losses(PEERS, temperature=temperature)


@pytest.mark.parametrize("name", ["ce_weight", "kd_weight"])
@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_refuses_a_weight_that_is_negative_or_not_finite(name: str, weight: float):
    with pytest.raises(ValueError, match=rf"^{name} must be >= 0 and finite, got "):
        deep_mutual_losses(PEERS, LABELS, **{name: weight})


def test_rows_of_weight_zero_are_as_good_as_absent():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    labels = torch.tensor([2, 0, 1, 3, 3])
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    kept = mask.bool()
    masked = deep_mutual_losses(logits, labels, temperature=2.0, sample_weights=mask)
    torch.testing.assert_close(
        masked, deep_mutual_losses(logits[:, kept], labels[kept], temperature=2.0)
    )
    torch.testing.assert_close(
        deep_mutual_losses(logits, labels, sample_weights=torch.full_like(mask, 3.0)),
        deep_mutual_losses(logits, labels),
    )
    leaf = logits.clone().requires_grad_()
    none = deep_mutual_losses(leaf, labels, sample_weights=torch.zeros_like(mask))
    assert torch.equal(none, torch.zeros(3, dtype=torch.float64))
    assert not torch.autograd.grad(none.sum(), leaf)[0].any()
