"""Text for LaTeX."""

import re

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "–": "--",  # noqa: RUF001
    "…": r"\dots{}",
    "±": r"$\pm$",
    "×": r"$\times$",  # noqa: RUF001
    **{character: rf"\{character}" for character in "&%$#_{}"},
}
_SPECIAL_CHARACTERS = re.compile("|".join(map(re.escape, _SPECIAL)))


def escape(text: str) -> str:
    """Return text that LaTeX sets as it is written, whatever is in it."""
    # Control characters would end a line or a paragraph in the middle of a cell.
    words = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return _SPECIAL_CHARACTERS.sub(lambda found: _SPECIAL[found[0]], words)


def label_of(name: str) -> str:
    """Return a name as a label in LaTeX can have it."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", name).strip("-").lower() or "study"
