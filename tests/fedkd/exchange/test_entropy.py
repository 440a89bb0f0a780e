"""The arithmetic coder: a decoder reads what it wrote, and it writes what the entropy allows."""

from collections.abc import Generator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.exchange.entropy import (
    Digits,
    changes_read,
    changes_written,
    digits_of_rows,
    digits_read,
    digits_written,
    most_bytes,
)
from fedkd.exchange.quantiser import delta_symbols, quantised

Said = list[tuple[int, int, int]]
"""Of each digit the context, the most that it can be there, and itself."""


def written(said: Said) -> bytes:
    return digits_written(Digits(*np.array(said, np.int64).reshape(-1, 3).T))


def read(code: bytes, said: Said) -> tuple[list[int], bool]:
    """Return the digits that are read, and whether the code is as long as these take."""
    found: list[int] = []

    def asking() -> Generator[tuple[int, int], int, None]:
        for context, most, _ in said:
            found.append((yield context, most))

    return found, digits_read(code, asking())


def plainly_written(said: Said) -> bytes:
    """Write digit after digit, with fractions of one whole number: the slow twin."""
    learnt: dict[int, list[int]] = {}
    counting: dict[int, list[int]] = {}
    seen: dict[int, int] = {}
    moment: dict[int, int] = {}
    low, size, shifts = 0, 1 << 40, 0
    for context, most, digit in said:
        learnt.setdefault(context, [1] * 16)
        count = seen.setdefault(context, 0)
        # What comes after 2^15 digits is learnt no more.
        if count == moment.setdefault(context, 0) and count < 1 << 15:
            counting[context] = list(learnt[context])
            moment[context] = count + 1 + count // 16
        counts = counting[context]
        part = size // sum(counts[: most + 1])
        below = part * sum(counts[:digit])
        low += below
        size = part * counts[digit] if digit < most else size - below
        while size < 1 << 32:
            low, size, shifts = low << 8, size << 8, shifts + 1
        learnt[context][digit] += 2
        seen[context] += 1
    return (-(-low >> 32)).to_bytes(shifts + 1, "big")


def entropy(share: float) -> float:
    """Return the bits of a yes or no."""
    shares = np.array([share, 1 - share])
    return float(-(shares * np.log2(np.maximum(shares, 1e-300))).sum())


@st.composite
def digits(draw: st.DrawFn) -> Said:
    most = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 15)), max_size=200))
    return [(context, last, draw(st.integers(0, last))) for context, last in most]


@settings(max_examples=60, deadline=None)
@given(digits())
def test_digits_come_back_and_a_byte_more_is_noticed(said):
    code = written(said)
    assert code == plainly_written(said)
    if said:
        assert read(code, said) == ([digit for _, _, digit in said], True)
        assert not read(code + b"\0", said)[1]


@pytest.mark.parametrize("size", [3000, 70_000])
def test_the_fast_way_writes_what_the_plain_one_does(size):
    rng = np.random.default_rng(1)
    context = rng.integers(0, 2, size)
    most = rng.integers(0, 16, size)
    digit = np.minimum(rng.geometric(0.4, size) - 1, most)
    said = list(zip(context.tolist(), most.tolist(), digit.tolist(), strict=True))
    code = written(said)
    assert code == plainly_written(said)
    assert read(code, said) == (digit.tolist(), True)


def test_carries_run_through_whole_bytes():
    # The last of two digits again and again keeps the interval below its upper end.
    said = [(0, 1, 1)] * 40 + [(1, 15, 15)] * 40 + [(0, 1, 0)] + [(0, 1, 1)] * 40
    assert written(said) == plainly_written(said)
    assert read(written(said), said)[0] == [digit for _, _, digit in said]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5])
def test_the_code_is_as_long_as_the_entropy_and_what_is_learnt(share):
    bits = np.random.default_rng(3).random(3000) < share
    code = written([(0, 1, int(bit)) for bit in bits])
    ideal = len(bits) * entropy(float(bits.mean())) / 8
    # Krichevsky and Trofimov: half a log of how many there are, and a bit; two bytes to end. What
    # counts later costs some bits more.
    assert ideal - 1 <= len(code) <= ideal * 1.001 + (np.log2(3000) / 2 + 1) / 8 + 3


