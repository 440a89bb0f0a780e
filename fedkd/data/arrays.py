"""Arrays in memory as a source: those of an NPZ file, or what a function of one's own returns.

Inputs are called ``x``, ``inputs``, ``images``, ``features``, ``texts`` or ``tokens``, labels
``y``, ``labels`` or ``targets``; ``x_train`` or ``train_x`` and ``x_test`` or ``test_x`` are those
of two splits, in small or capital letters. What inputs are, their axes say:

- four or three axes: pictures, with 1 or 3 channels first or last, or grey without that axis; whole
  numbers are 0 to 255, fractions 0 to 1;
- two axes: features; or numbers of tokens, from 0 (which fills texts up) on, where there is an
  entry ``vocabulary`` or ``data.text.vocabulary`` says how many tokens there are;
- one axis: texts.
"""

import hashlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

from fedkd import own_code
from fedkd.data.images import resize_pixels
from fedkd.data.labels import UNLABELLED, LabelColumn, read_label_column
from fedkd.data.memory import memory_bytes
from fedkd.data.natural_ids import NaturalIds, ReadIds, check_named
from fedkd.data.partition_settings import NaturalPartition
from fedkd.data.settings import DataSettings
from fedkd.data.texts import TextEncoder, plan_encoder
from fedkd.inputs import InputShape, Kind
from fedkd.names import printable
from fedkd.randomness import seeded_everything

INPUTS = ("x", "inputs", "images", "features", "texts", "tokens")
LABELS = ("y", "labels", "targets")
ABOUT = ("class_names", "vocabulary")
"""Entries that say something about the others."""

Read = Callable[[np.ndarray], Float32[np.ndarray, "_rows *_shape"]]


class Arrays(NamedTuple):
    """What was found among arrays.

    Attributes:
        kind: of the inputs.
        reads: by split, rows to inputs.
        labels: by split.
        encoder: of texts.
        vocabulary: how many tokens there are, where inputs are numbers of them.
        left_aside: entries that are not read.
        ids: reads whose each training row is.
    """

    kind: Kind
    reads: dict[str, Read]
    labels: dict[str, LabelColumn]
    encoder: TextEncoder | None
    vocabulary: int | None
    left_aside: tuple[str, ...]
    ids: ReadIds


