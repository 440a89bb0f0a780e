"""Which transfer rows count, and how much: rule by rule, and inside a fit."""

import math
from dataclasses import replace

import pytest
import torch

from fedkd.distillation.fit.fitting import Lesson, check_needs
from fedkd.distillation.task.selection import RowSelector, Selection
from fedkd.objectives import View
from fedkd.targets import Targets, entropy, soften

# Five rows of three classes; probabilities of the surest class 0.9, 0.5, 0.8, 0.4, 1/3.
PROBABILITIES = torch.tensor(
    [[0.9, 0.05, 0.05], [0.3, 0.5, 0.2], [0.1, 0.1, 0.8], [0.4, 0.35, 0.25], [1 / 3] * 3]
)
TEACHER = PROBABILITIES.log()
STUDENT = torch.tensor([[2.0, 0, 0], [0, 0, 3.0], [0, 0, 1.0], [1.0, 1.0, 0], [0, 0.5, 0]])
LABELS = torch.tensor([0, 1, 2, 2, 1])


def view(*, rows=None, progress=0.0):
    chosen = torch.arange(5) if rows is None else rows
    return View(
        logits=STUDENT[chosen],
        targets=Targets(TEACHER[chosen]),
        transfer_labels=LABELS[chosen],
        rows=chosen,
        progress=progress,
    )


def weights(step=None, **rules):
    found, noted = RowSelector(Selection(**rules), Targets(TEACHER), LABELS).weights(step or view())
    return found, noted["kept"].item()


def trained(shop, teacher):
    student = shop.new_student()
    history = shop.fit(student, name="student", teacher=teacher)
    return torch.cat([tensor.flatten() for tensor in student.state_dict().values()]), history


def test_rows_below_the_threshold_do_not_count():
    found, kept = weights(confidence_threshold=0.6)
    assert found.tolist() == [1, 0, 1, 0, 0]
    assert kept == pytest.approx(0.4)


def test_confidence_weights_are_proportional_to_the_largest_probability():
    found, kept = weights(weight_by="confidence")
    assert found / found[0] == pytest.approx(PROBABILITIES.amax(1) / 0.9)
    assert found.sum().item() == pytest.approx(5)
    assert kept == 1


def test_entropy_weights_fall_to_zero_for_a_uniform_target():
    found, _ = weights(weight_by="entropy")
    certainty = math.log(3) - entropy(PROBABILITIES)
    assert found == pytest.approx(5 * certainty / certainty.sum(), abs=1e-5)
    assert found[4].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("difficulty", "hardness"),
    [
        ("teacher_entropy", entropy(PROBABILITIES)),
        ("teacher_loss", -PROBABILITIES.log()[range(5), LABELS]),
        ("student_loss", -STUDENT.log_softmax(1)[range(5), LABELS]),
        (
            "disagreement",
            (PROBABILITIES * (PROBABILITIES.log() - STUDENT.log_softmax(1))).sum(1),
        ),
    ],
)
def test_hard_rows_count_in_proportion_to_what_makes_them_hard(difficulty, hardness):
    found, _ = weights(weight_by="difficulty", difficulty=difficulty)
    assert found == pytest.approx(5 * hardness / hardness.sum(), abs=1e-5)


def test_only_the_hardest_fraction_of_a_batch_counts():
    # The two rows with the largest entropy of five; 0.3 of five rows are rounded up to two.
    assert weights(hardest_fraction=0.3)[0].tolist() == [0, 0, 0, 1, 1]


def test_the_hardest_are_chosen_among_the_rows_that_other_rules_keep():
    # Rows 4 and 3 come first in the batch, are the hardest, and fall below the threshold.
    reverse = view(rows=torch.arange(5).flip(0))
    found, kept = weights(reverse, confidence_threshold=0.45, hardest_fraction=0.3)
    assert found.tolist() == [0, 0, 0, 1, 0]
    assert kept == pytest.approx(0.2)


def test_weights_of_what_is_kept_sum_to_its_number():
    found, kept = weights(confidence_threshold=0.45, weight_by="difficulty")
    assert found.sum().item() == pytest.approx(3)
    assert (found > 0).tolist() == [True, True, True, False, False]
    assert kept == pytest.approx(0.6)


def test_a_curriculum_goes_by_row_id_and_lets_the_hard_rows_in_last():
    # From easy to hard: rows 0, 2, 1, 3, 4. A batch in another order is not misled.
    batch = torch.tensor([3, 0, 4, 2])
    curriculum = {"curriculum": {"start": 0.4, "until": 0.5}}
    selector = RowSelector(Selection(**curriculum), Targets(TEACHER))
    # Shares 0.4, 0.7 and 1 of five rows are 2, 4 and 5.
    for progress, expected in ((0.0, [0, 1, 0, 1]), (0.25, [1, 1, 0, 1]), (0.5, [1, 1, 1, 1])):
        found, _ = selector.weights(view(rows=batch, progress=progress))
        assert found.tolist() == expected
    assert selector.weights(view(rows=batch, progress=1.0))[0].tolist() == [1, 1, 1, 1]


def test_weights_send_no_gradient_to_the_student():
    logits = STUDENT.clone().requires_grad_()
    step = view()._replace(logits=logits)
    found, _ = weights(step, weight_by="difficulty", difficulty="disagreement")
    assert not found.requires_grad


def test_nothing_kept_is_weight_zero_everywhere():
    found, kept = weights(confidence_threshold=0.95, weight_by="difficulty", hardest_fraction=0.5)
    assert found.tolist() == [0] * 5
    assert kept == 0


