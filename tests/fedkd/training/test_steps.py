"""The stepping core: where in the run a step is, what moves in it, what is written down."""

import math

import pytest
import torch
from torch import nn

from fedkd.models.dropout import SeededDropout, connect_dropout, step_keys
from fedkd.schedules import LinearSchedule
from fedkd.training import OptimizerSettings, Streams
from fedkd.training.steps import (
    RatedOptimizer,
    StepRecords,
    Steps,
    backward,
    diverged,
    fraction_done,
    fraction_of_rounds,
)

FALLING = OptimizerSettings(name="sgd", lr=0.5, decay=LinearSchedule(start=1.0, end=0.0))
PLAIN = OptimizerSettings(name="sgd", lr=0.5)


def rated(parameters, settings=PLAIN, steps=3):
    return RatedOptimizer(settings.build(parameters), settings, steps)


def weight(value=1.0):
    return torch.tensor([value], requires_grad=True)


# --- progress


@pytest.mark.parametrize("steps", [2, 3, 100])
def test_progress_is_0_at_the_first_step_and_1_at_the_last(steps):
    done = [fraction_done(step, steps) for step in range(steps)]
    assert (done[0], done[-1]) == (0, 1)
    assert done == sorted(done)


def test_the_only_step_is_the_first():
    assert fraction_done(0, 1) == 0
    assert fraction_of_rounds(0, 1, round=1, rounds=1) == 0


@pytest.mark.parametrize(("steps", "rounds"), [(1, 4), (5, 1), (5, 3)])
def test_progress_over_rounds_is_0_at_the_first_step_and_1_at_the_last(steps, rounds):
    done = [
        fraction_of_rounds(step, steps, round=round, rounds=rounds)
        for round in range(1, rounds + 1)
        for step in range(steps)
    ]
    assert done == [fraction_done(step, steps * rounds) for step in range(steps * rounds)]


def test_a_cohort_s_steps_are_where_their_round_is_in_the_run():
    done = [
        Streams(seed=0, round=round, rounds=3).progress(step, 4)
        for round in (1, 2, 3)
        for step in range(4)
    ]
    assert done == [fraction_done(step, 12) for step in range(12)]


# --- a step


def test_a_step_moves_down_the_sum_of_the_losses():
    first, second = weight(1.0), weight(2.0)
    steps = Steps([rated([first]), rated([second])], 1)
    for _ in steps:
        steps.descend({"a": (3 * first).sum(), "b": first.sum() + 4 * second.sum()})
    # 1 - 0.5 * (3 + 1) and 2 - 0.5 * 4
    assert (first.item(), second.item()) == (-1.0, 0.0)


def test_gradients_of_the_step_before_do_not_count():
    once = weight()
    steps = Steps([rated([once], steps=2)], 2)
    for step in steps:
        steps.descend({"a": (once if step.number == 0 else 0 * once).sum()})
    assert once.item() == 0.5


def test_a_vector_of_losses_counts_as_its_sum():
    pair = torch.tensor([1.0, 1.0], requires_grad=True)
    backward({"each": pair * torch.tensor([1.0, 2.0]), "all": pair.sum()})
    assert pair.grad.tolist() == [2.0, 3.0]


def test_a_step_without_a_loss_moves_nothing():
    settings = OptimizerSettings(name="adam", lr=0.1, weight_decay=0.5)
    resting = weight()
    optimizer = rated([resting], settings)
    steps = Steps([optimizer], 2)
    for step in steps:
        steps.descend({"a": resting.sum()} if step.number == 0 else {})
        after = resting.item() if step.number == 0 else after
    assert resting.item() == after
    assert len(steps.records.take()["a"]) == 1


def test_another_rule_gives_the_gradients():
    clipped = weight()

    def sign_only(losses):
        backward(losses)
        clipped.grad.sign_()

    steps = Steps([rated([clipped])], 1, gradient=sign_only)
    for _ in steps:
        steps.descend({"a": 100 * clipped.sum()})
    assert clipped.item() == 0.5


# --- learning rates


def test_the_learning_rate_is_that_at_the_step():
    optimizer = rated([weight()], FALLING)
    steps = Steps([optimizer], 3)
    rates = [(optimizer.rate, optimizer.optimizer.param_groups[0]["lr"]) for _ in steps]
    assert rates == [(0.5, 0.5), (0.25, 0.25), (0.0, 0.0)]


def test_a_used_optimizer_gets_the_rate_of_its_new_training():
    built = PLAIN.build([weight()])
    built.param_groups[0]["lr"] = 77.0
    next(iter(Steps([RatedOptimizer(built, PLAIN, 1)], 1)))
    assert built.param_groups[0]["lr"] == 0.5


def test_progress_can_be_that_of_a_longer_run():
    optimizer = rated([weight()], FALLING, steps=2)

    def in_the_second_of_two_rounds(step, steps):
        return fraction_of_rounds(step, steps, round=2, rounds=2)

    steps = Steps([optimizer], 2, progress=in_the_second_of_two_rounds)
    assert [step.progress for step in steps] == pytest.approx([2 / 3, 1])
    assert optimizer.rate == 0


def test_some_of_the_steps_can_be_taken_apart():
    numbers = [
        (step.number, step.progress)
        for part in (range(2), range(2, 5))
        for step in Steps([], 5, numbers=part)
    ]
    assert numbers == [(0, 0), (1, 0.25), (2, 0.5), (3, 0.75), (4, 1)]


# --- epochs and records


def test_the_last_step_of_an_epoch_says_so():
    assert [step.epoch for step in Steps([], 6, epochs=3)] == [None, 1, None, 2, None, 3]
    assert [step.epoch for step in Steps([], 2)] == [None, None]


def test_records_are_what_the_steps_put_out_since_they_were_taken():
    own = weight()
    steps = Steps([rated([own], steps=4)], 4, epochs=2)
    taken = []
    for step in steps:
        steps.descend({"a": float(step.number) * own.sum().detach() + 0 * own.sum()})
        steps.records.add("seen", torch.tensor([1.0, 2.0]))
        if step.epoch:
            taken.append(steps.records.take())
    assert [len(each["a"]) for each in taken] == [2, 2]
    assert taken[1]["seen"].tolist() == [[1, 2], [1, 2]]
    assert not taken[0]["a"].requires_grad
    assert steps.records.take() == {}


def test_records_can_go_on_from_an_earlier_training():
    records, own = StepRecords(), weight()
    for _ in range(2):
        steps = Steps([rated([own])], 3, records=records)
        for _ in steps:
            steps.descend({"a": own.sum()})
    assert len(records.stacked()["a"]) == 6


def test_a_loss_that_is_no_number_is_named():
    row = {"loss/ce": 1.0, "loss/kd": math.nan, "validation_loss": math.nan}
    assert diverged(row) == "loss/kd"
    assert diverged({"loss/ce": 1.0, "validation_loss": math.inf}) is None


# --- dropout


def test_dropout_draws_by_model_and_step_and_rests_between():
    model = nn.Sequential(SeededDropout(0.5))
    stream = connect_dropout(model)
    keys = torch.from_numpy(step_keys(3, 2))
    steps = Steps([], 2, dropout=[None, stream], keys=keys)
    drawn, ones = [], torch.ones(1, 64)
    for step in steps:
        drawn.append(model(ones))
        stream.begin(keys[step.number], model=1)
        assert torch.equal(model(ones), drawn[-1])
        steps.descend({})
        assert stream.key is None
    assert not torch.equal(*drawn)
