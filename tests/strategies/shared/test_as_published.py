"""What published code comes to: the numbers that its faults give, beside the right ones."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fedkd.exchange.payloads import ClassTable, Prototypes
from fedkd.objectives import Objective
from fedkd.targets import density_ratio, filtered_mean
from fedkd.training import Batch, Outputs
from strategies.data_free.fd import added_up, mean_over_other_holders
from strategies.data_free.fedproto import mean_over_holders
from strategies.server_models.fedet import diverse_losses
from strategies.server_models.fedgems import ReliableMean, fused
from strategies.shared.as_published import (
    kl_of_both,
    multiplied_density_ratio,
    over_classes,
    published_filter,
    published_rank,
    ramp_by_lambda,
    reversed_kl_rows,
    scores_from_ones,
    with_old_buffers,
    without_full_rank,
)
from strategies.shared.generator import noise_for
from strategies.two_models.fedkd import mutual
from strategies.two_models.fml import undetached
from strategies.two_models.pairs import HALF_AND_HALF

S = torch.tensor([[1.0, 2.0, 3.0, 0.0], [0.5, -1.0, 0.0, 2.0]])
T = torch.tensor([[2.0, 1.0, 4.0, -1.0], [0.0, 0.0, 1.0, 3.0]])
U = torch.tensor([[-4.0, 3.0, 1.0, 1.0], [2.0, 0.0, -1.0, 1.0]])
LABELS = torch.tensor([2, 0])

CRONUS = torch.tensor(
    [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.65, 0.25, 0.1], [0.5, 0.3, 0.2], [0.0, 0.0, 1.0]],
    dtype=torch.float64,
)[:, None]
"""Five clients on one row, the last of which lies."""


# -- FedKD ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("energy", "rank"), [(0.6, 1), (0.9, 2), (0.95, 0), (0.98, 0), (1.0, 0)])
def test_the_published_loop_ends_at_rank_0_where_all_values_are_needed(energy, rank):
    assert published_rank(np.array([3.0, 2.0, 1.0]), energy) == rank


def test_matrices_of_rank_0_stay_as_they_were_and_others_do_not():
    flat, steep = np.eye(6, dtype=np.float32), np.ones((6, 6), np.float32)
    before = {"flat": flat * 0, "steep": steep * 0, "bias": np.zeros(6, np.float32)}
    after = {"flat": flat, "steep": steep, "bias": np.ones(6, np.float32)}
    kept = without_full_rank(before, after, 0.95)
    assert not kept["flat"].any()
    assert (kept["steep"] == 1).all()
    assert (kept["bias"] == 1).all()


@dataclass
class _Parts:
    def call(self, name, inputs):
        return inputs @ torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])


def _fedkd(**faults):
    mentor, mentee = T.clone().requires_grad_(), S.clone().requires_grad_()
    features = {
        "mentor": torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]]),
        "mentee": torch.tensor([[1.0, 1.0], [0.0, 2.0]]),
    }
    outputs = {
        name: Outputs(private=logits, features={"penultimate": features[name]})
        for name, logits in (("mentor", mentor), ("mentee", mentee))
    }
    batch = Batch(labels=LABELS, parts=_Parts())
    return mentor, mentee, mutual(outputs, batch, **faults)


def test_fedkd_divides_by_the_classes_as_well():
    right, wrong = _fedkd()[2], _fedkd(kl_mean=True)[2]
    assert wrong["kd"].value.item() == pytest.approx(right["kd"].value.item() / 4)
    assert wrong["mentee/kd"].value.item() == pytest.approx(right["mentee/kd"].value.item() / 4)
    assert wrong["hidden"].value.item() == pytest.approx(right["hidden"].value.item())


@pytest.mark.parametrize("no_detach", [False, True])
def test_fedkd_sends_the_mentors_loss_to_the_mentee_only_by_its_fault(no_detach):
    mentor, mentee, losses = _fedkd(no_detach=no_detach)
    losses["kd"].value.backward()
    assert mentor.grad.abs().sum() > 0
    assert (mentee.grad is not None) is no_detach


# -- FML ----------------------------------------------------------------------------------------


def test_fml_divides_terms_with_a_teacher_by_the_classes():
    scaled = over_classes(HALF_AND_HALF, 10, 0.0)
    assert scaled.terms["ce"].weight.at(0.0) == 0.5
    assert scaled.terms["kd"].weight.at(0.0) == pytest.approx(0.05)


def test_fml_without_constants_has_the_right_values_and_the_others_gradients():
    own, theirs = S.clone().requires_grad_(), T.clone().requires_grad_()
    outputs = {"private": Outputs(private=own), "meme": Outputs(private=theirs)}
    losses = undetached(
        outputs,
        Batch(labels=LABELS),
        objectives={"private": HALF_AND_HALF, "meme": HALF_AND_HALF},
        progress=0.0,
    )
    private = 0.5 * (losses["ce"].values + losses["kd"].values).mean()
    meme = 0.5 * (losses["meme/ce"].values + losses["meme/kd"].values).mean()
    assert {loss.factors for loss in losses.values()} == {(0.5,)}
    # As with constants: the fault is in the gradients alone.
    assert private.item() == pytest.approx(0.63080982, abs=1e-6)
    assert meme.item() == pytest.approx(0.94150915, abs=1e-6)
    losses["kd"].values.sum().backward()
    assert theirs.grad.abs().sum() > 0


def test_kl_of_both_is_the_divergence():
    assert kl_of_both(S, T).mean().item() == pytest.approx(0.12034999, abs=1e-6)


def test_accumulated_statistics_end_at_five_quarters_of_the_mean():
    statistics, mean = {"bn.running_mean": np.zeros(3)}, {"bn.running_mean": np.full(3, 2.0)}
    for _ in range(40):
        statistics = with_old_buffers(statistics, mean, memes=5)
    assert statistics["bn.running_mean"] == pytest.approx(np.full(3, 2.5))
    untouched = with_old_buffers({"weight": np.ones(2)}, {"weight": np.zeros(2)}, memes=5)
    assert not untouched["weight"].any()


# -- public predictions -------------------------------------------------------------------------


def test_the_density_ratio_by_its_matrix_has_the_published_codes_numbers():
    blind = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    known = torch.tensor([[0.9, 0.8], [1.0, 0.9], [0.8, 1.0]])
    rows = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.5, 0.5]])
    wrong = multiplied_density_ratio(rows, known, blind, width=0.5, ridge=0.5)
    assert wrong.tolist() == pytest.approx([1.48915179, 0.02459270, 0.82819673], abs=1e-7)
    right = density_ratio(rows, known, blind, width=0.5, ridge=0.5)
    assert right.tolist() == pytest.approx([1.22929609, 0.02696973, 0.72877372], abs=1e-7)


def test_power_iteration_from_ones_finds_nothing_in_probabilities():
    assert scores_from_ones(CRONUS[:, 0]).tolist() == [0.0] * 5
    # Halves and quarters are exact, and so is the null space.
    exact = torch.eye(4)[[0, 0, 0, 3]]
    assert not scores_from_ones(exact).any()


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        ({"from_ones": False, "quantile_of_rest": True}, [0.6125, 0.2625, 0.125]),
        ({"from_ones": False, "quantile_of_rest": False}, [0.65, 0.25, 0.10]),
    ],
)
def test_the_filters_second_pass_by_a_quantile_leaves_too_many(faults, expected):
    told = published_filter(CRONUS, dishonest=0.4, **faults)
    assert told[0].tolist() == pytest.approx(expected)


def test_both_faults_of_the_filter_keep_the_liar():
    told = published_filter(CRONUS, dishonest=0.4, from_ones=True, quantile_of_rest=True)
    honest = filtered_mean(CRONUS, dishonest=0.4)
    assert told[0].tolist() == pytest.approx([0.4625, 0.1875, 0.35])
    assert honest[0].tolist() == pytest.approx([0.65, 0.25, 0.10])


def test_pcls_weight_is_there_in_one_epoch_of_eighty():
    weights = [ramp_by_lambda(epoch / 300, end=1.0, until=80 / 300) for epoch in range(82)]
    assert weights[1] == pytest.approx(1.0)
    assert max(weights[3:80]) < 1e-8
    assert weights[80] == weights[81] == 1.0


# -- server models --------------------------------------------------------------------------------


def test_wrong_clients_have_weight_as_in_aijack():
    # All three clients are told; as published also those that are wrong about a row count.
    mean = ReliableMean(LABELS, 4, where_wrong=0.0)
    for logits in (S, T, U):
        mean.add(logits.numpy())
    told, known = mean.mean()
    assert known.all()
    expected = [
        [1.1046475, 1.4917239, 3.407369, -0.5082761],
        [1.2817614, -0.2052111, -0.3843669, 1.6156332],
    ]
    assert told == pytest.approx(np.array(expected), abs=1e-5)


def test_fedgems_by_its_faults():
    taught, known = torch.softmax(T, -1), torch.ones(2)

    def kd(**faults):
        losses = fused(S, LABELS, taught, known, ce_share=0.0, **faults)
        return losses["kd"].values.mean().item()

    assert kd() == pytest.approx(0.12034999, abs=1e-6)
    assert kd(reversed_kl=True) == pytest.approx(0.18976181, abs=1e-6)
    assert kd(kl_mean=True) == pytest.approx(0.12034999 / 4, abs=1e-6)
    hard = torch.tensor([[1.0, 0.0]])
    assert math.isfinite(reversed_kl_rows(torch.zeros(1, 2), hard).item())


def test_fedet_draws_to_the_uniform_distribution_only_by_its_fault():
    logits = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    nobody = torch.full((1, 4), torch.nan)

    def pull(**faults):
        losses = diverse_losses(logits, logits, nobody, diversity_weight=1.0, **faults)
        return losses["diversity"].values.item()

    assert pull() == 0
    assert pull(uniform_pull=True) == pytest.approx(0.12011451, abs=1e-6)


# -- no public data -------------------------------------------------------------------------------


def _tables():
    sums = [
        [[1.5, 0.3, 0.2], [0.2, 0.7, 0.1], [0, 0, 0]],
        [[0.6, 0.3, 0.1], [0, 0, 0], [0.1, 0.2, 0.7]],
        [[0, 0, 0], [0.5, 1.2, 0.3], [0.2, 0.2, 0.6]],
    ]
    counts = [[2, 1, 0], [1, 0, 1], [0, 2, 1]]
    return {
        client: ClassTable(values=(np.array(own) / np.maximum(held, 1)[:, None]).astype(np.float32))
        for client, (own, held) in enumerate(zip(sums, np.array(counts), strict=True))
    }


def test_fd_divides_by_all_others_only_by_its_fault():
    tables = added_up(_tables())
    wrong = mean_over_other_holders(tables, 0, absent_count=True)
    assert wrong.values.sum(1).tolist() == pytest.approx([0.5, 0.5, 1.0])
    right = mean_over_other_holders(tables, 0)
    assert right.values.sum(1).tolist() == pytest.approx([1.0, 1.0, 1.0])
    # Of all: as in the server's mean of FedGen's baseline, over all three.
    everybody = mean_over_other_holders(tables, None, absent_count=True)
    assert everybody.values.sum(1).tolist() == pytest.approx([2 / 3] * 3)


def test_equation_6_shrinks_prototypes_by_their_holders():
    def sent(counts, **by_class):
        classes = np.array([int(name[1:]) for name in by_class])
        return Prototypes(
            classes=classes,
            values=np.array(list(by_class.values()), np.float32),
            num_classes=3,
            counts=np.array(counts, np.float32),
        )

    clients = [
        sent([30, 10], c0=(1, 0), c1=(0, 1)),
        sent([10, 20], c0=(0.8, 0.4), c2=(-1, 0)),
        sent([30, 20], c1=(0.2, 0.6), c2=(-0.6, -0.4)),
    ]
    none = Prototypes(
        classes=np.zeros(0, np.int64), values=np.zeros((0, 2), np.float32), num_classes=3
    )
    wrong = mean_over_holders(clients, none, by_holders=True).values
    expected = np.array([[0.475, 0.05], [0.075, 0.35], [-0.4, -0.1]])
    assert wrong == pytest.approx(expected, abs=1e-6)
    assert mean_over_holders(clients, none).values == pytest.approx(2 * expected, abs=1e-6)


def test_uniform_noise_has_no_negative_number():
    draws = [
        noise_for(np.random.default_rng(0), 50, 8, uniform=uniform) for uniform in (True, False)
    ]
    assert draws[0].min() >= 0 > draws[1].min()


def test_terms_without_a_teacher_are_not_scaled():
    objective = Objective.model_validate({"ce": 0.25})
    assert over_classes(objective, 10, 0.0).terms["ce"].weight.at(1.0) == 0.25
