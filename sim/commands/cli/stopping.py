"""What a signal does to a command: one line that says how to go on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sim.commands.interruption import Interruption

if TYPE_CHECKING:
    pass


class StoppedError(Exception):
    """SIGINT or SIGTERM during a run; of a KeyboardInterrupt Typer would not say a word."""

    def __init__(self, stop: Interruption, hint: str) -> None:
        super().__init__(f"interrupted{hint and '; '}{hint}")
        self.exit_code = stop.exit_code


@contextmanager
def stoppable(hint: str = "", *, partial_in: str = "", flags: str = "") -> Iterator[None]:
    """Say how to go on, by default with the run that was stopped.

    Args:
        hint: how to go on.
        flags: what resuming needs besides the folder.
        partial_in: where what was done is, for what cannot go on; ``{folder}`` is filled in.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        stop = Interruption.of(stop)
        if not hint and stop.folder is not None:
            goes_on = f"fedkd run --resume {{folder}}{flags} goes on from there"
            hint = (partial_in or goes_on).format(folder=stop.folder)
        raise StoppedError(stop, hint) from None
