"""The vmap backend: what the loop computes, whatever the sizes, the order and the model."""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from own_objectives import distilled
from torch import nn

from fedkd.losses.distances import logit_l1_rows, logit_mse_rows
from fedkd.losses.response import hard_label_rows
from fedkd.models import ModelSettings
from fedkd.randomness import Purpose
from fedkd.targets import Targets
from fedkd.training import (
    ClientState,
    LoopCohort,
    Member,
    ModelPool,
    OptimizerSettings,
    Passes,
    PerRow,
    PublicLesson,
    Streams,
    TrainingData,
    VmapCohort,
    VmapUnsupportedError,
    WholeStep,
    supervised,
    supervised_public,
)

EQUAL, UNEQUAL = (20, 20, 20), (13, 21, 5)
SGD = OptimizerSettings(name="sgd", lr=0.05, momentum=0.9)
PASSES = Passes(batch_size=8)


@pytest.fixture
def double():
    """Compute in float64, where only different arithmetic makes a difference.

    In float32 a rounding error decides now and then on which side of zero a ReLU's input lies,
    and Adam blows up rounding errors of gradients that are exactly zero in theory, such as those
    of a bias in front of a BatchNorm or of the keys' bias in attention.
    """
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def rows_of(sizes, *, dtype=None, seed=0, shape=(1, 8, 8), classes=3):
    """Return noise: private rows for clients of these sizes, and 20 labelled public rows."""
    draw = torch.Generator().manual_seed(seed)
    dtype = dtype or torch.get_default_dtype()
    return TrainingData(
        train_inputs=torch.randn(sum(sizes), *shape, generator=draw, dtype=dtype),
        train_labels=torch.randint(classes, (sum(sizes),), generator=draw),
        public_inputs=torch.randn(20, *shape, generator=draw, dtype=dtype),
        public_labels=torch.randint(classes, (20,), generator=draw),
        num_classes=classes,
    )


def members_of(sizes, states=None):
    ends = np.cumsum(sizes)
    return [
        Member(client, np.arange(end - size, end), None if states is None else states[client])
        for client, (end, size) in enumerate(zip(ends, sizes, strict=True))
    ]


def cohort_of(kind, sizes, *, data, model, optimizer=SGD, states=None, order=None, **streams):
    members = members_of(sizes, states)
    return kind(
        members if order is None else [members[at] for at in order],
        model=model,
        optimizer=optimizer,
        data=data,
        pool=ModelPool(data, optimizer),
        streams=Streams(**{"seed": 7, **streams}),
    )


def lesson(*, members=None, logits=False, seed=3, batch_size=8):
    rows = np.array([1, 2, 4, 5, 8, 9, 11, 12, 15, 19])
    shape = (len(rows), 3) if members is None else (members, len(rows), 3)
    scores = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    targets = Targets(scores.numpy())
    if not logits:
        targets = Targets(F.softmax(scores, -1).numpy(), scale="probabilities", temperature=2.0)
    return PublicLesson(rows=rows, targets=targets, passes=Passes(batch_size=batch_size))


def largest_difference(one, other):
    """Return the largest difference of any number in two tables of arrays with the same names."""
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert np.shape(array) == np.shape(other[name]), name
        # torch counts steps in its default type, but for fused updates always in float32.
        if "/step/" not in name or torch.get_default_dtype() == torch.float32:
            assert np.asarray(array).dtype == np.asarray(other[name]).dtype, name
    return max((float(np.abs(one[name] - other[name]).max()) for name in one), default=0.0)


def differences(one, other):
    """Compare everything that two cohorts of the same members can show."""
    assert one.clients == other.clients
    pairs = [
        *zip(
            (state.to_arrays() for state in one.states()),
            (state.to_arrays() for state in other.states()),
            strict=True,
        ),
        *zip(one.metrics(), other.metrics(), strict=True),
    ]
    predictions = [cohort.predict_public(np.array([3, 0, 7])) for cohort in (one, other)]
    return max(
        *(largest_difference(*pair) for pair in pairs),
        float(np.abs(predictions[0] - predictions[1]).max()),
    )


def both(sizes, work, **options):
    """Let both kinds of cohort do the same work and return how much they differ."""
    options.setdefault("data", rows_of(sizes))
    cohorts = [cohort_of(kind, sizes, **options) for kind in (LoopCohort, VmapCohort)]
    for cohort in cohorts:
        work(cohort)
    return differences(*cohorts)


