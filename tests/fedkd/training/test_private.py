"""Private learning: against gradients row by row, in both backends, its noise and its guard."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from own_objectives import distilled

from fedkd.losses.response import hard_label_rows
from fedkd.models import ModelSettings, build_model
from fedkd.objectives import Objective
from fedkd.targets import Targets
from fedkd.training import (
    Average,
    Clipped,
    ComposedObjective,
    Learner,
    LoopCohort,
    Member,
    ModelPool,
    Network,
    OptimizerSettings,
    Passes,
    PerRow,
    PrivacyError,
    PrivateLearning,
    Proximal,
    PublicLesson,
    Streams,
    Table,
    TrainingData,
    VmapCohort,
    WholeStep,
    open_cohort,
    supervised,
)
from fedkd.training.batches import PoissonPasses

SIZES = (13, 21, 5)
LR = 0.5
SGD = OptimizerSettings(name="sgd", lr=LR)
MLP = ModelSettings(name="mlp", options={"hidden": [20]})
MODELS = {
    "mlp": MLP,
    "cnn": ModelSettings(name="cnn", options={"channels": [8], "norm": "group", "groups": 2}),
    "gru": ModelSettings(name="gru", options={"hidden": 6}),
    "lstm": ModelSettings(name="lstm", options={"hidden": 5}),
    "transformer": ModelSettings(name="transformer", options={"dim": 8, "depth": 1}),
}
BACKENDS = pytest.mark.parametrize("backend", ["loop", "vmap"])
BOTH = ("loop", "vmap")


@pytest.fixture
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def rows_of(sizes):
    draw = torch.Generator().manual_seed(0)
    return TrainingData(
        train_inputs=torch.randn(sum(sizes), 1, 8, 8, generator=draw),
        train_labels=torch.randint(3, (sum(sizes),), generator=draw),
        public_inputs=torch.randn(20, 1, 8, 8, generator=draw),
        public_labels=torch.randint(3, (20,), generator=draw),
        num_classes=3,
    )


def learning(members, **options):
    defaults = {
        "clip": 0.7,
        "batch_size": 4,
        "noise_multipliers": (1.0,) * members,
        "most_steps": (100,) * members,
    }
    return PrivateLearning(**{**defaults, **options})


def cohort_of(
    backend,
    *,
    sizes=SIZES,
    model=MLP,
    optimizer=SGD,
    data=None,
    round=1,
    private="default",
    **options,
):
    data, ends = data or rows_of(sizes), np.cumsum(sizes)
    if private == "default":
        private = learning(len(sizes), **options)
    return open_cohort(
        [
            Member(client, np.arange(end - size, end))
            for client, (end, size) in enumerate(zip(ends, sizes, strict=True))
        ],
        backend=backend,
        model=model,
        optimizer=optimizer,
        data=data,
        pool=ModelPool(data, optimizer),
        streams=Streams(seed=7, round=round, rounds=3),
        private=private,
    )


def lesson(**options):
    soft = torch.softmax(torch.randn(9, 3, generator=torch.Generator().manual_seed(2)), -1)
    targets = Targets(soft.numpy(), scale="probabilities", temperature=2.0)
    return PublicLesson(rows=np.arange(9), targets=targets, passes=Passes(batch_size=4), **options)


def flat(weights):
    return np.concatenate([weights[name].ravel() for name in weights])


def moves(cohort, before):
    """How far each member's weights went, over the learning rate and against the gradient."""
    after = [flat(own) for own in cohort.weights()]
    return [(start - now) / LR for start, now in zip(before, after, strict=True)]


def moved(backend, objective=supervised, *, passes=None, **options):
    fit_options = {name: options.pop(name) for name in ("public", "gradient") if name in options}
    cohort = cohort_of(backend, **options)
    before = [flat(own) for own in cohort.weights()]
    private = Passes(batch_size=options.get("batch_size", 4), steps=1) if passes is None else passes
    cohort.fit(objective, private=private, **fit_options)
    return moves(cohort, before)


def difference(one, other):
    largest = 0.0
    for mine, their in zip(one.states(), other.states(), strict=True):
        own, others = mine.to_arrays(), their.to_arrays()
        assert own.keys() == others.keys()
        largest = max(largest, *(float(np.abs(own[key] - others[key]).max()) for key in own))
    return largest


# -- which rows a step draws -------------------------------------------------------------------


