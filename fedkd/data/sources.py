"""Where rows come from: labels are read at once, inputs only for the rows that are used.

scikit-learn's digits; Parquet, CSV and NPZ files, folders of pictures and what ``save_to_disk``
wrote; a function of one's own; a Hugging Face dataset by name.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64

from fedkd import own_code
from fedkd.data.arrays import find_arrays, npz_arrays, own_arrays, own_digest
from fedkd.data.csv_tables import csv_tables
from fedkd.data.features import plan_features, read_features
from fedkd.data.hugging_face import hugging_face_files, hugging_face_tables
from fedkd.data.image_folders import FOLDER, PictureFolder
from fedkd.data.images import Pixels, resize_pixels
from fedkd.data.labels import LabelColumn, common_classes, has_labels
from fedkd.data.layouts import SINGLE_FILES, Layout, find_layout
from fedkd.data.natural_ids import ReadIds, check_named, id_columns, no_ids, read_ids
from fedkd.data.reading import AS_IT_IS, Reading
from fedkd.data.settings import COLUMNS, DataSettings, ViewSettings
from fedkd.data.tables import (
    ArrowTable,
    NoLabelsError,
    ParquetTable,
    Table,
    TableSplit,
    saved_features,
)
from fedkd.data.texts import TextEncoder, plan_texts, read_texts
from fedkd.inputs import Kind
from fedkd.names import printable

NO_COLUMN = "\0"
"""What no column is called; an empty name is that of row numbers."""

Read = Callable[[np.ndarray], Float32[np.ndarray, "_rows *_shape"]]


@dataclass(frozen=True, eq=False, slots=True)
class LabelledRows:
    """One split of a source."""

    labels: Int64[np.ndarray, "rows"]
    read: Read
    """Row ids -> their inputs, in the order of the ids: pixels in [0, 1], features as they are."""


@dataclass(frozen=True, eq=False, slots=True)
class Source:
    """An opened ``data.source``.

    Attributes:
        name: what it is called.
        class_names: of the labels.
        train: its training split.
        test: its test split; ``None`` where it has none.
        notes: sentences on what was left aside.
        kind: what its inputs are.
        encoder: what turned texts into these; ``None`` where they were none.
        ids: reads whose each training row is.
        vocabulary: how many tokens texts are made of; ``None`` where inputs are no texts.
        reading: how rows of tables become inputs.
    """

    name: str
    class_names: tuple[str, ...]
    train: LabelledRows
    test: LabelledRows | None
    notes: tuple[str, ...] = field(default=())
    ids: ReadIds = no_ids
    kind: Kind = "pictures"
    encoder: TextEncoder | None = None
    vocabulary: int | None = None
    reading: Reading = AS_IT_IS


def open_source(
    settings: DataSettings, encoder: TextEncoder | None = None, *, needs_labels: bool = True
) -> Source:
    """Find ``settings.source`` and read its labels.

    ``digits`` is scikit-learn's; ``package.module:callable`` is called; what exists as a folder or
    file, or text that can only be a path (it starts with ``.``, ``~`` or a separator, ends like a
    Parquet, CSV or NPZ file, or has more than one ``/``), is read from there; anything else is the
    name of a Hugging Face dataset, such as ``ylecun/mnist``.

    Args:
        settings: the table ``data``.
        encoder: of texts; None: one that fits them.
        needs_labels: else a source of files, folders or arrays without labels, or of one class,
            is read as well: all its training rows are of one class without a name.

    Raises:
        ValueError: if the source, its columns or its labels cannot be used; says what would work.
    """
    if settings.source == "digits":
        _reject(
            settings, "config", "image_column", "feature_columns", "text_column", "label_column"
        )
        check_named(settings.partition, settings.source, [])
        return _resized(digits(), settings)
    if own_code.is_own_code(settings.source):
        _reject(settings, "config", *COLUMNS)
        with _naming(settings):
            return _arrays(
                own_arrays(settings), settings.source, settings, encoder, needs_labels=needs_labels
            )
    path = _local_path(settings)
    if path is None:
        return hugging_face_dataset(settings, encoder=encoder, needs_labels=needs_labels)
    _reject(settings, "config")
    layout = find_layout(path, settings.source)
    name = printable(path.resolve().name)
    if layout.kind == "pictures":
        _reject(settings, *COLUMNS)
        return _picture_folder(layout, path, name, settings, needs_labels=needs_labels)
    if layout.kind == "npz":
        _reject(settings, *COLUMNS)
        with _naming(settings):
            return _arrays(
                npz_arrays(layout.train[0]), name, settings, encoder, needs_labels=needs_labels
            )
    return _local_tables(layout, name, settings, encoder, needs_labels=needs_labels)


def with_classes(source: Source, class_names: tuple[str, ...]) -> Source:
    """Return a source whose classes have the numbers that these names have.

    Raises:
        ValueError: if its classes have other names.
    """
    if set(source.class_names) != set(class_names):
        odd = sorted(set(source.class_names) ^ set(class_names))
        shown = ", ".join(odd[:6]) + (f" and {len(odd) - 6} more" if len(odd) > 6 else "")
        raise ValueError(
            f"its classes must be those of data.source, got {shown} in one of them only"
        )
    place = np.array([class_names.index(name) for name in source.class_names], dtype=np.int64)

    def numbered(rows: LabelledRows) -> LabelledRows:
        return LabelledRows(place[rows.labels], rows.read)

    test = None if source.test is None else numbered(source.test)
    return replace(source, class_names=class_names, train=numbered(source.train), test=test)


def source_files(settings: DataSettings) -> tuple[Path, ...]:
    """List the files that ``settings.source`` is read from: who digests them knows the data.

    Returns:
        Files that describe the others, then training files, then test files, each in the order in
        which they are read; for the name of a Hugging Face dataset the files in the cache of
        ``datasets``; none for ``digits``, which is part of scikit-learn, and none for a function of
        one's own: which files it reads, nobody knows.

    Raises:
        ValueError: if the source cannot be found; says what would work.
    """
    if settings.source == "digits" or own_code.is_own_code(settings.source):
        return ()
    path = _local_path(settings)
    return (
        hugging_face_files(settings) if path is None else find_layout(path, settings.source).files
    )


def source_digests(settings: DataSettings) -> dict[str, str]:
    """Return SHA-256 digests of what no file holds: the arrays that a function of one's own gives.

    Raises:
        ValueError: if the function fails.
    """
    if not own_code.is_own_code(settings.source):
        return {}
    return {settings.source: own_digest(settings)}


def view_settings(settings: DataSettings, view: ViewSettings) -> DataSettings:
    """Return the settings that a view is read with."""
    own = {name: getattr(view, name) for name in type(view).model_fields}
    return settings.model_copy(update={"views": (), **own})


def view_files(settings: DataSettings) -> tuple[tuple[Path, ...], ...]:
    """List the files of each of ``data.views``, as `source_files` does.

    Raises:
        ValueError: if a source cannot be found; names the view and says what would work.
    """
    found = []
    for number, view in enumerate(settings.views):
        try:
            found.append(source_files(view_settings(settings, view)))
        except ValueError as error:
            raise ValueError(f"data.views[{number}]: {error}") from error
    return tuple(found)


def view_digests(settings: DataSettings) -> dict[str, str]:
    """Return SHA-256 digests of what no file of ``data.views`` holds, see `source_digests`."""
    return {
        f"view {number}: {name}": digest
        for number, view in enumerate(settings.views, 1)
        for name, digest in source_digests(view_settings(settings, view)).items()
    }


def _local_path(settings: DataSettings) -> Path | None:
    """Return where the source is on this machine; ``None`` for a name of the hub."""
    source = settings.source
    if "\0" in source:
        raise ValueError(f"data.source must be a path or a name, got {source!r}")
    try:
        path = Path(source).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError) as error:  # a name too long; no such user
        raise ValueError(f"data.source {source!r} cannot be looked up: {error}") from error
    only_a_path = (
        source.startswith((".", "~", "/"))
        or source.lower().endswith(tuple(SINGLE_FILES))
        or "\\" in source
        or source.count("/") > 1
    )
    return path if exists or only_a_path else None


def _reject(settings: DataSettings, *fields: str) -> None:
    for name in fields:
        value = getattr(settings, name)
        if value is not None:
            raise ValueError(
                f"data.{name} does not apply to data.source {settings.source!r}, got {value!r}: "
                "leave it out"
            )


# --- digits -----------------------------------------------------------------------------------


def digits() -> Source:
    """1797 grey 8x8 images of handwritten digits, in 10 classes, without a test split.

    Source:
        Alpaydin and Kaynak, 1998, UCI repository, test part. https://doi.org/10.24432/C50P49
    """
    # One row an image: its 64 pixels from 0 to 16, then its class.
    table = np.loadtxt(_digits_file(), delimiter=",")
    pixels = (table[:, :-1].reshape(-1, 1, 8, 8) / 16).astype(np.float32)

    def read(rows: np.ndarray) -> Pixels:
        chosen: np.ndarray = pixels[rows]
        return chosen

    labels = table[:, -1].astype(np.int64)
    return Source("digits", tuple(map(str, range(10))), LabelledRows(labels, read), test=None)


def _digits_file() -> Path:
    """Find scikit-learn's own copy without importing it: that takes a second and pandas."""
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise ValueError(
            "data.source 'digits' is read from scikit-learn, which is not installed: "
            "pip install scikit-learn, or name another source"
        )
    return Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"


