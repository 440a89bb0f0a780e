"""Students with closed forms: by hand, and as minima of what they are said to minimise."""

import numpy as np
import pytest

from fedkd.closed_forms import (
    kernel_student,
    linear_kernel,
    linear_student,
    rbf,
    smoothing_student,
)


def rows(count, features=5, seed=0):
    return np.random.default_rng([seed, count]).normal(size=(count, features))


def labels(count, classes=3, seed=0):
    return np.eye(classes)[np.random.default_rng([seed, count]).integers(classes, size=count)]


def test_one_row_and_one_feature_by_hand():
    # min 2 (w - 1)^2 + 3 (2 w - t)^2 + 4 w^2: (2 + 12 + 4) w = 2 + 6 t, and it says 2 w.
    student = linear_student(
        np.ones((1, 1)),
        np.ones((1, 1)),
        np.full((1, 1), 2.0),
        ridge=4,
        private_weight=2,
        public_weight=3,
    )
    assert student.base == pytest.approx(np.array([[2 * 2 / 18]]))
    assert student.pull == pytest.approx(np.array([[2 * 6 / 18]]))
    assert student.says(np.ones((1, 1)))[0, 0] == pytest.approx(16 / 18)


def test_no_other_weights_have_a_smaller_loss():
    private, own, public, targets = rows(7), labels(7), rows(6, seed=1), rows(6, 3, seed=2)
    student = linear_student(
        private, own, public, ridge=0.3, private_weight=2, public_weight=0.5, at=np.eye(5)
    )
    weights = student.says(targets)

    def loss(weights):
        errors = private @ weights - own, public @ weights - targets
        return (
            2 * np.square(errors[0]).sum()
            + 0.5 * np.square(errors[1]).sum()
            + (0.3 * np.square(weights).sum())
        )

    for seed in range(20):
        other = weights + 1e-3 * rows(5, 3, seed=seed)
        assert loss(other) > loss(weights)


@pytest.mark.parametrize(("private_weight", "public_weight"), [(1, 1), (2, 0.5), (0, 1), (1, 0)])
def test_kernel_ridge_with_inner_products_is_linear_ridge(private_weight, public_weight):
    settings = {
        "ridge": 0.7,
        "private_weight": private_weight,
        "public_weight": public_weight,
        "at": rows(4, seed=3),
    }
    given = rows(7), labels(7), rows(6, seed=1)
    linear = linear_student(*given, **settings)
    kernel = kernel_student(*given, kernel=linear_kernel, **settings)
    assert kernel.base == pytest.approx(linear.base, abs=1e-12)
    assert kernel.pull == pytest.approx(linear.pull, abs=1e-12)


def test_a_narrow_kernel_knows_its_own_rows_only():
    # Rows far from each other: each is half of the way to its label, as 1 / (1 + ridge) says.
    private, public = np.array([[0.0], [100.0]]), np.array([[0.0], [1000.0]])
    student = kernel_student(private, np.eye(2), public, kernel=rbf(1), ridge=1, public_weight=0)
    assert student.base == pytest.approx(np.array([[0.5, 0], [0, 0]]))
    assert not student.pull.any()


def test_what_a_student_says_of_its_targets_is_a_contraction():
    # Symmetric, eigenvalues in [0, 1): public weight s / (public weight s + ridge).
    for student in (
        linear_student(rows(4), labels(4), rows(9, seed=1), ridge=0.1),
        kernel_student(rows(4), labels(4), rows(9, seed=1), kernel=rbf(2), ridge=0.1),
    ):
        assert student.pull == pytest.approx(student.pull.T)
        values = np.linalg.eigvalsh(student.pull)
        assert values.min() > -1e-9
        assert values.max() < 1


def test_private_rows_weaken_the_pull_where_they_are():
    public = rows(9, seed=1)
    few, many = (
        kernel_student(public[:count], labels(count), public, kernel=rbf(2), ridge=0.1)
        for count in (1, 8)
    )
    assert np.linalg.eigvalsh(few.pull - many.pull).min() > -1e-9


def test_smoothing_keeps_distributions():
    student = smoothing_student(rows(6), labels(6), rows(5, seed=1), kernel=rbf(1))
    said = student.says(np.full((5, 3), 1 / 3))
    assert said.sum(1) == pytest.approx(np.ones(5))
    assert said.min() >= 0
    assert student.pull.sum(1).max() < 1


def test_smoothing_by_hand():
    # A private row at distance 0 and the public row itself: the mean of label and target.
    student = smoothing_student(np.zeros((1, 1)), np.eye(2)[:1], np.zeros((1, 1)), kernel=rbf(1))
    assert student.says(np.array([[0.0, 1.0]])) == pytest.approx(np.array([[0.5, 0.5]]))


def test_the_kernel_by_hand():
    # 3-4-5: exp(-25 / (2 x 25))
    alike = rbf(5)(np.zeros((1, 2)), np.array([[3.0, 4.0], [0.0, 0.0]]))
    assert alike == pytest.approx(np.array([[np.exp(-0.5), 1.0]]))


def test_settings_out_of_range_are_refused():
    given = rows(2), labels(2), rows(2, seed=1)
    with pytest.raises(ValueError, match="ridge must be > 0, got 0"):
        linear_student(*given, ridge=0)
    with pytest.raises(ValueError, match="public_weight must be >= 0, got -1"):
        kernel_student(*given, kernel=rbf(1), ridge=1, public_weight=-1)
    with pytest.raises(ValueError, match="width must be > 0"):
        rbf(0)
    with pytest.raises(ValueError, match="wider kernel"):
        smoothing_student(*given, kernel=rbf(1), at=np.full((1, 5), 1e6))