def test_a_row_of_weight_zero_is_still_kept():
    agreeing = View(logits=TEACHER, targets=Targets(TEACHER), rows=torch.arange(5))
    found, kept = weights(agreeing, weight_by="difficulty", difficulty="disagreement")
    assert found == pytest.approx(torch.ones(5))
    assert kept == 1


def test_one_batch_of_equal_rows_is_weighed_evenly():
    rows = torch.tensor([2, 2, 2])
    for by in ("confidence", "entropy", "difficulty"):
        assert weights(view(rows=rows), weight_by=by)[0] == pytest.approx(torch.ones(3))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"curriculum": {}, "difficulty": "student_loss"}, "targets.difficulty"),
        ({"curriculum": {}, "difficulty": "disagreement"}, "got 'disagreement'"),
        ({"difficulty": "disagreement"}, "does nothing without"),
        ({"hardest_fraction": 0.0}, "hardest_fraction"),
        ({"curriculum": {"start": 0}}, "curriculum.start"),
        ({"weight_by": "age"}, "weight_by"),
    ],
)
def test_rules_that_cannot_work_are_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        Selection(**rules)


def test_a_curriculum_without_targets_of_all_rows_is_refused():
    with pytest.raises(ValueError, match="targets of all transfer rows"):
        RowSelector(Selection(curriculum={}))


def test_a_threshold_that_keeps_all_rows_changes_nothing(workshop, trained_teacher):
    teacher, shop = trained_teacher(), workshop()
    plain, _ = trained(shop, teacher)
    # Every row's largest probability of three is at least 1/3.
    all_kept = replace(shop, selection=Selection(confidence_threshold=0.3))
    weighed, history = trained(all_kept, teacher)
    assert weighed == pytest.approx(plain, abs=1e-6)
    assert [row["targets/kept"] for row in history.epochs] == [1, 1, 1]


def test_a_threshold_that_keeps_no_row_leaves_a_student_without_loss_unmoved(
    workshop, trained_teacher
):
    # A teacher as uniform as this one is sure of nothing.
    teacher = trained_teacher()
    for parameter in teacher.parameters():
        parameter.zero_()
    shop = replace(workshop(objective={"kd": 1}), selection=Selection(confidence_threshold=0.5))
    before = torch.cat([tensor.flatten() for tensor in shop.new_student().state_dict().values()])
    after, history = trained(shop, teacher)
    assert torch.equal(before, after)
    assert [row["loss/kd"] for row in history.epochs] == [0, 0, 0]
    assert [row["targets/kept"] for row in history.epochs] == [0, 0, 0]


def test_the_kept_fraction_of_a_curriculum_grows_from_epoch_to_epoch(workshop, trained_teacher):
    shop = replace(
        workshop(epochs=4), selection=Selection(curriculum={"start": 0.25, "until": 1.0})
    )
    _, history = trained(shop, trained_teacher())
    kept = [row["targets/kept"] for row in history.epochs]
    assert kept == sorted(kept)
    # The shares go from 0.25 to 1 along a line: the means of four equal parts of it.
    assert kept == pytest.approx([0.34, 0.53, 0.72, 0.91], abs=0.06)


@pytest.mark.parametrize(
    "rules",
    [
        {"weight_by": "confidence"},
        {"weight_by": "entropy"},
        {"weight_by": "difficulty"},
        {"weight_by": "difficulty", "difficulty": "disagreement"},
        {"hardest_fraction": 0.5},
        {"curriculum": {"until": 1.0}},
        {"confidence_threshold": 0.8},
    ],
)
def test_each_rule_changes_what_is_learned_and_repeats_bit_for_bit(
    workshop, trained_teacher, rules
):
    teacher, shop = trained_teacher(), workshop(epochs=1)
    plain, _ = trained(shop, teacher)
    one, same = (trained(replace(shop, selection=Selection(**rules)), teacher)[0] for _ in "ab")
    assert torch.equal(one, same)
    assert not torch.allclose(one, plain, atol=1e-5)


@pytest.mark.parametrize("difficulty", ["teacher_loss", "student_loss"])
def test_a_difficulty_by_labels_needs_labels_of_all_transfer_rows(
    workshop, trained_teacher, toy_rows, difficulty
):
    selection = Selection(hardest_fraction=0.5, difficulty=difficulty)
    shop = workshop()
    lesson = Lesson(
        rows=shop.rows,
        objective=shop.objective,
        training=shop.training,
        teacher=trained_teacher(),
        selection=selection,
    )
    with pytest.raises(ValueError, match=f"targets.difficulty: {difficulty} needs .* 36 of 48"):
        check_needs(lesson)
    check_needs(replace(lesson, rows=toy_rows(labelled=48)))


def test_labels_of_unlabelled_rows_decide_no_weight(workshop, trained_teacher, toy_rows):
    teacher, rows = trained_teacher(), toy_rows(labelled=12)
    labels = rows.labels.clone()
    labels[12:] = labels[12:].roll(1)
    selection = Selection(weight_by="difficulty", hardest_fraction=0.5, curriculum={})
    one, other = (
        trained(replace(workshop(rows=each, epochs=1), selection=selection), teacher)[0]
        for each in (rows, replace(rows, labels=labels))
    )
    assert torch.equal(one, other)


def test_confidence_is_that_of_the_target_without_temperature():
    step = view()._replace(targets=Targets(TEACHER * 4))
    sure = soften(TEACHER * 4, temperature=1.0).amax(1) >= 0.6
    found, _ = RowSelector(Selection(confidence_threshold=0.6)).weights(step)
    assert found.bool().tolist() == sure.tolist()
    assert sure.sum() > 2
