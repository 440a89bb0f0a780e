"""The loop backend: the arithmetic of a plain PyTorch loop, and nothing that leaks."""

from collections import defaultdict
from dataclasses import replace
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from own_objectives import distilled
from torch import nn

from fedkd.models import ModelSettings, build_model
from fedkd.models.dropout import connect_dropout, step_keys
from fedkd.randomness import Purpose, generator_for
from fedkd.targets import Targets
from fedkd.training import (
    ModelPool,
    OptimizerSettings,
    Passes,
    PublicLesson,
    TrainingData,
    initial_model_seed,
    supervised,
    supervised_public,
)
from fedkd.training.pool import Slot


class Probe(nn.Module):
    """A small network that remembers each call: which instance, in which mode, how many rows."""

    calls: ClassVar[list[tuple["Probe", bool, int]]] = []

    def __init__(
        self, *, input_shape, num_classes, batch_norm: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.hidden = nn.Linear(int(np.prod(input_shape)), 8)
        self.norm = nn.BatchNorm1d(8) if batch_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.scores = nn.Linear(8, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        Probe.calls.append((self, self.training, len(images)))
        hidden = self.norm(self.hidden(images.flatten(1)))
        logits: torch.Tensor = self.scores(self.dropout(F.relu(hidden)))
        return logits


@pytest.fixture(autouse=True)
def calls():
    Probe.calls.clear()
    yield Probe.calls
    Probe.calls.clear()


def probe(**options):
    return ModelSettings(name=f"{__name__}:Probe", options=options)


MODELS = [
    ModelSettings(name="mlp", options={"hidden": [8]}),
    ModelSettings(name="mlp", options={"hidden": [8], "dropout": 0.5}),
    ModelSettings(name="cnn", options={"channels": [4], "norm": "batch"}),
]
MODEL_IDS = ["plain", "dropout", "batch norm"]
PRIVATE = Passes(batch_size=5, epochs=2)


def lesson(rows=(0, 3, 4, 8, 11, 15, 19), *, members=None, seed=0, epochs=1, batch_size=4):
    rows = np.array(rows)
    shape = (len(rows), 3) if members is None else (members, len(rows), 3)
    scores = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return PublicLesson(
        rows=rows,
        targets=Targets(F.softmax(scores, -1).numpy(), scale="probabilities", temperature=2.0),
        passes=Passes(batch_size=batch_size, epochs=epochs),
    )


kd = partial(distilled, temperature=2.0)


# -- the arithmetic ----------------------------------------------------------------------------


def by_hand(data, client, model, settings, fits, *, lr_at=None, seed=7, plain=False):
    """Plain PyTorch: for each fit (private passes, public lesson), the steps one by one."""
    network = build_model(
        model,
        input_shape=data.input_shape,
        num_classes=data.num_classes,
        seed=initial_model_seed(seed, client),
    )
    if model.channels_last and not plain:
        network = network.to(memory_format=torch.channels_last)
    dropout = connect_dropout(network)
    optimizer = settings(network.parameters())
    own = torch.arange(12) + 12 * client
    with torch.random.fork_rng():
        for position, (private, public) in enumerate(fits):
            # Fits on public rows alone have streams, and numbers, of their own.
            purpose = Purpose.TRAIN if private else Purpose.TRAIN_PUBLIC
            number = sum(bool(before) == bool(private) for before, _ in fits[:position])
            rng = generator_for(seed, purpose, 1, client, number)
            fit_seed = int(rng.integers(2**62))
            torch.manual_seed(fit_seed)
            own_batches = private.batches(12, rng) if private else None
            if public is not None:
                passes = public.passes
                if private:
                    passes = passes.spread_over(len(own_batches), len(public.rows))
                public_batches = passes.batches(len(public.rows), rng)
            network.train()
            steps = len(own_batches if private else public_batches)
            for step in range(steps):
                if dropout is not None:
                    dropout.begin(torch.from_numpy(step_keys(fit_seed, steps))[step])
                images, count, loss = [], 0, 0.0
                if private:
                    rows = own[own_batches[step]]
                    images.append(data.train_inputs[rows])
                    count = len(rows)
                if public is not None:
                    positions = public_batches[step]
                    images.append(data.public_inputs[public.rows[positions]])
                logits = network(torch.cat(images))
                if private:
                    loss = F.cross_entropy(logits[:count], data.train_labels[rows])
                if public is not None:
                    target = public.targets.tensor[positions]
                    log_p = F.log_softmax(logits[count:] / 2.0, -1)
                    divergence = (torch.xlogy(target, target) - target * log_p).sum(-1)
                    loss = loss + divergence.sum() / len(target) * 4.0
                if lr_at is not None:
                    optimizer.param_groups[0]["lr"] = lr_at(step, steps)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return {name: tensor.numpy() for name, tensor in network.state_dict().items()}


FITS = {
    "private rows": [(PRIVATE, None)],
    "public rows": [(None, lesson(epochs=3))],
    "both in one step": [(PRIVATE, lesson())],
    "digest, then revisit": [(None, lesson()), (PRIVATE, None), (None, lesson(seed=1))],
}


@pytest.mark.parametrize("model", MODELS, ids=MODEL_IDS)
@pytest.mark.parametrize("fits", FITS.values(), ids=FITS.keys())
def test_trains_like_a_plain_loop_bit_for_bit(make_cohort, tensors, same_bits, model, fits):
    data = tensors()
    cohort = make_cohort((2,), model=model, data=data)
    for private, public in fits:
        cohort.fit(kd if public is not None else supervised, private=private, public=public)
    expected = by_hand(
        data, 2, model, partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True), fits
    )
    assert same_bits(cohort.weights()[0], expected)


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({"name": "adam", "lr": 0.01}, partial(torch.optim.Adam, lr=0.01, fused=True)),
        (
            {"name": "adamw", "lr": 0.01, "weight_decay": 0.1},
            partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, fused=True),
        ),
        (
            {"name": "rmsprop", "lr": 0.01, "momentum": 0.5},
            partial(torch.optim.RMSprop, lr=0.01, momentum=0.5),
        ),
    ],
    ids=["adam", "adamw", "rmsprop"],
)
def test_every_optimizer_trains_like_its_plain_self(
    make_cohort, tensors, same_bits, options, plain
):
    data = tensors()
    cohort = make_cohort(data=data, optimizer=OptimizerSettings.model_validate(options))
    cohort.fit(kd, private=PRIVATE, public=lesson())
    assert same_bits(cohort.weights()[0], by_hand(data, 0, MODELS[0], plain, [(PRIVATE, lesson())]))


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
        {"name": "adam", "lr": 0.01},
        {"name": "adamw", "lr": 0.01, "weight_decay": 0.1},
    ],
    ids=lambda settings: settings["name"],
)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lenet", {}),
        ("cnn", {}),
        ("cnn", {"norm": "group", "hidden": [6]}),
        ("cnn", {"halving": "stride"}),
        ("tutorial_teacher", {}),
    ],
    ids=str,
)
def test_fused_updates_and_channels_last_agree_with_the_plain_formula(
    make_cohort, tensors, float64, name, options, settings
):
    # In float64, where rounding is far below any other arithmetic.
    data, model = tensors(), ModelSettings(name=name, options=options)
    data = replace(
        data, train_inputs=data.train_inputs.double(), public_inputs=data.public_inputs.double()
    )
    optimizer = OptimizerSettings.model_validate(settings)
    cohort = make_cohort(model=model, data=data, optimizer=optimizer)
    cohort.fit(kd, private=PRIVATE, public=lesson())
    plain = {key: value for key, value in settings.items() if key != "name"}
    of_torch = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    slow = partial(of_torch[settings["name"]], **plain, foreach=False, fused=False)
    expected = by_hand(data, 0, model, slow, [(PRIVATE, lesson())], plain=True)
    own = cohort.weights()[0]
    assert own.keys() == expected.keys()
    for weight, values in expected.items():
        np.testing.assert_allclose(own[weight], values, rtol=1e-9, atol=1e-9)


