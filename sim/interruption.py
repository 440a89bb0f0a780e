"""Ctrl-C and SIGTERM: both stop a run between two steps that belong together, never inside."""

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption(KeyboardInterrupt):
    """A signal that asks the process to stop.

    Attributes:
        signal: its number.
        folder: of the run that it stopped and that can be resumed, where there is one.
    """

    def __init__(self, number: int = signal.SIGINT, folder: Path | None = None) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number
        self.folder = folder

    @classmethod
    def of_run(cls, stop: KeyboardInterrupt, folder: Path) -> "Interruption":
        """Return the interruption of a run by a signal or by Ctrl-C."""
        # Whoever waits inside a library may see a bare KeyboardInterrupt come out of it.
        number = stop.signal if isinstance(stop, Interruption) else _last_signal[0]
        return cls(number, folder)

    @property
    def exit_code(self) -> int:
        """The status with which shells expect an interrupted process to end: 130 or 143."""
        return 128 + self.signal


_last_signal = [int(signal.SIGINT)]


def _raise(number: int, _: FrameType | None) -> None:
    _last_signal[0] = number
    raise Interruption(number)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise an `Interruption` inside the block.

    Enter it after libraries that install handlers of their own. Threads other than the main one
    receive no signals; for them it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _last_signal[0] = signal.SIGINT
    before = {number: signal.signal(number, _raise) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        _restore(before)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Keep SIGINT and SIGTERM waiting until the block is done: it happens as a whole."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in STOP_SIGNALS
    }
    try:
        yield
    finally:
        _restore(before)
        for number in came[:1]:
            signal.raise_signal(number)


def _restore(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        # None stands for a handler that was not installed by Python, which cannot be put back.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
