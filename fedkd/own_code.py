"""Code of one's own, by its name ``package.module:attribute``: who may name it, what loads it.

Settings name models, algorithms, terms and the like in this way, and all of them come through
here. Whoever reads settings that others wrote says first what may run (`asking`), since to load
code is to run it.
"""

import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Annotated, Any, TypeVar, Union, cast

from pydantic import BaseModel, Discriminator, PlainValidator, SerializeAsAny, Tag

from fedkd.bounds import shown

_DOTTED = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"
_NAME = re.compile(f"{_DOTTED}:{_DOTTED}")

HOW = "package.module:Class"
"""How a class of one's own is written."""

OTHER_PACKAGE = "another package"
"""In the place of a name where a problem lies in settings of a class of another package."""

T = TypeVar("T")

Permit = Callable[[str], bool]
"""Tells whether code may be loaded; ValueError where it must not even be named."""


def is_own_code(name: object) -> bool:
    """Tell whether this is how code of one's own is named."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def package_of(name: str) -> str:
    """Return the first part of a name: ``mine`` of ``mine.nets:net``."""
    return name.partition(":")[0].partition(".")[0]


def folder_of(package: str) -> str | None:
    """Return the folder that a package or module is imported from; None where there is none.

    Nothing of it is run to find out.
    """
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    places = [*(spec.submodule_search_locations or ()), *([spec.origin] if spec.origin else ())]
    return os.path.dirname(os.path.abspath(places[0])) if places else None


def _anything(_name: str) -> bool:
    return True


def refuse(name: str) -> bool:
    """Permit no code of others at all.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"{name!r} is code that only a file names, and does not run unasked: allow its package "
        f"{package_of(name)!r}"
    )


_permit: ContextVar[Permit] = ContextVar("fedkd_own_code", default=_anything)


@contextmanager
def asking(permit: Permit) -> Iterator[None]:
    """Ask before any code is loaded inside the block. Elsewhere what a program names may run."""
    token = _permit.set(permit)
    try:
        yield
    finally:
        _permit.reset(token)


def may_load(name: str, setting: str = "") -> bool:
    """Tell whether code may be loaded here and now; False where settings are only looked at.

    Args:
        name: of the code.
        setting: that names it, for the message; empty where whoever reads settings adds it.

    Raises:
        ValueError: it must not be named, and why.
    """
    try:
        return _permit.get()(name)
    except ValueError as error:
        raise ValueError(f"{setting}: {error}" if setting else str(error)) from None


def load(name: str, setting: str) -> Any:
    """Import what a name stands for.

    Args:
        name: ``package.module:attribute``.
        setting: that names it, for the message.

    Raises:
        ValueError: one line: it may not be loaded, cannot be imported, or is not there.
    """
    if not may_load(name, setting):
        raise ValueError(f"{setting} {name!r}: its settings were only looked at, and no code runs")
    module_name, _, attribute = name.partition(":")
    try:
        target: Any = importlib.import_module(module_name)
    # Somebody else's module may fail in any way, and a script may end there.
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{setting} {name!r}: cannot import {module_name!r}: {_told(error)}"
            + _hidden(module_name)
            + _nowhere(module_name, error)
        ) from error
    for part in attribute.split("."):
        if isinstance(target, ModuleType) and isinstance(getattr(target, part, None), ModuleType):
            raise ValueError(
                f"{setting} {name!r}: write modules before the colon, got {part!r} after it"
            )
        try:
            target = getattr(target, part)
        except AttributeError as error:
            raise ValueError(f"{setting} {name!r}: {error}{_hidden(module_name)}") from error
    return target


def load_class(name: str, base: type[T], setting: str) -> type[T]:
    """Import a class that can be made: a subclass of ``base`` with all that it must have.

    Args:
        name: ``package.module:Class``.
        base: what it has to be.
        setting: that names it, for the message.

    Raises:
        ValueError: one line: see `load`; or it is no such class, or lacks a method.
    """
    found = load(name, setting)
    wanted = f"{base.__module__}.{base.__qualname__}"
    if not isinstance(found, type):
        raise ValueError(
            f"{setting} {name!r} must be a class that is a {wanted}, got a {type(found).__name__}"
        )
    if not issubclass(found, base):
        raise ValueError(f"{setting} {name!r} must be a subclass of {wanted}, and is none")
    missing = sorted(cast("frozenset[str]", getattr(found, "__abstractmethods__", frozenset())))
    if missing:
        raise ValueError(f"{setting} {name!r} lacks {', '.join(missing)} of {wanted}")
    return found


