"""Sweeps: every combination of some values of some settings is an arm."""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedkd.exchange.adversaries import Lying, NoAdversary
from fedkd.names import check_name
from sim.keeping.identity import fingerprint
from sim.reports.grids import ARM, Axis, Grid, value_label
from sim.settings import Settings, SettingsError, merge_tables, named, nested_table
from sim.settings.schema import MOST_ARMS

Sweep = Mapping[str, Sequence[Any]]
"""Values by the dotted name of a setting."""


@dataclass(frozen=True, slots=True)
class Draft:
    """What an arm will be made of.

    Attributes:
        base: the arm that the file or the table of strategies knows; empty: what all have in
            common.
        swept: the value of each setting that is swept over.
    """

    base: str
    swept: Mapping[str, Any]

    @property
    def label(self) -> str:
        """A name for it, of all its values."""
        return name_of(self.base, self.swept.values())


def drafts(bases: Sequence[str], sweep: Sweep) -> list[Draft]:
    """Return every combination of values for every arm; without a sweep the arms themselves.

    Raises:
        SettingsError: if these are more than anybody has the time for.
    """
    count = len(bases) * math.prod(len(values) for values in sweep.values())
    if count > MOST_ARMS:
        sizes = [f"{len(values)} of {setting}" for setting, values in sweep.items()]
        arms = [f"{len(bases)} arms"] if len(bases) > 1 else []
        raise SettingsError(
            f"study.sweep makes {count} combinations ({' x '.join([*arms, *sizes])}), "
            f"at most {MOST_ARMS}"
        )
    return [
        Draft(base, dict(zip(sweep, values, strict=True)))
        for base in bases
        for values in itertools.product(*sweep.values())
    ]


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
    bases: Sequence[str], sweep: Sweep, names: Sequence[str], kept: Mapping[str, object]
) -> Grid:
    """Return how the arms of a sweep lie side by side.

    Args:
        bases: the arms that were swept over.
        sweep: values by setting.
        names: the arm of each combination.
        kept: the arms that are compared; the others have no place in the grid.
    """
    axes = [Axis(ARM, tuple(bases))] if len(bases) > 1 else []
    axes += [Axis(setting, tuple(values)) for setting, values in sweep.items()]
    return Grid(tuple(axes), tuple(name if name in kept else "" for name in names))


def sweep_notes(sweep: Sweep) -> list[str]:
    """Say what was swept over."""
    if not sweep:
        return []
    told = [
        f"{setting} ({', '.join(map(value_label, values))})" for setting, values in sweep.items()
    ]
    return [f"swept over {', '.join(told)}"]


def is_swept(setting: str, sweep: Sweep) -> bool:
    """Tell whether a setting is one that is swept over, or part of one."""
    return any(setting == swept or setting.startswith(f"{swept}.") for swept in sweep)
