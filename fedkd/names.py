"""Names that become the names of files and folders, and names as they are shown to people."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def check_name(name: str, what: str) -> str:
    """Return a name that a folder can have.

    Args:
        name: to check.
        what: what is named, for the message.

    Raises:
        ValueError: if it could lead to another folder.
    """
    if not NAME.fullmatch(name) or name.strip(".") == "":
        raise ValueError(
            f"{what} must be 1 to 64 letters, digits, '.', '_' or '-' (it names a folder), "
            f"got {name!r}"
        )
    return name


def printable(text: str) -> str:
    r"""Return a text that moves no cursor and hides nothing: ``\x1b[2J`` for an escape code.

    What comes from files and modules (names of classes, reasons of errors) may hold control
    characters, line ends and marks that turn the direction of writing; each is shown as its escape.
    """
    return "".join(
        letter if letter.isprintable() or letter in _HARMLESS else ascii(letter)[1:-1]
        for letter in text
    )


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"``, or nothing where no known word is near."""
    names = {name.casefold(): name for name in known}
    matches = get_close_matches(word.casefold(), list(names), n=1, cutoff=0.6)
    return f"; did you mean {names[matches[0]]!r}?" if matches else ""


_HARMLESS = frozenset("\u200c\u200d\u00a0\u3000")
"""Spaces and joiners that Python escapes and languages need."""
