"""ONE: the gate mixes, the ensemble learns from labels, branches from the ensemble."""

import pytest
import torch
from torch import Tensor

from fedkd.mutual.native_ensemble import BranchGate, StreamingGate, gated_logits, one_losses
from fedkd.schedules import RampUpSchedule

# Two students of four classes on two rows, and a third: the reference values' inputs.
PEERS = torch.tensor(
    [
        [[1, 2, 3, 0], [0.5, -1, 0, 2]],
        [[2, 1, 4, -1], [0, 0, 1, 3]],
        [[-4, 3, 1, 1], [2, 0, -1, 1]],
    ],
    dtype=torch.float64,
)
LABELS = torch.tensor([2, 0])
# Distinct sizes for every axis: 3 peers, 5 rows, 4 classes.
_generator = torch.Generator().manual_seed(7)
GROUP = 3 * torch.randn(3, 5, 4, generator=_generator, dtype=torch.float64)
GROUP_LABELS = torch.tensor([2, 0, 1, 3, 3])
GATES = torch.softmax(torch.randn(5, 3, generator=_generator, dtype=torch.float64), dim=1)


def test_one_matches_the_reference_value():
    # A gate that trusts the second branch alone makes it the ensemble.
    gates = torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    terms = one_losses(PEERS[:2], gates, LABELS)
    assert terms["kd"].item() == pytest.approx(0.30066511, abs=1e-8)
    assert terms["ce"].item() == pytest.approx(1.14126964 + 1.69325649, abs=1e-8)
    assert terms["ce_ensemble"].item() == pytest.approx(1.69325649, abs=1e-8)


def test_a_gate_mixes_logits_row_by_row():
    gates = torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[0.0, 2.0, 2.75, 0.0], [0.0, 0.0, 1.0, 3.0]], dtype=torch.float64)
    torch.testing.assert_close(gated_logits(PEERS, gates), expected)


def test_identical_branches_learn_from_labels_only():
    leaf = GROUP[:1].repeat(3, 1, 1).requires_grad_()
    kd = one_losses(leaf, GATES, GROUP_LABELS)["kd"]
    assert kd.abs() < 1e-13
    assert torch.autograd.grad(kd, leaf)[0].abs().max() < 1e-14


def test_the_ensemble_learns_from_labels_and_is_a_constant_where_it_teaches():
    leaf, gates = GROUP.clone().requires_grad_(), GATES.clone().requires_grad_()
    terms = one_losses(leaf, gates, GROUP_LABELS, temperature=2.0)
    assert torch.autograd.grad(terms["kd"], gates, retain_graph=True, allow_unused=True) == (None,)
    assert torch.autograd.grad(terms["ce_ensemble"], gates, retain_graph=True)[0].any()
    target = torch.softmax(gated_logits(GROUP, GATES) / 2, dim=1)
    own = torch.softmax(GROUP / 2, dim=2)
    torch.testing.assert_close(torch.autograd.grad(terms["kd"], leaf)[0], 2 / 5 * (own - target))


def test_gradients_of_labels_and_gate_agree_with_finite_differences():
    def labelled(logits: Tensor, gates: Tensor) -> Tensor:
        terms = one_losses(logits, gates, GROUP_LABELS)
        return terms["ce"] + terms["ce_ensemble"]

    leaves = (GROUP.clone().requires_grad_(), GATES.clone().requires_grad_())
    assert torch.autograd.gradcheck(labelled, leaves)


def test_a_gate_pools_maps_and_gives_shares():
    gate = BranchGate(6, 3)
    maps = torch.randn(5, 6, 2, 7, generator=torch.Generator().manual_seed(0))
    shares = gate(maps)
    assert shares.shape == (5, 3)
    torch.testing.assert_close(shares.sum(1), torch.ones(5))
    gate.eval()
    torch.testing.assert_close(gate(maps), gate(maps.mean(dim=(2, 3))))


def test_a_gate_refuses_to_train_on_one_row_and_predicts_for_it():
    gate = BranchGate(6, 3)
    with pytest.raises(ValueError, match=r"at least 2 rows for its BatchNorm, got 1; .* eval\(\)"):
        gate(torch.zeros(1, 6))
    assert gate.eval()(torch.zeros(1, 6)).shape == (1, 3)
    with pytest.raises(ValueError, match="branches must be >= 1, got 0"):
        BranchGate(6, 0)


def test_three_branches_match_the_reference_values():
    gates = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).expand(2, 3)
    assert one_losses(PEERS, torch.full((2, 3), 1 / 3).double(), LABELS)[
        "kd"
    ].item() == pytest.approx(1.55113136, abs=1e-7)
    terms = one_losses(PEERS, gates, LABELS)
    assert terms["kd"].item() == pytest.approx(1.61586671, abs=1e-8)
    assert terms["ce_ensemble"].item() == pytest.approx(1.10880922, abs=1e-8)


@pytest.mark.parametrize(
    ("epoch", "value"), [(0, 0.00673795), (20, 0.06005467), (40, 0.28650480), (79, 0.99921906)]
)
def test_the_weight_rises_as_published(epoch: int, value: float):
    ramp = RampUpSchedule(end=1.0, until=80 / 300)
    assert ramp.at(epoch / 300) == pytest.approx(value, abs=1e-8)


def test_branches_one_by_one_give_the_gated_ensemble():
    stream = StreamingGate()
    for branch, share in zip(GROUP.float(), GATES.float().t(), strict=True):
        stream.add(branch.numpy(), share.contiguous().numpy())
    torch.testing.assert_close(stream.target(), gated_logits(GROUP, GATES), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="at least 1 peer, got 0"):
        StreamingGate().target()


def test_of_the_shares_of_a_row_only_the_ratios_count():
    whole, scaled = StreamingGate(), StreamingGate()
    for logits, gate in zip(GROUP, GATES.t(), strict=True):
        whole.add(logits, gate)
        scaled.add(logits, 7 * gate)
    torch.testing.assert_close(scaled.target(), whole.target())
