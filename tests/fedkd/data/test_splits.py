import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkd.data import DataSettings
from fedkd.data.settings import PublicSettings
from fedkd.data.splits import rows_of_classes, split_rows, stratified_rows

LABELS = np.random.default_rng(0).integers(0, 5, 400)


def rows_of(split):
    return {name: getattr(split, name) for name in ("test", "public", "validation", "private")}


@given(
    labels=st.lists(st.integers(0, 6), min_size=1, max_size=60),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_strata_keep_class_shares_to_within_one_row(labels, share, seed):
    labels = np.array(labels)
    size = round(share * len(labels))
    rows = stratified_rows(labels, size, np.random.default_rng(seed))
    assert len(rows) == len(set(rows.tolist())) == size
    drawn = np.bincount(labels[rows], minlength=7)
    exact = np.bincount(labels, minlength=7) * size / len(labels)
    assert np.abs(drawn - exact).max() < 1


def test_order_of_drawn_rows_says_nothing_about_the_label():
    sorted_labels = np.repeat(np.arange(10), 50)
    drawn = sorted_labels[stratified_rows(sorted_labels, 200, np.random.default_rng(0))]
    rank_correlation = np.corrcoef(np.arange(200), drawn)[0, 1]
    assert abs(rank_correlation) < 0.2


def test_more_rows_than_there_are_cannot_be_drawn():
    with pytest.raises(ValueError, match="size must be between 0 and 3, got 4"):
        stratified_rows(np.array([0, 1, 1]), 4, np.random.default_rng(0))


@given(
    test_fraction=st.floats(0.05, 0.5),
    validation_fraction=st.floats(0.05, 0.5),
    public=st.integers(0, 100),
    private_rows=st.none() | st.integers(1, 500),
    test_rows=st.none() | st.integers(1, 500),
)
def test_sets_never_share_a_row_and_respect_their_caps(
    test_fraction, validation_fraction, public, private_rows, test_rows
):
    settings = DataSettings(
        test_fraction=test_fraction,
        validation_fraction=validation_fraction,
        public={"size": public},
        private_rows=private_rows,
        test_rows=test_rows,
    )
    sets = rows_of(split_rows(LABELS, None, settings, seed=1))
    together = np.concatenate(list(sets.values()))
    assert len(np.unique(together)) == len(together)
    assert len(sets["public"]) == public
    assert min(map(len, (sets["test"], sets["validation"], sets["private"]))) >= 1
    if private_rows is not None:
        assert len(sets["private"]) <= private_rows
    if test_rows is not None:
        assert len(sets["test"]) <= test_rows
    if private_rows is None and test_rows is None:
        assert len(together) == len(LABELS)


def test_fractions_mean_what_they_say():
    # 400 rows: 20 % test = 80; 320 - 100 public = 220, of which 10 % validation = 22.
    split = split_rows(LABELS, None, DataSettings(public={"size": 100}), seed=0)
    assert {name: len(rows) for name, rows in rows_of(split).items()} == {
        "test": 80,
        "public": 100,
        "validation": 22,
        "private": 198,
    }


def test_a_cap_on_private_rows_shrinks_validation_in_proportion():
    # 90 private rows are 90 % of 100, so validation takes 10.
    settings = DataSettings(public={"size": 100}, private_rows=90)
    split = split_rows(LABELS, None, settings, seed=0)
    assert (len(split.private), len(split.validation)) == (90, 10)


def test_caps_move_no_row_of_the_sets_drawn_before():
    free = split_rows(LABELS, None, DataSettings(public={"size": 100}), seed=0)
    settings = DataSettings(public={"size": 100}, private_rows=50, test_rows=20)
    capped = split_rows(LABELS, None, settings, seed=0)
    np.testing.assert_array_equal(capped.public, free.public)
    assert set(capped.test) < set(free.test)
    assert not set(capped.private) & set(free.test)


def test_own_test_split_is_used_whole_and_costs_no_training_row():
    test_labels = np.arange(50) % 5
    split = split_rows(LABELS, test_labels, DataSettings(public={"size": 100}), seed=0)
    assert split.test_is_separate
    np.testing.assert_array_equal(np.sort(split.test), np.arange(50))
    assert len(split.public) + len(split.validation) + len(split.private) == len(LABELS)


def test_too_large_a_public_set_is_refused_with_the_largest_that_works():
    with pytest.raises(ValueError, match=r"data\.public\.size must be at most 318, got 319"):
        split_rows(LABELS, None, DataSettings(public={"size": 319}), seed=0)
    split = split_rows(LABELS, None, DataSettings(public={"size": 318}), seed=0)
    assert (len(split.validation), len(split.private)) == (1, 1)


def test_the_largest_public_set_leaves_each_client_its_fewest_rows():
    # 320 rows are not for testing; 70 of 78 are private where a tenth is for validation.
    settings = DataSettings(public={"size": 300}, partition={"kind": "iid", "min_rows": 7})
    with pytest.raises(ValueError, match=r"public\.size must be at most 242, got 300.*10 clients"):
        split_rows(LABELS, None, settings, seed=0, num_clients=10)
    for size, private in ((242, 70), (243, 69)):
        fewer = settings.model_copy(update={"public": PublicSettings(size=size)})
        assert len(split_rows(LABELS, None, fewer, seed=0).private) == private


def test_a_source_without_rows_to_spare_is_refused():
    labels = np.array([0, 1])
    with pytest.raises(ValueError, match=r"leaves 1 rows besides the test set.*test_fraction"):
        split_rows(labels, None, DataSettings(public={"size": 0}), seed=0)


def test_same_seed_same_split_and_other_seed_other_split():
    first, again, other = (
        rows_of(split_rows(LABELS, None, DataSettings(public={"size": 50}), seed=seed))
        for seed in (3, 3, 4)
    )
    for name, rows in first.items():
        np.testing.assert_array_equal(rows, again[name])
        assert set(rows) != set(other[name])


def test_rows_of_classes_are_distinct_and_in_the_order_of_the_classes():
    labels, wanted = np.array([0, 1, 2] * 4), np.array([2, 0, 2, 1, 2, 2])
    rows = rows_of_classes(labels, wanted, np.random.default_rng(0))
    np.testing.assert_array_equal(labels[rows], wanted)
    assert len(set(rows)) == len(rows)
    with pytest.raises(ValueError, match="takes 5 rows of class 1, and there are 4"):
        rows_of_classes(labels, np.ones(5, np.int64), np.random.default_rng(0))