def test_a_state_does_not_tell_how_its_weights_lay_in_memory(make_cohort, tensors):
    data, adam = tensors(), OptimizerSettings(name="adam")
    model = ModelSettings(name="lenet")
    pool = ModelPool(data, adam)
    assert not pool.slots("model", model, 1)[0].tensors["3.weight"].is_contiguous()
    cohort = make_cohort(model=model, data=data, optimizer=adam, pool=pool)
    cohort.fit(supervised, private=PRIVATE)
    (state,) = cohort.states()
    assert all(array.flags.c_contiguous for array in state.to_arrays().values())
    slot = pool.slots("model", model, 1)[0]
    slot.load(state.models["model"])
    again = slot.state()
    for kind, expected in (
        (again.weights, state.models["model"].weights),
        (again.optimizer, state.models["model"].optimizer),
    ):
        assert kind.keys() == expected.keys()
        assert all(np.array_equal(kind[key], expected[key]) for key in expected)


def test_learning_rate_follows_warm_up_and_decay_at_every_step(make_cohort, tensors, same_bits):
    data = tensors()
    optimizer = OptimizerSettings.model_validate(
        {
            "name": "sgd",
            "lr": 0.2,
            "warm_up": 0.25,
            "decay": {"kind": "linear", "start": 1.0, "end": 0.0},
        }
    )
    cohort = make_cohort(data=data, optimizer=optimizer, rounds=2)
    cohort.fit(supervised, private=PRIVATE)

    def lr_at(step, steps):
        progress = step / (2 * steps - 1)  # in the first of two rounds, of equally many steps
        return 0.2 * min(1.0, progress / 0.25) * (1 - progress)

    expected = by_hand(
        data,
        0,
        MODELS[0],
        partial(torch.optim.SGD, lr=0.2, fused=True),
        [(PRIVATE, None)],
        lr_at=lr_at,
    )
    assert same_bits(cohort.weights()[0], expected)


