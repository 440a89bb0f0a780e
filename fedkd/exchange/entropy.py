"""An adaptive arithmetic coder, and how changed soft labels are written with it.

The coder writes digits, each under a context. It learns how often a digit comes in a context as it
goes, on both sides alike (Krichevsky and Trofimov, 1981), so no table travels. The intervals are
those of a range coder (Martin, 1979). It is of the family of CABAC (Marpe, Schwarz, Wiegand, 2003),
which Sattler et al., 2022, use for these symbols (https://arxiv.org/abs/2012.00632), with digits in
the place of bits, and another estimate of how likely a digit is.

What is learnt counts from the next of a list of moments on, not from the next digit. Who writes
knows all digits, and so makes the counts of all moments at once; who reads sums them up less often.
"""

from bisect import bisect_right
from collections.abc import Generator
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt8

_BITS = 4
"""Of a digit: with more there are more of them to learn, with fewer a number takes more of them."""
_LAST = (1 << _BITS) - 1
_TOP = 1 << 40
_BOTTOM = 1 << 32
_ENOUGH = 1 << 15
"""Digits that a context learns from: sums of counts stay far below the range divided by them."""


def _moments() -> list[int]:
    """Return how many digits a context has seen whenever what it has learnt begins to count."""
    moments = [0]
    while moments[-1] < _ENOUGH:
        # The more has come the less another one says.
        moments.append(moments[-1] + 1 + moments[-1] // 16)
    return moments


_MOMENTS = _moments()
_MOMENT_OF = np.repeat(np.arange(len(_MOMENTS) - 1), np.diff(_MOMENTS))
"""The last moment before each digit of a context, by how many were before it."""


# -- digits --------------------------------------------------------------------------------------


class Digits(NamedTuple):
    """What is written, digit by digit.

    Attributes:
        contexts: what each comes in; any numbers.
        most: that each can be there, in [0, 15]; room for those above is not left.
        digits: in [0, most].
    """

    contexts: Int[np.ndarray, " digits"]
    most: Int[np.ndarray, " digits"]
    digits: Int[np.ndarray, " digits"]


def digits_written(said: Digits) -> bytes:
    """Return the code: a byte for each by which the range had to be widened, and one more."""
    below, above, all_of = _shares(said)
    low, range_, done = 0, _TOP, []
    for start, end, total in zip(below.tolist(), above.tolist(), all_of.tolist(), strict=True):
        part = range_ // total
        before = part * start
        low += before
        # The last one has what the division leaves.
        range_ = (part * end if end < total else range_) - before
        while range_ < _BOTTOM:
            # Nine bits where the sum was carried over.
            done.append(low >> 32)
            low = (low & (_BOTTOM - 1)) << 8
            range_ <<= 8
    # The interval is at least `_BOTTOM` wide, so a multiple of it is inside.
    done.append(-(-low // _BOTTOM))
    carried = int.from_bytes(bytes(place >> 8 for place in done), "big") << 8
    value = int.from_bytes(bytes(place & 255 for place in done), "big") + carried
    return value.to_bytes(len(done), "big")


def _shares(said: Digits) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where the share of each digit begins and ends, and out of how many."""
    begins, ends, totals = (np.empty(len(said.digits), np.int64) for _ in range(3))
    for context in np.unique(said.contexts):
        places = np.flatnonzero(said.contexts == context)
        digits, most = said.digits[places], said.most[places]
        moment = _MOMENT_OF[np.minimum(np.arange(len(places)), _ENOUGH - 1)]
        came = np.bincount((_LAST + 1) * moment + digits, minlength=(_LAST + 1) * (moment[-1] + 1))
        came = came.reshape(-1, _LAST + 1)
        # From a half on, doubled.
        counts = 1 + 2 * (came.cumsum(0) - came)
        sums = np.zeros((len(counts), _LAST + 2), np.int64)
        counts.cumsum(1, out=sums[:, 1:])
        begins[places] = sums[moment, digits]
        ends[places] = sums[moment, digits + 1]
        totals[places] = sums[moment, most + 1]
    return begins, ends, totals


class _Context:
    """What came in a context, for who reads.

    Attributes:
        counts: how often each digit did: from a half on, doubled.
        sums: of the counts of the digits below each, at the last moment.
        due: digits until the next one.
    """

    __slots__ = ("counts", "due", "moment", "sums")

    def __init__(self) -> None:
        self.counts = [1] * (_LAST + 1)
        self.moment = -1
        self.renew()

    def renew(self) -> None:
        """Let count what came."""
        self.moment += 1
        if self.moment + 1 < len(_MOMENTS):
            self.sums = [0, *accumulate(self.counts)]
            self.due = _MOMENTS[self.moment + 1] - _MOMENTS[self.moment]


def digits_read(code: bytes, asking: Generator[tuple[int, int], int, None]) -> bool:
    """Read what `digits_written` wrote; of any other bytes some digits are made.

    Args:
        code: what was written.
        asking: yields a context and the most that a digit can be there, and is sent the digit.

    Returns:
        Whether the code has as many bytes as these digits take.
    """
    contexts: dict[int, _Context] = {}
    coming = iter(code)
    value, range_, shifts = 0, _TOP, 0
    for _ in range(_TOP.bit_length() // 8):
        value = value << 8 | next(coming, 0)
    context, most = next(asking)
    while True:
        seen = contexts.get(context)
        if seen is None:
            seen = contexts[context] = _Context()
        sums = seen.sums
        part = range_ // sums[most + 1]
        digit = bisect_right(sums, value // part, 1, most + 1) - 1
        before = part * sums[digit]
        value -= before
        range_ = (part * sums[digit + 1] if digit < most else range_) - before
        while range_ < _BOTTOM:
            value = value << 8 | next(coming, 0)
            range_ <<= 8
            shifts += 1
        seen.counts[digit] += 2
        seen.due -= 1
        if not seen.due:
            seen.renew()
        try:
            context, most = asking.send(digit)
        except StopIteration:
            return len(code) == shifts + 1


# -- rows that changed ---------------------------------------------------------------------------

_CHANGED = 0
"""The context of whether a row has changed. Others are a 1 and the digits of a number so far."""


def most_bytes(rows: int, *, largest: int, classes: int | None) -> int:
    """Return more bytes than the code of so many rows can have; see `changes_read`."""
    numbers = 1 if classes is None else classes
    # No digit is taken for rarer than one of all that are counted.
    bits = (2 * _MOMENTS[-1] + _LAST + 1).bit_length()
    return bits * rows * (1 + numbers * len(_shifts(largest))) // 8 + 8


def changes_written(
    changed: Bool[np.ndarray, " rows"], numbers: Int[np.ndarray, "rows ..."], *, largest: int
) -> UInt8[np.ndarray, " bytes"]:
    """Write which rows have changed, and the numbers of those.

    Args:
        changed: which rows have.
        numbers: of all rows, in [0, largest]: one each, or ``[rows, classes]`` that sum to it.
        largest: number that there can be.
    """
    if not len(changed):
        return np.zeros(0, np.uint8)
    known = numbers.astype(np.int64)
    classes = None if known.ndim == 1 else known.shape[1]
    code = _code(changed.tobytes(), known.tobytes(), classes, largest)
    return np.frombuffer(code, np.uint8)


# A server sends many clients the same from the same memory, and looks at what comes before it
# decodes it.
@lru_cache(maxsize=8)
def _code(changed: bytes, numbers: bytes, classes: int | None, largest: int) -> bytes:
    has = np.frombuffer(changed, bool)
    known = np.frombuffer(numbers, np.int64).reshape(len(has), -1)
    return digits_written(digits_of_rows(has, known, largest=largest, shares=classes is not None))


def digits_of_rows(
    changed: Bool[np.ndarray, " rows"],
    numbers: Int[np.ndarray, "rows numbers"],
    *,
    largest: int,
    shares: bool,
) -> Digits:
    """Return what is said of rows: `_asking` asks for the same.

    Whether each has changed, and if so its numbers, each from its first digit on. Of shares none
    can be more than what is left, the last one is that, and where nothing is left the others are 0.
    """
    said, most = numbers[:, :1], np.full((len(numbers), 1), largest)
    if shares:
        said = numbers[:, :-1]
        most = largest - (said.cumsum(1) - said)
    is_said = (most > 0 if shares else most >= 0) & changed[:, None]
    node, bound = np.ones_like(said), np.ones(said.shape, bool)
    nodes, lasts, digits = [], [], []
    for shift in _shifts(largest):
        nodes.append(node)
        lasts.append(np.where(bound, most >> shift & _LAST, _LAST))
        digits.append(said >> shift & _LAST)
        bound = bound & (digits[-1] == lasts[-1])
        node = node << _BITS | digits[-1]
    here = np.repeat(is_said, len(digits), axis=1)

    def in_order(first: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
        rest = np.stack(others, axis=-1).reshape(here.shape)
        whole = np.concatenate([first[:, None], rest], axis=1)
        chosen: np.ndarray = whole[np.insert(here, 0, True, axis=1)]
        return chosen

    ones = np.ones(len(changed), np.int64)
    return Digits(
        contexts=in_order(_CHANGED * ones, nodes),
        most=in_order(ones, lasts),
        digits=in_order(changed.astype(np.int64), digits),
    )


def changes_read(
    written: UInt8[np.ndarray, " bytes"], rows: int, *, largest: int, classes: int | None
) -> tuple[Bool[np.ndarray, " rows"], Int[np.ndarray, "changed ..."]] | None:
    """Read what `changes_written` wrote; None: nobody can have written this.

    Args:
        written: the code.
        rows: how many there are.
        largest: number that there can be.
        classes: numbers of a row, which sum to the largest; None: a row has one number.

    Returns:
        Which rows have changed, and the numbers of those that have; nobody may write into them.
    """
    return _read(written.tobytes(), rows, largest, classes)


@lru_cache(maxsize=8)
def _read(
    code: bytes, rows: int, largest: int, classes: int | None
) -> tuple[np.ndarray, np.ndarray] | None:
    shape = () if classes is None else (classes,)
    changed = np.zeros(rows, bool)
    found: list[list[int]] = []
    if rows and not digits_read(code, _asking(changed, found, largest, classes)):
        return None
    if code and not rows:
        return None
    numbers = np.array(found, np.int64).reshape(len(found), *shape)
    for array in (changed, numbers):
        array.flags.writeable = False
    return changed, numbers


def _asking(
    changed: np.ndarray, found: list[list[int]], largest: int, classes: int | None
) -> Generator[tuple[int, int], int, None]:
    """Ask for each digit, and fill in which rows have changed and the numbers of those."""
    shifts = _shifts(largest)
    columns = range(1 if classes is None else classes - 1)
    for place in range(len(changed)):
        if not (yield _CHANGED, 1):
            continue
        changed[place] = True
        row = [0] * (classes or 1)
        found.append(row)
        left = largest
        for column in columns:
            # Most numbers have a single digit, and every step counts here.
            number = (yield 1, left) if len(shifts) == 1 else (yield from _number(left, shifts))
            row[column] = number
            if classes is not None:
                left -= number
                if not left:
                    break
        if classes is not None:
            row[-1] += left


def _number(most: int, shifts: tuple[int, ...]) -> Generator[tuple[int, int], int, int]:
    """Ask for a number, each digit under those before it."""
    node, bound = 1, True
    for shift in shifts:
        last = most >> shift & _LAST if bound else _LAST
        digit = yield node, last
        bound = bound and digit == last
        node = node << _BITS | digit
    return node - (1 << _BITS * len(shifts))


def _shifts(largest: int) -> tuple[int, ...]:
    """Return by how many bits each digit of a number is shifted, from the first one on."""
    digits = max(1, -(-largest.bit_length() // _BITS))
    return tuple(_BITS * place for place in reversed(range(digits)))
