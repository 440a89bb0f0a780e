"""Gradient rules: by hand, against plain PyTorch, and in both backends."""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from own_objectives import distilled

from fedkd.losses.response import hard_label_rows, soft_target_rows
from fedkd.models import ModelSettings, build_model
from fedkd.objectives import Objective
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
    Plain,
    Proximal,
    PublicLesson,
    Streams,
    TrainingData,
    VmapCohort,
    WholeStep,
    supervised,
)
from fedkd.training.gradients import Anchor, clipped_sums, gradient_norms

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
    anchor = Anchor.of({"model": Proximal(mu=0.1)}, {"model": [start]})
    start.zero_()  # what it remembers is its own
    assert anchor.penalty([now], stacked=False).item() == pytest.approx(0.075)
    (gradient,) = anchor.pulled([torch.zeros(3)], [now])
    assert gradient.tolist() == pytest.approx([0.05, -0.1, 0.05])
    twice = torch.tensor([[0.5, -1.0, 0.0]] * 2)
    stacked = Anchor.of({"model": Proximal(mu=0.1)}, {"model": [twice]})
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


@pytest.mark.parametrize(
    "rule",
    [Proximal(mu=0.5), Clipped(norm=0.8, expected_batch=6.0, method="vmap")],
    ids=["proximal", "clipped"],
)
def test_a_parameter_that_is_one_number_is_held_and_clipped_like_others(rule):
    scaled = ModelSettings(name="odd_models:make", options={"kind": "Tempered"})
    cohorts = [cohort_of(kind, model=scaled) for kind in (LoopCohort, VmapCohort)]
    for cohort in cohorts:
        cohort.fit(supervised, private=PASSES, gradient=rule)
    assert difference(*cohorts) < 1e-6
    assert cohorts[0].weights()[0]["scale"].shape == ()


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


# -- clipped -----------------------------------------------------------------------------------

GROUPED = ModelSettings(name="cnn", options={"channels": [8], "norm": "group", "groups": 2})
DROPOUT = ModelSettings(name="mlp", options={"hidden": [16], "dropout": 0.5})
TRANSFORMER = ModelSettings(name="transformer", options={"dim": 8, "depth": 1})
METHODS = pytest.mark.parametrize("method", ["norms", "vmap"])
WHOLE = Passes(batch_size=64, steps=3)
"""All rows of a client in each of three steps."""


def test_a_clipped_gradient_by_hand():
    # One linear layer without inputs but 1: rows' gradients are (3, 4), of norm 5, and (0.3, 0.4).
    # At norm 1 they become (.6, .8) and (.3, .4); their sum over an expected batch of 4.
    rule = Clipped(norm=1.0, expected_batch=4.0)
    gradients = {"weight": torch.tensor([[3.0, 4.0], [0.3, 0.4]])}
    norms = gradient_norms(gradients, stacked=False)
    assert norms.tolist() == pytest.approx([5.0, 0.5])
    assert clipped_sums(rule, gradients, norms)["weight"].tolist() == pytest.approx([0.225, 0.3])
    assert rule.shares(torch.tensor([5.0, 0.5, 0.0])).tolist() == pytest.approx([0.05, 0.25, 0.25])
    stacked = {"weight": torch.stack([gradients["weight"], torch.zeros(2, 2)])}
    both = clipped_sums(rule, stacked, gradient_norms(stacked, stacked=True))["weight"]
    assert both.tolist() == [pytest.approx([0.225, 0.3]), [0.0, 0.0]]


def row_by_row(model, rows, labels, rule):
    """Return the rule's gradient from one backward pass for every single row."""
    total = [torch.zeros_like(each) for each in model.parameters()]
    for row, label in zip(rows, labels, strict=True):
        loss = F.cross_entropy(model(row[None]), label[None])
        own = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.sqrt(sum(each.square().sum() for each in own))
        share = min(1.0, rule.norm / float(norm))
        for into, each in zip(total, own, strict=True):
            into += share * each
    return [each / rule.expected_batch for each in total]


