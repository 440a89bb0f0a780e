"""Deep mutual learning: peers come closer, and each pays for itself only."""

import pytest
import torch
from pydantic import ValidationError

from fedkd.distillation.fit.group import Exchange, GroupStep, InForce
from fedkd.distillation.methods.dml import DeepMutualLearning, DMLSettings, _MutualPeers
from fedkd.distillation.methods.peers import build_peers, peer_names


def weights_of(model):
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


def dml(shop, **settings):
    return DeepMutualLearning(DMLSettings(**settings)).run(shop)


def step_of(logits, *, progress=1.0):
    exchange = Exchange(logits, {}, (), torch.arange(logits.shape[1]), ())
    return GroupStep(InForce(1.0, 1.0), progress, (), {}, exchange)


def test_peers_disagree_less_than_independent_students(workshop, hard_rows):
    alone, together = (
        dml(
            workshop(rows=hard_rows(), epochs=15, optimizer={"lr": 0.01}),
            kd_weight=weight,
            peers=3,
        )
        for weight in (0, 3)
    )
    assert together.notes["disagreement"] < 0.6 * alone.notes["disagreement"]


def test_the_ensemble_target_is_the_mean_of_the_pairs(workshop):
    # Equal gradients with constant targets, so equal training up to rounding; a target that is
    # not a constant, or an ensemble that includes the peer itself, would break it.
    pairs, ensemble = (
        dml(workshop(optimizer={"name": "sgd", "lr": 0.1}), peers=3, temperature=2, target=target)
        for target in ("pairwise", "ensemble")
    )
    assert weights_of(pairs.student).allclose(weights_of(ensemble.student), atol=1e-5)


def test_a_sum_over_peers_is_the_mean_times_their_number(workshop):
    def student(**settings):
        shop = workshop(optimizer={"name": "sgd", "lr": 0.1})
        return weights_of(dml(shop, peers=3, **settings).student)

    summed = student(peer_reduction="sum")
    assert summed.allclose(student(kd_weight=2), atol=1e-6)
    assert not summed.allclose(student(), atol=1e-4)


@pytest.mark.parametrize("target", ["pairwise", "ensemble"])
def test_a_peers_loss_sends_nothing_to_the_others(workshop, target):
    shop = workshop()
    group = _MutualPeers(
        shop, DMLSettings(peers=3, target=target), build_peers(shop, 3), peer_names(3)
    )
    logits = torch.randn(3, 5, 4, dtype=torch.float64).requires_grad_()
    losses = group.losses(step_of(logits))["kd"]
    for number in range(3):
        (gradient,) = torch.autograd.grad(losses[number], logits, retain_graph=True)
        assert gradient[number].abs().max() > 1e-3
        others = [k for k in range(3) if k != number]
        assert torch.equal(gradient[others], torch.zeros(2, 5, 4, dtype=torch.float64))


def test_a_sum_of_one_target_is_refused():
    with pytest.raises(ValidationError, match=r"peer_reduction must be mean .* got 'sum'"):
        DMLSettings(target="ensemble", peer_reduction="sum")


def test_a_peer_alone_is_refused():
    with pytest.raises(ValidationError, match="peers"):
        DMLSettings(peers=1)
