"""Values: frozen dataclasses of arrays and plain values, flattened and made again in one place.

What is exchanged, what a server remembers between two rounds and what a checkpoint holds are all
values. They travel as named arrays and as plain values that JSON can hold; no code travels.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from hashlib import sha256
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np

Arrays = dict[str, np.ndarray]
"""Arrays by name."""

DEEPEST = 12
"""Values within values; deeper ones are refused, for they are nobody's."""

_PLAIN = (NoneType, bool, int, float, str)


class Value:
    """Base of frozen dataclasses that `flatten` takes apart and `unflatten` makes again.

    Fields hold NumPy arrays, plain values (None, bool, int, float, str), other values, tuples of
    these, and mappings from int or str to these. A subclass is known by its module and name as soon
    as it is defined; nothing else can be made again.
    """

    _known: ClassVar[dict[str, type["Value"]]] = {}

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        Value._known[_name_of(cls)] = cls


class Flat(NamedTuple):
    """A value taken apart.

    Attributes:
        arrays: by their places in the value, such as ``tables/3/values``. No copies.
        plain: all the rest; what JSON can hold.
    """

    arrays: Arrays
    plain: Any


def flatten(value: Value) -> Flat:
    """Take a value apart.

    Raises:
        TypeError: naming the place that holds something else than a value can.
    """
    arrays: Arrays = {}
    return Flat(arrays, _taken_apart(value, "", arrays, 0))


def unflatten(arrays: Mapping[str, np.ndarray], plain: Any) -> Any:
    """Return the value that `flatten` took apart.

    Args:
        arrays: by their places; every one of them is used once.
        plain: the rest. It may come from anybody: only known values are made, and each field has
            to hold what its annotation says.

    Raises:
        ValueError: for what no value of ours is.
    """
    left = dict(arrays)
    value = _made(plain, left, 0)
    if left:
        raise ValueError(f"arrays without a place: {sorted(left)[:3]}")
    return value


def read_only(value: Value) -> Value:
    """Let nobody write into the arrays of a value any more; returns the same value."""
    for _, array in _arrays_of(value, ""):
        array.flags.writeable = False
    return value


