"""Predictions that arrive one client at a time: their mean, or a file for rules that need all."""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

BLOCK_VALUES = 2**17
"""Values that are worked on at a time: 1 MiB in float64, what a core's own cache holds."""


class StreamingMean:
    """Weighted mean of predictions that arrive one client at a time.

    Holds one table of rows x classes however many clients there are, and a block of working
    space. Sums in float64 in call order, so the same calls in the same order give the same bits.
    """

    def __init__(self) -> None:
        self._sum: Float[np.ndarray, "rows classes"] | None = None
        self._total_weight = 0.0
        self._count = 0

    @property
    def count(self) -> int:
        """Number of contributions added so far."""
        return self._count

    def add(
        self,
        values: Float[np.ndarray, "rows classes"] | Float[Tensor, "rows classes"],
        weight: int | float = 1.0,
    ) -> None:
        """Fold in one client's probabilities or logits.

        Args:
            values: finite, with the shape of all earlier contributions.
            weight: positive number, such as the client's example count.

        Raises:
            ValueError: if ``weight`` is out of range, a value is not finite, or the shape differs;
                the mean is then as it was before the call.
        """
        _check_weight(weight)
        table = _as_table(values)
        self._check_shape(table)
        # Before anything is added: no later subtraction could take a NaN out of the sum again.
        _check_finite(table)
        if self._sum is None:
            self._sum = np.zeros(table.shape)
        terms = _block_buffer(table)
        for rows in _row_blocks(table):
            block = self._sum[rows]
            block += _weighted(table[rows], weight, terms)
        self._total_weight += weight
        self._count += 1

    def mean(self) -> Float[Tensor, "rows classes"]:
        """Return the weighted mean of all contributions, float64 on the CPU.

        Raises:
            ValueError: if nothing was added.
        """
        return torch.from_numpy(self._nonempty_sum() / self._total_weight)

    def pop_mean(self) -> Float[Tensor, "rows classes"]:
        """Return the mean rounded to float32 and forget all contributions.

        The same bits as ``mean().float()``, without a second table: the result takes over the
        memory of the sum and gives half of it back.

        Raises:
            ValueError: if nothing was added.
        """
        total, weight = self._nonempty_sum(), self._total_weight
        self._sum, self._total_weight, self._count = None, 0.0, 0
        return torch.from_numpy(_divided_in_place(total, weight))

    def without(
        self,
        values: Float[np.ndarray, "rows classes"] | Float[Tensor, "rows classes"],
        weight: int | float = 1.0,
    ) -> Float[Tensor, "rows classes"]:
        """Return the mean of the others, given one's own earlier contribution; changes nothing.

        Args:
            values: exactly what this client passed to `add`.
            weight: exactly the weight it was added with.

        Returns:
            Row k of `leave_one_out`, float64 on the CPU.

        Raises:
            ValueError: if fewer than two contributions were added, or ``weight`` or the shape
                cannot be that of an earlier one.
        """
        _check_weight(weight)
        if self._sum is None or self._count < 2:
            raise ValueError(f"leave-one-out needs at least 2 contributions, got {self._count}")
        others_weight = self._total_weight - weight
        if others_weight <= 0:
            raise ValueError(
                f"weight must be below the total of all contributions ({self._total_weight}), "
                f"got {weight}"
            )
        table = _as_table(values)
        self._check_shape(table)
        others = np.empty(table.shape)
        terms = _block_buffer(table)
        for rows in _row_blocks(table):
            block = others[rows]
            np.subtract(self._sum[rows], _weighted(table[rows], weight, terms), out=block)
            block /= others_weight
        return torch.from_numpy(others)

    def _nonempty_sum(self) -> Float[np.ndarray, "rows classes"]:
        if self._sum is None:
            raise ValueError("mean needs at least 1 contribution, got 0")
        return self._sum

    def _check_shape(self, table: Float[np.ndarray, "rows classes"]) -> None:
        if self._sum is not None and table.shape != self._sum.shape:
            raise ValueError(f"values must have shape {self._sum.shape}, got {table.shape}")


