"""Models that never train: no bit of them moves; running averages follow and stay."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedkd.losses.reduction import PerRow
from fedkd.losses.response import soft_target_loss, soft_target_rows
from fedkd.models import ModelSettings, build_model
from fedkd.objectives import Objective
from fedkd.training import (
    Average,
    ClientState,
    ComposedObjective,
    Learner,
    OptimizerSettings,
    Passes,
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


def taught(outputs, batch):
    """Cross-entropy, and the distance to what the teacher says and shows."""
    student, teacher = outputs["model"], outputs["teacher"]
    rows = len(student.private)
    distance = (student.private - teacher.private).square().mean(-1)
    embedding = student.features["penultimate"] - teacher.features["penultimate"]
    shown = embedding[:rows].square().mean(-1)
    ce = F.cross_entropy(student.private, batch.labels, reduction="none")
    return {
        "ce": PerRow(ce, of="private"),
        "kd": PerRow(distance, of="private"),
        "hint": 0.5 * PerRow(shown, of="private"),
    }


def softened(outputs, batch):
    """The divergence from the teacher on private rows."""
    student, teacher = outputs["model"].private, outputs["teacher"].private
    rows = soft_target_rows(student, F.softmax(teacher / 2.0, -1), temperature=2.0)
    return {"kd": 4.0 * PerRow(rows, of="private")}


def network(weights):
    """A plain module of these weights."""
    built = build_model(BATCH_NORM, input_shape=(1, 8, 8), num_classes=3, seed=0)
    built.load_state_dict({name: torch.from_numpy(each) for name, each in weights.items()})
    return built


def fresh(model, seed):
    """Weights that no client begins with."""
    built = build_model(model, input_shape=(1, 8, 8), num_classes=3, seed=seed)
    weights = {}
    for name, tensor in built.state_dict().items():
        array = tensor.numpy().copy()
        # Statistics that a batch does not have: evaluation mode shows.
        weights[name] = array + 0.5 if "running" in name else array
    return weights


@every_model
@pytest.mark.parametrize("each", [False, True], ids=["one for all", "one for each"])
def test_both_kinds_learn_the_same_from_a_frozen_model(
    float64, both_kinds, largest_difference, model, each
):
    teacher = [fresh(model, 50 + k) for k in range(3)] if each else fresh(model, 50)
    loop, vmap = both_kinds(model=model)
    for cohort in (loop, vmap):
        cohort.freeze("teacher", teacher)
        cohort.fit(taught, private=PASSES, frozen=["teacher"], layers=["penultimate"])
    assert largest_difference(loop.states(), vmap.states()) < 1e-5
    assert largest_difference(loop.metrics(), vmap.metrics()) < 1e-5


@every_model
@every_kind
@pytest.mark.parametrize("each", [False, True], ids=["one for all", "one for each"])
def test_no_bit_of_a_frozen_model_moves(both_kinds, same_bits, model, kind, each):
    given = [fresh(model, 50 + k) for k in range(3)]
    cohort = both_kinds(model=model)[kind]
    cohort.freeze("teacher", given if each else given[0])
    before = cohort.predict_public(np.arange(20), model="teacher")
    cohort.fit(taught, private=PASSES, frozen=["teacher"], layers=["penultimate"])
    cohort.outputs(on="private", mode="train", model="teacher")
    assert np.array_equal(cohort.predict_public(np.arange(20), model="teacher"), before)
    for position, weights in enumerate(cohort.weights(model="teacher")):
        assert same_bits(weights, given[position if each else 0])


@every_kind
def test_a_frozen_model_teaches_in_evaluation_mode(float64, both_kinds, kind):
    # The teacher's running statistics are not those of the rows, in none of three full batches.
    cohort = both_kinds((12, 12), model=BATCH_NORM, optimizer=SGD)[kind]
    teacher = fresh(BATCH_NORM, 50)
    cohort.freeze("teacher", teacher)
    first = cohort.weights()
    cohort.fit(softened, private=Passes(batch_size=100, epochs=3), frozen=["teacher"])
    for position, (weights, trained) in enumerate(zip(first, cohort.weights(), strict=True)):
        student, master = (network(own) for own in (weights, teacher))
        inputs = cohort._data.train_inputs[12 * position : 12 * position + 12]
        with torch.no_grad():
            wanted = master.eval()(inputs)
        for _ in range(3):
            student.zero_grad()
            soft_target_loss(student.train()(inputs), wanted, temperature=2.0).backward()
            with torch.no_grad():
                for parameter in student.parameters():
                    parameter -= 0.1 * parameter.grad
        for name, tensor in student.state_dict().items():
            np.testing.assert_allclose(trained[name], tensor.numpy(), atol=1e-9)


@every_kind
def test_a_teacher_left_in_training_mode_would_be_noticed(both_kinds, same_bits, monkeypatch, kind):
    # The break that the test above finds: a teacher that nobody puts in evaluation mode.
    trained = []
    for broken in (False, True):
        cohort = both_kinds(model=BATCH_NORM)[kind]
        cohort.freeze("teacher", [fresh(BATCH_NORM, 50)] * 3)
        if broken:
            monkeypatch.setattr(torch.nn.Module, "eval", lambda module: module.train())
        cohort.fit(softened, private=PASSES, frozen=["teacher"])
        trained.append(cohort.weights()[0])
    assert not same_bits(*trained)


class Counting(torch.nn.Module):
    """Somebody's model that writes to a buffer in evaluation mode as well, and reads it."""

    def __init__(self, *, input_shape, num_classes) -> None:
        super().__init__()
        self.scores = torch.nn.Linear(int(np.prod(input_shape)), num_classes)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1.0)
        logits: torch.Tensor = self.scores(images.flatten(1)) + 0.1 * self.seen
        return logits


