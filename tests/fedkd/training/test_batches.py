"""Batches: every row once a pass, no lone row, the same stream, the same batches."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.training import Passes


def rng(seed=0):
    return np.random.default_rng(seed)


def counts(batches):
    return Counter(np.concatenate(batches).tolist())


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 70), batch_size=st.integers(1, 20), epochs=st.integers(1, 3))
def test_every_epoch_hands_out_every_row_once(rows, batch_size, epochs):
    batches = Passes(batch_size=batch_size, epochs=epochs).batches(rows, rng())
    assert len(batches) % epochs == 0
    per_epoch = len(batches) // epochs
    for epoch in range(epochs):
        one_pass = np.concatenate(batches[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert sorted(one_pass) == list(range(rows))


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(2, 70), batch_size=st.integers(2, 20))
def test_no_batch_is_a_lone_row_and_none_is_larger_than_asked_by_more_than_one(rows, batch_size):
    sizes = [len(batch) for batch in Passes(batch_size=batch_size).batches(rows, rng())]
    assert min(sizes) >= 2
    assert all(size == batch_size for size in sizes[:-1])
    assert sizes[-1] <= batch_size + 1


@pytest.mark.parametrize(
    ("rows", "batch_size", "sizes"),
    [
        (9, 4, [4, 5]),  # 4 + 4 + 1: the lone row joins the batch before it
        (10, 4, [4, 4, 2]),
        (8, 4, [4, 4]),
        (5, 4, [5]),
        (3, 4, [3]),
        (1, 4, [1]),  # there is no batch before it
        (3, 1, [1, 1, 1]),  # lone rows were asked for
    ],
)
def test_sizes_by_hand(rows, batch_size, sizes):
    batches = Passes(batch_size=batch_size).batches(rows, rng())
    assert [len(batch) for batch in batches] == sizes


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 30), batch_size=st.integers(1, 9), steps=st.integers(0, 25))
def test_steps_are_what_was_asked_for_and_begin_like_epochs(rows, batch_size, steps):
    batches = Passes(batch_size=batch_size, steps=steps).batches(rows, rng())
    assert len(batches) == steps
    whole = Passes(batch_size=batch_size, epochs=steps + 1).batches(rows, rng())
    for batch, expected in zip(batches, whole, strict=False):
        assert np.array_equal(batch, expected)


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 70), steps=st.integers(1, 20), epochs=st.integers(1, 3))
def test_rows_are_spread_as_numpy_splits_them(rows, steps, epochs):
    passes = Passes(batch_size=4, epochs=epochs).spread_over(steps, rows)
    stream = rng(5)
    order = np.concatenate([stream.permutation(rows) for _ in range(passes.epochs)])
    expected = np.array_split(order, steps)
    for batch, known in zip(passes.batches(rows, rng(5)), expected, strict=True):
        assert batch.dtype == known.dtype
        assert np.array_equal(batch, known)


def test_no_epochs_and_no_steps_are_no_batches():
    assert Passes(batch_size=4, epochs=0).batches(5, rng()) == []
    assert Passes(batch_size=4, steps=0).batches(5, rng()) == []
    assert Passes(batch_size=4).spread_over(0, 5).batches(5, rng()) == []


def test_the_same_stream_gives_the_same_batches_and_another_gives_others():
    passes = Passes(batch_size=4, epochs=2)
    for one, other in zip(passes.batches(11, rng(3)), passes.batches(11, rng(3)), strict=True):
        assert np.array_equal(one, other)
    first, second = (np.concatenate(passes.batches(11, rng(seed))) for seed in (3, 4))
    assert not np.array_equal(first, second)


def test_every_pass_is_shuffled_anew():
    first, second = Passes(batch_size=50, epochs=2).batches(50, rng())
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, np.arange(50))


@settings(deadline=None, max_examples=80)
@given(rows=st.integers(1, 60), steps=st.integers(1, 40), epochs=st.integers(1, 3))
def test_rows_beside_another_feed_come_up_equally_often_in_steps_of_equal_size(rows, steps, epochs):
    passes = Passes(batch_size=7, epochs=epochs).spread_over(steps, rows)
    batches = passes.batches(rows, rng())
    sizes = [len(batch) for batch in batches]
    assert len(batches) == steps
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(2, rows)
    times = set(counts(batches).values())
    assert len(counts(batches)) == rows
    assert len(times) == 1
    if rows * epochs >= 2 * steps:
        assert times == {epochs}


def test_a_pass_spread_over_steps_ends_before_the_next_begins():
    batches = Passes(batch_size=7, epochs=2).spread_over(4, 10).batches(10, rng())
    assert sorted(np.concatenate(batches[:2])) == list(range(10))
    assert sorted(np.concatenate(batches[2:])) == list(range(10))


def test_rows_spread_over_steps_are_shuffled_by_the_stream():
    passes = Passes(batch_size=7).spread_over(4, 20)
    one, same, other = (np.concatenate(passes.batches(20, rng(seed))) for seed in (3, 3, 4))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("passes", [Passes(batch_size=4), Passes(batch_size=4).spread_over(3, 0)])
def test_refuses_to_cut_nothing(passes):
    with pytest.raises(ValueError, match="need at least one row to train on, got 0"):
        passes.batches(0, rng())


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16, 17, 25])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize(("epochs", "steps"), [(0, None), (1, None), (3, None), (1, 5)])
def test_steps_are_counted_as_they_are_cut(
    rows: int, batch_size: int, epochs: int, steps: int | None
) -> None:
    passes = Passes(batch_size=batch_size, epochs=epochs, steps=steps)
    assert passes.count(rows) == len(passes.batches(rows, np.random.default_rng(0)))


@pytest.mark.parametrize(
    ("rows", "batch_size", "smallest"),
    # 9 = 4 + 5: a lone last row joins the batch before.
    [(8, 4, 4), (9, 4, 4), (10, 4, 2), (3, 8, 3), (1, 8, 1), (3, 1, 1), (5, 4, 5)],
)
def test_the_smallest_step_is_known_beforehand(rows, batch_size, smallest):
    passes = Passes(batch_size=batch_size, epochs=2)
    assert passes.smallest(rows) == smallest
    assert smallest == min(map(len, passes.batches(rows, np.random.default_rng(0))))


def test_without_steps_there_is_no_smallest_one():
    assert Passes(batch_size=4, epochs=0).smallest(9) is None
    assert Passes(batch_size=4, steps=0).smallest(9) is None
    assert Passes(batch_size=4, epochs=0, steps=1).smallest(9) == 4
