"""Numbers and text as settings take them: strict types, with bounds no sensible study exceeds.

A bound is there for slips: a value beyond it would end in a traceback hours later, in numbers
that are no numbers, or never. `true` is no number, `"3"` is text, and 1e3 is a whole number
because YAML has no other way to write it with an exponent.
"""

import unicodedata
from pathlib import Path
from typing import Annotated, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field

_EXACT = 2.0**53
"""Up to here every whole number has a float of its own."""

LONGEST_TEXT = 4096
"""Characters; also the longest path that Linux takes."""


_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")
"""Control characters, halves of characters (file names that are no UTF-8), ends of lines."""

_SHOWN = 80
"""Characters of a value in a message."""


def _whole(value: object) -> object:
    if isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT:
        return int(value)
    return value


def shown(value: object) -> str:
    """Write any value for a message: on one line, short, and never an error of its own."""
    try:
        text = repr(value)
    except ValueError:
        # Python refuses to write out whole numbers of more than 4,300 digits.
        return "a number of more than 4300 digits"
    except RecursionError:
        return f"a {type(value).__name__} that is nested too deeply"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 20]}... ({len(text)} characters)"


def check_text(text: str) -> str:
    """Return text that a file, a terminal and YAML can hold on one line.

    Raises:
        ValueError: if it is too long, or naming the first character that they cannot hold.
    """
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"must have at most {LONGEST_TEXT} characters, got {len(text)}")
    if not text.isprintable():
        for character in text:
            if unicodedata.category(character) in _UNPRINTABLE:
                raise ValueError(f"must be text without control characters, got {shown(text)}")
    return text


def _check_path(path: Path) -> Path:
    check_text(str(path))
    return path


Whole: TypeAlias = Annotated[int, BeforeValidator(_whole), Field(strict=True)]
"""A whole number; the field adds its bounds."""
Real: TypeAlias = Annotated[float, Field(strict=True, allow_inf_nan=False)]
"""A finite number; the field adds its bounds. (Of two bounds of one kind pydantic keeps the last,
so what has bounds already, such as `Share`, takes no others.)"""

LAST_SEED = 2**32 - 1
Seed: TypeAlias = Annotated[Whole, Field(ge=0, le=LAST_SEED)]
Count: TypeAlias = Annotated[Whole, Field(ge=1, le=1_000_000)]
"""How many there are, or how often something is done: rounds, steps, rows of a step."""
CountOrZero: TypeAlias = Annotated[Whole, Field(ge=0, le=1_000_000)]
"""A count that may be zero."""
Few: TypeAlias = Annotated[Whole, Field(ge=1, le=1000)]
"""A count of what costs a model, a process or a whole run each."""
Rows: TypeAlias = Annotated[Whole, Field(ge=1, le=1_000_000_000)]
RowsOrZero: TypeAlias = Annotated[Whole, Field(ge=0, le=1_000_000_000)]
Width: TypeAlias = Annotated[Whole, Field(ge=1, le=65_536)]
"""Channels, units, or the size of a vector in a network."""
Layers: TypeAlias = Annotated[Whole, Field(ge=1, le=100)]
"""Layers on top of each other."""

Share: TypeAlias = Annotated[Real, Field(ge=0, le=1)]
PositiveShare: TypeAlias = Annotated[Real, Field(ge=1e-6, le=1)]
ShareBelowOne: TypeAlias = Annotated[Real, Field(ge=0, lt=1)]
LIMITS_OF_WEIGHTS = 0.0, 1e6
LIMITS_OF_TEMPERATURES = 0.001, 1e4
"""Far below, exponentials overflow, and far above, float32 tells no classes apart."""

Weight: TypeAlias = Annotated[Real, Field(ge=LIMITS_OF_WEIGHTS[0], le=LIMITS_OF_WEIGHTS[1])]
"""A factor of a loss."""
PositiveWeight: TypeAlias = Annotated[Real, Field(ge=1e-6, le=1e6)]
Temperature: TypeAlias = Annotated[
    Real, Field(ge=LIMITS_OF_TEMPERATURES[0], le=LIMITS_OF_TEMPERATURES[1])
]
"""A softening divisor."""
LearningRate: TypeAlias = Annotated[Real, Field(ge=1e-10, le=1e3)]

Text: TypeAlias = Annotated[str, Field(min_length=1), AfterValidator(check_text)]
PathText: TypeAlias = Annotated[Path, AfterValidator(_check_path)]
"""A path; NUL is part of no file's name, and other control characters are slips."""
