"""An adaptive binary arithmetic coder, and how changed soft labels are written with it.

The coder writes yes and no, each under a context. It learns how often either comes in a context as
it goes, on both sides alike (Krichevsky and Trofimov, 1981), so no table travels. The intervals are
those of a range coder (Martin, 1979) whose carries Python's whole numbers take care of. It is of
the family of CABAC (Marpe, Schwarz, Wiegand, 2003), which Sattler et al., 2022, use for these
symbols (https://arxiv.org/abs/2012.00632), with another estimate of how likely a symbol is.
"""

from abc import ABC, abstractmethod
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Int, UInt8

_TOP = 1 << 32
_BOTTOM = 1 << 24
_MOST_SEEN = 1 << 16
"""Counts are halved here, so that they stay far below the range that is divided by them."""


class Coder(ABC):
    """Writes symbols, or reads those that were written: what is said with them is said once.

    Args:
        contexts: how many there are.
    """

    def __init__(self, contexts: int) -> None:
        # How often either came in each context: counts from a half on, doubled.
        self._no = [1] * contexts
        self._yes = [1] * contexts
        self._range = _TOP - 1

    @abstractmethod
    def bit(self, context: int, bit: bool = False) -> bool:
        """Write a symbol and return it; or read one, whatever was given."""

    def _split(self, context: int) -> int:
        """Return the part of the range that stands for no; at least 1, and less than all."""
        no = self._no[context]
        return self._range * no // (no + self._yes[context])

    def _learn(self, context: int, bit: bool) -> None:
        counts = self._yes if bit else self._no
        counts[context] += 2
        if counts[context] > _MOST_SEEN:
            self._no[context] = (self._no[context] + 1) // 2
            self._yes[context] = (self._yes[context] + 1) // 2


