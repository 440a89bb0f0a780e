"""Co-training: views that agree pay nothing, and what one tells another is a constant."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import jensenshannon
from torch import Tensor, nn

from fedkd.losses.co_training import (
    cross_pseudo_label_losses,
    fast_gradient_examples,
    jensen_shannon_divergence,
    pseudo_labels,
    view_difference_loss,
)


def draw(*shape: int, seed: int) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, generator=source, dtype=torch.float64)


VIEWS, CROSSED = draw(2, 5, 4, seed=1), draw(2, 5, 4, seed=2)


def gradient_of(loss: Tensor, leaf: Tensor) -> Tensor:
    (result,) = torch.autograd.grad(loss, leaf)
    return result


# --- agreement ------------------------------------------------------------------------------


def test_divergence_matches_an_independent_implementation():
    first, second = torch.softmax(VIEWS / 3.0, 2).numpy()
    expected = (jensenshannon(first, second, axis=1) ** 2).mean()
    assert jensen_shannon_divergence(VIEWS, temperature=3.0).item() == pytest.approx(expected)


def test_views_that_contradict_each_other_pay_the_logarithm_of_their_number():
    sure = 500 * torch.eye(3, dtype=torch.float64)[:, None, :]
    assert jensen_shannon_divergence(sure).item() == pytest.approx(math.log(3), rel=1e-12)
    assert jensen_shannon_divergence(sure[:2]).item() == pytest.approx(math.log(2), rel=1e-12)


def test_views_that_agree_pay_nothing_and_stay():
    leaf = VIEWS[:1].repeat(3, 1, 1).requires_grad_()
    loss = jensen_shannon_divergence(leaf)
    assert loss.item() == pytest.approx(0.0, abs=1e-14)
    assert gradient_of(loss, leaf).abs().max() < 1e-14
    assert jensen_shannon_divergence(VIEWS[:1]).item() == pytest.approx(0.0, abs=1e-14)


def test_divergence_is_symmetric_and_moves_both_views():
    torch.testing.assert_close(
        jensen_shannon_divergence(VIEWS), jensen_shannon_divergence(VIEWS.flip(0))
    )
    leaf = VIEWS.clone().requires_grad_()
    moved = gradient_of(jensen_shannon_divergence(leaf), leaf)
    assert (moved.flatten(1).norm(dim=1) > 1e-3).all()


def test_divergence_is_unmoved_by_row_shifts_and_joint_orders():
    expected = jensen_shannon_divergence(VIEWS)
    rows, classes = torch.tensor([3, 0, 4, 2, 1]), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(jensen_shannon_divergence(VIEWS + draw(2, 5, 1, seed=3)), expected)
    torch.testing.assert_close(jensen_shannon_divergence(VIEWS[:, rows][..., classes]), expected)


def test_sure_predictions_keep_a_finite_gradient():
    leaf = torch.tensor([[[1000.0, -1000.0, 0.0]], [[-1000.0, 1000.0, 0.0]]], requires_grad=True)
    loss = jensen_shannon_divergence(leaf)
    assert loss.item() == pytest.approx(math.log(2))
    assert torch.isfinite(gradient_of(loss, leaf)).all()


def test_gradients_agree_with_finite_differences():
    views, crossed = VIEWS.clone().requires_grad_(), CROSSED.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: jensen_shannon_divergence(v, temperature=2.0), (views,)
    )
    assert torch.autograd.gradcheck(lambda c: view_difference_loss(VIEWS, c), (crossed,))


# --- difference -----------------------------------------------------------------------------


def test_difference_matches_both_cross_entropies():
    first, second = torch.softmax(VIEWS, 2)
    # What misled view 0 is shown to view 1, which has to give view 0's clean answer.
    expected = -(first * torch.log_softmax(CROSSED[1], 1)).sum(1).mean()
    expected = expected - (second * torch.log_softmax(CROSSED[0], 1)).sum(1).mean()
    torch.testing.assert_close(view_difference_loss(VIEWS, CROSSED), expected)


def test_clean_answers_are_constants_of_the_difference():
    clean, crossed = VIEWS.clone().requires_grad_(), CROSSED.clone().requires_grad_()
    view_difference_loss(clean, crossed).backward()
    assert clean.grad is None
    assert crossed.grad is not None
    assert (crossed.grad.flatten(1).norm(dim=1) > 1e-3).all()


def test_adversarial_examples_step_up_the_slope_and_leave_the_model_alone():
    torch_model = nn.Linear(3, 4, dtype=torch.float64)
    with torch.no_grad():
        torch_model.weight.copy_(draw(4, 3, seed=1))
        torch_model.bias.copy_(draw(4, seed=2))
    inputs = draw(6, 3, seed=3)
    examples = fast_gradient_examples(torch_model, inputs, epsilon=0.02)
    torch.testing.assert_close((examples - inputs).abs(), torch.full_like(inputs, 0.02))
    own = torch_model(inputs).argmax(1)
    assert F.cross_entropy(torch_model(examples), own) > F.cross_entropy(torch_model(inputs), own)
    # Of a linear model the gradient is known: W^T (p - one_hot).
    slope = (torch.softmax(torch_model(inputs), 1) - F.one_hot(own, 4)) @ torch_model.weight
    torch.testing.assert_close(examples, inputs + 0.02 * slope.sign())
    assert torch_model.weight.grad is None
    assert not examples.requires_grad


def test_a_step_of_zero_changes_no_input_and_a_negative_one_is_refused():
    inputs = draw(2, 3, seed=1)
    model = nn.Linear(3, 4, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(fast_gradient_examples(model, inputs, epsilon=0.0), inputs)
    with pytest.raises(ValueError, match=r"^epsilon must be >= 0, got -0.1"):
        fast_gradient_examples(model, inputs, epsilon=-0.1)


# --- pseudo labels ----------------------------------------------------------------------------


def test_pseudo_labels_keep_the_sure_rows():
    # Confidences 0.9, 0.6 and 0.5.
    logits = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.5, 0.5]], dtype=torch.float64).log()
    found = pseudo_labels(logits, threshold=0.55)
    assert found.labels.tolist()[:2] == [0, 1]
    assert found.mask.tolist() == [1, 1, 0]
    assert found.kept_fraction.item() == pytest.approx(2 / 3)


def test_the_kept_fraction_falls_with_the_threshold():
    fractions = [
        pseudo_labels(VIEWS[0], threshold=threshold).kept_fraction.item()
        for threshold in (0.0, 0.5, 0.7, 0.9, 1.01)
    ]
    assert fractions == sorted(fractions, reverse=True)
    assert fractions[0] == 1.0
    assert fractions[-1] == 0.0


def test_each_view_learns_the_labels_the_other_is_sure_about():
    views = 1.5 * draw(2, 5, 4, seed=1)
    found = cross_pseudo_label_losses(views, threshold=0.7)

    for own, other in ((0, 1), (1, 0)):
        confidence, labels = torch.softmax(views[other], 1).max(1)
        kept = confidence >= 0.7
        assert 0 < kept.sum() < 5
        torch.testing.assert_close(
            found.losses[own], F.cross_entropy(views[own][kept], labels[kept])
        )
        assert found.kept_fractions[own].item() == pytest.approx(kept.double().mean().item())


def test_with_three_views_the_mean_of_the_others_teaches():
    views = draw(3, 5, 4, seed=7)
    labels = (torch.softmax(views[0], 1) + torch.softmax(views[2], 1)).argmax(1)
    found = cross_pseudo_label_losses(views, threshold=0.0)
    torch.testing.assert_close(found.losses[1], F.cross_entropy(views[1], labels))


def test_no_gradient_crosses_from_one_view_s_loss_to_another_view():
    leaf = VIEWS.clone().requires_grad_()
    found = cross_pseudo_label_losses(leaf, threshold=0.5)
    own = gradient_of(found.losses[0], leaf)
    assert own[0].norm() > 1e-3
    assert torch.equal(own[1], torch.zeros_like(own[1]))


def test_views_unsure_of_everything_teach_nothing():
    leaf = VIEWS.clone().requires_grad_()
    found = cross_pseudo_label_losses(leaf, threshold=1.01)
    assert found.losses.tolist() == [0.0, 0.0]
    assert torch.equal(gradient_of(found.losses.sum(), leaf), torch.zeros_like(VIEWS))


# --- numbers at the edge ----------------------------------------------------------------------


def test_a_mask_divides_by_the_rows_it_keeps():
    mask = torch.tensor([1.0, 0, 0, 1, 0], dtype=torch.float64)
    kept = mask.bool()
    torch.testing.assert_close(
        jensen_shannon_divergence(VIEWS, sample_weights=mask),
        jensen_shannon_divergence(VIEWS[:, kept]),
    )
    torch.testing.assert_close(
        view_difference_loss(VIEWS, CROSSED, sample_weights=mask),
        view_difference_loss(VIEWS[:, kept], CROSSED[:, kept]),
    )


def test_a_stack_gives_what_each_gives():
    stack = draw(3, 2, 5, 4, seed=4)
    for loss in (
        jensen_shannon_divergence,
        lambda views: view_difference_loss(VIEWS, views),
        lambda views: cross_pseudo_label_losses(views, threshold=0.6).losses,
    ):
        torch.testing.assert_close(
            torch.func.vmap(loss)(stack), torch.stack([loss(views) for views in stack])
        )


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_gives_float32_losses(half: torch.dtype):
    views, crossed = VIEWS.to(half), CROSSED.to(half)
    for loss in (
        jensen_shannon_divergence,
        lambda v: view_difference_loss(v, crossed.to(v.dtype)),
        lambda v: cross_pseudo_label_losses(v, threshold=0.6).losses.sum(),
    ):
        result = loss(views)
        assert result.dtype == torch.float32
        assert result.item() == pytest.approx(loss(views.double()).item(), rel=1e-4)


def test_an_empty_batch_costs_nothing():
    empty = torch.zeros(2, 0, 4)
    assert jensen_shannon_divergence(empty).item() == 0.0
    assert view_difference_loss(empty, empty).item() == 0.0
    found = cross_pseudo_label_losses(empty, threshold=0.5)
    assert found.losses.tolist() == [0.0, 0.0]
    assert found.kept_fractions.tolist() == [0.0, 0.0]


def test_refuses_too_few_views_and_settings_out_of_range():
    with pytest.raises(ValueError, match=r"^co-training needs at least 1 view, got 0"):
        jensen_shannon_divergence(VIEWS[:0])
    with pytest.raises(ValueError, match=r"^temperature must be > 0, got 0.0"):
        jensen_shannon_divergence(VIEWS, temperature=0.0)
    with pytest.raises(ValueError, match=r"^view difference needs at least 2 views, got 1"):
        view_difference_loss(VIEWS[:1], CROSSED[:1])
    with pytest.raises(ValueError, match=r"^co-training needs at least 2 views, got 1"):
        cross_pseudo_label_losses(VIEWS[:1])
    with pytest.raises(ValueError, match=r"^confidence threshold must be >= 0, got -1"):
        pseudo_labels(VIEWS[0], threshold=-1.0)
