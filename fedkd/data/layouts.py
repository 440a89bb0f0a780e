"""Which files of a folder hold which split, by the rules of the ``datasets`` library.

A split's name is looked for in the names of folders, then in those of files; without any, all
files are for training. Where these rules would mix two uploads, or go on without a shard, the
folder is refused.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal, NamedTuple

from fedkd.names import printable

Kind = Literal["parquet", "arrow", "pictures", "csv", "npz"]

SPLIT_WORDS: Mapping[str, frozenset[str]] = {
    "train": frozenset({"train", "training"}),
    "validation": frozenset({"validation", "valid", "dev", "val"}),
    "test": frozenset({"test", "testing", "eval", "evaluation"}),
}
PICTURE_ENDINGS = frozenset(
    f".{ending}"
    for endings in (
        "png apng jpg jpeg jpe jfif gif bmp dib webp tif tiff",
        "ppm pgm pbm pnm jp2 j2k jpx tga ico pcx avif",
    )
    for ending in endings.split()
)
NOT_READ = {
    f".{ending}": what
    for endings, what in (
        ("xlsx xls arff", "spreadsheets, which have to be saved as CSV"),
        ("txt json jsonl ndjson xml", "text"),
        ("wav mp3 flac ogg", "sound"),
        ("zip tar tgz gz xz bz2 zst 7z rar", "archives, which have to be unpacked"),
        ("npy h5 hdf5 mat pkl pickle pt pth", "arrays, which have to be saved as NPZ"),
        ("arrow feather", "Arrow files without the state.json of save_to_disk"),
    )
    for ending in endings.split()
}
SINGLE_FILES: Mapping[str, Kind] = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".npz": "npz",
}
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")

MOST_ENTRIES = 2_000_000
DEEPEST = 8

SHARD = re.compile(r"(?P<family>.*)-(?P<number>\d+)-of-(?P<count>\d+)(?:-[0-9a-zA-Z]+)?")
NUMBERING = re.compile(r"([-._ ]*\d+)+$")
BETWEEN_WORDS = re.compile(r"[-._ 0-9]+")


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of a folder that are read, by split.

    Attributes:
        kind: ``parquet``; ``arrow``: written by ``save_to_disk``; ``pictures``: picture files in
            folders that are named after their class; ``csv``; ``npz``: arrays.
        train: the files of the training split, in the order of their rows.
        test: those of the test split; none where there is no such split.
        notes: files that describe the others.
        left_aside: what is not read: names of splits, or of single files.
        train_depth: how many folders above the training files lead to their split.
        test_depth: the same for the test files.
    """

    kind: Kind
    train: tuple[Path, ...]
    test: tuple[Path, ...] = ()
    notes: tuple[Path, ...] = ()
    left_aside: tuple[str, ...] = ()
    train_depth: int = 0
    test_depth: int = 0

    def splits(self) -> Iterator[tuple[str, tuple[Path, ...], int]]:
        """Yield the name of each split, its files and their depth."""
        yield "train", self.train, self.train_depth
        if self.test:
            yield "test", self.test, self.test_depth

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that the data is read from."""
        return (*self.notes, *self.train, *self.test)


class Family(NamedTuple):
    """Files that belong together, by what their names have in common."""

    folder: PurePath
    name: str


def find_layout(path: Path, source: str) -> Layout:
    """Look at a folder or a single file.

    Args:
        path: where it is.
        source: how the setting ``data.source`` calls it.

    Raises:
        ValueError: if it is no such thing or its files do not fit together; names them.
    """
    try:
        return _find_layout(path, source)
    except OSError as error:
        raise ValueError(
            f"data.source {source!r}: {printable(os.fspath(error.filename or path))} cannot be "
            f"read: {error.strerror or error}"
        ) from error


def _find_layout(path: Path, source: str) -> Layout:
    if path.is_file():
        kind = SINGLE_FILES.get(path.suffix.lower())
        if kind is not None:
            return Layout(kind, (path,))
        what = NOT_READ.get(path.suffix.lower(), "neither a folder nor a Parquet, CSV or NPZ file")
        raise ValueError(f"data.source {source!r} is {what}: {what_works()}")
    if not path.is_dir():
        there = "neither a folder nor a regular file"
        what = there if path.exists() else "not an existing folder or file"
        raise ValueError(f"data.source {source!r} is {what}: {what_works()}")
    saved = _saved_to_disk(path, source)
    if saved is not None:
        return saved
    files = _Files(path, source)
    tables = [name for name in files.names if name.suffix.lower() == ".parquet"]
    tables = [name for name in tables if name.name not in METADATA_FILES]
    pictures = [name for name in files.names if name.suffix.lower() in PICTURE_ENDINGS]
    if tables:
        layout = _by_split("parquet", tables, files)
        for of_split in (layout.train, layout.test):
            _check_shards(of_split, files)
        return layout
    if pictures:
        described = [name for name in files.names if name.name in METADATA_FILES]
        if described:
            raise ValueError(
                f"data.source {source!r}: labels in {_listed(described)} are not read yet: picture "
                "files are read by the folder of their class (train/cat/1.png), and the file left "
                "out"
            )
        return _by_split("pictures", pictures, files)
    cells = [name for name in files.names if SINGLE_FILES.get(name.suffix.lower()) == "csv"]
    if cells:
        return _by_split("csv", cells, files)
    arrays = [name for name in files.names if name.suffix.lower() == ".npz"]
    if len(arrays) == 1:
        return Layout("npz", files.paths(arrays))
    if arrays:
        raise ValueError(
            f"data.source {source!r} holds several NPZ files ({_listed(arrays)}): name one of them"
        )
    raise ValueError(f"data.source {source!r} {_nothing_read(files.names)}: {what_works()}")


def what_works() -> str:
    """Name all that ``data.source`` may be."""
    return (
        "known: 'digits'; a folder with train-*.parquet or train.csv, with pictures in folders of "
        "their class (train/cat/1.png) or from save_to_disk; a Parquet, CSV or NPZ file; "
        "package.module:callable; the name of a Hugging Face dataset"
    )


def _nothing_read(names: Sequence[PurePath]) -> str:
    if not names:
        return "is an empty folder"
    endings = Counter(name.suffix.lower() for name in names)
    for ending, _ in endings.most_common():
        if ending in NOT_READ:
            of_kind = [name for name in names if name.suffix.lower() == ending]
            return f"holds {NOT_READ[ending]} ({_listed(of_kind)}), which is not read yet"
    return f"holds no data that can be read, but {_listed(names)}"


class _Files:
    """What is in a folder and below it, as names relative to it."""

    def __init__(self, root: Path, source: str) -> None:
        self.root = root
        self.source = source
        self.names = sorted(self._walk(root, PurePath(), ()))

    def _walk(
        self, folder: Path, relative: PurePath, above: tuple[tuple[int, int], ...]
    ) -> Iterator[PurePath]:
        state = folder.stat()
        here = (state.st_dev, state.st_ino)
        if here in above or len(above) > DEEPEST:  # a link that leads in circles
            return
        with os.scandir(folder) as entries:
            for count, entry in enumerate(entries):
                if count > MOST_ENTRIES:
                    raise ValueError(
                        f"data.source {self.source!r}: more than {MOST_ENTRIES:,} files in "
                        f"{printable(str(relative))}"
                    )
                name = relative / entry.name
                # As `datasets`: hidden files, and __MACOSX and the like.
                if entry.name.startswith((".", "__")):
                    continue
                if entry.is_dir():
                    yield from self._walk(folder / entry.name, name, (*above, here))
                elif entry.is_file():
                    yield name
                elif name.suffix.lower() in (*SINGLE_FILES, *PICTURE_ENDINGS):
                    what = "a link to nothing" if entry.is_symlink() else "not a regular file"
                    raise self.refused(f"{printable(str(name))} is {what}")

    def refused(self, why: str) -> ValueError:
        return ValueError(f"data.source {self.source!r}: {why}")

    def paths(self, names: Iterable[PurePath]) -> tuple[Path, ...]:
        return tuple(self.root / name for name in names)


def _by_split(kind: Kind, names: Sequence[PurePath], files: _Files) -> Layout:
    """Tell the splits apart; ``train_noisy`` is for training only where there is no ``train``."""
    families = {name: _family_by_folder(name) for name in names}
    in_folders = any(families.values())
    if not in_folders:
        families = {name: _family_by_name(name) for name in names}
        speaking = [bool(family and _splits_of(family.name)) for family in families.values()]
        # A single picture may be called test.png, as a class may have such a member.
        if not (all(speaking) if kind == "pictures" else any(speaking)):
            return Layout(kind, files.paths(names))
    members: dict[Family, list[PurePath]] = {}
    for name, family in families.items():
        if family is not None:
            members.setdefault(family, []).append(name)
    chosen = {split: _choose_family(split, members, files) for split in ("train", "test")}
    others = [
        name
        for name in names
        if (family := families[name]) is None or family not in chosen.values()
    ]
    train, test = chosen["train"], chosen["test"]
    if train is None:
        raise files.refused(
            f"there must be a split 'train' (train-*.parquet, or a folder train), got "
            f"{_listed(names)}"
        )
    return Layout(
        kind,
        files.paths(members[train]),
        files.paths(members[test]) if test is not None else (),
        left_aside=_left_aside(others, families),
        train_depth=len(train.folder.parts) + 1 if in_folders else 0,
        test_depth=len(test.folder.parts) + 1 if in_folders and test is not None else 0,
    )


def _family_by_folder(name: PurePath) -> Family | None:
    for depth, folder in enumerate(name.parts[:-1]):
        if _splits_of(NUMBERING.sub("", folder)):
            return Family(PurePath(*name.parts[:depth]), NUMBERING.sub("", folder))
    return None


def _family_by_name(name: PurePath) -> Family | None:
    shard = SHARD.fullmatch(name.stem)
    return Family(name.parent, shard["family"] if shard else NUMBERING.sub("", name.stem))


def _splits_of(family: str) -> list[str]:
    words = set(BETWEEN_WORDS.split(family.casefold()))
    return [split for split, known in SPLIT_WORDS.items() if words & known]


def _choose_family(
    split: str, members: Mapping[Family, Sequence[PurePath]], files: _Files
) -> Family | None:
    candidates = [family for family in members if _splits_of(family.name) == [split]]
    exact = [family for family in candidates if family.name.casefold() in SPLIT_WORDS[split]]
    candidates = exact or candidates
    if len(candidates) > 1:
        first, second = (str(members[family][0]) for family in candidates[:2])
        raise files.refused(
            f"{printable(first)} and {printable(second)} both look like the split {split!r}: leave "
            "one out, or name the folder or the file of one"
        )
    return candidates[0] if candidates else None


def _left_aside(
    others: Sequence[PurePath], families: Mapping[PurePath, Family | None]
) -> tuple[str, ...]:
    named = {
        printable(str(family.folder / family.name) if family else str(name))
        for name in others
        for family in [families[name]]
    }
    return tuple(sorted(named))


def _check_shards(paths: Sequence[Path], files: _Files) -> None:
    """Make sure that the files of a split are one complete set: names say ``i-of-n``."""
    shards = [(path, SHARD.fullmatch(path.stem)) for path in paths]
    numbered = [
        (path, int(match["number"]), int(match["count"])) for path, match in shards if match
    ]
    if not numbered:
        return
    first, _, count = numbered[0]
    other = next((path for path, name in shards if not name), None)
    other = other or next((path for path, _, of in numbered if of != count), None)
    seen: dict[int, Path] = {}
    for path, number, _ in numbered:
        if other is None and number in seen:
            first, other = seen[number], path
        seen.setdefault(number, path)
    if other is not None:
        raise files.refused(
            f"{printable(first.name)} and {printable(other.name)} are of two uploads: leave one "
            "of them out, or rows count twice"
        )
    missing = [number for number in range(count) if number not in seen]
    if missing or len(seen) > count:
        raise files.refused(
            f"{printable(first.name)} says that there are {count} files, got {len(seen)}: number "
            f"{missing[0] if missing else max(seen)} is "
            f"{'missing' if missing else 'one too many'}"
        )


def _listed(names: Sequence[PurePath]) -> str:
    shown = ", ".join(printable(str(name)) for name in names[:6])
    return f"{shown} and {len(names) - 6} more" if len(names) > 6 else shown


# --- what datasets.Dataset.save_to_disk wrote ------------------------------------------------


def _saved_to_disk(root: Path, source: str) -> Layout | None:
    index = root / "dataset_dict.json"
    if index.is_file():
        splits = _json_list(index, "splits", source)
        if "train" not in splits:
            raise ValueError(
                f"data.source {source!r}: there must be a split 'train', got "
                f"{printable(', '.join(splits)) or 'none'}"
            )
        train, train_notes = _saved_split(root / "train", source)
        test, test_notes = _saved_split(root / "test", source) if "test" in splits else ((), ())
        return Layout(
            "arrow",
            train,
            test,
            notes=(index, *train_notes, *test_notes),
            left_aside=tuple(printable(name) for name in splits if name not in ("train", "test")),
        )
    if (root / "state.json").is_file() and (root / "dataset_info.json").is_file():
        files, notes = _saved_split(root, source)
        return Layout("arrow", files, notes=notes)
    return None


def _saved_split(folder: Path, source: str) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    state = folder / "state.json"
    names = _json_list(state, "_data_files", source, key="filename")
    for name in names:
        # The list comes from whoever made the data, and leads nowhere else.
        if PurePath(name).name != name or not (folder / name).is_file():
            raise ValueError(
                f"data.source {source!r}: {printable(name)}, which {folder.name}/state.json lists, "
                "is missing"
            )
    return tuple(folder / name for name in names), (state, folder / "dataset_info.json")


def _json_list(path: Path, field: str, source: str, *, key: str | None = None) -> list[str]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        names = [entry if key is None else entry[key] for entry in table[field]]
    except (ValueError, RecursionError, LookupError, TypeError):
        names = [None]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"data.source {source!r}: {path.name} does not list {field!r} of a dataset"
        )
    return names