def _resized(source: Source, settings: DataSettings) -> Source:
    size, read = settings.resize, source.train.read
    if size is None:
        return source
    train = LabelledRows(source.train.labels, lambda rows: resize_pixels(read(rows), size))
    return replace(source, train=train)


# --- files and folders ------------------------------------------------------------------------


def _picture_folder(
    layout: Layout, root: Path, name: str, settings: DataSettings, *, needs_labels: bool
) -> Source:
    splits, reads = {}, {}
    ids: ReadIds = no_ids
    check_named(settings.partition, settings.source, [FOLDER])
    with _naming(settings):
        for split, files, depth in layout.splits():
            folder = PictureFolder(
                files, root, depth=depth, resize=settings.resize, needs_labels=needs_labels
            )
            splits[split], reads[split] = [folder.labels()], folder.read
            ids = folder.ids if split == "train" else ids
        classes = f"the folders of data.source {settings.source!r}"
        source = _labelled(
            name,
            splits,
            reads,
            classes,
            layout.left_aside,
            settings,
            needs_labels=needs_labels,
        )
        return replace(source, ids=ids)


def _local_tables(
    layout: Layout,
    name: str,
    settings: DataSettings,
    encoder: TextEncoder | None,
    *,
    needs_labels: bool,
) -> Source:
    with _naming(settings):
        tables: Mapping[str, Sequence[Table]]
        if layout.kind == "csv":
            tables = csv_tables({split: files for split, files, _ in layout.splits()}, settings)
        else:
            tables = {
                split: [_open_table(path, layout) for path in files]
                for split, files, _ in layout.splits()
            }
        return _tables(
            tables,
            name,
            settings,
            left_aside=layout.left_aside,
            encoder=encoder,
            needs_labels=needs_labels,
        )