@METHODS
@BACKENDS
@pytest.mark.parametrize("model", [MLP, GROUPED], ids=["mlp", "group norm"])
def test_steps_are_those_of_a_loop_over_single_rows(kind, method, model):
    # Between the smallest norm and the largest, so that some rows are clipped and some are not.
    rule = Clipped(norm=1.5, expected_batch=10.0, method=method)
    cohort = cohort_of(kind, model=model)
    before = cohort.weights()
    cohort.fit(supervised, private=WHOLE, gradient=rule)
    data, ends = rows_of(), np.cumsum(SIZES)
    for client, (end, size) in enumerate(zip(ends, SIZES, strict=True)):
        own = build_model(model, input_shape=(1, 8, 8), num_classes=3, seed=0)
        weights = {name: torch.from_numpy(array) for name, array in before[client].items()}
        own.load_state_dict(weights)
        for _ in range(3):
            rows = slice(end - size, end)
            slopes = row_by_row(own, data.train_inputs[rows], data.train_labels[rows], rule)
            for parameter, slope in zip(own.parameters(), slopes, strict=True):
                parameter.data -= 0.05 * slope
        for name, array in cohort.weights()[client].items():
            np.testing.assert_allclose(array, own.state_dict()[name].numpy(), atol=1e-6)


def weighted(outputs, batch):
    """Two losses of private rows, one with weights, beside one of public rows."""
    rows = hard_label_rows(outputs.private, batch.labels)
    weights = 1.0 + (batch.labels == 1)
    small = 0.1 * PerRow(outputs.private.square().mean(1), of="private")
    losses = {"ce": 0.7 * PerRow(rows, of="private", weights=weights), "small": small}
    if outputs.public is not None:
        losses |= {"kd": distilled(outputs, batch, temperature=2.0)["kd"]}
    return losses


def composed(table, confidence_threshold=0.0):
    learner = Learner(objective=Objective.model_validate(table))
    return ComposedObjective(
        learners={"model": learner}, confidence_threshold=confidence_threshold, temperature=2.0
    )


CASES = {
    "own rows": (weighted, {"private": PASSES}, MLP),
    "both kinds": (weighted, {"private": PASSES, "public": lesson}, MLP),
    "apart": (weighted, {"private": PASSES, "public": lambda: replace(lesson(), apart=True)}, MLP),
    "dropout": (weighted, {"private": PASSES, "public": lesson}, DROPOUT),
    "group norm": (weighted, {"private": PASSES, "public": lesson}, GROUPED),
    "terms": (
        composed({"ce": 1.0, "kd": {"temperature": 2.0}}),
        {"private": PASSES, "public": lesson},
        MLP,
    ),
}


@pytest.mark.parametrize(("objective", "options", "model"), CASES.values(), ids=CASES.keys())
def test_both_methods_and_both_backends_take_the_same_steps(objective, options, model):
    options = {name: each() if callable(each) else each for name, each in options.items()}
    momentum = OptimizerSettings(name="sgd", lr=0.05, momentum=0.9)
    cohorts = []
    for kind in (LoopCohort, VmapCohort):
        for method in ("norms", "vmap"):
            rule = Clipped(norm=0.8, expected_batch=6.0, method=method)
            cohorts.append(cohort_of(kind, model=model, optimizer=momentum))
            cohorts[-1].fit(objective, gradient=rule, **options)
    for other in cohorts[1:]:
        assert difference(cohorts[0], other) < 1e-6
    plain = cohort_of(LoopCohort, model=model, optimizer=momentum)
    plain.fit(objective, **options)
    assert difference(cohorts[0], plain) > 1e-3


