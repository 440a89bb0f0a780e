"""Rows of a run in two forms that say the same: JSON lines, and columns of a tenth of their size.

A file of rows, such as ``metrics.jsonl``, is a text of JSON lines. Its newest lines stand in the
file itself. At checkpoints older ones are moved into parts beside it,
``parts/metrics-<from>-<to>.parquet``, each of which holds the bytes ``from`` to ``to`` of the text.
A file whose beginning was moved says how much in its first line, ``{"bytes_before": 181736}``: that
many bytes are in parts. Replacing that one file is what moves lines: until then the new part does
not count, and afterwards its lines are nowhere else. Whatever moment a process is killed at, no row
is lost and none is there twice.

A part gives its lines back to the last byte. A column holds the numbers or texts that rows have
under one name; ``_shape`` says which names a row has, in which order (``fedkd`` in the footer lists
them). What has no column of its own is kept as JSON text, and a line that JSON would not write like
that is kept as it is, in ``_line``.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from re import fullmatch
from typing import Any

FOLDER = "parts"
LEAST_ROWS = 1000
"""Of fewer rows no part is made: one of 8 rows takes as many bytes as the lines."""
MOST_ROWS = 2**17
"""In a part, so that making and reading one takes little memory."""

_HEADER = b'{"bytes_before": '
_KEY = r"[A-Za-z0-9 _/.+-]{1,80}"
_MOST_SHAPES = 1000
_MOST_COLUMNS = 1000
_META = "fedkd"
_SHAPE, _LINE = "_shape", "_line"
_NONE = -1


class DamagedFileError(ValueError):
    """A file of a run that is not as it was written.

    Attributes:
        path: of the file.
        reason: what is wrong with it, and where.
    """

    def __init__(self, path: Path, reason: object) -> None:
        self.path = path
        self.reason = " ".join(str(reason).split())[:200]
        super().__init__(f"{path} is damaged: {self.reason}")


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a file of rows: its bytes from ``first`` to before ``end``."""

    path: Path
    first: int
    end: int


def parts_of(path: Path) -> list[Part]:
    """Return the parts that lie beside a file of rows, whether they count or not, in order."""
    found = []
    for each in (path.parent / FOLDER).glob(f"{path.stem}-*.parquet"):
        span = fullmatch(rf"{path.stem}-(\d+)-(\d+)", each.stem)
        if span is not None:
            found.append(Part(each, int(span[1]), int(span[2])))
    return sorted(found, key=lambda part: (part.first, part.end))


def header(before: int) -> bytes:
    """Return how a file begins whose first ``before`` bytes are in parts."""
    return b"%s%d}\n" % (_HEADER, before) if before else b""


def bytes_before(first_line: bytes) -> int:
    """Return how many bytes are in parts, from the first line of a file."""
    said = fullmatch(rb"(\d{1,18})\}\n", first_line.removeprefix(_HEADER))
    return int(said[1]) if said is not None and first_line.startswith(_HEADER) else 0


def chunks(path: Path, start: int = 0) -> Iterator[bytes]:
    """Yield the text of a file of rows from some byte on: what is in parts first.

    Every chunk but the last ends with a line; the last may end with a line that is being written.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: names the part that is not there or cannot be read.
    """
    # The file first: what it counts on stays where it is while others are added.
    with path.open("rb") as lines:
        before = bytes_before(first := lines.readline())
        beginning = len(first) if before else 0
        for part in counting(path, before):
            if part.end > start:
                yield read_part(part)[max(start - part.first, 0) :]
        lines.seek(beginning + max(start - before, 0))
        while block := lines.read(2**22):
            yield block + lines.readline()


def rows_and_lines(path: Path) -> Iterator[dict[str, Any] | bytes]:
    """Yield the rows that are in parts, then the lines of a file of rows; see `chunks`.

    Rows of parts are not written as lines to be read again; a line that is none of ours is bytes.
    """
    with path.open("rb") as lines:
        before = bytes_before(lines.readline())
        if not before:
            lines.seek(0)
        for part in counting(path, before):
            yield from _rows(part)
        yield from lines


def counting(path: Path, before: int) -> list[Part]:
    """Return the parts that hold the first ``before`` bytes of a file of rows.

    Raises:
        DamagedFileError: there are none that do.
    """
    by_first = {part.first: part for part in parts_of(path) if part.end <= before} if before else {}
    chain: list[Part] = []
    end = 0
    while end < before:
        part = by_first.get(end)
        if part is None or part.end <= end:
            raise DamagedFileError(path, f"the part with its bytes from {end} on is not there")
        chain.append(part)
        end = part.end
    return chain


def write_parts(path: Path, first: int, lines: bytes) -> None:
    """Write whole lines of a file of rows as parts; they do not count yet.

    Args:
        path: of the file of rows.
        first: where in its text the lines begin.
        lines: each with its end.
    """
    (path.parent / FOLDER).mkdir(exist_ok=True)
    every = lines.splitlines(keepends=True) if b"\r" not in lines else _split(lines)
    for begin in range(0, len(every), MOST_ROWS):
        some = every[begin : begin + MOST_ROWS]
        end = first + sum(map(len, some))
        _write(path.parent / FOLDER / f"{path.stem}-{first}-{end}.parquet", some)
        first = end


