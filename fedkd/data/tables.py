"""Columns of labels and inputs in Parquet and Arrow files.

They are read with pyarrow itself: ``datasets`` would copy Parquet files into a cache and report
their use to a server, even for a local folder.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from fedkd.data.features import FEATURE_COLUMNS
from fedkd.data.images import Pixels, open_image, stack_images
from fedkd.data.kinds import depth, holds_numbers, holds_text, is_list
from fedkd.data.labels import UNLABELLED, LabelColumn, read_label_column, row_of, to_numpy
from fedkd.data.partition_settings import NaturalPartition
from fedkd.data.settings import DataSettings
from fedkd.inputs import Kind
from fedkd.names import printable

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL.Image import Image

LABEL_COLUMNS = ("label", "labels", "fine_label")
OTHER_LABEL_COLUMNS = ("target", "targets", "class", "y")
"""What labels are called where no file notes which column has the classes."""
IMAGE_COLUMNS = ("image", "img")
ROW_NUMBERS = re.compile(r"|Unnamed: \d+|__index_level_\d+__")
"""What pandas calls the numbers of rows when it writes them down, too."""
TEXT_COLUMNS = ("text", "sentence", "sentence1", "content", "review", "question")
NO_PICTURES = ("Audio", "Video", "Pdf", "Nifti")  # what `datasets` keeps as bytes, too

LFS_POINTER = b"version https://git-lfs.github.com"

MOST_ROWS = 50_000_000
PIECE_ROWS = 1024
PIECE_BYTES = 32 * 2**20

Features = Mapping[str, Any]
"""What ``datasets`` notes about columns: name -> ``{"_type": "Image"}`` and the like."""


class NoLabelsError(ValueError):
    """A source does not say which classes its rows are of."""


class Table(ABC):
    """One file of rows."""

    def __init__(self, name: str, schema: "pa.Schema", num_rows: int, features: Features) -> None:
        self.name = name
        self.schema = schema
        self.num_rows = num_rows
        self.features = features

    def where(self, row: int) -> str:
        """Say where a row stands, in words: the number counts from 0."""
        return row_of(self.name, row)

    @abstractmethod
    def column(self, name: str) -> "pa.ChunkedArray":
        """Read a whole column."""

    @abstractmethod
    def pieces(
        self, name: str, sorted_rows: Int64[np.ndarray, "rows"]
    ) -> "Iterator[tuple[int, pa.Array]]":
        """Yield parts of a column that hold some of the rows, and their first row's number."""


class ParquetTable(Table):
    """A Parquet file; a small part of a column is in memory at a time."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        name = printable(path.name)
        _check_fetched(path, name)
        with readable(name):
            # A small buffer: by default all of a column in a row group would be in memory.
            self._file = pq.ParquetFile(
                path, pre_buffer=False, buffer_size=2**20, page_checksum_verification=True
            )
            schema, num_rows = self._file.schema_arrow, self._file.metadata.num_rows
        super().__init__(name, schema, num_rows, noted_features(schema, name))

    def column(self, name: str) -> "pa.ChunkedArray":
        """Read a whole column; see `Table`."""
        with readable(self.name, name):
            return self._file.read(columns=[name]).column(0)

    def pieces(
        self, name: str, sorted_rows: Int64[np.ndarray, "rows"]
    ) -> "Iterator[tuple[int, pa.Array]]":
        """Yield parts of a column; see `Table`."""
        start = 0
        for group in range(self._file.num_row_groups):
            about = self._file.metadata.row_group(group)
            if _holds_some(sorted_rows, start, start + about.num_rows):
                each = max(about.total_byte_size // max(about.num_rows, 1), 1)
                batches = self._file.iter_batches(
                    batch_size=int(np.clip(PIECE_BYTES // each, 1, PIECE_ROWS)),
                    row_groups=[group],
                    columns=[name],
                )
                first = start
                while True:
                    with readable(self.name, name):
                        batch = next(batches, None)
                    if batch is None:
                        break
                    yield first, batch.column(0)
                    first += len(batch)
            start += about.num_rows


def _check_fetched(path: Path, name: str) -> None:
    """Refuse what a clone without Git LFS leaves in the place of each large file."""
    with readable(name), path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{name} only says where the file is: `git lfs pull` fetches it")


class ArrowTable(Table):
    """A table in memory, or mapped into it."""

    def __init__(self, table: "pa.Table", name: str, features: Features) -> None:
        super().__init__(name, table.schema, table.num_rows, features)
        self._table = table

    @classmethod
    def from_file(cls, path: Path, features: Features) -> "ArrowTable":
        """Map a stream of record batches, as ``datasets`` writes it."""
        import pyarrow as pa

        name = printable(path.name)
        with readable(name):
            table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        return cls(table, name, features or noted_features(table.schema, name))

    def column(self, name: str) -> "pa.ChunkedArray":
        """Read a whole column; see `Table`."""
        with readable(self.name, name):
            column = self._table.column(name)
            column.validate(full=True)  # what is mapped was checked by nobody
            return column

    def pieces(
        self, name: str, sorted_rows: Int64[np.ndarray, "rows"]
    ) -> "Iterator[tuple[int, pa.Array]]":
        """Yield parts of a column; see `Table`."""
        start = 0
        for chunk in self._table.column(name).chunks:
            if _holds_some(sorted_rows, start, start + len(chunk)):
                with readable(self.name, name):
                    chunk.validate(full=True)
                yield start, chunk
            start += len(chunk)


def _holds_some(sorted_rows: np.ndarray, start: int, stop: int) -> bool:
    first, last = np.searchsorted(sorted_rows, (start, stop))
    return bool(first < last)


@contextmanager
def readable(file: str, column: str | None = None) -> Iterator[None]:
    """Name the file, and the column, whose reading fails inside the block."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, MemoryError) as error:
        where = file if column is None else f"{file}, column {printable(column)!r}"
        reason = printable((str(error).splitlines() or [type(error).__name__])[0])
        raise ValueError(f"{where} cannot be read: {reason}") from error


