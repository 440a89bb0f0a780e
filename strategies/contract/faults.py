"""Faults of published code that an algorithm here can commit on purpose."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What published code does wrong, in a way that changes results.

    Attributes:
        does: what it does, in one sentence.
        read_in: where it was read: repository and file, or the paper and the place in it.
        right: what is right, and done without the switch.
        shows_with: settings, as words, of a run in which it can show: over those of the museum.
            Without any, those of the museum do.
        stands_for: the setting that does the same, as a word; none where only the switch does it.
    """

    does: str
    read_in: str
    right: str
    shows_with: tuple[str, ...] = ()
    stands_for: str = ""
