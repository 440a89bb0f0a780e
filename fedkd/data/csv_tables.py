"""CSV files: every cell is read as text, then columns become numbers or stay text.

A column is numbers where every cell that is not empty is one, in all files of the source. Blanks
around numbers, names and categories are dropped, those of a text to learn from are kept.
"""

import csv
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkd.data.kinds import is_number
from fedkd.data.memory import memory_bytes
from fedkd.data.settings import DataSettings
from fedkd.data.tables import TEXT_COLUMNS, ArrowTable, readable
from fedkd.names import printable

if TYPE_CHECKING:
    import pyarrow as pa

_AS_TEXT: dict[str, Any] = {"encoding": "utf-8-sig", "newline": "", "errors": "replace"}

DELIMITERS = (",", ";", "\t")

MOST_COLUMNS = 100_000
LONGEST_HEADER = 10_000_000
"""Characters of the first line."""
READ_COPIES = 3
"""How much memory a file takes while it is read, in sizes of the file."""


class CSVTable(ArrowTable):
    """A CSV file in memory; its rows are called by the lines of the file."""

    def __init__(self, table: "pa.Table", path: Path) -> None:
        super().__init__(table, printable(path.name), {})
        self._path = path

    def where(self, row: int) -> str:
        """Say on which line of the file a row begins; the header is line 1."""
        if len(self._lines) != self.num_rows:
            return super().where(row)
        return f"{self.name}, line {self._lines[row]}"

    @cached_property
    def _lines(self) -> "array[int]":
        """The line on which each row begins: cells may hold line ends, and blank lines are none."""
        lines = array("q")
        with readable(self.name), self._path.open(**_AS_TEXT) as file:
            delimiter = _delimiter(self._path, file.readline(LONGEST_HEADER))
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter)
            begins = 1
            with suppress(csv.Error):  # a cell too long for this reader: rows have their numbers
                for cells in reader:
                    if cells:
                        lines.append(begins)
                    begins = reader.line_num + 1
        return lines[1:]


def csv_tables(
    files: Mapping[str, Sequence[Path]], settings: DataSettings
) -> dict[str, list[CSVTable]]:
    """Read the files of each split.

    Args:
        files: by split.
        settings: which column is text to learn from.

    Raises:
        ValueError: if a file is no table with a header line; names it.
    """
    cells = {split: [(path, _cells(path)) for path in paths] for split, paths in files.items()}
    together = [table for of_split in cells.values() for _, table in of_split]
    columns = dict.fromkeys(name for table in together for name in table.column_names)
    texts = {settings.text_column} if settings.text_column else set(TEXT_COLUMNS)
    numbers = {
        name
        for name in columns
        if all(_are_numbers(table[name]) for table in together if name in table.column_names)
    }
    return {
        split: [CSVTable(_typed(table, numbers, texts), path) for path, table in of_split]
        for split, of_split in cells.items()
    }


def _cells(path: Path) -> "pa.Table":
    """Read a file as text; empty cells have none."""
    import pyarrow as pa
    from pyarrow import csv as pacsv

    name = printable(path.name)
    with readable(name):
        size = path.stat().st_size
        with path.open(**_AS_TEXT) as file:
            first = file.readline(LONGEST_HEADER)
            delimiter = _delimiter(path, first)
            file.seek(0)
            header = next(csv.reader(file, delimiter=delimiter), [])
    if READ_COPIES * size > memory_bytes():
        raise ValueError(f"{name} has {size / 2**30:.1f} GiB, too many for this machine's memory")
    _check_header(name, [cell.strip() for cell in header])
    with readable(name):
        table = pacsv.read_csv(
            path,
            parse_options=pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pacsv.ConvertOptions(
                column_types=dict.fromkeys(header, pa.large_string()),
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
    return table.rename_columns([cell.strip() for cell in table.column_names])


def _delimiter(path: Path, first: str) -> str:
    """Return what stands between the cells of the first line most often."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    return max(DELIMITERS, key=first.count)


def _check_header(file: str, header: Sequence[str]) -> None:
    if not header:
        raise ValueError(f"{file} is empty")
    if len(header) > MOST_COLUMNS:
        raise ValueError(f"{file} may have at most {MOST_COLUMNS:,} columns, got {len(header):,}")
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{file} has more than one column {printable(twice)!r}: name them apart")
    if all(map(is_number, header)):
        shown = printable(", ".join(header[:6]))
        raise ValueError(
            f"{file} has no header: its first line must name the columns, as in a,b,label, got "
            f"{shown}"
        )


def _are_numbers(column: "pa.ChunkedArray") -> bool:
    import pyarrow as pa

    try:
        _numbers(column)
    except pa.ArrowInvalid:
        return False
    return True


def _numbers(column: "pa.ChunkedArray") -> "pa.ChunkedArray":
    """Return whole numbers where all are, such as ids; else fractions."""
    import pyarrow as pa
    import pyarrow.compute as pc

    cells = pc.utf8_trim_whitespace(column)
    try:
        return cells.cast(pa.int64())
    except pa.ArrowInvalid:
        return cells.cast(pa.float64())


def _typed(table: "pa.Table", numbers: set[str], texts: set[str]) -> "pa.Table":
    import pyarrow.compute as pc

    for place, name in enumerate(table.column_names):
        column = table[name]
        if name in numbers:
            table = table.set_column(place, name, _numbers(column))
        elif name not in texts:
            table = table.set_column(place, name, pc.utf8_trim_whitespace(column))
    return table
