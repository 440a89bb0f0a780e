"""Candidates have one mix on both sides, none is two clients', each is in half of the shadows."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkd.data import build_federated_data
from fedkd.data.settings import DataSettings
from sim.attacks.candidates import Candidates, Pool, _dealt, candidates_of


@pytest.fixture(scope="module")
def data():
    settings = DataSettings.model_validate(
        {"source": "digits", "partition": {"kind": "dirichlet", "alpha": 0.3}}
    )
    return build_federated_data(settings, num_clients=5, seed=3)


def test_members_are_the_clients_own_and_others_are_test_rows_of_the_same_classes(data):
    pool = Pool.of(data)
    for each in candidates_of(data, range(5), seed=3):
        inside, outside = each.rows[each.members], each.rows[~each.members]
        assert set(inside) <= set(data.client_rows[each.client])
        assert outside.min() >= len(data.train_labels)
        counts = [np.bincount(pool.labels[rows], minlength=10) for rows in (inside, outside)]
        np.testing.assert_array_equal(*counts)


def test_no_row_is_a_candidate_of_two_clients_and_all_own_rows_are_somewhere(data):
    found = candidates_of(data, range(5), seed=3)
    rows = np.concatenate([each.rows for each in found])
    assert len(rows) == len(set(rows))
    for each in found:
        own = np.concatenate([each.rows[each.members], each.always])
        np.testing.assert_array_equal(np.sort(own), data.client_rows[each.client])


def test_rows_with_wrong_labels_are_no_candidates():
    settings = DataSettings.model_validate({"source": "digits", "label_noise": {"rate": 0.5}})
    data = build_federated_data(settings, num_clients=3, seed=0)
    rows = np.concatenate([each.rows for each in candidates_of(data, range(3), seed=0)])
    assert not set(rows) & set(data.wrong_labels.rows)


def test_rows_that_are_on_both_sides_are_no_candidates(data):
    twins = replace(data, test_inputs=data.test_inputs.copy())
    before = np.concatenate([each.rows for each in candidates_of(data, range(5), seed=3)])
    own = data.client_rows[0][:20]
    assert set(before) & set(own)
    twins.test_inputs[:20] = data.train_inputs[own]
    rows = np.concatenate([each.rows for each in candidates_of(twins, range(5), seed=3)])
    assert not set(rows) & {*own, *(len(data.train_labels) + np.arange(20))}
    assert len(rows) > len(before) - 60


def test_every_row_is_in_half_of_the_shadows_and_every_shadow_has_half_of_each_class(data):
    pool = Pool.of(data)
    each = candidates_of(data, range(5), seed=3)[0]
    inside = each.halves(pool.labels, 8, np.random.default_rng(0))
    assert (inside.sum(0) == 4).all()
    for half in inside:
        for label in np.unique(pool.labels[each.rows]):
            of_label = pool.labels[each.rows] == label
            assert half[of_label].sum() == of_label.sum() / 2
    # Members are in no more shadows than others: else shadows would tell.
    assert abs(inside[:, each.members].mean() - 0.5) < 1e-9


def test_a_shadow_learns_its_half_and_what_is_no_candidate():
    each = Candidates(0, np.array([4, 7, 20, 30]), np.array([1, 1, 0, 0], bool), np.array([5]))
    np.testing.assert_array_equal(each.learnt(np.array([0, 1, 1, 0], bool)), [5, 7, 20])


@given(st.integers(0, 50), st.lists(st.integers(0, 30), min_size=1, max_size=6))
def test_rows_are_dealt_in_proportion_and_nobody_gets_more_than_wanted(rows, wanted):
    dealt = _dealt(rows, wanted)
    assert sum(dealt) == min(rows, sum(wanted))
    assert all(0 <= own <= most for own, most in zip(dealt, wanted, strict=True))


def test_what_is_left_goes_to_those_that_were_cut_most():
    assert _dealt(10, [5, 10, 5]) == [3, 5, 2]
    assert _dealt(7, [6, 3, 3]) == [3, 2, 2]