@METHODS
@BACKENDS
def test_each_of_two_models_has_its_own_norms(kind, method):
    models = {"private": MLP, "meme": ModelSettings(name="mlp", options={"hidden": [6]})}
    rule = Clipped(norm=0.5, expected_batch=8.0, method=method)

    def mutual(outputs, batch):
        losses = {}
        for name, scale in (("private", 5.0), ("meme", 0.1)):
            rows = hard_label_rows(outputs[name].private, batch.labels)
            losses[name] = scale * PerRow(rows, of="private")
        return losses

    cohort = cohort_of(kind, model=models)
    cohort.fit(mutual, private=WHOLE, models=["private", "meme"], gradient=rule)
    # As if each had learnt by itself: neither's gradient counts in the other's norm.
    for name in models:
        alone = cohort_of(LoopCohort, model=models)
        scale = {"private": 5.0, "meme": 0.1}[name]

        def one(outputs, batch, scale=scale):
            return {"ce": scale * PerRow(hard_label_rows(outputs.private, batch.labels))}

        alone.fit(one, private=WHOLE, models=[name], gradient=rule)
        for mine, others in zip(cohort.weights(model=name), alone.weights(model=name), strict=True):
            assert max(float(np.abs(mine[key] - others[key]).max()) for key in mine) < 1e-6


@METHODS
@BACKENDS
def test_each_member_may_have_an_expected_batch_of_its_own(kind, method):
    one, other = cohort_of(kind), cohort_of(kind)
    before = one.weights()
    one.fit(supervised, private=WHOLE, gradient=Clipped(0.8, (4.0, 8.0, 2.0), method))
    for position, expected in enumerate((4.0, 8.0, 2.0)):
        alone = cohort_of(kind)
        alone.fit(supervised, private=WHOLE, gradient=Clipped(0.8, expected, method))
        for name, array in one.weights()[position].items():
            np.testing.assert_allclose(array, alone.weights()[position][name], atol=1e-9)
            assert np.abs(array - before[position][name]).max() > 1e-6
    with pytest.raises(ValueError, match="one for all or one for each of 3 members, got 2"):
        other.fit(supervised, private=WHOLE, gradient=Clipped(0.8, (4.0, 8.0), method))


def test_a_weight_with_two_names_gets_the_gradient_of_both():
    tied = ModelSettings(name="odd_models:make", options={"kind": "SharedWeight"})
    rule = Clipped(norm=0.5, expected_batch=8.0, method="vmap")
    cohorts = [cohort_of(kind, model=tied) for kind in (LoopCohort, VmapCohort)]
    for cohort in cohorts:
        cohort.fit(supervised, private=WHOLE, gradient=rule)
    assert difference(*cohorts) < 1e-9


@METHODS
@BACKENDS
def test_one_row_moves_a_step_by_no_more_than_its_share(kind, method):
    # Multiplied by a thousand, a row's loss moves the weights by lr * norm / expected_batch.
    rule = Clipped(norm=0.3, expected_batch=4.0, method=method)

    def after(scale):
        def objective(outputs, batch):
            rows = hard_label_rows(outputs.private, batch.labels)
            factors = torch.where(batch.private_rows == 2, scale, 1.0)
            return {"ce": PerRow(factors * rows)}

        cohort = cohort_of(kind, sizes=(6, 4))
        cohort.fit(objective, private=Passes(batch_size=16, steps=1), gradient=rule)
        return cohort.weights()[0]

    with_row, without = after(1000.0), after(0.0)
    moved = np.sqrt(sum(float(np.square(with_row[n] - without[n]).sum()) for n in without))
    assert moved == pytest.approx(0.05 * 0.3 / 4.0, rel=1e-4)


@BACKENDS
def test_norms_refuse_what_they_cannot_measure_and_vmap_takes_it(kind):
    rule = Clipped(norm=0.5, expected_batch=8.0)
    with pytest.raises(ValueError, match=r"cannot measure layer .* method='vmap' works for it"):
        cohort_of(kind, model=TRANSFORMER).fit(supervised, private=PASSES, gradient=rule)
    gru = ModelSettings(name="gru", options={"hidden": 6})
    with pytest.raises(ValueError, match=r"runs more than once in a step: method='vmap'"):
        cohort_of(kind, model=gru).fit(supervised, private=PASSES, gradient=rule)