def test_kd_term_is_the_divergence_that_pytorch_computes(make_cohort):
    # The hand-written loop above spells the formula; this is PyTorch's own.
    cohort = make_cohort(optimizer=OptimizerSettings(name="sgd", decay=0.0))
    taught = lesson(batch_size=7)
    before = torch.from_numpy(cohort.predict_public(taught.rows)[0])
    cohort.fit(kd, public=taught)
    expected = 4 * F.kl_div(
        F.log_softmax(before / 2, -1), taught.targets.tensor, reduction="batchmean"
    )
    assert cohort.metrics()[0] == {"loss/kd": pytest.approx(expected.item(), rel=1e-5)}


# -- a cohort is its members -------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS, ids=MODEL_IDS)
def test_a_cohort_of_three_is_three_cohorts_of_one(make_cohort, tensors, same_bits, model):
    data, taught = tensors(), lesson(members=3)
    together = make_cohort((0, 1, 3), model=model, data=data)
    together.fit(kd, private=PRIVATE, public=taught)
    together.fit(supervised, private=PRIVATE)
    rows = np.arange(20)
    for position, client in enumerate((0, 1, 3)):
        alone = make_cohort((client,), model=model, data=data)
        targets = taught.targets.of(taught.targets.values[position])
        own = PublicLesson(rows=taught.rows, targets=targets, passes=taught.passes)
        alone.fit(kd, private=PRIVATE, public=own)
        alone.fit(supervised, private=PRIVATE)
        assert same_bits(together.states()[position].to_arrays(), alone.states()[0].to_arrays())
        assert np.array_equal(
            together.predict_public(rows)[position], alone.predict_public(rows)[0]
        )
        assert together.metrics()[position] == alone.metrics()[0]


def test_the_order_of_members_does_not_matter(make_cohort, same_bits):
    one, other = make_cohort((0, 1)), make_cohort((1, 0))
    for cohort in (one, other):
        cohort.fit(supervised, private=PRIVATE)
    assert same_bits(one.weights()[0], other.weights()[1])
    assert same_bits(one.weights()[1], other.weights()[0])
    assert one.clients == (0, 1)


def test_what_a_slot_held_before_never_matters(make_cohort, tensors, same_bits):
    optimizer, data = OptimizerSettings(name="adam"), tensors()
    pool = ModelPool(data, optimizer)
    model = MODELS[2]
    fresh = make_cohort((1,), model=model, data=data, optimizer=optimizer)
    make_cohort((0, 2), model=model, data=data, optimizer=optimizer, pool=pool).fit(
        kd, private=PRIVATE, public=lesson()
    )
    used = make_cohort((1,), model=model, data=data, optimizer=optimizer, pool=pool)
    for cohort in (fresh, used):
        cohort.fit(supervised, private=PRIVATE)
    assert same_bits(used.states()[0].to_arrays(), fresh.states()[0].to_arrays())