ARCHITECTURES = [
    ("mlp", {"hidden": [20]}),
    ("mlp", {"hidden": [16], "dropout": 0.5}),
    ("mlp", {"hidden": []}),
    ("cnn", {"channels": [4]}),
    ("cnn", {"channels": [4], "norm": "batch"}),
    ("cnn", {"channels": [8], "norm": "group"}),
    ("lenet", {}),
    ("resnet8", {"width": 8}),
    ("resnet8", {"width": 4, "norm": "batch"}),
    ("resnet20", {"width": 4, "norm": "batch"}),
    ("gru", {"hidden": 12}),
    ("lstm", {"hidden": 12, "layers": 2}),
    ("transformer", {"dim": 16, "depth": 1}),
    ("transformer", {"dim": 8, "dropout": 0.3}),
    ("tutorial_student", {}),
    ("tutorial_teacher", {}),
]
IDS = [" ".join([name, *map(str, options.values())]) for name, options in ARCHITECTURES]
SLOW = {"resnet20", "tutorial_teacher"}
every_architecture = pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(*case, id=label, marks=[pytest.mark.slow] if case[0] in SLOW else [])
        for case, label in zip(ARCHITECTURES, IDS, strict=True)
    ],
)
MLP = ModelSettings(name="mlp", options={"hidden": [20]})
BATCH_NORM = ModelSettings(name="cnn", options={"channels": [4], "norm": "batch"})
DROPOUT = ModelSettings(name="mlp", options={"hidden": [16], "dropout": 0.5})

kd = partial(distilled, temperature=2.0)


def learn(cohort):
    """Three fits of all kinds: private rows, public rows, and both in one step."""
    cohort.fit(supervised, private=PASSES)
    cohort.fit(kd, public=lesson())
    cohort.fit(kd, private=PASSES, public=lesson(members=len(cohort.clients)))


# -- the loop's numbers ------------------------------------------------------------------------


@every_architecture
def test_five_steps_of_float32_agree_with_the_loop(name, options):
    model = ModelSettings(name=name, options=options)
    passes = Passes(batch_size=8, steps=5)
    difference = both(
        EQUAL,
        lambda cohort: cohort.fit(supervised, private=passes),
        model=model,
        optimizer=OptimizerSettings(name="sgd", lr=0.01, momentum=0.9),
    )
    assert difference < 1e-5


@every_architecture
@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_fits_of_every_kind_agree_with_the_loop(double, name, options, sizes):
    model = ModelSettings(name=name, options=options)
    adam = OptimizerSettings(name="adam", lr=0.01)
    for optimizer in (SGD, adam):
        # Predictions and metrics leave in float32.
        assert both(sizes, learn, model=model, optimizer=optimizer) < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"name": "sgd", "lr": 0.05},
        {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.1},
        {"name": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True},
        {"name": "adam", "lr": 0.01, "weight_decay": 0.1},
        {"name": "adamw", "lr": 0.01, "weight_decay": 0.1},
        {"name": "rmsprop", "lr": 0.01, "weight_decay": 0.1},
        {"name": "rmsprop", "lr": 0.01, "momentum": 0.5},
        {"name": "adam", "lr": 0.01, "warm_up": 0.3},
        {"name": "adam", "lr": 0.01, "decay": 0.5},
        {"name": "sgd", "lr": 0.1, "decay": {"kind": "cosine", "start": 1.0, "end": 0.1}},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_every_optimizer_agrees_with_the_loop(double, options, sizes):
    optimizer = OptimizerSettings.model_validate(options)
    assert both(sizes, learn, model=MLP, optimizer=optimizer, round=2, rounds=4) < 1e-6


def digest(outputs, batch, *, distance):
    return {"digest": PerRow(distance(outputs.public, batch.targets.logits()), of="public")}


OBJECTIVES = {
    "supervised": (supervised, {"private": PASSES}),
    "half the loss": (partial(supervised, weight=0.5), {"private": PASSES}),
    "public labels": (supervised_public, {"public": lesson()}),
    "soft labels": (kd, {"private": PASSES, "public": lesson()}),
    "own soft labels": (kd, {"private": PASSES, "public": lesson(members=3)}),
    "logits": (
        partial(distilled, temperature=3.0, kd_weight=0.3),
        {"private": PASSES, "public": lesson(logits=True)},
    ),
    # Padding repeats the first row, which is among those that are sure enough.
    "sure rows": (
        partial(distilled, temperature=1.0, confidence_threshold=0.5, scale_by_t2=False),
        {"private": PASSES, "public": lesson()},
    ),
    "l1": (partial(digest, distance=logit_l1_rows), {"public": lesson(logits=True)}),
    "mse": (partial(digest, distance=logit_mse_rows), {"public": lesson(logits=True)}),
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL, (4, 4, 2)], ids=["equal", "unequal", "tiny"])
def test_every_objective_agrees_with_the_loop(double, objective, sizes):
    minimised, rows = objective
    assert both(sizes, lambda cohort: cohort.fit(minimised, **rows), model=MLP) < 1e-6


def test_numbers_of_steps_instead_of_epochs_agree_with_the_loop(double):
    passes = Passes(batch_size=6, steps=5)
    assert both(UNEQUAL, lambda cohort: cohort.fit(supervised, private=passes), model=MLP) < 1e-6


def test_a_fit_of_no_steps_changes_nothing(same_bits):
    cohort = cohort_of(VmapCohort, EQUAL, data=rows_of(EQUAL), model=MLP)
    before = [state.to_arrays() for state in cohort.states()]
    cohort.fit(supervised, private=Passes(batch_size=8, epochs=0))
    for state, earlier in zip(cohort.states(), before, strict=True):
        assert same_bits(state.to_arrays(), earlier)
    assert cohort.metrics() == [{}, {}, {}]


