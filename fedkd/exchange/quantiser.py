"""CFD's quantiser and delta code: distributions in few bits that still sum to 1.

Source: Sattler, Marban, Rischke, Samek, 2022, Communication-Efficient Federated Distillation,
equations 10, 11 and 13. https://arxiv.org/abs/2012.00632
"""

import numpy as np
from jaxtyping import Float, Int, Integer, UInt8


def quantised(
    probabilities: Float[np.ndarray, "rows classes"], *, bits: int
) -> UInt8[np.ndarray, "rows classes"]:
    """Return the nearest distributions, in L1, whose shares are multiples of ``1 / (2**bits - 1)``.

    Every class gets its share rounded down; the units that are left go to the largest remainders,
    one each. Of equal remainders the first class gets it, where the paper draws one. Rounding each
    share by itself would not sum to 1.

    Args:
        probabilities: rows that sum to 1.
        bits: 1 to 8; with 1 all of a row goes to its largest share.

    Returns:
        Units of each class; they sum to ``2**bits - 1`` in every row.

    Raises:
        ValueError: for other numbers of bits.
    """
    check_bits(bits)
    units = 2**bits - 1
    wide = probabilities.astype(np.float64)
    shares = units * wide / wide.sum(-1, keepdims=True)
    # A share that misses a whole number by rounding alone is that number.
    nearest = np.rint(shares)
    shares = np.where(np.abs(shares - nearest) < 1e-6, nearest, shares)
    levels = np.floor(shares)
    left = units - levels.sum(-1, keepdims=True)
    order = np.argsort(levels - shares, axis=-1, kind="stable")
    ranks = np.argsort(order, axis=-1, kind="stable")
    given: np.ndarray = levels + (ranks < left)
    return given.astype(np.uint8)


def restored(
    levels: UInt8[np.ndarray, "rows classes"], *, bits: int
) -> Float[np.ndarray, "rows classes"]:
    """Return float32 distributions of units of ``1 / (2**bits - 1)``."""
    check_bits(bits)
    shares: np.ndarray = levels / np.float64(2**bits - 1)
    return shares.astype(np.float32)


def delta_symbols(
    previous: Int[np.ndarray, " rows"] | None, now: Int[np.ndarray, " rows"]
) -> Int[np.ndarray, " rows"]:
    """Return 0 for each row whose class is what it was before, else the class and 1.

    Args:
        previous: classes of the same rows that the receiver has; None: it has none.
        now: classes of the rows.
    """
    if previous is None:
        return now + 1
    return np.where(previous == now, 0, now + 1)


def packed(values: Integer[np.ndarray, " numbers"], *, bits: int) -> UInt8[np.ndarray, " bytes"]:
    """Write numbers below ``2**bits`` one after the other, without a gap but in the last byte."""
    each = (values.astype(np.int64)[:, None] >> np.arange(bits)) & 1
    return np.packbits(each.astype(bool))


def unpacked(
    written: UInt8[np.ndarray, " bytes"], count: int, *, bits: int
) -> Int[np.ndarray, " numbers"]:
    """Read so many numbers that `packed` wrote."""
    each = np.unpackbits(written, count=count * bits).reshape(count, bits).astype(np.int64)
    return each @ (1 << np.arange(bits))


def bytes_of(numbers: int, bits: int) -> int:
    """Return how many bytes `packed` makes of so many numbers."""
    return -(-numbers * bits // 8)


def check_bits(bits: int) -> None:
    """Refuse numbers of bits that no byte holds.

    Raises:
        ValueError: with what was given.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