class Counting(nn.Module):
    """Puts a new buffer in the place of the old one at every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.passes = self.passes + 1
        return self.linear(inputs) + self.passes


def test_a_buffer_that_a_failed_call_left_behind_is_not_the_next_client_s():
    slot = Slot(Counting(), OptimizerSettings(name="sgd"), torch.device("cpu"))
    start = slot.state()
    # As after an error in the middle of a fit: nobody copied the buffer back.
    slot.module(torch.zeros(1, 2))
    slot.load(start)
    slot.module(torch.zeros(1, 2))
    slot.keep_buffers()
    assert slot.weights()["passes"] == 1


def test_members_start_from_weights_of_their_own_whatever_the_round(make_cohort, same_bits):
    first, second = make_cohort((0, 1)).weights()
    assert not same_bits(first, second)
    assert same_bits(make_cohort((1,), round=5, rounds=9).weights()[0], second)
    assert not same_bits(make_cohort((1,), seed=8).weights()[0], second)


@pytest.mark.parametrize("change", [{"round": 2, "rounds": 2}, {"seed": 8}])
def test_round_and_seed_decide_what_is_drawn(make_cohort, same_bits, change):
    (start,) = make_cohort().states()
    results = []
    for streams in ({"rounds": 2}, {"rounds": 2}, change):
        cohort = make_cohort(states=[start], **streams)
        cohort.fit(supervised, private=PRIVATE)
        results.append(cohort.weights()[0])
    assert same_bits(results[0], results[1])
    assert not same_bits(results[0], results[2])


def test_every_fit_draws_anew(make_cohort):
    seen = []

    def spy(outputs, batch):
        seen.append(batch.labels.tolist())
        return supervised(outputs, batch)

    cohort = make_cohort()
    for _ in range(2):
        cohort.fit(spy, private=Passes(batch_size=12))
    assert sorted(seen[0]) == sorted(seen[1])
    assert seen[0] != seen[1]


# -- targets belong to rows --------------------------------------------------------------------


def test_a_teacher_that_knows_the_labels_is_agreed_with(make_cohort, tensors):
    data = tensors(labelled=True)
    rows = np.arange(20)
    sure = F.one_hot(data.public_labels, 3).float().numpy()
    targets = Targets(sure, scale="probabilities", temperature=2.0)
    cohort = make_cohort(data=data, optimizer=OptimizerSettings(name="adam", lr=0.05))
    passes = Passes(batch_size=6, epochs=15)
    cohort.fit(kd, public=PublicLesson(rows=rows, targets=targets, passes=passes))
    predicted = cohort.predict_public(rows)[0].argmax(-1)
    assert np.array_equal(predicted, data.public_labels.numpy())


@pytest.mark.parametrize("beside_private_rows", [False, True])
def test_each_public_row_meets_its_own_target_in_every_step(
    make_cohort, tensors, beside_private_rows
):
    # The target of a row is its number, and an identity model shows which row came in.
    plain = tensors(public=20)
    marked = plain.public_inputs.clone()
    marked[:, 0, 0, 0] = torch.arange(20) + 1000.0
    data = TrainingData(
        train_inputs=plain.train_inputs,
        train_labels=plain.train_labels,
        public_inputs=marked,
        public_labels=torch.arange(20) % 3,
        num_classes=3,
    )
    rows = np.array([1, 2, 5, 7, 12, 18, 19])
    numbers = np.repeat(rows[:, None] + 1000.0, 3, axis=1).astype(np.float32)
    met = []

    def spy(outputs, batch):
        shown = outputs.public.detach()[:, 0] - 1000
        met.extend(shown.round().long().tolist())
        assert torch.equal(shown + 1000, batch.targets.logits()[:, 0])
        assert torch.equal(batch.public_labels, shown.round().long() % 3)
        return {"nothing": 0 * outputs.public.sum()}

    cohort = make_cohort(data=data, model=ModelSettings(name=f"{__name__}:Corner"))
    cohort.fit(
        spy,
        private=PRIVATE if beside_private_rows else None,
        public=PublicLesson(rows=rows, targets=Targets(numbers), passes=Passes(batch_size=3)),
    )
    assert set(met) == set(rows.tolist())


class Corner(nn.Module):
    """Repeats the first pixel of an image once a class; its weight only gives gradients a place."""

    def __init__(self, *, input_shape, num_classes) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, 0, 0, :1].repeat(1, self.num_classes) * self.weight


def test_a_scalar_parameter_keeps_its_optimizer_slots(make_cohort, same_bits):
    cohort = make_cohort(
        model=ModelSettings(name=f"{__name__}:Corner"), optimizer=OptimizerSettings(name="adam")
    )
    cohort.fit(supervised, private=PRIVATE)
    (state,) = cohort.states()
    again = make_cohort(
        model=ModelSettings(name=f"{__name__}:Corner"),
        optimizer=OptimizerSettings(name="adam"),
        states=[state],
    )
    assert same_bits(again.states()[0].to_arrays(), state.to_arrays())


def test_rows_in_another_order_bring_their_targets_along(make_cohort):
    # Full batches of the same pairs, listed in another order: equal but for the order of a sum.
    rows = np.array([1, 4, 6, 13])
    targets = lesson(rows).targets
    order = np.array([2, 0, 3, 1])
    results = []
    for listed, belonging in ((rows, targets), (rows[order], targets.of(targets.values[order]))):
        cohort = make_cohort()
        passes = Passes(batch_size=4, epochs=5)
        cohort.fit(kd, public=PublicLesson(rows=listed, targets=belonging, passes=passes))
        results.append(cohort.predict_public(np.arange(20)))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_predictions_of_some_rows_are_those_rows_of_all_predictions(make_cohort):
    cohort = make_cohort((0, 1))
    every = cohort.predict_public(np.arange(20))
    rows = np.array([17, 2, 9])
    assert every.shape == (2, 20, 3)
    assert every.dtype == np.float32
    np.testing.assert_allclose(cohort.predict_public(rows), every[:, rows], rtol=1e-5, atol=1e-6)


# -- gradients stay at home --------------------------------------------------------------------


def test_while_one_member_trains_the_others_keep_weights_and_have_no_gradients(
    make_cohort, calls, same_bits
):
    cohort = make_cohort((0, 1, 2), model=probe())
    cohort.predict_public(np.arange(3))
    modules = [module for module, _, _ in calls[-3:]]
    assert len(set(map(id, modules))) == 3
    calls.clear()
    start = cohort.weights()
    done = {}

    def spy(outputs, batch):
        training = modules.index(calls[-1][0])
        weights = cohort.weights()
        for other in range(3):
            if other > training:
                assert same_bits(weights[other], start[other])
                assert all(p.grad is None for p in modules[other].parameters())
            if other < training:
                assert same_bits(weights[other], done.setdefault(other, weights[other]))
        assert not batch.targets.logits().requires_grad
        return kd(outputs, batch)

    cohort.fit(spy, private=PRIVATE, public=lesson(members=3))
    for member, weights in done.items():
        assert same_bits(cohort.weights()[member], weights)
    assert sorted(done) == [0, 1]


def test_gradients_of_a_step_are_its_own(make_cohort, tensors, calls):
    # A step that is worth nothing moves nothing, even right after one that was worth a lot.
    cohort = make_cohort(model=probe(), optimizer=OptimizerSettings(name="sgd", lr=0.1))
    snapshots = []

    def spy(outputs, batch):
        snapshots.append(cohort.weights()[0])
        worth = 1.0 if len(snapshots) == 1 else 0.0
        return {"ce": worth * supervised(outputs, batch)["ce"]}

    cohort.fit(spy, private=Passes(batch_size=4, steps=3))
    assert np.abs(snapshots[1]["scores.weight"] - snapshots[0]["scores.weight"]).max() > 0
    assert np.array_equal(snapshots[2]["scores.weight"], snapshots[1]["scores.weight"])
    assert np.array_equal(cohort.weights()[0]["scores.weight"], snapshots[1]["scores.weight"])


def test_data_and_targets_are_never_written_to(make_cohort, tensors):
    data, taught = tensors(labelled=True), lesson(members=2)
    before = [t.clone() for t in (data.train_inputs, data.public_inputs, data.train_labels)]
    targets = taught.targets.values.copy()
    cohort = make_cohort((0, 1), data=data)
    cohort.fit(kd, private=PRIVATE, public=taught)
    cohort.predict_public(np.arange(20))
    for tensor, copy in zip(
        (data.train_inputs, data.public_inputs, data.train_labels), before, strict=True
    ):
        assert torch.equal(tensor, copy)
    assert np.array_equal(taught.targets.values, targets)


# -- modes -------------------------------------------------------------------------------------


def test_trains_in_training_mode_at_every_fit_even_after_a_prediction(make_cohort, calls):
    cohort = make_cohort((0, 1), model=probe())
    for _ in range(3):
        calls.clear()
        cohort.fit(supervised, private=PRIVATE)
        assert {training for _, training, _ in calls} == {True}
        calls.clear()
        cohort.predict_public(np.arange(20))
        assert {training for _, training, _ in calls} == {False}


def test_batch_norm_counts_every_step_once(make_cohort):
    cohort = make_cohort((0, 1), model=probe(batch_norm=True))
    for _ in range(2):
        cohort.fit(kd, private=Passes(batch_size=5, steps=3), public=lesson())
        cohort.predict_public(np.arange(20))
        cohort.fit(supervised, private=Passes(batch_size=5, steps=4))
    for weights in cohort.weights():
        assert weights["norm.num_batches_tracked"] == 2 * (3 + 4)


@pytest.mark.parametrize("model", MODELS, ids=MODEL_IDS)
def test_predicting_changes_nothing_and_says_the_same_twice(make_cohort, same_bits, model):
    cohort = make_cohort((0, 1), model=model)
    cohort.fit(supervised, private=PRIVATE)
    before = [state.to_arrays() for state in cohort.states()]
    first = cohort.predict_public(np.arange(20))
    second = cohort.predict_public(np.arange(20))
    assert first.tobytes() == second.tobytes()
    for state, arrays in zip(cohort.states(), before, strict=True):
        assert same_bits(state.to_arrays(), arrays)


def test_predictions_do_not_depend_on_what_is_predicted_beside_them(make_cohort):
    # More rows than one chunk of a prediction.
    cohort = make_cohort(model=MODELS[2])
    cohort.fit(supervised, private=PRIVATE)
    rows = np.resize(np.arange(20), 2100)
    logits = cohort.predict_public(rows)[0]
    np.testing.assert_allclose(logits, np.resize(logits[:20], logits.shape), rtol=1e-5, atol=1e-6)


def test_one_forward_pass_a_step_and_member(make_cohort, calls):
    cohort = make_cohort((0, 1), model=probe())
    calls.clear()
    cohort.fit(kd, private=Passes(batch_size=5, steps=6), public=lesson())
    per_module = defaultdict(list)
    for module, _, rows in calls:
        per_module[id(module)].append(rows)
    assert [len(rows) for rows in per_module.values()] == [6, 6]
    # 12 private rows in batches of 5, 5 and 2; 7 public rows twice over 6 steps.
    for rows in per_module.values():
        assert sum(rows) == 2 * 12 + 2 * 7


# -- nothing is shared -------------------------------------------------------------------------


def storages(arrays):
    return {array.__array_interface__["data"][0] for array in arrays.values()}


def test_members_never_share_storage(make_cohort, calls):
    cohort = make_cohort((0, 1, 2), model=probe(batch_norm=True))
    cohort.predict_public(np.arange(3))
    pointers = [
        {tensor.data_ptr() for tensor in module.state_dict().values()}
        for module, _, _ in calls[-3:]
    ]
    assert all(len(own) == 9 for own in pointers)
    assert len(set().union(*pointers)) == 3 * 9


def test_loading_one_table_of_weights_makes_members_equal_but_not_the_same(make_cohort, same_bits):
    cohort = make_cohort((0, 1))
    given = make_cohort((3,)).weights()[0]
    copy = {name: array.copy() for name, array in given.items()}
    cohort.load_weights(given)
    assert all(same_bits(weights, given) for weights in cohort.weights())
    cohort.fit(supervised, private=PRIVATE)
    first, second = cohort.weights()
    assert not same_bits(first, second)
    assert same_bits(given, copy)


@pytest.mark.parametrize("what", ["states", "weights", "predictions", "metrics"])
def test_what_was_taken_stays_as_it_was_when_training_goes_on(make_cohort, same_bits, what):
    def take(cohort):
        if what == "states":
            return [state.to_arrays() for state in cohort.states()]
        if what == "weights":
            return cohort.weights()
        if what == "predictions":
            return [{"logits": cohort.predict_public(np.arange(20))}]
        return [{name: np.array(v) for name, v in row.items()} for row in cohort.metrics()]

    cohort = make_cohort((0, 1), model=MODELS[2])
    cohort.fit(supervised, private=PRIVATE)
    taken = take(cohort)
    copies = [{name: array.copy() for name, array in table.items()} for table in taken]
    cohort.fit(supervised, private=PRIVATE)
    assert all(same_bits(*pair) for pair in zip(taken, copies, strict=True))
    assert not any(same_bits(*pair) for pair in zip(take(cohort), copies, strict=True))


def test_a_state_that_was_given_is_not_written_to(make_cohort, same_bits):
    first = make_cohort(optimizer=OptimizerSettings(name="adam"))
    first.fit(supervised, private=PRIVATE)
    (state,) = first.states()
    copies = {name: array.copy() for name, array in state.to_arrays().items()}
    second = make_cohort(optimizer=OptimizerSettings(name="adam"), states=[state])
    second.fit(supervised, private=PRIVATE)
    assert same_bits(state.to_arrays(), copies)


def test_states_own_their_memory(make_cohort):
    cohort = make_cohort((0, 1), optimizer=OptimizerSettings(name="adam"))
    cohort.fit(supervised, private=PRIVATE)
    tables = [state.to_arrays() for state in cohort.states() + cohort.states()]
    assert len(set().union(*map(storages, tables))) == sum(map(len, tables))


# -- random numbers ----------------------------------------------------------------------------


def test_dropout_is_reproducible_and_moves_no_global_generator(make_cohort, same_bits):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    results = []
    for disturbance in range(2):
        torch.rand(disturbance)
        cohort = make_cohort((0, 1), model=MODELS[1])
        torch.set_rng_state(before[0])
        cohort.fit(supervised, private=PRIVATE)
        cohort.predict_public(np.arange(20))
        results.append(cohort.weights())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    for one, other in zip(*results, strict=True):
        assert same_bits(one, other)


def test_members_drop_units_of_their_own(make_cohort, tensors):
    # Equal weights, one row many times: without dropout they would stay equal.
    for dropout, stay_equal in ((0.0, True), (0.5, False)):
        model = ModelSettings(name="mlp", options={"hidden": [8], "dropout": dropout})
        cohort = make_cohort((0, 1), model=model, rows=np.full(6, 5))
        cohort.load_weights(cohort.weights()[0])
        cohort.fit(supervised, private=Passes(batch_size=6, steps=4))
        first, second = cohort.weights()
        assert np.array_equal(first["1.weight"], second["1.weight"]) is stay_equal


# -- weights of the terms ----------------------------------------------------------------------


def test_ce_weight_zero_makes_private_labels_irrelevant(make_cohort, tensors, same_bits):
    plain = tensors()
    permuted = TrainingData(
        train_inputs=plain.train_inputs,
        train_labels=plain.train_labels.flip(0),
        public_inputs=plain.public_inputs,
        public_labels=None,
        num_classes=3,
    )
    assert not torch.equal(plain.train_labels, permuted.train_labels)
    results = []
    for data in (plain, permuted):
        cohort = make_cohort(data=data)
        cohort.fit(partial(kd, ce_weight=0.0), private=PRIVATE, public=lesson())
        results.append(cohort.weights()[0])
    assert same_bits(*results)


def test_metrics_are_means_over_the_steps_of_all_fits(make_cohort):
    values = iter([1.0, 2.0, 6.0, 11.0])

    def spy(outputs, batch):
        return {"told": 0 * outputs.private.sum() + next(values)}

    cohort = make_cohort()
    cohort.fit(spy, private=Passes(batch_size=4, steps=3))
    assert cohort.metrics() == [{"loss/told": 3.0}]
    cohort.fit(spy, private=Passes(batch_size=4, steps=1))
    assert cohort.metrics() == [{"loss/told": 5.0}]


# -- what does not fit -------------------------------------------------------------------------


def test_refuses_to_fit_nothing(make_cohort):
    with pytest.raises(ValueError, match="private rows, public rows or both"):
        make_cohort().fit(supervised)
    with pytest.raises(ValueError, match=r"data\.public\.labelled: true"):
        make_cohort().fit(supervised_public, public=lesson())


def test_refuses_weights_of_another_model(make_cohort):
    cohort = make_cohort()
    before = cohort.weights()[0]
    wider = make_cohort(model=ModelSettings(name="mlp", options={"hidden": [9]})).weights()[0]
    with pytest.raises(
        ValueError, match=r"'1\.weight' has shape \(9, 64\), the model has \(8, 64\)"
    ):
        cohort.load_weights(wider)
    with pytest.raises(ValueError, match=r"do not fit the model: 3\.bias"):
        cohort.load_weights({name: a for name, a in before.items() if name != "3.bias"})
