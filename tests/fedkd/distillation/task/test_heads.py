"""A teacher of several tasks: heads, who trains them, and who teaches which row."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedkd.data.augmentation import Mix
from fedkd.distillation.run.checking import check
from fedkd.distillation.run.running import distill, train_teacher
from fedkd.distillation.settings import DistillSettings
from fedkd.distillation.task.combining import Combination
from fedkd.distillation.task.heads import (
    TaskHeads,
    TaskSettings,
    routed_logits,
    split_into_heads,
    task_of_each_class,
    tasks_objective,
)
from fedkd.distillation.task.participants import TeacherSettings, TrainingSettings
from fedkd.distillation.task.teachers import Teacher
from fedkd.models import ModelSettings, build_model
from fedkd.objectives import View
from fedkd.objectives.terms import Parts
from fedkd.targets import HEAD_PADDING

# Five classes, told apart by heads of three and two; the numbers are mixed on purpose.
TASKS = {"left": TaskSettings(classes=(4, 0, 2)), "right": TaskSettings(classes=(3, 1))}
TASK_OF_CLASS = torch.tensor([0, 1, 0, 1, 0])
LOGITS = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 3, 4, 1, 2, 3])


def network(name="cnn", classes=5):
    return build_model(
        ModelSettings(name=name), input_shape=(1, 8, 8), num_classes=classes, seed=4
    ).eval()


def losses_of(logits, labels, *, mix=None, label_smoothing=0.0, tasks=TASKS):
    objective = tasks_objective(tasks, label_smoothing=label_smoothing)
    view = View(labelled_logits=logits, labels=labels, mix=mix)
    parts = Parts.of(nn.ModuleDict())
    return {name: term.value(view, parts, ()) for name, term in objective.terms.items()}


def toy_settings(*, tasks=None, heads="own", **changes):
    tasks = {"first": [0, 2], "rest": [1, 3]} if tasks is None else tasks
    return DistillSettings.model_validate(
        {
            "teacher": {
                "models": {"name": "mlp", "options": {"hidden": [16]}},
                "tasks": tasks,
                "heads": heads,
                "training": {"epochs": 3, "batch_size": 8},
            },
            "student": {"model": {"name": "mlp", "options": {"hidden": [8]}}},
            "training": {"epochs": 2, "batch_size": 8},
            **changes,
        }
    )


@pytest.fixture
def four_classes(toy_rows):
    """Toy rows of three classes, where every other row of the last is of a fourth."""

    def split(labels):
        return torch.where((labels == 2) & (torch.arange(len(labels)) % 2 == 0), 3, labels)

    rows = toy_rows()
    return replace(
        rows,
        labels=split(rows.labels),
        validation_labels=split(rows.validation_labels),
        test_labels=split(rows.test_labels),
        num_classes=4,
        class_names=("a", "b", "c", "d"),
    )


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet8", "transformer"])
def test_cutting_the_last_layer_into_heads_keeps_every_logit(name):
    model = network(name)
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    model.requires_grad_(False)
    before = model(images)
    assert split_into_heads(model, TASKS, 5).requires_grad_(False)(images) == pytest.approx(
        before, abs=1e-5
    )
    heads = next(module for module in model.modules() if isinstance(module, TaskHeads))
    assert {name: head.out_features for name, head in heads.heads.items()} == {
        "left": 3,
        "right": 2,
    }


def test_a_row_keeps_the_logits_of_its_own_tasks_head_and_no_others():
    routed = routed_logits(LOGITS, TASK_OF_CLASS[LABELS], TASK_OF_CLASS)
    for row, label in enumerate(LABELS.tolist()):
        own = TASK_OF_CLASS.eq(TASK_OF_CLASS[label])
        assert torch.equal(routed[row, own], LOGITS[row, own])
        assert (routed[row, ~own] == HEAD_PADDING).all()
        # A softmax over all classes is the head's own softmax.
        expected = LOGITS[row, own].softmax(-1)
        assert routed[row].softmax(-1)[own] == pytest.approx(expected, abs=1e-6)


def test_a_tasks_loss_is_its_heads_cross_entropy_on_its_own_rows():
    losses = losses_of(LOGITS, LABELS, label_smoothing=0.1)
    for name, rows, classes in (("left", [0, 2, 4], [4, 0, 2]), ("right", [1, 3, 5], [3, 1])):
        local = torch.tensor([classes.index(LABELS[row]) for row in rows])
        logits = LOGITS[rows][:, classes]
        expected = F.cross_entropy(logits, local, label_smoothing=0.1)
        assert losses[name].item() == pytest.approx(expected.item(), rel=1e-5)


def test_rows_of_other_tasks_send_no_gradient_to_a_head():
    logits = LOGITS.clone().requires_grad_()
    losses_of(logits, LABELS)["left"].backward()
    other_rows = TASK_OF_CLASS[LABELS] == 1
    assert (logits.grad[other_rows] == 0).all()
    assert (logits.grad[:, TASK_OF_CLASS == 1] == 0).all()
    assert (logits.grad[0, TASK_OF_CLASS == 0] != 0).all()


def test_a_batch_without_rows_of_a_task_costs_nothing_there():
    right = torch.tensor([1, 3, 5])
    losses = losses_of(LOGITS[right], LABELS[right])
    assert losses["left"].item() == 0
    assert losses["right"].item() > 0


def test_mixed_rows_belong_to_the_tasks_of_both_their_labels():
    permutation = torch.tensor([1, 2, 3, 4, 5, 0])
    mixed = losses_of(LOGITS, LABELS, mix=Mix(permutation=permutation, share=0.7))
    one, other = losses_of(LOGITS, LABELS), losses_of(LOGITS, LABELS[permutation])
    for name in TASKS:
        expected = 0.7 * one[name] + 0.3 * other[name]
        assert mixed[name].item() == pytest.approx(expected.item(), rel=1e-5)


def test_task_weights_decide_what_the_teacher_learns(workshop, four_classes):
    # A task of weight 0 leaves its head as it was cut.
    tasks = {"first": {"classes": [0, 2], "weight": 2.0}, "rest": {"classes": [1, 3], "weight": 0}}
    settings = TeacherSettings(
        models=(ModelSettings(name="mlp", options={"hidden": [8]}),),
        tasks=tasks,
        training=TrainingSettings(epochs=2, batch_size=8),
    )
    shop = workshop(rows=four_classes)
    teacher = train_teacher(settings, shop)
    fresh = split_into_heads(shop.build(settings.models[0], 1, 0), settings.tasks, 4)
    heads = [
        next(module for module in model.modules() if isinstance(module, TaskHeads)).heads
        for model in (teacher.first, fresh)
    ]
    assert torch.equal(heads[0]["rest"].weight, heads[1]["rest"].weight)
    assert not torch.equal(heads[0]["first"].weight, heads[1]["first"].weight)
    last = shop.histories["teacher"].epochs[-1]
    assert last["weight/first"] == 2
    assert "loss/rest" not in last


def test_one_task_of_all_classes_is_the_plain_teacher(workshop, four_classes):
    plain = toy_settings(tasks={}).teacher
    one_task = toy_settings(tasks={"all": [0, 1, 2, 3]}).teacher
    shop = workshop(rows=four_classes)
    logits = [
        train_teacher(settings, shop).member_logits(four_classes.inputs)
        for settings in (plain, one_task)
    ]
    assert logits[0] == pytest.approx(logits[1], abs=1e-4)


class Oracle(nn.Module):
    """Answers with the same logits for all rows."""

    def forward(self, inputs):
        return torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(len(inputs), -1)


def test_a_student_is_taught_a_row_by_the_head_of_its_task(workshop, four_classes):
    # With the fixed logits above, the target's entropy tells who taught: the head of a row's
    # task has two classes, logits 2 apart, and all heads have four.
    two, four = ([0.0, 2.0], [1.0, 2.0, 3.0, 4.0])
    seen = {}
    for heads, owners in (("own", torch.tensor([0, 1, 0, 1])), ("all", None)):
        shop = workshop(rows=four_classes, objective={"kd": {"temperature": 1}}, epochs=1)
        teacher = Teacher([Oracle()], Combination(), owners)
        history = shop.fit(shop.new_student(), name="student", teacher=teacher)
        seen[heads] = history.epochs[0]["targets/entropy"]
    for heads, logits in (("own", two), ("all", four)):
        expected = torch.distributions.Categorical(logits=torch.tensor(logits)).entropy()
        assert seen[heads] == pytest.approx(expected.item(), abs=1e-5)


def test_tasks_come_with_the_data_and_classes_do_not(workshop, four_classes):
    # Swapping classes within their tasks, where the student may not see them, changes nothing;
    # swapping the tasks does.
    teacher = Teacher([Oracle()], Combination(), torch.tensor([0, 1, 0, 1]))
    labels, weights = four_classes.labels, []
    for partner in (torch.arange(4), torch.tensor([2, 3, 0, 1]), torch.tensor([1, 0, 3, 2])):
        changed = labels.clone()
        changed[12:] = partner[labels[12:]]
        shop = workshop(rows=replace(four_classes, labels=changed), epochs=1)
        student = shop.new_student()
        shop.fit(student, name="student", teacher=teacher)
        weights.append(torch.cat([tensor.flatten() for tensor in student.state_dict().values()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_distillation_with_tasks_runs_repeats_and_reports_finite_numbers(four_classes):
    for heads in ("own", "all"):
        one, same = (distill(toy_settings(heads=heads), rows=four_classes) for _ in "ab")
        assert one.scores == same.scores
        assert one.scores["student"]["kl_to_teacher"] < 100
        assert {"loss/first", "loss/rest"} <= set(one.histories["teacher"][0])


def test_several_teachers_of_the_same_tasks_teach_together(four_classes):
    settings = toy_settings()
    models = [ModelSettings(name="mlp", options={"hidden": [width]}) for width in (8, 12)]
    teacher = settings.teacher.model_copy(update={"models": tuple(models)})
    result = distill(settings.model_copy(update={"teacher": teacher}), rows=four_classes)
    each = result.teacher.member_logits(four_classes.inputs)
    tasks = result.teacher.task_ids(four_classes.labels)
    target = result.teacher.combine(each, temperature=2.0, tasks=tasks).probabilities(2.0)
    own = result.teacher.task_ids(torch.arange(4))[None] == tasks[:, None]
    assert target[~own].max() < 1e-6
    assert target.sum(-1) == pytest.approx(torch.ones(len(tasks)), abs=1e-5)


def test_weights_of_a_multi_task_teacher_can_be_loaded(four_classes, workshop, tmp_path):
    from safetensors.torch import save_file

    shop = workshop(rows=four_classes)
    teacher = train_teacher(toy_settings().teacher, shop)
    path = tmp_path / "teacher.safetensors"
    save_file(teacher.first.state_dict(), path)
    settings = toy_settings().teacher.model_copy(update={"weights": (path,)})
    loaded = train_teacher(settings, shop)
    inputs = four_classes.inputs
    assert torch.equal(loaded.member_logits(inputs), teacher.member_logits(inputs))


@pytest.mark.parametrize(
    ("tasks", "problem"),
    [
        ({"a": [0, 1]}, r"missing: \[2, 3\]"),
        ({"a": [0, 1], "b": [1, 2, 3]}, r"twice: \[1\]"),
        ({"a": [0, 1], "b": [2, 3, 4]}, r"unknown: \[4\]"),
    ],
)
def test_tasks_must_divide_the_classes(four_classes, tasks, problem):
    with pytest.raises(ValueError, match=f"teacher.tasks must name each class .* {problem}"):
        check(toy_settings(tasks=tasks), four_classes)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"a": [0]}, "at least 2 classes"),
        ({"a": [0, 0]}, "must differ"),
        ({"a": [-1, 0]}, "greater than or equal to 0"),
        ({"a.b": [0, 1]}, "teacher.tasks must be letters"),
        ({"a": {"classes": [0, 1], "weight": -1}}, "weight"),
    ],
)
def test_a_task_that_cannot_be_learned_is_refused(tasks, message):
    with pytest.raises(ValueError, match=message):
        TeacherSettings(tasks=tasks)


@pytest.mark.parametrize("term", ["mse", "l1", "annealing", "logit_std", "flsw"])
def test_a_term_of_plain_logits_needs_all_heads(four_classes, term):
    objective = {"objective": {"ce": 1, term: 1}}
    with pytest.raises(ValueError, match=f"objective.{term} .* set teacher.heads=all"):
        check(toy_settings(**objective), four_classes)
    check(toy_settings(heads="all", **objective), four_classes)


def test_a_model_that_does_not_end_in_a_linear_layer_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 7), nn.Flatten())
    with pytest.raises(ValueError, match=r"one output a class \(5\), got '1' with 7"):
        split_into_heads(model, TASKS, 5)


def test_every_class_has_the_task_that_names_it():
    assert task_of_each_class(TASKS, 5).tolist() == TASK_OF_CLASS.tolist()
