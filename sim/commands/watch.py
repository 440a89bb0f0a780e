"""`watch`: a study or a run that another process makes, as its folder tells it."""

import time
from collections.abc import Iterator
from pathlib import Path

from sim.watching.studies import Follower, Sight

EVERY_S = 1.0


def watch(folder: Path | str, *, every_s: float = EVERY_S) -> Iterator[Sight]:
    """Look at a study's or a run's folder until it is over.

    Only files are read; the process that runs is not disturbed.

    Args:
        folder: of a study of `compare`, also one that has not begun all its runs, or of a run.
        every_s: seconds between two looks, > 0.

    Yields:
        What there is: at once, and whenever something has changed. The last one says whether all
        runs are finished (`Sight.condition`); ``next(watch(folder))`` is a single look.

    Raises:
        SettingsError: it is no such folder, or a file in it is damaged.
    """
    follower = Follower(Path(folder))
    last: Sight | None = None
    while True:
        sight = follower.look()
        if last is None or sight.to_row() != last.to_row():
            yield sight
            last = sight
        if sight.condition != "running":
            return
        time.sleep(every_s)