@pytest.mark.parametrize("model", [MLP, BATCH_NORM], ids=["plain", "norm"])
def test_what_a_cohort_predicts_does_not_depend_on_how_many_rows_are_asked_for(model):
    # Few rows go through the stack, many through one member after the other.
    data = rows_of(UNEQUAL)
    many = torch.cat([data.public_inputs] * 80)
    shown = []
    for kind in (LoopCohort, VmapCohort):
        cohort = cohort_of(kind, UNEQUAL, data=data, model=model)
        cohort.fit(supervised, private=PASSES)
        logits = cohort.predict(many)
        assert logits.shape == (3, 1600, 3)
        np.testing.assert_allclose(logits[:, 1580:], cohort.predict(many[:20]), atol=1e-5)
        shown.append(logits)
    np.testing.assert_allclose(*shown, atol=1e-5)


# -- padding and finished members --------------------------------------------------------------


@pytest.mark.parametrize("model", [MLP, BATCH_NORM, DROPOUT], ids=["plain", "norm", "dropout"])
def test_a_finished_member_does_not_move(double, model, same_bits):
    # 5 rows are one step and 30 rows are four: what the first has after one step stays.
    sizes, data = (5, 30), rows_of((5, 30))
    adam = OptimizerSettings(name="adam", lr=0.01)
    frozen = []

    def spy(outputs, batch):
        frozen.append(cohort.states()[0].to_arrays())
        return supervised(outputs, batch)

    cohort = cohort_of(VmapCohort, sizes, data=data, model=model, optimizer=adam)
    cohort.fit(spy, private=PASSES)
    after = cohort.states()[0].to_arrays()
    assert len(frozen) == 4
    weights = [{k: v for k, v in table.items() if "/weights/" in k} for table in (*frozen, after)]
    running = [{k: v for k, v in table.items() if "running" in k} for table in weights]
    assert not same_bits(weights[0], weights[1])
    for table in weights[2:]:
        assert same_bits(table, weights[1])
    assert all(same_bits(table, running[1]) for table in running[1:])
    steps = {float(v) for k, v in after.items() if "/optimizer/step/" in k}
    assert steps == {1.0}
    others = cohort.states()[1].to_arrays()
    assert {float(v) for k, v in others.items() if "/optimizer/step/" in k} == {4.0}


def test_padded_rows_reach_neither_loss_nor_statistics(double):
    # Padding repeats row 0 of the data; with that row gone mad nothing may change.
    sizes = (13, 21, 5)
    results = []
    for value in (0.0, 1e6):
        data = rows_of((1, *sizes))
        data.train_inputs[0] = value
        data.public_inputs[1] = value  # the lesson's first position
        members = [
            Member(client, np.arange(size) + start)
            for client, (size, start) in enumerate(zip(sizes, (1, 14, 35), strict=True))
        ]
        cohort = VmapCohort(
            members,
            model=BATCH_NORM,
            optimizer=SGD,
            data=data,
            pool=ModelPool(data, SGD),
            streams=Streams(seed=7),
        )
        cohort.fit(supervised, private=PASSES)
        taught = lesson()
        fewer = taught.targets.of(taught.targets.values[1:])
        own = PublicLesson(rows=taught.rows[1:], targets=fewer, passes=taught.passes)
        cohort.fit(kd, private=PASSES, public=own)
        results.append([state.to_arrays() for state in cohort.states()])
    for one, other in zip(*results, strict=True):
        assert largest_difference(one, other) < 1e-9


def test_batch_statistics_are_those_of_a_members_own_rows(double):
    # One step over rows of two members: the running mean is momentum times the batch's mean.
    sizes = (4, 7)
    data = rows_of(sizes)
    model = ModelSettings(name=f"{__name__}:Normalised")
    cohort = cohort_of(VmapCohort, sizes, data=data, model=model)
    cohort.fit(supervised, private=Passes(batch_size=8))
    for own, rows in zip(cohort.weights(), (slice(0, 4), slice(4, 11)), strict=True):
        values = data.train_inputs[rows].flatten(1)
        np.testing.assert_allclose(own["norm.running_mean"], 0.1 * values.mean(0), atol=1e-12)
        np.testing.assert_allclose(
            own["norm.running_var"], 0.9 + 0.1 * values.var(0, unbiased=True), atol=1e-12
        )
        assert own["norm.num_batches_tracked"] == 1


