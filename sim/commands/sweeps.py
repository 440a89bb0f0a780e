"""Sweeps: combinations of some values of some settings are arms.

Every combination is, unless settings change together or a condition leaves some out.
"""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedkd.exchange.adversaries import Lying, NoAdversary
from fedkd.names import check_name
from sim.keeping.identity import fingerprint
from sim.reports.grids import Axis, Grid, value_label
from sim.settings import Settings, SettingsError, merge_tables, named, nested_table
from sim.settings.combinations import ARM, Condition, Sweep, holds, is_among
from sim.settings.schema import MOST_ARMS, StudySettings

MOST_LOOKED_AT = 100 * MOST_ARMS
"""So many combinations are looked at to find those that a condition leaves."""


@dataclass(frozen=True, slots=True)
class Draft:
    """What an arm will be made of.

    Attributes:
        base: the arm that the file or the table of strategies knows; empty: what all have in
            common.
        swept: the value of each setting that is swept over.
        place: the arm's number, and the step along each of `lines_of`.
    """

    base: str
    swept: Mapping[str, Any]
    place: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """A name for it, of all its values."""
        return name_of(self.base, self.swept.values())


@dataclass(frozen=True, slots=True)
class Line:
    """Settings that change together: an axis of a sweep.

    Attributes:
        settings: one, unless ``study.together`` says otherwise.
        steps: the values of all of them, one step after the other.
    """

    settings: tuple[str, ...]
    steps: tuple[tuple[Any, ...], ...]

    @property
    def axis(self) -> Axis:
        """The axis by the first setting whose values tell its steps apart, or else by all."""
        for setting, values in zip(self.settings, zip(*self.steps, strict=True), strict=True):
            if not any(is_among(value, values[:place]) for place, value in enumerate(values)):
                return Axis(setting, values)
        return Axis("+".join(self.settings), tuple(map(list, self.steps)))

    @property
    def told(self) -> str:
        """Which values there are, in words."""
        steps = [" with ".join(map(value_label, step)) for step in self.steps]
        return f"{' with '.join(self.settings)} ({', '.join(steps)})"


def lines_of(study: StudySettings) -> list[Line]:
    """Return the axes of a sweep, in the order in which its settings stand there."""
    group_of = {setting: group for group in study.together for setting in group}
    groups = dict.fromkeys(group_of.get(setting, (setting,)) for setting in study.sweep)
    return [
        Line(group, tuple(zip(*(study.sweep[setting] for setting in group), strict=True)))
        for group in groups
    ]


def drafts(bases: Sequence[str], study: StudySettings) -> list[Draft]:
    """Return every combination that is meant, of every arm; without a sweep the arms themselves.

    Args:
        bases: the arms.
        study: its sweep, settings that change together, and conditions.

    Raises:
        SettingsError: if these are more than anybody has the time for, or none.
    """
    lines = lines_of(study)
    looked_at = len(bases) * math.prod(len(line.steps) for line in lines)
    sizes = [f"{len(line.steps)} of {' with '.join(line.settings)}" for line in lines]
    arms = [f"{len(bases)} arms"] if len(bases) > 1 else []
    product = " x ".join([*arms, *sizes])
    conditions = bool(study.only or study.without)
    if looked_at > (MOST_LOOKED_AT if conditions else MOST_ARMS):
        raise SettingsError(
            f"study.sweep makes {looked_at} combinations ({product}), at most "
            f"{MOST_LOOKED_AT if conditions else MOST_ARMS}"
        )
    made = [
        Draft(base, dict(_pairs(lines, steps)), (number, *places))
        for number, base in enumerate(bases)
        for places in itertools.product(*(range(len(line.steps)) for line in lines))
        for steps in [[line.steps[place] for line, place in zip(lines, places, strict=True)]]
    ]
    kept = [draft for draft in made if is_meant(study, draft.base, draft.swept)]
    if not kept:
        raise SettingsError(
            f"study.only and study.without leave none of {looked_at} combinations ({product})"
        )
    if len(kept) > MOST_ARMS:
        raise SettingsError(
            f"study.sweep makes {len(kept)} combinations after study.only and study.without, at "
            f"most {MOST_ARMS}"
        )
    return kept


def _pairs(lines: Sequence[Line], steps: Sequence[tuple[Any, ...]]) -> Iterator[tuple[str, Any]]:
    for line, step in zip(lines, steps, strict=True):
        yield from zip(line.settings, step, strict=True)


def is_meant(study: StudySettings, arm: str, values: Mapping[str, Any]) -> bool:
    """Tell whether the conditions of a study let a combination stand."""
    wanted = not study.only or any(holds(each, arm, values) for each in study.only)
    return wanted and not any(holds(each, arm, values) for each in study.without)