@pytest.mark.parametrize("name", ["transformer", "gru"])
def test_the_slow_method_takes_any_model_without_batch_norm(name):
    options = {"transformer": {"dim": 8, "depth": 1}, "gru": {"hidden": 6}}[name]
    model = ModelSettings(name=name, options=options)
    rule = Clipped(norm=0.5, expected_batch=8.0, method="vmap")
    cohorts = [cohort_of(kind, model=model) for kind in (LoopCohort, VmapCohort)]
    for cohort in cohorts:
        cohort.fit(supervised, private=Passes(batch_size=8, steps=2), gradient=rule)
    assert difference(*cohorts) < 1e-6


@METHODS
@BACKENDS
def test_what_mixes_rows_is_refused_by_name(kind, method):
    rule = Clipped(norm=0.5, expected_batch=8.0, method=method)
    batch_norm = ModelSettings(name="cnn", options={"channels": [4], "norm": "batch"})
    with pytest.raises(
        ValueError, match=r"layer '1' of model 'model' is a .*BatchNorm.*: use norm"
    ):
        cohort_of(kind, model=batch_norm).fit(supervised, private=PASSES, gradient=rule)

    def spread(outputs, batch):
        return {"spread": WholeStep(outputs.private.var())}

    with pytest.raises(ValueError, match=r"loss 'spread' compares the rows of a step"):
        cohort_of(kind).fit(spread, private=PASSES, gradient=rule)
    with pytest.raises(ValueError, match=r"clips the gradients of private rows, and the fit has"):
        cohort_of(kind).fit(partial(distilled, temperature=2.0), public=lesson(), gradient=rule)
    learned = composed({"ce": 1.0, "kd": {"learned": True}})
    with pytest.raises(ValueError, match=r"does not clip what terms train beside the models"):
        cohort_of(kind).fit(learned, private=PASSES, public=lesson(), gradient=rule)


@pytest.mark.parametrize("field", ["norm", "expected_batch"])
def test_numbers_out_of_range_are_refused(field):
    with pytest.raises(ValueError, match=rf"{field} must be > 0 and finite, got 0\.0"):
        Clipped(**{"norm": 1.0, "expected_batch": 8.0, field: 0.0})


# -- a rule for each model ---------------------------------------------------------------------

TWO = {"private": MLP, "proxy": ModelSettings(name="mlp", options={"hidden": [6]})}


def mutual(outputs, batch):
    """Two models that learn from each other, without a gradient from one into the other."""
    losses = {}
    for name, teacher in (("private", "proxy"), ("proxy", "private")):
        own, other = outputs[name].private, outputs[teacher].private.detach()
        kl = soft_target_rows(own, other.softmax(1), temperature=1.0)
        losses[f"ce {name}"] = PerRow(hard_label_rows(own, batch.labels), of="private")
        losses[f"kd {name}"] = PerRow(kl, of="private")
    return losses


def fit_two(kind, gradient, model=TWO):
    cohort = cohort_of(kind, model=model)
    passes = Passes(batch_size=8)
    cohort.fit(mutual, private=passes, models=list(TWO), gradient=gradient)
    return cohort


def once(kind, gradient, name):
    cohort = cohort_of(kind, model=TWO)
    passes = Passes(batch_size=8, steps=1)
    cohort.fit(mutual, private=passes, models=list(TWO), gradient=gradient)
    return cohort.weights(model=name)


