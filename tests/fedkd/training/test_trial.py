"""The trial of models that people bring: what it lets through computes the same bits anywhere."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from fedkd.models import ModelSettings, build_model, ignores_seed, known_models
from fedkd.training import ModelPool, OptimizerSettings, Passes, VmapUnsupportedError, supervised
from fedkd.training.trial import SingleRowError, TrialSettings, try_model

ADAM = OptimizerSettings(name="adam", lr=0.01)

ACCEPTED = [
    "Plain",
    "InPlace",
    "ReluFirst",
    "PythonDepth",
    "EvalNoise",
    "Cached",
    "Late",
    "Masked",
    "Scaled",
    "Tied",
    "Lazy",
    "Normed",
    "PartlyFrozen",
    "Strided",
    "Half",
    "Batched",
]

REFUSED = {
    "HiddenMean": r"keeps something outside its state_dict .*'mean'.*register it as a buffer",
    "HiddenList": r"keeps something outside its state_dict .*'means'",
    "WarmUp": r"keeps something outside its state_dict .*'step'",
    "LateBuffer": r"'mean' in its state_dict only once it has trained",
    "BatchBuffer": r"'last' was float32 of shape \[\d, 8\] and has become float32 of shape",
    "Unfreezing": r"keeps something outside its state_dict",
    "SharedCount": r"same numbers twice from one seed: .*keeps something in a class",
    "OwnEntropy": r"same numbers twice from one seed: it draws from a generator that no seed",
    "OwnGenerator": r"keeps something outside its state_dict .*'generator'",
    "RandomFeatures": r"draws 'frequencies' when it is built and keeps it outside its state_dict",
    "UnseededFirst": r"another first 'head\.bias' each time it is built with one seed",
    "Auxiliary": r"a tensor of logits, got tuple in training mode",
    "Table": r"a tensor of logits, got dict in training mode",
    "Softmax": r"returns probabilities, .*return logits, without a softmax",
    "Extra": r"keeps '_extra_state' in its state_dict as dict: only tensors travel",
    "PartialState": r"leaves 'first\.1\.weight' out of its state_dict",
    "BFloat": r"keeps 'first\.1\.weight' as bfloat16, .*use float32",
    "BFloatLogits": r"floating-point logits \[\d, 3\], got bfloat16",
    "Frozen": r"has no parameter that requires a gradient: there is nothing to train",
    "Empty": r"has no parameter that requires a gradient",
    "Detached": r"sends no gradient to any of its parameters",
    "NanFirst": r"has NaN or infinity in its first 'head\.weight'",
    "NanOut": r"returns NaN or infinity for its first inputs",
    "NewParameter": r"puts a new parameter in the place of 'head\.weight'",
    "FixedBatch": r"failed on inputs of shape \[\d, 1, 8, 8\] .*RuntimeError",
    "DefaultType": r"changes torch\.set_default_dtype from torch\.float32 to torch\.float64",
    "Threads": r"changes torch\.set_num_threads from 1 to 3",
}


def odd(kind):
    return ModelSettings(name="odd_models:make", options={"kind": kind})


@pytest.fixture
def attempt(tensors):
    """Try a model on a few rows of the tiny problem."""
    data = tensors()

    def run(model, **use):
        rows = data.train_inputs[:9], data.train_labels[:9]
        settings = TrialSettings(optimizer=ADAM, **use)
        try_model(model, rows, num_classes=data.num_classes, use=settings)

    return run


@pytest.mark.parametrize("kind", ACCEPTED)
def test_models_with_harmless_habits_are_let_through(kind, attempt):
    attempt(odd(kind))


@pytest.mark.parametrize(("kind", "message"), REFUSED.items(), ids=REFUSED)
def test_what_could_not_be_trusted_is_refused_with_the_reason(kind, message, attempt):
    with pytest.raises(ValueError, match=rf"model 'odd_models:make\(kind={kind}\)' .*{message}"):
        attempt(odd(kind))


def test_every_message_is_one_line(attempt):
    for kind in REFUSED:
        with pytest.raises(ValueError, match="odd_models") as refused:
            attempt(odd(kind))
        assert "\n" not in str(refused.value)


def test_a_trial_leaves_no_trace_in_the_process(attempt):
    def process():
        return (
            np.random.get_state()[1].tolist(),  # noqa: NPY002
            torch.get_rng_state().tolist(),
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
        )

    before = process()
    for kind in ("Plain", "PythonDepth", "DefaultType", "Threads"):
        with pytest.raises(ValueError, match="changes") if kind in REFUSED else nullcontext():
            attempt(odd(kind))
    assert process() == before


def test_a_model_that_does_not_train_may_be_frozen(attempt):
    attempt(odd("Frozen"), trains=False)
    with pytest.raises(ValueError, match="returns probabilities"):
        attempt(odd("Softmax"), trains=False)


def test_single_rows_are_tried_where_they_come(attempt):
    attempt(odd("Batched"), fewest_rows=2)
    message = r"cannot train on a single row \(ValueError: more than one row, please\)"
    with pytest.raises(SingleRowError, match=message):
        attempt(odd("Batched"), fewest_rows=1)


@pytest.mark.parametrize("kind", ["Plain", "Tied", "InPlace", "Scaled", "PartlyFrozen"])
def test_models_that_can_be_stacked_are_let_through(kind, attempt):
    attempt(odd(kind), stacked=True)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("Branching", "cannot be stacked: .*data-dependent"),
        ("WholeBatch", "computes other numbers stacked than alone: .*rows that pad"),
        ("EvalNoise", "cannot be stacked"),
        ("Normed", "cannot be stacked: RuntimeError"),
    ],
)
def test_a_stack_is_tried_where_it_is_asked_for(kind, message, attempt):
    attempt(odd(kind))
    with pytest.raises(VmapUnsupportedError, match=message):
        attempt(odd(kind), stacked=True)


@pytest.mark.parametrize("name", known_models())
def test_built_in_models_would_pass_and_are_not_tried(name, attempt, monkeypatch):
    from fedkd.training.trial import _Trial

    asked = []
    monkeypatch.setattr(_Trial, "run", lambda trial: asked.append(trial))
    attempt(ModelSettings(name=name))
    assert asked == []
    monkeypatch.undo()
    monkeypatch.setattr(ModelSettings, "is_own", True)
    monkeypatch.setattr(
        "fedkd.models._build_from_callable",
        lambda settings, *shape: _built_in(settings, *shape),
    )
    attempt(ModelSettings(name=name))


def _built_in(settings, input_shape, num_classes):
    from fedkd.models import _validated

    return _validated(settings.name, settings.options).build(input_shape, num_classes)


@pytest.mark.parametrize(
    ("factory", "ignored"), [("fixed", True), ("zeros", True), ("make", False)]
)
def test_a_model_whose_first_weights_ignore_the_seed_is_known(factory, ignored):
    options = {"kind": "Plain"} if factory == "make" else {}
    model = ModelSettings(name=f"odd_models:{factory}", options=options)
    assert ignores_seed(model, input_shape=(1, 8, 8), num_classes=3) is ignored


# -- what was let through ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ACCEPTED)
def test_bits_do_not_depend_on_who_shared_the_worker(kind, make_cohort, tensors, same_bits):
    data = tensors(rows=(12, 12, 12, 12))
    shared = ModelPool(data, ADAM)

    def life(client, pool):
        """Two rounds of one client, in the workers that ``pool`` makes."""
        state, told = None, []
        for number in (1, 2):
            cohort = make_cohort(
                (client,),
                model=odd(kind),
                optimizer=ADAM,
                data=data,
                pool=pool(),
                states=[state],
                round=number,
                rounds=2,
            )
            cohort.fit(supervised, private=Passes(batch_size=4, epochs=2))
            told.append(cohort.predict(data.public_inputs))
            (state,) = cohort.states()
        return {**state.to_arrays(), "first": told[0], "second": told[1]}

    for client in (0, 1, 2):
        together = life(client, lambda: shared)
        alone = life(client, lambda: ModelPool(data, ADAM))
        assert same_bits(together, alone)


@pytest.mark.parametrize("kind", ["InPlace", "ReluFirst"])
def test_a_model_never_changes_the_rows_it_is_given(kind, make_cohort, tensors):
    data = tensors()
    before = data.public_inputs.clone()
    cohort = make_cohort(model=odd(kind), data=data)
    first = cohort.predict(data.public_inputs)
    assert np.array_equal(first, cohort.predict(data.public_inputs))
    assert torch.equal(data.public_inputs, before)


def test_in_place_and_out_of_place_are_the_same_model(make_cohort, tensors, same_bits):
    data, found = tensors(), []
    for kind in ("InPlace", "OutOfPlace"):
        # Two models of a client see the same batch.
        cohort = make_cohort(model={"one": odd(kind), "two": odd(kind)}, data=data)
        cohort.fit(_both, private=Passes(batch_size=4), models=("one", "two"))
        found.append({**cohort.states()[0].to_arrays(), "told": cohort.predict(data.public_inputs)})
    assert same_bits(*found)


def _both(outputs, batch):
    losses = {name: supervised(own, batch)["ce"] for name, own in outputs.items()}
    return {"ce": losses["one"], "ce_two": losses["two"]}


def test_a_gradient_reaches_the_input_through_its_copy():
    model = build_model(odd("InPlace"), input_shape=(1, 8, 8), num_classes=3, seed=0)
    images = torch.rand(2, 1, 8, 8, requires_grad=True)
    model(images).sum().backward()
    assert images.grad.any()
