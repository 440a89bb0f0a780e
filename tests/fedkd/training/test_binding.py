"""Objectives made of terms in cohorts: layers, parts, and what can be stacked."""

from functools import partial
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from torch import nn

from fedkd.losses.relation import rkd_distance_loss
from fedkd.models import ModelSettings
from fedkd.objectives import TERMS, LayerTerm, Objective, Term, vectors
from fedkd.targets import Targets
from fedkd.training import (
    PARTS,
    ClientState,
    ComposedObjective,
    Learner,
    LoopCohort,
    Member,
    ModelPool,
    OptimizerSettings,
    Passes,
    PublicLesson,
    Streams,
    TrainingData,
    VmapCohort,
    VmapUnsupportedError,
    WholeStep,
    choose_backend,
    measure_backends,
    stacking_of,
)

SGD = OptimizerSettings(name="sgd", lr=0.05, momentum=0.9)
PASSES = Passes(batch_size=8)
EQUAL, UNEQUAL = (20, 20, 20), (13, 21, 5)
NARROW = ModelSettings(name="mlp", options={"hidden": [12]})
WIDE = ModelSettings(name="mlp", options={"hidden": [20]})
CNN = ModelSettings(name="cnn", options={"channels": [4], "norm": "batch"})
TWINS = {"private": NARROW, "meme": NARROW}
UNLIKE = {"private": NARROW, "meme": WIDE}


class Near(LayerTerm):
    """Squared distance of features; leaves it to the view that the teacher is a constant."""

    source: ClassVar[str] = "test"
    kind: Literal["near"] = "near"

    def build_parts(self, pairs, student, teacher, *, num_classes, rows):
        ((ours, theirs),) = pairs
        if student[ours] == teacher[theirs]:
            return {}
        return {"projector": nn.Linear(student[ours][0], teacher[theirs][0])}

    def value(self, view, parts, pairs):
        ((ours, theirs),) = pairs
        own, other = vectors(view.features[ours]), vectors(view.teacher_features[theirs])
        if own.shape != other.shape:
            own = parts.call("projector", own)
        return view.of_transfer((own - other).square().mean(1))


class Normalised(Near):
    """The same behind a BatchNorm, whose statistics are a part's buffers."""

    kind: Literal["normalised"] = "normalised"

    def build_parts(self, pairs, student, teacher, *, num_classes, rows):
        ((ours, theirs),) = pairs
        width, wanted = student[ours][0], teacher[theirs][0]
        return {"projector": nn.Sequential(nn.Linear(width, wanted), nn.BatchNorm1d(wanted))}

    def value(self, view, parts, pairs):
        ((ours, theirs),) = pairs
        own = parts.call("projector", vectors(view.features[ours]))
        other = vectors(view.teacher_features[theirs])
        return view.of_transfer((own - other).square().mean(1))


class Distances(LayerTerm):
    """Compares rows with each other."""

    source: ClassVar[str] = "test"
    kind: Literal["distances"] = "distances"

    def value(self, view, parts, pairs):
        ((ours, theirs),) = pairs
        pair = vectors(view.features[ours]), vectors(view.teacher_features[theirs])
        return WholeStep(rkd_distance_loss(*pair))


class Pretending(Distances):
    """Compares rows with each other, and says that it is a loss of each row."""

    kind: Literal["pretending"] = "pretending"

    def value(self, view, parts, pairs):
        ((ours, _),) = pairs
        own = vectors(view.features[ours])
        return view.of_transfer((own - own.mean(0)).square().mean(1))


class Remembering(Term):
    """Keeps something from step to step."""

    source: ClassVar[str] = "test"
    stateful: ClassVar[bool] = True
    kind: Literal["remembering"] = "remembering"

    def value(self, view, parts, pairs):
        student, teacher = view.pair()
        return (student - teacher).square().mean()


class Branching(Term):
    """Looks at a number, which no stack of clients can."""

    source: ClassVar[str] = "test"
    kind: Literal["branching"] = "branching"

    def value(self, view, parts, pairs):
        student, teacher = view.pair()
        loss = (student - teacher).square().mean()
        return loss if loss > 1 else 2 * loss


class Failing(Term):
    source: ClassVar[str] = "test"
    kind: Literal["failing"] = "failing"

    def value(self, view, parts, pairs):
        raise ValueError("needs at least 7 classes")