def test_each_row_is_drawn_by_itself_with_the_same_probability():
    passes = PoissonPasses.of(Passes(batch_size=3, steps=4000))
    batches = passes.batches(12, np.random.default_rng(0))
    drawn = np.zeros((4000, 12))
    for step, batch in enumerate(batches):
        assert batch.dtype == np.int64
        drawn[step, batch] = 1
    # Of 4000 draws a share of 1/4 has a standard deviation of 0.007, a correlation 0.016.
    np.testing.assert_allclose(drawn.mean(0), 0.25, atol=0.03)
    correlation = np.corrcoef(drawn.T)[np.triu_indices(12, 1)]
    assert np.abs(correlation).max() < 0.07
    sizes = drawn.sum(1)
    assert sizes.var() == pytest.approx(12 * 0.25 * 0.75, rel=0.1)
    # (3/4)^12 = 3.2 % of the steps draw nothing.
    assert (sizes == 0).mean() == pytest.approx(0.75**12, abs=0.01)


@pytest.mark.parametrize(
    "passes", [Passes(batch_size=4, epochs=2), Passes(batch_size=4, steps=7)], ids=str
)
def test_there_are_as_many_steps_as_passes_have(passes):
    poisson = PoissonPasses.of(passes)
    for rows in (1, 3, 9, 13):
        assert len(poisson.batches(rows, np.random.default_rng(0))) == passes.count(rows)


def test_fewer_rows_than_a_batch_are_all_drawn():
    (batch,) = PoissonPasses.of(Passes(batch_size=8, steps=1)).batches(5, np.random.default_rng(0))
    assert batch.tolist() == [0, 1, 2, 3, 4]


# -- the gradient without its noise ------------------------------------------------------------


def clipped_by_hand(model, before, inputs, labels, clip):
    """The sum of clipped gradients, from one backward pass for every single row."""
    module = build_model(model, input_shape=(1, 8, 8), num_classes=3, seed=0)
    module.load_state_dict({name: torch.from_numpy(each) for name, each in before.items()})
    total = 0.0
    for row, label in zip(inputs, labels, strict=True):
        loss = F.cross_entropy(module(row[None]), label[None])
        own = torch.autograd.grad(loss, list(module.parameters()))
        gradient = torch.cat([each.flatten() for each in own])
        total = total + gradient * min(1.0, clip / float(gradient.norm()))
    return total.numpy()


@pytest.mark.usefixtures("_double")
@BACKENDS
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_the_sum_of_clipped_gradients_over_the_expected_batch(name, backend):
    # Twenty-one, so every row is drawn; at this clip some rows are clipped and some are not.
    clip = {"mlp": 2.0, "cnn": 1.5, "gru": 0.9, "lstm": 0.9, "transformer": 1.5}[name]
    quiet = {"clip": clip, "batch_size": 21, "noise_multipliers": (0.0,) * 3}
    cohort = cohort_of(backend, model=MODELS[name], **quiet)
    before = cohort.weights()
    cohort.fit(supervised, private=Passes(batch_size=21, steps=1))
    data, ends = rows_of(SIZES), np.cumsum(SIZES)
    names = [
        key
        for key, _ in build_model(
            MODELS[name], input_shape=(1, 8, 8), num_classes=3, seed=0
        ).named_parameters()
    ]
    for start, now, end, size in zip(before, cohort.weights(), ends, SIZES, strict=True):
        rows = slice(end - size, end)
        expected = clipped_by_hand(
            MODELS[name], start, data.train_inputs[rows], data.train_labels[rows], clip
        )
        found = np.concatenate([(start[key] - now[key]).ravel() for key in names]) / LR * size
        assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@BACKENDS
@pytest.mark.parametrize("name", ["mlp", "cnn", "gru", "transformer"])
def test_a_step_is_what_opacus_makes_of_it(name, backend):
    opacus = pytest.importorskip("opacus.grad_sample")
    model, clip = MODELS[name], 1.0
    quiet = {"clip": clip, "batch_size": 21, "noise_multipliers": (0.0,) * 3}
    cohort = cohort_of(backend, model=model, **quiet)
    before = cohort.weights()
    cohort.fit(supervised, private=Passes(batch_size=21, steps=1))
    data, ends = rows_of(SIZES), np.cumsum(SIZES)
    for start, now, end, size in zip(before, cohort.weights(), ends, SIZES, strict=True):
        module = build_model(model, input_shape=(1, 8, 8), num_classes=3, seed=0)
        module.load_state_dict({key: torch.from_numpy(each) for key, each in start.items()})
        watched = opacus.GradSampleModule(module, loss_reduction="sum")
        rows = slice(end - size, end)
        logits = watched(data.train_inputs[rows])
        F.cross_entropy(logits, data.train_labels[rows], reduction="sum").backward()
        named = dict(module.named_parameters())
        gradients = torch.cat([each.grad_sample.flatten(1) for each in named.values()], 1)
        shares = (clip / gradients.norm(dim=1)).clamp_max(1.0)
        expected = (shares[:, None] * gradients).sum(0).numpy()
        found = np.concatenate([(start[key] - now[key]).ravel() for key in named]) / LR * size
        assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


