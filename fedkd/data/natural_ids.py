"""Whose each row is: natural ids such as speakers, and clients that are made of them."""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64

from fedkd.data.partition_settings import NaturalPartition, PartitionSettings
from fedkd.names import printable

if TYPE_CHECKING:
    import pyarrow as pa

    from fedkd.data.tables import Table

NOBODY = -1
"""Stands for a row of nobody: an empty cell."""

MORE_ROWS = "more private rows, a smaller data.partition.min_rows"


@dataclass(frozen=True, eq=False, slots=True)
class NaturalIds:
    """Whose each row is.

    Attributes:
        names: of all ids, in order: whole numbers by size, texts by the alphabet.
        numbers: for each row the place of its id among the names, or `NOBODY`.
    """

    names: tuple[str, ...]
    numbers: Int64[np.ndarray, "rows"]

    def of(self, rows: Int64[np.ndarray, "some"]) -> "NaturalIds":
        """Return those of some rows; the names stay all."""
        return NaturalIds(self.names, self.numbers[rows])


ReadIds = Callable[[str], NaturalIds]
"""The name of a column -> the ids of all training rows."""


def no_ids(column: str) -> NaturalIds:
    """Refuse a column of a source that has none."""
    raise ValueError(
        f"data.partition.column {column!r}: data.source has no columns that say whose a row is; "
        "a file of columns or a folder of pictures may"
    )


def ids_from_names(names: Sequence[str]) -> NaturalIds:
    """Number the ids of rows that are named one by one."""
    known, numbers = np.unique(np.array(names, dtype=object), return_inverse=True)
    return NaturalIds(tuple(map(str, known)), numbers.astype(np.int64))


def check_named(settings: PartitionSettings, source: str, known: Sequence[str]) -> None:
    """Refuse natural clients of no column, since only who knows the rows can tell which it is.

    Args:
        settings: ``data.partition``.
        source: what ``data.source`` is.
        known: columns that `read_ids` would read.

    Raises:
        ValueError: naming the columns.
    """
    if isinstance(settings, NaturalPartition) and settings.column is None:
        names = [printable(name) for name in known]
        raise ValueError(settings.unnamed(f"data.source {source!r}", names))


def id_columns(table: "Table", label_column: str) -> list[str]:
    """Return the columns of texts, truth values and whole numbers beside that of the labels."""
    return [
        field.name
        for field in table.schema
        if field.name != label_column and _holds_ids(field.type)
    ]