def _open_table(path: Path, layout: Layout) -> Table:
    if layout.kind == "parquet":
        return ParquetTable(path)
    return ArrowTable.from_file(path, saved_features(path.parent / "dataset_info.json"))


def _arrays(
    arrays: Mapping[str, np.ndarray],
    name: str,
    settings: DataSettings,
    encoder: TextEncoder | None,
    *,
    needs_labels: bool,
) -> Source:
    found = find_arrays(arrays, settings, encoder, needs_labels=needs_labels)
    if found.kind != "pictures":
        _reject_resize(settings, found.kind)
    labels = {split: [column] for split, column in found.labels.items()}
    classes = f"labels of data.source {settings.source!r}"
    source = _labelled(
        name,
        labels,
        found.reads,
        classes,
        found.left_aside,
        settings,
        needs_labels=needs_labels,
    )
    vocabulary = found.vocabulary if found.encoder is None else found.encoder.vocabulary
    return replace(
        source,
        kind=found.kind,
        encoder=found.encoder,
        vocabulary=vocabulary,
        ids=found.ids,
        reading=Reading(encoder=found.encoder),
    )


def _reject_resize(settings: DataSettings, kind: Kind) -> None:
    if settings.resize is not None:
        raise ValueError(
            f"data.resize is for pictures, and data.source {settings.source!r} holds {kind}: "
            "leave it out"
        )


