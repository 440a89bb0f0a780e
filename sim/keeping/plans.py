"""What a study is going to run, written down while it runs: a study folder tells who is missing.

A plan is a file ``plan-<id>.json`` in the study's folder, one for each command that runs there. Its
process holds a lock on it, which is the operating system's and goes with the process: a plan that
nobody holds is of a study that is over or was stopped.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sim.keeping.records import storing, to_json
from sim.server.observers import Row

PLAN_FILES = "plan-*.json"
"""Of the plans in a study's folder."""

_LOCKS = Path("/proc/locks")


@contextmanager
def announced(folder: Path, plan: Row) -> Iterator[Path]:
    """Have a plan in a study's folder; while the block runs, this process holds it.

    Plans of commands that are over are removed: the newest one is what the folder is about.

    Args:
        folder: of the study.
        plan: plain values; the same plan has the same file.

    Raises:
        StorageError: if it cannot be written.
    """
    text = to_json(plan, indent=1) + "\n"
    path = folder / f"plan-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    with storing(folder, goes_on="repeat the command"):
        partial = folder / f".{path.name}.{os.getpid()}.partial"
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            # Held before it has its name: nobody finds it without its process.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.write(descriptor, text.encode())
            os.replace(partial, path)
            _remove_others(folder, path)
        except BaseException:
            os.close(descriptor)
            raise
    try:
        yield path
    finally:
        os.close(descriptor)


def _remove_others(folder: Path, mine: Path) -> None:
    for path in folder.glob(PLAN_FILES):
        if path != mine and holder(path) is None:
            with suppress(OSError):
                path.unlink()


def holder(path: Path) -> int | None:
    """Return the process that holds a lock on a file; None where nobody does.

    Only looks: trying to have the lock would be in the way of the process that wants it.
    """
    with suppress(OSError, ValueError):
        file = path.stat()
        device = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}:{file.st_ino}"
        for line in _LOCKS.read_text(encoding="ascii").splitlines():
            # As "1: FLOCK  ADVISORY  WRITE 11442 fe:00:2204923 0 EOF"; "->" marks who waits.
            words = line.split()
            if words[1:2] == ["FLOCK"] and words[5] == device:
                return int(words[4])
    return None