class Normalised(nn.Module):
    """BatchNorm on the pixels, then a linear layer; optionally with the plain average."""

    def __init__(self, *, input_shape, num_classes, momentum: float | None = 0.1) -> None:
        super().__init__()
        pixels = int(np.prod(input_shape))
        self.norm = nn.BatchNorm1d(pixels, momentum=momentum)
        self.scores = nn.Linear(pixels, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.scores(self.norm(images.flatten(1)))
        return logits


@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_batch_norm_with_a_plain_average_agrees_with_the_loop(double, sizes):
    model = ModelSettings(name=f"{__name__}:Normalised", options={"momentum": None})
    assert both(sizes, learn, model=model) < 1e-6


@pytest.mark.parametrize("kind", [LoopCohort, VmapCohort])
@pytest.mark.parametrize("sizes", [(1,), (8, 1)], ids=["alone", "beside others"])
def test_batch_norm_refuses_a_step_of_one_row(kind, sizes):
    model = ModelSettings(name=f"{__name__}:Normalised")
    cohort = cohort_of(kind, sizes, data=rows_of(sizes), model=model)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        cohort.fit(supervised, private=PASSES)


# -- a cohort is its members -------------------------------------------------------------------


@pytest.mark.parametrize("model", [MLP, BATCH_NORM, DROPOUT], ids=["plain", "norm", "dropout"])
def test_the_order_of_members_changes_no_more_than_rounding(double, model):
    order = (2, 0, 1)
    data, targets = rows_of(UNEQUAL), lesson(members=3)
    straight = cohort_of(VmapCohort, UNEQUAL, data=data, model=model)
    permuted = cohort_of(VmapCohort, UNEQUAL, data=data, model=model, order=order)
    straight.fit(kd, private=PASSES, public=targets)
    own = PublicLesson(
        rows=targets.rows,
        targets=targets.targets.of(targets.targets.values[list(order)]),
        passes=targets.passes,
    )
    permuted.fit(kd, private=PASSES, public=own)
    assert permuted.clients == order
    shown = straight.predict_public(np.arange(5))[list(order)]
    np.testing.assert_allclose(permuted.predict_public(np.arange(5)), shown, atol=1e-6)
    for at, client in enumerate(order):
        one, other = permuted.states()[at], straight.states()[client]
        assert largest_difference(one.to_arrays(), other.to_arrays()) < 1e-9
        assert largest_difference(permuted.metrics()[at], straight.metrics()[client]) < 1e-6
        assert largest_difference(permuted.weights()[at], straight.weights()[client]) < 1e-9


@pytest.mark.parametrize("model", [MLP, BATCH_NORM, DROPOUT], ids=["plain", "norm", "dropout"])
def test_a_cohort_of_one_is_a_member_of_a_larger_one(double, model):
    data = rows_of(UNEQUAL)
    together = cohort_of(VmapCohort, UNEQUAL, data=data, model=model)
    alone = cohort_of(VmapCohort, UNEQUAL, data=data, model=model, order=(2,))
    for cohort in (together, alone):
        cohort.fit(kd, private=PASSES, public=lesson())
    one, other = alone.states()[0].to_arrays(), together.states()[2].to_arrays()
    assert largest_difference(one, other) < 1e-9


@pytest.mark.parametrize("model", [MLP, BATCH_NORM, DROPOUT], ids=["plain", "norm", "dropout"])
def test_the_same_cohort_gives_the_same_bits(model, same_bits):
    runs = []
    for _ in range(2):
        cohort = cohort_of(VmapCohort, UNEQUAL, data=rows_of(UNEQUAL), model=model)
        learn(cohort)
        runs.append([state.to_arrays() for state in cohort.states()])
    for one, other in zip(*runs, strict=True):
        assert same_bits(one, other)


def test_training_leaves_torchs_generators_alone():
    before = torch.get_rng_state()
    cohort = cohort_of(VmapCohort, UNEQUAL, data=rows_of(UNEQUAL), model=DROPOUT)
    learn(cohort)
    assert torch.equal(torch.get_rng_state(), before)


# -- states ------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop"])
@pytest.mark.parametrize("model", [MLP, BATCH_NORM], ids=["plain", "norm"])
def test_states_move_between_backends(double, optimizer, model):
    settings = OptimizerSettings(
        name=optimizer, lr=0.01, momentum=0.0 if optimizer == "adam" else 0.5
    )
    data = rows_of(UNEQUAL)
    results = []
    for kinds in ([LoopCohort] * 3, [LoopCohort, VmapCohort, LoopCohort], [VmapCohort] * 3):
        states = None
        for number, kind in enumerate(kinds):
            cohort = cohort_of(
                kind,
                UNEQUAL,
                data=data,
                model=model,
                optimizer=settings,
                states=states,
                round=number + 1,
                rounds=3,
            )
            learn(cohort)
            states = cohort.states()
        results.append([state.to_arrays() for state in states])
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert largest_difference(one, same) < 1e-8


@pytest.mark.parametrize("model", [MLP, BATCH_NORM], ids=["plain", "norm"])
def test_a_state_comes_out_as_it_went_in(model, same_bits):
    data, adam = rows_of(UNEQUAL), OptimizerSettings(name="adam")
    loop = cohort_of(LoopCohort, UNEQUAL, data=data, model=model, optimizer=adam)
    learn(loop)
    states = loop.states()
    stacked = cohort_of(VmapCohort, UNEQUAL, data=data, model=model, optimizer=adam, states=states)
    taken_out = stacked.states()
    learn(stacked)
    # What was taken out is not what goes on learning.
    for before, after in zip(states, taken_out, strict=True):
        assert same_bits(before.to_arrays(), after.to_arrays())
        assert all(array.flags.c_contiguous for array in after.to_arrays().values())


@pytest.mark.parametrize("model", [MLP, BATCH_NORM], ids=["plain", "norm"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2)], ids=["same", "other", "fewer"])
def test_states_of_one_block_are_stacked_like_states_apart(model, order, same_bits):
    data, adam = rows_of(UNEQUAL), OptimizerSettings(name="adam")
    first = cohort_of(VmapCohort, UNEQUAL, data=data, model=model, optimizer=adam)
    learn(first)
    together = first.states()
    apart = [ClientState.from_arrays(state.to_arrays()) for state in together]
    assert all(own.home is not None for state in together for own in state.models.values())
    assert all(own.home is None for state in apart for own in state.models.values())
    before = [copy.deepcopy(state.to_arrays()) for state in together]
    results = []
    for states in (together, apart):
        second = cohort_of(
            VmapCohort, UNEQUAL, data=data, model=model, optimizer=adam, states=states, order=order
        )
        learn(second)
        results.append(second.states())
    for one, other in zip(*results, strict=True):
        assert same_bits(one.to_arrays(), other.to_arrays())
    for state, known in zip(together, before, strict=True):
        assert same_bits(state.to_arrays(), known)