@pytest.fixture(autouse=True)
def _known_terms(monkeypatch):
    for term in (Near, Normalised, Distances, Pretending, Remembering, Branching, Failing):
        monkeypatch.setitem(TERMS, term.model_fields["kind"].default, term)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def mutual(private, meme=None, progress=0.0):
    def learner(table, teacher, setting):
        objective = Objective.model_validate(table)
        return Learner(objective=objective, teacher=teacher, setting=f"strategy.{setting}")

    return ComposedObjective(
        learners={
            "private": learner(private, "meme", "objective"),
            "meme": learner(meme or {"ce": 1.0, "kd": 0.5}, "private", "meme_objective"),
        },
        progress=progress,
    )


def rows_of(sizes, seed=0):
    draw = torch.Generator().manual_seed(seed)
    dtype = torch.get_default_dtype()
    return TrainingData(
        train_inputs=torch.randn(sum(sizes), 1, 8, 8, generator=draw, dtype=dtype),
        train_labels=torch.randint(3, (sum(sizes),), generator=draw),
        public_inputs=torch.randn(20, 1, 8, 8, generator=draw, dtype=dtype),
        public_labels=torch.randint(3, (20,), generator=draw),
        num_classes=3,
    )


def cohort_of(kind, sizes, models, *, states=None, only=None, optimizer=SGD, data=None, **streams):
    data = data or rows_of(sizes)
    ends = np.cumsum(sizes)
    members = [
        Member(client, np.arange(end - size, end), None if states is None else states[client])
        for client, (end, size) in enumerate(zip(ends, sizes, strict=True))
    ]
    return kind(
        members if only is None else [members[client] for client in only],
        model=models,
        optimizer=optimizer,
        data=data,
        pool=ModelPool(data, optimizer),
        streams=Streams(**{"seed": 7, **streams}),
    )


def difference(one, other):
    largest = 0.0
    for mine, others in zip(one.states(), other.states(), strict=True):
        mine, others = mine.to_arrays(), others.to_arrays()
        assert mine.keys() == others.keys()
        largest = max(largest, *(float(np.abs(mine[n] - others[n]).max()) for n in mine))
    for mine, others in zip(one.metrics(), other.metrics(), strict=True):
        assert mine.keys() == others.keys()
        largest = max(largest, *(abs(mine[n] - others[n]) for n in mine))
    return largest


def both(sizes, models, composed, *, passes=PASSES, **options):
    """Let both kinds of cohort learn twice, and return them with how much they differ."""
    cohorts = [cohort_of(kind, sizes, models, **options) for kind in (LoopCohort, VmapCohort)]
    for cohort in cohorts:
        for _ in range(2):
            cohort.fit(composed, private=passes)
    return difference(*cohorts), *cohorts


def hooks_of(cohort):
    modules = [
        *(slot.module for slots in getattr(cohort, "_slots", {}).values() for slot in slots),
        *(stack.skeleton.module for stack in getattr(cohort, "_stacks", {}).values()),
    ]
    return sum(
        len(part._forward_hooks) + len(part._forward_pre_hooks)
        for module in modules
        for part in module.modules()
    )


both_kinds = pytest.mark.parametrize("kind", [LoopCohort, VmapCohort], ids=["loop", "vmap"])

OBJECTIVES = {
    "response": ({"ce": 0.5, "kd": {"weight": 0.5, "temperature": 2.0}}, TWINS),
    "feature": ({"ce": 1.0, "near": 0.3}, TWINS),
    "feature behind a projector": ({"ce": 1.0, "near": 0.3}, UNLIKE),
    "a projector with statistics": ({"ce": 1.0, "normalised": 0.3}, UNLIKE),
    "features of maps": (
        {"ce": 1.0, "near": {"weight": 0.3, "layers": {"penultimate": "last_map"}}},
        {"private": WIDE, "meme": CNN},
    ),
    "learned temperature": ({"ce": 1.0, "kd": {"learned": True, "learned_until": 1.0}}, UNLIKE),
}


# -- both backends -----------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_five_steps_of_float32_with_a_feature_term_agree(sizes):
    composed = mutual(*[{"ce": 1.0, "kd": 0.5, "near": 0.3}] * 2)
    few = Passes(batch_size=8, steps=5)
    by_loop, by_vmap = (cohort_of(kind, sizes, TWINS) for kind in (LoopCohort, VmapCohort))
    by_loop.fit(composed, private=few)
    by_vmap.fit(composed, private=few)
    assert difference(by_loop, by_vmap) < 1e-5