@BACKENDS
@pytest.mark.parametrize("method", ["norms", "vmap"])
def test_each_model_moves_by_its_own_rule(kind, method):
    clipped = Clipped(norm=0.1, expected_batch=8.0, method=method)
    near = Proximal(mu=0.5)
    one_each = {"proxy": clipped, "private": near}
    for name, rule in one_each.items():
        # A first step from the same weights: no model's rule reaches the other model.
        mine, alone = once(kind, one_each, name), once(kind, {name: rule}, name)
        every = once(kind, rule, name)
        plain = once(kind, Plain(), name)
        for own, single, same, other in zip(mine, alone, every, plain, strict=True):
            for key in own:
                assert np.abs(own[key] - single[key]).max() < 1e-12
                assert np.abs(own[key] - same[key]).max() < 1e-12
            moved = max(np.abs(own[key] - other[key]).max() for key in own)
            # At the first step a proximal rule has nothing to pull at yet.
            assert moved > 1e-4 if name == "proxy" else moved < 1e-12
    once_plain = once(kind, {"proxy": clipped}, "private")
    for own, other in zip(once_plain, once(kind, Plain(), "private"), strict=True):
        assert all(np.abs(own[key] - other[key]).max() < 1e-12 for key in own)


@pytest.mark.parametrize("method", ["norms", "vmap"])
@pytest.mark.parametrize("same", [False, True])
def test_rules_of_their_own_agree_in_both_backends(method, same):
    # Models of one architecture share a module where they are stacked.
    model = dict.fromkeys(TWO, MLP) if same else TWO
    rules = {
        "proxy": Clipped(norm=0.1, expected_batch=8.0, method=method),
        "private": Proximal(mu=0.5),
    }
    one, other = (fit_two(kind, rules, model) for kind in (LoopCohort, VmapCohort))
    assert difference(one, other) < 1e-12
    assert "loss/proximal" in one.metrics()[0]
    without = fit_two(LoopCohort, {"proxy": rules["proxy"]}, model).weights(model="private")
    # The last member takes a single step, before which there is nothing to pull at.
    for own, free in list(zip(one.weights(model="private"), without, strict=True))[:2]:
        assert max(np.abs(own[key] - free[key]).max() for key in own) > 1e-5


@BACKENDS
def test_a_model_that_is_not_clipped_may_mix_rows(kind):
    normed = ModelSettings(name="cnn", options={"channels": [4], "norm": "batch"})
    rule = Clipped(norm=0.1, expected_batch=8.0)
    fit_two(kind, {"proxy": rule}, {**TWO, "private": normed})
    with pytest.raises(ValueError, match=r"of model 'private' is a (Masked)?BatchNorm"):
        fit_two(kind, rule, {**TWO, "private": normed})


@BACKENDS
def test_a_rule_of_a_model_that_does_not_learn_is_refused(kind):
    with pytest.raises(ValueError, match="gradient rule of 'meme', which does not learn"):
        fit_two(kind, {"meme": Plain()})


def test_anchors_of_different_strength_by_hand():
    # .1 / 2 * (.5^2 + 1^2) + .4 / 2 * .5^2, and mu * (w - w0) for each.
    start = {"a": [torch.tensor([0.5, -1.0])], "b": [torch.tensor([0.0])], "c": [torch.ones(1)]}
    rules = {"a": Proximal(mu=0.1), "b": Proximal(mu=0.4), "c": Plain()}
    anchor = Anchor.of(rules, start)
    now = [torch.tensor([1.0, -2.0]), torch.tensor([0.5]), torch.tensor([9.0])]
    assert anchor.penalty(now, stacked=False).item() == pytest.approx(0.0625 + 0.05)
    pulled = anchor.pulled([torch.zeros(2), torch.zeros(1), torch.zeros(1)], now)
    assert torch.cat(pulled).tolist() == pytest.approx([0.05, -0.1, 0.2, 0.0])
    assert Anchor.of({"c": Plain()}, start) is None


def test_a_model_that_is_not_clipped_is_not_measured_in_the_other_s_place():
    # Stacked, both are one module, and the one that is measured runs first.
    model = dict.fromkeys(TWO, MLP)
    rules = {"private": Clipped(norm=0.1, expected_batch=8.0)}
    one, other = (fit_two(kind, rules, model) for kind in (LoopCohort, VmapCohort))
    assert difference(one, other) < 1e-12