def test_the_model_chooses_how_its_rows_are_clipped():
    pool = ModelPool(rows_of(SIZES), SGD)
    chosen = {name: pool.private_method("model", model) for name, model in MODELS.items()}
    assert chosen == {
        "mlp": "norms",
        "cnn": "norms",
        "gru": "vmap",
        "lstm": "vmap",
        "transformer": "vmap",
    }
    own = ModelSettings(name="odd_models:make", options={"kind": "Tempered"})
    assert pool.private_method("model", own) == "vmap"


# -- both backends -----------------------------------------------------------------------------

DROPOUT = ModelSettings(name="mlp", options={"hidden": [16], "dropout": 0.5})


def both(outputs, batch):
    """A loss of private rows with weights, and one of public rows where there are any."""
    weights = 1.0 + (batch.labels == 1)
    rows = hard_label_rows(outputs.private, batch.labels)
    losses = {"ce": PerRow(rows, of="private", weights=weights)}
    if outputs.public is not None:
        losses |= {"kd": distilled(outputs, batch, temperature=2.0)["kd"]}
    return losses


OWN_ROWS = [np.arange(4), np.zeros(0, np.int64), np.arange(9)]


def labelled(outputs, batch):
    """The labels of all rows that there are."""
    losses = {"ce": PerRow(hard_label_rows(outputs.private, batch.labels), of="private")}
    if outputs.public is not None:
        rows = hard_label_rows(outputs.public, batch.public_labels)
        losses |= {"public": PerRow(rows, of="public")}
    return losses


CASES = {
    "own rows": ({}, MLP, supervised),
    "public rows beside": ({"public": lesson()}, MLP, both),
    "apart": ({"public": lesson(apart=True)}, MLP, both),
    "dropout": ({"public": lesson()}, DROPOUT, both),
    "dropout apart": ({"public": lesson(apart=True)}, DROPOUT, both),
    "group norm": ({"public": lesson()}, MODELS["cnn"], both),
    "gru": ({"public": lesson()}, MODELS["gru"], both),
    "transformer": ({}, MODELS["transformer"], supervised),
    "proximal": ({"gradient": Proximal(mu=0.5)}, MLP, supervised),
    "some without public rows": (
        {"public": PublicLesson(rows=OWN_ROWS, targets=None, passes=Passes(batch_size=4))},
        MLP,
        labelled,
    ),
}


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize(("options", "model", "objective"), CASES.values(), ids=CASES.keys())
def test_both_backends_take_the_same_steps_with_ragged_and_empty_batches(options, model, objective):
    momentum = OptimizerSettings(name="sgd", lr=0.05, momentum=0.9)
    # Members of other numbers of rows and steps change their places in the stack.
    passes = [Passes(batch_size=1, steps=steps) for steps in (6, 4, 5)]
    private = {"batch_size": 1, "noise_multipliers": (0.5, 1.0, 2.0)}
    cohorts = [cohort_of(backend, model=model, optimizer=momentum, **private) for backend in BOTH]
    for cohort in cohorts:
        cohort.fit(objective, private=passes, **options)
        cohort.fit(objective, private=passes, **options)
    assert difference(*cohorts) < 1e-9
    for name, value in cohorts[0].metrics()[1].items():
        assert cohorts[1].metrics()[1][name] == pytest.approx(value, rel=1e-9), name


@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_texts_are_read_in_empty_batches_too(name):
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 7, (sum(SIZES), 5), generator=draw).to(torch.float32)
    data = TrainingData(
        train_inputs=tokens,
        train_labels=torch.randint(3, (sum(SIZES),), generator=draw),
        public_inputs=tokens[:0],
        public_labels=None,
        num_classes=3,
        vocabulary=7,
    )
    small = {"mlp": {"hidden": [6]}, "transformer": {"dim": 8, "depth": 1}}[name]
    model = ModelSettings(name=name, options=small)
    cohorts = [cohort_of(backend, model=model, data=data, batch_size=1) for backend in BOTH]
    for cohort in cohorts:
        cohort.fit(supervised, private=Passes(batch_size=1, steps=6))
    assert difference(*cohorts) < 1e-5
    assert all(np.isfinite(flat(own)).all() for own in cohorts[0].weights())


