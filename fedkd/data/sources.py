"""Where images come from: labels are read at once, pixels only for the rows that are used.

Three sources: scikit-learn's digits, a folder of Parquet files, a Hugging Face dataset by name.
Parquet files are read with pyarrow itself: ``datasets.load_dataset("parquet", ...)`` would copy
them into a cache and report its use to a server, even for a local folder.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, Int64

from fedkd.data.images import Pixels, open_image, stack_images
from fedkd.data.settings import DataSettings

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, DatasetDict

LABEL_COLUMNS = ("label", "labels", "fine_label")
IMAGE_COLUMNS = ("image", "img")


@dataclass(frozen=True, eq=False, slots=True)
class LabelledImages:
    """One split of a source."""

    labels: Int64[np.ndarray, "rows"]
    read: Callable[[np.ndarray], Pixels]
    """Row ids -> their pixels in [0, 1], in the order of the ids."""


@dataclass(frozen=True, eq=False, slots=True)
class Source:
    """An opened ``data.source``; ``test`` is ``None`` where it has no test split."""

    name: str
    class_names: tuple[str, ...]
    train: LabelledImages
    test: LabelledImages | None


def open_source(settings: DataSettings) -> Source:
    """Find ``settings.source`` and read its labels.

    ``digits`` is scikit-learn's; an existing folder, or text that can only be a path (it starts
    with ``.``, ``~`` or a separator, or has more than one ``/``), is a Parquet folder; anything
    else is the name of a Hugging Face dataset, such as ``ylecun/mnist``.

    Raises:
        ValueError: if the source, its columns or its labels cannot be used; says what would work.
    """
    if settings.source == "digits":
        _reject(settings, "config", "image_column", "label_column")
        return digits()
    folder = Path(settings.source).expanduser()
    if folder.is_dir() or _can_only_be_a_path(settings.source):
        _reject(settings, "config")
        return parquet_folder(folder, settings)
    return hugging_face_dataset(settings)


def source_files(settings: DataSettings) -> tuple[Path, ...]:
    """List the files that ``settings.source`` is read from: who digests them knows the data.

    Returns:
        Training files, then test files, each in the order in which they are read; for the name of
        a Hugging Face dataset the files in the cache of ``datasets``; none for ``digits``, which
        is part of scikit-learn.

    Raises:
        ValueError: if the source cannot be found; says what would work.
    """
    if settings.source == "digits":
        return ()
    folder = Path(settings.source).expanduser()
    if folder.is_dir() or _can_only_be_a_path(settings.source):
        return (*_training_files(folder, settings), *_parquet_files(folder, "test"))
    return hugging_face_files(settings)


def _can_only_be_a_path(source: str) -> bool:
    return source.startswith((".", "~", "/")) or "\\" in source or source.count("/") > 1


def _reject(settings: DataSettings, *fields: str) -> None:
    for field in fields:
        value = getattr(settings, field)
        if value is not None:
            raise ValueError(
                f"data.{field} does not apply to data.source {settings.source!r}, got {value!r}: "
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


# --- a folder of Parquet files ----------------------------------------------------------------


def parquet_folder(folder: Path, settings: DataSettings) -> Source:
    """Open ``train*.parquet`` and, if there, ``test*.parquet`` of a folder or its ``data/``."""
    train = ParquetSplit(_training_files(folder, settings), settings)
    test_files = _parquet_files(folder, "test")
    test = ParquetSplit(test_files, settings) if test_files else None
    return _checked_source(
        settings,
        name=folder.resolve().name,
        class_names=train.class_names,
        train=LabelledImages(train.labels(), train.read),
        test=LabelledImages(test.labels(), test.read) if test else None,
    )


def _training_files(folder: Path, settings: DataSettings) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(
            f"data.source {settings.source!r} is not an existing folder; known: 'digits', a "
            "folder with train-*.parquet, or a Hugging Face dataset name"
        )
    files = _parquet_files(folder, "train")
    if not files:
        found = sorted(path.name for path in folder.iterdir())
        raise ValueError(
            f"data.source {settings.source!r} must hold train-*.parquet (and may hold "
            f"test-*.parquet), got {', '.join(found[:8]) or 'an empty folder'}"
        )
    return files


def _parquet_files(folder: Path, split: str) -> list[Path]:
    """Files of a split in the order of their names, which number the shards."""
    return sorted(folder.glob(f"{split}*.parquet")) or sorted(
        (folder / "data").glob(f"{split}*.parquet")
    )


class ParquetSplit:
    """The files of one split, in order, as if they were one table."""

    def __init__(self, files: Sequence[Path], settings: DataSettings) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            self._files = [pq.ParquetFile(path) for path in files]
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(
                f"data.source {settings.source!r} holds a file that is not Parquet: {error}"
            ) from error
        schema = self._files[0].schema_arrow
        for path, file in zip(files, self._files, strict=True):
            if not file.schema_arrow.equals(schema):
                raise ValueError(
                    f"data.source {settings.source!r}: {path.name} and {files[0].name} must have "
                    "the same columns"
                )
        features = _hugging_face_features(schema)
        images = [name for name in schema.names if _kind(features, name) == "Image"]
        images += [name for name in IMAGE_COLUMNS if name in schema.names]
        self._image_column = _choose_column(
            settings, "image_column", candidates=images, known=schema.names
        )
        self._label_column = _choose_column(
            settings, "label_column", candidates=LABEL_COLUMNS, known=schema.names
        )
        self._source = settings.source
        self.class_names = _class_names(features.get(self._label_column))

    def labels(self) -> Int64[np.ndarray, "rows"]:
        """Read the label column."""
        import pyarrow as pa

        tables = [file.read(columns=[self._label_column]) for file in self._files]
        column = pa.concat_tables(tables)[self._label_column]
        if column.null_count or not pa.types.is_integer(column.type):
            nulls = f" with {column.null_count} empty cells" if column.null_count else ""
            raise ValueError(
                f"data.label_column {self._label_column!r} of data.source {self._source!r} must "
                f"hold whole numbers, got {column.type}{nulls}"
            )
        labels: np.ndarray = column.to_numpy().astype(np.int64)
        return labels

    def read(
        self, rows: Int64[np.ndarray, "rows"]
    ) -> Float32[np.ndarray, "rows channels height width"]:
        """Decode the images of ``rows``, which need not be sorted."""
        in_file_order = np.argsort(rows, kind="stable")
        pixels = stack_images(map(open_image, self._encoded(rows[in_file_order])))
        return pixels[np.argsort(in_file_order)]

    def _encoded(self, sorted_rows: Int64[np.ndarray, "rows"]) -> Iterator[bytes]:
        """Yield encoded images; one row group is in memory at a time."""
        start = 0
        for file in self._files:
            for group in range(file.num_row_groups):
                stop = start + file.metadata.row_group(group).num_rows
                first, last = np.searchsorted(sorted_rows, (start, stop))
                if first < last:
                    table = file.read_row_group(group, columns=[self._image_column])
                    column = table[self._image_column].take(sorted_rows[first:last] - start)
                    yield from self._cells(column)
                start = stop

    def _cells(self, column: "pa.ChunkedArray") -> Iterator[bytes]:
        import pyarrow as pa
        import pyarrow.compute as pc

        if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
            column = pc.struct_field(column, "bytes")
        if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
            raise ValueError(
                f"data.image_column {self._image_column!r} of data.source {self._source!r} must "
                f"hold encoded images (a struct with 'bytes'), got {column.type}"
            )
        if column.null_count:
            raise ValueError(
                f"data.image_column {self._image_column!r} of data.source {self._source!r} has "
                f"{column.null_count} rows without 'bytes': the images must be inside the file"
            )
        for cell in column:
            yield cell.as_py()


def _hugging_face_features(schema: "pa.Schema") -> Mapping[str, Any]:
    """What ``datasets`` notes about the columns of a file it wrote; empty for other files."""
    note = (schema.metadata or {}).get(b"huggingface")
    features = json.loads(note).get("info", {}).get("features", {}) if note else {}
    return features if isinstance(features, dict) else {}


def _kind(features: Mapping[str, Any], column: str) -> str | None:
    feature = features.get(column)
    return feature.get("_type") if isinstance(feature, dict) else None


def _class_names(feature: object) -> tuple[str, ...] | None:
    names = feature.get("names") if isinstance(feature, dict) else None
    return tuple(map(str, names)) if names else None


# --- a Hugging Face dataset by name -----------------------------------------------------------


def hugging_face_dataset(settings: DataSettings, cache_folder: Path | None = None) -> Source:
    """Load ``settings.source`` with ``datasets``; the first time this needs a network.

    Args:
        settings: ``source`` and ``config`` as ``datasets.load_dataset`` takes them.
        cache_folder: where the dataset is kept; ``None``: where ``datasets`` keeps all of them.
    """
    splits = _load_dataset(settings, cache_folder)
    if "train" not in splits:
        raise ValueError(
            f"data.source {settings.source!r} must have a split 'train', got {', '.join(splits)}"
        )
    train, class_names = _hugging_face_split(splits["train"], settings)
    test = _hugging_face_split(splits["test"], settings)[0] if "test" in splits else None
    name = settings.source if settings.config is None else f"{settings.source}/{settings.config}"
    return _checked_source(settings, name=name, class_names=class_names, train=train, test=test)


def hugging_face_files(
    settings: DataSettings, cache_folder: Path | None = None
) -> tuple[Path, ...]:
    """List the cached files of a Hugging Face dataset; see `hugging_face_dataset`."""
    splits = _load_dataset(settings, cache_folder)
    return tuple(
        Path(file["filename"])
        for name in ("train", "test")
        if name in splits
        for file in splits[name].cache_files
    )


def _load_dataset(settings: DataSettings, cache_folder: Path | None) -> "DatasetDict":
    import datasets

    try:
        with _quietly():
            return datasets.load_dataset(
                settings.source,
                settings.config,
                cache_dir=None if cache_folder is None else os.fspath(cache_folder),
            )
    except Exception as error:  # network, hub, builders and files each raise types of their own
        raise ValueError(
            f"data.source {settings.source!r} (data.config {settings.config!r}) is neither an "
            f"existing folder nor a Hugging Face dataset that could be loaded: {error}. Check the "
            "name and the network, or use 'digits' or a folder with train-*.parquet"
        ) from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep ``datasets`` from reporting each load to a download counter, and from chatting."""
    from datasets import config

    before = config.HF_UPDATE_DOWNLOAD_COUNTS
    config.HF_UPDATE_DOWNLOAD_COUNTS = False
    # The hub client logs each retry; the error that follows says what matters in one line.
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        config.HF_UPDATE_DOWNLOAD_COUNTS = before
        log.setLevel(level)


