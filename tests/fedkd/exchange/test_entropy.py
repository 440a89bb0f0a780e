"""The arithmetic coder: a decoder reads what it wrote, and it writes what the entropy allows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.exchange.entropy import Reader, Writer, changes_read, changes_written, most_bytes
from fedkd.exchange.quantiser import delta_symbols, quantised


def entropy(share: float) -> float:
    """Return the bits of a yes or no."""
    shares = np.array([share, 1 - share])
    return float(-(shares * np.log2(np.maximum(shares, 1e-300))).sum())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=200))
def test_symbols_come_back_and_a_byte_more_is_noticed(symbols):
    writer = Writer(3)
    for context, bit in symbols:
        writer.bit(context, bit)
    written = writer.written()
    reader = Reader(written, 3)
    assert [reader.bit(context) for context, _ in symbols] == [bit for _, bit in symbols]
    assert reader.is_exact
    longer = Reader(np.append(written, np.uint8(0)), 3)
    for context, _ in symbols:
        longer.bit(context)
    assert not longer.is_exact


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5])
def test_the_code_is_as_long_as_the_entropy_and_what_is_learnt(share):
    bits = np.random.default_rng(3).random(3000) < share
    writer = Writer(1)
    for bit in bits:
        writer.bit(0, bool(bit))
    ideal = len(bits) * entropy(float(bits.mean())) / 8
    # Krichevsky and Trofimov: half a log of how many there are, and a bit; two bytes to end.
    assert ideal <= len(writer.written()) <= ideal * 1.001 + (np.log2(3000) / 2 + 1) / 8 + 2


def test_the_first_symbols_are_what_is_computed_by_hand():
    # A half and a half: no leaves the lower half. Then 3/2 to 1/2: yes leaves the upper quarter of
    # it, [3/8, 1/2) of all. The least multiple of 2^24 in it is 3/8 x 256 = 96.
    writer = Writer(1)
    writer.bit(0, False)
    writer.bit(0, True)
    assert writer.written().tolist() == [96]


def test_counts_are_halved_before_they_outgrow_the_range():
    writer = Writer(1)
    bits = [True] * 40_000 + [False] * 3
    for bit in bits:
        writer.bit(0, bit)
    reader = Reader(writer.written(), 1)
    assert [reader.bit(0) for _ in bits] == bits
    assert max(writer._yes) <= 1 << 16


# -- rows that changed ---------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31), st.integers(0, 60), st.floats(0, 1), st.integers(1, 8), st.integers(1, 7)
)
def test_rows_come_back(seed, rows, share, bits, classes):
    rng = np.random.default_rng(seed)
    changed = rng.random(rows) < share
    soft = rng.dirichlet(np.full(classes, 0.3), size=rows).astype(np.float32)
    levels = quantised(soft.reshape(rows, classes), bits=bits).astype(np.int64)
    if bits == 1:
        numbers, width, units = levels.argmax(-1), max(classes - 1, 1).bit_length(), None
    else:
        numbers, width, units = levels, bits, 2**bits - 1
    written = changes_written(changed, numbers, width=width, units=units)
    assert len(written) <= most_bytes(rows, width, 1 if bits == 1 else classes)
    found = changes_read(written, rows, width=width, classes=classes, units=units)
    assert found is not None
    assert found[0].tolist() == changed.tolist()
    assert found[1].tolist() == numbers[changed].tolist()


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=20), st.integers(0, 30), st.integers(1, 5), st.integers(1, 8))
def test_any_bytes_are_read_as_some_rows_or_refused(code, rows, classes, bits):
    units = None if bits == 1 else 2**bits - 1
    width = max(classes - 1, 1).bit_length() if bits == 1 else bits
    written = np.frombuffer(code, np.uint8)
    found = changes_read(written, rows, width=width, classes=classes, units=units)
    if found is not None:
        changed, numbers = found
        assert len(numbers) == changed.sum()
        if units is not None:
            assert (numbers.sum(-1) == units).all()
            assert (numbers >= 0).all()
        else:
            assert (numbers < classes).all()


def test_deltas_cost_less_by_the_entropy_that_the_facts_name():
    # algorithm-facts: before 0,1,2,2,1,0,3,3 and now 0,1,1,2,1,0,3,2, 1.06 bits a symbol for 1.91.
    before = np.tile([0, 1, 2, 2, 1, 0, 3, 3], 200)
    now = np.tile([0, 1, 1, 2, 1, 0, 3, 2], 200)
    changed = delta_symbols(before, now) > 0
    delta = changes_written(changed, now, width=2, units=None)
    whole = changes_written(np.ones(1600, bool), now, width=2, units=None)
    assert len(delta) == pytest.approx(1600 * 1.06127812 / 8, abs=6)
    assert len(whole) == pytest.approx(1600 * 1.90563906 / 8, abs=6)