def test_these_batches_are_ragged_and_some_are_empty():
    drawn = []

    def noting(outputs, batch):
        drawn.append(len(batch.private_rows))
        return supervised(outputs, batch)

    cohort = cohort_of("loop", batch_size=1)
    cohort.fit(noting, private=Passes(batch_size=1, steps=6))
    rows = [work.trained[Network(MLP, cohort._data.input_shape)] for work in cohort.work]
    steps = [drawn[at : at + 7] for at in (0, 7, 14)]  # one more: rows are looked at alone once
    assert any(len(set(own)) > 1 for own in steps)
    assert sum(rows) < sum(drawn)


@pytest.mark.usefixtures("_double")
@BACKENDS
@pytest.mark.parametrize("name", ["mlp", "cnn", "gru", "lstm", "transformer"])
def test_a_step_that_draws_no_row_is_one_of_noise_alone(name, backend, monkeypatch):
    monkeypatch.setattr(
        PoissonPasses,
        "batches",
        lambda self, rows, rng: [np.zeros(0, np.int64)] * self.count(rows),
    )
    nothing = moved(backend, model=MODELS[name], noise_multipliers=(0.0, 1.0, 0.0))
    assert not nothing[0].any()
    assert not nothing[2].any()
    # std = 1.0 * 0.7 / 4
    assert nothing[1].std() == pytest.approx(0.7 / 4, rel=0.3)
    assert nothing[1].all()


@BACKENDS
def test_work_counts_expected_rows_and_not_those_that_were_drawn(backend):
    """How long a client takes is seen by others, and which rows were drawn must not be."""
    cohort = cohort_of(backend, sizes=(13, 21, 3))
    cohort.fit(supervised, private=Passes(batch_size=4, steps=5))
    counted = [work.trained[Network(MLP, cohort._data.input_shape)] for work in cohort.work]
    assert counted == [20, 20, 15]


@pytest.mark.usefixtures("_double")
@BACKENDS
def test_public_rows_stay_free(backend):
    # Without noise and clipped to nearly nothing, a step is that of the public rows alone.
    quiet = {"clip": 1e-12, "noise_multipliers": (0.0,) * 3}
    beside = moved(backend, both, public=lesson(), **quiet)
    plain = cohort_of(backend, private=None)
    before = [flat(own) for own in plain.weights()]

    def public_part(outputs, batch):
        return {"kd": distilled(outputs, batch, temperature=2.0)["kd"]}

    plain.fit(public_part, private=Passes(batch_size=4, steps=1), public=lesson())
    for own, other in zip(beside, moves(plain, before), strict=True):
        np.testing.assert_allclose(own, other, atol=1e-9)


# -- the noise ---------------------------------------------------------------------------------

WIDE = ModelSettings(name="mlp", options={"hidden": [5000]})
"""340 003 weights."""


def nothing(outputs, batch):
    """A loss of private rows that reaches no weight."""
    return {"ce": PerRow(0.0 * hard_label_rows(outputs.private.detach(), batch.labels))}


@BACKENDS
def test_noise_has_the_deviation_that_was_asked_for(backend):
    # multiplier * clip / expected batch; the last member has fewer rows than a batch.
    multipliers = (0.5, 2.0, 1.0)
    found = moved(
        backend,
        model=WIDE,
        clip=0.3,
        batch_size=8,
        noise_multipliers=multipliers,
        objective=nothing,
    )
    for own, multiplier, expected_batch in zip(found, multipliers, (8, 8, 5), strict=True):
        deviation = multiplier * 0.3 / expected_batch
        assert own.std() == pytest.approx(deviation, rel=0.005)
        assert abs(own.mean()) < 0.01 * deviation
        # Normal: 4.55 % beyond two deviations.
        assert (np.abs(own) > 2 * deviation).mean() == pytest.approx(0.0455, rel=0.05)
    every = np.concatenate([own / own.std() for own in found])
    assert every.size >= 1e6


@BACKENDS
def test_noise_is_on_weights_that_no_private_row_reaches(backend):
    found = moved(backend, objective=nothing)
    assert all(own.all() for own in found)


@BACKENDS
def test_noise_does_not_shrink_with_the_rows_that_were_drawn(backend, monkeypatch):
    # All of the rows drawn, or none of them: the noise on a step is the same to the bit.
    steps = []
    for drawn in (np.arange(5), np.zeros(0, np.int64)):
        monkeypatch.setattr(
            PoissonPasses, "batches", lambda self, rows, rng, drawn=drawn: [drawn] * 1
        )
        steps.append(moved(backend, objective=nothing))
    for full, empty in zip(*steps, strict=True):
        np.testing.assert_array_equal(full, empty)


