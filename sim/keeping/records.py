"""A run's folder: settings, environment, metrics, exchange and events, readable at any moment."""

import fcntl
import hashlib
import json
import math
import os
import platform
import secrets
import subprocess
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fedkd.data import FederatedData
from fedkd.data.overview import split_sizes
from sim.keeping.parts import (
    LEAST_ROWS,
    DamagedFileError,
    bytes_before,
    chunks,
    counting,
    header,
    parts_of,
    read_part,
    rows_and_lines,
    sync_folder,
    write_parts,
)
from sim.server.observers import Observer, Row
from sim.settings import Settings, SettingsError

SETTINGS_FILE = "settings.yaml"
METRICS_FILE = "metrics.jsonl"
EXCHANGE_FILE = "exchange.jsonl"
EVENTS_FILE = "events.jsonl"
RESULT_FILE = "result.json"
ENVIRONMENT_FILE = "environment.json"
SPLIT_FILE = "split.json"
PEERS_FILE = "peers.json"
IDENTITY_FILE = "identity.json"
LOCK_FILE = ".lock"
TURN_FILE = ".turn"
ROW_FILES = (METRICS_FILE, EXCHANGE_FILE, EVENTS_FILE)

MOST_COUNTS = 100_000
"""Clients times classes; of a larger split only the clients' totals are written."""

Marks = dict[str, dict[str, Any]]
"""For each file of rows, how long it was at some moment and what the SHA-256 of that was."""


def is_finished(folder: Path) -> bool:
    """Tell whether a run folder holds a finished run, with its result as it was written."""
    try:
        return read_result(folder).get("status") == "finished"
    except DamagedFileError:
        return False


def read_result(folder: Path, *, rows: bool = False) -> Row:
    """Return what a run ended with; empty where it has not ended.

    Args:
        folder: of the run.
        rows: whether the files of rows have to be what they were then.

    Raises:
        DamagedFileError: names the file that is not as it was written.
    """
    path = folder / RESULT_FILE
    try:
        row = json.loads(path.read_bytes())
        if not isinstance(row, dict) or row != sealed(unsealed := _without_seal(row)):
            raise ValueError("it does not fit its own SHA-256")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFileError(path, error) from None
    for name, mark in unsealed.pop(_FILES, {}).items() if rows else ():
        if not _fits(folder / name, mark):
            raise DamagedFileError(folder / name, "it is not what the run wrote")
    unsealed.pop(_FILES, None)
    return unsealed


_SEAL = "sha256"
_FILES = "files"


def sealed(row: Row) -> Row:
    """Return a row with its own SHA-256: nothing in it changes unseen."""
    text = json.dumps(row, sort_keys=True)
    return {**row, _SEAL: hashlib.sha256(text.encode()).hexdigest()}