def noted_features(schema: "pa.Schema", file: str) -> Features:
    """Return what ``datasets`` notes about the columns of a file; empty for files of others.

    Raises:
        ValueError: if there is a note that cannot be understood: class names would be lost.
    """
    note = (schema.metadata or {}).get(b"huggingface")
    if note is None:
        return {}
    try:
        table = json.loads(note)
    except (ValueError, RecursionError):
        raise ValueError(
            f"{file}: its note 'huggingface' on the columns is not JSON: write the file anew"
        ) from None
    return _features_in(table)


def saved_features(path: Path) -> Features:
    """Return the same from the ``dataset_info.json`` of ``save_to_disk``; empty without one."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return _features_in({"info": table})


def _features_in(table: object) -> Features:
    for key in ("info", "features"):
        table = table.get(key) if isinstance(table, dict) else None
    return table if isinstance(table, dict) else {}


class TableSplit:
    """The files of one split, in order, as if they were one table."""

    def __init__(
        self,
        tables: Sequence[Table],
        settings: DataSettings,
        *,
        paths_are_pictures: bool = False,
    ) -> None:
        """Hold the tables.

        Args:
            tables: files whose columns have the same names.
            settings: which columns.
            paths_are_pictures: whether a cell may name a file that holds the picture; only for
                files that nobody else wrote.

        Raises:
            ValueError: if the files do not have the same columns.
        """
        self._tables = tables
        self._settings = settings
        self._paths_are_pictures = paths_are_pictures
        first = tables[0]
        for table in tables:
            if set(table.schema.names) != set(first.schema.names):
                raise ValueError(
                    f"{table.name} and {first.name} must have the same columns, got "
                    f"{_columns(table)} and {_columns(first)}"
                )
        rows = sum(table.num_rows for table in tables)
        if not 0 <= rows <= MOST_ROWS:
            raise ValueError(f"at most {MOST_ROWS:,} rows are read, got {rows:,}")

    @property
    def tables(self) -> Sequence[Table]:
        """The files."""
        return self._tables

    def label_column(self) -> str:
        """Return the column of labels.

        Raises:
            ValueError: if it cannot be told; names the setting, or says what the files hold.
        """
        return _label_column(self._tables[0], self._settings)

    def input_columns(self, label_column: str) -> "InputColumns":
        """Return the columns of inputs, and what they hold.

        Raises:
            ValueError: if they cannot be told; names the setting, or says what the files hold.
        """
        return choose_inputs(self._tables[0], self._settings, label_column)

    def labels(self, column: str) -> list[LabelColumn]:
        """Read the labels of each file; a file without the column has none."""
        found = []
        for table in self._tables:
            if column not in table.schema.names:
                found.append(LabelColumn(table.name, np.full(table.num_rows, UNLABELLED)))
                continue
            _check_unique(table, column)
            names = _class_names(table.features.get(column), table.name)
            try:
                found.append(
                    read_label_column(
                        table.column(column), file=table.name, names=names, where=table.where
                    )
                )
            except ValueError as error:
                raise ValueError(f"data.label_column {column!r}: {error}") from error
        return found

    def read(self, column: str, rows: Int64[np.ndarray, "rows"]) -> Pixels:
        """Decode the pictures of ``rows``, which need not be sorted.

        Raises:
            ValueError: if one cannot be read; names its file and row.
        """
        order = np.argsort(rows, kind="stable")
        sorted_rows = rows[order]
        return stack_images(
            self._pictures(column, sorted_rows),
            positions=order,
            resize=self._settings.resize,
            name=lambda index: self._name(int(sorted_rows[index])),
        )

    def _name(self, row: int) -> str:
        """Say where a row stands."""
        for table in self._tables:
            if row < table.num_rows:
                return table.where(row)
            row -= table.num_rows
        raise IndexError(row)

    def _pictures(
        self, column: str, sorted_rows: Int64[np.ndarray, "rows"]
    ) -> "Iterator[Image | np.ndarray]":
        start = 0
        for table in self._tables:
            first, last = np.searchsorted(sorted_rows, (start, start + table.num_rows))
            if first < last:
                yield from self._pictures_of(table, column, sorted_rows[first:last] - start)
            start += table.num_rows

    def _pictures_of(
        self, table: Table, column: str, rows: Int64[np.ndarray, "rows"]
    ) -> "Iterator[Image | np.ndarray]":
        if column not in table.schema.names:
            raise ValueError(f"{table.name} has no column {column!r}, got {_columns(table)}")
        _check_unique(table, column)
        feature = table.features.get(column)
        mode = feature.get("mode") if isinstance(feature, dict) else None
        kind = _kind(table, column)
        if kind is None:
            raise ValueError(f"{table.name}, column {column!r}: {_no_picture(table, column)}")
        for start, piece in table.pieces(column, rows):
            first, last = np.searchsorted(rows, (start, start + len(piece)))
            cells = _numbers(piece) if kind == "array" else _encoded(piece)
            for row in rows[first:last]:
                try:
                    yield self._picture(cells, int(row) - start, mode)
                except ValueError as error:
                    raise ValueError(f"{table.where(int(row))}: {error}") from error

    def _picture(self, cells: "pa.Array", position: int, mode: str | None) -> "Image | np.ndarray":
        import pyarrow as pa

        cell = cells[position]
        if pa.types.is_struct(cells.type):
            content, path = cell["bytes"].as_py(), cell["path"].as_py()
            if content is None and path is not None:
                if not self._paths_are_pictures:
                    raise ValueError(
                        f"the picture is not in the file, which only names {printable(path)!r}"
                    )
                return open_image(Path(path), mode=mode)
        elif not pa.types.is_binary(cells.type) and not pa.types.is_large_binary(cells.type):
            return _array_of(cell)
        else:
            content = cell.as_py()
        if content is None:
            raise ValueError("there is no picture")
        return open_image(content, mode=mode)


def _columns(table: Table) -> str:
    return printable(", ".join(table.schema.names))


def _check_unique(table: Table, column: str) -> None:
    if table.schema.names.count(column) > 1:
        raise ValueError(f"{table.name} has more than one column {column!r}: leave one out")


def _class_names(feature: object, file: str) -> tuple[str, ...] | None:
    names = feature.get("names") if isinstance(feature, dict) else None
    if not names:
        return None
    if not isinstance(names, list):
        raise ValueError(f"{file}: its note on class names must be a list, got {names!r}")
    return tuple(map(str, names))


# --- which columns hold the inputs ------------------------------------------------------------


class InputColumns(NamedTuple):
    """Which columns hold the inputs, and what these are.

    Attributes:
        kind: pictures and texts are in one column, features in one or several.
        columns: their names, in the order of the features.
        left_aside: columns that hold the numbers of rows, and beside a text those that could be
            features.
    """

    kind: Kind
    columns: tuple[str, ...]
    left_aside: tuple[str, ...] = ()


def choose_inputs(table: Table, settings: DataSettings, label_column: str) -> InputColumns:
    """Tell which columns hold the inputs.

    What a setting names, else pictures, else lists of numbers, else a column of text that is
    called like one, else all columns of numbers and of text but that of the labels and that of
    natural ids; a single column of text is text.

    Raises:
        ValueError: if they cannot be told; names the setting, or says what the file holds.
    """
    names = table.schema.names
    if settings.image_column is not None:
        _check_known(settings, "image_column", settings.image_column, names)
        if _kind(table, settings.image_column) is None:
            raise ValueError(
                f"data.image_column {settings.image_column!r}: "
                f"{_no_picture(table, settings.image_column)}"
            )
        return InputColumns("pictures", (settings.image_column,))
    if settings.feature_columns is not None:
        for name in settings.feature_columns:
            _check_known(settings, "feature_columns", name, names)
        return InputColumns("features", settings.feature_columns)
    if settings.text_column is not None:
        _check_known(settings, "text_column", settings.text_column, names)
        if not holds_text(_type(table, settings.text_column)):
            raise ValueError(
                f"data.text_column {settings.text_column!r}: holds "
                f"{_what_is_in(table, settings.text_column)}, not text"
            )
        return InputColumns("text", (settings.text_column,))
    noted = [name for name in names if _noted(table, name) in ("Image", "Array2D", "Array3D")]
    found = [name for name in dict.fromkeys(names) if _kind(table, name) is not None]
    for candidates in ([n for n in IMAGE_COLUMNS if n in found][:1], noted, found):
        if candidates:
            picture = _only(candidates, "image_column", "the pictures")
            return InputColumns("pictures", (picture,))
    others = {label_column}
    if isinstance(settings.partition, NaturalPartition):
        others.add(settings.partition.named_column)
    rest = [name for name in names if name not in others and not ROW_NUMBERS.fullmatch(name)]
    numbers = tuple(name for name in names if ROW_NUMBERS.fullmatch(name))
    lists = [name for name in rest if depth(_type(table, name)) == 1]
    for candidates in ([name for name in FEATURE_COLUMNS if name in lists][:1], lists):
        if candidates:
            of_lists = _only(candidates, "feature_columns", "the features")
            return InputColumns("features", (of_lists,))
    plain = [name for name in rest if _is_plain(table, name)]
    texts = [name for name in plain if holds_text(_type(table, name))]
    for candidates in ([name for name in TEXT_COLUMNS if name in texts][:1], plain):
        if candidates and candidates == texts[:1]:
            beside = tuple(name for name in plain if name != candidates[0])
            return InputColumns("text", (candidates[0],), beside)
    if not plain:
        raise ValueError(_nothing_to_see(table))
    return InputColumns("features", tuple(plain), numbers)


def _only(candidates: Sequence[str], setting: str, what: str) -> str:
    if len(set(candidates)) > 1:
        raise ValueError(
            f"data.{setting} must say which column holds {what}: {printable(', '.join(candidates))}"
        )
    return candidates[0]


def _is_plain(table: Table, name: str) -> bool:
    kind = _type(table, name)
    return holds_numbers(kind) or holds_text(kind)


def _label_column(table: Table, settings: DataSettings) -> str:
    names = table.schema.names
    if settings.label_column is not None:
        _check_known(settings, "label_column", settings.label_column, names)
        return settings.label_column
    noted = [name for name in names if _noted(table, name) == "ClassLabel"]
    known = [name for name in LABEL_COLUMNS if name in names]
    if known or len(noted) == 1:
        return (known or noted)[0]
    others = [name for name in OTHER_LABEL_COLUMNS if name in names]
    if others:
        return others[0]
    raise NoLabelsError(
        f"data.label_column must name the column of classes of data.source {settings.source!r}; "
        f"known: {_columns(table)}"
    )


def _check_known(settings: DataSettings, field: str, asked: str, names: Sequence[str]) -> None:
    if asked not in names:
        raise ValueError(
            f"data.{field} must name a column of data.source {settings.source!r}, got {asked!r}; "
            f"known: {printable(', '.join(names))}"
        )


def _noted(table: Table, column: str) -> str | None:
    feature = table.features.get(column)
    kind = feature.get("_type") if isinstance(feature, dict) else None
    return kind if isinstance(kind, str) else None


def _kind(table: Table, column: str) -> str | None:
    """Tell how a column holds pictures: ``encoded``, as an ``array`` of numbers, or not at all."""
    import pyarrow as pa

    if _noted(table, column) in NO_PICTURES:
        return None
    kind = _type(table, column)
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
        # A column that was written without a single picture inside has no type.
        return "encoded" if _is_bytes(kind) or pa.types.is_null(kind) else None
    if _is_bytes(kind):
        return "encoded"
    return "array" if depth(kind) in (2, 3) else None


def _type(table: Table, column: str) -> "pa.DataType":
    return table.schema.field(table.schema.names.index(column)).type


def _is_bytes(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or kind == pa.binary_view()
    )


def _what_is_in(table: Table, column: str) -> str:
    """Say in words what a column holds that is no picture."""
    import pyarrow as pa

    noted = _noted(table, column)
    if noted in NO_PICTURES:
        return noted.lower() if noted else ""
    kind = _type(table, column)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view():
        return "text"
    if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
        return "paths of files instead of what is in them"
    return "numbers" if depth(kind) in (0, 1) else str(kind)


def _no_picture(table: Table, column: str) -> str:
    return (
        f"holds {_what_is_in(table, column)}, not pictures (encoded ones in a struct with 'bytes' "
        "or as binary, or lists of lists of numbers)"
    )


def _nothing_to_see(table: Table) -> str:
    rest = [name for name in table.schema.names if name not in LABEL_COLUMNS]
    what = " and ".join({_what_is_in(table, name): name for name in rest}) or "nothing but labels"
    shown = ", ".join(
        f"{printable(name)}: {printable(str(table.schema.field(position).type))}"
        for position, name in enumerate(table.schema.names[:6])
    )
    return (
        f"{table.name} holds {what} ({shown}), which is not read: pictures are, encoded ones in a "
        "struct with 'bytes' or as binary, or lists of lists of numbers; numbers, lists of numbers "
        "and text"
    )


# --- cells ------------------------------------------------------------------------------------


def _encoded(piece: "pa.Array") -> "pa.Array":
    """Bring a column of encoded pictures to binary, or to a struct of ``bytes`` and ``path``."""
    import pyarrow as pa

    if pa.types.is_struct(piece.type):
        empty = pa.nulls(len(piece), pa.string())
        content, path = (
            # Of an empty struct, unlike `field`, these parts are empty, too.
            dict(zip((f.name for f in piece.type), piece.flatten(), strict=True)).get(name, empty)
            for name in ("bytes", "path")
        )
        return pa.StructArray.from_arrays(
            [content.cast(pa.large_binary()), path], names=["bytes", "path"]
        )
    return piece.cast(pa.large_binary())


def _numbers(piece: "pa.Array") -> "pa.Array":
    import pyarrow as pa

    return piece.storage if isinstance(piece, pa.ExtensionArray) else piece


def _array_of(cell: "pa.Scalar") -> "Image | np.ndarray":
    """Turn nested lists into a picture: whole numbers are 0 to 255, others 0 to 1.

    Returns:
        height, width, channels; a `PIL` image for whole numbers.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    from PIL import Image

    values = cell.values
    if values is None:
        raise ValueError("there is no picture")
    shape = [len(values)]
    while True:
        if values.null_count:
            raise ValueError("the picture has empty cells")
        if not is_list(values.type):
            break
        if not len(values):
            raise ValueError("the picture is empty")
        lengths = pc.unique(pc.list_value_length(values)).to_pylist()
        if len(lengths) != 1:
            raise ValueError("the lines of the picture are not of one length")
        shape.append(lengths[0])
        values = values.flatten()
    if not len(values):
        raise ValueError("the picture is empty")
    most = 255 if pa.types.is_integer(values.type) else 1
    numbers = to_numpy(values.cast(pa.uint8()) if pa.types.is_boolean(values.type) else values)
    if not (numbers.min() >= 0 and numbers.max() <= most):
        raise ValueError(
            f"{'whole numbers' if most == 255 else 'fractions'} must be from 0 to {most}, got "
            f"{numbers.min()} to {numbers.max()}"
        )
    pixels = _channels_last(numbers.reshape(shape))
    if most == 1:
        return pixels.astype(np.float32)
    plain = pixels.astype(np.uint8)
    return Image.fromarray(plain[:, :, 0] if plain.shape[2] == 1 else np.ascontiguousarray(plain))


def _channels_last(numbers: np.ndarray) -> np.ndarray:
    if numbers.ndim == 2:
        return numbers[:, :, None]
    first, last = numbers.shape[0] in (1, 3), numbers.shape[2] in (1, 3)
    if first == last:
        size = "x".join(map(str, numbers.shape))
        raise ValueError(f"one of the first and the last axis must be 1 or 3 channels, got {size}")
    return numbers if last else numbers.transpose(1, 2, 0)