def noise_of(backend, *, steps=1, **options):
    """What steps of noise alone added up to, by member."""
    passes = Passes(batch_size=4, steps=steps)
    model = ModelSettings(name="mlp", options={"hidden": [100]})
    return moved(backend, objective=nothing, passes=passes, model=model, **options)


@BACKENDS
def test_no_two_members_steps_attempts_or_rounds_share_noise(backend):
    firsts = noise_of(backend)
    both_steps = noise_of(backend, steps=2)
    seconds = [two - one for two, one in zip(both_steps, firsts, strict=True)]
    attempts, rounds = noise_of(backend, attempt=2), noise_of(backend, round=2)
    each = [own / own.std() for own in (*firsts, *seconds, *attempts, *rounds)]
    correlation = np.corrcoef(np.stack(each))[np.triu_indices(len(each), 1)]
    # Of 6803 weights, a correlation of nothing has a standard deviation of 0.012.
    assert np.abs(correlation).max() < 0.05


@BACKENDS
def test_fits_of_one_call_share_no_noise(backend):
    cohort = cohort_of(backend)
    found = []
    for _ in range(2):
        before = [flat(own) for own in cohort.weights()]
        cohort.fit(nothing, private=Passes(batch_size=4, steps=1))
        found.append(moves(cohort, before)[0])
    assert abs(np.corrcoef(found)[0, 1]) < 0.2


@BACKENDS
def test_another_attempt_draws_other_rows(backend):
    # Without noise, all that differs is which rows were drawn.
    quiet = {"noise_multipliers": (0.0,) * 3}
    first, again = moved(backend, **quiet), moved(backend, attempt=2, **quiet)
    assert all(np.abs(own - other).max() > 1e-4 for own, other in zip(first, again, strict=True))


@BACKENDS
def test_the_same_call_repeats_bit_for_bit(backend):
    passes = Passes(batch_size=4, epochs=2)
    for one, other in zip(
        *(moved(backend, both, passes=passes, public=lesson()) for _ in range(2)), strict=True
    ):
        assert one.tobytes() == other.tobytes()


@pytest.mark.usefixtures("_double")
@BACKENDS
def test_members_draw_the_same_alone_and_among_others(backend):
    # As client 0 alone; its rows are the first in either case.
    alone = moved(backend, passes=Passes(batch_size=4, epochs=2), sizes=(13,))
    among = moved(backend, passes=Passes(batch_size=4, epochs=2), data=rows_of(SIZES))
    data = rows_of(SIZES)
    same = moved(backend, passes=Passes(batch_size=4, epochs=2), sizes=(13,), data=data)
    assert np.abs(alone[0] - same[0]).max() > 0  # other numbers of rows, other rows
    np.testing.assert_allclose(same[0], among[0], atol=1e-9)


# -- one row more or less ----------------------------------------------------------------------

VALUES = st.sampled_from(
    [0.0, 1.0, -3.0, 1e3, -1e6, 1e12, 1e18, -1e25, 1e38, math.inf, -math.inf, math.nan]
)


