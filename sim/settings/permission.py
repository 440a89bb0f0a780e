"""Whose code may run: what a person named, not what a file brought along.

A settings file may name a callable, ``package.module:callable``, and would then run code that its
reader never chose. So a callable needs a person's word: the name itself among the words of the
command line or in Python, its package after ``--allow``, or either in the environment's
`ALLOW_VARIABLE`, separated by commas.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Any

from pydantic import BaseModel

from fedkd.bounds import shown
from fedkd.models import ModelSettings
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


def callables_in(settings: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Yield the callables that settings name, each with the setting that names it first."""
    if isinstance(settings, ModelSettings):
        if settings.is_callable:
            yield where, settings.name
    elif isinstance(settings, BaseModel):
        for key in type(settings).model_fields:
            yield from callables_in(getattr(settings, key), f"{where}.{key}".lstrip("."))
    elif isinstance(settings, tuple):
        for place, item in enumerate(settings):
            yield from callables_in(item, f"{where}.{place}")


def allow_flags(settings: BaseModel) -> str:
    """Return what a command needs besides a run's folder: `` --allow mine``, or nothing."""
    packages = dict.fromkeys(package_of(name) for _, name in callables_in(settings))
    return "".join(f" --allow {package}" for package in packages)


def package_of(name: str) -> str:
    """Return the first part of a callable's name."""
    return name.partition(":")[0].partition(".")[0]
