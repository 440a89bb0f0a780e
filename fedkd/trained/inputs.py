"""Files -> inputs as a model takes them: read, sized and coloured as they were for its training."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from fedkd.data import DataSettings
from fedkd.data.arrays import inputs_in, npz_arrays
from fedkd.data.csv_tables import csv_tables
from fedkd.data.features import read_features
from fedkd.data.images import open_image, stack_images
from fedkd.data.labels import row_of
from fedkd.data.layouts import PICTURE_ENDINGS
from fedkd.data.public_source import matched
from fedkd.data.tables import ArrowTable, ParquetTable, Table, TableSplit, choose_inputs
from fedkd.data.texts import read_texts
from fedkd.names import printable
from fedkd.trained.files import ModelInfo

if TYPE_CHECKING:
    import pyarrow as pa

TABLE_ENDINGS = (".parquet", ".csv", ".tsv", ".npz")
"""Files with a row for each input."""

PIECE_ROWS = 256
"""Rows of a table that are read at once."""

Read = Callable[[np.ndarray], Float32[np.ndarray, "_rows *_shape"]]


def row_named(row: int) -> str:
    """Say which row of a file is meant.

    Args:
        row: its number, from 0.
    """
    return row_of("", row).removeprefix(", ")


class Piece(NamedTuple):
    """Inputs from one file.

    Attributes:
        file: where they are from.
        rows: their numbers in the file, from 0; None: the file is one input.
        inputs: pixels in [0, 1], features as they are, or numbers of tokens; None where they
            cannot be read.
        problem: why not.
        named: says which row of the file a number is, such as ``line 7``.
    """

    file: Path
    rows: Sequence[int] | None
    inputs: Float32[np.ndarray, "rows *shape"] | None
    problem: str = ""
    named: Callable[[int], str] = row_named

    @property
    def where(self) -> str:
        """The file, and its first row where it has several."""
        return str(self.file) if self.rows is None else f"{self.file}, {self.named(self.rows[0])}"


class NoInputsError(ValueError):
    """There is nothing to predict; the text says where."""


def files_in(paths: Sequence[Path], info: ModelInfo) -> list[Path]:
    """Return the files that are meant, folders opened: what the model can take, in order.

    What is hidden is left out.

    Args:
        paths: files and folders.
        info: of the model.

    Raises:
        NoInputsError: a folder holds none.
    """
    endings = (*TABLE_ENDINGS, *(PICTURE_ENDINGS if info.shape.kind == "pictures" else ()))
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = []
        for place, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            inside += [
                Path(place) / name
                for name in sorted(names)
                if not name.startswith(".") and _ending(name) in endings
            ]
        if not inside:
            what = f"{info.shape.kind} in {', '.join(TABLE_ENDINGS)}"
            raise NoInputsError(
                f"{str(path)!r} holds no "
                + (f"picture files, and no {what}" if info.shape.kind == "pictures" else what)
            )
        found += inside
    return found


def read_pieces(file: Path, info: ModelInfo, column: str | None = None) -> Iterator[Piece]:
    """Read the inputs of one file, in pieces; what cannot be read is a piece with the reason.

    Pictures are brought to the model's size (bilinear) and to its channels: grey fills all
    colours, colours become grey by their luma. Columns of features and of text are those that
    the model was trained on, by their names.

    Args:
        file: a picture or a table.
        info: of the model.
        column: of a table, with pictures or texts; None: that of training, or the only one.
    """
    try:
        if _ending(file.name) not in TABLE_ENDINGS:
            yield Piece(file, None, _picture(file, info))
            return
        if not file.exists():
            raise FileNotFoundError(file)
        count, read, named = _opened(file, info, column)
    except (ValueError, OSError) as error:
        yield Piece(file, None, None, _reason(error).removeprefix(f"{printable(file.name)} "))
        return
    for start in range(0, count, PIECE_ROWS):
        rows = np.arange(start, min(start + PIECE_ROWS, count))
        try:
            yield Piece(file, rows.tolist(), read(rows), named=named)
        except ValueError:
            # Some of them cannot be read; the others can.
            for row in rows:
                yield _one(file, int(row), read, named)


def _one(file: Path, row: int, read: Read, named: Callable[[int], str]) -> Piece:
    try:
        return Piece(file, [row], read(np.array([row])), named=named)
    except ValueError as error:
        # Whoever shows the reason says where it is.
        reason = _reason(error).removeprefix(f"{printable(file.name)}, {named(row)}")
        return Piece(file, [row], None, reason.lstrip(":, "), named)


class _Rows(ArrowTable):
    """Rows that are no file's; they are called by their places, as Python counts."""

    def where(self, row: int) -> str:
        return f"row {row} (counted from 0)"