@pytest.mark.parametrize(("name", "method"), [("mlp", "norms"), ("cnn", "norms"), ("mlp", "vmap")])
@BACKENDS
@settings(max_examples=8, deadline=None)
@given(values=st.lists(VALUES, min_size=1, max_size=4), label=st.integers(0, 2))
@example(values=[1e10], label=0)  # what comes back through a norm cancels out over the picture
def test_one_row_moves_the_sum_by_the_clip_at_most(backend, name, method, values, label):
    row = torch.tensor(values).repeat(16)[:64].repeat(64 // len(values) + 1)[:64]
    sums = []
    for size in (6, 7):
        whole = rows_of((7,))
        whole.train_inputs[6] = row.reshape(1, 8, 8)
        whole.train_labels[6] = label
        rule = Clipped(norm=0.3, expected_batch=1.0, method=method)
        optimizer = OptimizerSettings(name="sgd", lr=1.0)
        cohort = {"loop": LoopCohort, "vmap": VmapCohort}[backend](
            [Member(0, np.arange(size)), Member(1, np.arange(2))],
            model=MODELS[name],
            optimizer=optimizer,
            data=whole,
            pool=ModelPool(whole, optimizer),
            streams=Streams(seed=7),
        )
        before = [flat(own) for own in cohort.weights()]
        cohort.fit(supervised, private=Passes(batch_size=16, steps=1), gradient=rule)
        after = [flat(own) for own in cohort.weights()]
        sums.append([start - now for start, now in zip(before, after, strict=True)])
    mine = np.linalg.norm(sums[1][0] - sums[0][0])
    assert mine <= 0.3 * (1 + 1e-4)
    assert np.abs(sums[1][1] - sums[0][1]).max() < 1e-5


@BACKENDS
@pytest.mark.parametrize("name", ["mlp", "gru"])
def test_a_row_that_is_no_number_counts_for_nothing(name, backend):
    data = rows_of(SIZES)
    data.train_inputs[0] = math.nan
    quiet = {"batch_size": 21, "noise_multipliers": (0.0,) * 3, "model": MODELS[name]}
    found = moved(backend, both, data=data, public=lesson(), **quiet)
    assert all(np.isfinite(own).all() for own in found)

    def without(outputs, batch):
        losses = both(outputs, batch)
        kept = torch.where(batch.private_rows == 0, 0.0, 1.0)
        rows = losses["ce"].values * losses["ce"].weights
        return {**losses, "ce": PerRow(kept * rows, of="private")}

    expected = moved(backend, without, public=lesson(), **quiet)
    for own, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(own, other, atol=1e-5)


@BACKENDS
def test_no_other_client_s_row_reaches_a_member_by_way_of_padding(backend):
    # Batches are padded with some row's numbers; that row may hold none.
    quiet = {"noise_multipliers": (0.0,) * 3}
    passes = Passes(batch_size=4, steps=3)
    data = rows_of(SIZES)
    data.train_inputs[0] = math.nan
    broken, whole = (
        moved(backend, passes=passes, data=each, **quiet) for each in (data, rows_of(SIZES))
    )
    for own, other in list(zip(broken, whole, strict=True))[1:]:
        np.testing.assert_allclose(own, other, atol=1e-6)


@BACKENDS
def test_a_huge_loss_moves_a_step_by_the_clip_over_the_expected_batch(backend):
    def scaled(scale, outputs, batch):
        factors = torch.where(batch.private_rows == 2, scale, 1.0)
        return {"ce": PerRow(factors * hard_label_rows(outputs.private, batch.labels))}

    quiet = {"batch_size": 21, "noise_multipliers": (0.0,) * 3}
    with_row = moved(backend, partial(scaled, 1e6), **quiet)[0]
    without = moved(backend, partial(scaled, 0.0), **quiet)[0]
    assert np.linalg.norm(with_row - without) == pytest.approx(0.7 / 13, rel=1e-3)


@BACKENDS
def test_the_sum_is_divided_by_the_expected_batch_and_not_by_the_rows_drawn(backend, monkeypatch):
    quiet = {"noise_multipliers": (0.0,) * 3, "clip": 1e-3}
    sums = []
    for count in (1, 4):
        monkeypatch.setattr(
            PoissonPasses,
            "batches",
            lambda self, rows, rng, count=count: [np.repeat(0, count)],
        )
        sums.append(moved(backend, **quiet))
    for once, four_times in zip(*sums, strict=True):
        assert np.linalg.norm(once) == pytest.approx(1e-3 / 4, rel=1e-2)
        assert np.linalg.norm(four_times) == pytest.approx(1e-3, rel=1e-2)


# -- what an algorithm asks for has no say -----------------------------------------------------


@BACKENDS
def test_whatever_rule_is_asked_for_steps_are_private(backend):
    plain = moved(backend)
    asked = moved(backend, gradient=Clipped(norm=100.0, expected_batch=0.01))
    for own, other in zip(plain, asked, strict=True):
        np.testing.assert_array_equal(own, other)


@BACKENDS
def test_a_proximal_pull_comes_on_top_without_being_clipped_or_noised(backend):
    passes = Passes(batch_size=4, steps=2)
    free = moved(backend, objective=nothing, passes=passes)
    held = moved(backend, objective=nothing, passes=passes, gradient=Proximal(mu=0.5))
    first = moved(backend, objective=nothing)
    for own, pulled, one in zip(free, held, first, strict=True):
        # After a first step of -LR * g1, the pull is mu * (-LR * g1).
        np.testing.assert_allclose(own - pulled, 0.5 * LR * one, atol=1e-5)


# -- refused -----------------------------------------------------------------------------------

PASSES = Passes(batch_size=4, steps=2)
TWO = {"private": MLP, "proxy": ModelSettings(name="mlp", options={"hidden": [6]})}


def untouched(cohort):
    """Fail where anything has moved."""
    fresh = cohort_of("loop" if isinstance(cohort, LoopCohort) else "vmap", model=cohort._models)
    for name in cohort._models:
        for own, other in zip(cohort.weights(model=name), fresh.weights(model=name), strict=True):
            np.testing.assert_array_equal(flat(own), flat(other))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            ModelSettings(name="cnn", options={"channels": [4], "norm": "batch"}),
            r"layer '1' of model 'model' is a BatchNorm2d, which mixes .*: use norm: group",
        ),
        (
            ModelSettings(name="odd_models:make", options={"kind": "Running"}),
            r"is a InstanceNorm1d that keeps running statistics .*: use norm: group",
        ),
        (
            ModelSettings(name="odd_models:make", options={"kind": "Bounded"}),
            r"is a Embedding with max_norm.*: leave max_norm out",
        ),
        (
            ModelSettings(name="odd_models:make", options={"kind": "Remembering"}),
            r"buffer 'seen' of model 'model' changed while it learnt .*: use a model that keeps",
        ),
        (
            ModelSettings(name="odd_models:make", options={"kind": "Centred"}),
            r"model 'model' puts out other numbers for a row beside other rows.*; use a model that",
        ),
    ],
    ids=["batch norm", "running statistics", "max_norm", "buffer", "centred"],
)
def test_models_that_keep_what_they_saw_are_refused(model, message):
    cohort = cohort_of("loop", model=model)
    with pytest.raises(PrivacyError, match=message):
        cohort.fit(supervised, private=PASSES)
    untouched(cohort)