def test_the_first_symbols_are_what_is_computed_by_hand():
    # A half and a half: no leaves the lower half. Then 3/2 to 1/2: yes leaves the upper quarter of
    # it, [3/8, 1/2) of all. The least multiple of 1/256 in it is 3/8 x 256 = 96.
    assert list(written([(0, 1, 0), (0, 1, 1)])) == [96]


def test_what_cannot_be_costs_nothing():
    assert written([(0, 0, 0)] * 1000) == b"\0"
    # Of two that are left, equally likely, each costs a bit.
    assert len(written([(place, 1, 1) for place in range(800)])) == 100


def test_a_context_learns_what_it_sees():
    rng = np.random.default_rng(2)
    halves = [(0, 15, int(digit)) for digit in rng.choice([3, 11], 8000)]
    assert len(written(halves)) == pytest.approx(1000, abs=15)


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
    numbers, largest, of_row = levels, 2**bits - 1, classes
    if bits == 1:
        numbers, largest, of_row = levels.argmax(-1), classes - 1, None
    code = changes_written(changed, numbers, largest=largest)
    assert len(code) <= most_bytes(rows, largest=largest, classes=of_row)
    found = changes_read(code, rows, largest=largest, classes=of_row)
    assert found is not None
    assert found[0].tolist() == changed.tolist()
    assert found[1].tolist() == numbers[changed].tolist()


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=20), st.integers(0, 30), st.integers(1, 5), st.integers(1, 8))
def test_any_bytes_are_read_as_some_rows_or_refused(code, rows, classes, bits):
    largest, of_row = (classes - 1, None) if bits == 1 else (2**bits - 1, classes)
    found = changes_read(np.frombuffer(code, np.uint8), rows, largest=largest, classes=of_row)
    if found is not None:
        changed, numbers = found
        assert len(numbers) == changed.sum()
        assert (numbers >= 0).all()
        if of_row is not None:
            assert (numbers.sum(-1) == largest).all()
        else:
            assert (numbers <= largest).all()


def test_what_is_said_of_rows_is_what_is_computed_by_hand():
    # Rows 0 and 2 have changed. Of 255 units 18 are 1 and 2 in digits, of 15 that can come first;
    # 237 are left, 14 and 13, of which 237 are said: the first digit is the most that there can
    # be, so that the second can be 13 at most. Nothing is left for the third class. Row 2 has all.
    said = digits_of_rows(
        np.array([True, False, True]),
        np.array([[18, 237, 0], [1, 1, 253], [255, 0, 0]]),
        largest=255,
        shares=True,
    )
    assert list(zip(*(part.tolist() for part in said), strict=True)) == [
        *((0, 1, 1), (1, 15, 1), (16 + 1, 15, 2), (1, 14, 14), (16 + 14, 13, 13)),
        (0, 1, 0),
        *((0, 1, 1), (1, 15, 15), (16 + 15, 15, 15)),
    ]


@pytest.mark.parametrize("classes", [1, 2, 16, 17, 300])
def test_classes_of_any_number_come_back(classes):
    rng = np.random.default_rng(5)
    numbers, changed = rng.integers(0, classes, 400), rng.random(400) < 0.7
    code = changes_written(changed, numbers, largest=classes - 1)
    found = changes_read(code, 400, largest=classes - 1, classes=None)
    assert found is not None
    assert found[1].tolist() == numbers[changed].tolist()
    # The classes, whether a row has changed, and what is learnt of them.
    ideal = (changed.sum() * np.log2(classes) + 400 * entropy(0.7)) / 8
    assert len(code) <= ideal + 4 + classes


def test_deltas_cost_less_by_the_entropy_that_the_facts_name():
    # algorithm-facts: before 0,1,2,2,1,0,3,3 and now 0,1,1,2,1,0,3,2, 1.06 bits a symbol for 1.91.
    before = np.tile([0, 1, 2, 2, 1, 0, 3, 3], 200)
    now = np.tile([0, 1, 1, 2, 1, 0, 3, 2], 200)
    changed = delta_symbols(before, now) > 0
    delta = changes_written(changed, now, largest=3)
    whole = changes_written(np.ones(1600, bool), now, largest=3)
    assert len(delta) == pytest.approx(1600 * 1.06127812 / 8, abs=6)
    assert len(whole) == pytest.approx(1600 * 1.90563906 / 8, abs=6)
