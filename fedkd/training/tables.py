"""Tables: numbers that an objective sees in every step, whole or for the rows of the step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True, slots=True)
class Table:
    """Numbers for an objective, which sees them as ``batch.tables[name]``.

    Attributes:
        values: an array for all members, or a sequence with one for each.
        of: ``whole``: every step sees all of it, such as one row a class; ``private``: the first
            dimension has one entry for each of the member's private rows, in the order of
            `Member.rows`, and a step sees those of its private rows; ``public``: the same for the
            rows of the public lesson.
    """

    values: np.ndarray | Sequence[np.ndarray]
    of: Literal["whole", "private", "public"] = "whole"

    def __post_init__(self) -> None:
        if self.of not in ("whole", "private", "public"):
            raise ValueError(f"a table is of whole, private or public, got {self.of!r}")

    def own(self, position: int) -> np.ndarray:
        """Return one member's array."""
        return self.values if isinstance(self.values, np.ndarray) else self.values[position]

    @property
    def is_shared(self) -> bool:
        """Whether it is one array for all members."""
        return isinstance(self.values, np.ndarray)

    def check(
        self,
        name: str,
        *,
        members: int,
        private: Sequence[int] | None,
        public: Sequence[int] | None,
    ) -> None:
        """Refuse a table that does not fit a fit.

        Args:
            name: of the table, for the message.
            members: how many there are.
            private: rows of each member, None in a fit without private rows.
            public: rows of each member's public lesson, None in a fit without one.

        Raises:
            ValueError: naming the table and what would fit.
        """
        if not self.is_shared and len(self.values) != members:
            raise ValueError(
                f"table {name!r} must be one array or one for each of {members} members, got "
                f"{len(self.values)}"
            )
        if not self.is_shared and len({array.shape[1:] for array in self.values}) > 1:
            raise ValueError(f"arrays of table {name!r} must differ in their first dimension only")
        if self.of == "whole":
            if not self.is_shared and len({array.shape for array in self.values}) > 1:
                raise ValueError(f"arrays of table {name!r} must have one shape")
            return
        rows = private if self.of == "private" else public
        if rows is None:
            raise ValueError(f"table {name!r} is of {self.of} rows, and the fit has none")
        for position, count in enumerate(rows):
            found = len(self.own(position))
            if found != count:
                raise ValueError(
                    f"table {name!r} must have an entry for each of the {count} {self.of} rows of "
                    f"member {position}, got {found}"
                )
