"""Whose code may run: what a person named, not what a file brought along.

A settings file may name a callable, ``package.module:callable``, and would then run code that its
reader never chose. So a callable needs a person's word: the name itself among the words of the
command line or in Python, its package after ``--allow``, or either in the environment's
`ALLOW_VARIABLE`, separated by commas. Whoever reads settings of others does it inside
`fedkd.own_code.asking`, which is told here what to answer.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Any

from pydantic import BaseModel

from fedkd.bounds import shown
from fedkd.objectives import Objective
from fedkd.own_code import Permit, folder_of, is_own_code, package_of
from sim.settings.tables import read_word

ALLOW_VARIABLE = "FEDKD_ALLOW"

_ALLOWED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*)?")


def permitted(allow: Sequence[str]) -> set[str]:
    """Return the packages and callables that are allowed here and in the environment.

    Raises:
        ValueError: naming what is neither.
    """
    given = {"--allow": allow, ALLOW_VARIABLE: [os.environ.get(ALLOW_VARIABLE, "")]}
    allowed = set()
    for where, words in given.items():
        for name in filter(None, (part.strip() for word in words for part in word.split(","))):
            if not _ALLOWED.fullmatch(name):
                raise ValueError(
                    f"{where} takes packages or package.module:callable, separated by commas, "
                    f"got {shown(name)}"
                )
            allowed.add(name)
    return allowed


def is_permitted(name: str, allowed: Set[str]) -> bool:
    """Tell whether a callable is among what is allowed, or part of a package that is."""
    module = name.partition(":")[0].split(".")
    packages = {".".join(module[:end]) for end in range(1, len(module) + 1)}
    return name in allowed or not packages.isdisjoint(allowed)


def words_name(overrides: Iterable[str]) -> set[str]:
    """Return every text in the values of ``key=value`` words."""
    return {text for word in overrides for text in _texts(read_word(word)[1])}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def permit_of(overrides: Sequence[str], allow: Sequence[str]) -> Permit:
    """Return what refuses code that nobody but a file named.

    Args:
        overrides: the words among the settings; what a word names is allowed.
        allow: packages, or ``package.module:callable``; beside those of `ALLOW_VARIABLE`.

    Raises:
        ValueError: naming what is neither.
    """
    allowed, named = permitted(allow), words_name(overrides)

    def permit(name: str) -> bool:
        if name in named or is_permitted(name, allowed):
            return True
        package = package_of(name)
        raise ValueError(
            f"{name!r} is code that only a file names, and does not run unasked: add --allow "
            f"{package}, name it among the words, or set {ALLOW_VARIABLE}={package}"
        )

    return permit


def looking(_name: str) -> bool:
    """Let settings be read for a look: they may name any code, and none of it is loaded."""
    return False


def permit_of_settings(settings: BaseModel) -> Permit:
    """Return what loads the code that settings of a program's own name, and no other."""
    named = {name for _, name in code_in(settings)}
    return lambda name: name in named


NAMING = ("name", "kind", "source")
"""Settings that may name code of one's own."""


def code_in(settings: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Yield the code of others that settings name, each with the setting that names it."""
    if isinstance(settings, Objective):
        for term, inner in settings.terms.items():
            yield from code_in(inner, f"{where}.{term}")
    elif isinstance(settings, BaseModel):
        for key in type(settings).model_fields:
            value = getattr(settings, key)
            if key in NAMING and is_own_code(value):
                yield f"{where}.{key}".lstrip("."), value
            yield from code_in(value, f"{where}.{key}".lstrip("."))
        yield from code_in(settings.model_extra or {}, where)
    elif isinstance(settings, dict):
        # Settings that were only looked at.
        for key, value in settings.items():
            if key in NAMING and is_own_code(value):
                yield f"{where}.{key}", value
            yield from code_in(value, f"{where}.{key}")
    elif isinstance(settings, tuple | list):
        for place, item in enumerate(settings):
            yield from code_in(item, f"{where}.{place}")


def folders_of_code(settings: BaseModel) -> tuple[str, ...]:
    """Return the folders that the packages of code which settings name are imported from here."""
    packages = dict.fromkeys(package_of(name) for _, name in code_in(settings))
    return tuple(dict.fromkeys(filter(None, map(folder_of, packages))))


def allow_flags(settings: BaseModel) -> str:
    """Return what a command needs besides a run's folder: `` --allow mine``, or nothing."""
    packages = dict.fromkeys(package_of(name) for _, name in code_in(settings))
    return "".join(f" --allow {package}" for package in packages)