# --- a Hugging Face dataset by name -----------------------------------------------------------


def hugging_face_dataset(
    settings: DataSettings,
    cache_folder: Path | None = None,
    *,
    encoder: TextEncoder | None = None,
    needs_labels: bool = True,
) -> Source:
    """Load ``settings.source`` with ``datasets``; the first time this needs a network.

    Args:
        settings: ``source`` and ``config`` as ``datasets.load_dataset`` takes them.
        cache_folder: where the dataset is kept; ``None``: where ``datasets`` keeps all of them.
        encoder: of texts; ``None``: one that fits them.
        needs_labels: see `open_source`.
    """
    splits = hugging_face_tables(settings, cache_folder)
    if "train" not in splits:
        raise ValueError(
            f"data.source {settings.source!r} must have a split 'train', got {', '.join(splits)}"
        )
    name = settings.source if settings.config is None else f"{settings.source}/{settings.config}"
    used = {split: [splits[split]] for split in ("train", "test") if split in splits}
    left_aside = tuple(sorted(set(splits) - set(used)))
    with _naming(settings):
        # `datasets` keeps pictures that it downloaded as files where they are.
        return _tables(
            used,
            name,
            settings,
            left_aside=left_aside,
            paths_are_pictures=True,
            encoder=encoder,
            needs_labels=needs_labels,
        )


# --- for all ----------------------------------------------------------------------------------


def _tables(
    tables: Mapping[str, Sequence[Table]],
    name: str,
    settings: DataSettings,
    *,
    left_aside: Sequence[str],
    paths_are_pictures: bool = False,
    encoder: TextEncoder | None = None,
    needs_labels: bool = True,
) -> Source:
    splits = {
        split: TableSplit(of_split, settings, paths_are_pictures=paths_are_pictures)
        for split, of_split in tables.items()
    }
    try:
        label_column = splits["train"].label_column()
    except NoLabelsError:
        if needs_labels:
            raise
        label_column = NO_COLUMN
    check_named(settings.partition, settings.source, id_columns(tables["train"][0], label_column))
    labels = {split: of_split.labels(label_column) for split, of_split in splits.items()}
    inputs = splits["train"].input_columns(label_column)
    if inputs.kind != "pictures":
        _reject_resize(settings, inputs.kind)
    # A test split without labels is left aside, and need not have what is learnt from.
    used = [split for split in splits if split == "train" or has_labels(labels[split])]
    reads: dict[str, Read]
    kind, reading = inputs.kind, AS_IT_IS
    if kind == "pictures":
        (column,) = inputs.columns
        reads = {split: partial(splits[split].read, column) for split in used}
        reading = Reading(column)
    elif kind == "text":
        (column,) = inputs.columns
        encoder = encoder or plan_texts(splits["train"].tables, column, settings.text)
        reads = {
            split: partial(read_texts, splits[split].tables, column, encoder) for split in used
        }
        kind = "features" if encoder.vocabulary is None else "text"
        reading = Reading(column, encoder=encoder)
    else:
        plan = plan_features([t for split in used for t in splits[split].tables], inputs.columns)
        reads = {split: partial(read_features, splits[split].tables, plan) for split in used}
        reading = Reading(columns=tuple(plan))
    classes = f"data.label_column {label_column!r} of data.source {settings.source!r}"
    left_aside = (*left_aside, *(f"column {printable(name)!r}" for name in inputs.left_aside))
    source = _labelled(
        name, labels, reads, classes, left_aside, settings, needs_labels=needs_labels
    )
    source = replace(source, kind=kind, ids=partial(read_ids, tables["train"]))
    if inputs.kind != "text" or encoder is None:
        return replace(source, reading=reading)
    return replace(source, encoder=encoder, vocabulary=encoder.vocabulary, reading=reading)


