"""Online distillation: what the group's target is, who learns from it, and who must not."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor, nn

from fedkd.losses.mutual import mutual_losses
from fedkd.losses.online import (
    BranchGate,
    PeerAttention,
    StalePeers,
    codistillation_loss,
    gated_logits,
    kdcl_general,
    kdcl_general_weights,
    kdcl_linear,
    kdcl_linear_shares,
    kdcl_losses,
    kdcl_minlogit,
    kdcl_naive,
    okddip_losses,
    one_losses,
    pcl_losses,
    update_mean_teacher,
)
from fedkd.losses.response import hard_label_loss, soft_target_loss
from fedkd.targets import mean_logit

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


def kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    return soft_target_loss(student, teacher, temperature=temperature)


# --- what all of them have in common --------------------------------------------------------


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


# --- ONE ------------------------------------------------------------------------------------


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


# --- KDCL -----------------------------------------------------------------------------------


def test_kdcl_naive_takes_the_best_student_of_each_row():
    # Row 0 -> the second student, row 1 -> the third.
    assert torch.equal(kdcl_naive(PEERS, LABELS), torch.stack([PEERS[1, 0], PEERS[2, 1]]))


def test_kdcl_minlogit_matches_the_reference_value():
    target = kdcl_minlogit(PEERS, LABELS)
    expected = torch.tensor([[-5, -3, 0, -5], [0, -2, -3, -1]], dtype=torch.float64)
    assert torch.equal(target, expected)
    assert F.cross_entropy(target, LABELS).item() == pytest.approx(0.25076607, abs=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_kdcl_targets_are_ranked_by_construction(seed: int):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(3, 40, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (40,), generator=generator)

    def errors(values: Tensor) -> Tensor:
        return F.cross_entropy(values, labels, reduction="none")

    best = torch.stack([errors(peer) for peer in logits]).amin(dim=0)
    torch.testing.assert_close(errors(kdcl_naive(logits, labels)), best)
    linear = errors(kdcl_linear(logits, labels))
    assert (linear <= best + 1e-6).all()
    assert (linear < best - 0.01).any()
    assert (errors(kdcl_minlogit(logits, labels)) <= linear + 1e-12).all()


@pytest.mark.parametrize(("scale", "classes"), [(0.1, 4), (3.0, 2), (3.0, 7), (60.0, 4)])
def test_kdcl_linear_finds_what_an_independent_solver_finds(scale: float, classes: int):
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(3, 8, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (8,), generator=generator)
    shares = kdcl_linear_shares(logits, labels)
    assert (shares > 0).all()
    torch.testing.assert_close(shares.sum(0), torch.ones(8, dtype=torch.float64))
    for row in range(8):
        margins = (logits[:, row] - logits[:, row, labels[row], None]).numpy()

        def error(mixture, margins=margins):
            scores = torch.as_tensor(mixture @ margins)
            return torch.logsumexp(scores, 0).item(), margins @ torch.softmax(scores, 0).numpy()

        lowest = minimize(
            error,
            [1 / 3] * 3,
            jac=True,
            method="SLSQP",
            bounds=[(0, 1)] * 3,
            constraints={"type": "eq", "fun": lambda mixture: mixture.sum() - 1},
            options={"ftol": 1e-14, "maxiter": 500},
        ).fun
        assert error(shares[:, row].numpy())[0] <= lowest + 1e-6


@pytest.mark.parametrize("name", KDCL_TARGETS)
def test_kdcl_of_identical_students_is_one_of_them(name: str):
    same = GROUP[:1].repeat(3, 1, 1)
    target = KDCL_TARGETS[name](same, GROUP_LABELS)
    torch.testing.assert_close(target.softmax(1), GROUP[0].softmax(1))
    kd = kdcl_losses(same, target, GROUP_LABELS)["kd"]
    assert kd.abs() < 1e-12


@pytest.mark.parametrize("name", KDCL_TARGETS)
def test_kdcl_targets_are_constants_and_keep_half_precision_apart(name: str):
    leaf = GROUP.clone().requires_grad_()
    assert not KDCL_TARGETS[name](leaf, GROUP_LABELS).requires_grad
    assert KDCL_TARGETS[name](GROUP.half(), GROUP_LABELS).dtype == torch.float32


def test_kdcl_targets_work_under_vmap():
    groups = torch.stack([GROUP, GROUP.flip(1)])
    labels = torch.stack([GROUP_LABELS, GROUP_LABELS])
    for target in KDCL_TARGETS.values():
        stacked = torch.func.vmap(target)(groups, labels)
        for k in range(2):
            torch.testing.assert_close(stacked[k], target(groups[k], labels[k]))


def test_kdcl_matches_pairs_of_the_response_loss():
    target = kdcl_naive(PEERS, LABELS)
    terms = kdcl_losses(PEERS, target, LABELS)
    expected = sum(kl(peer, target, 2.0) for peer in PEERS)
    torch.testing.assert_close(terms["kd"], expected)
    assert terms["ce"].item() == pytest.approx(1.14126964 + 1.69325649 + 1.34022592, abs=1e-8)


def test_kdcl_general_weighs_peers_by_the_inverse_of_their_error():
    # Two classes and errors (e, -e): C is diagonal when the peers err on different rows.
    def logit(probability: float) -> float:
        return math.log(probability / (1 - probability))

    sure = 60.0
    peers = torch.tensor(
        [
            [[logit(0.5), 0.0], [sure, 0.0]],  # errs by (1/2, -1/2) on row 0: C = 1/4
            [[sure, 0.0], [logit(0.8), 0.0]],  # errs by (1/5, -1/5) on row 1: C = 1/25
        ],
        dtype=torch.float64,
    )
    weights = kdcl_general_weights(peers, torch.tensor([0, 0]), ridge=1e-9)
    torch.testing.assert_close(weights, torch.tensor([4.0, 25.0], dtype=torch.float64) / 29)
    # C = diag(1/4, 1/25), mean 29/200; a ridge of one mean adds it to both.
    ridged = kdcl_general_weights(peers, torch.tensor([0, 0]), ridge=1.0)
    inverse = torch.tensor([1 / (0.25 + 0.145), 1 / (0.04 + 0.145)], dtype=torch.float64)
    torch.testing.assert_close(ridged, inverse / inverse.sum())


def test_kdcl_general_turns_negative_weights_into_none():
    weights = kdcl_general_weights(PEERS, LABELS, ridge=1e-3)
    assert weights[0] == 0
    assert weights.sum().item() == pytest.approx(1.0)
    assert (weights >= 0).all()


def test_kdcl_general_treats_identical_or_faultless_peers_alike():
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(kdcl_general_weights(GROUP[:1].repeat(3, 1, 1), GROUP_LABELS), third)
    faultless = (1e5 * F.one_hot(GROUP_LABELS, 4)).double().repeat(3, 1, 1)
    torch.testing.assert_close(kdcl_general_weights(faultless, GROUP_LABELS), third)
    torch.testing.assert_close(kdcl_general(GROUP, third), mean_logit(GROUP))


def test_kdcl_general_refuses_no_rows_and_no_ridge():
    with pytest.raises(ValueError, match="at least 1 held-out row, got 0"):
        kdcl_general_weights(GROUP[:, :0], GROUP_LABELS[:0])
    with pytest.raises(ValueError, match="ridge must be > 0 and finite, got 0"):
        kdcl_general_weights(GROUP, GROUP_LABELS, ridge=0.0)


# --- OKDDip ---------------------------------------------------------------------------------


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


# --- PCL ------------------------------------------------------------------------------------


def test_pcl_equals_its_definition_read_aloud():
    terms = pcl_losses(GROUP, LEADER, TEACHERS, GROUP_LABELS)
    torch.testing.assert_close(terms["kd_ensemble"], sum(kl(peer, LEADER, 3.0) for peer in GROUP))
    others = sum(kl(GROUP[k], TEACHERS[j], 3.0) / 2 for k in range(3) for j in range(3) if j != k)
    torch.testing.assert_close(terms["kd_mean_teachers"], others)
    torch.testing.assert_close(terms["ce_ensemble"], hard_label_loss(LEADER, GROUP_LABELS))


def test_pcl_with_the_peers_as_their_own_mean_teachers_is_mutual_learning():
    terms = pcl_losses(GROUP, LEADER, GROUP, GROUP_LABELS, temperature=2.0)
    expected = mutual_losses(GROUP, temperature=2.0).sum()
    torch.testing.assert_close(terms["kd_mean_teachers"], expected)


def test_pcl_teachers_are_constants():
    leader, teachers = LEADER.clone().requires_grad_(), TEACHERS.clone().requires_grad_()
    terms = pcl_losses(GROUP.clone().requires_grad_(), leader, teachers, GROUP_LABELS)
    distilled = terms["kd_ensemble"] + terms["kd_mean_teachers"]
    slopes = torch.autograd.grad(
        distilled, [leader, teachers], retain_graph=True, allow_unused=True
    )
    assert slopes == (None, None)
    assert torch.autograd.grad(terms["ce_ensemble"], leader)[0].any()


def test_a_peer_alone_has_no_other_mean_teacher():
    assert pcl_losses(GROUP[:1], LEADER, TEACHERS[:1], GROUP_LABELS)["kd_mean_teachers"] == 0


def small_network() -> nn.Sequential:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(generator=generator)
    return network


def test_a_mean_teacher_is_the_plain_average_until_the_decay_sets_in():
    model = small_network()
    mean = copy.deepcopy(model)
    seen = []
    for step in range(4):
        with torch.no_grad():
            model[0].weight.add_(float(step + 1))
            model[1].running_mean.add_(1.0)
            model[1].num_batches_tracked.add_(1)
        seen.append(copy.deepcopy(model))
        update_mean_teacher(mean, model, step=step, decay=0.99)
    weights = torch.stack([each[0].weight for each in seen])
    torch.testing.assert_close(mean[0].weight, weights.mean(0))
    torch.testing.assert_close(mean[1].running_mean, torch.full((4,), 2.5, dtype=torch.float64))
    assert mean[1].num_batches_tracked == 4
    before = mean[0].weight.clone()
    update_mean_teacher(mean, model, step=1000, decay=0.75)
    torch.testing.assert_close(mean[0].weight, 0.75 * before + 0.25 * model[0].weight)


def test_a_mean_teacher_starts_as_a_copy_and_leaves_the_model_alone():
    model, mean = small_network(), small_network()
    with torch.no_grad():
        mean[2].bias.fill_(math.pi)
    before = copy.deepcopy(model.state_dict())
    update_mean_teacher(mean, model, step=0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert torch.equal(mean.state_dict()[name], value)
        assert mean.state_dict()[name].data_ptr() != value.data_ptr()


def test_a_mean_teacher_refuses_itself_and_strangers():
    model = small_network()
    with pytest.raises(ValueError, match=r"share the tensor 0\.weight; average a copy"):
        update_mean_teacher(model, model, step=0)
    one = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(1, 1, bias=False)])
    other = nn.ModuleList([nn.Linear(3, 4), nn.Linear(5, 2), nn.Linear(1, 1)])
    with pytest.raises(ValueError, match=r"differ in 1\.weight, 2\.bias"):
        update_mean_teacher(one, other, step=0)
    with pytest.raises(ValueError, match="step must be >= 0, got -1"):
        update_mean_teacher(copy.deepcopy(model), model, step=-1)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        update_mean_teacher(copy.deepcopy(model), model, step=0, decay=1.0)


# --- codistillation -------------------------------------------------------------------------


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