def npz_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read all arrays of an NPZ file; nothing in it is run.

    Raises:
        ValueError: if it is none, holds Python objects, or does not fit into memory.
    """
    name = printable(path.name)
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > memory_bytes():
            raise ValueError(f"{name} needs {size / 2**30:.1f} GiB of memory, more than there is")
        found, key = {}, ""
        with np.load(path, allow_pickle=False) as archive:
            for key in archive.files:
                found[key] = archive[key]
        return found
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise ValueError(f"{name}: {_of_objects(key)}; save the file again") from None
        raise ValueError(f"{name} cannot be read: {printable(str(error))}") from error
    except (OSError, zipfile.BadZipFile, EOFError, KeyError, MemoryError) as error:
        raise ValueError(f"{name} is no NPZ file that can be read: {error}") from error


def own_arrays(settings: DataSettings) -> dict[str, np.ndarray]:
    """Call the function that ``data.source`` names, with ``data.options``.

    It returns a mapping of arrays, or of what NumPy makes arrays of, called as those of an NPZ
    file are. The global generators of Python, NumPy and torch have one state whenever it is called,
    whatever the run's seed: the same rows for all arms.

    Raises:
        ValueError: naming the function, if it cannot be loaded, fails, or returns anything else.
    """
    name = settings.source
    function = own_code.load(name, "data.source")
    if not callable(function):
        raise ValueError(
            f"data.source {name!r} must name a callable, got {type(function).__name__}"
        )
    try:
        with seeded_everything(0):
            found = function(**settings.options)
    # Somebody else's code may fail in any way; the message must still say which it was.
    except Exception as error:
        raise ValueError(
            f"data.source {name!r} failed with options {settings.options}: "
            f"{own_code.told(error, name)}"
        ) from error
    if not isinstance(found, Mapping):
        raise ValueError(
            f"data.source {name!r} must return a mapping of arrays such as {{'x': ..., 'y': ...}}, "
            f"got {type(found).__name__}"
        )
    return {str(key): np.asarray(value) for key, value in found.items()}


def own_digest(settings: DataSettings) -> str:
    """Return a SHA-256 of what the function that ``data.source`` names returns now.

    Raises:
        ValueError: see `own_arrays`.
    """
    digest = hashlib.sha256()
    for key, array in own_arrays(settings).items():
        if array.dtype.kind == "O":
            raise ValueError(f"data.source {settings.source!r}: {_of_objects(key)}")
        digest.update(f"{key} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def find_arrays(
    arrays: Mapping[str, np.ndarray],
    settings: DataSettings,
    encoder: TextEncoder | None = None,
    *,
    needs_labels: bool = True,
) -> Arrays:
    """Tell inputs and labels of each split among arrays.

    Args:
        arrays: by name.
        settings: the table ``data``.
        encoder: of texts; None: one that fits them.
        needs_labels: else training inputs without labels are found as well.

    Raises:
        ValueError: if there are none, or they do not fit together; names the array.
    """
    for key, array in arrays.items():
        if array.dtype.kind == "O":
            raise ValueError(_of_objects(key))
        if array.dtype.kind not in "biufU":
            raise ValueError(
                f"array {printable(key)!r} holds {array.dtype}: arrays of numbers, truth values or "
                "text are read"
            )
    keys = {"train": _keys(arrays, "train"), "test": _keys(arrays, "test")}
    if keys["train"] is None and not needs_labels:
        found = _called(arrays, INPUTS, "inputs", "train")
        if found and arrays[found].ndim:
            arrays = {**arrays, "no labels": np.full(len(arrays[found]), UNLABELLED)}
            keys = {"train": (found, "no labels"), "test": None}
    if keys["train"] is None:
        raise ValueError(
            f"there must be inputs (x_train or x) and labels (y_train or y), got "
            f"{printable(', '.join(arrays)) or 'no arrays'}"
        )
    pairs = {split: pair for split, pair in keys.items() if pair is not None}
    used = {key for pair in pairs.values() for key in pair}
    check_named(settings.partition, settings.source, _id_arrays(arrays, pairs["train"]))
    vocabulary = _vocabulary(arrays, settings)
    kinds = {split: _kind(x, arrays[x], vocabulary) for split, (x, _) in pairs.items()}
    kind, shapes = kinds["train"], {arrays[x].shape[1:] for x, _ in pairs.values()}
    if len(set(kinds.values())) > 1 or (kind != "pictures" and len(shapes) > 1):
        raise ValueError(
            "arrays of training and test inputs must have one shape but for the rows, got "
            + " and ".join(str(arrays[x].shape) for x, _ in pairs.values())
        )
    if kind == "text" and vocabulary is None:
        texts = arrays[pairs["train"][0]].tolist()
        encoder = encoder or plan_encoder([texts], settings.text)
    else:
        encoder = None
    reads: dict[str, Read] = {}
    for split, (x, _) in pairs.items():
        if encoder is not None:
            reads[split] = partial(_texts, arrays[x], encoder)
        elif kind == "text":
            reads[split] = partial(_tokens, arrays[x], x, vocabulary or 0)
        elif kind == "features":
            reads[split] = partial(_features, arrays[x], x)
        else:
            reads[split] = partial(_pictures, arrays[x], x, settings.resize)
    names = _class_names(arrays)
    labels = {split: _labels(arrays, *pair, names) for split, pair in pairs.items()}
    ids = partial(_ids, arrays, len(arrays[pairs["train"][0]]))
    if isinstance(settings.partition, NaturalPartition):
        used |= _id_names(settings.partition.named_column)
    left = tuple(printable(key) for key in arrays if key not in used and key not in ABOUT)
    if encoder is not None and encoder.vocabulary is None:
        kind = "features"
    return Arrays(kind, reads, labels, encoder, vocabulary, left, ids)


def _of_objects(key: str) -> str:
    """Say what to do with an array of Python objects, as a column of a data frame often is."""
    is_label = any(word in key.lower().split("_") for word in LABELS)
    word = key if key.isidentifier() else "array"
    first = f"np.asarray({word}, dtype={'int' if is_label else 'np.float32'})"
    return (
        f"array {printable(key)!r} holds Python objects (dtype object), which could run code and "
        f"are not read: give {first}, or for {'class names' if is_label else 'texts'} "
        f"np.asarray({word}, dtype=str)"
    )


def _keys(arrays: Mapping[str, np.ndarray], split: str) -> tuple[str, str] | None:
    """Return what the inputs and the labels of a split are called; None where there are none."""
    inputs = _called(arrays, INPUTS, "inputs", split)
    labels = _called(arrays, LABELS, "labels", split)
    return (inputs, labels) if inputs and labels else None


def _called(arrays: Mapping[str, np.ndarray], words: Sequence[str], what: str, split: str) -> str:
    """Return what an array of a split is called; empty where there is none."""
    named = {f"{word}_{split}" for word in words} | {f"{split}_{word}" for word in words}
    found = [key for key in arrays if key.lower() in named]
    if not found and split == "train":
        found = [key for key in arrays if key.lower() in words]
    if len(found) > 1:
        raise ValueError(
            f"arrays {printable(' and '.join(found))} both look like the {what} of the split "
            f"{split!r}: leave one out"
        )
    return found[0] if found else ""


def _vocabulary(arrays: Mapping[str, np.ndarray], settings: DataSettings) -> int | None:
    if settings.text.vocabulary is not None:
        return settings.text.vocabulary
    array = arrays.get("vocabulary")
    if array is None:
        return None
    if array.size != 1 or array.dtype.kind not in "iu" or not 3 <= int(array.reshape(())) <= 2**24:
        raise ValueError(
            "array 'vocabulary' must be one whole number from 3 to 2**24, of tokens, got "
            f"{array.dtype} of shape {array.shape}"
        )
    return int(array.reshape(()))


def _kind(key: str, array: np.ndarray, vocabulary: int | None) -> Kind:
    if array.dtype.kind == "U" and array.ndim == 1:
        return "text"
    if array.dtype.kind != "U" and array.ndim == 2:
        if vocabulary is None:
            return "features"
        if array.dtype.kind in "iu":
            return "text"
        raise ValueError(
            f"array {key!r} must hold numbers of tokens, since there is a vocabulary, got "
            f"{array.dtype}"
        )
    if array.dtype.kind != "U" and array.ndim in (3, 4):
        return "pictures"
    raise ValueError(
        f"array {printable(key)!r} must have the axes [rows, channels, height, width] or [rows, "
        f"height, width] of pictures, [rows, features], or [rows] of texts, got {array.dtype} of "
        f"shape {array.shape}"
    )


def _class_names(arrays: Mapping[str, np.ndarray]) -> tuple[str, ...] | None:
    names = arrays.get("class_names")
    if names is None:
        return None
    if names.ndim != 1 or names.dtype.kind != "U":
        raise ValueError(f"array 'class_names' must be a list of texts, got {names.dtype}")
    return tuple(names.tolist())


def _labels(
    arrays: Mapping[str, np.ndarray], x: str, y: str, names: tuple[str, ...] | None
) -> LabelColumn:
    import pyarrow as pa

    labels = arrays[y]
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != arrays[x].shape[:1]:
        raise ValueError(
            f"array {printable(y)!r} must have one class for each of the {len(arrays[x])} rows of "
            f"{printable(x)!r}, got shape {arrays[y].shape}"
        )
    if labels.dtype.kind == "f":
        labels = labels.astype(np.float64)
    column = pa.chunked_array([pa.array(labels)])
    file = f"array {printable(y)!r}"
    return read_label_column(column, file=file, names=names, where=partial(_place, y))


def _id_names(column: str) -> set[str]:
    return {column, f"{column}_train", f"train_{column}"}


def _id_arrays(arrays: Mapping[str, np.ndarray], train: tuple[str, str]) -> list[str]:
    """Return the arrays that may say whose each training row is."""
    shape = arrays[train[0]].shape[:1]
    return [
        key
        for key, array in arrays.items()
        if key not in train and array.shape == shape and array.dtype.kind in "iuU"
    ]


def _ids(arrays: Mapping[str, np.ndarray], rows: int, column: str) -> NaturalIds:
    """Read an array of texts or whole numbers, one for each training row."""
    found = [arrays[key] for key in arrays if key in _id_names(column)]
    if len(found) != 1 or found[0].shape != (rows,) or found[0].dtype.kind not in "iuU":
        raise ValueError(
            f"data.partition.column {column!r} must name one array of {rows} texts or whole "
            f"numbers, one for each training row; known: {printable(', '.join(arrays))}"
        )
    names, numbers = np.unique(found[0], return_inverse=True)
    return NaturalIds(tuple(printable(str(name)) for name in names), numbers.astype(np.int64))


def inputs_in(
    arrays: Mapping[str, np.ndarray],
    shape: InputShape,
    encoder: TextEncoder | None,
) -> tuple[int, Read]:
    """Find inputs of a known shape among arrays, without labels: rows to be predicted.

    Args:
        arrays: by name; ``x`` or another name of inputs, of the test split where there are two.
        shape: of one input; pictures are brought to it in height and width.
        encoder: of texts.

    Returns:
        How many rows there are, and what reads some of them.

    Raises:
        ValueError: if there are none, or they are of another kind or shape; names the array.
    """
    wanted = {f"{word}_test" for word in INPUTS} | {f"test_{word}" for word in INPUTS}
    found = [key for key in arrays if key.lower() in wanted]
    found = found or [key for key in arrays if key.lower() in INPUTS]
    if len(found) != 1:
        raise ValueError(
            f"there must be one array of inputs, called x or {', '.join(INPUTS[1:])}, got "
            f"{printable(', '.join(arrays)) or 'no arrays'}"
        )
    (key,) = found
    array = arrays[key]
    kind = _kind(key, array, shape.vocabulary if encoder is None else None)
    if kind == "text" and encoder is not None:
        return len(array), partial(_texts, array, encoder)
    if kind == "pictures" and shape.kind == "pictures":
        _, height, width = shape.sides
        return len(array), partial(_pictures, array, key, (height, width))
    if kind != shape.kind or encoder is not None or array.shape[1:] != shape.sides:
        expected = "texts" if encoder is not None else str(shape)
        raise ValueError(
            f"array {printable(key)!r} must hold {expected}, got {array.dtype} of shape "
            f"{array.shape}"
        )
    if kind == "text":
        return len(array), partial(_tokens, array, key, shape.vocabulary or 0)
    return len(array), partial(_features, array, key)


# --- inputs of rows -----------------------------------------------------------------------------


def _texts(
    array: np.ndarray, encoder: TextEncoder, rows: Int64[np.ndarray, "rows"]
) -> Float32[np.ndarray, "rows width"]:
    return encoder.encode(array[rows].tolist())


def _tokens(
    array: np.ndarray, key: str, vocabulary: int, rows: Int64[np.ndarray, "rows"]
) -> Float32[np.ndarray, "rows length"]:
    chosen = array[rows]
    bad = ((chosen < 0) | (chosen >= vocabulary)).any(axis=1)
    _check(bad, key, rows, f"numbers of tokens must be from 0 to {vocabulary - 1}")
    numbers: np.ndarray = chosen.astype(np.float32)
    return numbers


def _features(
    array: np.ndarray, key: str, rows: Int64[np.ndarray, "rows"]
) -> Float32[np.ndarray, "rows features"]:
    with np.errstate(over="ignore"):
        chosen: np.ndarray = array[rows].astype(np.float32)
    _check(~np.isfinite(chosen).all(axis=1), key, rows, "must hold finite numbers up to 3.4e38")
    return chosen


def _pictures(
    array: np.ndarray,
    key: str,
    resize: tuple[int, int] | None,
    rows: Int64[np.ndarray, "rows"],
) -> Float32[np.ndarray, "rows channels height width"]:
    chosen = array[rows]
    if chosen.ndim == 3:
        chosen = chosen[:, None]
    else:
        first, last = chosen.shape[1] in (1, 3), chosen.shape[3] in (1, 3)
        if first == last:
            raise ValueError(
                f"array {printable(key)!r}: one of the second and the last axis must be 1 or 3 "
                f"channels, got shape {array.shape}"
            )
        chosen = chosen if first else chosen.transpose(0, 3, 1, 2)
    most = 255 if chosen.dtype.kind in "iu" else 1
    inside = ((chosen >= 0) & (chosen <= most)).all(axis=(1, 2, 3))
    what = "whole numbers" if most == 255 else "fractions"
    _check(~inside, key, rows, f"{what} must be from 0 to {most}")
    pixels = np.ascontiguousarray(chosen).astype(np.float32) / np.float32(most)
    return pixels if resize is None else resize_pixels(pixels, resize)


def _check(bad: np.ndarray, key: str, rows: np.ndarray, why: str) -> None:
    if bad.any():
        raise ValueError(f"{_place(key, int(rows[np.argmax(bad)]))}: {why}")


def _place(key: str, row: int) -> str:
    return f"array {printable(key)!r}, index {row} (counted from 0)"
