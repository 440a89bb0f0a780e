"""Ctrl-C and SIGTERM: both stop a run between two steps that belong together, never inside.

So does what another thread calls off because it cannot go on; see `call_off`.
"""

import os
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
    def of(cls, stop: KeyboardInterrupt, folder: Path | None = None) -> "Interruption":
        """Return the interruption by a signal or by Ctrl-C, of a run if its folder is given."""
        if isinstance(stop, Interruption):
            return cls(stop.signal, folder or stop.folder)
        # Whoever waits inside a library may see a bare KeyboardInterrupt come out of it.
        return cls(_last_signal[0], folder)

    @property
    def exit_code(self) -> int:
        """The status with which shells expect an interrupted process to end: 130 or 143."""
        return 128 + self.signal


class CalledOff(BaseException):
    """Another thread's word to the main one; like a signal's, nobody should take it for an error.

    Attributes:
        error: what the main thread has to end with.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


CALL_OFF = signal.SIGURG
"""Wakes the main thread wherever it waits; ignored by everybody who does not listen."""

_SIGNALS = (*STOP_SIGNALS, CALL_OFF)

_last_signal = [int(signal.SIGINT)]
_called_off: list[BaseException] = []


def call_off(error: BaseException) -> None:
    """Let an `interruptible` block in the main thread end with this error; from any thread.

    Like a signal it waits until an `uninterrupted` block is done, and does nothing where there is
    nothing to be interrupted.
    """
    _called_off[:] = [error]
    main_thread = threading.main_thread().ident
    if main_thread is not None:
        signal.pthread_kill(main_thread, CALL_OFF)


def _raise(number: int, _: FrameType | None) -> None:
    if number != CALL_OFF:
        _last_signal[0] = number
        raise Interruption(number)
    if _called_off:
        raise CalledOff(_called_off.pop())


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise an `Interruption` inside the block.

    Libraries that install handlers of their own go into `keeping_handlers`. Threads other than the
    main one receive no signals; for them it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _last_signal[0] = signal.SIGINT
    _called_off.clear()
    before = {number: signal.signal(number, _raise) for number in _SIGNALS}
    try:
        yield
    except CalledOff as stop:
        raise stop.error from None
    except SystemError as error:
        # What C code makes of a signal that it notices too late to stop for it, as Ray's does.
        cause = error.__cause__
        if isinstance(cause, CalledOff):
            raise cause.error from None
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        raise
    finally:
        _restore(before)


@contextmanager
def keeping_handlers() -> Iterator[None]:
    """Put back, after the block, the handlers that were there; inside a library has its own.

    A library's handler of SIGTERM mostly leaves by `SystemExit`: that is an interruption.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    except SystemExit:
        _last_signal[0] = signal.SIGTERM
        raise Interruption(signal.SIGTERM) from None
    finally:
        _restore(before)


@contextmanager
def signals_waiting() -> Iterator[None]:
    """Keep SIGINT and SIGTERM from this thread, and from those it starts, until the block is done.

    For libraries that start threads and install handlers in C, which would see them;
    `uninterrupted` is enough otherwise. Processes that Python forks in the block see them as ever.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    _waiting.append(before)
    try:
        yield
    finally:
        _waiting.pop()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_waiting: list[set[int]] = []


def _wait_no_more() -> None:
    if _waiting:
        signal.pthread_sigmask(signal.SIG_SETMASK, _waiting[0])


os.register_at_fork(after_in_child=_wait_no_more)


def begin_anew() -> None:
    """In a forked process: no handlers, as in a new one, and stops wait for who forked it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Keep SIGINT and SIGTERM waiting until the block is done: it happens as a whole."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: came.append(number)) for number in _SIGNALS
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