@pytest.mark.parametrize("part", ["weights", "optimizer"])
def test_a_state_that_has_left_its_block_counts_as_it_is(part, same_bits):
    data, adam = rows_of(UNEQUAL), OptimizerSettings(name="adam")
    first = cohort_of(VmapCohort, UNEQUAL, data=data, model=MLP, optimizer=adam)
    learn(first)
    states = first.states()
    table = getattr(states[1].models["model"], part)
    name = next(name for name in table if name.endswith("weight") and "step" not in name)
    table[name] = table[name] + 1
    second = cohort_of(VmapCohort, UNEQUAL, data=data, model=MLP, optimizer=adam, states=states)
    for before, after in zip(states, second.states(), strict=True):
        assert same_bits(before.to_arrays(), after.to_arrays())


def test_members_are_given_the_weights_of_one_or_their_own(same_bits):
    data = rows_of(UNEQUAL)
    own = cohort_of(VmapCohort, UNEQUAL, data=data, model=MLP).weights()[1]
    results = []
    for handed in (own, [dict(own) for _ in UNEQUAL]):
        cohort = cohort_of(VmapCohort, UNEQUAL, data=data, model=MLP)
        cohort.load_weights(handed)
        results.append(cohort.weights())
    for one, other in zip(*results, strict=True):
        assert same_bits(one, other)
        assert same_bits(one, own)


def test_members_of_different_age_keep_their_own_step_counters(double):
    data, adam = rows_of(EQUAL), OptimizerSettings(name="adam", lr=0.01)
    first = cohort_of(LoopCohort, EQUAL, data=data, model=MLP, optimizer=adam)
    first.fit(supervised, private=PASSES)
    trained = first.states()
    # Client 1 has never trained, client 2 only forgot.
    states = [trained[0], None, trained[2]]
    cohorts = [
        cohort_of(kind, EQUAL, data=data, model=MLP, optimizer=adam, states=states, round=2)
        for kind in (LoopCohort, VmapCohort)
    ]
    for cohort in cohorts:
        cohort.fit(supervised, private=PASSES)
    assert differences(*cohorts) < 1e-6
    counters = [
        float(state.models["model"].optimizer["step/1.weight"]) for state in cohorts[1].states()
    ]
    assert counters == [6.0, 3.0, 6.0]


def test_reset_optimizers_and_loaded_weights_agree_with_the_loop(double):
    data, adam = rows_of(EQUAL), OptimizerSettings(name="adam", lr=0.01)
    given = cohort_of(LoopCohort, (20,), data=data, model=MLP).weights()[0]

    def work(cohort):
        cohort.fit(supervised, private=PASSES)
        cohort.load_weights(given)
        cohort.reset_optimizers()
        cohort.fit(supervised, private=PASSES)

    assert both(EQUAL, work, data=data, model=MLP, optimizer=adam) < 1e-6
    cohort = cohort_of(VmapCohort, EQUAL, data=data, model=MLP, optimizer=adam)
    work(cohort)
    cohort.reset_optimizers()
    assert all(state.models["model"].optimizer == {} for state in cohort.states())


@pytest.mark.parametrize("kind", [LoopCohort, VmapCohort])
def test_weights_of_another_architecture_are_refused(kind):
    data = rows_of(EQUAL)
    cohort = cohort_of(kind, EQUAL, data=data, model=MLP)
    other = cohort_of(kind, EQUAL, data=data, model=BATCH_NORM)
    with pytest.raises(ValueError, match="weights do not fit the model"):
        cohort.load_weights(other.weights()[0])
    wider = cohort_of(
        kind, EQUAL, data=data, model=ModelSettings(name="mlp", options={"hidden": [21]})
    )
    with pytest.raises(ValueError, match=r"has shape \(21, 64\), the model has \(20, 64\)"):
        cohort.load_weights(wider.weights()[0])


