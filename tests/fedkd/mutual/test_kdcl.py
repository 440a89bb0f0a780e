"""KDCL: what each way of making a teacher takes from whom."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

from fedkd.losses.response import soft_target_loss
from fedkd.mutual.kdcl import (
    StreamingMinLogit,
    StreamingNaive,
    kdcl_general,
    kdcl_general_weights,
    kdcl_linear,
    kdcl_linear_shares,
    kdcl_losses,
    kdcl_minlogit,
    kdcl_naive,
)
from fedkd.mutual.native_ensemble import one_losses
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
GROUP_LABELS = torch.tensor([2, 0, 1, 3, 3])
GATES = torch.softmax(torch.randn(5, 3, generator=_generator, dtype=torch.float64), dim=1)
KDCL_TARGETS = {"naive": kdcl_naive, "linear": kdcl_linear, "minlogit": kdcl_minlogit}


def one(logits: Tensor, labels: Tensor, **options: object) -> Tensor:
    gates = GATES.to(logits.dtype)[: logits.shape[1]]
    return sum(one_losses(logits, gates, labels, **options).values())


def kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    return soft_target_loss(student, teacher, temperature=temperature)


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


def test_kdcl_linear_matches_the_reference_shares_row_by_row():
    expected = torch.tensor([[0, 0], [0.95471905, 0], [0.04528095, 1]], dtype=torch.float64)
    torch.testing.assert_close(kdcl_linear_shares(PEERS, LABELS), expected, atol=1e-4, rtol=0)


def test_kdcl_minlogit_loss_matches_the_reference_value():
    target = kdcl_minlogit(PEERS, LABELS)
    loss = kdcl_losses(PEERS[:1], target, None)["kd"]
    assert loss.item() == pytest.approx(0.64889403, abs=1e-8)


def test_kdcl_general_matches_the_reference_weights():
    # The reference adds 0.1 to the diagonal; ours is a share of its mean.
    mean_of_diagonal = (0.70723751 + 0.81547450 + 0.80989286) / 3
    weights = kdcl_general_weights(PEERS, LABELS, ridge=0.1 / mean_of_diagonal)
    expected = torch.tensor([0.14076724, 0.39631394, 0.46291882], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, atol=1e-8, rtol=0)


STREAMS = {"naive": (StreamingNaive, kdcl_naive), "minlogit": (StreamingMinLogit, kdcl_minlogit)}


@pytest.mark.parametrize("name", STREAMS)
def test_peers_one_by_one_give_the_bits_of_peers_side_by_side(name: str):
    streaming, rule = STREAMS[name]
    stream = streaming(GROUP_LABELS.numpy())
    for peer in GROUP.float():
        stream.add(peer.numpy())
    assert torch.equal(stream.target(), rule(GROUP.float(), GROUP_LABELS))


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_without_peers_has_no_target(name: str):
    with pytest.raises(ValueError, match="at least 1 peer, got 0"):
        STREAMS[name][0](GROUP_LABELS).target()


def test_among_equals_the_first_of_a_stream_is_taken():
    # The same cross-entropy from different scores of the other classes.
    equals = torch.tensor([[[1.0, 0.0, 2.0]], [[1.0, 2.0, 0.0]]])
    stream = StreamingNaive(torch.tensor([0]))
    for peer in equals:
        stream.add(peer)
    assert torch.equal(stream.target(), equals[0])


@pytest.mark.parametrize("name", KDCL_TARGETS)
def test_kdcl_targets_take_arrays(name: str):
    target = KDCL_TARGETS[name](GROUP.float().numpy(), GROUP_LABELS.numpy())
    assert torch.equal(target, KDCL_TARGETS[name](GROUP.float(), GROUP_LABELS))
