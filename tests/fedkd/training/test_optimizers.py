"""Optimizers: the settings, the learning rate of each step, and memory that travels."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fedkd.training import ClientState, ModelPool, OptimizerSettings, Passes, supervised

WITH_MEMORY = {
    "momentum": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
    "nesterov": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True},
    "adam": {"name": "adam", "lr": 0.01},
    "adamw": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "rmsprop": {"name": "rmsprop", "lr": 0.01},
    "rmsprop with momentum": {"name": "rmsprop", "lr": 0.01, "momentum": 0.5},
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sgd", torch.optim.SGD),
        ("adam", torch.optim.Adam),
        ("adamw", torch.optim.AdamW),
        ("rmsprop", torch.optim.RMSprop),
    ],
)
def test_every_name_builds_its_optimizer(name, kind):
    settings = OptimizerSettings(name=name, lr=0.02, weight_decay=0.3)
    optimizer = settings.build([torch.nn.Parameter(torch.zeros(2))])
    assert type(optimizer) is kind
    assert optimizer.param_groups[0]["lr"] == 0.02
    assert optimizer.param_groups[0]["weight_decay"] == 0.3


def test_momentum_reaches_the_optimizer():
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    sgd = OptimizerSettings(name="sgd", momentum=0.7, nesterov=True).build(parameters)
    assert (sgd.param_groups[0]["momentum"], sgd.param_groups[0]["nesterov"]) == (0.7, True)
    rmsprop = OptimizerSettings(name="rmsprop", momentum=0.6).build(parameters)
    assert rmsprop.param_groups[0]["momentum"] == 0.6


@pytest.mark.parametrize("options", WITH_MEMORY.values(), ids=WITH_MEMORY.keys())
def test_two_steps_and_two_more_through_a_state_are_four_steps(
    make_cohort, tensors, same_bits, options
):
    optimizer, data = OptimizerSettings.model_validate(options), tensors()
    pool = ModelPool(data, optimizer)
    # One row four times: all batches are equal, whatever their order.
    row = {"rows": np.full(4, 5), "optimizer": optimizer, "data": data, "pool": pool}
    two, four = (Passes(batch_size=4, steps=steps) for steps in (2, 4))

    whole = make_cohort(**row)
    whole.fit(supervised, private=four)
    expected = whole.states()[0].to_arrays()

    first = make_cohort(**row)
    first.fit(supervised, private=two)
    carried = ClientState.from_arrays(first.states()[0].to_arrays())
    # Somebody else uses the slot in between.
    make_cohort((3,), **row).fit(supervised, private=four)
    second = make_cohort(states=[carried], **row)
    second.fit(supervised, private=two)

    assert same_bits(second.states()[0].to_arrays(), expected)


@pytest.mark.parametrize("options", WITH_MEMORY.values(), ids=WITH_MEMORY.keys())
def test_a_reset_optimizer_remembers_nothing(make_cohort, same_bits, options):
    optimizer = OptimizerSettings.model_validate(options)
    row = {"rows": np.full(4, 5), "optimizer": optimizer}
    two = Passes(batch_size=4, steps=2)
    first = make_cohort(**row)
    first.fit(supervised, private=two)
    (state,) = first.states()

    second = make_cohort(states=[state], **row)
    second.reset_optimizers()
    assert second.states()[0].models["model"].optimizer == {}
    second.fit(supervised, private=two)

    forgetful = make_cohort(**row)
    forgetful.load_weights(first.weights()[0])
    forgetful.fit(supervised, private=two)
    assert same_bits(second.weights()[0], forgetful.weights()[0])

    remembering = make_cohort(states=[state], **row)
    remembering.fit(supervised, private=two)
    assert not same_bits(second.weights()[0], remembering.weights()[0])


def test_plain_sgd_has_no_memory_to_carry(make_cohort):
    cohort = make_cohort(optimizer=OptimizerSettings(name="sgd", lr=0.1))
    cohort.fit(supervised, private=Passes(batch_size=4))
    assert cohort.states()[0].models["model"].optimizer == {}


def test_learning_rate_is_constant_by_default():
    settings = OptimizerSettings(lr=0.5)
    assert [settings.learning_rate(x) for x in (0.0, 0.3, 1.0)] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("progress", "expected"), [(0.0, 0.0), (0.05, 0.25), (0.2, 1.0), (0.7, 1.0), (1.0, 1.0)]
)
def test_warm_up_rises_in_a_straight_line_to_the_base_rate(progress, expected):
    settings = OptimizerSettings(lr=2.0, warm_up=0.2)
    assert settings.learning_rate(progress) == pytest.approx(2 * expected)


@pytest.mark.parametrize(
    ("decay", "values"),
    [
        ({"kind": "cosine", "start": 1.0, "end": 0.0}, {0.0: 0.4, 0.5: 0.2, 1.0: 0.0}),
        ({"kind": "linear", "start": 1.0, "end": 0.5}, {0.0: 0.4, 0.5: 0.3, 1.0: 0.2}),
        (
            {"kind": "step", "values": [1.0, 0.1], "milestones": [0.5]},
            {0.0: 0.4, 0.49: 0.4, 0.5: 0.04, 1.0: 0.04},
        ),
        (0.25, {0.0: 0.1, 1.0: 0.1}),
    ],
)
def test_decay_is_a_factor_on_the_base_rate(decay, values):
    settings = OptimizerSettings.model_validate({"lr": 0.4, "decay": decay})
    for progress, expected in values.items():
        assert settings.learning_rate(progress) == pytest.approx(expected)


def test_warm_up_and_decay_multiply():
    decay = {"kind": "linear", "start": 1.0, "end": 0.0}
    settings = OptimizerSettings.model_validate({"lr": 1.0, "warm_up": 0.5, "decay": decay})
    assert settings.learning_rate(0.25) == pytest.approx(0.5 * 0.75)
    assert settings.learning_rate(0.75) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"momentum": 0.9}, "momentum belongs to sgd or rmsprop, got 0.9 with adam"),
        ({"name": "sgd", "nesterov": True}, "nesterov needs name: sgd and momentum > 0"),
        (
            {"name": "rmsprop", "momentum": 0.5, "nesterov": True},
            "nesterov needs name: sgd and momentum > 0",
        ),
        ({"lr": 0.0}, "lr"),
        ({"lr": float("inf")}, "lr"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"warm_up": 1.0}, "warm_up"),
        ({"name": "adma"}, "name"),
        ({"learning_rate": 0.1}, "learning_rate"),
        ({"decay": {"kind": "linear", "start": 1.0, "end": -1.0}}, "decay"),
    ],
)
def test_refuses_what_cannot_work(options, text):
    with pytest.raises(ValidationError, match=text):
        OptimizerSettings.model_validate(options)