class Writer(Coder):
    """Writes symbols.

    Args:
        contexts: how many there are.
    """

    def __init__(self, contexts: int) -> None:
        super().__init__(contexts)
        self._low = 0
        self._shifts = 0

    def bit(self, context: int, bit: bool = False) -> bool:
        """Write a symbol."""
        part = self._split(context)
        if bit:
            self._low += part
            self._range -= part
        else:
            self._range = part
        while self._range < _BOTTOM:
            self._range <<= 8
            self._low <<= 8
            self._shifts += 1
        self._learn(context, bit)
        return bit

    def written(self) -> UInt8[np.ndarray, " bytes"]:
        """Return the code: a byte for each by which the range had to be widened, and one more."""
        # The interval is at least `_BOTTOM` wide, so a multiple of it is inside.
        value = -(-self._low // _BOTTOM)
        return np.frombuffer(value.to_bytes(self._shifts + 1, "big"), np.uint8)


class Reader(Coder):
    """Reads what `Writer` wrote; of any other bytes it makes some symbols.

    Args:
        written: the code.
        contexts: how many there are.
    """

    def __init__(self, written: UInt8[np.ndarray, " bytes"], contexts: int) -> None:
        super().__init__(contexts)
        self._written = written.tobytes()
        self._code = int.from_bytes(self._written[:4].ljust(4, b"\0"), "big")
        self._shifts = 0

    def bit(self, context: int, bit: bool = False) -> bool:
        """Read a symbol."""
        part = self._split(context)
        found = self._code >= part
        if found:
            self._code -= part
            self._range -= part
        else:
            self._range = part
        while self._range < _BOTTOM:
            place = self._shifts + 4
            self._shifts += 1
            self._range <<= 8
            self._code = self._code << 8 | (
                self._written[place] if place < len(self._written) else 0
            )
        self._learn(context, found)
        return found

    @property
    def is_exact(self) -> bool:
        """Whether the code has as many bytes as these symbols take."""
        return len(self._written) == self._shifts + 1


_CHANGED = 0
_NODES = 1
"""Contexts: whether a row has changed, then the nodes of the tree that a number is read from."""


def most_bytes(rows: int, width: int, numbers: int) -> int:
    """Return more bytes than the code of so many rows can have.

    Args:
        rows: how many there are.
        width: bits of a number.
        numbers: of a row.
    """
    # A symbol costs a bit at the most, beside what is learnt: half a log of how often a context
    # came, for each of them, and a bit.
    symbols = rows * (1 + width * numbers)
    contexts = min(_NODES + (1 << width), symbols)
    return (symbols + contexts * (symbols.bit_length() + 2)) // 8 + 8


def changes_written(
    changed: Bool[np.ndarray, " rows"],
    numbers: Int[np.ndarray, "rows ..."],
    *,
    width: int,
    units: int | None,
) -> UInt8[np.ndarray, " bytes"]:
    """Write which rows have changed, and the numbers of those.

    Args:
        changed: which rows have.
        numbers: of all rows: one each, or ``[rows, classes]`` shares of ``units``.
        width: bits of a number.
        units: that the numbers of a row sum to; None: a row has one number.
    """
    if not len(changed):
        return np.zeros(0, np.uint8)
    known = numbers.astype(np.int64).reshape(len(numbers), -1)
    code = _code(changed.tobytes(), known.tobytes(), known.shape[1], width, units)
    return np.frombuffer(code, np.uint8)


# A server sends many clients the same from the same memory, and looks at what comes before it
# decodes it.
@lru_cache(maxsize=8)
def _code(changed: bytes, numbers: bytes, of_row: int, width: int, units: int | None) -> bytes:
    coder = Writer(_NODES + (1 << width))
    known = np.frombuffer(numbers, np.int64).reshape(-1, of_row).tolist()
    for has, row in zip(np.frombuffer(changed, bool).tolist(), known, strict=True):
        if coder.bit(_CHANGED, has):
            _row(coder, row, width, units)
    return coder.written().tobytes()


def changes_read(
    written: UInt8[np.ndarray, " bytes"],
    rows: int,
    *,
    width: int,
    classes: int,
    units: int | None,
) -> tuple[Bool[np.ndarray, " rows"], Int[np.ndarray, "changed ..."]] | None:
    """Read what `changes_written` wrote; None: nobody can have written this.

    Args:
        written: the code.
        rows: how many there are.
        width: bits of a number.
        classes: numbers of a row where they sum to units; else what its number is below.
        units: see `changes_written`.

    Returns:
        Which rows have changed, and the numbers of those that have; nobody may write into them.
    """
    return _read(written.tobytes(), rows, width, classes, units)


@lru_cache(maxsize=8)
def _read(
    code: bytes, rows: int, width: int, classes: int, units: int | None
) -> tuple[np.ndarray, np.ndarray] | None:
    shape = () if units is None else (classes,)
    if not rows:
        nothing = np.zeros(0, bool), np.zeros((0, *shape), np.int64)
        return None if code else nothing
    coder = Reader(np.frombuffer(code, np.uint8), _NODES + (1 << width))
    changed = np.zeros(rows, bool)
    found: list[list[int]] = []
    for place in range(rows):
        if coder.bit(_CHANGED):
            changed[place] = True
            row = [0] * (1 if units is None else classes)
            if not _row(coder, row, width, units) or (units is None and row[0] >= classes):
                return None
            found.append(row)
    if not coder.is_exact:
        return None
    numbers = np.array(found, np.int64).reshape(len(found), *shape)
    for array in (changed, numbers):
        array.flags.writeable = False
    return changed, numbers


def _row(coder: Coder, row: list[int], width: int, units: int | None) -> bool:
    """Say the numbers of a row, or fill them in; tell whether they can be.

    Of shares the last is what is left, and where nothing is left the others are 0.
    """
    if units is None:
        row[0] = _number(coder, row[0], width)
        return True
    left = units
    for place in range(len(row) - 1):
        if not left:
            break
        row[place] = _number(coder, row[place], width)
        left -= row[place]
        if left < 0:
            return False
    else:
        row[-1] = left
    return True


def _number(coder: Coder, number: int, width: int) -> int:
    """Say a number from its highest bit on, each under the bits before it."""
    node = 1
    for place in reversed(range(width)):
        node = node << 1 | coder.bit(_NODES - 1 + node, bool(number >> place & 1))
    return node - (1 << width)
