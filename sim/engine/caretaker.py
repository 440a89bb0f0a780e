"""Waits for its parent's end, then ends what is left of it and removes its folders.

A script of its own, run by `sim.engine.temporary` without the project and its libraries: it starts
in no time, needs next to no memory, and nobody who kills the parent reaches it.

Its standard input says when: it ends when the parent closes it, or dies in whatever way.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

TRIES = 20
PAUSE_S = 0.1


def processes_in(folders: Sequence[Path]) -> Iterator[int]:
    """Yield the processes whose output goes into one of the folders; Linux only.

    So it is with Ray's, whatever they call themselves; who only reads there is left alone.
    """
    for process in Path("/proc").glob("[0-9]*"):
        for descriptor in ("1", "2"):
            with suppress(OSError):
                path = Path(os.readlink(process / "fd" / descriptor))
                if any(path.is_relative_to(folder) for folder in folders):
                    yield int(process.name)
                    break


def clean_up(folders: Sequence[Path]) -> None:
    """End the processes that live in the folders, and remove these."""
    for _ in range(TRIES):
        left = list(processes_in(folders))
        for process in left:
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        if not left and not any(folder.exists() for folder in folders):
            return
        time.sleep(PAUSE_S)


def main(folders: Sequence[Path]) -> None:
    """Wait, then clean up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    clean_up(folders)


if __name__ == "__main__":
    main([Path(word) for word in sys.argv[1:]])
