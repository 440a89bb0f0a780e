"""PCL: running means are kept, a joined classifier teaches."""

import pytest
import torch
from torch import nn

from fedkd.distillation.fit.group import fit_group
from fedkd.distillation.methods import METHODS
from fedkd.distillation.methods.pcl import PCLSettings, _PeersWithMeans
from fedkd.distillation.methods.peers import build_peers
from fedkd.models import ModelSettings

FAST = {"name": "adam", "lr": 0.01}
BATCH_NORM = ModelSettings(name="cnn", options={"channels": [4], "norm": "batch"})
DEEP = ModelSettings(name="mlp", options={"hidden": [8, 6]})


def weights_of(model):
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


def run(shop, name, **settings):
    method = METHODS[name]
    return method(method.Settings(name=name, **settings)).run(shop)


def _labels(objective):
    return type(objective).model_validate({"ce": 1})


def test_without_memory_the_running_mean_is_the_peer_itself(workshop):
    shop = workshop(model=BATCH_NORM)
    for decay, same in ((0.0, True), (0.9, False)):
        group = _PeersWithMeans(
            shop, PCLSettings(decay=decay), build_peers(shop, 2), ["student", "mean teacher 2"]
        )
        fit_group(group)
        pairs = zip(group.judged, group.models, strict=True)
        assert all(mean is not model for mean, model in pairs)
        distance = (weights_of(group.judged[0]) - weights_of(group.models[0])).abs().max()
        assert (distance < 1e-6) == same


def test_the_running_mean_is_what_is_kept(workshop):
    shop = workshop()
    left = run(shop, "pcl")
    assert left.student.state_dict().keys() == shop.new_student().state_dict().keys()
    rows = shop.histories["student"].epochs
    logits = left.student(shop.rows.validation_inputs)
    loss = nn.functional.cross_entropy(logits, shop.rows.validation_labels)
    assert rows[-1]["validation_loss"] == pytest.approx(loss.item(), abs=1e-6)


def test_collaborating_peers_agree_more(workshop, hard_rows):
    alone, together = (
        run(
            workshop(rows=hard_rows(), epochs=20, optimizer=FAST), "pcl", kd_weight=weight, decay=0
        ).notes["disagreement"]
        for weight in (0, 5)
    )
    assert together < 0.8 * alone


def test_the_joined_classifier_leaves_peers_alone_while_they_train_alone(workshop):
    shop = workshop()
    group = _PeersWithMeans(
        shop, PCLSettings(kd_weight=0), build_peers(shop, 2), ["student", "mean teacher 2"]
    )
    before = weights_of(group.classifier)
    fit_group(group)
    assert not torch.equal(before, weights_of(group.classifier))
    for number, model in enumerate(group.models):
        alone = shop.new_student(number)
        shop.fit(alone, name="alone", teacher=None, objective=_labels(shop.objective))
        assert torch.equal(weights_of(model), weights_of(alone))


def test_peers_of_different_widths_are_joined(workshop):
    left = run(workshop(), "pcl", peers=3, models=(DEEP, BATCH_NORM), kd_weight=1)
    assert weights_of(left.student).isfinite().all()
