"""Co-training: views label rows for each other, and are kept from becoming one."""

import math

import pytest
import torch

from fedkd.distillation.methods.co_training import CoTraining, CoTrainingSettings, _Views
from fedkd.distillation.methods.peers import build_peers
from fedkd.models import ModelSettings

FAST = {"name": "adam", "lr": 0.01}


def weights_of(model):
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


def co_train(shop, **settings):
    return CoTraining(CoTrainingSettings(**settings)).run(shop)


def test_views_agree_more_than_students_that_train_alone(workshop, hard_rows):
    alone, together = (
        co_train(
            workshop(rows=hard_rows(), epochs=20, optimizer=FAST),
            kd_weight=weight,
            threshold=0.6,
            difference_weight=0,
        ).notes["disagreement"]
        for weight in (0, 3)
    )
    assert together < 0.7 * alone


def test_resisting_the_others_adversaries_hardens_a_view(workshop, hard_rows):
    def fooled(difference_weight):
        shop = workshop(rows=hard_rows(), epochs=20, optimizer=FAST)
        settings = CoTrainingSettings(
            threshold=1.0, kd_weight=1, difference_weight=difference_weight, epsilon=0.1
        )
        group = _Views(shop, settings, build_peers(shop, 2), ["student", "view 2"])
        left = CoTraining(settings).run(shop)
        group.models = [left.student, left.others["view 2"]]
        inputs = shop.rows.test_inputs
        misleads_second = group._misleading(group.models[1], inputs)
        with torch.no_grad():
            clean = left.others["view 2"](inputs).argmax(-1)
            return (left.student(misleads_second).argmax(-1) != clean).float().mean()

    assert fooled(3.0) < fooled(0.0) - 0.03


def test_a_view_gets_the_examples_that_mislead_the_one_before_it(workshop):
    shop = workshop()
    group = _Views(
        shop, CoTrainingSettings(epsilon=0.05), build_peers(shop, 3), ["student", "2", "3"]
    )
    inputs = tuple(shop.rows.inputs[k : k + 4] for k in range(3))
    extra = group.extra_inputs(inputs)
    for number in range(3):
        # One step of epsilon on pixels is epsilon / std on what models see.
        moved = (extra[number] - inputs[number - 1]).abs()
        assert moved.max().item() == pytest.approx(0.05 / 0.25, rel=1e-4)
    assert all(parameter.grad is None for model in group.models for parameter in model.parameters())


def test_nobody_sure_enough_is_training_alone(workshop):
    shop = workshop(optimizer={"name": "sgd", "lr": 0.1})
    left = co_train(shop, threshold=1.0, difference_weight=0, kd_weight=1)
    alone = co_train(shop, kd_weight=0)
    assert left.notes["kept"] == 0
    assert alone.notes["kept"] is None
    assert weights_of(left.student).allclose(weights_of(alone.student), atol=1e-6)


def test_only_rows_without_labels_get_pseudo_labels(workshop, toy_rows, monkeypatch):
    counted = []
    module = "fedkd.distillation.methods.co_training.cross_pseudo_label_losses"
    from fedkd.distillation.methods import co_training

    original = co_training.cross_pseudo_label_losses

    def spy(logits, *, threshold):
        counted.append(logits.shape[1])
        return original(logits, threshold=threshold)

    monkeypatch.setattr(module, spy)
    co_train(workshop(rows=toy_rows(count=48, labelled=12), epochs=2))
    assert sum(counted) == 2 * 36


def test_the_kept_share_is_recorded(workshop):
    shop = workshop(epochs=5, optimizer=FAST)
    left = co_train(shop, threshold=0.5, kd_weight=1)
    shares = [row["targets/kept"] for row in shop.histories["student"].epochs]
    assert all(0 <= share <= 1 for share in shares)
    assert shares[-1] > 0.5
    assert left.notes["kept"] == shares[-1]


def test_rows_that_all_have_labels_are_refused(workshop, toy_rows):
    with pytest.raises(ValueError, match=r"data.public.size is 0"):
        co_train(workshop(rows=toy_rows(labelled=48)))


def test_adversarial_passes_leave_batch_norm_alone(workshop):
    shop = workshop(model=ModelSettings(name="cnn", options={"channels": [4], "norm": "batch"}))
    group = _Views(shop, CoTrainingSettings(), build_peers(shop, 2), ["student", "view 2"])
    before = [weights_of(model) for model in group.models]
    group.extra_inputs((shop.rows.inputs[:5], shop.rows.inputs[5:10]))
    for model, old in zip(group.models, before, strict=True):
        assert model.training
        assert torch.equal(weights_of(model), old)
        assert math.isfinite(weights_of(model).sum())
