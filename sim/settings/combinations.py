"""Which combinations of a sweep are meant: settings that change together, and conditions.

A condition is data: a table of settings, each with a value or a list of values. It holds for a
combination that has one of them in every setting that the condition names.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedkd.bounds import shown
from fedkd.names import nearest

ARM = "arm"
"""Stands in a condition for the arm that is swept over."""

Sweep = Mapping[str, Sequence[Any]]
"""Values by the dotted name of a setting."""

Condition = Mapping[str, Any]


def is_among(value: object, values: Iterable[object]) -> bool:
    """Tell whether a value of a setting is one of some; true is not 1."""
    return any(
        value == other and isinstance(value, bool) == isinstance(other, bool) for other in values
    )


def values_meant(said: object, known: Iterable[object]) -> Sequence[object]:
    """Return the values that a condition allows a setting: those of a list, or the one there is.

    Args:
        said: by the condition.
        known: values of the setting; a list that is one of them is a value.
    """
    several = isinstance(said, list | tuple) and not is_among(said, known)
    return said if several else (said,)  # type: ignore[return-value]


def holds(condition: Condition, arm: str, values: Mapping[str, Any]) -> bool:
    """Tell whether a condition holds for a combination.

    Args:
        condition: that was checked.
        arm: that is swept over.
        values: of every setting that is swept over.
    """
    return all(
        is_among(value, values_meant(said, (value,)))
        for setting, said in condition.items()
        for value in (arm if setting == ARM else values[setting],)
    )


def check_together(groups: Sequence[Sequence[str]], sweep: Sweep) -> None:
    """Refuse settings that cannot change together.

    Raises:
        ValueError: naming them.
    """
    grouped: list[str] = []
    for group in groups:
        for setting in group:
            _check_swept("study.together", setting, sweep)
            if setting in grouped:
                raise ValueError(f"study.together names {setting} twice")
            grouped.append(setting)
        if len(group) < 2:
            raise ValueError(
                f"study.together: settings change together in twos or more, got {shown(group)}"
            )
        counts = {setting: len(sweep[setting]) for setting in group}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{count} of {setting}" for setting, count in counts.items())
            raise ValueError(
                f"study.together: what changes together needs as many values each, got {told}"
            )
        steps = list(zip(*(sweep[setting] for setting in group), strict=True))
        _check_once(f"study.together: {', '.join(group)} have the values", steps)
    for setting in set(sweep).difference(grouped):
        _check_once(f"study.sweep.{setting} has the value", sweep[setting])


def check_condition(where: str, condition: Condition, sweep: Sweep) -> None:
    """Refuse a condition on what is not swept over.

    Args:
        where: the setting that has it, for the error.
        condition: a table; the names of arms are not checked.
        sweep: values by setting.

    Raises:
        ValueError: naming the setting or the value.
    """
    if not condition:
        raise ValueError(f"{where}: a condition names at least one setting, got an empty table")
    for setting, said in condition.items():
        if setting == ARM:
            continue
        _check_swept(where, setting, sweep)
        for value in values_meant(said, sweep[setting]):
            if not is_among(value, sweep[setting]):
                told = ", ".join(map(shown, sweep[setting]))
                raise ValueError(
                    f"{where}: {setting} is swept over {told}, got {shown(value)}; leave the "
                    f"condition out with {where}=null"
                )


def _check_swept(where: str, setting: str, sweep: Sweep) -> None:
    if setting not in sweep:
        known = f"known: {', '.join(sweep)}" if sweep else "study.sweep is empty"
        raise ValueError(
            f"{where}: {shown(setting)} is not swept over; {known}{nearest(setting, sweep)}"
        )


def _check_once(told: str, values: Sequence[Any]) -> None:
    for place, value in enumerate(values):
        if is_among(value, values[:place]):
            raise ValueError(f"{told} {shown(value)} twice")
