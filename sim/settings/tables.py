r"""Tables of plain values: read from YAML and words within limits, references filled in, written.

What people bring is data. What comes out of here is tables with text as keys, lists, text without
control characters, finite numbers, true, false and null; nested no deeper than `DEEPEST` and no
more than `MOST_VALUES` of them, however aliases and references multiply what a file says.

YAML is read by the rules of its version 1.2: `12:30` and `yes` are text, `1e3` is a number. A
reference ``${other.key}`` stands for the value of another key; ``\${`` is these two characters.
Nothing else stands between the braces: a file cannot ask for the environment, whose secrets would
be written into every run folder.
"""

import math
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import SafeConstructor
from yaml.resolver import Resolver

from fedkd.bounds import LONGEST_TEXT, check_text, shown

DEEPEST = 32
"""Levels of tables and lists."""
MOST_VALUES = 100_000
LONGEST_FILE = 2**19
"""Bytes; reading them takes a few seconds."""
_LARGEST_WHOLE = 2**63

_TAG = "tag:yaml.org,2002:"
_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+(?:_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", "~nN"),
)
"""Plain scalars that are no text: tag, pattern, first characters."""


class _Rules(SafeConstructor, Resolver):
    """Plain data by the rules of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def construct_table(self, node: Any) -> Any:
        table: dict[Any, Any] = {}
        yield table
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int) or isinstance(key, bool):
                problem = f"a key must be text, got {shown(key)}"
            elif str(key) == "<<":
                problem = "merge keys (<<) are not read; refer to a table with ${key}"
            elif str(key) in table:
                problem = f"the key {shown(str(key))} stands there twice"
            else:
                table[str(key)] = self.construct_object(value_node, deep=True)
                continue
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)

    def construct_whole(self, node: Any) -> int:
        text = str(self.construct_scalar(node))
        if len(text) > LONGEST_TEXT:
            raise yaml.MarkedYAMLError(
                problem=f"a number of {len(text)} characters", problem_mark=node.start_mark
            )
        return int(text.replace("_", ""), {"0o": 8, "0x": 16}.get(text[:2], 10))

    def construct_real(self, node: Any) -> float:
        text = str(self.construct_scalar(node)).lower().replace("_", "")
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))


class _Loader(_Rules, yaml.SafeLoader):
    """Reads by these rules, no deeper than `DEEPEST`."""

    def __init__(self, text: str) -> None:
        yaml.SafeLoader.__init__(self, text)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self._depth > DEEPEST:
            raise yaml.MarkedYAMLError(
                problem=f"nested deeper than {DEEPEST} levels",
                problem_mark=self.peek_event().start_mark,  # type: ignore[no-untyped-call]
            )
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


_fast_loader: Any = None
if yaml.__with_libyaml__:

    class _FastLoader(_Rules, yaml.CSafeLoader):
        """Reads by the same rules in C; what is too deep it does not notice."""

        def __init__(self, text: str) -> None:
            yaml.CSafeLoader.__init__(self, text)

    _fast_loader = _FastLoader


class _Dumper(yaml.SafeDumper):
    """Quotes text that readers of YAML 1.1 or 1.2 would take for something else."""


for _kind, _pattern, _first in _SCALARS:
    for _class in (_Rules, _Dumper):
        _class.add_implicit_resolver(
            _TAG + _kind, re.compile(rf"^(?:{_pattern})$"), [*_first, *([""] * (_kind == "null"))]
        )
_Rules.add_constructor(_TAG + "map", _Rules.construct_table)  # type: ignore[type-var]
_Rules.add_constructor(_TAG + "int", _Rules.construct_whole)  # type: ignore[type-var]
_Rules.add_constructor(_TAG + "float", _Rules.construct_real)  # type: ignore[type-var]


def read_yaml(path: Path, *, fast: bool = False) -> dict[str, Any]:
    """Read a file that holds one table; references are left as they are.

    Args:
        path: of the file.
        fast: with the reader in C, where there is one: for files that `yaml_text` wrote. It takes a
            few odd texts otherwise, and would tell less about those that people wrote.

    Raises:
        ValueError: one line that names the file.
    """
    name = shown(str(path))
    try:
        check_text(str(path))
    except ValueError as error:
        raise ValueError(f"the name of a config {error}") from None
    try:
        # A pipe that nobody writes to would be waited for; those that a shell opened are there.
        if stat.S_ISFIFO(path.stat().st_mode) and not str(path).startswith("/dev/"):
            raise ValueError(f"config {name} is a pipe, need a YAML file")
        with path.open("rb") as file:
            content = file.read(LONGEST_FILE + 1)
        if len(content) > LONGEST_FILE:
            raise ValueError(f"config {name} has more than {LONGEST_FILE} bytes: no settings file")
        text = content.decode("utf-8-sig")
        table = _parse_fast(text) if fast else _parse(text)
    except FileNotFoundError:
        raise ValueError(f"config {name} does not exist") from None
    except IsADirectoryError:
        raise ValueError(f"config {name} is a folder, need a YAML file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read config {name}: {one_line(error)}") from None
    if not isinstance(table, dict):
        raise ValueError(f"config {name} must be a table of keys and values")
    return checked_table(table)


def read_word(word: str) -> tuple[tuple[str, ...], Any]:
    """Read ``a.b=value`` as its path and its value, which is YAML.

    Raises:
        ValueError: one line that quotes the word.
    """
    key, sign, text = word.partition("=")
    path = tuple(key.split("."))
    if not sign or not key:
        raise ValueError(f"overrides are written key=value, got {shown(word)}")
    if not all(path) or len(path) > DEEPEST:
        raise ValueError(f"cannot read {shown(word)}: no setting has a name like {shown(key)}")
    if len(text) > LONGEST_FILE:
        raise ValueError(f"{shown(key)}: got a value of {len(text)} characters")
    try:
        value = _parse(text)
    except yaml.YAMLError as error:
        raise ValueError(f"cannot read {shown(word)}: {one_line(error)}") from None
    return path, checked_table({key: value})[key]


def _parse(text: str) -> Any:
    return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader


def _parse_fast(text: str) -> Any:
    if _fast_loader is None:
        return _parse(text)
    try:
        depth = 0
        for event in yaml.parse(text, _fast_loader):
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                return _parse(text)
            depth += isinstance(event, yaml.CollectionStartEvent)
        return yaml.load(text, _fast_loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError:
        return _parse(text)  # which says what is wrong, and where


def one_line(error: BaseException) -> str:
    """Return what an error says on one line."""
    return " ".join(str(error).split())


def checked_table(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of plain values that shares nothing with itself.

    Raises:
        ValueError: naming the key whose value is no plain value, or whose values are too many.
    """
    count = 0

    def copied(value: Any, path: tuple[str, ...]) -> Any:
        nonlocal count
        count += 1
        if count > MOST_VALUES:
            raise ValueError(f"{_name(path)}: more than {MOST_VALUES} values in all")
        if len(path) > DEEPEST + 1:
            raise ValueError(f"{_name(path)}: nested deeper than {DEEPEST} levels")
        if isinstance(value, Mapping):
            return {_key(key, path): copied(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [copied(item, (*path, str(place))) for place, item in enumerate(value)]
        return _scalar(value, path)

    return {_key(key, ()): copied(value, (key,)) for key, value in table.items()}


def _key(key: Any, path: tuple[str, ...]) -> str:
    try:
        return check_text(str(key))
    except ValueError as error:
        raise ValueError(f"a key of {_name(path) or 'the settings'} {error}") from None


def _scalar(value: Any, path: tuple[str, ...]) -> Any:
    problem = ""
    if isinstance(value, str):
        try:
            return check_text(value)
        except ValueError as error:
            problem = str(error)
    elif isinstance(value, float) and not math.isfinite(value):
        problem = f"must be a finite number, got {value}"
    elif isinstance(value, int) and abs(value) >= _LARGEST_WHOLE:
        problem = f"must be a number below 2**63, got {shown(value)}"
    elif value is not None and not isinstance(value, bool | int | float):
        problem = f"must be text, a number, true, false or null, got {shown(value)}"
    if problem:
        raise ValueError(f"{_name(path)}: {problem}")
    return value


def _name(path: Iterable[str]) -> str:
    return _cut(".".join(path))


def _cut(name: str) -> str:
    return name if len(name) <= 80 else f"{name[:60]}..."


_REFERENCE = re.compile(r"(\\*)\$\{")
_KEY = re.compile(r"[^${}\\:]*\}")


def escaped(text: str) -> str:
    """Return the text that `fill_in` reads as this one."""
    return _REFERENCE.sub(lambda found: rf"{found[1] * 2}\${{", text)


def fill_in(table: Mapping[str, Any]) -> dict[str, Any]:
    r"""Put the values of other keys in the place of ``${...}``, and ``${`` in that of ``\${``.

    Raises:
        ValueError: naming the key whose reference leads nowhere, or on and on.
    """
    return checked_table(_Filler(table).filled(table, ()))


class _Filler:
    """Fills in one table, every key once."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        self._table = table
        self._known: dict[str, Any] = {}
        self._open: list[str] = []

    def filled(self, value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, Mapping):
            return {key: self.filled(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self.filled(item, (*path, str(place))) for place, item in enumerate(value)]
        if isinstance(value, str) and "${" in value:
            return self._text(value, path)
        return value

    def _text(self, text: str, path: tuple[str, ...]) -> Any:
        parts, place = [], 0
        while found := _REFERENCE.search(text, place):
            slashes = len(found[1])
            parts.append(text[place : found.start()] + "\\" * (slashes // 2))
            place = found.end()
            if slashes % 2:
                parts.append("${")
                continue
            end = _KEY.match(text, place)
            if end is None:
                raise ValueError(
                    f"{_name(path)}: ${{...}} takes the name of another key and nothing else, not "
                    rf"the environment either; \${{ is the text itself; got {shown(text)}"
                )
            value = self._target(end[0][:-1], path)
            if found.start() == 0 and not slashes and end.end() == len(text):
                return value
            if isinstance(value, dict | list):
                raise ValueError(
                    f"{_name(path)}: {shown(end[0][:-1])} is a table or a list, which cannot be "
                    f"a part of a text; got {shown(text)}"
                )
            parts.append(value if isinstance(value, str) else _plain_text(value))
            place = end.end()
        whole = "".join([*parts, text[place:]])
        if len(whole) > LONGEST_TEXT:
            raise ValueError(f"{_name(path)}: a text of {len(whole)} characters")
        return whole

    def _target(self, key: str, path: tuple[str, ...]) -> Any:
        if key in self._known:
            return self._known[key]
        if key in self._open or len(self._open) >= DEEPEST:
            chain = " -> ".join(map(_cut, [*self._open[:5], key]))
            raise ValueError(f"{_name(path)}: references lead round and round, or too far: {chain}")
        value: Any = self._table
        for part in key.split("."):
            if isinstance(value, Mapping) and part in value:
                value = value[part]
            elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
                value = value[int(part)]
            else:
                raise ValueError(f"{_name(path)}: {shown(key)} not found in the file or the words")
        self._open.append(key)
        value = self.filled(value, tuple(key.split(".")))
        self._open.pop()
        self._known[key] = value
        return value


def _plain_text(value: bool | int | float | None) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def leaves(
    table: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every plain value of nested tables, with its path."""
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def dotted(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return every plain value of nested tables by its dotted name; lists stay whole."""
    return {".".join(path): value for path, value in leaves(table)}


def yaml_text(table: Mapping[str, Any]) -> str:
    """Write plain values as YAML, in their order; read back and filled in they are the same."""
    return yaml.dump(
        _escaped_table(table), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000
    )


def _escaped_table(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _escaped_table(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped_table(item) for item in value]
    return escaped(value) if isinstance(value, str) else value
