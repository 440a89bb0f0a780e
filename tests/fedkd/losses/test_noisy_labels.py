"""Symmetric cross-entropy: its value by hand; a sure model is not drawn to a wrong label."""

import pytest
import torch

from fedkd.losses.noisy_labels import symmetric_cross_entropy, symmetric_rows
from fedkd.losses.response import hard_label_loss

LOGITS = torch.tensor([[1, 2, 3, 0], [0.5, -1, 0, 2]], dtype=torch.float64)
LABELS = torch.tensor([2, 0])


def test_matches_the_published_value():
    # 0.1 CE + RCE, CE = 1.14126964, log of a label's zeros clamped at 1e-4.
    loss = symmetric_cross_entropy(LOGITS, LABELS)
    assert loss.item() == pytest.approx(5.62946773, abs=1e-8)


def test_each_half_by_hand():
    # A uniform model over four classes: CE = log 4, RCE = -log(1e-4) * 3/4.
    uniform, label = torch.zeros(1, 4, dtype=torch.float64), torch.tensor([1])
    forward = symmetric_cross_entropy(uniform, label, ce_weight=1.0, reverse_weight=0.0)
    reverse = symmetric_cross_entropy(uniform, label, ce_weight=0.0, reverse_weight=2.0)
    assert forward.item() == pytest.approx(1.3862943611, abs=1e-9)
    assert reverse.item() == pytest.approx(2 * 0.75 * 9.210340371976182, abs=1e-9)


def test_without_the_reverse_half_it_is_cross_entropy():
    loss = symmetric_cross_entropy(LOGITS, LABELS, ce_weight=1.0, reverse_weight=0.0)
    assert loss.item() == pytest.approx(hard_label_loss(LOGITS, LABELS).item(), abs=1e-12)


def test_a_sure_model_is_not_drawn_to_a_wrong_label():
    logits = torch.tensor([[20.0, 0.0]], requires_grad=True)
    symmetric_cross_entropy(logits, torch.tensor([1]), ce_weight=0.0).backward()
    assert logits.grad is not None
    assert logits.grad.abs().max().item() < 1e-6


def test_weights_of_rows_leave_rows_out_and_no_rows_cost_nothing():
    kept = symmetric_cross_entropy(LOGITS, LABELS, sample_weights=torch.tensor([0.0, 1.0]))
    assert kept.item() == pytest.approx(symmetric_rows(LOGITS, LABELS)[1].item(), abs=1e-12)
    assert symmetric_cross_entropy(LOGITS[:0], LABELS[:0]).item() == 0


@pytest.mark.parametrize("name", ["ce_weight", "reverse_weight"])
def test_negative_weights_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be >= 0 and finite, got -1"):
        symmetric_cross_entropy(LOGITS, LABELS, **{name: -1.0})
