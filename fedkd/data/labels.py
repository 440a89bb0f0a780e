"""Labels as they are stored -> class numbers, and what the classes are called."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64

from fedkd.names import printable

if TYPE_CHECKING:
    import pyarrow as pa

UNLABELLED = -1
"""Stands for a row without a label; so do empty cells."""

Where = Callable[[int], str]
"""Says where the row of a number, from 0, stands."""

MOST_FREE_NAMES = 100
"""Names that no file declares are classes only where they repeat, from this many on."""


@dataclass(frozen=True, eq=False, slots=True)
class LabelColumn:
    """The labels of one file.

    Attributes:
        file: what the file is called in errors.
        numbers: a class number for each row, `UNLABELLED` for none.
        names: what the file's own numbers stand for; ``None`` where they have no names.
        declared: whether the file declares all its classes, in its own order; else the names are
            those that occur in it.
        where: says where a row of the file stands; None: by its number.
    """

    file: str
    numbers: Int64[np.ndarray, "rows"]
    names: tuple[str, ...] | None = None
    declared: bool = False
    where: Where | None = None

    def place(self, row: int) -> str:
        """Say where a row stands."""
        return row_of(self.file, row) if self.where is None else self.where(row)


def row_of(file: str, row: int) -> str:
    """Say which row of a file is meant.

    Args:
        file: what it is called.
        row: its number, from 0.
    """
    return f"{file}, row {row + 1} (counted from 1)"


@dataclass(frozen=True, eq=False, slots=True)
class Classes:
    """The classes of a source, and the class number of each row of each split."""

    names: tuple[str, ...]
    numbers: Mapping[str, Int64[np.ndarray, "_"]]


def read_label_column(
    column: "pa.ChunkedArray",
    *,
    file: str,
    names: tuple[str, ...] | None,
    where: Where | None = None,
) -> LabelColumn:
    """Read class numbers (whole numbers, also as floats), truth values or names.

    Args:
        column: the labels of one file.
        file: what it is called.
        names: what the numbers stand for, where the file declares it.
        where: says where a row stands; None: by its number.

    Raises:
        ValueError: if the column holds anything else; names the file, and the row where one does.
    """
    return replace(_read(column, file, names, where or partial(row_of, file)), where=where)


def _read(
    column: "pa.ChunkedArray", file: str, names: tuple[str, ...] | None, where: Where
) -> LabelColumn:
    import pyarrow as pa

    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if pa.types.is_null(kind):
        return LabelColumn(file, np.full(len(column), UNLABELLED))
    if pa.types.is_boolean(kind):
        numbers = _numbers(column.cast(pa.int64()))
        return LabelColumn(file, numbers, ("False", "True"), declared=True)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view():
        return _named(column, file, names)
    if pa.types.is_floating(kind):
        return LabelColumn(file, _whole(column, where), names, declared=names is not None)
    if pa.types.is_integer(kind) or pa.types.is_decimal(kind):
        try:
            numbers = _numbers(column.cast(pa.int64()))
        except pa.ArrowInvalid as error:
            raise ValueError(f"{file}: must hold class numbers, got {error}") from error
        return LabelColumn(file, numbers, names, declared=names is not None)
    raise ValueError(f"{file}: must hold class numbers or class names, got {kind}")


def _numbers(column: "pa.ChunkedArray") -> Int64[np.ndarray, "rows"]:
    return to_numpy(column.fill_null(UNLABELLED) if column.null_count else column).astype(np.int64)


def to_numpy(column: "pa.Array | pa.ChunkedArray") -> np.ndarray:
    """Return numbers without empty cells as NumPy has them.

    Arrow's own ``to_numpy`` imports pandas, which takes half a second.
    """
    import pyarrow as pa

    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = [np.from_dlpack(chunk) for chunk in chunks if len(chunk)]
    return np.concatenate(parts) if parts else np.empty(0)


def _whole(column: "pa.ChunkedArray", where: Where) -> Int64[np.ndarray, "rows"]:
    import pyarrow as pa

    column = column.cast(pa.float64())
    values = to_numpy(column.fill_null(UNLABELLED) if column.null_count else column)
    values = np.where(np.isnan(values), UNLABELLED, values)  # NaN is how pandas leaves a cell empty
    odd = np.flatnonzero((values != np.floor(values)) | (np.abs(values) > 2**53))
    if len(odd):
        row = int(odd[0])
        raise ValueError(f"{where(row)}: must hold class numbers or class names, got {values[row]}")
    return values.astype(np.int64)


def _named(column: "pa.ChunkedArray", file: str, declared: tuple[str, ...] | None) -> LabelColumn:
    import pyarrow as pa

    try:
        encoded = column.cast(pa.large_string()).combine_chunks().dictionary_encode()
        indices = pa.chunked_array([encoded.indices])
        names = tuple(encoded.dictionary.to_pylist())
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: class names must be UTF-8 text, got {error}") from error
    numbers = _numbers(indices)
    if declared is None:
        return LabelColumn(file, numbers, names)
    return LabelColumn(
        file, _renumbered(LabelColumn(file, numbers, names), declared, file), declared, True
    )


def common_classes(splits: Mapping[str, Sequence[LabelColumn]], label: str) -> Classes:
    """Bring the numbers of all files to one order of classes.

    Numbers mean nothing without the names that their file declares, so each file's are looked up
    by name: in the order that the first file declares, else in alphabetical order. Without names,
    classes are called by their number, from 0 to the highest that occurs.

    Args:
        splits: the labels of each file of each split.
        label: what they are called in errors.

    Raises:
        ValueError: if files cannot mean the same classes, or a row has no class; names the files
            or the row.
    """
    columns = [column for of_split in splits.values() for column in of_split]
    named = [column for column in columns if column.names is not None]
    declaring = next((column for column in named if column.declared), None)
    if declaring is not None and declaring.names is not None:
        order, declared_by = declaring.names, declaring.file
    elif named:
        unnamed = next((c for c in columns if c.names is None and _has_labels(c)), None)
        if unnamed is not None:
            raise ValueError(
                f"{label}: {named[0].file} and {unnamed.file} must both hold class names or both "
                "class numbers"
            )
        order, declared_by = tuple(sorted({n for c in named for n in c.names or ()})), "no file"
        rows = sum(len(column.numbers) for column in columns)
        if len(order) > max(MOST_FREE_NAMES, rows // 2):
            raise ValueError(
                f"{label} holds {len(order)} different texts in {rows} rows: these are no classes; "
                "data.label_column names another column"
            )
    else:
        order, declared_by = _counted(columns, label), "no file"
    if not any(map(_has_labels, columns)):
        raise ValueError(f"{label}: no row has a label, all are empty or -1")
    if len(order) < 2:
        only = f", {printable(order[0])!r}" if order else ""
        raise ValueError(f"{label} must tell at least two classes apart, got one{only}")
    if len(set(order)) < len(order):
        twice = next(name for name in order if order.count(name) > 1)
        raise ValueError(f"{label}: {declared_by} calls two classes {printable(twice)!r}")
    numbers: dict[str, np.ndarray] = {}
    for split, of_split in splits.items():
        parts = []
        for column in of_split:
            try:
                part = _renumbered(column, order, declared_by)
            except ValueError as error:
                raise ValueError(f"{label}: {error}") from error
            _check_range(column, part, len(order), label)
            parts.append(part)
        numbers[split] = np.concatenate(parts)
    return Classes(_shown(order, label), numbers)


def has_labels(columns: Sequence[LabelColumn]) -> bool:
    """Tell whether any row has a label; test splits whose labels are kept secret have none."""
    return any(map(_has_labels, columns))


def _has_labels(column: LabelColumn) -> bool:
    return bool((column.numbers != UNLABELLED).any())


def _renumbered(
    column: LabelColumn, order: tuple[str, ...], declared_by: str
) -> Int64[np.ndarray, "rows"]:
    """Return a file's class numbers in the common order."""
    if column.names is None or column.names == order:
        return column.numbers
    place = {name: number for number, name in enumerate(order)}
    unknown = [name for name in column.names if name not in place]
    if unknown:
        raise ValueError(
            f"{column.file} has a class {printable(unknown[0])!r} that {declared_by} does not have"
            if column.file != declared_by
            else f"{column.file} holds {printable(unknown[0])!r}, which it does not declare"
        )
    if not column.names:
        return column.numbers
    known = (column.numbers >= 0) & (column.numbers < len(column.names))
    table = np.array([place[name] for name in column.names])
    # What is no number of this file stays what it is, to be refused by its row.
    return np.where(known, table[np.where(known, column.numbers, 0)], column.numbers)


