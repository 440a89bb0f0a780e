"""Rows of some clients that are others, and nothing else that is."""

from dataclasses import replace

import numpy as np
import pytest

from fedkd.data.changed_rows import Changed, with_changed_rows
from fedkd.data.label_noise import WrongLabels


@pytest.fixture
def two_pools(tiny_data):
    """Clients 0 and 2 have rows of one pool, 1 and 3 of another."""
    first, second = tiny_data(), tiny_data(seed=1)
    return replace(first, views=(replace(second, client_rows=()),))


def next_class(client, pool, rows):
    return Changed(rows[:2], (pool.train_labels[rows[:2]] + 1) % 3)


def test_each_client_s_rows_change_in_the_pool_that_they_are_of(two_pools):
    changed = with_changed_rows(two_pools, [3, 2], next_class, named="somebody")
    for number, client in ((0, 2), (1, 3)):
        before = (two_pools, *two_pools.views)[number]
        after = (changed, *changed.views)[number]
        rows = two_pools.client_rows[client][:2]
        assert np.flatnonzero(before.train_labels != after.train_labels).tolist() == rows.tolist()
        np.testing.assert_array_equal(after.train_labels[rows], (before.train_labels[rows] + 1) % 3)
        np.testing.assert_array_equal(after.wrong_labels.rows, rows)
        np.testing.assert_array_equal(after.wrong_labels.true_labels, before.train_labels[rows])
        assert after.train_inputs is before.train_inputs
        assert after.test_inputs is before.test_inputs
    held = len(two_pools.client_rows[2]) + len(two_pools.client_rows[3])
    assert changed.notes[-1] == f"somebody: 4 of {held} private rows of clients 2, 3 are changed"
    np.testing.assert_array_equal(changed.wrong_counts()[[0, 2]], [0, 2])


def test_nobody_s_rows_change_where_nobody_is_named(tiny_data):
    data = tiny_data()
    same = with_changed_rows(data, [], next_class, named="somebody")
    assert same.train_labels is data.train_labels
    assert same.wrong_labels is None
    assert same.notes[-1] == "somebody: 0 of 0 private rows of clients none are changed"


def test_inputs_change_in_a_copy(tiny_data):
    data = tiny_data()
    before = data.train_inputs.copy()

    def darker(client, pool, rows):
        return Changed(rows, pool.train_labels[rows], pool.train_inputs[rows] - 1)

    changed = with_changed_rows(data, [0, 1], darker, named="somebody")
    np.testing.assert_array_equal(data.train_inputs, before)
    own = np.concatenate(data.client_rows[:2])
    others = np.concatenate(data.client_rows[2:])
    np.testing.assert_array_equal(changed.train_inputs[own], before[own] - 1)
    np.testing.assert_array_equal(changed.train_inputs[others], before[others])
    # Their labels are what they were, so none of them is wrong.
    assert changed.wrong_labels is None


def test_a_label_that_was_wrong_and_becomes_right_is_right(tiny_data):
    data = tiny_data()
    row = data.client_rows[0][0]
    wrong = WrongLabels(np.array([row]), np.array([(data.train_labels[row] + 1) % 3]))
    data = replace(data, wrong_labels=wrong)
    changed = with_changed_rows(
        data,
        [0],
        lambda client, pool, rows: Changed(rows[:1], (pool.train_labels[rows[:1]] + 1) % 3),
        named="somebody",
    )
    assert changed.wrong_labels is None
