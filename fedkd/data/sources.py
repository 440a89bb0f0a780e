"""Where images come from: labels are read at once, pixels only for the rows that are used.

scikit-learn's digits; Parquet files, folders of pictures and what ``save_to_disk`` wrote; a Hugging
Face dataset by name.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from fedkd.data.hugging_face import hugging_face_files, hugging_face_tables
from fedkd.data.image_folders import PictureFolder
from fedkd.data.images import Pixels, resize_pixels
from fedkd.data.labels import LabelColumn, common_classes, has_labels
from fedkd.data.layouts import Layout, find_layout
from fedkd.data.natural_ids import ReadIds, no_ids, read_ids
from fedkd.data.settings import DataSettings
from fedkd.data.tables import ArrowTable, ParquetTable, Table, TableSplit, saved_features
from fedkd.names import printable

Read = Callable[[np.ndarray], Pixels]


@dataclass(frozen=True, eq=False, slots=True)
class LabelledImages:
    """One split of a source."""

    labels: Int64[np.ndarray, "rows"]
    read: Read
    """Row ids -> their pixels in [0, 1], in the order of the ids."""


@dataclass(frozen=True, eq=False, slots=True)
class Source:
    """An opened ``data.source``; ``test`` is ``None`` where it has no test split.

    ``notes`` are sentences on what was left aside; ``ids`` reads whose each training row is.
    """

    name: str
    class_names: tuple[str, ...]
    train: LabelledImages
    test: LabelledImages | None
    notes: tuple[str, ...] = field(default=())
    ids: ReadIds = no_ids


def open_source(settings: DataSettings) -> Source:
    """Find ``settings.source`` and read its labels.

    ``digits`` is scikit-learn's; what exists as a folder or file, or text that can only be a path
    (it starts with ``.``, ``~`` or a separator, ends with ``.parquet``, or has more than one
    ``/``), is read from there; anything else is the name of a Hugging Face dataset, such as
    ``ylecun/mnist``.

    Raises:
        ValueError: if the source, its columns or its labels cannot be used; says what would work.
    """
    if settings.source == "digits":
        _reject(settings, "config", "image_column", "label_column")
        return _resized(digits(), settings)
    path = _local_path(settings)
    if path is None:
        return hugging_face_dataset(settings)
    _reject(settings, "config")
    layout = find_layout(path, settings.source)
    name = printable(path.resolve().name)
    if layout.kind == "pictures":
        _reject(settings, "image_column", "label_column")
        return _picture_folder(layout, path, name, settings)
    return _local_tables(layout, name, settings)


def source_files(settings: DataSettings) -> tuple[Path, ...]:
    """List the files that ``settings.source`` is read from: who digests them knows the data.

    Returns:
        Files that describe the others, then training files, then test files, each in the order in
        which they are read; for the name of a Hugging Face dataset the files in the cache of
        ``datasets``; none for ``digits``, which is part of scikit-learn.

    Raises:
        ValueError: if the source cannot be found; says what would work.
    """
    if settings.source == "digits":
        return ()
    path = _local_path(settings)
    return (
        hugging_face_files(settings) if path is None else find_layout(path, settings.source).files
    )


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
        or source.lower().endswith(".parquet")
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
    return Source("digits", tuple(map(str, range(10))), LabelledImages(labels, read), test=None)


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
    train = LabelledImages(source.train.labels, lambda rows: resize_pixels(read(rows), size))
    return replace(source, train=train)


# --- files and folders ------------------------------------------------------------------------


def _picture_folder(layout: Layout, root: Path, name: str, settings: DataSettings) -> Source:
    splits, reads = {}, {}
    ids: ReadIds = no_ids
    with _naming(settings):
        for split, files, depth in layout.splits():
            folder = PictureFolder(files, root, depth=depth, resize=settings.resize)
            splits[split], reads[split] = [folder.labels()], folder.read
            ids = folder.ids if split == "train" else ids
        classes = f"the folders of data.source {settings.source!r}"
        source = _labelled(name, splits, reads, classes, layout.left_aside, settings)
        return replace(source, ids=ids)


def _local_tables(layout: Layout, name: str, settings: DataSettings) -> Source:
    with _naming(settings):
        tables = {
            split: [_open_table(path, layout) for path in files]
            for split, files, _ in layout.splits()
        }
        return _tables(tables, name, settings, left_aside=layout.left_aside)


def _open_table(path: Path, layout: Layout) -> Table:
    if layout.kind == "parquet":
        return ParquetTable(path)
    return ArrowTable.from_file(path, saved_features(path.parent / "dataset_info.json"))


# --- a Hugging Face dataset by name -----------------------------------------------------------


def hugging_face_dataset(settings: DataSettings, cache_folder: Path | None = None) -> Source:
    """Load ``settings.source`` with ``datasets``; the first time this needs a network.

    Args:
        settings: ``source`` and ``config`` as ``datasets.load_dataset`` takes them.
        cache_folder: where the dataset is kept; ``None``: where ``datasets`` keeps all of them.
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
        return _tables(used, name, settings, left_aside=left_aside, paths_are_pictures=True)


# --- for all ----------------------------------------------------------------------------------


def _tables(
    tables: Mapping[str, Sequence[Table]],
    name: str,
    settings: DataSettings,
    *,
    left_aside: Sequence[str],
    paths_are_pictures: bool = False,
) -> Source:
    splits = {
        split: TableSplit(of_split, settings, paths_are_pictures=paths_are_pictures)
        for split, of_split in tables.items()
    }
    image_column, label_column = splits["train"].choose_columns()
    labels = {split: of_split.labels(label_column) for split, of_split in splits.items()}
    reads: dict[str, Read] = {
        split: partial(of_split.read, image_column) for split, of_split in splits.items()
    }
    classes = f"data.label_column {label_column!r} of data.source {settings.source!r}"
    source = _labelled(name, labels, reads, classes, left_aside, settings)
    return replace(source, ids=partial(read_ids, tables["train"]))


def _labelled(
    name: str,
    labels: Mapping[str, Sequence[LabelColumn]],
    reads: Mapping[str, Read],
    classes: str,
    left_aside: Sequence[str],
    settings: DataSettings,
) -> Source:
    """Number the classes of all splits alike, and leave a test split without labels aside."""
    notes = []
    if left_aside:
        shown = ", ".join(left_aside[:6])
        more = f" and {len(left_aside) - 6} more" if len(left_aside) > 6 else ""
        notes.append(f"data.source {settings.source!r}: not read: {shown}{more}")
    if not any(len(column.numbers) for column in labels["train"]):
        raise ValueError(f"data.source {settings.source!r} has no rows in split 'train'")
    if "test" in labels and not has_labels(labels["test"]):
        labels = {"train": labels["train"]}
        notes.append(
            f"data.source {settings.source!r}: the split 'test' has no labels (empty or -1) and is "
            f"left aside; {settings.test_fraction:.0%} of the training rows are for testing "
            "(data.test_fraction)"
        )
    found = common_classes(labels, classes)
    splits = {
        split: LabelledImages(numbers, reads[split]) for split, numbers in found.numbers.items()
    }
    return Source(name, found.names, splits["train"], splits.get("test"), tuple(notes))


@contextmanager
def _naming(settings: DataSettings) -> Iterator[None]:
    """Begin errors from inside the block with the setting that they are about."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(("data.", "the folders of data.")):
            raise
        raise ValueError(f"data.source {settings.source!r}: {error}") from error