@pytest.mark.parametrize(("table", "models"), OBJECTIVES.values(), ids=OBJECTIVES.keys())
@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_every_kind_of_term_agrees_in_both_backends(double, table, models, sizes):
    # Halfway: a learned temperature has no gradient at the start.
    composed = mutual(table, table if models is TWINS else None, progress=0.5)
    apart, by_loop, _ = both(sizes, models, composed)
    assert apart < 1e-6
    losses = by_loop.metrics()[0]
    assert {f"loss/{term}" for term in table} <= losses.keys()
    assert {"loss/meme/ce", "loss/meme/kd"} & losses.keys()


def test_terms_on_public_rows_agree_in_both_backends(double):
    targets = torch.softmax(torch.randn(10, 3, generator=torch.Generator().manual_seed(3)), -1)
    soft = Targets(targets.numpy(), scale="probabilities", temperature=2.0)
    lesson = PublicLesson(rows=np.arange(4, 14), targets=soft, passes=PASSES)
    table = {"ce": 0.7, "kd": {"learned": True, "learned_until": 1.0}, "l1": 0.1}
    composed = ComposedObjective(
        learners={"model": Learner(objective=Objective.model_validate(table))},
        progress=0.5,
        temperature=2.0,
        confidence_threshold=0.4,
    )
    cohorts = [cohort_of(kind, UNEQUAL, NARROW) for kind in (LoopCohort, VmapCohort)]
    for cohort in cohorts:
        cohort.fit(composed, private=PASSES, public=lesson)
    assert difference(*cohorts) < 1e-6
    assert cohorts[0].metrics()[0].keys() == {"loss/ce", "loss/kd", "loss/l1"}


# -- who gets a gradient -----------------------------------------------------------------------


@both_kinds
def test_what_a_model_teaches_does_not_change_it(kind, same_bits):
    # The term itself detaches nothing; after one step the meme must not know that it is copied.
    after = []
    for table in ({"ce": 1.0}, {"ce": 1.0, "near": 5.0, "mse": 5.0}):
        cohort = cohort_of(kind, EQUAL, TWINS)
        composed = mutual(table, {"ce": 1.0})
        cohort.fit(composed, private=Passes(batch_size=8, steps=1))
        after.append([state.models for state in cohort.states()])
    for without, with_terms in zip(*after, strict=True):
        assert same_bits(without["meme"].weights, with_terms["meme"].weights)
        assert not same_bits(without["private"].weights, with_terms["private"].weights)


@both_kinds
@pytest.mark.parametrize("models", [TWINS, UNLIKE], ids=["twins", "unlike"])
def test_a_term_pulls_features_towards_the_teachers(kind, models):
    # The meme only teaches: what is left of the distance must have come from the private model.
    def distance(epochs):
        cohort = cohort_of(kind, EQUAL, models)
        composed = mutual({"near": 1.0}, {"ce": 0.001})
        cohort.fit(composed, private=Passes(batch_size=8, epochs=epochs))
        return cohort.metrics()[0]["loss/near"]

    assert distance(20) < 0.5 * distance(1)


# -- hooks -------------------------------------------------------------------------------------


@both_kinds
def test_no_hook_is_left_behind(kind, monkeypatch):
    cohort = cohort_of(kind, EQUAL, TWINS)
    cohort.fit(mutual({"ce": 1.0, "near": 0.3}), private=PASSES)
    assert hooks_of(cohort) == 0

    seen = []

    def broken(self, view, parts, pairs):
        seen.append(hooks_of(cohort))
        raise RuntimeError("in the middle of a step")

    monkeypatch.setattr(Near, "value", broken)
    with pytest.raises(RuntimeError, match="in the middle"):
        cohort.fit(mutual({"ce": 1.0, "near": 0.3}), private=PASSES)
    assert seen[-1] > 0
    assert hooks_of(cohort) == 0


# -- parts -------------------------------------------------------------------------------------


@both_kinds
def test_parts_live_in_the_state_and_in_no_model(kind):
    cohort = cohort_of(kind, EQUAL, UNLIKE)
    cohort.fit(mutual({"ce": 1.0, "near": 0.3}), private=PASSES)
    state = cohort.states()[0]
    assert state.models.keys() == {"private", "meme", PARTS}
    parts = state.models[PARTS]
    assert {name: array.shape for name, array in parts.weights.items()} == {
        "private.near.projector.weight": (20, 12),
        "private.near.projector.bias": (20,),
    }
    assert {key.split("/")[1] for key in parts.optimizer} == set(parts.weights)
    for model in UNLIKE:
        assert not any("projector" in name for name in cohort.weights(model=model)[0])


