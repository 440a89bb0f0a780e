"""Gradient rules: by hand, against plain PyTorch, and in both backends."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from own_objectives import distilled

from fedkd.models import ModelSettings, build_model
from fedkd.targets import Targets
from fedkd.training import (
    LoopCohort,
    Member,
    ModelPool,
    OptimizerSettings,
    Passes,
    Plain,
    Proximal,
    PublicLesson,
    Streams,
    TrainingData,
    VmapCohort,
    supervised,
)
from fedkd.training.gradients import Anchor

SIZES = (13, 21, 5)
SGD = OptimizerSettings(name="sgd", lr=0.05)
PASSES = Passes(batch_size=8)
MLP = ModelSettings(name="mlp", options={"hidden": [20]})
BACKENDS = pytest.mark.parametrize("kind", [LoopCohort, VmapCohort], ids=["loop", "vmap"])


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def rows_of(sizes=SIZES):
    draw = torch.Generator().manual_seed(0)
    return TrainingData(
        train_inputs=torch.randn(sum(sizes), 1, 8, 8, generator=draw),
        train_labels=torch.randint(3, (sum(sizes),), generator=draw),
        public_inputs=torch.randn(20, 1, 8, 8, generator=draw),
        public_labels=torch.randint(3, (20,), generator=draw),
        num_classes=3,
    )


def cohort_of(kind, *, model=MLP, sizes=SIZES, optimizer=SGD):
    data, ends = rows_of(sizes), np.cumsum(sizes)
    members = [
        Member(client, np.arange(end - size, end))
        for client, (end, size) in enumerate(zip(ends, sizes, strict=True))
    ]
    return kind(
        members,
        model=model,
        optimizer=optimizer,
        data=data,
        pool=ModelPool(data, optimizer),
        streams=Streams(seed=7),
    )


def lesson():
    soft = torch.softmax(torch.randn(9, 3, generator=torch.Generator().manual_seed(2)), -1)
    targets = Targets(soft.numpy(), scale="probabilities", temperature=2.0)
    return PublicLesson(rows=np.arange(9), targets=targets, passes=PASSES)


def arrays_of(cohort):
    states = [state.to_arrays() for state in cohort.states()]
    return states, cohort.metrics()


def difference(one, other):
    largest = 0.0
    for mine, others in zip(arrays_of(one), arrays_of(other), strict=True):
        for own, their in zip(mine, others, strict=True):
            assert own.keys() == their.keys()
            largest = max(largest, *(float(np.abs(own[key] - their[key]).max()) for key in own))
    return largest


# -- proximal ----------------------------------------------------------------------------------


def test_the_proximal_term_by_hand():
    # mu / 2 * (.5^2 + 1^2 + .5^2) = 0.05 * 1.5, and mu * (w - w0).
    start, now = torch.tensor([0.5, -1.0, 0.0]), torch.tensor([1.0, -2.0, 0.5])
    anchor = Anchor.of(Proximal(mu=0.1), [start])
    start.zero_()  # what it remembers is its own
    assert anchor.penalty([now], stacked=False).item() == pytest.approx(0.075)
    (gradient,) = anchor.pulled([torch.zeros(3)], [now])
    assert gradient.tolist() == pytest.approx([0.05, -0.1, 0.05])
    stacked = Anchor.of(Proximal(mu=0.1), [torch.tensor([[0.5, -1.0, 0.0]] * 2)])
    both = torch.stack([now, torch.tensor([0.5, -1.0, 0.0])])
    assert stacked.penalty([both], stacked=True).tolist() == pytest.approx([0.075, 0.0])
    assert stacked.of_members(slice(1, 2)).penalty([both[1:]], stacked=True).tolist() == [0.0]


@BACKENDS
def test_steps_are_those_of_the_loss_with_its_penalty(kind):
    cohort = cohort_of(kind, sizes=(16,))
    before = cohort.weights()[0]
    passes = Passes(batch_size=16, steps=4)
    cohort.fit(supervised, private=passes, gradient=Proximal(mu=0.7))
    data = rows_of((16,))
    model = build_model(MLP, input_shape=(1, 8, 8), num_classes=3, seed=0)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in before.items()})
    start = copy.deepcopy(model)
    penalties = []
    for _ in range(4):
        pairs = zip(model.parameters(), start.parameters(), strict=True)
        penalty = 0.35 * sum((now - was.detach()).square().sum() for now, was in pairs)
        penalties.append(penalty.item())
        loss = F.cross_entropy(model(data.train_inputs), data.train_labels) + penalty
        for parameter, slope in zip(
            model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            parameter.data -= 0.05 * slope
    for name, array in cohort.weights()[0].items():
        np.testing.assert_allclose(array, model.state_dict()[name].numpy(), atol=1e-6)
    assert cohort.metrics()[0]["loss/proximal"] == pytest.approx(np.mean(penalties), rel=1e-4)


@pytest.mark.parametrize(
    "options", [{"private": PASSES}, {"private": PASSES, "public": "lesson"}], ids=["own", "both"]
)
def test_the_backends_agree_on_the_proximal_rule(options):
    if "public" in options:
        options = {**options, "public": lesson()}
    momentum = OptimizerSettings(name="sgd", lr=0.05, momentum=0.9)
    cohorts = [cohort_of(kind, optimizer=momentum) for kind in (LoopCohort, VmapCohort)]
    objective = partial(distilled, temperature=2.0)
    for cohort in cohorts:
        for _ in range(2):
            cohort.fit(objective, gradient=Proximal(mu=0.5), **options)
    assert difference(*cohorts) < 1e-6


@BACKENDS
def test_without_weight_the_rule_is_plain_bit_for_bit_and_with_one_it_holds(kind, same_bits):
    weights = []
    for rule in (Plain(), Proximal(mu=0.0), Proximal(mu=10.0)):
        cohort = cohort_of(kind)
        start = cohort.weights()[0]
        cohort.fit(supervised, private=PASSES, gradient=rule)
        weights.append(cohort.weights()[0])
    plain, nothing, held = weights
    assert same_bits(plain, nothing)

    def moved(now):
        return sum(float(np.square(now[name] - start[name]).sum()) for name in start)

    assert 0 < moved(held) < 0.9 * moved(plain)


def test_a_negative_pull_is_refused():
    with pytest.raises(ValueError, match=r"mu must be >= 0 and finite, got -0\.1"):
        Proximal(mu=-0.1)
