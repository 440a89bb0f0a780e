"""A deadline for a piece of work in this process."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class DeadlineError(TimeoutError):
    """The work took longer than it may."""


@contextmanager
def deadline(seconds: float, setting: float | None = None) -> Iterator[None]:
    """Interrupt the block after ``seconds``; only a main thread can be interrupted.

    Args:
        seconds: what is left.
        setting: what ``engine.deadline_s`` is, where some of it is spent already.

    Python has to get a word in: code that never comes back from C runs on, and whoever waits for
    this process has to have patience of their own.

    Raises:
        DeadlineError: out of the block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        allowed = seconds if setting is None else setting
        raise DeadlineError(f"no answer within engine.deadline_s = {allowed:g}")

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        # Inside, since it refuses what is no time.
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