def inputs_of_rows(
    rows: Mapping[str, Any] | Sequence[Mapping[str, Any]], info: ModelInfo
) -> Float32[np.ndarray, "rows *shape"]:
    """Return rows of a table as inputs, prepared as for training.

    Args:
        rows: columns by name, all of one length, or a mapping for each row.
        info: of the model.

    Raises:
        ValueError: the model learnt from no table, or a row lacks what it takes; names the row and
            the column.
    """
    if isinstance(rows, Mapping):
        columns = {str(name): _plain(values) for name, values in rows.items()}
    else:
        names = dict.fromkeys(str(name) for row in rows for name in row)
        columns = {name: [row.get(name) for row in rows] for name in names}
    wanted: set[str | None] = {column.name for column in info.reading.columns}
    wanted = wanted or {info.reading.column}
    cells = {
        name: _arrow(name, values)
        for name, values in columns.items()
        if name in wanted or wanted == {None}
    }
    if len({len(each) for each in cells.values()}) > 1:
        lengths = ", ".join(f"{printable(name)}: {len(each)}" for name, each in cells.items())
        raise ValueError(f"columns must have one length, got {lengths}")
    import pyarrow as pa

    table = _Rows(pa.table(cells), "the table", {})
    return _of_table(table, info, info.reading.column)(np.arange(table.num_rows))


def _plain(values: Any) -> list[Any]:
    """Return a column as a list: of a list, an array, or a column of a data frame."""
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _arrow(name: str, values: list[Any]) -> "pa.Array":
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowException, TypeError, ValueError) as error:
        reason = printable(str(error).splitlines()[0])
        raise ValueError(
            f"column {printable(name)!r} must hold values of one type: {reason}"
        ) from error


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "it does not exist"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return printable(" ".join(str(error).split()))


def _picture(file: Path, info: ModelInfo) -> Float32[np.ndarray, "one *shape"]:
    if not file.exists():
        raise FileNotFoundError(file)
    if info.shape.kind != "pictures":
        raise ValueError(f"the model takes {info.shape}: give them in {', '.join(TABLE_ENDINGS)}")
    pixels = stack_images([open_image(file)], resize=_size(info), name=lambda _: "the picture")
    return _as_trained(pixels, info)


def _size(info: ModelInfo) -> tuple[int, int]:
    _, height, width = info.input_shape
    return height, width


def _as_trained(
    pixels: Float32[np.ndarray, "rows channels height width"], info: ModelInfo
) -> Float32[np.ndarray, "rows *shape"]:
    return matched(pixels, channels=info.input_shape[0], size=_size(info))


def _opened(
    file: Path, info: ModelInfo, column: str | None
) -> tuple[int, Read, Callable[[int], str]]:
    """Return how many rows a table has, what reads them, and what they are called.

    Raises:
        ValueError: it cannot be read, or holds nothing that the model takes.
    """
    reading, kind = info.reading, info.shape.kind
    if _ending(file.name) == ".npz":
        count, read = inputs_in(npz_arrays(file), info.shape, reading.encoder)
        if kind == "pictures":
            return count, lambda rows: _as_trained(read(rows), info), "index {}".format
        return count, read, "index {}".format
    column = column or reading.column
    if _ending(file.name) == ".parquet":
        table: Table = ParquetTable(file)
    else:
        settings = DataSettings(
            source=str(file), text_column=column if reading.encoder is not None else None
        )
        (table,) = csv_tables({"train": [file]}, settings)["train"]

    def named(row: int) -> str:
        return table.where(row).removeprefix(f"{table.name}, ")

    return table.num_rows, _of_table(table, info, column), named


def _of_table(table: Table, info: ModelInfo, column: str | None) -> Read:
    """Return what reads the rows of a table.

    Raises:
        ValueError: it lacks what the model takes.
    """
    reading = info.reading
    if info.shape.kind == "pictures":
        return _pictures_of(table, DataSettings(resize=_size(info)), column, info)
    if reading.encoder is not None and column is not None:
        encoder, name = reading.encoder, column
        _check_there(table, [name])
        return lambda rows: read_texts([table], name, encoder, rows)
    if reading.columns:
        _check_there(table, [each.name for each in reading.columns])
        return lambda rows: read_features([table], reading.columns, rows)
    raise ValueError(
        "the model learnt from arrays, not from columns of a table: give an NPZ file with an "
        "array x"
    )


def _pictures_of(table: Table, settings: DataSettings, column: str | None, info: ModelInfo) -> Read:
    if column is not None and column in table.schema.names:
        settings = settings.model_copy(update={"image_column": column})
    found = choose_inputs(table, settings, "")
    if found.kind != "pictures":
        raise ValueError(f"{table.name} holds {found.kind}, the model takes {info.shape}")
    (name,) = found.columns
    split = TableSplit([table], settings)
    return lambda rows: _as_trained(split.read(name, rows), info)


def _check_there(table: Table, columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in table.schema.names]
    if missing:
        raise ValueError(
            f"{table.name} lacks column {printable(', '.join(missing[:5]))}, which the model "
            f"learnt from; it has {printable(', '.join(table.schema.names[:12]))}"
        )
