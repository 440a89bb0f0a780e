"""`replay`: what the command line and a notebook call; see `sim.counterfactual.replaying`."""

from collections.abc import Sequence

from sim.counterfactual.replaying import ReplayResult, Wanted, replay
from sim.settings import SettingsError

__all__ = ["ReplayResult", "Wanted", "numbers_in", "replay"]


def numbers_in(words: Sequence[str], option: str) -> tuple[int, ...]:
    """Read numbers that are given several times, or separated by commas.

    Args:
        words: as they were given.
        option: that they were given to.

    Raises:
        SettingsError: naming the option and what it got.
    """
    found: list[int] = []
    for word in (part.strip() for text in words for part in text.split(",")):
        if not (word.isascii() and word.isdigit()) or len(word) > 6:
            raise SettingsError(f"{option} takes clients by number, such as 3 or 3,5, got {word!r}")
        if int(word) in found:
            raise SettingsError(f"{option} names client {int(word)} twice, name it once")
        found.append(int(word))
    return tuple(sorted(found))
