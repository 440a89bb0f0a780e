"""Reading settings: YAML and ``key=value`` text turned once into frozen, checked objects.

Below this line code takes typed objects or plain values, never a table of text.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError, create_model

from fedkd import own_code
from fedkd.bounds import shown
from fedkd.objectives import Objective
from fedkd.own_code import Permit
from sim.settings.hints import colon_hint, foreign_hint, section_hint, setting_hint, setting_paths
from sim.settings.permission import code_in, looking, permit_of
from sim.settings.schema import Settings, SettingsError
from sim.settings.tables import fill_in, read_word, read_yaml
from strategies import strategy_class

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    # A federated run, and every worker of it, does without the library of distillation.
    from fedkd.distillation.settings import DistillSettings

CONF = Path(__file__).parents[1] / "conf"
"""The settings files that fedkd ships."""

MOST_PROBLEMS = 5
"""So many problems of one file are told at once."""
LONGEST_LINE = 600
"""Characters of one of them."""

SettingsT = TypeVar("SettingsT", bound=BaseModel)


def load_settings(
    config: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    *,
    allow: Sequence[str] = (),
) -> Settings:
    """Read settings: defaults, then the file, then ``key=value`` overrides.

    Args:
        config: a YAML file; ``${...}`` may refer to other keys of the file.
        overrides: such as ``strategy.temperature=2`` or ``clients.models=[mlp,cnn]``. Naming
            another strategy than the file does drops the file's strategy settings.
        allow: packages, or ``package.module:callable``, whose code the file may name.

    Raises:
        SettingsError: a file that cannot be read, an unknown key, a value that cannot work, a
            callable that only the file names.

    Examples:
        >>> import fedkd
        >>> settings = fedkd.load_settings(None, ["strategy.name=fedmd", "rounds=2"])
        >>> settings.strategy.name, settings.rounds
        ('fedmd', 2)
        >>> fedkd.load_settings(None, ["rouns=2"])
        Traceback (most recent call last):
            ...
        sim.settings.schema.SettingsError: unknown setting 'rouns'; did you mean 'rounds'?
    """
    with asked(overrides, allow):
        settings = settings_from_table(_read_table(config, overrides, _objectives_of_strategy))
        _check_arms(settings)
    return settings


def read_settings(
    config: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    *,
    permit: Permit = looking,
) -> Settings:
    """Read settings that are looked at and not run: what `load_settings` does without refusing.

    Args:
        config: a YAML file.
        overrides: words.
        permit: tells whether code that they name may be loaded; settings of an algorithm whose
            code may not be are left as they stand.

    Raises:
        SettingsError: a file that cannot be read, an unknown key, a value that cannot work.
    """
    with own_code.asking(permit):
        return settings_from_table(_read_table(config, overrides, _objectives_of_strategy))


def check_code_of_data(data: BaseModel, overrides: Sequence[str], allow: Sequence[str]) -> None:
    """Refuse code that nobody but a file names, in settings of data that were only looked at.

    Args:
        data: their section ``data``: whoever looks at data runs the code that deals rows.
        overrides: the words among the settings; what a word names is allowed.
        allow: packages, or ``package.module:callable``; beside those of `ALLOW_VARIABLE`.

    Raises:
        SettingsError: naming the setting.
    """
    with asked(overrides, allow):
        for setting, name in code_in(data, "data"):
            try:
                own_code.may_load(name, setting)
            except ValueError as error:
                raise SettingsError(str(error)) from None


def load_distill_settings(
    config: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    *,
    allow: Sequence[str] = (),
) -> "DistillSettings":
    """Read the settings of ``fedkd distill`` by the rules of `load_settings`.

    Args:
        config: a YAML file.
        overrides: such as ``student.model=cnn``. ``objective.kd.temperature=2`` changes one
            setting of the objective of the file, or of the default one; ``objective={ce: 1}``
            replaces the objective whole.
        allow: packages, or ``package.module:callable``, whose code the file may name.

    Raises:
        SettingsError: a file that cannot be read, an unknown key, a value that cannot work, a
            callable that only the file names.
    """
    from fedkd.distillation.settings import DistillSettings

    objective = DistillSettings().objective.model_dump(mode="json")
    with asked(overrides, allow):
        return distill_settings_from_table(
            _read_table(config, overrides, lambda _: {("objective",): objective})
        )


@contextmanager
def asked(overrides: Sequence[str], allow: Sequence[str]) -> Iterator[None]:
    """Refuse code that nobody but a file names, in all settings that are read inside the block.

    Args:
        overrides: the words among the settings; what a word names is allowed.
        allow: packages, or ``package.module:callable``; beside those of `ALLOW_VARIABLE`.

    Raises:
        SettingsError: ``allow`` names neither.
    """
    try:
        permit = permit_of(overrides, allow)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    with own_code.asking(permit):
        yield


def _check_arms(settings: Settings) -> None:
    """Refuse settings with an arm that cannot work, or that names code which nobody allowed."""
    table = {key: value for key, value in settings.to_table().items() if key != "study"}
    for name, patch in settings.study.arms.items():
        try:
            settings_from_table(merge_tables(table, patch))
        except SettingsError as error:
            raise SettingsError(f"study.arms.{name}: {error}") from None


Defaults = Callable[[Mapping[str, Any]], Mapping[tuple[str, ...], Mapping[str, Any]]]
"""For settings as they were given: defaults of tables whose keys are free, by their path."""


def _read_table(
    config: str | os.PathLike[str] | None, overrides: Sequence[str], defaults: Defaults
) -> dict[str, Any]:
    """Merge file and overrides; see `_overridden`."""
    return _overridden(read_file(config), overrides, defaults)


def read_file(config: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Return what a YAML file says, with ``${...}`` left as it is; nothing where there is none.

    A file below ``conf/`` that is not there is the one that fedkd ships under that name, so that
    the commands of its documentation work in any folder.
    """
    try:
        return read_yaml(_shipped(Path(config))) if config is not None else {}
    except ValueError as error:
        raise SettingsError(str(error)) from None


