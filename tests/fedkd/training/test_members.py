"""What members of a cohort have of their own: weights, lessons, arrays, optimizers of a fit."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedkd.losses.reduction import PerRow
from fedkd.models import ModelSettings, build_model
from fedkd.objectives import Objective
from fedkd.targets import Targets
from fedkd.training import (
    ClientState,
    ComposedObjective,
    Learner,
    OptimizerSettings,
    Passes,
    PublicLesson,
    check_state,
    supervised,
)

MLP = ModelSettings(name="mlp", options={"hidden": [16]})
DROPOUT = ModelSettings(name="mlp", options={"hidden": [16], "dropout": 0.4})
BATCH_NORM = ModelSettings(name="cnn", options={"channels": [4], "norm": "batch"})
every_model = pytest.mark.parametrize(
    "model", [MLP, DROPOUT, BATCH_NORM], ids=["plain", "dropout", "norm"]
)
every_kind = pytest.mark.parametrize("kind", [0, 1], ids=["loop", "vmap"])
PASSES = Passes(batch_size=8, epochs=2)
SGD = OptimizerSettings(name="sgd", lr=0.1)
ADAM = OptimizerSettings(name="adam", lr=0.01)


def mixed(outputs, batch):
    """Labels on private rows, soft labels on public ones, as far as a step has any."""
    losses = {}
    if outputs.private is not None:
        ce = F.cross_entropy(outputs.private, batch.labels, reduction="none")
        losses["ce"] = PerRow(ce, of="private")
    if outputs.public is not None:
        wanted = batch.targets.probabilities(1.0)
        kd = F.cross_entropy(outputs.public, wanted, reduction="none")
        losses["kd"] = PerRow(kd, of="public")
    return losses


# -- weights -----------------------------------------------------------------------------------


@every_model
def test_peers_hand_each_other_their_weights(float64, both_kinds, largest_difference, model):
    loop, vmap = both_kinds(model=model)
    for cohort in (loop, vmap):
        cohort.fit(supervised, private=PASSES)
        mine = cohort.weights()
        cohort.load_weights([mine[1], mine[2], mine[0]])
        for found, wanted in zip(cohort.weights(), [mine[1], mine[2], mine[0]], strict=True):
            assert largest_difference(found, wanted) == 0
        cohort.fit(supervised, private=PASSES)
    assert largest_difference(loop.states(), vmap.states()) < 1e-5


@every_kind
def test_weights_for_another_number_of_members_are_refused(both_kinds, kind):
    cohort = both_kinds()[kind]
    with pytest.raises(ValueError, match="one set for all or one for each of 3 members, got 2"):
        cohort.load_weights(cohort.weights()[:2])


# -- passes of each ----------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("epochs", [(0, 2, 1), (2, 0, 0), (0, 0, 0)])
def test_members_walk_through_their_rows_as_often_as_each_is_told(
    float64, both_kinds, largest_difference, model, epochs
):
    loop, vmap = both_kinds(model=model)
    apart, _ = both_kinds(model=model)
    before = loop.weights()
    for cohort in (loop, vmap):
        cohort.fit(supervised, private=[Passes(batch_size=8, epochs=own) for own in epochs])
        cohort.fit(supervised, private=[Passes(batch_size=8, epochs=0)] * 3)
    assert largest_difference(loop.states(), vmap.states()) < 1e-5
    apart.fit(supervised, private=Passes(batch_size=8, epochs=max(epochs)))
    for own, was, found, whole in zip(epochs, before, loop.weights(), apart.weights(), strict=True):
        if own == 0:
            assert largest_difference(found, was) == 0
        elif own == max(epochs):
            assert largest_difference(found, whole) == 0
        else:
            assert largest_difference(found, was) > 0


@every_kind
def test_passes_for_another_number_of_members_are_refused(both_kinds, kind):
    with pytest.raises(ValueError, match="passes for all or one for each of 3 members, got 2"):
        both_kinds()[kind].fit(supervised, private=[PASSES] * 2)


# -- public rows of each -----------------------------------------------------------------------

ROWS = {
    "of equal number": [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]],
    "growing as private rows shrink": [[0, 1, 2, 3, 4], [5, 6, 7], list(range(20))],
    "none for one": [[0, 1, 2, 3, 4, 5], [], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]],
    "none for the largest and the smallest": [[3, 4, 5, 6, 7, 8, 9, 10, 11], [], []],
}
every_rows = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())


@every_rows
@every_model
@pytest.mark.parametrize("beside", [False, True], ids=["public alone", "beside private rows"])
@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
def test_members_learn_from_public_rows_of_their_own(
    float64, both_kinds, largest_difference, public_lesson, rows, model, beside, optimizer
):
    loop, vmap = both_kinds(model=model, optimizer=optimizer)
    for cohort in (loop, vmap):
        cohort.fit(supervised, private=PASSES)
        public = public_lesson(rows, passes=Passes(batch_size=4, epochs=2))
        cohort.fit(mixed, private=PASSES if beside else None, public=public)
        # And back: everybody still has what is theirs.
        cohort.fit(supervised, private=PASSES)
    assert loop.clients == vmap.clients == (0, 1, 2)
    assert largest_difference(loop.states(), vmap.states()) < 1e-5
    assert largest_difference(loop.metrics(), vmap.metrics()) < 1e-5
    assert largest_difference(loop.outputs(on="private"), vmap.outputs(on="private")) < 1e-5


@every_rows
@every_kind
def test_a_member_learns_what_it_would_alone(float64, both_kinds, largest_difference, rows, kind):
    def lesson(member):
        draw = np.random.default_rng(member)
        values = draw.dirichlet(np.ones(3), len(rows[member])).reshape(-1, 3)
        return Targets(values, scale="probabilities")

    each = [np.array(own, np.int64) for own in rows]
    passes = Passes(batch_size=4)
    sizes = (13, 21, 5)
    together = both_kinds(sizes)[kind]
    targets = [lesson(member) for member in range(3)]
    together.fit(mixed, public=PublicLesson(rows=each, targets=targets, passes=passes))
    for member in range(3):
        alone = both_kinds(sizes)[kind]
        if len(each[member]):
            # All take the rows and targets of one, who must come out as beside the others.
            alone.fit(
                mixed,
                public=PublicLesson(rows=each[member], targets=targets[member], passes=passes),
            )
        found, wanted = (cohort.states()[member] for cohort in (together, alone))
        assert largest_difference(found, wanted) < 1e-9


@every_kind
def test_who_has_no_public_rows_takes_private_steps_alone(float64, both_kinds, kind):
    cohort = both_kinds((12, 9), optimizer=SGD)[kind]
    first = cohort.weights()[1]
    rows = [np.arange(8), np.zeros(0, np.int64)]
    targets = [Targets(np.full((len(own), 3), 1 / 3), scale="probabilities") for own in rows]
    cohort.fit(
        mixed,
        private=Passes(batch_size=100),
        public=PublicLesson(rows=rows, targets=targets, passes=Passes(batch_size=8)),
    )
    plain = build_model(MLP, input_shape=(1, 8, 8), num_classes=3, seed=0)
    plain.load_state_dict({name: torch.from_numpy(own) for name, own in first.items()})
    data = cohort._data
    F.cross_entropy(plain(data.train_inputs[12:]), data.train_labels[12:]).backward()
    for name, parameter in plain.named_parameters():
        expected = (parameter - 0.1 * parameter.grad).detach().numpy()
        np.testing.assert_allclose(cohort.weights()[1][name], expected, atol=1e-10)
    assert set(cohort.metrics()[0]) == {"loss/ce", "loss/kd"}
    assert set(cohort.metrics()[1]) == {"loss/ce"}


@every_kind
def test_lessons_that_do_not_fit_are_refused(both_kinds, public_lesson, kind):
    cohort = both_kinds()[kind]
    with pytest.raises(ValueError, match="rows must be one for all or one for each of 3 members"):
        cohort.fit(mixed, public=public_lesson([[0, 1], [2]]))
    good = public_lesson([[0, 1], [2, 3], [4, 5]])
    hard = Targets(np.full((2, 3), 1 / 3), scale="probabilities", temperature=2.0)
    for targets, message in [
        (good.targets[:2], "targets must be one for all or one for each of 3 members, got 2"),
        ([*good.targets[:2], hard], "must have one scale and temperature"),
        (Targets(np.full((3, 3), 1 / 3), scale="probabilities"), "each of its 2 rows, got 3"),
    ]:
        lesson = PublicLesson(rows=good.rows, targets=targets, passes=good.passes)
        with pytest.raises(ValueError, match=message):
            cohort.fit(mixed, public=lesson)


# -- named arrays ------------------------------------------------------------------------------


@every_kind
def test_named_arrays_stay_with_each_client(both_kinds, same_bits, kind):
    cohort = both_kinds()[kind]
    caches = [np.full((2, k + 1), k, np.float32) for k in range(3)]
    cohort.keep("cache/latest", caches)
    cohort.keep("seen", [np.array(True), None, np.array(False)])
    caches[0][:] = -1
    states = [ClientState.from_arrays(state.to_arrays()) for state in cohort.states()]
    later = both_kinds(states=states, round=2)[kind]
    for position, found in enumerate(later.kept("cache/latest")):
        assert same_bits({"": found}, {"": np.full((2, position + 1), position, np.float32)})
        assert not found.flags.writeable
    assert [None if each is None else bool(each) for each in later.kept("seen")] == [
        True,
        None,
        False,
    ]
    assert later.kept("nothing") == [None, None, None]
    later.keep("seen", [None] * 3)
    assert "seen" not in later.states()[0].arrays


@every_kind
def test_arrays_that_no_state_can_hold_are_refused(both_kinds, kind):
    cohort = both_kinds()[kind]
    with pytest.raises(ValueError, match="one array for each of 3 members, got 1"):
        cohort.keep("cache", [np.zeros(2)])
    with pytest.raises(ValueError, match=r"kept array 'cache' must be a NumPy array.*got object"):
        cohort.keep("cache", [np.array([{}])] * 3)
    for name in ("average/mean", "exchange/rest"):
        with pytest.raises(ValueError, match=f"names that begin with average/ .* got '{name}'"):
            cohort.keep(name, [np.zeros(2)] * 3)
    with pytest.raises(ValueError, match="must be text of 1 to 300 characters, got ''"):
        cohort.keep("", [np.zeros(2)] * 3)


def test_a_state_may_have_named_arrays_of_any_shape_and_nothing_else(both_kinds):
    state = both_kinds()[0].states()[0]
    for array in (np.zeros((3, 0), np.float16), np.array(3), np.ones((2, 2, 2), bool)):
        check_state(ClientState(state.models, {"a/b": array}), state, (), made_later="parts")
    with pytest.raises(ValueError, match="must be a NumPy array"):
        check_state(
            ClientState(state.models, {"a": np.array(["text"])}), state, (), made_later="parts"
        )
    for name in ("model", "model/other/0.weight", "kept/array/x", "model/weights/"):
        with pytest.raises(ValueError, match="a client's state has no array"):
            ClientState.from_arrays({name: np.zeros(2)})


# -- optimizers of a fit -----------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("own", [SGD, ADAM], ids=["own sgd", "own adam"])
def test_a_fit_s_own_optimizer_agrees_in_both_kinds(
    float64, both_kinds, largest_difference, model, own
):
    loop, vmap = both_kinds(model=model, optimizer=own)
    for cohort in (loop, vmap):
        cohort.fit(supervised, private=PASSES)
        cohort.fit(supervised, private=PASSES, optimizer=OptimizerSettings(name="rmsprop", lr=1e-3))
        cohort.fit(supervised, private=PASSES)
    assert largest_difference(loop.states(), vmap.states()) < 1e-5


@every_kind
def test_the_clients_own_optimizer_has_the_bits_as_if_the_fit_had_not_been(
    both_kinds, same_bits, kind
):
    cohort = both_kinds(optimizer=ADAM)[kind]
    cohort.fit(supervised, private=PASSES)
    before = [state.models["model"] for state in cohort.states()]
    cohort.fit(supervised, private=PASSES, optimizer=OptimizerSettings(name="adam", lr=0.1))
    after = [state.models["model"] for state in cohort.states()]
    for one, other in zip(before, after, strict=True):
        assert same_bits(one.optimizer, other.optimizer)
        assert not same_bits(one.weights, other.weights)


@every_kind
def test_a_fit_s_own_optimizer_begins_without_memory(both_kinds, same_bits, kind):
    # Momentum of the first fit must not reach the second: as with clients that come fresh.
    heavy = OptimizerSettings(name="sgd", lr=0.1, momentum=0.9)
    cohort = both_kinds(optimizer=heavy)[kind]
    cohort.fit(supervised, private=PASSES)
    fresh = both_kinds(
        optimizer=heavy,
        states=[
            ClientState({"model": type(state.models["model"])(state.models["model"].weights)})
            for state in cohort.states()
        ],
    )[kind]
    # So that both draw the same batches.
    fresh._fit_keys.next(private=True)
    cohort.fit(supervised, private=PASSES, optimizer=heavy)
    fresh.fit(supervised, private=PASSES)
    for one, other in zip(cohort.weights(), fresh.weights(), strict=True):
        assert same_bits(one, other)


@pytest.mark.parametrize("terms", [{"ce": 1.0, "kd": {"temperature": 2.0}}, {"kd": 1.0}])
def test_terms_that_learn_in_public_rest_where_a_member_has_no_public_rows(
    float64, both_kinds, largest_difference, public_lesson, terms
):
    objective = ComposedObjective(
        learners={"model": Learner(objective=Objective.model_validate(terms))}
    )
    loop, vmap = both_kinds()
    first = loop.weights()[1]
    for cohort in (loop, vmap):
        cohort.fit(objective, private=PASSES, public=public_lesson(ROWS["none for one"]))
        named = [{f"loss/{name}" for name in terms} - own.keys() for own in cohort.metrics()]
        assert named == [set(), {"loss/kd"}, set()]
    assert largest_difference(loop.states(), vmap.states()) < 1e-5
    rested = largest_difference(loop.weights()[1], first) == 0
    assert rested == ("ce" not in terms)
