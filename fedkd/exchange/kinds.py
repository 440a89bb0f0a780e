"""Kinds of one stage of the exchange by name, and how settings name them."""

from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticCustomError

from fedkd.bounds import shown
from fedkd.names import nearest


class Stage(BaseModel):
    """One stage of the exchange: its settings, and what it does by them.

    A stage is a value: it has no memory but what it is handed.

    Attributes:
        kind: names it in settings.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str


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
        """Return the class of a name.

        Raises:
            ValueError: one line that says which there are.
        """
        if not isinstance(name, str) or name not in self._known:
            known = ", ".join(self._known)
            near = nearest(name, self._known) if isinstance(name, str) else ""
            raise ValueError(f"unknown {self._what} {shown(name)}; known: {known}{near}")
        return self._known[name]

    def read(self, value: object) -> StageT:
        """Return the stage that settings name: by its kind alone, or by a table with a ``kind``."""
        if isinstance(value, self._base):
            return value
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, Mapping) or "kind" not in value:
            raise _error(
                f"must be a kind of {self._what} or a table with a kind; known: "
                f"{', '.join(self._known)}; got {shown(value)}"
            )
        try:
            kind = self.find(value["kind"])
        except ValueError as error:
            raise _error(str(error)) from error
        try:
            return kind.model_validate(dict(value))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            said = first["msg"].removeprefix("Value error, ")
            raise _error(
                f"{value['kind']}: {where}: {said}, got {shown(first['input'])}"
            ) from error


def _error(reason: str) -> PydanticCustomError:
    # Unlike a ValueError, it reaches the reader without "Value error, " in front.
    return PydanticCustomError("stage", "{reason}", {"reason": reason})
