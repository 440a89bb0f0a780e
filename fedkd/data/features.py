"""Features: columns of numbers, of lists of numbers and of categories -> one list for each row.

A column of numbers or truth values is one feature; one of lists, all alike in shape, is as many as
a list has numbers; one of texts is one feature for each different text, which is 1 where the row
has it and 0 elsewhere (one-hot, in alphabetical order).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32, Int64

from fedkd.data.kinds import (
    columns_in,
    holds_lists,
    holds_numbers,
    holds_text,
    is_number,
    storage,
)
from fedkd.data.labels import to_numpy
from fedkd.data.memory import check_room
from fedkd.names import printable

if TYPE_CHECKING:
    import pyarrow as pa

    from fedkd.data.tables import Table

MOST_CATEGORIES = 100
"""Different texts of a column up to which they are taken for categories."""

FEATURE_COLUMNS = ("features", "feature", "x", "inputs")


@dataclass(frozen=True, slots=True)
class FeatureColumn:
    """How a column becomes features.

    Attributes:
        name: of the column.
        width: how many features it is.
        categories: the texts that it may hold, in order; none for numbers.
    """

    name: str
    width: int
    categories: tuple[str, ...] = ()

    @property
    def feature_names(self) -> tuple[str, ...]:
        """What its features are, in order."""
        if self.categories:
            return tuple(f"{self.name}={category}" for category in self.categories)
        if self.width == 1:
            return (self.name,)
        return tuple(f"{self.name}[{place}]" for place in range(self.width))


def plan_features(tables: "Sequence[Table]", names: Sequence[str]) -> list[FeatureColumn]:
    """Find out how many features each column is.

    Args:
        tables: all files of the source that are used, those for testing too: categories are those
            that occur in any of them.
        names: of the columns, in the order of the features.

    Raises:
        ValueError: if a column can be no features; names it.
    """
    return [_planned(tables, name) for name in names]


def _planned(tables: "Sequence[Table]", name: str) -> FeatureColumn:
    shown = printable(name)
    for table in tables:
        if table.schema.names.count(name) != 1:
            what = "more than one column" if name in table.schema.names else "no column"
            raise ValueError(f"{table.name} has {what} {shown!r}: {columns_in(table)}")
    kinds = [storage(table.schema.field(name).type) for table in tables]
    if all(map(holds_numbers, kinds)):
        return FeatureColumn(name, 1)
    if all(map(holds_lists, kinds)):
        return FeatureColumn(name, _list_width(tables, name))
    if all(map(holds_text, kinds)):
        return _categories(tables, name)
    odd = next(kind for kind in kinds if not _is_known(kind) or kind != kinds[0])
    raise ValueError(
        f"column {shown!r} holds {odd}, which is neither numbers, lists of numbers nor text: name "
        "the columns to learn from with data.feature_columns"
    )


def _is_known(kind: "pa.DataType") -> bool:
    return holds_numbers(kind) or holds_lists(kind) or holds_text(kind)


def _list_width(tables: "Sequence[Table]", name: str) -> int:
    """Return how many numbers the first list has."""
    for table in tables:
        for _, piece in table.pieces(name, np.arange(min(1, table.num_rows))):
            values, rows = _flat(piece.slice(0, 1), table, name, [0])
            if rows and len(values):
                return len(values)
    raise ValueError(f"column {printable(name)!r} holds no numbers")


def _categories(tables: "Sequence[Table]", name: str) -> FeatureColumn:
    found: set[str] = set()
    for table in tables:
        found |= _different(table, name)
        if len(found) > MOST_CATEGORIES:
            _check_no_numbers(tables, name, found)
            raise ValueError(
                f"column {printable(name)!r} of {table.name} holds more than {MOST_CATEGORIES} "
                "different texts: these are no categories; name the columns to learn from with "
                "data.feature_columns, or a column of text with data.text_column"
            )
    _check_no_numbers(tables, name, found)
    if not found:
        raise ValueError(f"column {printable(name)!r} is empty")
    return FeatureColumn(name, len(found), tuple(sorted(found)))


def _check_no_numbers(tables: "Sequence[Table]", name: str, found: set[str]) -> None:
    """Refuse a column of numbers in which some cell is none: a decimal comma, NA, a question mark.

    Raises:
        ValueError: naming such a cell.
    """
    commas = sorted(text for text in found if "," in text and is_number(text.replace(",", ".")))
    if 2 * len(commas) >= len(found) > 0:
        raise ValueError(
            f"column {printable(name)!r} holds numbers with a comma, such as "
            f"{printable(commas[0])!r}: write {printable(commas[0].replace(',', '.'))}"
        )
    numbers = {text for text in found if is_number(text)}
    # Where texts are many, those that are no numbers may be in a file that was not looked at.
    strange = found - numbers or (_strange(tables, name) if len(found) > MOST_CATEGORIES else set())
    if 2 * len(numbers) >= len(found) and strange:
        where = _where(tables, name, strange)
        raise ValueError(
            f"column {printable(name)!r} must hold numbers or texts, not both: {where}: fill it "
            "in, or leave the row out"
        )


def _strange(tables: "Sequence[Table]", name: str) -> set[str]:
    """Return a text of a column that is no number, if there is one."""
    for table in tables:
        for text in _different(table, name):
            if not is_number(text):
                return {text}
    return set()


def _different(table: "Table", name: str) -> set[str]:
    """Return the texts of a column, each once."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = table.column(name)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    different = pc.unique(column.cast(pa.large_string())).to_pylist()
    return {text for text in different if text is not None}


