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
    """Yield the processes that write into one of the folders; Linux only.

    So do all of Ray's, whatever they call themselves; who only reads there is left alone.
    """
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                if _is_written(process / "fdinfo" / descriptor.name):
                    path = Path(os.readlink(descriptor))
                    if any(path.is_relative_to(folder) for folder in folders):
                        yield int(process.name)
                        break


def _is_written(information: Path) -> bool:
    for line in information.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "flags":
            return int(value, 8) & os.O_ACCMODE != os.O_RDONLY
    return False


def clean_up(folders: Sequence[Path], parent: int) -> None:
    """End the processes that live in the folders, but not the parent, and remove these."""
    for _ in range(TRIES):
        left = [process for process in processes_in(folders) if process != parent]
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
    # Ray leaves files open in it, which does not end with Ray.
    parent = os.getppid()
    sys.stdin.buffer.read()
    clean_up(folders, parent)


if __name__ == "__main__":
    main([Path(word) for word in sys.argv[1:]])
