"""What to type instead: the setting, option, command or file that a mistake was meant to be."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, RootModel

MOST_SUGGESTED = 3
STUDY_OPTIONS = ("arms", "baseline", "seeds")
DEEPEST = 6
"""Levels of sections that are searched; schedules may hold schedules."""

ALIASES: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "algorithm": ("strategy.name", "method.name"),
        "arms": ("study.arms",),
        "dataset": ("data.source",),
        "fraction": ("clients.participation",),
        "kd_weight": ("objective.kd.weight",),
        "learning_rate": ("clients.optimizer.lr", "training.optimizer.lr"),
        "local_epochs": ("clients.local.epochs",),
        "model": ("clients.models", "student.model"),
        "num_clients": ("clients.count",),
        "num_rounds": ("rounds",),
        "output_dir": ("output",),
        "temperature": ("strategy.temperature", "objective.kd.temperature"),
        "workers": ("engine.cpus_per_worker",),
    }
)
"""Other words for settings; of a name's settings those count that there are."""

MEANT: Mapping[str, str] = MappingProxyType(
    {
        "checkpoints": "every",
        "clients": "count",
        "clients.local": "epochs",
        "clients.optimizer": "name",
        "clock": "profiles",
        "data": "source",
        "data.feature_shift": "shifts",
        "data.label_noise": "rate",
        "data.partition": "kind",
        "data.public": "size",
        "engine": "backend",
        "evaluation": "every",
        "exchange": "rows_per_round",
        "presence": "trace",
        "search": "temperatures",
        "student": "model",
        "study": "seeds",
        "teacher": "models",
        "training": "epochs",
        "training.optimizer": "name",
    }
)
"""Which setting of a section somebody means who gives the section a single value."""


def setting_paths(kind: type[BaseModel]) -> list[str]:
    """Return the dotted names of all settings of a kind, sections among them, outer ones first."""
    return sorted(dict.fromkeys(_paths(kind, ())), key=lambda path: path.count("."))


def _paths(kind: type[BaseModel], above: tuple[str, ...]) -> Iterator[str]:
    for name, field in kind.model_fields.items():
        yield ".".join((*above, name))
        if len(above) < DEEPEST:
            for section in _sections(field.annotation):
                yield from _paths(section, (*above, name))


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that a setting can be; not those in a list, whose places have no name."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [] if issubclass(annotation, RootModel) else [annotation]
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return [section for part in get_args(annotation) for section in _sections(part)]
    return []


def meant_settings(kind: type[BaseModel], path: Sequence[str], value: object = None) -> list[str]:
    """Return the settings that an unknown one may stand for, the likeliest first.

    Args:
        kind: of the settings.
        path: of the unknown one.
        value: what it was given; a table may be a section that is unknown as a whole.
    """
    path = list(path)
    known = setting_paths(kind)
    inside: list[str] = []
    while isinstance(value, Mapping) and len(value) == 1:
        ((key, value),) = value.items()
        inside.append(str(key))
    *above, last = path
    whole = [*path, *inside]
    found = [name for name in ALIASES.get(whole[-1].casefold(), ()) if _is_there(name, kind)]
    found += _called(whole, known)
    if inside:
        # Of an unknown section the name of the setting says something, and its own name does.
        found += _called(whole[-1:], known) or _called(path, known)
    beside = [name.split(".")[-1] for name in known if name.split(".")[:-1] == above]
    near = get_close_matches(last.casefold(), beside, n=1, cutoff=0.8 if found else 0.6)
    typos = [".".join((*above, name, *inside)) for name in near]
    found = [*(name for name in typos if not inside or name in known), *found]
    if not found:
        names = dict.fromkeys(name.split(".")[-1] for name in known)
        near = get_close_matches(whole[-1].casefold(), list(names), n=1, cutoff=0.75)
        found = [name for name in known if name.split(".")[-1] in near]
    return list(dict.fromkeys(found))[:MOST_SUGGESTED]


