"""Payloads: what clients and server send each other. One kind, one class, one file.

A kind is a frozen dataclass. Everything else follows from its fields: how it travels and is kept
(`fedkd.exchange.values`), what is looked at before it is used, its bytes, what a fault does to it.
The kinds of ours are in `fedkd.exchange.payloads`; one of your own needs no other file changed.
"""

import math
from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np

from fedkd.exchange.values import Arrays, Value, flatten, unflatten

FLOAT32 = np.dtype(np.float32)
INT64 = np.dtype(np.int64)

RowIds = Literal["planned", "subset", "own"]
"""Which rows a table is about. ``planned``: exactly those asked for, so their ids cost nothing.
``subset``: some of those, also none: a bit for each planned row, or four bytes an id, whichever is
less. ``own``: ids that only the sender knows: four bytes each."""

ID_BYTES = 4


def ids_bytes(ids: RowIds, rows: int, planned: int = 0) -> int:
    """Return what it costs to say which rows were meant.

    Args:
        ids: how the rows relate to what was planned.
        rows: how many there are.
        planned: how many were planned, for ``subset``.
    """
    match ids:
        case "planned":
            return 0
        case "subset":
            return min(ID_BYTES * rows, -(-planned // 8))
        case "own":
            return ID_BYTES * rows


class AtMost(NamedTuple):
    """A dimension that may be smaller.

    Attributes:
        size: how large it may be.
        of: a name; dimensions of one name have one size in all arrays of a payload.
    """

    size: int
    of: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What one array of a payload may be.

    Attributes:
        shape: its dimensions.
        dtype: its type.
        largest: of its numbers; NaN and infinity are always too large.
        smallest: of its numbers.
        subject: what one number is called in a message, such as ``a score``.
        where: what the array is called there, such as ``among the scores``.
        constant: what it has to be bit for bit, NaN included; None: anything.
    """

    shape: tuple[int | AtMost, ...]
    dtype: np.dtype = FLOAT32
    largest: int | float = math.inf
    smallest: int | float = -math.inf
    subject: str = "a value"
    where: str = "among the values"
    constant: np.ndarray | None = None

    @property
    def most_bytes(self) -> int:
        """How many bytes the array may have."""
        sizes = [size.size if isinstance(size, AtMost) else size for size in self.shape]
        return math.prod(sizes) * self.dtype.itemsize

    def bad_layout(
        self, shape: tuple[int, ...], dtype: np.dtype, sizes: dict[str, int]
    ) -> str | None:
        """Return why an array of this layout is none that was asked for, or None.

        Args:
            shape: of the array.
            dtype: of the array.
            sizes: of dimensions that had a name before; those of this array are added.
        """
        if shape == self.shape and dtype == self.dtype:
            # All of its sizes are numbers, which have no name.
            return None
        if len(shape) != len(self.shape) or not all(
            _agrees(size, limit, sizes) for size, limit in zip(shape, self.shape, strict=True)
        ):
            return f"shape {shape}, expected {self.shown}"
        if dtype != self.dtype:
            return f"dtype {dtype}, expected {self.dtype}"
        return None

    @property
    def shown(self) -> str:
        """The shape for a message."""
        if not any(isinstance(size, AtMost) for size in self.shape):
            return str(self.shape)
        sizes = [f"<= {s.size}" if isinstance(s, AtMost) else str(s) for s in self.shape]
        return f"({', '.join(sizes)})"

    def bad_numbers(self, array: np.ndarray) -> str | None:
        """Return why the numbers cannot be used, or None; makes no table of the array's size."""
        if self.constant is not None:
            if not np.array_equal(array, self.constant, equal_nan=True):
                return f"{self.subject} is a constant with NaN or infinity and has changed"
            return None
        if not array.size:
            return None
        # Both ends are NaN where any value is.
        low, high = float(array.min()), float(array.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            return f"NaN or infinity {self.where}"
        if max(-low, high) > self.largest:
            size = max(-low, high)
            return f"{self.subject} of size {size:g}, expected at most {self.largest:g}"
        if low < self.smallest:
            if self.smallest == 0:
                return f"{self.subject} is negative"
            return f"{self.subject} is {low:g}, expected at least {self.smallest:g}"
        return None


def _agrees(size: int, limit: "int | AtMost", sizes: dict[str, int]) -> bool:
    if not isinstance(limit, AtMost):
        return size == limit
    return size <= limit.size and (not limit.of or sizes.setdefault(limit.of, size) == size)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a client has to answer.

    Attributes:
        kind: of payload.
        limits: of each of its arrays, by place (see `fedkd.exchange.values.flatten`). Exactly
            these have to be there, but for the optional ones.
        optional: places of arrays that may be missing.
        about: whatever else the kind compares an answer with.
    """

    kind: "type[Payload]"
    limits: Mapping[str, Limit]
    optional: frozenset[str] = frozenset()
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def most_bytes(self) -> int:
        """How many bytes the arrays may have together."""
        return sum(limit.most_bytes for limit in self.limits.values())

    @property
    def parts(self) -> "Mapping[str, Asked]":
        """What the parts have to be, by name, where the kind is made of others."""
        parts: Mapping[str, Asked] = self.about.get("parts", {})
        return parts

    def bad_names(self, names: "set[str]") -> str | None:
        """Return which arrays are missing or unexpected, or None."""
        if names == self.limits.keys():
            return None
        needed = self.limits.keys() - self.optional
        odd = (names - self.limits.keys()) | (needed - names)
        return f"unexpected or missing arrays: {sorted(odd)[:3]}" if odd else None


class Extent(NamedTuple):
    """How much of everything there is in a run.

    Attributes:
        clients: of the federation.
        public_rows: of the public set.
        classes: to be told apart.
    """

    clients: int
    public_rows: int
    classes: int


def in_order(ids: np.ndarray, below: int) -> bool:
    """Tell whether these are int64 ids from 0 to less than a number, strictly increasing."""
    if ids.ndim != 1 or ids.dtype != INT64:
        return False
    inside = not ids.size or bool(ids[0] >= 0 and ids[-1] < below)
    return inside and not bool((np.diff(ids) <= 0).any())


class Payload(Value, ABC):
    """One kind of what is sent.

    A subclass is a frozen dataclass with a ``kind``. It says in `problem` what would be wrong with
    it beyond its arrays, and offers a class method ``asked(...)`` that describes a good one.
    """

    kind: ClassVar[str]
    """Its name on the wire and in the records."""
    lies: ClassVar[Mapping[str, Callable[[Any], "Payload"]]] = {}
    """By name, what a client could send instead that only this kind can notice; see
    `sim.adversity.bad_replies`."""
    adds_up: ClassVar[bool] = False
    """Whether a weighted mean over clients says something (`weighted`, `plus`, `over`)."""
    is_added: ClassVar[bool] = False
    """Whether who receives it adds it to what it has, so that small errors become large ones."""

    @property
    def label(self) -> str:
        """What it is called in the records."""
        return self.kind

    @property
    def payload_bytes(self) -> int:
        """Bytes on the wire. A kind takes off what the receiver can derive by itself."""
        return sum(array.nbytes for array in flatten(self).arrays.values())

    def problem(self, asked: Asked) -> str | None:
        """Return, in a few words, why this is no good answer; None for a good one.

        A kind that looks at more calls this first, which looks at layout and numbers.
        """
        return bad_arrays(flatten(self).arrays, asked)

    def not_kept(self, extent: Extent) -> str | None:
        """Return why a server of a run cannot have kept this, or None.

        Less is known than of an answer: it may be anybody's, a mean or a sum. What its arrays hold
        is looked at before: their numbers are finite.
        """
        return None

    def votes(self) -> "tuple[np.ndarray, np.ndarray] | None":
        """Return rows of the public set and the class that each is given; None: it has none."""
        return None

    def answers(self) -> "tuple[np.ndarray, np.ndarray, bool] | None":
        """Return rows of the public set, the scores of each, and whether these are logits.

        Else they are probabilities. None: it has none.
        """
        return None

    def targets_entropy(self) -> float | None:
        """Return the mean entropy, in nats, of the soft labels that are taught; None: none are."""
        return None

    @classmethod
    def targets_entropies(cls, pieces: "Sequence[Payload]") -> list[float | None]:
        """Return `targets_entropy` of each; a kind may take them together."""
        return [piece.targets_entropy() for piece in pieces]

    def with_arrays(self, arrays: Mapping[str, np.ndarray]) -> "Payload":
        """Return a payload that differs in some arrays, by place; nothing is checked."""
        changed = self
        for place, array in arrays.items():
            changed = _replaced(changed, place.split("/"), array)
        return changed

    # -- sums: what a server needs that is to see only a mean over clients ---------------------

    def weighted(self, weight: int | float) -> "Payload":
        """Return what this adds to a sum: itself times a weight > 0, in float64."""
        flat = flatten(self)
        # Of an array without dimensions NumPy's products are scalars.
        arrays = {p: np.asarray(weight * a.astype(np.float64)) for p, a in flat.arrays.items()}
        return _made_of(arrays, flat.plain)

    def plus(self, other: "Payload") -> "Payload":
        """Return the sum of two that are `weighted`.

        Raises:
            ValueError: they differ in something that has no sum.
        """
        mine, others = flatten(self), flatten(other)
        if mine.plain != others.plain:
            raise ValueError(f"{self.kind} of two forms cannot be added up")
        arrays = {p: np.asarray(a + others.arrays[p]) for p, a in mine.arrays.items()}
        return _made_of(arrays, mine.plain)

    def over(self, weight: int | float, like: "Payload") -> "Payload":
        """Return the mean: this sum divided by the sum of the weights.

        Args:
            weight: of all that were added.
            like: any one of them, for the types; whole numbers and flags are rounded.
        """
        flat, types = flatten(self), flatten(like).arrays
        arrays = {
            p: of_type(np.asarray(a / weight), types[p].dtype) for p, a in flat.arrays.items()
        }
        return _made_of(arrays, flat.plain)


def _made_of(arrays: Arrays, plain: Any) -> Payload:
    made: Payload = unflatten(arrays, plain)
    return made


def of_type(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return numbers in a type; for whole numbers and flags they are rounded."""
    return np.asarray(np.rint(array) if dtype.kind in "iub" else array, dtype)


PayloadT = TypeVar("PayloadT", bound=Payload)


def expect(piece: Payload | None, kind: type[PayloadT]) -> PayloadT:
    """Return a payload that has to be of a kind.

    Raises:
        TypeError: it is of another.
    """
    if not isinstance(piece, kind):
        got = "nothing" if piece is None else piece.kind
        raise TypeError(f"expected {kind.kind}, got {got}")
    return piece


def _replaced(held: Any, path: list[str], array: np.ndarray) -> Any:
    if not path:
        return array
    if isinstance(held, Value):
        inner = _replaced(getattr(held, path[0]), path[1:], array)
        return replace(held, **{path[0]: inner})  # type: ignore[type-var]
    if isinstance(held, Mapping):
        for key, inner, rest in _below(held, path):
            return {**held, key: _replaced(inner, rest, array)}
    if isinstance(held, tuple):
        number = int(path[0])
        return (*held[:number], _replaced(held[number], path[1:], array), *held[number + 1 :])
    raise KeyError("/".join(path))


def _below(held: Mapping[Any, Any], path: list[str]) -> Iterator[tuple[Any, Any, list[str]]]:
    """Find the key of a mapping that a path goes through; keys may have slashes of their own."""
    # Of two keys that begin alike the longer one is meant.
    for length in range(len(path), 0, -1):
        name = "/".join(path[:length])
        for key, inner in held.items():
            if str(key) == name:
                yield key, inner, path[length:]


def bad_arrays(arrays: Mapping[str, np.ndarray], asked: Asked) -> str | None:
    """Return why arrays are none that were asked for, or None."""
    reason = asked.bad_names(set(arrays))
    if reason is not None:
        return reason
    sizes: dict[str, int] = {}
    for name, limit in asked.limits.items():
        if name not in arrays:
            continue
        array = arrays[name]
        reason = limit.bad_layout(array.shape, array.dtype, sizes)
        if reason is not None:
            return f"{name!r} has {reason}"
    for name, limit in asked.limits.items():
        reason = limit.bad_numbers(arrays[name]) if name in arrays else None
        if reason is not None:
            return reason
    return None
