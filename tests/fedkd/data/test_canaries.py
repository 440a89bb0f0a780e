"""Canaries: wrong labels, in or out by lot, and nothing else is changed."""

import pickle

import numpy as np
import pytest

from fedkd.data import DataSettings, build_federated_data
from fedkd.data.canaries import with_canaries

NOISE = {"rate": 0.5}


def build(**settings):
    table = {"partition": {"kind": "iid"}, "public": {"size": 60}, **settings}
    return build_federated_data(DataSettings(**table), num_clients=3, seed=0)


def test_every_canary_has_a_wrong_label_and_each_wrong_one_is_as_likely():
    data = build()
    counts = np.zeros(10, int)
    for seed in range(20):
        changed = with_canaries(data, client=1, count=200, seed=seed)
        rows = changed.canaries.rows
        steps = (changed.train_labels[rows] - data.train_labels[rows]) % 10
        counts += np.bincount(steps, minlength=10)
    assert counts[0] == 0
    # 4000 draws: a ninth each, +- 3 * 0.005.
    np.testing.assert_allclose(counts[1:] / 4000, 1 / 9, atol=0.016)


def test_about_half_stay_and_the_others_are_nobody_s():
    data = build()
    stayed = []
    for seed in range(20):
        changed = with_canaries(data, client=1, count=200, seed=seed)
        canaries = changed.canaries
        assert set(canaries.rows) <= set(data.client_rows[1])
        assert len(set(canaries.rows)) == 200
        own = changed.client_rows[1]
        assert (np.isin(canaries.rows, own) == canaries.inside).all()
        assert len(own) == len(data.client_rows[1]) - (~canaries.inside).sum()
        assert (np.diff(own) > 0).all()
        stayed.append(canaries.inside.mean())
    # 4000 draws of 1/2, +- 3.5 * 0.008.
    assert np.mean(stayed) == pytest.approx(0.5, abs=0.028)
    assert len(set(stayed)) > 5


def test_all_else_stays_bit_for_bit():
    data = build()
    changed = with_canaries(data, client=1, count=50, seed=0)
    for name in ("train_inputs", "public_inputs", "validation_labels", "test_labels"):
        assert getattr(changed, name) is getattr(data, name)
    for client in (0, 2):
        assert changed.client_rows[client] is data.client_rows[client]
    others = np.setdiff1d(np.arange(len(data.train_labels)), changed.canaries.rows)
    assert (changed.train_labels[others] == data.train_labels[others]).all()
    inside = changed.canaries.rows[changed.canaries.inside]
    assert changed.wrong_counts().tolist() == [0, len(inside), 0]
    assert "privacy.audit: 50 of" in changed.notes[-1]


def test_they_depend_on_the_seed_and_the_client_alone():
    data = build()
    one, again, other = (with_canaries(data, client=1, count=50, seed=seed) for seed in (3, 3, 4))
    assert (one.train_labels == again.train_labels).all()
    assert (one.canaries.inside == again.canaries.inside).all()
    assert not (one.canaries.rows == other.canaries.rows).all()
    travelled = pickle.loads(pickle.dumps(one))  # noqa: S301
    assert (travelled.canaries.rows == one.canaries.rows).all()
    assert one.without_private_rows().canaries is None


def test_a_label_is_wrong_also_where_label_noise_had_made_another_of_it():
    data = build(label_noise=NOISE)
    clean = build()
    changed = with_canaries(data, client=0, count=300, seed=0)
    rows = changed.canaries.rows
    assert (changed.train_labels[rows] != clean.train_labels[rows]).all()
    assert (changed.train_labels[rows] != data.train_labels[rows]).any()
    assert (changed.train_labels[rows] == data.train_labels[rows]).any()


def test_more_than_a_client_has_are_refused():
    data = build()
    size = len(data.client_rows[2])
    with_canaries(data, client=2, count=size, seed=0)
    with pytest.raises(ValueError, match=f"canaries must be at most {size}, the rows of client 2"):
        with_canaries(data, client=2, count=size + 1, seed=0)
