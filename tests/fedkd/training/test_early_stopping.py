"""When training stops, and that the best weights are copies."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from fedkd.training.early_stopping import EarlyStopping, EarlyStoppingSettings


def watcher(**settings):
    return EarlyStopping(EarlyStoppingSettings(**settings))


def follow(stopping, values):
    """Return the step at which it wants to stop, or None."""
    module = nn.Linear(1, 1)
    for step, value in enumerate(values):
        stopping.update(value, module, step=step)
        if stopping.should_stop:
            return step
    return None


def test_it_stops_after_patience_checks_in_a_row_without_improvement():
    stopping = watcher(patience=2)
    assert follow(stopping, [3.0, 3.5, 2.0, 2.5, 2.1, 1.0]) == 4
    assert (stopping.best_value, stopping.best_step) == (2.0, 2)


def test_an_improvement_starts_the_count_again():
    assert follow(watcher(patience=2), [5.0, 6.0, 4.0, 6.0, 3.0, 6.0]) is None


def test_higher_is_better_where_the_mode_says_so():
    stopping = watcher(patience=1, mode="max")
    assert follow(stopping, [0.2, 0.5, 0.4]) == 2
    assert stopping.best_value == 0.5


def test_an_improvement_must_exceed_min_delta():
    stopping = watcher(patience=2, min_delta=0.5)
    # 1.5 is exactly 0.5 below 2.0: not more.
    assert follow(stopping, [2.0, 1.5, 1.75]) == 2
    assert stopping.best_step == 0


def test_equal_is_no_improvement():
    assert follow(watcher(patience=1), [1.0, 1.0]) == 1


def test_nan_is_no_improvement_and_never_the_best():
    stopping = watcher(patience=3)
    assert follow(stopping, [math.nan, 2.0, math.nan, math.nan, math.nan]) == 4
    assert stopping.best_value == 2.0


def test_later_steps_do_not_change_what_was_best():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9)
    stopping = watcher(patience=2)
    assert stopping.update(1.0, module, step=7)
    best = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    for value in (1.5, 1.2):
        optimizer.zero_grad()
        module(torch.rand(5, 3, generator=torch.Generator().manual_seed(1))).sum().backward()
        optimizer.step()
        assert not stopping.update(value, module, step=8)
    assert not torch.equal(module[0].weight, best["0.weight"])
    assert not torch.equal(module[1].running_mean, best["1.running_mean"])

    stopping.restore(module)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, best[name]), name
    # What was restored is a copy too: training on must not reach the best weights.
    with torch.no_grad():
        module[0].weight.zero_()
    stopping.restore(module)
    assert torch.equal(module[0].weight, best["0.weight"])


def test_there_is_nothing_to_restore_before_the_first_number():
    stopping = watcher()
    stopping.update(math.nan, nn.Linear(1, 1), step=0)
    with pytest.raises(ValueError, match="no best weights yet"):
        stopping.restore(nn.Linear(1, 1))


@pytest.mark.parametrize("wrong", [{"patience": 0}, {"min_delta": -1.0}, {"mode": "best"}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        EarlyStoppingSettings(**wrong)