def digest(value: Value) -> str:
    """Return the SHA-256 of a value: equal for equal types, bits and plain values."""
    flat = flatten(value)
    found = sha256(repr(flat.plain).encode())
    for name, array in sorted(flat.arrays.items()):
        found.update(f"{name}/{array.dtype.str}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


@lru_cache(maxsize=256)
def _field_names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _name_of(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _arrays_of(held: Any, place: str) -> Iterator[tuple[str, np.ndarray]]:
    if type(held) in _PLAIN:
        return
    if isinstance(held, np.ndarray):
        yield place, held
    elif isinstance(held, Value):
        for name in _field_names(type(held)):  # type: ignore[arg-type]
            yield from _arrays_of(getattr(held, name), _inside(place, name))
    elif isinstance(held, Mapping):
        for key, inner in held.items():
            yield from _arrays_of(inner, _inside(place, key))
    elif isinstance(held, tuple | list):
        for number, inner in enumerate(held):
            yield from _arrays_of(inner, _inside(place, number))


def _inside(place: str, key: object) -> str:
    return f"{place}/{key}" if place else str(key)


# -- taking apart ----------------------------------------------------------------------------


def _taken_apart(held: Any, place: str, arrays: Arrays, depth: int) -> Any:
    if depth > DEEPEST:
        raise TypeError(f"{place[:80]}: more than {DEEPEST} values within each other")
    if type(held) in _PLAIN:
        return held
    if isinstance(held, np.ndarray):
        if place in arrays:
            raise TypeError(f"{place}: two arrays of one name")
        arrays[place] = held
        return {"array": place}
    if isinstance(held, np.generic) and type(held.item()) in _PLAIN:
        return held.item()
    if isinstance(held, Value):
        if not is_dataclass(held):
            raise TypeError(f"{place or type(held).__name__}: a value has to be a dataclass")
        inner = {
            name: _taken_apart(getattr(held, name), _inside(place, name), arrays, depth + 1)
            for name in _field_names(type(held))
        }
        return {"value": _name_of(type(held)), "fields": inner}
    if isinstance(held, Mapping):
        if not all(type(key) in (int, str) for key in held):
            raise TypeError(f"{place}: the keys of a mapping have to be int or str")
        pairs = [
            [key, _taken_apart(inner, _inside(place, key), arrays, depth + 1)]
            for key, inner in held.items()
        ]
        return {"map": pairs}
    if isinstance(held, tuple | list):
        parts = [
            _taken_apart(inner, _inside(place, number), arrays, depth + 1)
            for number, inner in enumerate(held)
        ]
        return {"tuple": parts}
    raise TypeError(
        f"{place or 'a value'}: a {type(held).__name__} cannot be kept or sent; use arrays, plain "
        "values, tuples, mappings, or a frozen dataclass that is a Value"
    )


# -- making again ----------------------------------------------------------------------------


def _made(plain: Any, arrays: Arrays, depth: int) -> Any:
    if depth > DEEPEST:
        raise ValueError(f"more than {DEEPEST} values within each other")
    if type(plain) in _PLAIN:
        return plain
    if not isinstance(plain, Mapping) or not all(isinstance(key, str) for key in plain):
        raise ValueError(f"no part of a value: {str(plain)[:40]!r}")
    match dict(plain):
        case {"array": str(place), **rest} if not rest:
            if place not in arrays:
                raise ValueError(f"there is no array {place[:40]!r}")
            return arrays.pop(place)
        case {"value": str(name), "fields": Mapping() as given, **rest} if not rest:
            return _value(name, {k: _made(inner, arrays, depth + 1) for k, inner in given.items()})
        case {"map": list(pairs), **rest} if not rest:
            if not all(
                isinstance(pair, list) and len(pair) == 2 and type(pair[0]) in (int, str)
                for pair in pairs
            ):
                raise ValueError("a mapping that is none")
            table = {key: _made(inner, arrays, depth + 1) for key, inner in pairs}
            if len(table) < len(pairs):
                raise ValueError("a mapping that names something twice")
            return table
        case {"tuple": list(parts), **rest} if not rest:
            return tuple(_made(inner, arrays, depth + 1) for inner in parts)
    raise ValueError(f"no part of a value: {str(plain)[:40]!r}")


def _value(name: str, given: Mapping[str, Any]) -> Value:
    kind = Value._known.get(name)
    if kind is None or not is_dataclass(kind):
        raise ValueError(f"unknown kind of value {name[:80]!r}")
    hints = hints_of(kind)
    if given.keys() != hints.keys():
        raise ValueError(f"{kind.__name__}: fields {sorted(given)[:5]}, expected {sorted(hints)}")
    for field, held in given.items():
        if not fits(held, hints[field]):
            raise ValueError(f"{kind.__name__}.{field} is {_shown(held)}")
    made: Value = kind(**given)
    return made


def _shown(held: object) -> str:
    return f"a {type(held).__name__}" if isinstance(held, np.ndarray | Value) else repr(held)[:40]


@lru_cache(maxsize=256)
def hints_of(kind: type) -> Mapping[str, Any]:
    """Return what the fields of a dataclass may hold, by their names."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


def fits(held: object, hint: Any) -> bool:
    """Tell whether a field with this annotation may hold something."""
    if hint is Any or isinstance(hint, TypeVar):
        return True
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return fits(held, parts[0])
    if origin in (Union, UnionType):
        return any(fits(held, part) for part in parts)
    if origin is Literal:
        return any(type(held) is type(part) and held == part for part in parts)
    if origin is tuple:
        return isinstance(held, tuple) and _parts_fit(held, parts)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(held, Mapping) and all(
            fits(key, parts[0]) and fits(inner, parts[1]) for key, inner in held.items()
        )
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return isinstance(held, tuple) and all(fits(inner, parts[0]) for inner in held)
    if isinstance(origin, type):
        return isinstance(held, origin)
    if hint is float:
        return type(held) in (int, float)
    if hint in _PLAIN or hint is None:
        return type(held) is (NoneType if hint is None else hint)
    return isinstance(held, hint)


def _parts_fit(held: tuple[Any, ...], parts: tuple[Any, ...]) -> bool:
    if len(parts) == 2 and parts[1] is Ellipsis:
        return all(fits(inner, parts[0]) for inner in held)
    return len(held) == len(parts) and all(map(fits, held, parts))