@both_kinds
def test_an_objective_without_parts_leaves_none(kind):
    cohort = cohort_of(kind, EQUAL, TWINS)
    cohort.fit(mutual({"ce": 1.0, "near": 0.3}), private=PASSES)
    assert all(state.models.keys() == {"private", "meme"} for state in cohort.states())


@both_kinds
@pytest.mark.parametrize("through", ["memory", "arrays"])
def test_parts_go_on_where_they_were(kind, through, same_bits):
    composed = mutual({"ce": 1.0, "normalised": 0.3})
    first = cohort_of(kind, UNEQUAL, UNLIKE)
    first.fit(composed, private=PASSES)
    states = first.states()
    if through == "arrays":
        states = [ClientState.from_arrays(state.to_arrays()) for state in states]
    # Where a state has no parts they begin afresh: that has to be seen.
    bare = [
        ClientState({name: own for name, own in state.models.items() if name != PARTS})
        for state in states
    ]
    ends = []
    for given in (first.states(), states, bare):
        cohort = cohort_of(kind, UNEQUAL, UNLIKE, states=given, round=2, rounds=3)
        cohort.fit(composed, private=PASSES)
        ends.append([state.to_arrays() for state in cohort.states()])
    for one, same, other in zip(*ends, strict=True):
        assert same_bits(one, same)
        assert not same_bits(one, other)


def test_fresh_parts_are_the_clients_own_whoever_is_beside(same_bits):
    composed = mutual({"ce": 1.0, "near": 0.3})
    still = OptimizerSettings(name="sgd", decay=0.0)
    shown = {}
    for kind in (LoopCohort, VmapCohort):
        for only in ((0, 1, 2), (2,)):
            cohort = cohort_of(kind, EQUAL, UNLIKE, only=only, optimizer=still)
            cohort.fit(composed, private=PASSES)
            for client, state in zip(only, cohort.states(), strict=True):
                weights = state.models[PARTS].weights
                assert same_bits(shown.setdefault(client, weights), weights)
    assert not same_bits(shown[0], shown[1])


@both_kinds
def test_parts_of_several_objectives_stand_beside_each_other(kind):
    cohort = cohort_of(kind, EQUAL, UNLIKE)
    cohort.fit(mutual({"ce": 1.0, "near": 0.3}), private=PASSES)
    before = cohort.states()[0].models[PARTS]
    cohort.fit(mutual({"ce": 1.0, "normalised": 0.3}), private=PASSES)
    after = cohort.states()[0].models[PARTS]
    for name, array in before.weights.items():
        assert np.array_equal(array, after.weights[name])
    assert any(name.startswith("private.normalised") for name in after.weights)


@both_kinds
def test_momentum_is_forgotten_where_asked(kind):
    cohort = cohort_of(kind, EQUAL, UNLIKE)
    cohort.fit(mutual({"ce": 1.0, "near": 0.3}), private=PASSES)
    cohort.reset_optimizers(model="meme")
    slots = {name: len(own.optimizer) for name, own in cohort.states()[0].models.items()}
    assert slots["meme"] == 0
    assert slots["private"] > 0
    assert slots[PARTS] > 0
    cohort.reset_optimizers()
    assert not any(own.optimizer for own in cohort.states()[0].models.values())


@both_kinds
def test_a_fit_without_a_weight_changes_nothing(kind, same_bits):
    cohort = cohort_of(kind, EQUAL, UNLIKE)
    before = [state.to_arrays() for state in cohort.states()]
    cohort.fit(mutual({"near": 0.0}, {"kd": 0.0}), private=PASSES)
    for state, earlier in zip(cohort.states(), before, strict=True):
        assert same_bits(state.to_arrays(), earlier)
    assert cohort.metrics() == [{}, {}, {}]


def test_a_model_cannot_be_called_parts():
    with pytest.raises(ValueError, match="cannot be called 'parts'"):
        cohort_of(LoopCohort, EQUAL, {"private": NARROW, "parts": NARROW})


# -- what can be stacked -----------------------------------------------------------------------


def stacking(composed, models=UNLIKE):
    return stacking_of(composed, tuple(models.items()), input_shape=(1, 8, 8), num_classes=3)


