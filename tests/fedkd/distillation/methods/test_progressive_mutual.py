"""Progressive mutual learning: who leads when, and who gains."""

import pytest
import torch

from fedkd.distillation.fit.group import Exchange, GroupStep, InForce
from fedkd.distillation.methods.peers import build_peers
from fedkd.distillation.methods.progressive_mutual import MutualSettings, ProgressiveMutual, _TwoWay
from fedkd.objectives import Objective


def weights_of(model):
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


def mutual(shop, **settings):
    return ProgressiveMutual(MutualSettings(**settings)).run(shop)


def step_of(logits, *, progress=1.0):
    exchange = Exchange(logits, {}, (), torch.arange(logits.shape[1]), ())
    return GroupStep(InForce(1.0, 1.0), progress, (), {}, exchange)


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


@pytest.mark.slow
def test_the_student_gains_from_labels_that_only_the_teacher_sees(workshop, hard_rows):
    rows = hard_rows(count=300, labelled=12)

    def accuracy(**settings):
        shop = workshop(rows=rows, epochs=10)
        student = mutual(shop, **settings).student
        right = student(rows.test_inputs).argmax(-1) == rows.test_labels
        return right.float().mean()

    assert accuracy() > accuracy(kd_weight=0) + 0.05
    assert accuracy() > accuracy(teacher_rows="labelled") + 0.05