def sealed_anew(row: Row, files: Mapping[str, bytes]) -> Row:
    """Return a result whose files of rows are other bytes than the run wrote, sealed with those."""
    marks = {
        name: {"bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
        for name in row.get(_FILES, {})
    }
    unsealed = _without_seal(row)
    return sealed({**unsealed, _FILES: marks} if _FILES in row else unsealed)


def _without_seal(row: Row) -> Row:
    return {key: value for key, value in row.items() if key != _SEAL}


def _fits(path: Path, mark: Any) -> bool:
    digest = hashlib.sha256()
    size = 0
    try:
        for chunk in chunks(path):
            size += len(chunk)
            digest.update(chunk)
    except (OSError, DamagedFileError):
        return False
    return bool(mark == {"bytes": size, "sha256": digest.hexdigest()})


class StorageError(RuntimeError):
    """The run folder cannot be written; what is in it already is whole."""


class FolderBusyError(RuntimeError):
    """Another process is writing into the run folder."""


@contextmanager
def storing(folder: Path, *, goes_on: str | None = None) -> Iterator[None]:
    """Turn what the file system refuses inside the block into a `StorageError`.

    Args:
        folder: of the run.
        goes_on: what to do when it can be written again; None: resume the federated run.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {error.filename or folder}: {error.strerror or error}; what is there "
            "is whole, so when it can be written again: "
            f"{goes_on or f'fedkd run --resume {folder}'}"
        ) from error


def to_json(row: Mapping[str, Any], *, indent: int | None = None) -> str:
    """Write a row as strict JSON: NaN and infinities, which JSON lacks, become null."""
    return json.dumps(_finite(row), indent=indent, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def read_rows(path: Path) -> list[Row]:
    """Read a file of rows and its parts; a last line that was cut off by a crash is left out."""
    return list(iterate_rows(path))


def iterate_rows(
    path: Path, row_of: Callable[[str, bytes | Row], Row | None] | None = None
) -> Iterator[Row]:
    """Read a file of rows and its parts row by row; see `read_rows`.

    Args:
        path: of the file.
        row_of: returns the row in a line of a file of some name, or None if it is none (rows of
            parts come as rows); by default every table is a row. `federated_row` asks for what a
            federated run writes.

    Raises:
        DamagedFileError: names the line that is no row, or the part that cannot be read.
    """
    read = row_of or _table
    for number, line in enumerate(rows_and_lines(path), start=1):
        if isinstance(line, bytes) and not line.endswith(b"\n"):
            return
        row = read(path.name, line)
        if row is None:
            raise DamagedFileError(path, f"line {number} is no row of {path.name}")
        yield row


def _table(_: str, line: bytes | Row) -> Row | None:
    if not isinstance(line, bytes):
        return line
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


_NUMBERS = {
    METRICS_FILE: ("round",),
    EXCHANGE_FILE: ("round", "client", "bytes"),
    EVENTS_FILE: ("round",),
}
"""What is a whole number >= 0 in every row of a file of a federated run."""

_TEXTS = {METRICS_FILE: "scope", EXCHANGE_FILE: "direction", EVENTS_FILE: "event"}
"""What every row of these files says of itself."""


def federated_row(name: str, line: bytes | Row) -> Row | None:
    """Return the row in a line of one of a federated run's files, or None if there is none."""
    row = _table(name, line)
    if row is None or not isinstance(row.get(_TEXTS[name]), str):
        return None
    if is_charge(row):
        return row if _whole(row.get("round")) and _whole(row.get("of_round")) else None
    numbers = [row.get(key) for key in _NUMBERS[name]]
    if row.get("scope") == "client":
        numbers.append(row.get("client"))
    if not all(map(_whole, numbers)):
        return None
    if row.get("scope") == "federation" and not isinstance(row.get("seconds"), int | float):
        return None
    # Measured is nothing but numbers; null stands for one that is not finite.
    measured = row.items() if name == METRICS_FILE else ()
    if not all(key == "scope" or isinstance(value, int | float | None) for key, value in measured):
        return None
    return row


def is_charge(row: Row) -> bool:
    """Tell whether a row of ``exchange.jsonl`` is an entry of the ledger, and not of a payload."""
    return row.get("direction") == "release"


def _whole(number: object) -> bool:
    return type(number) is int and number >= 0


def new_run_folder(output: Path, name: str, settings: str) -> Path:
    """Make ``output/name/<time>-<id>`` with the settings in it: a run that can be resumed.

    Args:
        output: the folder of all runs.
        name: of this run, and of others.
        settings: the resolved settings as YAML.

    Raises:
        SettingsError: names ``output`` if nothing can be written there.
    """
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder = output / name / f"{stamp}-{secrets.token_hex(3)}"
    # Killed in between, a process leaves nothing that looks like a run and is none.
    partial = make_folder(output, folder.with_name(f".{folder.name}.partial"))
    with storing(folder, goes_on="repeat the command"):
        write_text(partial / SETTINGS_FILE, settings)
        os.rename(partial, folder)
    return folder


def make_folder(output: Path, folder: Path) -> Path:
    """Make a folder inside ``output`` and return it.

    Raises:
        SettingsError: if nothing can be written there, or the folder would lie outside.
    """
    if not folder.resolve().is_relative_to(output.resolve()):
        raise SettingsError(f"output: {folder} lies outside {output}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        # Another process may try the same at the same moment.
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise SettingsError(
            f"output: cannot write to {str(output)!r}: {error.strerror or error}"
        ) from None
    return folder


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step, so that a reader never sees half of it."""
    # A name of its own: two commands may write one study.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def package_versions() -> dict[str, str]:
    """Return the versions that can decide a run's bits."""
    packages = ("fedkd", "flwr", "ray", "torch", "numpy", "scikit-learn", "datasets")
    return {package: version(package) for package in packages}


@cache
def environment(device: str) -> Row:
    """Describe what the run ran on; asked once in a process, whose code is what it imported."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpu": cpu_model(),
        "cpu_instructions": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "device": device,
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "packages": package_versions(),
        "git_commit": git_commit(Path(__file__).resolve().parents[2]),
    }


def cpu_model() -> str | None:
    """Return what the processor is called, on which the last bits of a sum can depend."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return _answer("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or None
    lines = [line.partition(":") for line in text.splitlines()]
    told = {name.strip(): value.strip() for name, _, value in lines}
    # Not every architecture has a name there; on ARM these numbers stand for it.
    parts = [f"{key} {told[key]}" for key in ("CPU implementer", "CPU part") if key in told]
    return told.get("model name") or ", ".join(parts) or platform.processor() or None


CODE = ("fedkd", "strategies", "sim")
"""The folders whose changes matter to a run's numbers."""


def git_commit(root: Path, code: Sequence[str] = CODE) -> str | None:
    """Return the commit of a working tree, with ``-dirty`` where the code is not that commit's.

    Files that git does not know count as well; None where there is no repository.

    Args:
        root: of the tree.
        code: what counts, seen from there.
    """
    if not (root / ".git").exists():
        return None
    commit = _answer("git", "-C", str(root), "rev-parse", "HEAD")
    changed = _answer("git", "-C", str(root), "status", "--porcelain", "--", *code)
    if commit is None or changed is None:
        return commit
    return f"{commit}-dirty" if changed else commit


def _answer(*command: str) -> str | None:
    try:
        answer = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


class Recorder:
    """A folder that rows are written into as they come; each is in its file when the call returns.

    Only one process at a time can have a folder open.

    Args:
        folder: exists already.
        settings: the resolved settings as YAML.
        device: that the run computes on.
        files: names of the files that grow by rows.
        identity: what the run is made of; None leaves what is recorded.
        goes_on: what to do after a `StorageError`, see `storing`.

    Raises:
        FolderBusyError: names the process that has it.
        StorageError: if it cannot be written, now or by any method.
    """

    def __init__(
        self,
        folder: Path,
        *,
        settings: str,
        device: str,
        files: Sequence[str],
        identity: Row | None = None,
        goes_on: str | None = None,
    ) -> None:
        self.folder = folder
        self._goes_on = goes_on
        with storing(folder, goes_on=goes_on):
            self._lock = _lock(folder)
            try:
                if identity is not None:
                    # First: a run that can be gone on with says what it is made of.
                    write_text(folder / IDENTITY_FILE, to_json(identity, indent=1) + "\n")
                write_text(folder / SETTINGS_FILE, settings)
                if not (folder / ENVIRONMENT_FILE).exists():
                    text = to_json(environment(device), indent=2)
                    write_text(folder / ENVIRONMENT_FILE, text)
                self._files = {name: _RowFile(folder / name) for name in files}
            except BaseException:
                os.close(self._lock)
                raise

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        os.close(self._lock)

    def append(self, name: str, rows: Iterable[Row]) -> None:
        """Append rows to one of the files."""
        with storing(self.folder / name, goes_on=self._goes_on):
            self._files[name].append("".join(to_json(row) + "\n" for row in rows).encode())

    def result(self, row: Row) -> None:
        """Write the run's result, sealed with what the rows are then.

        Its presence means that the run has ended.
        """
        marks = {name: file.mark() for name, file in self._files.items()}
        # As it is read again: JSON has no NaN, and no keys but texts.
        plain = json.loads(to_json({**row, _FILES: marks}))
        with storing(self.folder, goes_on=self._goes_on):
            write_text(self.folder / RESULT_FILE, json.dumps(sealed(plain), indent=2) + "\n")


class RunFolder(Recorder, Observer):
    """The folder of a federated run."""

    def __init__(self, folder: Path, settings: Settings, identity: Row | None = None) -> None:
        self.marks: Marks = {}
        super().__init__(
            folder,
            settings=settings.to_yaml(),
            device="cuda" if settings.engine.gpus_per_worker else "cpu",
            files=ROW_FILES,
            identity=identity,
        )

    def __enter__(self) -> "RunFolder":
        return self

    def metrics(self, rows: Sequence[Row]) -> None:
        """Append rows of (round, scope, ...)."""
        self.append(METRICS_FILE, rows)

    def exchange(self, rows: Sequence[Row]) -> None:
        """Append rows of (round, client, direction, kind, bytes)."""
        self.append(EXCHANGE_FILE, rows)

    def charges(self, rows: Sequence[Row]) -> None:
        """Append rows of (round, direction: release, of_round, by, mechanism, figures, ...)."""
        self.append(EXCHANGE_FILE, rows)

    def event(self, row: Row) -> None:
        """Append one event."""
        self.append(EVENTS_FILE, [row])

    def split(self, data: FederatedData) -> None:
        """Write who holds how many rows of which class, for reports; large splits in sums only."""
        counts = data.label_counts()
        row = {
            "sizes": split_sizes(data),
            "rows": counts.sum(axis=1).tolist(),
            "classes": list(data.class_names),
            **({"counts": counts.tolist()} if counts.size <= MOST_COUNTS else {}),
        }
        with storing(self.folder):
            write_text(self.folder / SPLIT_FILE, to_json(row) + "\n")

    def compared(self, row: Row) -> None:
        """Write how clients' models compare at the end, for reports."""
        with storing(self.folder):
            write_text(self.folder / PEERS_FILE, to_json(row) + "\n")

    def completed(self, round: int) -> None:
        """Note where the files stand at the end of a round; see `rewind`."""
        self.marks = {name: file.mark() for name, file in self._files.items()}

    def pack(self) -> None:
        """Move rows of complete rounds into parts where they are many; see `sim.keeping.parts`.

        What the files say, and so their marks, stay the same.
        """
        with storing(self.folder):
            for name, file in self._files.items():
                file.pack(self.marks[name]["bytes"])

    def sync(self) -> None:
        """Force all rows onto the disk."""
        with storing(self.folder):
            for file in self._files.values():
                file.sync()

    def reason_not_to_rewind(self, marks: Marks) -> str | None:
        """Return why the files cannot be what they were at some moment, or None if they can."""
        for name, file in self._files.items():
            if not file.begins_with(marks[name]):
                return f"it was written beside another {name}, which was damaged since"
        return None

    def mend(self, marks: Marks, round: int) -> list[str]:
        """Make the best of files that were damaged: what is left of the rounds until ``round``.

        Returns:
            For each damaged file what was lost; it is kept beside the mended one. ``marks`` then
            fit the files.
        """
        told = []
        with storing(self.folder):
            for name, file in self._files.items():
                if file.begins_with(marks[name]):
                    continue
                kept, lost = _rows_left(name, file.what_is_left(), round)
                damaged = file.replace(kept)
                marks[name] = file.mark()
                told.append(
                    f"{name} is not what was written until round {round}: {lost}; it is "
                    f"kept as {damaged.name}"
                )
        return told

    def rewind(self, marks: Marks | None) -> None:
        """Cut the files back to what they were; None empties them. The run has not ended."""
        with storing(self.folder):
            for name, file in self._files.items():
                file.cut(0 if marks is None else marks[name]["bytes"])
            (self.folder / RESULT_FILE).unlink(missing_ok=True)
        self.marks = {} if marks is None else marks


def _rows_left(name: str, content: bytes, round: int) -> tuple[bytes, str]:
    """Return the lines that are rows of the rounds until ``round``, and what else there was."""
    kept: list[tuple[int, Row, bytes]] = []
    unreadable: list[int] = []
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        row = federated_row(name, line) if line.endswith(b"\n") else None
        if row is None:
            unreadable.append(number)
            continue
        if row["round"] > round:
            continue
        kept.append((number, row, line))
    federation = [
        (row["round"], number) for number, row, _ in kept if row.get("scope") == "federation"
    ]
    in_order = _longest_rise(federation)
    odd = {number for _, number in federation} - {number for _, number in in_order}
    unreadable = sorted({*unreadable, *odd})
    rounds = {of_round for of_round, _ in in_order}
    lost = []
    if unreadable:
        some = ", ".join(map(str, unreadable[:10])) + (", ..." if len(unreadable) > 10 else "")
        lost.append(f"line{'s' if len(unreadable) > 1 else ''} {some} left out")
    if name == METRICS_FILE:
        missing = sorted(set(range(1, round + 1)) - rounds)
        if missing:
            some = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
            lost.append(
                f"no figures of the whole federation in round{'s'[: len(missing) - 1]} {some}"
            )
    content = b"".join(line for number, _, line in kept if number not in odd)
    return content, "; ".join(lost) or "every line is a row, but not all numbers are right"


def _longest_rise(items: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return as many (round, line) as can be, in their order, whose rounds rise."""
    ends: list[int] = []
    rises: list[list[tuple[int, int]]] = []
    for item in items:
        place = bisect_left(ends, item[0])
        rise = [*(rises[place - 1] if place else ()), item]
        ends[place : place + 1] = [item[0]]
        rises[place : place + 1] = [rise]
    return rises[-1] if rises else []


class _RowFile:
    """A text that grows, knows its own SHA-256, and can be cut back.

    Its last lines are in the file; those before may be in parts, see `sim.keeping.parts`. Sizes and
    marks are those of the whole text, wherever it lies.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        with path.open("rb") as file:
            first = file.readline()
        self._before = bytes_before(first)
        self._beginning = len(first) if self._before else 0
        self._lines = 0
        self._remove_leftovers()
        self._read_all()

    def append(self, content: bytes) -> None:
        left = memoryview(content)
        while left:
            left = left[os.write(self._descriptor, left) :]
        self._size += len(content)
        self._digest.update(content)
        self._lines += content.count(b"\n")

    def mark(self) -> dict[str, Any]:
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}

    def pack(self, size: int) -> None:
        """Move the lines before byte ``size`` into parts, where they are enough for one."""
        if self._lines < LEAST_ROWS:
            return
        length = size - self._before
        content = self._path.read_bytes()[self._beginning :]
        if content.count(b"\n", 0, length) < LEAST_ROWS:
            return
        write_parts(self._path, self._before, content[:length])
        self._rewrite(size, content[length:])
        self._lines = content.count(b"\n", length)

    def what_is_left(self) -> bytes:
        """Return all of a damaged text that can be read."""
        lines = self._path.read_bytes()
        first = lines[: lines.find(b"\n") + 1]
        before = bytes_before(first)
        found = []
        for part in parts_of(self._path):
            if part.end <= before:
                with suppress(DamagedFileError):
                    found.append(read_part(part))
        return b"".join([*found, lines[len(first) if before else 0 :]])

    def replace(self, content: bytes) -> Path:
        """Start anew with other content; return where the old file is now."""
        number = 1
        while (old := self._path.with_name(f"{self._path.name}.damaged-{number}")).exists():
            number += 1
        os.link(self._path, old)
        self._rewrite(0, content)
        for part in parts_of(self._path):
            os.replace(part.path, part.path.with_name(f"{part.path.name}.damaged-{number}"))
        self._read_all()
        return old

    def begins_with(self, mark: Mapping[str, Any]) -> bool:
        try:
            size, digest = self._read(mark["bytes"])
        except DamagedFileError:
            return False
        return (size, digest.hexdigest()) == (mark["bytes"], mark["sha256"])

    def cut(self, size: int) -> None:
        if size >= self._before:
            os.ftruncate(self._descriptor, self._beginning + size - self._before)
        else:
            # In the middle of a part: its first lines are lines again.
            parts = counting(self._path, self._before) if size else []
            part = next((each for each in parts if each.first < size < each.end), None)
            kept = b"" if part is None else read_part(part)[: size - part.first]
            self._rewrite(size - len(kept), kept)
            self._remove_leftovers()
        self._read_all()

    def sync(self) -> None:
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)

    def _rewrite(self, before: int, lines: bytes) -> None:
        """Let the file have these lines, and parts all before; in one step."""
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.partial")
        beginning = header(before)
        try:
            with temporary.open("wb") as file:
                file.write(beginning + lines)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(self._path.parent)
        descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND)
        os.close(self._descriptor)
        self._descriptor = descriptor
        self._before, self._beginning = before, len(beginning)

    def _remove_leftovers(self) -> None:
        """Remove parts that do not count: of lines that were to be moved, or that were cut off."""
        for part in parts_of(self._path):
            if part.end > self._before:
                part.path.unlink()

    def _read_all(self) -> None:
        """Learn size, SHA-256 and number of lines from what is there."""
        try:
            self._size, self._digest = self._read(None)
        except DamagedFileError:
            # No mark fits it: whoever opens it cuts it back to nothing, or mends it.
            self._size, self._digest = -1, hashlib.sha256()
        with self._path.open("rb") as file:
            self._lines = sum(1 for _ in file)

    def _read(self, limit: int | None) -> "tuple[int, hashlib._Hash]":
        """Return size and SHA-256 of the first ``limit`` bytes, or of all."""
        digest = hashlib.sha256()
        size = 0
        for chunk in chunks(self._path):
            some = chunk if limit is None else chunk[: limit - size]
            digest.update(some)
            size += len(some)
            if size == limit:
                break
        return size, digest


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Wait until no other process is in such a block for the folder; nobody else gets in."""
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def turn(folder: Path, *, waiting: Callable[[str], None] | None) -> Iterator[bool]:
    """Have a run folder for oneself, from before one looks at what is in it.

    Of several processes that are to make one run, one makes it; when it is the next one's turn,
    the run is finished, or was stopped and can be gone on with. A process that was killed has no
    turn any more.

    Args:
        folder: of the run; exists, and need not hold one yet.
        waiting: is told which process has it, where there is one, and then it is waited for; None
            does not wait.

    Yields:
        Whether it is ours: always, where it is waited for.
    """
    # Whoever goes on with the single run has only the folder's own lock.
    with _having(folder / TURN_FILE, waiting) as first:
        with _having(folder / LOCK_FILE, waiting) if first else nullcontext(False) as both:
            pass
        yield both


@contextmanager
def _having(path: Path, waiting: Callable[[str], None] | None) -> Iterator[bool]:
    """Have the lock on a file inside the block; see `turn`."""
    with storing(path.parent, goes_on="repeat the command"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                yield False
                return
            waiting(_holder(descriptor))
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        _sign(descriptor)
        yield True
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    """Return the process that signed a lock."""
    return os.pread(descriptor, 32, 0).decode().strip() or "unknown"


def _sign(descriptor: int) -> None:
    """Write into a lock that this process has it."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)


def _lock(folder: Path) -> int:
    """Lock a run folder for this process and return the lock; it ends with the process."""
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _sign(descriptor)
    except BlockingIOError:
        holder = _holder(descriptor)
        os.close(descriptor)
        raise FolderBusyError(
            f"run folder {folder} is in use by process {holder}; wait for it or stop it first"
        ) from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