COUNTING = ModelSettings(name=f"{__name__}:Counting")


@every_kind
@pytest.mark.parametrize("each", [False, True], ids=["one for all", "one for each"])
def test_a_frozen_model_that_counts_its_calls_starts_each_of_them_anew(both_kinds, kind, each):
    def objective(outputs, _batch):
        said = outputs["teacher"].private.mean()
        return {"said": said + 0 * outputs["model"].private.sum()}

    teacher = fresh(COUNTING, 3)
    cohort = both_kinds((8, 8), model=COUNTING)[kind]
    cohort.freeze("teacher", [teacher] * 2 if each else teacher)
    # The same rows in each of three steps, and once more without any.
    cohort.fit(objective, private=Passes(batch_size=100, epochs=3), frozen=["teacher"])
    for own, rows in zip(
        cohort.metrics(), cohort.outputs(on="private", model="teacher"), strict=True
    ):
        assert own["loss/said"] == pytest.approx(rows.logits.mean(), abs=1e-5)


@every_kind
def test_two_frozen_models_of_one_architecture_keep_apart(float64, both_kinds, kind):
    cohort = both_kinds()[kind]
    cohort.freeze("one", fresh(MLP, 1))
    cohort.freeze("other", fresh(MLP, 2))

    def objective(outputs, _batch):
        apart = outputs["one"].features["penultimate"] - outputs["other"].features["penultimate"]
        # A constant: whoever saw one model twice would find 0.
        return {"apart": apart.square().mean() + 0 * outputs["model"].private.sum()}

    cohort.fit(
        objective,
        private=PASSES,
        frozen=["one", "other"],
        layers={"one": ["penultimate"], "other": ["penultimate"]},
    )
    assert all(own["loss/apart"] > 1e-4 for own in cohort.metrics())


@every_kind
def test_frozen_models_are_refused_by_name(both_kinds, kind):
    cohort = both_kinds()[kind]
    with pytest.raises(ValueError, match="no frozen model 'teacher'"):
        cohort.fit(taught, private=PASSES, frozen=["teacher"])
    with pytest.raises(ValueError, match="that no model of the clients has, got 'model'"):
        cohort.freeze("model", fresh(MLP, 1))
    with pytest.raises(ValueError, match="weights do not fit the model"):
        cohort.freeze("teacher", fresh(BATCH_NORM, 1))
    with pytest.raises(ValueError, match="one for each of 3 members, got 2 sets"):
        cohort.freeze("teacher", [fresh(MLP, 1)] * 2)
    with pytest.raises(ValueError, match="unknown model 'big'; known: model"):
        cohort.freeze("teacher", fresh(MLP, 1), like="big")


# -- running averages --------------------------------------------------------------------------


@every_model
def test_running_averages_agree_and_stay_with_the_clients(
    float64, both_kinds, largest_difference, model
):
    cohorts = both_kinds(model=model)
    for round in (1, 2):
        for cohort in cohorts:
            cohort.fit(
                taught,
                private=PASSES,
                frozen=["teacher"],
                layers=["penultimate"],
                averages={"teacher": Average(decay=0.8)},
            )
        states = [cohort.states() for cohort in cohorts]
        assert largest_difference(*states) < 1e-5
        assert int(states[0][0].arrays["average/teacher/model/updates"]) == 4 * round
        travelled = [
            [ClientState.from_arrays(state.to_arrays()) for state in own] for own in states
        ]
        cohorts = [
            both_kinds(model=model, states=own, round=2)[kind] for kind, own in enumerate(travelled)
        ]
    one, other = (
        cohort.outputs(on="private", model="teacher", layers=["penultimate"]) for cohort in cohorts
    )
    assert largest_difference(one, other) < 1e-5