class PredictionSpool:
    """Predictions of many clients, kept in a file without a name and read back some rows at a time.

    For rules that need all clients at once, such as `coordinate_median`: memory is one chunk of
    rows of every client, whatever the number of rows. The file vanishes with the process.
    """

    def __init__(self, folder: Path | None = None, *, chunk_bytes: int = 2**25) -> None:
        """Open an empty spool.

        Args:
            folder: where its file lives; None is the system's temporary folder.
            chunk_bytes: memory for the rows that are read back at a time, at least one of them.
        """
        self._folder = Path(tempfile.gettempdir()) if folder is None else folder
        self._chunk_bytes = chunk_bytes
        self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        self._shape: tuple[int, ...] | None = None
        self._dtype = np.dtype(np.float32)
        self._count = 0

    @property
    def count(self) -> int:
        """Number of contributions added so far."""
        return self._count

    def add(
        self, values: Float[np.ndarray, "rows classes"] | Float[Tensor, "rows classes"]
    ) -> None:
        """Append one client's probabilities or logits; half precision is widened to float32.

        Args:
            values: finite, with the shape and precision of all earlier contributions.

        Raises:
            ValueError: if a value is not finite, or the shape or precision differs.
            OSError: where the folder has no room left. In either case the spool is as before.
        """
        table = _as_table(values)
        dtype = np.promote_types(table.dtype, np.float32)
        if self._shape is not None and (table.shape, dtype) != (self._shape, self._dtype):
            raise ValueError(
                f"values must be {self._dtype} of shape {self._shape}, "
                f"got {dtype} of shape {table.shape}"
            )
        _check_finite(table)
        try:
            self._file.seek(self._count * table.size * dtype.itemsize)
            for rows in _row_blocks(table):
                self._file.write(np.ascontiguousarray(table[rows], dtype).data)
            self._file.flush()
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot keep the clients' predictions in {str(self._folder)!r}: {error.strerror}; "
                "the environment variable TMPDIR names another folder",
            ) from None
        self._shape, self._dtype = table.shape, dtype
        self._count += 1

    def reduce(
        self,
        rule: Callable[[Float[Tensor, "clients rows classes"]], Float[Tensor, "rows classes"]],
        *,
        only: Sequence[int] | None = None,
    ) -> Float[Tensor, "rows classes"]:
        """Return what ``rule`` makes of contributions, in the order they were added.

        Args:
            rule: must treat every row on its own, such as `coordinate_median`.
            only: which of them, by their number from 0 on; None: all.

        Raises:
            ValueError: if there is none.
        """
        reduced: Tensor | None = None
        for rows, chunk in self.chunks(only):
            if reduced is None:
                assert self._shape is not None  # noqa: S101 (there is a chunk)
                reduced = torch.empty(self._shape, dtype=chunk.dtype)
            reduced[rows] = rule(chunk)
        assert reduced is not None  # noqa: S101 (tables have rows)
        return reduced

    def chunks(
        self, only: Sequence[int] | None = None
    ) -> Iterator[tuple[slice, Float[Tensor, "clients rows classes"]]]:
        """Read contributions back, some rows at a time: which rows, and what was said of them.

        Every chunk lies in the memory of the one before.

        Args:
            only: which of them, by their number from 0 on; None: all.

        Raises:
            ValueError: if there is none.
        """
        places = range(self._count) if only is None else only
        if self._shape is None or not len(places):
            raise ValueError("a robust mean needs at least 1 contribution, got 0")
        rows, classes = self._shape
        row_bytes = classes * self._dtype.itemsize
        height = min(rows, max(1, self._chunk_bytes // (len(places) * row_bytes)))
        chunk = np.empty((len(places), height, classes), self._dtype)
        for start in range(0, rows, height):
            taken = min(height, rows - start)
            for place, client in enumerate(places):
                self._file.seek((client * rows + start) * row_bytes)
                if self._file.readinto(chunk[place, :taken].data) != taken * row_bytes:
                    raise OSError(f"a temporary file in {str(self._folder)!r} lost its end")
            yield slice(start, start + taken), torch.from_numpy(chunk[:, :taken])

    def close(self) -> None:
        """Give the file's space back."""
        self._file.close()

    def __enter__(self) -> "PredictionSpool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _as_table(
    values: Float[np.ndarray, "rows classes"] | Float[Tensor, "rows classes"],
) -> Float[np.ndarray, "rows classes"]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        # NumPy has no bfloat16; float32 holds it exactly.
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    if values.size == 0:
        raise ValueError(f"values must have at least 1 row and 1 class, got {values.shape}")
    return values


def _row_blocks(table: Float[np.ndarray, "rows classes"]) -> Iterator[slice]:
    """Cut the rows into blocks of about `BLOCK_VALUES` values, which a core's cache holds."""
    rows, classes = table.shape
    height = max(1, BLOCK_VALUES // classes)
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))


def _block_buffer(table: Float[np.ndarray, "rows classes"]) -> Float[np.ndarray, "height classes"]:
    """Return working space for one of `_row_blocks`."""
    rows, classes = table.shape
    return np.empty((min(rows, max(1, BLOCK_VALUES // classes)), classes))


def _weighted(
    block: Float[np.ndarray, "rows classes"],
    weight: int | float,
    buffer: Float[np.ndarray, "height classes"],
) -> Float[np.ndarray, "rows classes"]:
    """Return ``weight * block`` in float64, in the buffer's memory."""
    terms = buffer[: len(block)]
    terms[:] = block
    if weight != 1:
        terms *= weight
    return terms


def _check_finite(table: Float[np.ndarray, "rows classes"]) -> None:
    for rows in _row_blocks(table):
        # Both ends are NaN where any value is, and no table of booleans is made.
        if not (np.isfinite(table[rows].min()) and np.isfinite(table[rows].max())):
            raise ValueError("values must be finite, got NaN or infinity")


def _divided_in_place(total: np.ndarray, divisor: int | float) -> np.ndarray:
    """Return ``total / divisor`` in float32, in the memory of ``total``, which is used up."""
    shape, size = total.shape, total.size
    wide = total.reshape(-1)
    narrow = wide.view(np.float32)
    for start in range(0, size, BLOCK_VALUES):
        block = slice(start, min(start + BLOCK_VALUES, size))
        # The quotient is a copy, and what is written of it ends before the next block begins.
        narrow[block] = wide[block] / divisor
    # A view would keep NumPy from giving back the half that is free now; its own check for views
    # also counts the frames of debuggers.
    del wide, narrow
    total.resize((size + 1) // 2, refcheck=False)
    return total.view(np.float32)[:size].reshape(shape)


def _check_weight(weight: int | float) -> None:
    if not (weight > 0 and math.isfinite(weight)):
        raise ValueError(f"weight must be positive and finite, got {weight}")
