"""Grids: the arms of a sweep by their values, as tables and figures lay them out."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sim.settings.combinations import ARM


@dataclass(frozen=True, slots=True)
class Axis:
    """One setting of a sweep.

    Attributes:
        name: of the setting, or `ARM`.
        values: as settings have them, in their order.
    """

    name: str
    values: tuple[Any, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """A text for each value."""
        return tuple(value_label(value) for value in self.values)

    @property
    def numeric(self) -> bool:
        """Whether every value is a finite number: the axis has a scale."""
        return all(
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            for value in self.values
        )

    @property
    def title(self) -> str:
        """The end of the name, which is enough where sections differ."""
        return self.name.removesuffix(".name").removesuffix(".kind").split(".")[-1]


@dataclass(frozen=True, slots=True)
class Grid:
    """The arms of a sweep.

    Attributes:
        axes: arms first, where there are several, and each setting that is swept over.
        arms: the arm of every combination, the last axis running fastest; several combinations
            may be one arm, and ``""`` stands where there is none.
    """

    axes: tuple[Axis, ...]
    arms: tuple[str, ...]

    def __post_init__(self) -> None:
        combinations = math.prod(len(axis.values) for axis in self.axes)
        if len(self.arms) != combinations:
            raise ValueError(
                f"a grid of {combinations} combinations needs an arm for each, got {len(self.arms)}"
            )

    def to_row(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "axes": [{"name": axis.name, "values": list(axis.values)} for axis in self.axes],
            "arms": list(self.arms),
        }

    @classmethod
    def of_row(cls, row: object) -> "Grid":
        """Return the grid of plain values.

        Raises:
            ValueError: if they are none of a grid.
        """
        try:
            assert isinstance(row, Mapping)  # noqa: S101
            axes = tuple(Axis(str(axis["name"]), tuple(axis["values"])) for axis in row["axes"])
            arms = tuple(str(arm) for arm in row["arms"])
        except (AssertionError, KeyError, TypeError) as error:
            raise ValueError(f"no grid of arms: {type(error).__name__}") from None
        return cls(axes, arms)

    @property
    def by_base(self) -> dict[str, tuple[str, ...]]:
        """What became of each arm that was swept over, place by place; empty where none was."""
        if not self.axes or self.axes[0].name != ARM:
            return {}
        bases = self.axes[0].values
        each = len(self.arms) // len(bases)
        return {
            str(base): self.arms[number * each : (number + 1) * each]
            for number, base in enumerate(bases)
        }

    @property
    def planes(self) -> "tuple[Plane, ...]":
        """The grid as tables that can be drawn; none where it has one value, or four axes.

        Columns are the last setting whose values are numbers, or else the last one; rows are the
        arms that were swept over, or else the last of the others; and there is a plane for each
        value of the third. Settings with a single value are left out.
        """
        places = [place for place, axis in enumerate(self.axes) if len(axis.values) > 1]
        if not 1 <= len(places) <= 3:
            return ()
        numeric = [place for place in places if self.axes[place].numeric]
        columns = (numeric or places)[-1]
        others = [place for place in places if place != columns]
        others.sort(key=lambda place: self.axes[place].name == ARM)
        rows = others[-1] if others else None
        panels = others[0] if len(others) == 2 else None
        return tuple(
            Plane(
                title=f"{self.axes[panels].title}: {label}" if panels is not None else "",
                rows=self.axes[rows] if rows is not None else Axis("", ("",)),
                columns=self.axes[columns],
                arms=tuple(self._line(panels, panel, rows, row, columns) for row in self._of(rows)),
            )
            for panel, label in enumerate(self.axes[panels].labels if panels is not None else ("",))
        )

    def _of(self, axis: int | None) -> range:
        return range(1 if axis is None else len(self.axes[axis].values))

    def _line(
        self, panels: int | None, panel: int, rows: int | None, row: int, columns: int
    ) -> tuple[str, ...]:
        fixed = {panels: panel, rows: row}
        return tuple(
            self._at([{**fixed, columns: column}.get(place, 0) for place in range(len(self.axes))])
            for column in self._of(columns)
        )

    def _at(self, places: Sequence[int]) -> str:
        found = 0
        for place, axis in zip(places, self.axes, strict=True):
            found = found * len(axis.values) + place
        return self.arms[found]


@dataclass(frozen=True, slots=True)
class Plane:
    """A table of arms.

    Attributes:
        title: the value of the third setting; empty where there are two.
        rows: a setting; one value without a name where only columns are swept over.
        columns: another.
        arms: by row, the arm of each column; ``""`` where there is none.
    """

    title: str
    rows: Axis
    columns: Axis
    arms: tuple[tuple[str, ...], ...]


def value_label(value: Any) -> str:
    """Write a value in few words: a table by its kind or name and what it says beside it."""
    if isinstance(value, Mapping):
        heads = [str(value[key]) for key in ("kind", "name", "mechanism") if key in value]
        rest = [
            value_label(value[key]) for key in value if key not in ("kind", "name", "mechanism")
        ]
        return " ".join([*heads, *rest])
    if isinstance(value, list | tuple):
        return "+".join(value_label(item) for item in value)
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)