@every_kind
def test_an_average_is_the_mean_of_all_steps_until_its_decay_takes_over(
    float64, both_kinds, same_bits, kind
):
    # a_t = min(1 - 1 / (t + 1), decay) = 0, 1/2, 0.6, 0.6 for a decay of 0.6.
    cohort = both_kinds((12, 30, 7), model=BATCH_NORM, optimizer=SGD)[kind]
    expected = [None] * 3
    for step, share in enumerate((0.0, 0.5, 0.6, 0.6)):
        cohort.fit(supervised, private=Passes(batch_size=100), averages={"mean": Average(0.6)})
        for position, weights in enumerate(cohort.weights()):
            past = weights if step == 0 else expected[position]
            expected[position] = {
                name: share * past[name] + (1 - share) * newest
                if newest.dtype.kind == "f"
                else newest
                for name, newest in weights.items()
            }
    for found, wanted in zip(cohort.weights(model="mean"), expected, strict=True):
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_allclose(found[name], array, atol=1e-10, err_msg=name)


@every_kind
def test_an_average_teaches_as_it_stood_before_the_step(float64, both_kinds, kind):
    cohort = both_kinds((12, 12), optimizer=SGD)[kind]

    def distance(outputs, batch):
        gap = (outputs["model"].private - outputs["mean"].private).square().mean()
        return {"ce": F.cross_entropy(outputs["model"].private, batch.labels), "gap": 0 * gap + gap}

    def fit():
        cohort.fit(
            distance,
            private=Passes(batch_size=100),
            frozen=["mean"],
            averages={"mean": Average(0.9)},
        )
        return [own["loss/gap"] for own in cohort.metrics()]

    # It begins as the model is, and after its first update is the model: no gap in two steps.
    assert max(fit()) < 1e-12
    assert max(fit()) < 1e-12
    assert min(fit()) > 1e-8


@every_kind
def test_members_of_different_age_have_averages_of_their_own_age(float64, both_kinds, kind):
    cohort = both_kinds((30, 8, 8))[kind]
    cohort.fit(supervised, private=Passes(batch_size=8), averages={"mean": Average()})
    ages = [int(state.arrays["average/mean/model/updates"]) for state in cohort.states()]
    assert ages == [4, 1, 1]


@every_kind
def test_averages_are_checked(both_kinds, kind):
    cohort = both_kinds()[kind]
    with pytest.raises(ValueError, match=r"decay of a running average must be in \[0, 1\), got 1"):
        Average(1.0)
    with pytest.raises(ValueError, match="follows 'other', which does not learn in this fit"):
        cohort.fit(supervised, private=PASSES, averages={"mean": Average(model="other")})
    with pytest.raises(ValueError, match="a name without '/' that no other model has"):
        cohort.fit(supervised, private=PASSES, averages={"model": Average()})


def test_an_average_in_a_state_must_be_one_of_the_client_s_models(both_kinds):
    cohort = both_kinds()[0]
    like = cohort.states()[0]
    cohort.fit(supervised, private=PASSES, averages={"mean": Average()})
    state = cohort.states()[0]
    check_state(state, like, ("momentum_buffer",), made_later="parts")
    prefix = "average/mean/model"
    for name, array, message in [
        (f"{prefix}/weights/1.weight", np.zeros((2, 2), np.float32), "'weights/1.weight' is float"),
        (f"{prefix}/updates", np.zeros(2, np.int64), "'updates' is int64"),
        (f"{prefix}/weights/9.weight", np.zeros(2, np.float32), "unexpected or missing"),
        ("average/mean/other/updates", np.array(0), "an average of no model of the client"),
    ]:
        odd = ClientState(state.models, {**state.arrays, name: array})
        with pytest.raises(ValueError, match=message):
            check_state(odd, like, ("momentum_buffer",), made_later="parts")


# -- composed objectives -----------------------------------------------------------------------


def composed(**terms):
    return ComposedObjective(
        learners={"model": Learner(objective=Objective.model_validate(terms), teacher="teacher")}
    )


COMPOSED = {
    "logits": {"ce": 1.0, "kd": {"temperature": 2.0}, "ntd": 0.5},
    "layers": {"ce": 1.0, "hint": 0.3},
}


@pytest.mark.parametrize("terms", COMPOSED.values(), ids=COMPOSED.keys())
@every_model
def test_terms_learn_from_a_frozen_teacher(
    float64, both_kinds, largest_difference, same_bits, model, terms
):
    loop, vmap = both_kinds(model=model)
    teacher = fresh(model, 50)
    for cohort in (loop, vmap):
        cohort.freeze("teacher", teacher)
        cohort.fit(composed(**terms), private=PASSES, frozen=["teacher"])
        assert same_bits(cohort.weights(model="teacher")[0], teacher)
        assert set(cohort.metrics()[0]) == {f"loss/{name}" for name in terms}
    assert largest_difference(loop.states(), vmap.states()) < 1e-5


@every_kind
def test_terms_with_a_teacher_that_is_not_there_are_refused(both_kinds, kind):
    cohort = both_kinds()[kind]
    with pytest.raises(ValueError, match="'teacher' teaches in this fit and is not in it"):
        cohort.fit(composed(ce=1.0, kd=1.0), private=PASSES)