def _called(path: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return settings with the last name of a path, and the others before it in their order."""
    *above, last = path
    return [
        name
        for name in known
        if name.split(".")[-1] == last and _in_order(above, name.split(".")[:-1])
    ]


def _in_order(words: Sequence[str], names: Sequence[str]) -> bool:
    rest = iter(names)
    return all(word in rest for word in words)


def _is_there(name: str, kind: type[BaseModel]) -> bool:
    # Below an objective names are free.
    section = name.split(".")[0]
    return name in setting_paths(kind) or (section == "objective" and section in kind.model_fields)


def setting_hint(kind: type[BaseModel], path: Sequence[str], value: object = None) -> str:
    """Return ``"; did you mean 'a.b'?"`` for an unknown setting, or nothing.

    Nothing, too, for a setting that another kind of the same section has.
    """
    if ".".join(path) in setting_paths(kind):
        return ""
    hint = colon_hint({path[-1]: value}) or _did_you_mean(
        [repr(name) for name in meant_settings(kind, path, value)]
    )
    option = len(path) == 1 and path[0] in STUDY_OPTIONS
    return f"{hint} (an option of fedkd compare: --{path[0]})" if option else hint


def colon_hint(value: object) -> str:
    """Say what is missing in a table such as ``{name:mlp}``, which has one long key; or nothing."""
    for key, item in value.items() if isinstance(value, Mapping) else ():
        name, colon, rest = str(key).partition(":")
        if colon and item is None:
            return f"; write a space after the colon: {{{name}: {rest}}}"
    return ""


def section_hint(where: str, value: object) -> str:
    """Return which setting of a section is meant that was given a single value, or nothing."""
    if where not in MEANT or isinstance(value, Mapping | list | tuple):
        return ""
    return _did_you_mean([f"{where}.{MEANT[where]}={value}"])


def foreign_hint(
    kind: type[BaseModel], unknown: Sequence[str], commands: Mapping[str, type[BaseModel]]
) -> str:
    """Return one line where settings were given to another command than theirs, or nothing.

    Args:
        kind: of the command that was called.
        unknown: outermost names that it does not know.
        commands: the kind of settings of each command.
    """
    known = setting_paths(kind)
    for command, other in commands.items():
        foreign = [name for name in unknown if name in other.model_fields]
        if other is not kind and any(not _called([name], known) for name in foreign):
            many = len(foreign) > 1
            return (
                f"unknown setting{'s' * many} {', '.join(map(repr, foreign))}: "
                f"{'they belong' if many else 'it belongs'} to {command}, type that instead"
            )
    return ""


def command_hint(word: str, commands: Sequence[str], strategies: Sequence[str]) -> str:
    """Say what to type where the first word is no command."""
    near = get_close_matches(word, commands, n=1, cutoff=0.6)
    if word in strategies:
        instead = f"fedkd run strategy.name={word}"
    elif "=" in word or word.endswith((".yaml", ".yml")):
        instead = f"fedkd run {shlex.quote(word)}"
    elif near:
        instead = f"fedkd {near[0]}"
    else:
        return f"no command {word!r}; known: {', '.join(commands)}"
    return f"no command {word!r}; known: {', '.join(commands)}; did you mean {instead!r}?"


def option_hint(
    option: str, value: str, *, known: Sequence[str], kind: type[BaseModel] | None, command: str
) -> str:
    """Say what to type in place of an unknown option: settings are written without dashes.

    Args:
        option: as typed, without its value.
        value: what follows it; empty if nothing does.
        known: the options that there are.
        kind: of the settings that the command takes; None if it takes none.
        command: its name.
    """
    name = option.lstrip("-").replace("-", "_")
    text = f"no option {option!r}"
    if kind is not None and name in ("config", "conf", "c", "file", "f"):
        return f"{text}; a file is given by itself: {_call(command, value or 'CONFIG')}"
    settings = [] if kind is None else meant_settings(kind, name.split("."))
    exact = [each for each in settings if each.split(".")[-1] == name.split(".")[-1]]
    near = get_close_matches(f"--{name.replace('_', '-')}", known, n=1, cutoff=0.75)
    if settings and (exact or not near):
        word = f"{settings[0]}={value or 'VALUE'}"
        text += f"; settings are written key=value: {_call(command, word)}"
    if near:
        text += _did_you_mean([repr(near[0])])
    if not settings and not near:
        text += f"; known: {', '.join(known)}"
        text += "" if kind is None else "; settings are written key=value"
    return text


def _call(command: str, word: str) -> str:
    return f"fedkd {command} {word if word.isupper() else shlex.quote(word)}"


def stray_hint(
    words: Sequence[str], position: int, *, arms: str | None, known_arms: Sequence[str]
) -> str:
    """Say what to type in place of a word that is neither a file that exists nor key=value.

    Args:
        words: all that are neither options nor their values.
        position: of the word.
        arms: what ``--arms`` was given; None where there is no such option.
        known_arms: names that may stand there: strategies, and the arms of a file.
    """
    word = words[position]
    before = words[position - 1] if position else ""
    after = words[position + 1] if position + 1 < len(words) else ""
    if before.endswith("=") and before.count("=") == 1:
        return f"; no space around =: {before}{word}"
    if word.startswith("=") or after.startswith("="):
        pair = before + word if word.startswith("=") else word + after
        return f"; no space around =: {pair}"
    if _open_brackets(" ".join(words[:position])) > 0:
        return "; quote what has spaces: 'key=[a, b]'"
    if arms is not None and (_are_arms(word, known_arms) or (arms and not _looks_like_file(word))):
        rest = [each for each in words if each == word or _are_arms(each, known_arms)]
        given = [name for each in (arms, *rest) for name in each.split(",") if name.strip()]
        return f"; arms are separated by commas: --arms {','.join(given)}"
    if _are_arms(word, known_arms):
        return f"; did you mean strategy.name={word}?"
    key, colon, value = word.partition(":")
    if colon and key.replace(".", "").replace("_", "").isalpha():
        return f"; settings are written key=value: {key}={value.strip() or after or 'VALUE'}"
    if after and key.isidentifier() and not _looks_like_file(after) and "=" not in after:
        return f"; settings are written key=value: {word}={after}"
    return _did_you_mean([str(path) for path in _near_files(word)])


def _are_arms(word: str, known: Sequence[str]) -> bool:
    names = [name for name in word.split(",") if name]
    return bool(names) and all(name in known for name in names)


def _open_brackets(text: str) -> int:
    return sum(text.count(mark) for mark in "[{") - sum(text.count(mark) for mark in "]}")


def _looks_like_file(word: str) -> bool:
    return word.endswith((".yaml", ".yml")) or "/" in word


def _near_files(word: str) -> list[Path]:
    """Return YAML files that are called like this, here and in ``conf/``."""
    path = Path(word)
    folders = [path.parent, Path("conf")]
    try:
        files = [file for folder in folders for file in sorted(folder.glob("*.y*ml"))]
    except (OSError, ValueError):
        return []
    near = get_close_matches(path.stem, [file.stem for file in files], n=1, cutoff=0.7)
    return [file for file in files if file.stem in near][:1]


def _did_you_mean(found: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(found)}?" if found else ""
