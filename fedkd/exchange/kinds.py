"""Kinds of one stage of the exchange by name, and how settings name them."""

from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticCustomError

from fedkd import own_code
from fedkd.bounds import shown
from fedkd.names import nearest


class Stage(BaseModel):
    """One stage of the exchange: its settings, and what it does by them.

    A stage is a value: it has no memory but what it is handed. One of another package is named by
    ``package.module:Class``, which is then its ``kind``.

    Attributes:
        kind: names it in settings.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str


class UnreadStage(Stage):
    """Settings of a stage of another package whose code nobody has allowed, as they stand."""

    model_config = ConfigDict(extra="allow")


StageT = TypeVar("StageT", bound=Stage)


class Kinds(Generic[StageT]):
    """The known kinds of a stage.

    Args:
        what: a stage is, for messages.
        base: what each of them is.
        known: classes by name.
    """

    def __init__(self, what: str, base: type[Any], known: Mapping[str, type[StageT]]) -> None:
        self._what = what
        self._base: type[StageT] = base
        self._known = dict(known)

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def add(self, name: str, kind: type[StageT]) -> None:
        """Let settings name one more kind."""
        self._known[name] = kind

    def find(self, name: object) -> type[StageT]:
        """Return the class of a name: of the table, or ``package.module:Class``.

        Raises:
            ValueError: one line: there is none, or it cannot be used.
        """
        if isinstance(name, str) and name in self._known:
            return self._known[name]
        if own_code.is_own_code(name):
            found = own_code.load_class(str(name), self._base, self._what)
            if found.model_fields["kind"].annotation is not str:
                raise ValueError(
                    f"{self._what} {name!r} is called by its full name, so it must not say what "
                    "its kind is: leave 'kind' out of the class"
                )
            return found
        near = nearest(name, self._known) if isinstance(name, str) else ""
        raise ValueError(
            f"unknown {self._what} {shown(name)}; known: {', '.join(self._known)}; or "
            f"{own_code.HOW}{near}"
        )

    def read(self, value: object) -> StageT | UnreadStage:
        """Return the stage that settings name: by its kind alone, or by a table with a ``kind``."""
        if isinstance(value, self._base | UnreadStage):
            return value
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, Mapping) or "kind" not in value:
            raise _error(
                f"must be a kind of {self._what} or a table with a kind; known: "
                f"{', '.join(self._known)}; got {shown(value)}"
            )
        name = value["kind"]
        try:
            if own_code.is_own_code(name) and not own_code.may_load(name):
                return UnreadStage.model_validate(dict(value))
            kind = self.find(name)
        except ValueError as error:
            raise _error(str(error)) from error
        try:
            return kind.model_validate(dict(value))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = "".join(f"{part}: " for part in first["loc"])
            said = first["msg"].removeprefix("Value error, ")
            raise _error(f"{name}: {where}{said}, got {shown(first['input'])}") from error


def _error(reason: str) -> PydanticCustomError:
    # Unlike a ValueError, it reaches the reader without "Value error, " in front.
    return PydanticCustomError("stage", "{reason}", {"reason": reason})