@BACKENDS
def test_buffers_that_change_in_later_steps_are_refused(backend):
    model = ModelSettings(name="odd_models:make", options={"kind": "Counting"})
    cohort = cohort_of(backend, model=model)
    with pytest.raises(PrivacyError, match=r"buffer 'seen' of model 'model' changed while it"):
        cohort.fit(supervised, private=Passes(batch_size=4, steps=6))


@BACKENDS
def test_a_stacked_batch_norm_is_refused_too(backend):
    model = ModelSettings(name="cnn", options={"channels": [4], "norm": "batch"})
    cohort = cohort_of(backend, model=model)
    with pytest.raises(PrivacyError, match=r"is a BatchNorm2d, which mixes .*: use norm: group"):
        cohort.fit(supervised, private=PASSES)
    cohort.fit(partial(distilled, temperature=2.0), public=lesson())


@BACKENDS
def test_outputs_and_examples_of_private_rows_are_refused(backend):
    cohort = cohort_of(backend)
    with pytest.raises(PrivacyError, match=r"keep_outputs .*: ask for outputs on public rows"):
        cohort.fit(supervised, private=PASSES, keep_outputs=True)
    with pytest.raises(PrivacyError, match=r"nothing but fits may see private rows.*public set"):
        cohort.outputs(on="private")
    with pytest.raises(PrivacyError, match=r"nothing but fits may see private rows.*public set"):
        cohort.examples(on="private")
    table = Table([np.zeros(size) for size in SIZES], of="private")
    with pytest.raises(PrivacyError, match=r"table 'hints' has a number for each private row"):
        cohort.fit(supervised, private=PASSES, tables={"hints": table})
    untouched(cohort)


def mutual(outputs, batch):
    return {
        name: PerRow(hard_label_rows(own.private, batch.labels), of="private")
        for name, own in outputs.items()
    }


@BACKENDS
def test_peers_that_learn_on_private_rows_are_refused(backend):
    cohort = cohort_of(backend, model=TWO)
    with pytest.raises(PrivacyError, match=r"models 'private', 'proxy' learn from each other on"):
        cohort.fit(mutual, private=PASSES, models=list(TWO))
    peers = ComposedObjective(
        learners={
            name: Learner(objective=Objective.model_validate({"ce": 1.0}), teacher=teacher)
            for name, teacher in (("private", "proxy"), ("proxy", "private"))
        }
    )
    with pytest.raises(PrivacyError, match=r"models 'private', 'proxy' learn from each other on"):
        cohort.fit(peers, private=PASSES)
    untouched(cohort)


@BACKENDS
def test_parts_beside_a_model_are_refused(backend):
    cohort = cohort_of(backend)
    with pytest.raises(PrivacyError, match=r"parts that are trained beside .* get no noise"):
        cohort.fit(supervised, private=PASSES, parts={"scale": lambda: torch.nn.Linear(3, 3)})
    learned = ComposedObjective(
        learners={
            "model": Learner(
                objective=Objective.model_validate({"ce": 1.0, "kd": {"learned": True}})
            )
        }
    )
    with pytest.raises(PrivacyError, match=r"parts that are trained beside .* get no noise"):
        cohort.fit(learned, private=PASSES, public=lesson())
    untouched(cohort)