# -- dropout -----------------------------------------------------------------------------------


class Functional(nn.Module):
    """Calls a random function of torch, as a layer that nothing can exchange."""

    def __init__(self, *, input_shape, num_classes) -> None:
        super().__init__()
        self.scores = nn.Linear(int(np.prod(input_shape)), num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.scores(F.dropout(images.flatten(1), 0.5, self.training))
        return logits


def test_random_functions_are_repeatable_and_differ_between_members(same_bits):
    # Both members have the same rows and the same weights: only the masks can differ.
    data = rows_of((8,))
    model = ModelSettings(name=f"{__name__}:Functional")
    start = cohort_of(LoopCohort, (8,), data=data, model=model).states()[0]
    results = []
    for seed in (7, 7, 8):
        cohort = VmapCohort(
            [Member(0, np.arange(8), start), Member(1, np.arange(8), start)],
            model=model,
            optimizer=SGD,
            data=data,
            pool=ModelPool(data, SGD),
            streams=Streams(seed=seed),
        )
        cohort.fit(supervised, private=PASSES)
        results.append(cohort.weights())
    assert same_bits(results[0][0], results[1][0])
    assert not same_bits(results[0][0], results[2][0])
    assert not same_bits(results[0][0], results[0][1])


# -- models of one's own -----------------------------------------------------------------------


class Branching(nn.Module):
    """Looks at a number to decide what to do."""

    def __init__(self, *, input_shape, num_classes) -> None:
        super().__init__()
        self.scores = nn.Linear(int(np.prod(input_shape)), num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.scores(images.flatten(1))
        return -logits if logits.sum() > 0 else logits


def test_a_model_that_cannot_be_stacked_is_named_with_the_way_out():
    model = ModelSettings(name=f"{__name__}:Branching")
    with pytest.raises(
        VmapUnsupportedError, match=r"Branching' cannot be stacked: .*vectorize: lo"
    ):
        cohort_of(VmapCohort, EQUAL, data=rows_of(EQUAL), model=model)


class Odd(nn.Module):
    """Everything unusual: shared, frozen and unused weights, and a buffer that is put in anew."""

    mean: torch.Tensor

    def __init__(self, *, input_shape, num_classes) -> None:
        super().__init__()
        pixels = int(np.prod(input_shape))
        self.hidden = nn.Linear(pixels, 20)
        self.again = nn.Linear(20, 20)
        self.more = nn.Linear(20, 20)
        self.more.weight = self.again.weight
        self.frozen = nn.Linear(20, 20).requires_grad_(False)
        self.unused = nn.Linear(3, 4)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.scores = nn.Linear(20, num_classes)
        self.register_buffer("mean", torch.zeros(pixels))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.flatten(1)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * self.again.weight.detach().mean()
        hidden = torch.tanh(self.hidden(pixels - self.mean))
        hidden = torch.tanh(self.more(self.again(hidden)) + self.frozen(hidden))
        logits: torch.Tensor = self.scores(hidden) * self.scale
        return logits


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_shared_frozen_and_unused_weights_agree_with_the_loop(double, name):
    model = ModelSettings(name=f"{__name__}:Odd")
    optimizer = OptimizerSettings(name=name, lr=0.01, weight_decay=0.1)
    assert both(UNEQUAL, learn, model=model, optimizer=optimizer) < 1e-6
    data = rows_of(UNEQUAL)
    cohort = cohort_of(VmapCohort, UNEQUAL, data=data, model=model, optimizer=optimizer)
    before = cohort.weights()[0]
    learn(cohort)
    after, slots = cohort.weights()[0], cohort.states()[0].models["model"].optimizer
    assert np.array_equal(after["unused.weight"], before["unused.weight"])
    assert np.array_equal(after["frozen.weight"], before["frozen.weight"])
    assert np.array_equal(after["more.weight"], after["again.weight"])
    assert not np.array_equal(after["mean"], before["mean"])
    assert not any("unused" in key or "frozen" in key for key in slots)


# -- several models ----------------------------------------------------------------------------

TWO = {"private": MLP, "proxy": ModelSettings(name="mlp", options={"hidden": [6], "dropout": 0.3})}


def mutual(outputs, batch):
    """Each model learns the labels and imitates the other, which is a constant to it."""
    losses = {}
    for name, other in (("private", "proxy"), ("proxy", "private")):
        seen = batch._replace(targets=Targets.from_model(outputs[other].public.detach()))
        for term, loss in distilled(outputs[name], seen, temperature=2.0).items():
            losses[f"{name}/{term}"] = loss
    return losses


def learn_from_each_other(cohort):
    taught = lesson()
    shared = PublicLesson(rows=taught.rows, targets=None, passes=taught.passes)
    cohort.fit(mutual, private=PASSES, public=shared, models=("private", "proxy"))
    cohort.fit(supervised, private=PASSES, models=("proxy",))
    cohort.fit(supervised, private=PASSES)


@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_two_models_of_a_client_learn_from_each_other_in_one_step(double, sizes):
    data = rows_of(sizes)
    adam = OptimizerSettings(name="adam", lr=0.01)
    cohorts = [
        cohort_of(kind, sizes, data=data, model=TWO, optimizer=adam)
        for kind in (LoopCohort, VmapCohort)
    ]
    for cohort in cohorts:
        before = cohort.weights(model="proxy")
        learn_from_each_other(cohort)
        for earlier, later in zip(before, cohort.weights(model="proxy"), strict=True):
            assert largest_difference(earlier, later) > 1e-3
        assert [list(state.models) for state in cohort.states()] == [["private", "proxy"]] * 3
        assert set(cohort.metrics()[0]) == {
            *(f"loss/{name}/{term}" for name in TWO for term in ("ce", "kd")),
            "loss/ce",
        }
    assert differences(*cohorts) < 1e-6
    shown = [cohort.predict_public(np.arange(4), model="proxy") for cohort in cohorts]
    np.testing.assert_allclose(*shown, atol=1e-6)
    assert not np.allclose(shown[0], cohorts[0].predict_public(np.arange(4)))


@pytest.mark.parametrize("kind", [LoopCohort, VmapCohort])
def test_two_models_are_two_single_ones_where_they_do_not_meet(double, kind):
    data = rows_of(UNEQUAL)
    both_models = cohort_of(kind, UNEQUAL, data=data, model=TWO)
    both_models.fit(supervised, private=PASSES, models=("private",))
    single = cohort_of(kind, UNEQUAL, data=data, model=MLP)
    single.fit(supervised, private=PASSES)
    for one, other in zip(both_models.weights(), single.weights(), strict=True):
        assert largest_difference(one, other) < 1e-12


@pytest.mark.parametrize("kind", [LoopCohort, VmapCohort])
def test_peers_of_one_architecture_start_apart_and_keep_apart(kind):
    cohort = cohort_of(kind, EQUAL, data=rows_of(EQUAL), model={"left": MLP, "right": MLP})
    left, right = cohort.weights(model="left")[0], cohort.weights(model="right")[0]
    assert largest_difference(left, right) > 0.01
    cohort.load_weights(left, model="right")
    cohort.fit(supervised, private=PASSES, models=("left",))
    assert largest_difference(cohort.weights(model="right")[0], left) == 0


@pytest.mark.parametrize("kind", [LoopCohort, VmapCohort])
def test_a_state_with_other_models_is_refused(kind):
    data = rows_of(EQUAL)
    states = cohort_of(kind, EQUAL, data=data, model=TWO).states()
    with pytest.raises(ValueError, match=r"client 0 has the models \['private', 'proxy'\]"):
        cohort_of(kind, EQUAL, data=data, model=MLP, states=states)


@pytest.mark.parametrize("kind", [LoopCohort, VmapCohort])
def test_a_fit_without_rows_is_refused(kind):
    cohort = cohort_of(kind, EQUAL, data=rows_of(EQUAL), model=MLP, purpose=Purpose.TRAIN)
    with pytest.raises(ValueError, match="fit needs private rows, public rows or both"):
        cohort.fit(supervised)


# -- private and public rows apart -------------------------------------------------------------

NORM = {"channels": [4], "norm": "batch"}


def apart(**options):
    return replace(lesson(**options), apart=True)


def taught(kind, sizes, public, *, model=None):
    data = rows_of(sizes)
    model = model or ModelSettings(name="cnn", options=NORM)
    cohort = cohort_of(kind, sizes, data=data, model=model)
    cohort.fit(partial(distilled, temperature=2.0), private=PASSES, public=public)
    return cohort


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL])
@pytest.mark.parametrize(
    "model",
    [
        ModelSettings(name="cnn", options=NORM),
        ModelSettings(name="mlp", options={"hidden": [8], "dropout": 0.4}),
    ],
    ids=["batch norm", "dropout"],
)
def test_a_stack_takes_rows_apart_as_the_loop_does(model, sizes):
    one, other = (taught(kind, sizes, apart(), model=model) for kind in (LoopCohort, VmapCohort))
    assert differences(one, other) < 1e-12
    joint = taught(LoopCohort, sizes, lesson(), model=model)
    assert differences(one, joint) > 1e-3


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("kind", [LoopCohort, VmapCohort])
def test_batch_norm_sees_private_and_public_rows_one_after_the_other(kind):
    # One step: BatchNorm's running mean moves by 0.1 towards the private mean, then by 0.1
    # towards the public one; jointly by 0.1 towards the mean of all of them.
    data = rows_of((8,))
    model = ModelSettings(name="cnn", options=NORM)
    found, counts = {}, {}
    for name, public in (("joint", lesson(batch_size=16)), ("apart", apart(batch_size=16))):
        cohort = cohort_of(kind, (8,), data=data, model=model)
        before = cohort.weights()[0]
        cohort.fit(partial(distilled, temperature=2.0), private=PASSES, public=public)
        after = cohort.weights()[0]
        found[name] = after["1.running_mean"]
        counts[name] = int(after["1.num_batches_tracked"])
    filters = torch.from_numpy(before["0.weight"])
    private, public = (
        F.conv2d(rows, filters, padding=1).mean((0, 2, 3)).numpy()
        for rows in (data.train_inputs, data.public_inputs[lesson().rows])
    )
    np.testing.assert_allclose(found["apart"], 0.9 * 0.1 * private + 0.1 * public)
    np.testing.assert_allclose(found["joint"], 0.1 * (8 * private + 10 * public) / 18)
    assert counts == {"joint": 1, "apart": 2}