def _shipped(config: Path) -> Path:
    if config.parts[:1] != (CONF.name,) or ".." in config.parts or config.exists():
        return config
    ours = CONF.parent / config
    return ours if ours.is_file() else config


def read_over(table: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Lay words over the settings of a federated run and fill in ``${...}``.

    Raises:
        SettingsError: a word that cannot be read, or that refers to what is not there.
    """
    return _overridden(table, overrides, _objectives_of_strategy)


def _overridden(
    table: Mapping[str, Any], overrides: Sequence[str], defaults: Defaults
) -> dict[str, Any]:
    """Lay words over a table.

    Args:
        table: as a file says it.
        overrides: words.
        defaults: of tables whose keys are free, so that a word may change one of them.
    """
    try:
        words = [read_word(word) for word in overrides]
    except ValueError as error:
        raise SettingsError(str(error)) from None
    patch: dict[str, Any] = {}
    for path, value in words:
        patch = merge_tables(patch, nested_table(path, value))
    given = {path for path, _ in words}
    for place, default in defaults(merge_tables(table, patch)).items():
        changed = any(path[: len(place)] == place and path != place for path in given)
        if changed and place not in given and not _has(table, place):
            patch = merge_tables(nested_table(place, default), patch)
    for path, _ in words:
        # An objective is a sum: one that is written whole would gain the old one's terms.
        if path[-1].endswith("objective"):
            table = _without(table, path)
    try:
        return fill_in(merge_tables(table, patch))
    except ValueError as error:
        raise SettingsError(str(error)) from None


def _objectives_of_strategy(
    table: Mapping[str, Any],
) -> Mapping[tuple[str, ...], Mapping[str, Any]]:
    """Return the default objectives of the strategy that a table names."""
    strategy = named("strategy", table.get("strategy", {}))
    name = strategy.get("name") if isinstance(strategy, Mapping) else None
    return {
        ("strategy", key): field.default.model_dump(mode="json")
        for key, field in (strategy_fields(name) or {}).items()
        if isinstance(field.default, Objective)
    }


def strategy_fields(name: object) -> "Mapping[str, FieldInfo] | None":
    """Return the settings of an algorithm; None where there is none that can be known here."""
    try:
        if own_code.is_own_code(name) and not own_code.may_load(str(name)):
            return None
        return strategy_class(name).Settings.model_fields
    except ValueError:
        # Whoever checks the settings says why.
        return None


def _has(table: object, path: Sequence[str]) -> bool:
    for key in path:
        if not isinstance(table, Mapping) or key not in table:
            return False
        table = table[key]
    return True


def nested_table(path: Sequence[str], value: Any) -> dict[str, Any]:
    """Return a table that holds one value, at a path of at least one key."""
    table: dict[str, Any] = reduce(lambda inner, key: {key: inner}, reversed(path), value)
    return table


def _without(table: Mapping[str, Any], path: Sequence[str]) -> dict[str, Any]:
    key, *rest = path
    if not rest:
        return {name: value for name, value in table.items() if name != key}
    inner = table.get(key)
    return {**table, key: _without(inner, rest)} if isinstance(inner, Mapping) else dict(table)


def merge_tables(
    table: Mapping[str, Any], patch: Mapping[str, Any], *, nested: bool = False
) -> dict[str, Any]:
    """Lay one table over another, key by key.

    A nested table that says what it is (a ``name`` or ``kind``: a strategy, an optimizer, a
    schedule) and says something else than the old one replaces it whole: the old one's other
    keys meant something for the old one only.
    """
    kinds = [key for key in ("name", "kind") if key in table and key in patch]
    if nested and any(table[key] != patch[key] for key in kinds):
        return dict(patch)
    merged = dict(table)
    for key, value in patch.items():
        old = merged.get(key)
        if isinstance(value, Mapping):
            old = named(key, old)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            merged[key] = merge_tables(old, value, nested=True)
        else:
            merged[key] = value
    return merged


NAMED = ("strategy", "method", "model", "meme")
"""Sections that may be written as their name alone."""


def named(key: str, value: Any) -> Any:
    """Return a section that was written as its name alone as a table, which can be added to."""
    return {"name": value} if key in NAMED and isinstance(value, str) else value


def settings_from_table(table: Mapping[str, Any]) -> Settings:
    """Check plain values and return the settings.

    Raises:
        SettingsError: names the first setting that cannot work.
    """
    return _checked(Settings, table)


def distill_settings_from_table(table: Mapping[str, Any]) -> "DistillSettings":
    """Check plain values and return the settings of a distillation.

    Raises:
        SettingsError: names the first setting that cannot work.
    """
    from fedkd.distillation.settings import DistillSettings

    return _checked(DistillSettings, table)


def _checked(kind: type[SettingsT], table: Mapping[str, Any]) -> SettingsT:
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        raise SettingsError("; ".join(_readable(_in_force(kind, table), error))) from None


def _in_force(kind: type[SettingsT], table: Mapping[str, Any]) -> type[SettingsT]:
    """Return a kind of settings with those of the class of another package that a table names."""
    key = "strategy" if "strategy" in kind.model_fields else "method"
    section = named(key, table.get(key))
    name = section.get("name") if isinstance(section, Mapping) else None
    if not own_code.is_own_code(name):
        return kind
    class_of: Callable[[object], Any] = strategy_class
    if key == "method":
        from fedkd.distillation.methods import method_class as class_of
    try:
        if not own_code.may_load(str(name)):
            return kind
        own = class_of(name).Settings
    except ValueError:
        # Which is the problem that is told.
        return kind
    fields: dict[str, Any] = {key: (own, ...)}
    return create_model(kind.__name__, __base__=kind, **fields)


def _readable(kind: type[BaseModel], error: ValidationError) -> list[str]:
    """One line for each problem: the setting, what is wrong, the value it got."""
    lines = []
    problems = _without_echoes(error.errors(include_url=False, include_context=False))
    unknown = [str(each["loc"][0]) for each in problems if _is_unknown_outermost(each)]
    if foreign := foreign_hint(kind, unknown, _commands()):
        return [foreign]
    for problem in problems[:MOST_PROBLEMS]:
        path, known = _place(kind, problem["loc"])
        where = ".".join(path)
        message = " ".join(problem["msg"].removeprefix("Value error, ").split())
        message = message.replace("Input should be", "must be")
        if problem["type"] == "extra_forbidden":
            known_there = f"; known there: {', '.join(known)}" if known else ""
            hint = setting_hint(kind, path, problem["input"])
            lines.append(f"unknown setting {where!r}{hint or known_there}")
        elif problem["type"] == "model_type":
            keys = ", ".join(_keys(kind, path))
            hint = section_hint(where, problem["input"]) or f"; known there: {keys}"
            lines.append(f"{where} is a section of settings, got {shown(problem['input'])}{hint}")
        elif problem["type"] == "value_error" or "got " in message:
            # A check of several settings names them itself; one of a single value does not.
            if len(path) > 1 and message.startswith(f"{path[-1]}."):
                message = ".".join([*path[:-1], message])
            message += colon_hint(problem["input"])
            lines.append(message if message.startswith(where) else f"{where}: {message}")
        else:
            message += f", got {shown(problem['input'])}{colon_hint(problem['input'])}"
            lines.append(f"{where}: {message[0].lower()}{message[1:]}")
    if len(problems) > MOST_PROBLEMS:
        lines.append(f"and {len(problems) - MOST_PROBLEMS} more")
    return [line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..." for line in lines]


def _without_echoes(problems: Sequence[Any]) -> list[Any]:
    """Leave out that a list is too short where it is so only because of an item refused."""
    return [
        each
        for each in problems
        if each["type"] != "too_short"
        or not any(_lies_in(each["loc"], other["loc"]) for other in problems)
    ]


def _lies_in(outer: Sequence[object], inner: Sequence[object]) -> bool:
    return len(inner) > len(outer) and inner[: len(outer)] == outer


def _commands() -> Mapping[str, type[BaseModel]]:
    """Return which command takes which settings."""
    from fedkd.distillation.settings import DistillSettings

    return {"fedkd run or fedkd compare": Settings, "fedkd distill": DistillSettings}


def _is_unknown_outermost(problem: Any) -> bool:
    return problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1


def _keys(kind: type[BaseModel], path: Sequence[str]) -> list[str]:
    """Return the settings of a section."""
    prefix = ".".join(path) + "."
    names = [name.removeprefix(prefix) for name in setting_paths(kind) if name.startswith(prefix)]
    return [name for name in names if "." not in name]


def _place(kind: type[BaseModel], location: Sequence[str | int]) -> tuple[list[str], list[str]]:
    """Return where a problem is, and the keys that are known beside it.

    There are none where several kinds of section fit.
    """
    path: list[str] = []
    sections = [kind]
    beside: list[type[BaseModel]] = []
    for part in location:
        named = [section for section in sections if _tag(section) == part]
        of_none = not any(part in section.model_fields for section in sections)
        if part == own_code.OTHER_PACKAGE and of_none:
            continue
        if named and of_none:
            # The name by which one of several kinds of section was chosen is no key.
            sections = named
            continue
        path.append(str(part))
        beside = sections
        if not isinstance(part, int):
            field = sections[0].model_fields.get(part) if len(sections) == 1 else None
            sections = _models_in(field.annotation) if field is not None else []
    return path, list(beside[0].model_fields) if len(beside) == 1 else []


def _tag(section: type[BaseModel]) -> str | None:
    for key in ("name", "kind"):
        field = section.model_fields.get(key)
        names = get_args(field.annotation) if field is not None else ()
        if len(names) == 1 and isinstance(names[0], str):
            return names[0]
    return None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]
