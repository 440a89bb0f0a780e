import numpy as np
import pytest

from fedkd.data import DataSettings, build_federated_data, split_table
from fedkd.data.label_noise import LabelNoise, rates_of_clients, with_wrong_labels

LABELS = np.arange(6000) % 10
ROWS = tuple(np.arange(6000).reshape(3, -1))


def noisy(labels=LABELS, *, rows=ROWS, seed=0, num_classes=10, **settings):
    return with_wrong_labels(
        labels, rows, LabelNoise(**settings), num_classes=num_classes, seed=seed
    )


def build(seed=0, **noise):
    settings = DataSettings(partition={"kind": "iid"}, label_noise=noise)
    return build_federated_data(settings, num_clients=4, seed=seed)


def test_symmetric_noise_makes_each_other_class_as_likely():
    changed, wrong = noisy(rate=0.45)
    is_wrong = changed != LABELS
    assert is_wrong.mean() == pytest.approx(0.45, abs=0.03)
    # Of some 2700 wrong labels each of the nine other classes is a step away for a ninth, +- 0.02.
    steps = np.bincount((changed - LABELS)[is_wrong] % 10, minlength=10)
    assert steps[0] == 0
    np.testing.assert_allclose(steps[1:] / steps.sum(), 1 / 9, atol=0.02)
    np.testing.assert_array_equal(wrong.rows, np.flatnonzero(is_wrong))
    np.testing.assert_array_equal(wrong.true_labels, LABELS[is_wrong])


def test_pairwise_noise_takes_the_next_class_and_the_first_after_the_last():
    changed, _ = noisy(rate=1.0, kind="pairwise", num_classes=10)
    np.testing.assert_array_equal(changed, (LABELS + 1) % 10)


def test_each_client_has_its_own_rate_in_turn():
    changed, _ = noisy(rate=[0.0, 1.0])
    shares = [(changed != LABELS)[rows].mean() for rows in ROWS]
    assert shares == [0.0, 1.0, 0.0]


def test_a_share_of_the_clients_is_drawn_and_the_rates_are_theirs():
    settings = LabelNoise(rate=[0.1, 0.3], clients=0.4)
    rates = rates_of_clients(settings, 10, seed=0)
    assert sorted(rates) == [0.0] * 6 + [0.1, 0.1, 0.3, 0.3]
    np.testing.assert_array_equal(rates, rates_of_clients(settings, 10, seed=0))
    others = [rates_of_clients(settings, 10, seed=seed) for seed in range(1, 4)]
    assert any((other != rates).any() for other in others)
    one = rates_of_clients(LabelNoise(rate=0.2, clients=0.001), 10, seed=0)
    assert np.count_nonzero(one) == 1


def test_a_higher_rate_keeps_what_is_wrong_at_a_lower_one():
    lower, few = noisy(rate=0.2)
    higher, many = noisy(rate=0.4)
    assert set(few.rows) < set(many.rows)
    np.testing.assert_array_equal(lower[few.rows], higher[few.rows])


def test_the_seed_decides_and_rows_of_nobody_stay_right():
    held = (np.arange(0, 600), np.arange(1000, 1600))
    first, again, other = (noisy(rows=held, rate=0.5, seed=seed)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    nobody = np.setdiff1d(np.arange(6000), np.concatenate(held))
    np.testing.assert_array_equal(first[nobody], LABELS[nobody])


def test_no_rate_changes_nothing():
    labels, wrong = noisy(rate=[0.0, 0.0])
    assert labels is LABELS
    assert wrong is None


def test_only_private_labels_are_wrong_and_a_note_says_how_many():
    clean, data = build(), build(rate=0.3)
    for name in ("validation_labels", "test_labels", "public_inputs", "train_inputs"):
        np.testing.assert_array_equal(getattr(data, name), getattr(clean, name))
    count = int((data.train_labels != clean.train_labels).sum())
    assert f"data.label_noise: {count} of 844 private labels are wrong" in data.notes
    assert not any("label_noise" in note for note in clean.notes)
    np.testing.assert_array_equal(data.label_counts(true=True), clean.label_counts())
    np.testing.assert_array_equal(clean.label_counts(true=True), clean.label_counts())
    assert data.wrong_counts().sum() == count
    assert clean.wrong_counts().tolist() == [0] * 4


def test_the_table_shows_how_many_labels_of_each_client_are_wrong():
    data = build(rate=[0.0, 1.0])
    rows = split_table(data)
    assert [row["wrong_labels"] for row in rows] == [0, rows[1]["rows"], 0, rows[3]["rows"]]
    assert "wrong_labels" not in split_table(build())[0]


@pytest.mark.parametrize(
    "noise",
    [
        {"rate": 1.1},
        {"rate": -0.1},
        {"rate": []},
        {"rate": [0.1, 2]},
        {"rate": "half"},
        {"rate": None},
        {"kind": "asymmetric"},
        {"clients": 0},
        {"clients": 1.5},
        {"rates": 0.1},
    ],
)
def test_noise_that_cannot_be_is_refused(noise):
    with pytest.raises(ValueError, match="label_noise"):
        DataSettings(label_noise=noise)


def test_a_number_is_everybodys_rate():
    assert DataSettings(label_noise={"rate": 0.25}).label_noise.rate == (0.25,)