@BACKENDS
def test_other_batches_and_more_steps_than_were_paid_for_are_refused(backend):
    cohort = cohort_of(backend, most_steps=(5, 5, 3))
    with pytest.raises(PrivacyError, match=r"batches of 4 rows, and a fit asks for 8: use passes"):
        cohort.fit(supervised, private=Passes(batch_size=8, steps=1))
    with pytest.raises(PrivacyError, match=r"client 2 would take 4 steps .* and 3 were paid for"):
        cohort.fit(supervised, private=Passes(batch_size=4, steps=4))
    untouched(cohort)
    cohort.fit(supervised, private=PASSES)
    before = [flat(own) for own in cohort.weights()]
    with pytest.raises(PrivacyError, match=r"client 2 would take 4 steps .* and 3 were paid for"):
        cohort.fit(supervised, private=PASSES)
    for own, other in zip(before, cohort.weights(), strict=True):
        np.testing.assert_array_equal(own, flat(other))
    # A member without steps pays for none.
    none = Passes(batch_size=4, epochs=0)
    cohort.fit(supervised, private=[PASSES, PASSES, none])


@BACKENDS
def test_an_objective_without_a_term_in_force_pays_for_no_step(backend):
    cohort = cohort_of(backend, most_steps=(0,) * 3)
    off = ComposedObjective(
        learners={"model": Learner(objective=Objective.model_validate({"ce": 0.0}))}
    )
    cohort.fit(off, private=PASSES)
    untouched(cohort)


@BACKENDS
def test_losses_in_which_rows_see_each_other_are_refused(backend):
    def spread(outputs, batch):
        return {"spread": WholeStep(outputs.private.var())}

    def by_share(outputs, batch):
        rows = hard_label_rows(outputs.private, batch.labels)
        return {"ce": PerRow(rows, of="private", weights=rows.detach() / rows.detach().sum())}

    def centred(outputs, batch):
        rows = hard_label_rows(outputs.private, batch.labels)
        return {"ce": PerRow((rows - rows.detach().mean()).square(), of="private")}

    def taught(outputs, batch):
        mean = outputs.private.detach().mean(0)
        far = (outputs.public - mean).square().sum(1)
        return {**supervised(outputs, batch), "kd": PerRow(far, of="public")}

    whole = {"batch_size": 21}
    for objective, message in (
        (spread, r"loss 'spread' compares the rows of a step"),
        (by_share, r"loss 'ce' of private rows depends on which other private rows"),
        (centred, r"loss 'ce' of private rows depends on which other private rows"),
        (taught, r"loss 'kd' of public rows depends on which private rows"),
    ):
        cohort = cohort_of(backend, **whole)
        options = {"public": lesson()} if objective is taught else {}
        with pytest.raises(ValueError, match=message):
            cohort.fit(objective, private=Passes(batch_size=21, steps=2), **options)
        untouched(cohort)


@BACKENDS
def test_what_costs_no_privacy_stays_allowed(backend):
    cohort = cohort_of(backend, model=TWO)
    averages = {"mean": Average(decay=0.9)}
    cohort.freeze("teacher", cohort.weights()[0])

    def taught(outputs, batch):
        own, other = outputs["private"], outputs["teacher"]
        rows = (own.private - other.private).square().sum(1)
        return {"kd": PerRow(rows, of="private")}

    cohort.fit(taught, private=PASSES, averages=averages, frozen=["teacher"])

    def peers(outputs, batch):
        own, other = outputs["private"].public, outputs["proxy"].public
        return {"kd": PerRow((own - other).square().sum(1), of="public")}

    cohort.fit(peers, public=lesson(), models=list(TWO), keep_outputs=False)
    assert cohort.outputs(on=np.arange(4))[0].logits.shape == (4, 3)
    assert cohort.outputs(on=np.arange(4), model="mean")[0].logits.shape == (4, 3)
    assert cohort.predict_public(np.arange(4)).shape == (3, 4, 3)
    assert len(cohort.examples(on=np.arange(3))) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": 0.0}, "clip must be > 0 and finite, got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"attempt": 0}, "attempt must be >= 1, got 0"),
        ({"noise_multipliers": (1.0, -1.0)}, "noise_multipliers must be >= 0 and finite, got -1"),
        ({"most_steps": (1, -1)}, "most_steps must be >= 0, got -1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        learning(2, **options)


@BACKENDS
def test_numbers_of_other_members_are_refused(backend):
    with pytest.raises(ValueError, match="most_steps must have a number for each of 3 members"):
        cohort_of(backend, most_steps=(1, 2))