@pytest.mark.parametrize(("table", "models"), OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_terms_of_single_rows_can_be_stacked_and_padded(table, models):
    found = stacking(mutual(table), models)
    assert (found.obstacle, found.mixes_rows) == ("", "")


def test_a_term_that_mixes_rows_is_found_whatever_its_weight():
    late = {"kind": "linear", "start": 0.0, "end": 1.0}
    found = stacking(mutual({"ce": 1.0, "distances": {"weight": late}}))
    assert found.obstacle == ""
    assert found.mixes_rows == "strategy.objective.distances"


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"remembering": 1.0}, "strategy.objective.remembering remembers"),
        ({"branching": 1.0}, "cannot be stacked: strategy.objective.branching: "),
    ],
    ids=["stateful", "branching"],
)
def test_what_cannot_be_stacked_trains_in_the_loop(table, reason):
    composed = mutual({"ce": 1.0, **table})
    assert stacking(composed).obstacle.startswith(reason)
    with pytest.raises(VmapUnsupportedError, match=r"engine\.vectorize: loop"):
        cohort_of(VmapCohort, EQUAL, UNLIKE).fit(composed, private=PASSES)
    cohort = cohort_of(LoopCohort, EQUAL, UNLIKE)
    cohort.fit(composed, private=PASSES)
    assert f"loss/{next(iter(table))}" in cohort.metrics()[0]


@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
@pytest.mark.parametrize("models", [TWINS, UNLIKE], ids=["twins", "unlike"])
def test_a_term_that_compares_rows_sees_those_that_count_and_no_others(double, sizes, models):
    # Behind a projector with statistics there is a part of every member's own as well.
    table = {"ce": 1.0, "distances": 1.0, "normalised": 0.3}
    apart, *_ = both(sizes, models, mutual(table if models is UNLIKE else {"ce": 1, "sp": 1}))
    assert apart < 1e-6


def test_a_loss_of_rows_that_mixes_them_is_refused_by_name():
    found = stacking(mutual({"ce": 1.0, "pretending": 1.0}))
    assert found.obstacle.startswith("strategy.objective.pretending says that it is a loss of each")
    with pytest.raises(VmapUnsupportedError, match=r"return WholeStep; engine"):
        cohort_of(VmapCohort, UNEQUAL, UNLIKE).fit(
            mutual({"ce": 1.0, "pretending": 1.0}), private=PASSES
        )


def test_the_choice_of_a_backend_knows_the_terms():
    def choice(composed, models=UNLIKE, members=8):
        return choose_backend(
            models,
            input_shape=(1, 8, 8),
            num_classes=3,
            members=members,
            batch_rows=8,
            device="cpu",
            objective=composed,
        )

    assert choice(None) == "vmap"
    assert choice(mutual({"ce": 1.0, "near": 0.3})) == "vmap"
    assert choice(mutual({"ce": 1.0, "near": 0.3}), members=3) == "loop"
    for name in ("distances", "remembering", "branching"):
        assert choice(mutual({"ce": 1.0, name: 0.3})) == "loop"
    large = ModelSettings(name="mlp", options={"hidden": [4000]})
    assert choice(mutual({"ce": 1.0}), {"private": NARROW, "meme": large}) == "loop"


def test_measuring_what_cannot_be_stacked_says_why():
    data = rows_of(EQUAL)
    times = measure_backends(
        [Member(0, np.arange(20)), Member(1, np.arange(20, 40))],
        model=UNLIKE,
        optimizer=SGD,
        data=data,
        pool=ModelPool(data, SGD),
        passes=PASSES,
        seed=1,
        objective=mutual({"ce": 1.0, "remembering": 1.0}),
        steps=1,
        repeats=1,
    )
    assert times.choice == "loop"
    assert "remembers what it saw" in times.reason


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"failing": 1.0}, r"strategy\.objective\.failing: needs at least 7 classes"),
        (
            {"near": {"layers": {"9": "1"}}},
            r"strategy\.objective\.near: the student has no layer '9'; it has",
        ),
    ],
    ids=["value", "layer"],
)
@pytest.mark.parametrize("how", ["settings", "loop", "vmap"])
def test_what_does_not_fit_names_the_setting(table, message, how):
    composed = mutual({"ce": 1.0, **table})
    act = {
        "settings": partial(stacking, composed),
        "loop": lambda: cohort_of(LoopCohort, EQUAL, UNLIKE).fit(composed, private=PASSES),
        "vmap": lambda: cohort_of(VmapCohort, EQUAL, UNLIKE).fit(composed, private=PASSES),
    }[how]
    if how == "loop" and "failing" in table:
        message = "needs at least 7 classes"
    with pytest.raises(ValueError, match=message):
        act()
