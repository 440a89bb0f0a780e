"""Data-free losses: what makes an image look real to a teacher, and hooks that leave no trace."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkd.losses.data_free import (
    DataFreeLosses,
    InversionLosses,
    batch_norm_loss,
    batch_norm_losses,
    dafl_generator_losses,
    inversion_losses,
    total_variation,
)
from fedkd.randomness import seeded_torch


def draw(*shape: int, seed: int) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=source, dtype=torch.float64)


LOGITS, FEATURES, IMAGES = draw(5, 4, seed=1), draw(5, 6, seed=2), draw(2, 3, 4, 5, seed=3)


def teacher() -> nn.Sequential:
    with seeded_torch(0):
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(80, 6),
            nn.BatchNorm1d(6),
        ).double()
        model(torch.randn(16, 3, 4, 5, dtype=torch.float64))
    return model.eval().requires_grad_(False)


# --- generator --------------------------------------------------------------------------------


def test_generator_parts_match_their_formulas():
    found = dafl_generator_losses(LOGITS, FEATURES)
    p = torch.softmax(LOGITS, 1)
    torch.testing.assert_close(found.one_hot, -p.max(1).values.log().mean())
    torch.testing.assert_close(found.activation, -FEATURES.abs().sum() / 30)
    mean = p.mean(0)
    torch.testing.assert_close(found.information_entropy, (mean * mean.log()).sum())


def test_entropy_is_in_natural_logarithms_and_least_where_classes_are_balanced():
    balanced = 50 * torch.eye(4, dtype=torch.float64)
    one_class = balanced[:1].repeat(4, 1)
    nothing = torch.zeros(4, 2, dtype=torch.float64)
    found = dafl_generator_losses(balanced, nothing)
    assert found.information_entropy.item() == pytest.approx(-math.log(4), rel=1e-12)
    assert found.one_hot.item() == pytest.approx(0.0, abs=1e-12)
    same = dafl_generator_losses(one_class, nothing)
    assert same.information_entropy.item() == pytest.approx(0.0, abs=1e-12)


def test_generator_total_weighs_each_part():
    losses = DataFreeLosses(torch.tensor(1.0), torch.tensor(10.0), torch.tensor(100.0))
    assert losses.total().item() == pytest.approx(1 + 0.1 * 10 + 5 * 100)
    assert losses.total(
        one_hot_weight=2.0, activation_weight=0.0, information_entropy_weight=0.01
    ).item() == pytest.approx(3.0)


def test_generator_gradient_flows_through_the_teacher_s_outputs():
    leaves = (LOGITS.clone().requires_grad_(), FEATURES.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda z, f: dafl_generator_losses(z, f).total(), leaves)
    found = dafl_generator_losses(*leaves)
    for part, leaf in zip(found, (leaves[0], leaves[1], leaves[0]), strict=True):
        (gradient,) = torch.autograd.grad(part, leaf, retain_graph=True)
        assert gradient.norm() > 1e-3


def test_generator_losses_ignore_shifts_and_orders():
    expected = dafl_generator_losses(LOGITS, FEATURES)
    rows, classes = torch.tensor([3, 0, 4, 2, 1]), torch.tensor([2, 0, 3, 1])
    moved = dafl_generator_losses((LOGITS + 3.0)[rows][:, classes], FEATURES[rows])
    for part, other in zip(expected, moved, strict=True):
        torch.testing.assert_close(part, other)


def test_generator_losses_of_sure_logits_stay_finite():
    leaf = torch.tensor([[1000.0, -1000.0], [900.0, -1000.0]], requires_grad=True)
    total = dafl_generator_losses(leaf, torch.zeros(2, 3)).total()
    (gradient,) = torch.autograd.grad(total, leaf)
    assert math.isfinite(total.item())
    assert torch.isfinite(gradient).all()


def test_an_empty_batch_costs_the_generator_nothing():
    assert [p.item() for p in dafl_generator_losses(LOGITS[:0], FEATURES[:0])] == [0.0, 0.0, 0.0]


# --- inversion --------------------------------------------------------------------------------


def test_batch_norm_loss_matches_a_value_worked_out_by_hand():
    # Channel means 2 and 1, biased variances 1 and 0, against means (2, 5) and variances (1, 3).
    inputs = torch.tensor([[1.0, 1.0], [3.0, 1.0]], dtype=torch.float64)
    loss = batch_norm_loss(
        inputs,
        torch.tensor([2.0, 5.0], dtype=torch.float64),
        torch.tensor([1.0, 3.0], dtype=torch.float64),
    )
    assert loss.item() == pytest.approx(4.0 + 3.0)


def test_batch_norm_loss_takes_statistics_over_rows_and_space():
    maps, zeros = draw(3, 2, 4, 5, seed=1), torch.zeros(2, dtype=torch.float64)
    values = maps.numpy()
    expected = np.linalg.norm(values.mean((0, 2, 3))) + np.linalg.norm(values.var((0, 2, 3)))
    assert batch_norm_loss(maps, zeros, zeros).item() == pytest.approx(expected)


def test_images_with_the_remembered_statistics_pay_nothing():
    maps = draw(3, 2, 4, 5, seed=1)
    mean, variance = maps.mean((0, 2, 3)), maps.var((0, 2, 3), correction=0)
    assert batch_norm_loss(maps, mean, variance).item() == pytest.approx(0.0, abs=1e-14)


def test_a_batch_of_one_row_without_space_has_no_variance_and_stays_finite():
    leaf, zeros = torch.zeros(1, 2, requires_grad=True), torch.zeros(2)
    loss = batch_norm_loss(leaf, zeros, zeros)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert loss.item() == 0.0
    assert torch.equal(gradient, torch.zeros(1, 2))


def test_batch_norm_and_variation_gradients_agree_with_finite_differences():
    leaf = IMAGES.clone().requires_grad_()
    mean, variance = draw(3, seed=5), draw(3, seed=6) ** 2
    assert torch.autograd.gradcheck(lambda x: batch_norm_loss(x, mean, variance), (leaf,))
    assert torch.autograd.gradcheck(total_variation, (leaf,))


def test_every_layer_reports_what_it_read():
    model = teacher()
    with batch_norm_losses(model) as losses:
        assert losses == {}
        model(IMAGES)
        first = dict(losses)
        model(2 * IMAGES)
        assert losses["1"] != first["1"]
    assert set(first) == {"1", "5"}
    read = model[:5](IMAGES)
    torch.testing.assert_close(
        first["5"], batch_norm_loss(read, model[5].running_mean, model[5].running_var)
    )


def test_the_gradient_reaches_the_images_and_the_teacher_stays_as_it_was():
    model, leaf = teacher(), IMAGES.clone().requires_grad_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with batch_norm_losses(model) as losses:
        logits = model(leaf)
        inversion_losses(leaf, logits, torch.tensor([1, 4]), losses).total().backward()
    assert leaf.grad is not None
    assert leaf.grad.norm() > 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_hooks_are_gone_after_the_block_also_after_an_error():
    model = teacher()

    def hooks() -> int:
        return sum(len(module._forward_pre_hooks) for module in model.modules())

    for _ in range(3):
        with batch_norm_losses(model) as losses:
            assert hooks() == 2
            model(IMAGES)
    assert hooks() == 0
    with pytest.raises(RuntimeError, match="stop"), batch_norm_losses(model):
        raise RuntimeError("stop")
    assert hooks() == 0
    kept = dict(losses)
    model(5 * IMAGES)
    assert losses == kept


def test_refuses_a_teacher_without_statistics_or_in_training():
    without = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    with (
        pytest.raises(ValueError, match=r"BatchNorm layers that keep running statistics"),
        batch_norm_losses(without),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"in evaluation mode; in training mode: 1, 5$"),
        batch_norm_losses(teacher().train()),
    ):
        pass


def test_total_variation_matches_a_value_worked_out_by_hand():
    # Right: 1, 5; below: 3, 7; rising diagonal: 4 - 2; falling: 1 - 9.
    image = torch.tensor([[[[1.0, 2.0], [4.0, 9.0]]]], dtype=torch.float64)
    by_hand = math.sqrt(26) + math.sqrt(58) + 2 + 8
    assert total_variation(image).item() == pytest.approx(by_hand)


def test_flat_images_have_no_variation_and_a_zero_gradient():
    for shape in ((2, 3, 4, 5), (1, 1, 1, 1)):
        leaf = torch.ones(shape, requires_grad=True)
        loss = total_variation(leaf)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert loss.item() == 0.0
        assert torch.equal(gradient, torch.zeros(shape))


def test_inversion_names_its_parts_and_weighs_them():
    layers = {"1": torch.tensor(2.0), "5": torch.tensor(3.0)}
    labels = torch.tensor([0, 3])
    found = inversion_losses(IMAGES, LOGITS[:2], labels, layers)
    torch.testing.assert_close(found.ce, F.cross_entropy(LOGITS[:2], labels))
    assert found.batch_norm.item() == 5.0
    torch.testing.assert_close(found.total_variation, total_variation(IMAGES))
    torch.testing.assert_close(found.l2, IMAGES.square().sum().sqrt())
    ones = InversionLosses(*torch.tensor([1.0, 10.0, 1e6, 1e9]))
    assert ones.total().item() == pytest.approx(1 + 1000 + 25)
    with pytest.raises(ValueError, match=r"^no BatchNorm loss: run the teacher inside"):
        inversion_losses(IMAGES, LOGITS[:2], labels, {})


def test_a_few_steps_bring_images_closer_to_what_the_teacher_saw():
    model, labels = teacher(), torch.tensor([1, 4])
    images = IMAGES.clone().requires_grad_()
    optimizer = torch.optim.Adam([images], lr=0.1)
    totals = []
    with batch_norm_losses(model) as losses:
        for _ in range(30):
            optimizer.zero_grad()
            total = inversion_losses(images, model(images), labels, losses).total()
            total.backward()
            optimizer.step()
            totals.append(total.item())
    assert totals[-1] < 0.5 * totals[0]


# --- numbers at the edge ----------------------------------------------------------------------


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_gives_float32_losses(half: torch.dtype):
    statistics = torch.zeros(3)
    logits, features, images = LOGITS.to(half), FEATURES.to(half), IMAGES.to(half)
    pairs = [
        (total_variation(images), total_variation(IMAGES)),
        (
            batch_norm_loss(images, statistics, statistics),
            batch_norm_loss(IMAGES, statistics, statistics),
        ),
        *zip(
            dafl_generator_losses(logits, features),
            dafl_generator_losses(LOGITS, FEATURES),
            strict=True,
        ),
    ]
    for coarse, exact in pairs:
        assert coarse.dtype == torch.float32
        assert coarse.item() == pytest.approx(exact.item(), rel=0.02)


def test_a_stack_gives_what_each_gives():
    logits, images = draw(3, 5, 4, seed=4), draw(2, 2, 3, 4, 5, seed=5)
    statistics = torch.ones(3, dtype=torch.float64)
    for loss, stack in (
        (lambda z: dafl_generator_losses(z, FEATURES).total(), logits),
        (total_variation, images),
        (lambda x: batch_norm_loss(x, statistics, statistics), images),
    ):
        torch.testing.assert_close(
            torch.func.vmap(loss)(stack), torch.stack([loss(member) for member in stack])
        )
