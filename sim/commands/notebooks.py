"""Progress of what is called from Python: a line that changes in its place in a notebook."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

from fedkd.names import printable
from sim.commands.progress import Signs, signs_of_life

if TYPE_CHECKING:
    from IPython.display import DisplayHandle

PAUSE_S = 0.2
"""The line changes no more often than this: a browser draws each change."""


def in_notebook() -> bool:
    """Tell whether this is a kernel of Jupyter; importing nothing that is not there already."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


@contextmanager
def shown(progress: bool | None) -> Iterator[Signs | None]:
    """Show how far it is while the body runs.

    Args:
        progress: whether to; None for in a notebook only. Elsewhere it is shown on standard error,
            as the command line does.

    Yields:
        Where to show it; None to show nothing.
    """
    notebook = in_notebook()
    if progress is False or (progress is None and not notebook):
        yield None
        return
    from rich.console import Console

    with (
        NotebookLine() if notebook else signs_of_life(Console(stderr=True), quiet=False, json=False)
    ) as signs:
        yield signs


class NotebookLine(Signs):
    """One line of a cell's output that says how far it is, and stays where it ended.

    Args:
        unit: of what is counted.
        clock: in seconds.
    """

    def __init__(
        self, unit: str = "rounds", *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(unit)
        self._clock = clock
        self._begun = clock()
        self._drawn = float("-inf")
        self._labels: dict[int, str] = {}
        self._now = self._all = ""
        self._handle: DisplayHandle | None = None
        self._lock = threading.RLock()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the last state."""
        if self._now or self._all:
            self._draw(at_once=True)

    def begin(self, label: str) -> int:
        """Something begins; it is shown once there is something to say of it."""
        with self._lock:
            number = len(self._labels)
            self._labels[number] = label
            return number

    def reached(self, task: int, completed: int, total: int, note: str) -> None:
        """Show it."""
        parts = [f"{completed}/{total} {self._unit}", *([note] if note else [])]
        self._show(task, ", ".join(parts))

    def doing(self, task: int, what: str) -> None:
        """Show it."""
        self._show(task, what)

    def overall(self, completed: int, total: int, note: str) -> None:
        """Show it behind what goes on."""
        with self._lock:
            self._all = f"all: {completed}/{total} {self._unit}, {note}"

    def say(self, line: str) -> None:
        """Print a line that stays."""
        print(printable(line))  # noqa: T201

    def _show(self, task: int, state: str) -> None:
        with self._lock:
            self._now = f"{self._labels[task]}: {state}"
            self._draw()

    def _draw(self, *, at_once: bool = False) -> None:
        now = self._clock()
        if not at_once and now - self._drawn < PAUSE_S:
            return
        self._drawn = now
        parts = [self._now, self._all, str(timedelta(seconds=round(now - self._begun)))]
        line = {"text/plain": printable("; ".join(part for part in parts if part))}
        if self._handle is None:
            from IPython.display import display

            self._handle = display(line, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(line, raw=True)  # type: ignore[no-untyped-call]
