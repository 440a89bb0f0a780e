"""Optimizers: the settings, the learning rate of each step, and memory that travels."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedkd.models import ModelSettings
from fedkd.training import ClientState, ModelPool, OptimizerSettings, Passes, supervised

WITH_MEMORY = {
    "momentum": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
    "nesterov": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True},
    "adam": {"name": "adam", "lr": 0.01},
    "adamw": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "rmsprop": {"name": "rmsprop", "lr": 0.01},
    "rmsprop with momentum": {"name": "rmsprop", "lr": 0.01, "momentum": 0.5},
}


def sgd_of_torch(parameters, options, fused):
    return torch.optim.SGD(parameters, **options, fused=fused)


def rmsprop_of_torch(parameters, options, fused):
    return torch.optim.RMSprop(parameters, **options)


OF_TORCH = {
    "sgd": sgd_of_torch,
    "adam": lambda parameters, options, fused: torch.optim.Adam(parameters, **options, fused=fused),
    "adamw": lambda parameters, options, fused: torch.optim.AdamW(
        parameters, **options, fused=fused
    ),
    "rmsprop": rmsprop_of_torch,
}
OPTIONS = [
    {"name": name, "lr": 0.03, "weight_decay": decay, **momentum}
    for name in OF_TORCH
    for decay in (0.0, 0.2)
    for momentum in (
        {"sgd": ({}, {"momentum": 0.9}, {"momentum": 0.7, "nesterov": True})}
        | {"rmsprop": ({}, {"momentum": 0.5})}
    ).get(name, ({},))
]


def parameters_of(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    shapes = ((7, 5), (5,), (2, 3, 4))
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes
    ]


def train(optimizer, parameters, *, rests=None, steps=5):
    """Take steps with gradients that depend on the parameters; one of them may rest at first."""
    for step in range(steps):
        optimizer.zero_grad()
        for position, parameter in enumerate(parameters):
            if position != rests or step >= 2:
                loss = (parameter.sin() * (position + step + 1)).sum()
                loss.backward()
        optimizer.param_groups[0]["lr"] = 0.03 / (1 + step)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_optimizer_has_the_bits_of_torch(options, fused, dtype):
    settings = OptimizerSettings.model_validate(options)
    plain = {key: value for key, value in options.items() if key != "name"}
    ours, theirs = parameters_of(dtype), parameters_of(dtype)
    optimizer = settings.build(ours, fused=fused)
    oracle = OF_TORCH[settings.name](theirs, plain, True if fused else None)
    train(optimizer, ours)
    train(oracle, theirs)
    for own, expected in zip(ours, theirs, strict=True):
        assert torch.equal(own, expected)
        slots, of_torch = optimizer.state.get(own, {}), oracle.state.get(expected, {})
        # torch notes that plain SGD remembers nothing.
        assert slots.keys() == {slot for slot, value in of_torch.items() if value is not None}
        for slot, value in slots.items():
            assert torch.equal(value, of_torch[slot])
            assert (value.dtype, value.device) == (of_torch[slot].dtype, of_torch[slot].device)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_parameter_may_get_its_first_gradient_later_than_others(options, fused):
    # torch's fused SGD with momentum fails here; a parameter alone is what it should be.
    settings = OptimizerSettings.model_validate(options)
    together, alone = parameters_of(), parameters_of()
    train(settings.build(together, fused=fused), together, rests=1)
    for position, parameter in enumerate(alone):
        train(settings.build([parameter], fused=fused), alone, rests=1)
        assert torch.equal(together[position], parameter)


@given(
    options=st.sampled_from([each for each in OPTIONS if each["name"] != "rmsprop"]),
    shape=st.lists(st.integers(1, 5), min_size=4, max_size=4),
    steps=st.integers(1, 6),
    lies=st.sampled_from(["as the weights", "channels last", "channels first", "backwards"]),
    weights_last=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=200, deadline=None)
def test_fused_updates_are_the_plain_formula_however_gradients_lie(
    options, shape, steps, lies, weights_last, seed
):
    draw = torch.Generator().manual_seed(seed)
    start = torch.randn(shape, generator=draw, dtype=torch.float64)
    formats = {True: torch.channels_last, False: torch.contiguous_format}
    ours = torch.nn.Parameter(start.clone(memory_format=formats[weights_last]))
    plain = torch.nn.Parameter(start.clone())
    chosen = OptimizerSettings.model_validate(options)
    optimizer, slow = chosen.build([ours], fused=True), chosen.build([plain])
    for _ in range(steps):
        gradient = torch.randn(shape, generator=draw, dtype=torch.float64)
        plain.grad = gradient
        ours.grad = {
            "as the weights": lambda g: g.clone(memory_format=formats[weights_last]),
            "channels last": lambda g: g.clone(memory_format=torch.channels_last),
            "channels first": lambda g: g.clone(),
            "backwards": lambda g: g.permute(3, 2, 1, 0).clone().permute(3, 2, 1, 0),
        }[lies](gradient)
        optimizer.step()
        slow.step()
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)
    for slot, values in slow.state[plain].items():
        torch.testing.assert_close(
            optimizer.state[ours][slot], values, rtol=1e-9, atol=1e-9, check_dtype=False
        )


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_what_torch_cannot_fuse_goes_by_the_plain_formula(name):
    ours, plain = (torch.nn.Parameter(torch.ones(3, dtype=torch.complex64)) for _ in range(2))
    chosen = OptimizerSettings(name=name, lr=0.1)
    for parameter, fused in ((ours, True), (plain, False)):
        optimizer = chosen.build([parameter], fused=fused)
        parameter.grad = torch.full_like(parameter, 2 + 1j)
        optimizer.step()
    assert torch.equal(ours, plain)
    assert not torch.equal(ours, torch.ones(3, dtype=torch.complex64))


def test_sparse_gradients_go_by_the_plain_formula():
    tables = [torch.nn.Embedding(4, 2, sparse=True) for _ in range(2)]
    tables[1].load_state_dict(tables[0].state_dict())
    for table, fused in zip(tables, (True, False), strict=True):
        optimizer = OptimizerSettings(name="sgd", lr=0.1).build(table.parameters(), fused=fused)
        table(torch.tensor([1, 3])).sum().backward()
        optimizer.step()
    assert torch.equal(tables[0].weight, tables[1].weight)


def test_groups_have_learning_rates_of_their_own():
    slow, fast = parameters_of()[:2], parameters_of()[:2]
    groups = [{"params": slow[:1], "lr": 0.01}, {"params": slow[1:]}]
    optimizer = OptimizerSettings(name="sgd", lr=0.5).build(groups)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.5]
    for parameter in slow:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter, before, rate in zip(slow, fast, (0.01, 0.5), strict=True):
        assert torch.allclose(parameter, before - rate)


def test_training_leaves_the_compiler_of_torch_out():
    program = (
        "import sys, torch\n"
        "from fedkd.training import OptimizerSettings\n"
        "for name in ('sgd', 'adam', 'adamw', 'rmsprop'):\n"
        "    for fused in (False, True):\n"
        "        weight = torch.ones(2, requires_grad=True)\n"
        "        optimizer = OptimizerSettings(name=name).build([weight], fused=fused)\n"
        "        optimizer.zero_grad()\n"
        "        weight.sum().backward()\n"
        "        optimizer.step()\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout == "False\n"


@pytest.mark.parametrize("model", ["mlp", "lenet"])
@pytest.mark.parametrize("options", WITH_MEMORY.values(), ids=WITH_MEMORY.keys())
def test_two_steps_and_two_more_through_a_state_are_four_steps(
    make_cohort, tensors, same_bits, options, model
):
    optimizer, data = OptimizerSettings.model_validate(options), tensors()
    pool = ModelPool(data, optimizer)
    # One row four times: all batches are equal, whatever their order.
    row = {"rows": np.full(4, 5), "optimizer": optimizer, "data": data, "pool": pool}
    row["model"] = ModelSettings(name=model)
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