def _hugging_face_split(
    split: "Dataset", settings: DataSettings
) -> tuple[LabelledImages, tuple[str, ...] | None]:
    from datasets import ClassLabel, Image, Value

    features = split.features
    image_column = _choose_column(
        settings,
        "image_column",
        candidates=[name for name, feature in features.items() if isinstance(feature, Image)],
        known=list(features),
    )
    if not isinstance(features[image_column], Image):
        raise ValueError(
            f"data.image_column {image_column!r} of data.source {settings.source!r} must hold "
            f"images, got {features[image_column]}"
        )
    label_column = _choose_column(
        settings, "label_column", candidates=LABEL_COLUMNS, known=list(features)
    )
    feature = features[label_column]
    if not isinstance(feature, ClassLabel) and not (
        isinstance(feature, Value) and "int" in feature.dtype
    ):
        raise ValueError(
            f"data.label_column {label_column!r} of data.source {settings.source!r} must hold "
            f"whole numbers, got {feature}"
        )
    labels = np.asarray(split.with_format("numpy")[label_column][:], dtype=np.int64)

    def read(rows: np.ndarray) -> Pixels:
        return stack_images(example[image_column] for example in split.select(rows))

    class_names = tuple(feature.names) if isinstance(feature, ClassLabel) else None
    return LabelledImages(labels, read), class_names


