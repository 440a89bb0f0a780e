"""Which rows count: weights with a fixed sum, and masks that keep what they say."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedkd.losses.response import hard_label_loss
from fedkd.targets import (
    certainty_weights,
    confidence_mask,
    confidence_weights,
    curriculum_mask,
    difficulty,
    difficulty_weights,
    hardest_mask,
    kept_fraction,
)

TARGET = torch.tensor(
    [[0.7, 0.2, 0.1], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.4, 0.3, 0.3]], dtype=torch.float64
)
ROW_LOSSES = torch.tensor([0.5, 2.0, 0.0, 1.0, 0.5], dtype=torch.float64)


def test_kept_fraction_counts_the_rows_of_a_mask():
    assert kept_fraction(confidence_mask(TARGET, 0.6)).item() == 0.5
    assert kept_fraction(confidence_mask(TARGET, 0.0)).item() == 1.0
    assert kept_fraction(confidence_mask(TARGET, 1.01)).item() == 0.0
    assert kept_fraction(torch.zeros(0)).item() == 0.0


def test_confidence_weights_are_in_the_ratio_of_the_largest_probabilities():
    weights = confidence_weights(TARGET)
    expected = torch.tensor([0.7, 1.0, 0.5, 0.4], dtype=torch.float64) * (4 / 2.6)
    torch.testing.assert_close(weights, expected)


def test_certainty_weights_are_in_the_ratio_of_the_missing_entropy():
    rows = torch.tensor([[0.5, 0.5, 0, 0], [1, 0, 0, 0], [0.25] * 4], dtype=torch.float64)
    # log 4 - log 2, log 4 - 0 and log 4 - log 4: 1 to 2 to 0, and their sum is 3.
    torch.testing.assert_close(certainty_weights(rows), torch.tensor([1.0, 2.0, 0.0]).double())


def test_targets_that_are_all_uniform_count_alike():
    for num_classes in (2, 3, 7, 10):
        uniform = torch.full((5, num_classes), 1 / num_classes)
        torch.testing.assert_close(confidence_weights(uniform), torch.ones(5))
        weights = certainty_weights(uniform)
        assert weights.sum().item() == pytest.approx(5.0)
        torch.testing.assert_close(weights, weights[:1].expand(5))
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        certainty_weights(torch.ones(3, 1))


def test_difficulty_is_the_cross_entropy_of_each_row():
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]], requires_grad=True)
    rows = difficulty(logits, torch.tensor([0, 1]))
    torch.testing.assert_close(rows, torch.tensor([math.log(4 / 3), math.log(2)]))
    assert not rows.requires_grad
    assert difficulty(logits.half(), torch.tensor([0, 1])).dtype == torch.float32


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 3.0, 200.0])
def test_difficulty_weights_sum_to_the_number_of_rows(power: float):
    weights = difficulty_weights(1e4 * ROW_LOSSES, power=power)
    assert weights.sum().item() == pytest.approx(5.0)
    assert (weights >= 0).all()
    order = ROW_LOSSES.argsort()
    assert (weights[order].diff() >= 0).all()


def test_difficulty_weights_by_hand():
    expected = torch.tensor([0.25, 4.0, 0.0, 1.0, 0.25], dtype=torch.float64) * (5 / 5.5)
    torch.testing.assert_close(difficulty_weights(ROW_LOSSES, power=2.0), expected)


@pytest.mark.parametrize("losses", [torch.full((4,), 0.3), torch.zeros(4)])
def test_rows_of_one_difficulty_leave_the_loss_unweighted(losses: Tensor):
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2, 1, 1])
    weights = difficulty_weights(losses)
    torch.testing.assert_close(weights, torch.ones(4))
    torch.testing.assert_close(
        hard_label_loss(logits, labels, sample_weights=weights), F.cross_entropy(logits, labels)
    )


@pytest.mark.parametrize("power", [-1.0, math.nan, math.inf])
def test_refuses_a_power_that_is_negative_or_not_finite(power: float):
    with pytest.raises(ValueError, match=r"power must be >= 0 and finite, got "):
        difficulty_weights(ROW_LOSSES, power=power)


def test_the_hardest_share_is_kept_and_at_least_one_row():
    for share, kept in ((0.01, [1]), (0.2, [1]), (0.4, [1, 3]), (0.5, [0, 1, 3]), (1.0, range(5))):
        mask = hardest_mask(ROW_LOSSES, share=share)
        assert mask.nonzero().flatten().tolist() == list(kept)
    # 7 % of 100 rows are 7, although the product of the floats is a little more.
    assert hardest_mask(torch.arange(100.0), share=0.07).sum() == 7


def test_among_equals_the_earlier_row_is_kept():
    assert hardest_mask(torch.ones(4), share=0.5).tolist() == [1, 1, 0, 0]
    assert curriculum_mask(torch.ones(4), progress=0.0, start_share=0.5).tolist() == [1, 1, 0, 0]


def test_a_curriculum_begins_with_the_easiest_rows_and_ends_with_all():
    kept = [
        curriculum_mask(ROW_LOSSES, progress=progress, start_share=0.2).nonzero().flatten().tolist()
        for progress in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert kept == [[2], [0, 2], [0, 2, 4], [0, 2, 3, 4], [0, 1, 2, 3, 4]]


def test_hardest_and_easiest_rows_complement_each_other():
    losses = torch.rand(10, generator=torch.Generator().manual_seed(0))
    hardest = hardest_mask(losses, share=0.3)
    easiest = curriculum_mask(losses, progress=0.0, start_share=0.7)
    assert torch.equal(hardest + easiest, torch.ones(10))


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, math.nan])
def test_refuses_a_share_outside_its_range(share: float):
    with pytest.raises(ValueError, match=r"^share must be in \(0, 1\], got "):
        hardest_mask(ROW_LOSSES, share=share)
    with pytest.raises(ValueError, match=r"^start_share must be in \(0, 1\], got "):
        curriculum_mask(ROW_LOSSES, progress=1.0, start_share=share)
    with pytest.raises(ValueError, match=r"^progress must be in \[0, 1\], got 2"):
        curriculum_mask(ROW_LOSSES, progress=2.0)


def test_order_of_the_rows_does_not_matter():
    rows = torch.tensor([3, 0, 2, 1])
    for rule in (confidence_weights, certainty_weights):
        torch.testing.assert_close(rule(TARGET[rows]), rule(TARGET)[rows])
    losses = ROW_LOSSES[:4]
    for mask in (difficulty_weights, lambda x: hardest_mask(x, share=0.5)):
        torch.testing.assert_close(mask(losses[rows]), mask(losses)[rows])


def test_all_of_them_work_under_vmap():
    targets, losses = torch.stack([TARGET, TARGET.flip(0)]), torch.stack([ROW_LOSSES, -ROW_LOSSES])
    losses = losses.abs() + torch.tensor([[0.0], [3.0]])
    for rule, values in (
        (confidence_weights, targets),
        (certainty_weights, targets),
        (lambda x: kept_fraction(confidence_mask(x, 0.6)), targets),
        (difficulty_weights, losses),
        (lambda x: hardest_mask(x, share=0.4), losses),
        (lambda x: curriculum_mask(x, progress=0.5), losses),
    ):
        expected = torch.stack([rule(each) for each in values])
        torch.testing.assert_close(torch.func.vmap(rule)(values), expected)


@pytest.mark.parametrize("weigh", [confidence_weights, certainty_weights, difficulty_weights])
def test_one_number_that_is_none_makes_all_weights_none(weigh):
    target = TARGET.clone()
    target[1, 1] = math.nan
    weights = weigh(target[:, 1]) if weigh is difficulty_weights else weigh(target)
    assert weights.isnan().all()


def test_a_row_that_is_no_number_is_kept_for_the_loss_to_show():
    target = TARGET.clone()
    target[2] = math.nan
    assert confidence_mask(target, 0.6).tolist() == [1, 1, 1, 0]
