"""Fixed points of averaging: by hand, by iteration, and in the limits of docs/closed-forms.md."""

import numpy as np
import pytest

from fedkd.closed_forms import (
    Student,
    fixed_point,
    fixed_points,
    kernel_student,
    linear_student,
    mean_of,
    mean_of_others,
    one_before,
    rate,
    rbf,
)

PUBLIC = np.random.default_rng(1).normal(size=(6, 4))


def rows_of(client, count=5):
    rng = np.random.default_rng([2, client])
    return rng.normal(size=(count, 4)), np.eye(3)[rng.integers(3, size=count)]


def federation(clients=3, **more):
    settings = {"ridge": 0.5, **more}
    return [linear_student(*rows_of(client), PUBLIC, **settings) for client in range(clients)]


def iterated(students, mixing, rounds=400):
    targets = np.zeros((len(students), *students[0].base.shape))
    for _ in range(rounds):
        said = np.stack([s.says(t) for s, t in zip(students, targets, strict=True)])
        targets = np.einsum("kj,jpc->kpc", mixing, said)
    return targets


def alone(clients=3):
    return federation(clients, public_weight=0)


def test_two_clients_and_one_row_by_hand():
    # They say 1 + t/2 and 0 + t/4. The mean: t = 1/2 + 3t/8, so t = 4/5.
    one = Student(np.full((1, 1), 1.0), np.full((1, 1), 0.5))
    two = Student(np.full((1, 1), 0.0), np.full((1, 1), 0.25))
    assert fixed_point([one, two])[0, 0] == pytest.approx(0.8)
    # By 3 to 1: t = 3/4 + 7t/16, t = 4/3.
    assert fixed_point([one, two], [3, 1])[0, 0] == pytest.approx(4 / 3)
    # Each learns from the other: t1 = t2/4, t2 = 1 + t1/2, so t2 = 8/7.
    assert fixed_points([one, two], mean_of_others(2)).ravel() == pytest.approx([2 / 7, 8 / 7])
    assert rate([one, two], mean_of(2)) == pytest.approx(3 / 8)
    assert rate([one, two], mean_of_others(2)) == pytest.approx(np.sqrt(1 / 8))


@pytest.mark.parametrize(
    "mixing",
    [mean_of(3), mean_of(3, [5, 1, 2]), mean_of_others(3), one_before(3)],
    ids=["mean", "weighted", "others", "ring"],
)
def test_rounds_lead_there_from_anywhere_at_the_rate(mixing):
    students = federation()
    point = fixed_points(students, mixing)
    assert iterated(students, mixing) == pytest.approx(point, abs=1e-12)
    assert 0 < rate(students, mixing) < 1
    far = [np.linalg.norm(iterated(students, mixing, rounds) - point) for rounds in (15, 45)]
    assert (far[1] / far[0]) ** (1 / 30) == pytest.approx(rate(students, mixing), rel=0.03)


def test_one_target_for_all_is_the_fixed_point_of_the_mean():
    students = federation()
    for weights in (None, [5, 1, 2]):
        both = fixed_points(students, mean_of(3, weights))
        assert both == pytest.approx(np.stack([fixed_point(students, weights)] * 3))


def test_it_is_a_mean_of_what_clients_know_alone_weighted_by_how_sure_they_are():
    students, own = federation(), [student.base for student in alone()]
    sure = [np.eye(6) - student.pull for student in students]
    weighted = np.linalg.solve(sum(sure), sum(s @ g for s, g in zip(sure, own, strict=True)))
    assert fixed_point(students) == pytest.approx(weighted)
    # Which is how each of them answers: between its target and what it knows alone.
    for student, known in zip(students, own, strict=True):
        assert student.base == pytest.approx((np.eye(6) - student.pull) @ known)


def test_with_a_weak_pull_it_is_the_plain_mean_of_clients_alone():
    known = np.mean([student.base for student in alone()], axis=0)
    assert fixed_point(federation(public_weight=1e-7)) == pytest.approx(known, abs=1e-6)
    assert np.abs(fixed_point(federation()) - known).max() > 0.01


def test_with_a_strong_pull_it_is_one_model_of_all_rows():
    # Six public rows of four features say all that there is to say of a linear model.
    private, labels = (np.concatenate(parts) for parts in zip(*map(rows_of, range(3)), strict=True))
    pooled = linear_student(private, labels, PUBLIC, ridge=3 * 0.5, public_weight=0).base
    strong = federation(public_weight=1e6)
    assert fixed_point(strong) == pytest.approx(pooled, abs=1e-5)
    # It takes long to get there.
    assert rate(strong, mean_of(3)) > 0.99999


def test_a_client_alone_ends_where_it_is_without_teaching_itself():
    (student,), (own,) = federation(1), alone(clients=1)
    assert fixed_point([student]) == pytest.approx(own.base)


def test_equal_clients_end_where_one_does():
    (student,), (own,) = federation(1), alone(clients=1)
    for mixing in (mean_of(4), mean_of_others(4), one_before(4)):
        assert fixed_points([student] * 4, mixing) == pytest.approx(np.stack([own.base] * 4))


def test_who_has_no_private_rows_in_the_loss_has_no_say():
    # Self-distillation without labels shrinks to nothing (Mobahi, Farajtabar, Bartlett, 2020).
    empty = linear_student(*rows_of(0), PUBLIC, ridge=0.5, private_weight=0)
    assert not fixed_point([empty]).any()
    # Beside others its ridge pulls towards 0, and nothing else.
    others = federation()
    assert np.linalg.norm(fixed_point([*others, empty])) < np.linalg.norm(fixed_point(others))


def test_of_disjoint_classes_each_owner_is_believed():
    # Two far groups of rows, one client and one class each; the public set has both.
    near, far = np.zeros((4, 1)), np.full((4, 1), 50.0)
    public = np.array([[0.0], [50.0]])
    students = [
        kernel_student(rows, np.eye(2)[[label] * 4], public, kernel=rbf(1), ridge=0.1)
        for label, rows in enumerate((near, far))
    ]
    # Alone each gives its class 40/41 and nothing to rows that it has not seen: in the mean half.
    # Of a row that it has not seen a client repeats its target: 10/11 of it. By hand, of a row:
    # t = (4 + t) / 5.1 of the owner, t / 1.1 of the other.
    t = (4 / 5.1 / 2) / (1 - (1 / 5.1 + 1 / 1.1) / 2)
    assert fixed_point(students) == pytest.approx(np.eye(2) * t)
    assert t == pytest.approx(0.876, abs=1e-3)


def test_where_nobody_decides_there_is_no_single_fixed_point():
    undecided = Student(np.zeros((2, 1)), np.eye(2))
    with pytest.raises(ValueError, match="no single fixed point"):
        fixed_point([undecided])
    # One client that has seen something there is enough.
    assert not fixed_point([undecided, Student(np.zeros((2, 1)), 0.5 * np.eye(2))]).any()


def test_what_is_no_mixing_is_refused():
    students = federation()
    with pytest.raises(ValueError, match="sum to 1"):
        fixed_points(students, np.ones((3, 3)))
    with pytest.raises(ValueError, match=r"must be \[3, 3\], got \[2, 2\]"):
        rate(students, mean_of(2))
    with pytest.raises(ValueError, match="3 numbers"):
        fixed_point(students, [1, -1, 1])
    with pytest.raises(ValueError, match="has no others"):
        mean_of_others(1)