def _labelled(
    name: str,
    labels: Mapping[str, Sequence[LabelColumn]],
    reads: Mapping[str, Read],
    classes: str,
    left_aside: Sequence[str],
    settings: DataSettings,
    *,
    needs_labels: bool,
) -> Source:
    """Number the classes of all splits alike, and leave a test split without labels aside."""
    notes = []
    if left_aside:
        shown = ", ".join(left_aside[:6])
        more = f" and {len(left_aside) - 6} more" if len(left_aside) > 6 else ""
        notes.append(f"data.source {settings.source!r}: not read: {shown}{more}")
    if not any(len(column.numbers) for column in labels["train"]):
        raise ValueError(f"data.source {settings.source!r} has no rows in split 'train'")
    if not needs_labels and not _tell_classes_apart(labels["train"]):
        rows = sum(len(column.numbers) for column in labels["train"])
        everything = LabelledRows(np.zeros(rows, np.int64), reads["train"])
        return Source(name, ("",), everything, None, tuple(notes))
    if "test" in labels and not has_labels(labels["test"]):
        labels = {"train": labels["train"]}
        notes.append(
            f"data.source {settings.source!r}: the split 'test' has no labels (empty or -1) and is "
            f"left aside; {settings.test_fraction:.0%} of the training rows are for testing "
            "(data.test_fraction)"
        )
    found = common_classes(labels, classes)
    if "test" in found.numbers:
        untaught = np.setdiff1d(found.numbers["test"], found.numbers["train"])
        if len(untaught):
            shown = ", ".join(found.names[number] for number in untaught[:6])
            more = f" and {len(untaught) - 6} more" if len(untaught) > 6 else ""
            notes.append(
                f"data.source {settings.source!r}: classes with test rows and no training row: "
                f"{shown}{more}; nobody can learn them, and all are judged on them"
            )
    splits = {
        split: LabelledRows(numbers, reads[split]) for split, numbers in found.numbers.items()
    }
    return Source(name, found.names, splits["train"], splits.get("test"), tuple(notes))


def _tell_classes_apart(columns: Sequence[LabelColumn]) -> bool:
    """Tell whether rows are of more than one class, at first sight."""
    if not has_labels(columns):
        return False
    if any(column.names is not None for column in columns):
        return len({name for column in columns for name in column.names or ()}) > 1
    return len({number for column in columns for number in np.unique(column.numbers)}) > 1


@contextmanager
def _naming(settings: DataSettings) -> Iterator[None]:
    """Begin errors from inside the block with the setting that they are about."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(("data.", "the folders of data.", "labels of data.")):
            raise
        raise ValueError(of_source(settings, str(error))) from error


def of_source(settings: DataSettings, text: str) -> str:
    """Begin a sentence on a source with its setting, in the place of the name of its only file."""
    source = f"data.source {settings.source!r}"
    rest = text.removeprefix(printable(Path(settings.source).name))
    only = rest != text and rest.startswith((" ", ",", ":")) and Path(settings.source).is_file()
    return f"{source}{rest}" if only else f"{source}: {text}"
