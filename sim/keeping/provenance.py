"""What a run is made of besides its settings: its data, the code that makes its numbers, libraries.

Two runs of equal settings have equal numbers only where these are equal too.
"""

import ast
import hashlib
import importlib.machinery
import importlib.util
import itertools
import json
import os
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fedkd
import sim
import strategies
from fedkd.data import (
    public_source_digests,
    public_source_files,
    source_digests,
    source_files,
    view_digests,
    view_files,
)
from fedkd.own_code import is_own_code, package_of
from sim.keeping.records import IDENTITY_FILE, git_commit, write_text
from sim.settings import Settings, SettingsError
from sim.settings.permission import NAMING

if TYPE_CHECKING:
    from fedkd.distillation.settings import DistillSettings

OURS = (fedkd, sim, strategies)
SHOWING = (
    "sim/reports/",
    "sim/publishing/",
    "sim/commands/cli/",
    "sim/commands/progress.py",
    "sim/commands/overview.py",
    "sim/commands/planning.py",
    "sim/commands/watch.py",
    "sim/keeping/plans.py",
    "sim/trackers/",
    "sim/watching/",
    "sim/__main__.py",
)
"""What shows numbers and makes none."""

CACHE_FILE = ".digests.json"
"""In the output folder: digests of data files by path, so that they are read once."""

UNKNOWN = "unknown"
"""The digest of what cannot be found; differs from every other, itself included."""

_TIMM = "timm:"
_BY_VERSION = ("torch", "numpy")
_NONE, _THEN = "none", ", then "
_FRESH_S = 2.0
"""A file this young may be written again without its times telling."""


@dataclass(frozen=True)
class Provenance:
    """What a run is made of.

    Attributes:
        data: digests of the files that rows and first weights are read from, by name, and of the
            arrays that a function of one's own gives.
        code: digests of the files of code, by path from the folder that holds the package.
        versions: of libraries whose version can change bits, and of packages of one's own that
            are installed.
        commits: of packages of one's own that git knows, ``-dirty`` where their files are not
            the commit's. Only told: whether code is the same, its files say.
    """

    data: Mapping[str, str]
    code: Mapping[str, str]
    versions: Mapping[str, str]
    commits: Mapping[str, str] = field(default_factory=dict)

    def to_row(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "data": dict(self.data),
            "code": dict(self.code),
            "versions": dict(self.versions),
            "commits": dict(self.commits),
        }

    @classmethod
    def read(cls, folder: Path) -> "Provenance | None":
        """Return what the run of a folder is made of; None where that is not recorded."""
        try:
            row = json.loads((folder / IDENTITY_FILE).read_text(encoding="utf-8"))
            tables = [row[key] for key in ("data", "code", "versions")]
            # Runs from before commits were recorded have none.
            tables.append(row.get("commits", {}))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return cls(*tables) if all(map(_is_table, tables)) else None

    def mixed_with(self, later: "Provenance") -> "Provenance":
        """Return what a run is made of that began with this and went on with other code.

        It equals neither, so nobody takes it for a run of one of them; see `latest`.
        """

        def mix(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str]:
            names = dict.fromkeys((*before, *after))
            pairs = {name: (before.get(name, _NONE), after.get(name, _NONE)) for name in names}
            return {
                name: old if old.split(_THEN)[-1] == new else f"{old}{_THEN}{new}"
                for name, (old, new) in pairs.items()
            }

        return Provenance(
            self.data,
            mix(self.code, later.code),
            mix(self.versions, later.versions),
            mix(self.commits, later.commits),
        )

    def latest(self) -> "Provenance":
        """Return what the last part of a run is made of; without what was gone then."""

        def last(table: Mapping[str, str]) -> dict[str, str]:
            parts = {name: digests.split(_THEN)[-1] for name, digests in table.items()}
            return {name: digest for name, digest in parts.items() if digest != _NONE}

        return Provenance(self.data, last(self.code), last(self.versions), last(self.commits))


def _is_table(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


@dataclass(frozen=True, slots=True)
class Changes:
    """In what a run differs from what the same settings would give now.

    Attributes:
        data: files, each with what became of it.
        code: files and libraries, each with what became of it.
    """

    data: tuple[str, ...] = ()
    code: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.data or self.code)

    def __str__(self) -> str:
        return "; ".join(
            f"{what}: {_first(changed)}"
            for what, changed in (("data", self.data), ("code", self.code))
            if changed
        )