def read_ids(tables: Sequence["Table"], column: str) -> NaturalIds:
    """Read a column of texts, truth values or whole numbers; an empty cell is nobody's.

    Whole numbers that the file notes names for (``ClassLabel``) are called by these.

    Args:
        tables: the files, in order.
        column: its name.

    Raises:
        ValueError: if there is no such column, or it holds anything else; names the setting.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    chunks: list[pa.Array] = []
    for table in tables:
        if column not in table.schema.names:
            known = printable(", ".join(table.schema.names))
            raise ValueError(
                f"data.partition.column must name a column of {table.name}, got {column!r}; "
                f"known: {known}"
            )
        cells = table.column(column)
        if pa.types.is_dictionary(cells.type):
            cells = cells.cast(cells.type.value_type)
        if not _holds_ids(cells.type):
            raise ValueError(
                f"data.partition.column {column!r} must hold texts or whole numbers, one for "
                f"each client, got {cells.type} in {table.name}"
            )
        chunks += _named(cells, table.features.get(column)).chunks
    whole = all(pa.types.is_integer(chunk.type) for chunk in chunks)
    kind = pa.int64() if whole else pa.large_string()
    together = pa.chunked_array([chunk.cast(kind) for chunk in chunks], kind).combine_chunks()
    unique = pc.unique(together).drop_null()
    unique = unique.take(pc.array_sort_indices(unique))
    if not len(unique):
        raise ValueError(f"data.partition.column {column!r} holds empty cells only")
    places = pc.index_in(together, unique).fill_null(NOBODY)
    return NaturalIds(
        tuple(printable(str(name)) for name in unique.to_pylist()),
        np.from_dlpack(places).astype(np.int64),
    )


def _named(cells: "pa.ChunkedArray", feature: object) -> "pa.ChunkedArray":
    """Return names in the place of numbers where a file notes what these stand for."""
    import pyarrow as pa
    import pyarrow.compute as pc

    names = feature.get("names") if isinstance(feature, dict) else None
    if not isinstance(names, list) or not names or not pa.types.is_integer(cells.type):
        return cells
    known = pc.and_(pc.greater_equal(cells, 0), pc.less(cells, len(names)))
    places = pc.if_else(known, cells, pa.scalar(None, cells.type))
    return pa.chunked_array([pa.array(map(str, names)).take(chunk) for chunk in places.chunks])


def _holds_ids(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return bool(
        pa.types.is_integer(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or kind == pa.string_view()
    )


@dataclass(frozen=True, eq=False, slots=True)
class Dealt:
    """Who holds which of the private rows.

    Attributes:
        rows: of each client: sorted, disjoint, not always all of them.
        names: what each client is called by its natural id; empty where they have none.
        notes: on what belongs to no client.
    """

    rows: tuple[Int64[np.ndarray, "_"], ...]
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def deal_by_id(
    ids: NaturalIds, settings: NaturalPartition, *, num_clients: int, rng: np.random.Generator
) -> Dealt:
    """Make each client one id, or one of several that share the rows of an id.

    Clients are in the order of the ids. Ids with fewer than ``min_rows`` private rows are no
    clients. Where more ids are left than there are clients, ``rng`` draws them, all alike. Where
    there are fewer, and ``repeat`` allows it, each further client is given to the id whose
    clients then hold most rows (d'Hondt's rule, so that sizes are as equal as ids allow), and the
    rows of an id are dealt evenly by lot.

    Args:
        ids: of the private rows.
        settings: ``data.partition``.
        num_clients: how many.
        rng: decides what is drawn.

    Raises:
        ValueError: if there are not so many; says how many there are.
    """
    column, fewest = settings.named_column, settings.min_rows
    counts = np.bincount(ids.numbers[ids.numbers != NOBODY], minlength=len(ids.names))
    able = np.flatnonzero(counts >= fewest)
    shares = np.ones(len(able), dtype=np.int64)
    if num_clients > len(able):
        most = int((counts // fewest).sum()) if settings.repeat else len(able)
        if num_clients > most or not len(able):
            raise ValueError(_too_few(ids, settings, num_clients, most))
        shares = _shares(counts[able], num_clients)
    elif num_clients < len(able):
        able = np.sort(rng.choice(able, size=num_clients, replace=False))
        shares = shares[:num_clients]
    by_id = np.argsort(ids.numbers, kind="stable")  # so the rows of each id stay in order
    ends = np.cumsum(counts) + (len(ids.numbers) - counts.sum())
    parts: list[np.ndarray] = []
    for place, share in zip(able, shares, strict=True):
        own = by_id[ends[place] - counts[place] : ends[place]]
        if share > 1:
            own = rng.permutation(own)
        parts += [np.sort(part) for part in np.array_split(own, share)]
    names = tuple(ids.names[place] for place in np.repeat(able, shares))
    notes = []
    others = len(ids.numbers) - sum(map(len, parts))
    if others:
        small = int(((counts > 0) & (counts < fewest)).sum())
        held = int((counts > 0).sum())
        notes.append(
            f"data.partition.column {column!r}: {len(able)} of {held} ids are clients; {others} "
            f"of {len(ids.numbers)} private rows are of others or of nobody, and unassigned"
            + (f" ({small} ids have fewer than {fewest} private rows)" if small else "")
        )
    return Dealt(tuple(parts), names, tuple(notes))


def _shares(counts: Int64[np.ndarray, "ids"], num_clients: int) -> Int64[np.ndarray, "ids"]:
    """Give each id a client, and every further one to the id with most rows for each of its own."""
    shares = np.ones(len(counts), dtype=np.int64)
    waiting = [(-count / 2, place) for place, count in enumerate(counts)]
    heapq.heapify(waiting)
    for _ in range(num_clients - len(counts)):
        _, place = waiting[0]
        shares[place] += 1
        heapq.heapreplace(waiting, (-counts[place] / (shares[place] + 1), place))
    return shares


def _too_few(ids: NaturalIds, settings: NaturalPartition, num_clients: int, most: int) -> str:
    column, fewest = f"data.partition.column {settings.named_column!r}", settings.min_rows
    if most == 0:
        return (
            f"{column}: no id has data.partition.min_rows={fewest} of the {len(ids.numbers)} "
            f"private rows: use {MORE_ROWS}"
        )
    limit = (
        f"{most}, with data.partition.min_rows={fewest} private rows of one id each ({column})"
        if settings.repeat
        else f"{most}, the ids with data.partition.min_rows={fewest} private rows ({column})"
    )
    others = "" if settings.repeat else ", or data.partition.repeat=true, which lets several share"
    return (
        f"clients.count must be at most {limit}, got {num_clients}: lower it, or use {MORE_ROWS}"
        f"{others}"
    )
