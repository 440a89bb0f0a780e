"""Epochs of a training: means over their steps, and the weights that are kept."""

import pytest
import torch
from torch import nn

from fedkd.distillation.fit.epochs import FitRecord, epoch_means
from fedkd.distillation.task.participants import TrainingSettings


def test_means_name_losses_and_leave_other_names():
    recorded = {"ce": torch.tensor([1.0, 3.0]), "targets/kept": torch.tensor([0.0, 1.0])}
    assert epoch_means(recorded) == {"loss/ce": 2.0, "targets/kept": 0.5}


def test_each_model_gets_its_own_numbers_and_those_of_all():
    recorded = {"ce": torch.tensor([[1.0, 10.0], [3.0, 30.0]]), "gate": torch.tensor([4.0, 6.0])}
    assert epoch_means(recorded, model=0) == {"loss/ce": 2.0, "loss/gate": 5.0}
    assert epoch_means(recorded, model=1) == {"loss/ce": 20.0, "loss/gate": 5.0}


@pytest.mark.parametrize(
    ("mode", "values", "best"), [("max", [0.1, 0.5, 0.2, 0.3], 2), ("min", [3.0, 1.0, 2.0, 2.0], 2)]
)
def test_a_record_stops_and_gives_the_best_weights_back(mode, values, best):
    training = TrainingSettings(epochs=9, early_stopping={"patience": 2, "mode": mode})
    told = []
    record, model = FitRecord(training, told.append), nn.Linear(1, 1)
    watched = "validation_loss" if mode == "min" else "validation_accuracy"
    for epoch, value in enumerate(values, start=1):
        assert not record.stopped
        with torch.no_grad():
            model.weight.fill_(epoch)
        record.close_epoch({"epoch": epoch, watched: value}, model)
    assert record.stopped
    record.restore_best(model)
    assert model.weight.item() == best
    assert record.history.best_epoch == best
    assert told[0] == {"epochs": 9, "epoch": 1, watched: values[0]}


def test_without_early_stopping_the_last_weights_stay():
    record, model = FitRecord(TrainingSettings(epochs=2), lambda row: None), nn.Linear(1, 1)
    record.close_epoch({"epoch": 1}, model)
    before = model.weight.item()
    record.restore_best(model)
    assert not record.stopped
    assert (model.weight.item(), record.history.best_epoch) == (before, None)
