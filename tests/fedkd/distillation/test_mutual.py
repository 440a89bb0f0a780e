"""Mutual learning: peers that come to agree, and a teacher that leads and then listens."""

import pytest
import torch
from pydantic import ValidationError

from fedkd.distillation.methods.mutual import (
    DeepMutualLearning,
    DMLSettings,
    MutualSettings,
    ProgressiveMutual,
    _MutualPeers,
    _TwoWay,
)
from fedkd.distillation.peers import Exchange, GroupStep, InForce, build_peers, peer_names
from fedkd.objectives import Objective


def weights_of(model):
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


def dml(shop, **settings):
    return DeepMutualLearning(DMLSettings(**settings)).run(shop)


def mutual(shop, **settings):
    return ProgressiveMutual(MutualSettings(**settings)).run(shop)


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


def test_a_teacher_that_never_listens_has_the_bits_of_training_alone(workshop):
    shop = workshop()
    left = mutual(shop, final_share=0)
    teacher = shop.build(MutualSettings().teacher, 1, 0)
    shop.fit(
        teacher,
        name="alone",
        teacher=None,
        objective=Objective.model_validate({"ce": 1}),
        rows=shop.rows.all_labelled(),
    )
    assert torch.equal(weights_of(left.others["teacher"]), weights_of(teacher))
    listening = mutual(shop, final_share=0.5)
    assert not torch.allclose(weights_of(listening.others["teacher"]), weights_of(teacher))


def test_the_teacher_leads_first_and_each_side_learns_only_its_own_loss(workshop):
    shop = workshop()
    group = _TwoWay(shop, MutualSettings(), build_peers(shop, 2), ["student", "teacher"])
    logits = torch.randn(2, 5, 4, dtype=torch.float64).requires_grad_()
    shares = []
    for progress in (0.0, 0.5, 1.0):
        losses = group.losses(step_of(logits, progress=progress))["kd"]
        gradients = [
            torch.autograd.grad(loss, logits, retain_graph=True)[0].abs().sum((1, 2))
            for loss in losses
        ]
        assert gradients[0][1] == 0
        assert gradients[1][0] == 0
        shares.append(float(gradients[1][1] / gradients[0][0]))
    assert shares[0] == 0
    assert shares[0] < shares[1] < shares[2]


def test_the_student_gains_from_labels_that_only_the_teacher_sees(workshop, hard_rows):
    rows = hard_rows(count=300, labelled=12)

    def accuracy(**settings):
        shop = workshop(rows=rows, epochs=10)
        student = mutual(shop, **settings).student
        right = student(rows.test_inputs).argmax(-1) == rows.test_labels
        return right.float().mean()

    assert accuracy() > accuracy(kd_weight=0) + 0.05
    assert accuracy() > accuracy(teacher_rows="labelled") + 0.05