# --- for both ---------------------------------------------------------------------------------


def _choose_column(
    settings: DataSettings, field: str, *, candidates: Sequence[str], known: Sequence[str]
) -> str:
    """Take the column that the setting names, else the first candidate that exists."""
    asked = getattr(settings, field)
    present = [name for name in ([asked] if asked is not None else candidates) if name in known]
    if not present:
        raise ValueError(
            f"data.{field} must name a column of data.source {settings.source!r}, got {asked!r}; "
            f"known: {', '.join(known)}"
        )
    return present[0]


def _checked_source(
    settings: DataSettings,
    *,
    name: str,
    class_names: tuple[str, ...] | None,
    train: LabelledImages,
    test: LabelledImages | None,
) -> Source:
    """Make sure that the labels are class numbers; without names, classes are called by number."""
    splits = {"train": train} if test is None else {"train": train, "test": test}
    for split, images in splits.items():
        if len(images.labels) == 0:
            raise ValueError(f"data.source {settings.source!r} has no rows in split {split!r}")
    if class_names is None:
        num_classes = 1 + int(max(images.labels.max() for images in splits.values()))
        # Numbers that are no class numbers (years, ids) would make for a very wide output layer.
        num_classes = min(num_classes, len(train.labels))
        class_names = tuple(map(str, range(num_classes)))
    for split, images in splits.items():
        lowest, highest = int(images.labels.min()), int(images.labels.max())
        if lowest < 0 or highest >= len(class_names):
            raise ValueError(
                f"data.label_column of data.source {settings.source!r} must hold class numbers "
                f"from 0 to {len(class_names) - 1}, got {lowest} to {highest} in split {split!r}"
            )
    return Source(name, class_names, train, test)
