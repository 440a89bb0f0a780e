"""What ONE, KDCL, OKDDip and PCL have in common: whose target is constant, and who pays."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedkd.mutual.kdcl import kdcl_linear, kdcl_losses, kdcl_minlogit, kdcl_naive
from fedkd.mutual.native_ensemble import gated_logits, one_losses
from fedkd.mutual.okddip import okddip_losses
from fedkd.mutual.pcl import pcl_losses

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
GROUP = 3 * torch.randn(3, 5, 4, generator=_generator, dtype=torch.float64)
LEADER = 3 * torch.randn(5, 4, generator=_generator, dtype=torch.float64)
TEACHERS = 3 * torch.randn(3, 5, 4, generator=_generator, dtype=torch.float64)
GROUP_LABELS = torch.tensor([2, 0, 1, 3, 3])
GATES = torch.softmax(torch.randn(5, 3, generator=_generator, dtype=torch.float64), dim=1)
ATTENTION = torch.softmax(torch.randn(5, 3, 3, generator=_generator, dtype=torch.float64), dim=2)
KDCL_TARGETS = {"naive": kdcl_naive, "linear": kdcl_linear, "minlogit": kdcl_minlogit}
Loss = Callable[..., Tensor]


def one(logits: Tensor, labels: Tensor, **options: object) -> Tensor:
    gates = GATES.to(logits.dtype)[: logits.shape[1]]
    return sum(one_losses(logits, gates, labels, **options).values())


def kdcl(logits: Tensor, labels: Tensor, **options: object) -> Tensor:
    return sum(kdcl_losses(logits, kdcl_minlogit(logits, labels), labels, **options).values())


def okddip(logits: Tensor, labels: Tensor, **options: object) -> Tensor:
    leader, attention = LEADER.to(logits.dtype), ATTENTION.to(logits.dtype)
    return sum(okddip_losses(logits, leader, attention, labels, **options).values())


def pcl(logits: Tensor, labels: Tensor, **options: object) -> Tensor:
    leader, teachers = LEADER.to(logits.dtype), TEACHERS.to(logits.dtype)
    return sum(pcl_losses(logits, leader, teachers, labels, **options).values())


LOSSES = pytest.mark.parametrize("loss", [one, kdcl, okddip, pcl])


@LOSSES
def test_a_constant_added_to_a_row_changes_nothing(loss: Loss):
    # The same shift for all peers: mixtures of logits then shift as a whole.
    shift = torch.tensor([3.0, -7.0, 0.0, 40.0, 1.0], dtype=torch.float64)[:, None]
    torch.testing.assert_close(loss(GROUP + shift, GROUP_LABELS), loss(GROUP, GROUP_LABELS))


def test_order_of_rows_and_classes_does_not_matter():
    rows, classes = torch.tensor([3, 0, 4, 2, 1]), torch.tensor([2, 0, 3, 1])
    labels = classes.argsort()[GROUP_LABELS[rows]]

    def mixed(values: Tensor) -> Tensor:
        return values[..., rows, :][..., classes]

    mixed_group = mixed(GROUP)
    pairs = [
        (one_losses(GROUP, GATES, GROUP_LABELS), one_losses(mixed_group, GATES[rows], labels)),
        (
            okddip_losses(GROUP, LEADER, ATTENTION, GROUP_LABELS),
            okddip_losses(mixed_group, mixed(LEADER), ATTENTION[rows], labels),
        ),
        (
            pcl_losses(GROUP, LEADER, TEACHERS, GROUP_LABELS),
            pcl_losses(mixed_group, mixed(LEADER), mixed(TEACHERS), labels),
        ),
    ]
    for plain, shuffled in pairs:
        for name, term in plain.items():
            torch.testing.assert_close(shuffled[name], term)
    for target in KDCL_TARGETS.values():
        torch.testing.assert_close(
            target(mixed_group, labels), mixed(target(GROUP, GROUP_LABELS)), atol=1e-6, rtol=0
        )


def test_order_of_peers_does_not_matter():
    peers = torch.tensor([2, 0, 1])
    plain = okddip_losses(GROUP, LEADER, ATTENTION, GROUP_LABELS)
    shuffled = okddip_losses(GROUP[peers], LEADER, ATTENTION[:, peers][:, :, peers], GROUP_LABELS)
    for name, term in plain.items():
        torch.testing.assert_close(shuffled[name], term)
    torch.testing.assert_close(
        sum(one_losses(GROUP[peers], GATES[:, peers], GROUP_LABELS).values()),
        one(GROUP, GROUP_LABELS),
    )
    torch.testing.assert_close(
        sum(pcl_losses(GROUP[peers], LEADER, TEACHERS[peers], GROUP_LABELS).values()),
        pcl(GROUP, GROUP_LABELS),
    )
    for target in KDCL_TARGETS.values():
        torch.testing.assert_close(
            target(GROUP[peers], GROUP_LABELS), target(GROUP, GROUP_LABELS), atol=1e-6, rtol=0
        )


@LOSSES
def test_every_term_is_at_least_zero_and_without_distillation_labels_are_all_there_is(loss: Loss):
    assert loss(GROUP, GROUP_LABELS, ce_weight=0.0) > 0
    plain = F.cross_entropy(GROUP.flatten(0, 1), GROUP_LABELS.repeat(3)) * 3
    extra = {
        one: F.cross_entropy(gated_logits(GROUP, GATES), GROUP_LABELS),
        kdcl: torch.zeros((), dtype=torch.float64),
        okddip: F.cross_entropy(LEADER, GROUP_LABELS),
        pcl: F.cross_entropy(LEADER, GROUP_LABELS),
    }[loss]
    torch.testing.assert_close(loss(GROUP, GROUP_LABELS, kd_weight=0.0), plain + extra)


@LOSSES
def test_cross_entropy_never_sees_the_temperature_and_t2_is_a_factor(loss: Loss):
    at_2 = loss(GROUP, GROUP_LABELS, kd_weight=0.0, temperature=2.0)
    assert torch.equal(at_2, loss(GROUP, GROUP_LABELS, kd_weight=0.0, temperature=8.0))
    scaled = loss(GROUP, GROUP_LABELS, ce_weight=0.0, temperature=4.0)
    bare = loss(GROUP, GROUP_LABELS, ce_weight=0.0, temperature=4.0, scale_by_t2=False)
    torch.testing.assert_close(scaled, 16 * bare)


@LOSSES
def test_weights_multiply_their_own_terms(loss: Loss):
    ce = loss(GROUP, GROUP_LABELS, kd_weight=0.0)
    kd = loss(GROUP, GROUP_LABELS, ce_weight=0.0)
    both = loss(GROUP, GROUP_LABELS, ce_weight=0.1, kd_weight=0.9)
    torch.testing.assert_close(both, 0.1 * ce + 0.9 * kd)


@LOSSES
def test_without_labels_only_the_terms_that_need_none_are_left(loss: Loss):
    terms = {
        one: lambda labels: one_losses(GROUP, GATES, labels),
        kdcl: lambda labels: kdcl_losses(GROUP, LEADER, labels),
        okddip: lambda labels: okddip_losses(GROUP, LEADER, ATTENTION, labels),
        pcl: lambda labels: pcl_losses(GROUP, LEADER, TEACHERS, labels),
    }[loss]
    labelled, unlabelled = terms(GROUP_LABELS), terms(None)
    assert unlabelled == {name: term for name, term in labelled.items() if name.startswith("kd")}
    assert len(labelled) > len(unlabelled) > 0


@LOSSES
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_gives_a_float32_loss(loss: Loss, half: torch.dtype):
    value = loss(PEERS.repeat(1, 3, 1)[:, :5].to(half), GROUP_LABELS)
    assert value.dtype == torch.float32
    assert torch.isfinite(value)


@LOSSES
def test_extreme_logits_stay_finite_with_a_finite_gradient(loss: Loss):
    leaf = (1000 * GROUP.sign()).float().requires_grad_()
    value = loss(leaf, GROUP_LABELS)
    assert torch.isfinite(value)
    assert torch.isfinite(torch.autograd.grad(value, leaf)[0]).all()


@LOSSES
def test_vmap_equals_a_loop(loss: Loss):
    generator = torch.Generator().manual_seed(1)
    groups = torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (2, 5), generator=generator)
    values = torch.func.vmap(loss)(groups, labels)
    slopes = torch.func.vmap(torch.func.grad(loss))(groups, labels)
    for k in range(2):
        torch.testing.assert_close(values[k], loss(groups[k], labels[k]))
        leaf = groups[k].clone().requires_grad_()
        expected = torch.autograd.grad(loss(leaf, labels[k]), leaf)[0]
        torch.testing.assert_close(slopes[k], expected)


@LOSSES
def test_rows_of_weight_zero_are_as_good_as_absent(loss: Loss):
    mask = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    spoilt = GROUP.clone()
    spoilt[:, 2] = 55.0 * GROUP[:, 4]
    assert loss(spoilt, GROUP_LABELS, sample_weights=mask) == loss(
        GROUP, GROUP_LABELS, sample_weights=mask
    )
    uniform = torch.full_like(mask, 7.0)
    torch.testing.assert_close(
        loss(GROUP, GROUP_LABELS, sample_weights=uniform), loss(GROUP, GROUP_LABELS)
    )
    leaf = GROUP.clone().requires_grad_()
    none = loss(leaf, GROUP_LABELS, sample_weights=torch.zeros_like(mask))
    assert none == 0
    assert not torch.autograd.grad(none, leaf)[0].any()


@LOSSES
@pytest.mark.parametrize("name", ["ce_weight", "kd_weight"])
@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_refuses_a_weight_that_is_negative_or_not_finite(loss: Loss, name: str, weight: float):
    with pytest.raises(ValueError, match=rf"^{name} must be >= 0 and finite, got "):
        loss(GROUP, GROUP_LABELS, **{name: weight})


@LOSSES
@pytest.mark.parametrize("temperature", [0.0, -2.0, math.nan, math.inf])
def test_refuses_a_temperature_that_softens_nothing(loss: Loss, temperature: float):
    with pytest.raises(ValueError, match=r"^temperature must be (> 0|finite), got "):
        loss(GROUP, GROUP_LABELS, temperature=temperature)