def test_rows_go_together_where_there_is_one_kind_only():
    data = rows_of((8,))
    model = ModelSettings(name="cnn", options=NORM)
    digests = []
    for public in (lesson(), apart()):
        cohort = cohort_of(LoopCohort, (8,), data=data, model=model)
        cohort.fit(partial(distilled, temperature=2.0), public=public)
        digests.append(cohort.states()[0].to_arrays())
    assert largest_difference(*digests) == 0


# -- whatever an author writes -----------------------------------------------------------------


def rows_apart(outputs, batch):
    """Compare rows with each other, and count them: wrong by much where padding takes part."""
    distances = torch.cdist(outputs.private, outputs.private)
    return {
        "ce": PerRow(hard_label_rows(outputs.private, batch.labels), of="private"),
        "apart": WholeStep(0.1 * distances.mean() / len(batch.labels)),
    }


def not_a_number_in_padding(outputs, batch):
    """Divide by a number that is 0 in the rows that pad a batch, whose ids are 0."""
    by = (batch.private_rows > 0).to(outputs.private.dtype)
    rows = (outputs.private / by[:, None]).square().mean(1) + by / by - 1
    return {"odd": PerRow(rows, of="private", weights=1 / by)}


def bare(outputs, batch):
    return {"ce": hard_label_rows(outputs.private, batch.labels)}


