"""A folder of one's own for Ray: private, short enough for its sockets, and gone afterwards.

Ray by itself shares one folder among all who use a machine, opens everything in it to everybody,
and leaves it there.
"""

import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from sim.engine import caretaker
from sim.settings import SettingsError

LONGEST_SOCKET = 107 if sys.platform == "linux" else 103
"""Bytes in the path of a socket."""

INSIDE = "/fedkd-12345678/r/session_2026-01-01_12-00-00_123456_1234567/sockets/plasma_store"
"""What we and Ray add to the path of a folder to get that of a socket."""

LONGEST_FOLDER = LONGEST_SOCKET - len(INSIDE)
"""Bytes in the path of a folder in which Ray can have its sockets."""

REMOVING_S = 10.0
"""How long we wait for the folder's end; it comes without us, too."""


class PrivateFolder:
    """A folder that only its owner can look into, and that goes with this process.

    Attributes:
        folder: for Ray, which opens to everybody what it gets; it lies within the private one.
        spill: for what does not fit into memory, where that should lie elsewhere, else None.
        note: why it is not where it was asked for; empty if it is.

    Raises:
        SettingsError: if there is no place for it, with what would be one.
    """

    def __init__(self) -> None:
        private, self.note = _make_private()
        self._folders = [private]
        self.folder = private / "r"
        self.spill: Path | None = None
        if self.note:
            # A long path is no trouble for files, and who set it had reasons, such as room.
            with suppress(OSError):
                self.spill = Path(tempfile.mkdtemp(prefix="fedkd-", dir=_temporary()))
                self._folders.append(self.spill)
        self._caretaker = subprocess.Popen(  # noqa: S603
            [sys.executable, "-I", "-S", caretaker.__file__, *map(str, self._folders)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )

    def remove(self) -> None:
        """Remove it now, with whatever still runs there."""
        if self._caretaker.stdin is not None:
            self._caretaker.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._caretaker.wait(REMOVING_S)


def _temporary() -> str:
    """Return the folder for temporary files that the user or the system chose."""
    return os.environ.get("TMPDIR") or tempfile.gettempdir()


def _make_private() -> tuple[Path, str]:
    """Make a folder of mode 0700 in the first place that will do; say why not in the one before."""
    asked = os.environ.get("RAY_TMPDIR")
    wishes = [("RAY_TMPDIR", asked)] if asked else []
    wishes += [("TMPDIR", _temporary())]
    places = [*wishes, ("", "/tmp"), ("", os.environ.get("XDG_RUNTIME_DIR")), ("", "/var/tmp")]  # noqa: S108
    problems: list[str] = []
    for setting, place in places:
        if not place:
            continue
        problem = None
        path = os.path.abspath(place)
        if len(os.fsencode(path)) > LONGEST_FOLDER:
            problem = f"has more than the {LONGEST_FOLDER} letters that leave room for sockets"
        else:
            try:
                folder = Path(tempfile.mkdtemp(prefix="fedkd-", dir=path))
            except OSError as error:
                problem = f"cannot be used: {error.strerror or error}"
            else:
                return folder, f"{problems[0]}; Ray uses {folder}" if problems else ""
        problems.append(f"{setting or 'the folder'} {path!r} {problem}")
    raise SettingsError(
        f"engine.backend: Ray needs a temporary folder: {'; '.join(problems)}; set TMPDIR to one "
        f"of at most {LONGEST_FOLDER} letters, or engine.backend=inline"
    )