def _counted(columns: Sequence[LabelColumn], label: str) -> tuple[str, ...]:
    highest, where, rows = -1, "", sum(len(column.numbers) for column in columns)
    for column in columns:
        if len(column.numbers) and column.numbers.max() > highest:
            row = int(column.numbers.argmax())
            highest, where = int(column.numbers[row]), column.place(row)
    # Numbers that are no class numbers (years, ids) would make for a very wide output layer.
    if highest >= max(rows, 1):
        raise ValueError(
            f"{label} must hold class numbers from 0 to {max(rows, 1) - 1} (there are {rows} "
            f"rows), got {highest} in {where}"
        )
    return tuple(map(str, range(highest + 1)))


def _check_range(column: LabelColumn, numbers: np.ndarray, num_classes: int, label: str) -> None:
    bad = np.flatnonzero((numbers < 0) | (numbers >= num_classes))
    if len(bad):
        got = "no label" if numbers[bad[0]] == UNLABELLED else str(numbers[bad[0]])
        raise ValueError(
            f"{label} must hold class numbers from 0 to {num_classes - 1}, got {got}"
            f"{' (empty or -1)' if got == 'no label' else ''} in {column.place(int(bad[0]))}"
            f"{f' and {len(bad) - 1} more' if len(bad) > 1 else ''}"
        )


def _shown(names: tuple[str, ...], label: str) -> tuple[str, ...]:
    shown = tuple(map(printable, names))
    if len(set(shown)) < len(shown):
        twice = next(name for name in shown if shown.count(name) > 1)
        raise ValueError(f"{label}: two classes look alike, {twice!r}")
    return shown
