"""Checkpoints on disk: written as a whole or not at all, and believed only after a full check.

A checkpoint is a folder ``round-000012`` with

- ``arrays-00001.safetensors``, ...: tables of arrays, a file for every 32 MiB or so, so that
  neither writing nor reading needs more memory than that;
- ``state.json``: plain values;
- ``MANIFEST.json``: the SHA-256 and the size of each file, what the checkpoint belongs to, and a
  SHA-256 of the manifest itself.

It is written under another name, every file and folder is forced onto the disk, and only then it
gets its name, so a process may be killed at any moment.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.numpy import load, save

from fedkd.training import Arrays

SCHEMA = 1
MANIFEST_FILE = "MANIFEST.json"
STATE_FILE = "state.json"
SHARD_BYTES = 32 * 2**20
"""A file of arrays is closed when it holds as much; one table is never split."""

_FileName = Annotated[str, Field(pattern=r"^(arrays-\d{5,}\.safetensors|state\.json)$")]
_NAME = re.compile(r"round-(\d{6,})")
_READ_BYTES = 2**20

Table = tuple[str, Arrays]
"""A name without a slash, and named arrays."""


class _File(BaseModel):
    """What the manifest says of a file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    bytes: int = Field(ge=0)
    sha256: str


class _Manifest(BaseModel):
    """What ``MANIFEST.json`` says, beside its own digest."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: int = Field(alias="schema")
    round: int = Field(ge=1)
    identity: dict[str, str]
    packages: dict[str, str]
    files: dict[_FileName, _File]


class CheckpointError(RuntimeError):
    """A checkpoint that must not be used; the text names it, the file and the reason."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every byte was found to be as it was written.

    Attributes:
        folder: where it is.
        round: the last complete round.
        packages: the versions that wrote it.
        values: content of ``state.json``.
        shards: the files of arrays.
    """

    folder: Path
    round: int
    packages: Mapping[str, str]
    values: Mapping[str, Any]
    shards: tuple[str, ...]

    def tables(self) -> Iterator[Table]:
        """Yield the tables of arrays, reading one file at a time.

        Raises:
            CheckpointError: a file whose digest is right and whose content is none of ours.
        """
        for shard in self.shards:
            tables: dict[str, Arrays] = {}
            try:
                for key, array in load((self.folder / shard).read_bytes()).items():
                    table, name = key.split("/", 1)
                    # A copy, or one array would keep the whole file in memory.
                    tables.setdefault(table, {})[name] = array.copy()
            except Exception as error:
                # A digest says that a file is as it was written, not by whom.
                raise _bad(self.folder, shard, f"cannot be read: {one_line(error)}") from None
            yield from tables.items()


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: holds the checkpoints; made when the first is written.
        identity: what a checkpoint has to belong to, by what a person would call it, such as
            ``{"settings": "<digest>"}``.
        packages: the versions of this process.
        keep: how many checkpoints are kept.
    """

    def __init__(
        self,
        folder: Path,
        *,
        identity: Mapping[str, str],
        packages: Mapping[str, str],
        keep: int = 2,
    ) -> None:
        self._folder = folder
        self._identity = dict(identity)
        self._packages = dict(packages)
        self._keep = keep
        self._unusable: set[Path] = set()

    # -- writing ---------------------------------------------------------------------------

    def write(self, round: int, values: Mapping[str, Any], tables: Iterable[Table]) -> Path:
        """Write the checkpoint of a round and remove those that are too old.

        Raises:
            OSError: if it cannot be written; earlier checkpoints are as they were.
        """
        target = self._folder / f"round-{round:06d}"
        partial = self._folder / f".{target.name}.partial"
        if not self._folder.is_dir():
            self._folder.mkdir()
            _sync_folder(self._folder.parent)
        self.remove_leftovers()
        try:
            partial.mkdir()
            self._write_files(partial, round, values, tables)
            _sync_folder(partial)
            if target.is_dir():
                # A round that is run again had a checkpoint that could not be used.
                self._remove(target)
            os.rename(partial, target)
        except Exception:
            # Where the disk is full, half a checkpoint should not keep it so.
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _sync_folder(self._folder)
        self._unusable.discard(target)
        self._prune(round)
        return target

    def _write_files(
        self, partial: Path, round: int, values: Mapping[str, Any], tables: Iterable[Table]
    ) -> None:
        files: dict[str, dict[str, int | str]] = {}

        def write(name: str, content: bytes) -> None:
            _write_file(partial / name, content)
            digest = hashlib.sha256(content).hexdigest()
            files[name] = {"bytes": len(content), "sha256": digest}

        for number, shard in enumerate(_shards(tables), start=1):
            write(f"arrays-{number:05d}.safetensors", save(shard))
        write(STATE_FILE, json.dumps(values, indent=1).encode())
        manifest = {
            "schema": SCHEMA,
            "round": round,
            "identity": self._identity,
            "packages": self._packages,
            "files": files,
        }
        _write_file(partial / MANIFEST_FILE, _manifest_text(manifest))

    def _prune(self, round: int) -> None:
        """Keep the newest; what cannot be used, or is of a future that was not, counts for none."""
        found = self._found()
        past = [number for number in found if number <= round]
        good = [number for number in past if found[number] not in self._unusable]
        for number, folder in found.items():
            if number not in good[: self._keep]:
                self._remove(folder)

    def _remove(self, folder: Path) -> None:
        # First the name, so that nobody ever finds half of it.
        removed = folder.with_name(f".{folder.name}.removed")
        os.rename(folder, removed)
        shutil.rmtree(removed)

    def remove_leftovers(self) -> None:
        """Remove what a process has left that was killed while it wrote or removed a checkpoint.

        Raises:
            OSError: if something cannot be removed.
        """
        for pattern in (".round-*.partial", ".round-*.removed"):
            for leftover in self._folder.glob(pattern):
                shutil.rmtree(leftover)

    # -- reading ---------------------------------------------------------------------------

    def newest(
        self, reason_against: Callable[[Checkpoint], str | None] = lambda _: None
    ) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest checkpoint that can be used, and why newer ones cannot.

        Args:
            reason_against: a check of the caller's own; None lets the checkpoint pass.

        Returns:
            The checkpoint, None if there is none, and a line for each that was passed over.
        """
        problems = []
        for folder in self._found().values():
            try:
                checkpoint = self.read(folder)
                reason = reason_against(checkpoint)
                if reason is not None:
                    raise CheckpointError(f"checkpoint {folder}: {reason}")
            except CheckpointError as error:
                self._unusable.add(folder)
                problems.append(str(error))
                continue
            self._unusable.discard(folder)
            return checkpoint, problems
        return None, problems

    def rounds(self) -> list[int]:
        """Return the rounds whose checkpoints are there, sorted; nobody has looked into them."""
        return sorted(self._found())

    def read(self, folder: Path) -> Checkpoint:
        """Check every byte of a checkpoint.

        Raises:
            CheckpointError: names the checkpoint, the file and what is wrong with it.
        """
        manifest = _read_manifest(folder)
        if f"round-{manifest.round:06d}" != folder.name:
            raise _bad(folder, MANIFEST_FILE, f"is of round {manifest.round}")
        for what, ours in self._identity.items():
            theirs = manifest.identity.get(what)
            if theirs != ours:
                raise _bad(
                    folder,
                    MANIFEST_FILE,
                    f"belongs to other {what} ({str(theirs)[:8]}, this run has {ours[:8]})",
                )
        for name, expected in manifest.files.items():
            _check_file(folder, name, expected)
        try:
            values = json.loads((folder / STATE_FILE).read_bytes())
            shards = tuple(name for name in manifest.files if name != STATE_FILE)
            if len(shards) == len(manifest.files) or not isinstance(values, dict):
                raise ValueError("it is not what a run writes")
        except (OSError, ValueError, RecursionError) as error:
            raise _bad(folder, STATE_FILE, f"cannot be read: {one_line(error)}") from None
        return Checkpoint(
            folder=folder,
            round=manifest.round,
            packages=manifest.packages,
            values=values,
            shards=shards,
        )

    def _found(self) -> dict[int, Path]:
        """Return the checkpoints by round, the newest first."""
        if not self._folder.is_dir():
            return {}
        named = ((_NAME.fullmatch(folder.name), folder) for folder in self._folder.iterdir())
        found = {int(name[1]): folder for name, folder in named if name is not None}
        return dict(sorted(found.items(), reverse=True))


def _shards(tables: Iterable[Table]) -> Iterator[Arrays]:
    shard: Arrays = {}
    size = 0
    for table, arrays in tables:
        for name, array in arrays.items():
            # Not np.ascontiguousarray: it turns 0-d counters into vectors.
            shard[f"{table}/{name}"] = np.asarray(array, order="C")
            size += array.nbytes
        if size >= SHARD_BYTES:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


def _write_file(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Force the names in a folder onto the disk, as `os.fsync` does for a file's content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _manifest_text(manifest: Mapping[str, Any]) -> bytes:
    """Return the manifest with its own digest, in the only form that is accepted again."""
    digest = hashlib.sha256(_canonical(manifest)).hexdigest()
    return _canonical({**manifest, "sha256": digest})


def _canonical(table: Mapping[str, Any]) -> bytes:
    return (json.dumps(table, indent=1, sort_keys=True) + "\n").encode()


def _read_manifest(folder: Path) -> _Manifest:
    try:
        text = (folder / MANIFEST_FILE).read_bytes()
    except OSError as error:
        raise _bad(folder, MANIFEST_FILE, f"cannot be read: {error.strerror}") from None
    try:
        manifest = json.loads(text)
        schema = manifest.get("schema")
        if schema != SCHEMA:
            raise _bad(folder, MANIFEST_FILE, f"has schema {schema}, this version reads {SCHEMA}")
        content = {key: value for key, value in manifest.items() if key != "sha256"}
        # Comparing the text, not only the digest, leaves no byte that could differ unseen.
        if _manifest_text(content) != text:
            raise _bad(folder, MANIFEST_FILE, "does not fit its own SHA-256")
        return _Manifest.model_validate(content)
    except ValidationError as error:
        raise _bad(folder, MANIFEST_FILE, f"is not a manifest: {first_problem(error)}") from None
    except (ValueError, AttributeError, RecursionError):
        raise _bad(folder, MANIFEST_FILE, "is not a manifest") from None


def _check_file(folder: Path, name: str, expected: _File) -> None:
    digest = hashlib.sha256()
    size = 0
    try:
        with (folder / name).open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
                size += len(block)
    except OSError as error:
        raise _bad(folder, name, f"cannot be read: {error.strerror}") from None
    if size != expected.bytes:
        raise _bad(folder, name, f"has {size} bytes, the manifest says {expected.bytes}")
    if digest.hexdigest() != expected.sha256:
        raise _bad(folder, name, "does not fit its SHA-256")


def one_line(error: BaseException) -> str:
    """Return an error's name and text in one line of bounded length."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return "".join(letter if letter.isprintable() else "?" for letter in text[:200])


def first_problem(error: ValidationError) -> str:
    """Return the first thing that a schema refuses, in one line."""
    problem = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part)[:40] for part in problem["loc"])
    text = f"{place}: {problem['msg']}"
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _bad(folder: Path, name: str, reason: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {folder}: {name} {reason}")
