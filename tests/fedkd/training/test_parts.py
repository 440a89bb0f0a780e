"""Parts that a bare objective trains, and heads that it runs: by hand and in both backends."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedkd.models import ModelSettings, build_model
from fedkd.objectives import Objective
from fedkd.objectives.taps import head_layer
from fedkd.targets import Targets
from fedkd.training import (
    Clipped,
    ComposedObjective,
    Learner,
    LoopCohort,
    Member,
    ModelPool,
    OptimizerSettings,
    Passes,
    PerRow,
    PublicLesson,
    Streams,
    Table,
    TrainingData,
    VmapCohort,
    WholeStep,
    supervised,
)

BACKENDS = pytest.mark.parametrize("kind", [LoopCohort, VmapCohort], ids=["loop", "vmap"])
SGD = OptimizerSettings(name="sgd", lr=0.05)
PASSES = Passes(batch_size=8)
NARROW = ModelSettings(name="mlp", options={"hidden": [6]})
WIDE = ModelSettings(name="mlp", options={"hidden": [20]})
PAIR = {"mentor": WIDE, "mentee": NARROW}
PROJECTION = {"projection": lambda: nn.Linear(6, 20, bias=False)}
LATENTS = torch.arange(30, dtype=torch.float64).reshape(5, 6) / 20


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def hidden(outputs, batch):
    """Cross-entropy of both models, and their features brought together by a projection."""
    mentor, mentee = (outputs[name].features["penultimate"] for name in PAIR)
    rows = (batch.parts.call("projection", mentee) - mentor).square().mean(1)
    own = {f"ce {name}": supervised(outputs[name], batch)["ce"] for name in PAIR}
    return {**own, "hidden": PerRow(rows, of="private")}


def hidden_whole(outputs, batch):
    losses = hidden(outputs, batch)
    return {**losses, "hidden": WholeStep(losses["hidden"].values.square().mean().sqrt())}


def rows_of(sizes):
    draw = torch.Generator().manual_seed(0)
    return TrainingData(
        train_inputs=torch.randn(sum(sizes), 1, 8, 8, generator=draw),
        train_labels=torch.randint(3, (sum(sizes),), generator=draw),
        public_inputs=torch.randn(20, 1, 8, 8, generator=draw),
        public_labels=None,
        num_classes=3,
    )


def cohort_of(kind, *, model=PAIR, sizes=(13, 21, 5), states=None, round=1):
    data, ends = rows_of(sizes), np.cumsum(sizes)
    members = [
        Member(at, np.arange(end - size, end), None if states is None else states[at])
        for at, (end, size) in enumerate(zip(ends, sizes, strict=True))
    ]
    pool = ModelPool(data, SGD)
    streams = Streams(seed=7, round=round, rounds=2)
    return kind(members, model=model, optimizer=SGD, data=data, pool=pool, streams=streams)


def lesson():
    soft = torch.softmax(torch.randn(9, 3, generator=torch.Generator().manual_seed(2)), -1)
    targets = Targets(soft.numpy(), scale="probabilities", temperature=2.0)
    return PublicLesson(rows=np.arange(9), targets=targets, passes=PASSES)


def difference(one, other):
    largest = 0.0
    for mine, others in zip(one.states(), other.states(), strict=True):
        own, their = mine.to_arrays(), others.to_arrays()
        assert own.keys() == their.keys()
        largest = max(largest, *(float(np.abs(own[key] - their[key]).max()) for key in own))
    return largest


def fit_hidden(cohort, objective=hidden, passes=PASSES, **options):
    cohort.fit(
        objective,
        private=passes,
        models=list(PAIR),
        layers=["penultimate"],
        parts=PROJECTION,
        **options,
    )
    return cohort


@pytest.mark.parametrize("objective", [hidden, hidden_whole])
def test_parts_learn_the_same_in_a_loop_and_stacked(objective):
    one, other = (fit_hidden(cohort_of(kind), objective) for kind in (LoopCohort, VmapCohort))
    assert difference(one, other) < 1e-12
    for mine, others in zip(one.parts("projection"), other.parts("projection"), strict=True):
        assert mine.keys() == others.keys() == {"weight"}
        assert np.abs(mine["weight"] - others["weight"]).max() < 1e-12


@BACKENDS
def test_a_part_learns_as_a_plain_module_would(kind):
    cohort = cohort_of(kind, sizes=(16,))
    whole = Passes(batch_size=16, steps=3)
    twin = cohort_of(kind, sizes=(16,))
    started = {name: twin.weights(model=name)[0] for name in PAIR}
    first = fit_hidden(cohort_of(kind, sizes=(16,)), passes=Passes(batch_size=16, steps=1))
    fit_hidden(cohort, passes=whole)
    data = rows_of((16,))
    models = {}
    for name, settings in PAIR.items():
        model = build_model(settings, input_shape=(1, 8, 8), num_classes=3, seed=0)
        model.load_state_dict({key: torch.tensor(each) for key, each in started[name].items()})
        models[name] = model
    # After one step of SGD the part is where its first weights and their gradient put it.
    seen = {}
    for name, model in models.items():
        seen[name] = model[:-1](data.train_inputs)
    after = torch.tensor(first.parts("projection")[0]["weight"])
    start = after.clone()
    for _ in range(200):  # w1 = w0 - lr * g(w0), solved for w0
        weight = start.clone().requires_grad_()
        loss = (seen["mentee"] @ weight.t() - seen["mentor"]).square().mean()
        (gradient,) = torch.autograd.grad(loss, weight)
        start = after + 0.05 * gradient
    projection = nn.Linear(6, 20, bias=False)
    projection.load_state_dict({"weight": start})
    every = [*models["mentor"].parameters(), *models["mentee"].parameters()]
    optimizer = torch.optim.SGD([*every, *projection.parameters()], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        deep = {name: model[:-1](data.train_inputs) for name, model in models.items()}
        loss = (projection(deep["mentee"]) - deep["mentor"]).square().mean()
        for name, model in models.items():
            loss = loss + F.cross_entropy(model[-1](deep[name]), data.train_labels)
        loss.backward()
        optimizer.step()
    found = cohort.parts("projection")[0]["weight"]
    assert np.abs(found - projection.weight.detach().numpy()).max() < 1e-10
    assert np.abs(found - start.numpy()).max() > 1e-3


@BACKENDS
def test_first_weights_come_from_the_client_s_seed_and_from_nothing_else(kind):
    def first():
        still = Passes(batch_size=8, steps=1)
        return fit_hidden(
            cohort_of(kind), lambda o, b: {"none": 0.0 * hidden(o, b)["hidden"]}, still
        )

    one = first().parts("projection")
    torch.rand(3)
    before = torch.get_rng_state()
    other = first().parts("projection")
    assert torch.equal(torch.get_rng_state(), before)
    for own, again in zip(one, other, strict=True):
        assert np.array_equal(own["weight"], again["weight"])
    assert not np.array_equal(one[0]["weight"], one[1]["weight"])
    assert cohort_of(kind).parts("projection") == [None] * 3


@BACKENDS
def test_parts_stay_with_the_client_s_state(kind):
    once = fit_hidden(cohort_of(kind))
    states = once.states()
    again = cohort_of(kind, states=states, round=2)
    for own, kept in zip(once.parts("projection"), again.parts("projection"), strict=True):
        assert np.array_equal(own["weight"], kept["weight"])
    fit_hidden(again)
    assert not np.array_equal(again.parts("projection")[0]["weight"], kept["weight"])
    assert all("projection" not in name for own in again.weights(model="mentee") for name in own)


@BACKENDS
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"a.b": lambda: nn.Linear(6, 20)}, r"a part needs a name without .* got 'a.b'"),
        ({"p": lambda: nn.Dropout()}, "part 'p' cannot have the Dropout"),
        ({"p": lambda: nn.Sequential(nn.BatchNorm1d(6))}, "part 'p' cannot have the BatchNorm1d"),
        ({"p": lambda: nn.ReLU()}, "part 'p' has no parameters that learn"),
        (PROJECTION, "unknown part 'other'; the fit has projection"),
        (None, "no part 'other' is trained here"),
    ],
)
def test_what_cannot_be_a_part_is_refused_by_name(kind, parts, message):
    def objective(outputs, batch):
        return {"other": WholeStep(batch.parts.call("other", outputs.private).sum())}

    with pytest.raises(ValueError, match=message):
        cohort_of(kind).fit(objective, private=PASSES, parts=parts)


@BACKENDS
def test_terms_with_parts_of_their_own_take_no_others(kind):
    terms = ComposedObjective(
        learners={"mentor": Learner(objective=Objective.model_validate({"ce": 1}))}
    )
    with pytest.raises(ValueError, match="parts are of a bare objective"):
        cohort_of(kind).fit(terms, private=PASSES, parts=PROJECTION)


# -- heads -------------------------------------------------------------------------------------


def through_the_head(outputs, batch):
    """Cross-entropy of rows, and of latents that were handed in as a table."""
    logits = outputs.head(batch.tables["latents"])
    labels = torch.arange(5) % 3
    return {
        "ce": supervised(outputs, batch)["ce"],
        "latents": WholeStep(F.cross_entropy(logits, labels)),
    }


def fit_latents(cohort, objective=through_the_head, **options):
    table = Table(LATENTS.numpy().astype(np.float64))
    cohort.fit(objective, private=PASSES, heads=True, tables={"latents": table}, **options)
    return cohort


@pytest.mark.parametrize("with_public", [False, True])
def test_heads_run_the_same_in_a_loop_and_stacked(with_public):
    options = {"public": lesson()} if with_public else {}
    one, other = (
        fit_latents(cohort_of(kind, model=NARROW), **options) for kind in (LoopCohort, VmapCohort)
    )
    assert difference(one, other) < 1e-12


@BACKENDS
def test_a_head_is_the_last_layer_as_it_is_and_learns_alone(kind):
    cohort = cohort_of(kind, model=NARROW, sizes=(8,))
    before = cohort.weights()[0]

    def latents_only(outputs, batch):
        return {"latents": through_the_head(outputs, batch)["latents"]}

    once = Passes(batch_size=8, steps=1)
    cohort.fit(latents_only, private=once, heads=True, tables={"latents": Table(LATENTS.numpy())})
    after = cohort.weights()[0]
    names = list(before)
    weight, bias = (torch.tensor(before[name]).requires_grad_() for name in names[-2:])
    loss = F.cross_entropy(LATENTS @ weight.t() + bias, torch.arange(5) % 3)
    assert cohort.metrics()[0]["loss/latents"] == pytest.approx(loss.item())
    for name, gradient in zip(names[-2:], torch.autograd.grad(loss, [weight, bias]), strict=True):
        assert np.abs(after[name] - (before[name] - 0.05 * gradient.numpy())).max() < 1e-12
        assert np.abs(after[name] - before[name]).max() > 1e-4
    for name in names[:-2]:
        assert np.array_equal(after[name], before[name])


class Sharpened(nn.Sequential):
    def forward(self, inputs):
        return 2 * super().forward(inputs)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.square = nn.Linear(4, 4)

    def forward(self, inputs):
        return self.square(self.square(inputs))


@pytest.mark.parametrize("model", [Sharpened(nn.Linear(4, 4), nn.Linear(4, 3)), Twice()])
def test_a_head_that_cannot_be_told_apart_is_refused_by_name(model):
    model.double()
    with pytest.raises(ValueError, match="the head of 'odd' cannot be told apart"):
        head_layer(model, torch.zeros(2, 4), whose="odd")


@pytest.mark.parametrize("name", ["mlp", "cnn", "lenet", "resnet8", "gru", "transformer"])
def test_our_models_have_heads(name):
    model = build_model(ModelSettings(name=name), input_shape=(1, 8, 8), num_classes=3, seed=0)
    inputs = torch.randn(2, 1, 8, 8)
    path = head_layer(model, inputs, whose=name)
    assert model.get_submodule(path).out_features == 3


@BACKENDS
def test_heads_are_asked_for(kind):
    with pytest.raises(ValueError, match=r"outputs\.head needs fit"):
        cohort_of(kind, model=NARROW).fit(
            lambda outputs, _: {"x": WholeStep(outputs.head(LATENTS).sum())}, private=PASSES
        )


@BACKENDS
def test_clipping_by_norms_does_not_measure_heads(kind):
    rule = Clipped(norm=1.0, expected_batch=8.0)
    with pytest.raises(ValueError, match=r"gradient Clipped cannot measure model 'model' .* heads"):
        fit_latents(cohort_of(kind, model=NARROW), gradient=rule)


def test_clipping_row_by_row_runs_heads_with_the_row_s_weights():
    def latents_of_rows(outputs, batch):
        logits = outputs.head(batch.tables["latents"])
        losses = F.cross_entropy(logits, batch.labels, reduction="none")
        own = supervised(outputs, batch)["ce"]
        return {"ce": own, "latents": PerRow(losses, of="private")}

    def fitted(kind):
        cohort = cohort_of(kind, model=NARROW)
        values = [
            np.random.default_rng(at).normal(size=(len(rows), 6))
            for at, rows in enumerate(cohort.private_rows)
        ]
        rule = Clipped(norm=0.5, expected_batch=8.0, method="vmap")
        tables = {"latents": Table(values, of="private")}
        cohort.fit(latents_of_rows, private=PASSES, heads=True, tables=tables, gradient=rule)
        return cohort

    assert difference(fitted(LoopCohort), fitted(VmapCohort)) < 1e-12