def check_settings(owner: type, base: type[BaseModel], named: str) -> None:
    """Refuse a class whose ``Settings`` are none, or cannot hold the name that it was called by.

    Args:
        owner: the class.
        base: what its settings have to be.
        named: the setting that names the class and its value, for the message.

    Raises:
        ValueError: one line that says what to write.
    """
    settings: Any = getattr(owner, "Settings", None)
    wanted = f"a class derived from {base.__module__}.{base.__qualname__}"
    if not isinstance(settings, type) or not issubclass(settings, base):
        raise ValueError(f"{named} needs Settings, {wanted}; got {shown(settings)}")
    check_holds_name(settings, "name", f"{named}: its Settings")


def check_holds_name(settings: type[BaseModel], key: str, whose: str) -> None:
    """Refuse settings whose ``name`` or ``kind`` is fixed, as those of a table's rows are.

    Raises:
        ValueError: one line that says what to write.
    """
    annotation = settings.model_fields[key].annotation
    if annotation is not str:
        raise ValueError(
            f"{whose} must have '{key}: str', got '{key}: "
            f"{shown(annotation).removeprefix('typing.')}': what is not of the table is called by "
            "its full name"
        )


def by_name(
    table: Mapping[str, Any], unread: type[BaseModel], class_of: Callable[[str], Any]
) -> Any:
    """Return the type of a section of settings whose ``name`` decides what else it has.

    Args:
        table: classes of ours by name, each with its ``Settings``.
        unread: holds settings of a class of another package where they are only looked at.
        class_of: finds that class by its name.
    """
    base = unread.__mro__[1]

    def name_of(value: object) -> str:
        name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
        return name if isinstance(name, str) and name in table else OTHER_PACKAGE

    def read(value: Any) -> BaseModel:
        if not isinstance(value, BaseModel | Mapping):
            raise ValueError(f"must be a name or a table with a name, got {shown(value)}")
        given = value.model_dump() if isinstance(value, BaseModel) else dict(value)
        if not may_load(given["name"]):
            return unread.model_validate(given)
        kind: type[BaseModel] = class_of(given["name"]).Settings
        return value if isinstance(value, kind) else kind.model_validate(given)

    kinds = [
        *(Annotated[kind.Settings, Tag(name)] for name, kind in table.items()),
        Annotated[SerializeAsAny[base], PlainValidator(read), Tag(OTHER_PACKAGE)],  # type: ignore[misc, valid-type]
    ]
    return Annotated[Union[tuple(kinds)], Discriminator(name_of)]  # noqa: UP007 - not known before


def told(error: BaseException, name: str) -> str:
    """Return what went wrong in code of one's own, and the line of it that led there.

    Args:
        error: that it raised.
        name: of the code.

    Returns:
        One line; without a place where nothing of the package was running, as where arguments do
        not fit.
    """
    text = " ".join(str(error).split())
    module = sys.modules.get(package_of(name))
    file, folders = getattr(module, "__file__", None), list(getattr(module, "__path__", ()))
    places = [
        f" ({frame.filename}, line {frame.lineno})"
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == file
        or any(frame.filename.startswith(f"{folder}{os.sep}") for folder in folders)
    ]
    return f"{type(error).__name__}: {text}{places[-1] if places else ''}"


def _told(error: BaseException) -> str:
    """Return what went wrong and where, on one line."""
    text = " ".join(str(error).split())
    if isinstance(error, ImportError):
        return text
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen") and frame.filename != __file__
    ]
    here = frames[-1] if frames else None
    where = (
        f" ({here.filename}, line {here.lineno})" if here and here.name != "import_module" else ""
    )
    return f"{type(error).__name__}: {text}{where}"


def _hidden(module_name: str) -> str:
    """Say where a package in the current folder has the name of another one that is found first."""
    top = module_name.partition(".")[0]
    places = [os.path.join(os.getcwd(), name) for name in (top, f"{top}.py")]
    mine = next((place for place in places if os.path.exists(place)), None)
    found = getattr(sys.modules.get(top), "__file__", None)
    if mine is None or found is None or os.path.realpath(found).startswith(os.path.realpath(mine)):
        return ""
    whose = "fedkd's own package" if top in ("fedkd", "sim", "strategies") else "another package"
    return f"; {top!r} is {whose} ({os.path.dirname(found)}), which hides {mine!r}: rename yours"


def _nowhere(module_name: str, error: BaseException) -> str:
    """Say where a package is looked for, if it is itself what was not found."""
    top = module_name.partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or error.name != top:
        return ""
    return (
        "; it is looked for in the working folder and among installed packages: install it, or add "
        "its folder to PYTHONPATH"
    )