def both_kinds_compared(outputs, batch):
    """Tell private from public rows, with a layer and the targets' probabilities."""
    hidden = outputs.features["penultimate"]
    count = len(outputs.private) + len(outputs.public)
    assert len(hidden) == count or hidden.ndim > 2
    spread = hidden.var(0).mean() + outputs.public.std() * batch.targets.probabilities(2.0).std()
    return {"kd": PerRow(outputs.public.square().mean(1), of="public"), "spread": WholeStep(spread)}


AUTHORS = {
    "compares rows": (rows_apart, {"private": PASSES}),
    "bare rows": (bare, {"private": PASSES}),
    "both kinds": (
        both_kinds_compared,
        {"private": PASSES, "public": lesson(), "layers": ["penultimate"]},
    ),
}


@pytest.mark.parametrize(("objective", "options"), AUTHORS.values(), ids=AUTHORS.keys())
@pytest.mark.parametrize("model", [MLP, DROPOUT, BATCH_NORM], ids=["mlp", "dropout", "batch norm"])
def test_an_objective_gives_the_same_padded_or_not(double, objective, options, model):
    difference = both(UNEQUAL, lambda cohort: cohort.fit(objective, **options), model=model)
    assert difference < 1e-6


@settings(deadline=None, max_examples=6)
@given(sizes=st.lists(st.integers(2, 19), min_size=2, max_size=4), batch_size=st.integers(2, 9))
def test_any_padding_gives_the_numbers_of_the_loop(sizes, batch_size):
    torch.set_default_dtype(torch.float64)
    try:
        passes = Passes(batch_size=batch_size)
        for objective in (rows_apart, bare):
            fit = partial(_fit, objective, private=passes)
            assert both(tuple(sizes), fit, model=MLP) < 1e-6
    finally:
        torch.set_default_dtype(torch.float32)


def _fit(objective, cohort, **options):
    cohort.fit(objective, **options)


def test_padding_that_is_not_a_number_reaches_no_weight(double):
    # Client 0, whose rows begin with 0, has full batches; the others' padding repeats row 0.
    sizes = (24, 13, 5)
    data = rows_of(sizes)
    cohorts = [cohort_of(kind, sizes, data=data, model=MLP) for kind in (LoopCohort, VmapCohort)]
    for cohort in cohorts:
        cohort.fit(not_a_number_in_padding, private=PASSES)
    for client in (1, 2):
        one, other = (cohort.states()[client].to_arrays() for cohort in cohorts)
        assert all(np.isfinite(array).all() for array in other.values())
        assert largest_difference(one, other) < 1e-6


def test_ambiguous_losses_are_refused_in_both_backends(double):
    def ambiguous(outputs, batch):
        return {"kd": outputs.public.square().mean(1)}

    for kind in (LoopCohort, VmapCohort):
        cohort = cohort_of(kind, UNEQUAL, data=rows_of(UNEQUAL), model=MLP)
        with pytest.raises(ValueError, match=r"'kd' .* could be of either kind"):
            cohort.fit(ambiguous, private=PASSES, public=lesson())