def _where(tables: "Sequence[Table]", name: str, texts: set[str]) -> str:
    for table in tables:
        for row, text in enumerate(table.column(name).to_pylist()):
            if text in texts:
                return f"{table.where(row)} has {printable(text)!r}"
    raise AssertionError(name)


def read_features(
    tables: "Sequence[Table]",
    columns: Sequence[FeatureColumn],
    rows: Int64[np.ndarray, "rows"],
) -> Float32[np.ndarray, "rows features"]:
    """Return the features of rows, which need not be sorted.

    Args:
        tables: the files of one split, in order, as if they were one table.
        columns: as they were planned.
        rows: their numbers.

    Raises:
        ValueError: if a cell is empty or no finite number, or a list is of another length; names
            the file, the row and the column.
    """
    width = sum(column.width for column in columns)
    check_room((len(rows), width), f"{len(rows):,} rows of {width:,} features")
    order = np.argsort(rows, kind="stable")
    sorted_rows = rows[order]
    found = np.empty((len(rows), width), np.float32)
    start = 0
    for table in tables:
        first, last = np.searchsorted(sorted_rows, (start, start + table.num_rows))
        places, own = order[first:last], sorted_rows[first:last] - start
        offset = 0
        for column in columns:
            for positions, values in _column_values(table, column, own):
                found[places[positions], offset : offset + column.width] = values
            offset += column.width
        start += table.num_rows
    return found


def _column_values(
    table: "Table", column: FeatureColumn, rows: Int64[np.ndarray, "rows"]
) -> Iterator[tuple[slice, Float32[np.ndarray, "some width"]]]:
    """Yield parts of ``rows``, and a column's features in them."""
    import pyarrow as pa

    if not len(rows):
        return
    for start, piece in table.pieces(column.name, rows):
        first, last = np.searchsorted(rows, (start, start + len(piece)))
        if first == last:
            continue
        own = rows[first:last]
        cells = piece.take(pa.array(own - start))
        yield slice(first, last), _values(cells, table, column, own)


def _values(
    cells: "pa.Array", table: "Table", column: FeatureColumn, rows: Sequence[int] | np.ndarray
) -> Float32[np.ndarray, "rows width"]:
    import pyarrow as pa
    import pyarrow.compute as pc

    def refused(position: int, why: str) -> ValueError:
        return _refused(table, int(rows[position]), column.name, why)

    if column.categories:
        if pa.types.is_dictionary(cells.type):
            cells = cells.cast(cells.type.value_type)
        _check_filled(cells, refused)
        texts = cells.cast(pa.large_string())
        places = pc.index_in(texts, pa.array(column.categories, pa.large_string()))
        if places.null_count:
            strange = _first_empty(places)
            shown = printable(texts[strange].as_py())
            raise refused(strange, f"holds {shown!r}, which is none of the categories known")
        one_hot: np.ndarray = np.eye(column.width, dtype=np.float32)[to_numpy(places)]
        return one_hot
    values, counts = _flat(cells, table, column.name, rows)
    odd = [place for place, count in enumerate(counts) if count != column.width]
    if odd:
        why = f"must hold {column.width} numbers, as the first row does, got {counts[odd[0]]}"
        raise refused(odd[0], why)
    with np.errstate(over="ignore"):
        numbers = values.astype(np.float32).reshape(len(rows), column.width)
    bad = np.flatnonzero(~np.isfinite(numbers).all(axis=1))
    if len(bad):
        raise refused(int(bad[0]), "must hold finite numbers of at most 3.4e38, got NaN or more")
    return numbers


def _refused(table: "Table", row: int, column: str, why: str) -> ValueError:
    return ValueError(f"{table.where(row)}, column {printable(column)!r}: {why}")


def _check_filled(cells: "pa.Array", refused: Callable[[int, str], ValueError]) -> None:
    if cells.null_count:
        raise refused(_first_empty(cells), "the cell is empty: fill it in or leave the row out")


def _first_empty(cells: "pa.Array") -> int:
    import pyarrow.compute as pc

    return pc.is_null(cells).index(True).as_py()  # type: ignore[no-any-return]


def _flat(
    cells: "pa.Array", table: "Table", name: str, rows: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, list[int]]:
    """Return all numbers of some cells in a row, and how many each cell has."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def refused(position: int, why: str) -> ValueError:
        return _refused(table, int(rows[position]), name, why)

    values = cells.storage if isinstance(cells, pa.ExtensionArray) else cells
    _check_filled(values, refused)
    counts = np.ones(len(values), np.int64)
    owners = np.arange(len(values))
    while holds_lists(values.type):
        owners = np.repeat(owners, to_numpy(pc.list_value_length(values)))
        values = values.flatten()
        counts = np.bincount(owners, minlength=len(cells))
        if values.null_count:
            empty = int(owners[_first_empty(values)])
            raise refused(empty, "the list has an empty place: fill it in or leave the row out")
    try:
        numbers = to_numpy(values.cast(pa.float64()))
    except pa.ArrowInvalid:
        # Whoever planned the column saw numbers; these are of another file.
        texts = list(map(str, values.to_pylist()))
        strange = next(place for place, text in enumerate(texts) if not is_number(text))
        why = f"must hold a number, got {printable(texts[strange])!r}"
        raise refused(int(owners[strange]), why) from None
    return numbers, counts.tolist()