def _split(lines: bytes) -> list[bytes]:
    return [line + b"\n" for line in lines.split(b"\n")[:-1]]


def _write(path: Path, lines: Sequence[bytes]) -> None:
    # Runs whose rows are few never need it.
    import pyarrow.parquet as parquet

    table, shapes = _columns(lines)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with parquet.ParquetWriter(
            temporary,
            table.schema,
            compression="zstd",
            write_statistics=False,
            write_page_checksum=True,
            store_schema=False,
        ) as file:
            file.write_table(table, row_group_size=MOST_ROWS)
            file.add_key_value_metadata({_META: json.dumps({"shapes": shapes})})
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def sync_folder(folder: Path) -> None:
    """Force onto the disk which files a folder has."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _columns(lines: Sequence[bytes]) -> tuple[Any, Any]:
    """Return a table of lines, and which columns the rows of each shape have."""
    import pyarrow as arrow

    columns: dict[tuple[str, str], int] = {}
    values: list[list[Any]] = []
    shapes: dict[tuple[tuple[str, str], ...], int] = {}
    shape_of: list[int] = []
    raw: list[bytes | None] = []
    for number, line in enumerate(lines):
        row = _plain(line)
        shape = () if row is None else tuple((key, _type(value)) for key, value in row.items())
        fresh = [of for of in shape if of not in columns and of[1] != "null"]
        if row is None or (
            shape not in shapes
            and (len(shapes) == _MOST_SHAPES or len(columns) + len(fresh) > _MOST_COLUMNS)
        ):
            shape_of.append(_NONE)
            raw.append(line)
            continue
        for of in fresh:
            columns[of] = len(columns)
            values.append([])
        shape_of.append(shapes.setdefault(shape, len(shapes)))
        raw.append(None)
        for of, value in zip(shape, row.values(), strict=True):
            if of[1] != "null":
                column = values[columns[of]]
                # Rows that lack it, since the last that has it.
                column.extend([None] * (number - len(column)))
                column.append(_dumped(value) if of[1] == "json" else value)
    for column in values:
        column.extend([None] * (len(lines) - len(column)))
    types = {
        "int": arrow.int64(), "float": arrow.float64(), "bool": arrow.bool_(),
        "text": arrow.string(), "json": arrow.string(),
    }  # fmt: skip
    names = _names(columns)
    arrays = [arrow.array(shape_of, arrow.int32())]
    arrays += [arrow.array(values[place], types[of[1]]) for of, place in columns.items()]
    fields = [_SHAPE, *names]
    if any(line is not None for line in raw):
        arrays.append(arrow.array(raw, arrow.binary()))
        fields.append(_LINE)
    told = [
        [[key, type, names[columns[key, type]] if type != "null" else ""] for key, type in shape]
        for shape in shapes
    ]
    return arrow.Table.from_arrays(arrays, names=fields), told


def _names(columns: dict[tuple[str, str], int]) -> list[str]:
    """Name columns by the rows' keys; of two types under one key, the second by its type too."""
    names: list[str] = []
    for key, type in columns:
        name = key
        while name in (*names, _SHAPE, _LINE):
            name += f" {type}"
        names.append(name)
    return names


def _plain(line: bytes) -> dict[str, Any] | None:
    """Return the row in a line, or None where the row would not give the line again."""
    try:
        row = json.loads(line)
        if not isinstance(row, dict) or _dumped(row).encode() + b"\n" != line:
            return None
    except (ValueError, RecursionError):
        return None
    return row if all(fullmatch(_KEY, key) for key in row) else None


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _type(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if -(2**63) <= value < 2**63 else "json"
    if isinstance(value, float):
        return "float"
    return "text" if isinstance(value, str) else "json"


def read_part(part: Part) -> bytes:
    """Return the lines of a part.

    Raises:
        DamagedFileError: it is not there or not as it was written.
    """
    lines = b"".join(
        row if isinstance(row, bytes) else f"{_dumped(row)}\n".encode() for row in _rows(part)
    )
    if len(lines) != part.end - part.first:
        raise DamagedFileError(part.path, f"it holds {len(lines)} bytes of lines")
    return lines


def _rows(part: Part) -> list[dict[str, Any] | bytes]:
    """Return the rows of a part; lines that are kept as they were, as bytes."""
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(part.path, page_checksum_verification=True)
        shapes = json.loads(file.metadata.metadata[_META.encode()])["shapes"]
        table = file.read(use_threads=False)
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
        numbers = columns[_SHAPE]
        keys = [
            [(key, type, columns[name] if type != "null" else None) for key, type, name in shape]
            for shape in shapes
        ]
        rows: list[dict[str, Any] | bytes] = []
        for place, number in enumerate(numbers):
            if number == _NONE:
                rows.append(bytes(columns[_LINE][place]))
                continue
            rows.append({key: _value(type, column, place) for key, type, column in keys[number]})
    except Exception as error:
        # A reader of a format may say anything to bytes that are not of it.
        raise DamagedFileError(part.path, f"{type(error).__name__}: {error}") from None
    return rows


def _value(type: str, column: Sequence[Any] | None, place: int) -> Any:
    if column is None:
        return None
    value = column[place]
    return json.loads(value) if type == "json" else value