def patch_of(swept: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a combination as a table to lay over others."""
    patch: dict[str, Any] = {}
    for setting, value in swept.items():
        path = setting.split(".")
        patch = merge_tables(patch, nested_table(path, named(path[-1], value)))
    return patch


def in_effect(settings: Settings) -> Settings:
    """Return settings without what changes no number in a run: an adversary that has nobody.

    One whose goal is measured beside accuracy stays: without clients it is what others are compared
    with.
    """
    adversary = settings.adversary
    if not isinstance(adversary, Lying):
        return settings
    if adversary.controlled(settings.clients.count, seed=settings.seed):
        return settings
    return settings.model_copy(update={"adversary": NoAdversary()})


def settle(
    drafted: Sequence[tuple[Draft, Settings]],
) -> tuple[tuple[str, ...], dict[str, Settings]]:
    """Name the arms: combinations of values that differ in no number are one.

    Such an arm is named by the values that all its combinations have in common. What is no
    combination keeps its name.

    Args:
        drafted: arms with their settings.

    Returns:
        The name of the arm that each draft is, in their order, and each arm's settings by name.

    Raises:
        SettingsError: if a name cannot name a folder, or two arms would have one.
    """
    settled = [in_effect(settings) if draft.swept else settings for draft, settings in drafted]
    alike: dict[tuple[str, str], list[int]] = {}
    for place, ((draft, _), settings) in enumerate(zip(drafted, settled, strict=True)):
        key = fingerprint(settings) if draft.swept else ""
        alike.setdefault((draft.base, key), []).append(place)
    names = [""] * len(drafted)
    arms: dict[str, Settings] = {}
    for (base, _), places in alike.items():
        members = [drafted[place][0] for place in places]
        name = _name_of_all(base, members) or settled[places[0]].strategy.name
        if name in arms:
            other = drafted[names.index(name)][0]
            raise SettingsError(
                f"study.sweep: {_said(other)} and {_said(members[0])} are both named {name!r}: "
                "write values that differ in letters, digits, '.', '_' or '-'"
            )
        try:
            check_name(name, "study.sweep: the values of an arm, joined,")
        except ValueError as error:
            raise SettingsError(f"{error} of {_said(members[0])}") from None
        arms[name] = settled[places[0]]
        for place in places:
            names[place] = name
    return tuple(names), arms


def _name_of_all(base: str, members: Sequence[Draft]) -> str:
    first = members[0].swept
    common = [
        value
        for setting, value in first.items()
        if all(member.swept[setting] == value for member in members)
    ]
    return name_of(base, common)


def name_of(base: str, values: Iterable[Any]) -> str:
    """Join the name of an arm and values into one that a folder can have: ``median-lma-0.2``."""
    words = [value_label(value).replace(" ", "-") for value in values]
    safe = [re.sub(r"[^A-Za-z0-9._-]+", "_", word) for word in words]
    return "-".join(filter(None, [base, *safe]))


def _said(draft: Draft) -> str:
    said = [f"{setting}={value_label(value)}" for setting, value in draft.swept.items()]
    return ", ".join([*filter(None, [draft.base]), *said])


def grid_of(
    bases: Sequence[str],
    study: StudySettings,
    made: Sequence[tuple[Draft, str]],
    kept: Mapping[str, object],
) -> Grid:
    """Return how the arms of a sweep lie side by side.

    Values that conditions leave no combination of have no place in it.

    Args:
        bases: the arms that were swept over.
        study: what was swept over.
        made: each combination, and the name of its arm.
        kept: the arms that are compared; the others are holes in the grid.
    """
    axes = [Axis(ARM, tuple(bases)), *(line.axis for line in lines_of(study))]
    used = [sorted({draft.place[number] for draft, _ in made}) for number in range(len(axes))]
    names = {draft.place: name for draft, name in made if name in kept}
    axes = [
        Axis(axis.name, tuple(axis.values[place] for place in places))
        for axis, places in zip(axes, used, strict=True)
    ]
    arms = tuple(names.get(place, "") for place in itertools.product(*used))
    return Grid(tuple(axes if len(bases) > 1 else axes[1:]), arms)


def sweep_notes(study: StudySettings) -> list[str]:
    """Say what was swept over, and which combinations were left out."""
    if not study.sweep:
        return []
    notes = [f"swept over {', '.join(line.told for line in lines_of(study))}"]
    for name in ("only", "without"):
        conditions = getattr(study, name)
        if conditions:
            notes.append(f"study.{name}: {'; '.join(map(_condition_told, conditions))}")
    return notes


def _condition_told(condition: Condition) -> str:
    return ", ".join(f"{setting}={_values_told(said)}" for setting, said in condition.items())


def _values_told(said: Any) -> str:
    return " or ".join(map(value_label, said)) if isinstance(said, list) else value_label(said)


def is_swept(setting: str, sweep: Sweep) -> bool:
    """Tell whether a setting is one that is swept over, or part of one."""
    return any(setting == swept or setting.startswith(f"{swept}.") for swept in sweep)