def changes(before: Provenance | None, now: Provenance) -> Changes:
    """Compare what a run was made of with what it would be made of now."""
    if before is None:
        return Changes((), ("what it was made of is not recorded",))
    versions = [
        f"{name} {before.versions.get(name, 'none')}, now {now.versions.get(name, 'none')}"
        for name in dict.fromkeys((*before.versions, *now.versions))
        if before.versions.get(name) != now.versions.get(name)
    ]
    return Changes(_changed(before.data, now.data), (*_changed(before.code, now.code), *versions))


def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, ...]:
    lines = []
    for name in dict.fromkeys((*before, *now)):
        old, new = before.get(name), now.get(name)
        if old == new and new != UNKNOWN:
            continue
        state = "is new" if old is None else "is gone" if new is None else "changed"
        lines.append(f"{name} {'cannot be found' if new == UNKNOWN else state}")
    return tuple(lines)


def _first(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# -- what there is now -------------------------------------------------------------------------


def provenance_of(settings: "Settings | DistillSettings", *, remember: bool = True) -> Provenance:
    """Return what a run of these settings is made of now.

    Args:
        settings: of the run.
        remember: keep digests of data files in the output folder, so that they are read once.

    Raises:
        SettingsError: the data cannot be found.
    """
    names = _callables(settings)
    versions = {name: version(name) for name in _BY_VERSION}
    data = settings.data
    texts = (data.text, *(view.text for view in data.views))
    hashed = any(text.form != "characters" for text in texts)
    named = (data.source, data.public.source, *(view.source for view in data.views))
    if hashed or "digits" in named:
        versions["scikit-learn"] = version("scikit-learn")
    if any(name.startswith(_TIMM) for name in names):
        with suppress(ImportError):
            versions["timm"] = version("timm")
    own = dict.fromkeys(package_of(name) for name in names if is_own_code(name))
    for package in own:
        if installed := _installed_version(package):
            versions[package] = installed
    commits = {package: commit for package in own if (commit := _commit(package))}
    data_digests = _data_digests(settings, remember=remember)
    return Provenance(data_digests, code_of(settings), versions, commits)


def code_of(settings: "Settings | DistillSettings") -> dict[str, str]:
    """Return digests of the files of code that a run of these settings is made of now."""
    own = [name for name in _callables(settings) if is_own_code(name)]
    return {**_our_code(), **_own_code(own)}


def _callables(settings: "Settings | DistillSettings") -> list[str]:
    """Return every name in settings that stands for code of one's own, or a model of timm."""
    table = settings.to_table()
    # The arms of a study are settings of other runs, and a tracker makes no numbers.
    for section in ("study", "trackers"):
        table.pop(section, None)
    return [name for name in _names_in(table) if name.startswith(_TIMM) or is_own_code(name)]


def _names_in(value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield from (value[key] for key in NAMING if isinstance(value.get(key), str))
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _names_in(inner)


def _installed_version(package: str) -> str | None:
    """Return the version of what a package was installed with; None if it was not."""
    distributions = packages_distributions().get(package, ())
    return version(distributions[0]) if distributions else None


def _commit(package: str) -> str | None:
    """Return the commit that the files of a package belong to, marked where they differ from it."""
    files = _files_of(package)
    if not files:
        return None
    root, first = files[0]
    tree = next((above for above in (root, *root.parents) if (above / ".git").exists()), None)
    if tree is None or _is_installed(root):
        return None
    top = root / first.relative_to(root).parts[0]
    return git_commit(tree, [str(top.relative_to(tree))])


def _our_code() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in OURS:
        (folder, *_) = package.__path__
        root = Path(folder).parent
        for path in _importable(Path(folder)):
            name = path.relative_to(root).as_posix()
            if not name.startswith(SHOWING):
                found[name] = _digest(path)
    return found


def _own_code(names: Sequence[str]) -> dict[str, str]:
    """Digest the whole package of each callable, and what it imports from beside itself."""
    found: dict[str, str] = {}
    known = {*sys.stdlib_module_names, *_BY_VERSION, *(package.__name__ for package in OURS)}
    waiting = [package_of(name) for name in names]
    while waiting:
        top = waiting.pop()
        if top in known:
            continue
        known.add(top)
        files = _files_of(top)
        if not files:
            found[top] = UNKNOWN
        for root, path in files:
            found[path.relative_to(root).as_posix()] = _digest(path)
            if path.suffix == ".py" and not _is_installed(root):
                waiting.extend(name for name in _imports(path) if _lies_in(root, name))
    return dict(sorted(found.items()))


def _files_of(top: str) -> list[tuple[Path, Path]]:
    """Return the files of a package or module, each with the folder it is imported from."""
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        folders = [Path(folder) for folder in spec.submodule_search_locations]
        return [(folder.parent, path) for folder in folders for path in _importable(folder)]
    path = Path(spec.origin or "")
    return [(path.parent, path)] if path.is_file() else []


def _importable(folder: Path) -> Iterator[Path]:
    """Yield every file under a folder that Python would import: source, and compiled modules."""
    suffixes = (*importlib.machinery.SOURCE_SUFFIXES, *importlib.machinery.EXTENSION_SUFFIXES)
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__pycache__")))
        for name in sorted(files):
            if name.endswith(suffixes):
                yield Path(place) / name


def _is_installed(root: Path) -> bool:
    """Tell whether a folder is one where packages are installed: not all beside is one's own."""
    return str(root) in {sysconfig.get_path(name) for name in ("purelib", "platlib")}


def _imports(path: Path) -> set[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return set()
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module)
    return {name.partition(".")[0] for name in names}


def _lies_in(root: Path, name: str) -> bool:
    return (root / f"{name}.py").is_file() or (root / name).is_dir()


def _digest(path: Path) -> str:
    # A study asks for hundreds of them with every run.
    try:
        found = path.stat()
        state = (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        known, digest = _digests.get(path, (None, UNKNOWN))
        if known != state:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            _digests[path] = (state, digest)
        return digest
    except OSError:
        return UNKNOWN


_digests: dict[Path, tuple[tuple[int, ...], str]] = {}
"""Digests of files as they were when they were last read."""


# -- data --------------------------------------------------------------------------------------


def _data_digests(settings: "Settings | DistillSettings", *, remember: bool) -> dict[str, str]:
    try:
        files, public = source_files(settings.data), public_source_files(settings.data)
        views = view_files(settings.data)
        arrays = source_digests(settings.data)
        for name, digest in public_source_digests(settings.data).items():
            arrays[f"public: {name}"] = digest
        arrays |= view_digests(settings.data)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    others = _other_files(settings)
    seen = [path for of_view in views for path in of_view]
    digests = file_digests(
        [*files, *public, *seen, *others], settings.output / CACHE_FILE, remember=remember
    )
    names = [
        *_names_apart(files),
        *(f"public: {name}" for name in _names_apart(public)),
        *(
            f"view {number}: {name}"
            for number, of_view in enumerate(views, 1)
            for name in _names_apart(of_view)
        ),
        *_names_apart(others),
    ]
    return {**dict(zip(names, digests, strict=True)), **arrays}


def _names_apart(files: Sequence[Path]) -> list[str]:
    """Name files by what tells them apart, wherever their folder is: ``train/cat/1.png``."""
    if not files:
        return []
    common = os.path.commonpath([path.parent for path in files])
    above = os.path.basename(common)
    return [os.path.join(above, os.path.relpath(path, common)) for path in files]


def _other_files(settings: "Settings | DistillSettings") -> list[Path]:
    """Return a run's trace of presence, and the files of weights that it begins with."""
    if isinstance(settings, Settings):
        trace = settings.presence.trace
        # Whatever file an algorithm's settings name is read.
        theirs = [value for _, value in settings.strategy if isinstance(value, Path)]
        found = [trace, *settings.clients.first_weights, *theirs]
        return list(dict.fromkeys(path for path in found if path is not None))
    student = settings.student.weights
    return [*settings.teacher.weights, *([] if student is None else [student])]


def file_digests(paths: Sequence[Path], cache: Path, *, remember: bool = True) -> list[str]:
    """Return a SHA-256 of each file's content; `UNKNOWN` for one that cannot be read.

    Args:
        paths: the files.
        cache: a file of digests by path, size, inode and times, where it can be written. A file
            that is rewritten has other times, even where a copy kept the time of modification.
        remember: write what was found into the cache.
    """
    known = _read_cache(cache)
    found: dict[str, Any] = {}
    digests = []
    for path in paths:
        try:
            place = str(path.resolve())
            seen = path.stat()
            stamp = [seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino, seen.st_dev]
            entry = known.get(place)
            if isinstance(entry, list) and entry[:-1] == stamp and isinstance(entry[-1], str):
                digests.append(entry[-1])
                continue
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            digests.append(UNKNOWN)
            continue
        digests.append(digest)
        youngest = max(seen.st_mtime, seen.st_ctime)
        if time.time() - youngest > _FRESH_S:
            found[place] = [*stamp, digest]
    if found and remember:
        # Read again: somebody else may have written meanwhile. What is lost is read once more.
        with suppress(OSError):
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_text(cache, json.dumps({**_read_cache(cache), **found}, indent=0) + "\n")
    return digests


def _read_cache(cache: Path) -> dict[str, Any]:
    try:
        table = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}


# -- which run is the same ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run of some settings is, or is to be made.

    Attributes:
        folder: of the run.
        kept: the run of equal settings that was found made of something else; None if there is
            none, or if it is taken as it is.
        changes: in what it differs; of one that is taken as it is, too.
    """

    folder: Path
    kept: Path | None = None
    changes: Changes = Changes()

    @property
    def note(self) -> str:
        """What to say about an earlier run that differs; empty where there is none."""
        if not self.changes:
            return ""
        if self.kept is None:
            return f"taken as it is, made with other code ({self.changes})"
        accept = "" if self.changes.data else "; --accept-code takes it as it is"
        return f"{self.changes}; the earlier run is kept, and it runs anew{accept}"


def notes_on(places: Mapping[str, Place]) -> list[str]:
    """Say, once for all runs of which it is true, which earlier ones do not count and why."""
    told: dict[str, list[str]] = {}
    for run, place in places.items():
        if place.changes:
            told.setdefault(place.note, []).append(run)
    return [f"{_first(runs, 6)}: {note}" for note, runs in told.items()]


def place_run(
    folder: Path, now: Provenance, *, accept_code: bool, begun: Callable[[Path], bool]
) -> Place:
    """Find the run that these settings and what they are made of give, or a place to make it.

    A run that is made of something else is kept: the new one's folder gets a number.

    Args:
        folder: named after the settings; others of the same settings are ``<folder>-2``, ....
        now: what the run would be made of.
        accept_code: take the newest run although its code changed; never with other data.
        begun: tells whether there is a run in a folder.
    """
    kept, found = None, Changes()
    for place in _places(folder):
        if not begun(place):
            break
        kept, found = place, changes(Provenance.read(place), now)
        if not found:
            return Place(place)
    if kept is not None and accept_code and not found.data:
        return Place(kept, None, found)
    return Place(place, kept, found)


def _places(folder: Path) -> Iterator[Path]:
    yield folder
    for number in itertools.count(2):
        yield folder.with_name(f"{folder.name}-{number}")


def check_same_make(
    folder: Path, now: Provenance, *, accept_code: bool
) -> tuple[Provenance, Changes]:
    """Refuse to go on with a run whose data or code is not what it began with.

    Args:
        folder: of the run.
        now: what it would go on with.
        accept_code: go on with other code.

    Returns:
        What the run is made of from here on, and what of it was accepted.

    Raises:
        SettingsError: says what changed and what would work.
    """
    before = Provenance.read(folder)
    found = changes(None if before is None else before.latest(), now)
    if found.data:
        raise SettingsError(
            f"data: run {folder} cannot go on with other rows than it began with "
            f"({_first(found.data)}); start a new run"
        )
    if found.code and not accept_code:
        raise SettingsError(
            f"run {folder} began with other code ({_first(found.code)}): --accept-code goes on "
            "with what is there now, a new run starts over"
        )
    return now if before is None else before.mixed_with(now), found
