"""Settings of federated runs as commands are given them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from sim.settings import Settings


def refuse_accepting() -> NoReturn:
    """Say what ``--accept-code`` is for, where there is no earlier run."""
    from sim.settings import SettingsError

    raise SettingsError(
        "--accept-code is about earlier runs: it goes with run --resume, compare, distill --seeds "
        "and distill --search; a new run has none"
    )


def read_settings(
    arguments: Sequence[str] | None, allow: Sequence[str] | None, arms: str | None = None
) -> "Settings":
    """Read the settings of a federated run.

    Args:
        arguments: a file and words.
        allow: whose code the file may name.
        arms: what ``--arms`` was given, for the mistake of separating them by spaces; None where
            there is no such option.
    """
    from sim.settings import load_settings

    return load_settings(*split_words(arguments, arms), allow=allow or ())


def split_words(
    arguments: Sequence[str] | None, arms: str | None = None
) -> tuple[str | None, list[str]]:
    """Split ``[CONFIG] [KEY=VALUE]...``."""
    from sim.settings import SettingsError

    words = list(arguments or ())
    configs = [place for place, word in enumerate(words) if "=" not in word or word[0] == "="]
    for place in configs:
        if not Path(words[place]).exists():
            hint = _stray_hint(words, place, arms)
            if hint:
                raise SettingsError(f"config {words[place]!r} does not exist{hint}")
    if len(configs) > 1:
        raise SettingsError(
            f"give at most one config file, got {' and '.join(words[place] for place in configs)}; "
            "settings are written key=value"
        )
    overrides = [word for place, word in enumerate(words) if place not in configs]
    return words[configs[0]] if configs else None, overrides


def _stray_hint(words: Sequence[str], place: int, arms: str | None) -> str:
    from sim.settings.hints import stray_hint
    from strategies import STRATEGIES

    return stray_hint(words, place, arms=arms, known_arms=list(STRATEGIES))


def settings_to_resume(
    folder: Path, arguments: Sequence[str] | None, allow: Sequence[str] | None
) -> "Settings":
    """Read a run's own settings, with what is overridden for the rest of it."""
    from sim.commands.running import settings_of_run
    from sim.settings import SettingsError

    words = list(arguments or ())
    if any("=" not in word for word in words):
        raise SettingsError("--resume takes the settings of the run folder; leave the config out")
    return settings_of_run(folder, words, allow=allow or ())


def sweep_words(
    sweep: Sequence[str] | None,
    together: Sequence[str] | None,
    only: Sequence[str] | None,
    without: Sequence[str] | None,
) -> list[str]:
    """Return the words on ``study`` that say what options of a sweep say.

    Args:
        sweep: ``SETTING=VALUE,...``, each value as in a word; instead of the file's values.
        together: ``SETTING,SETTING,...``; instead of the file's groups.
        only: ``SETTING=VALUE,...``; instead of the file's conditions.
        without: the same.

    Raises:
        SettingsError: naming the option and what it got.
    """
    from sim.settings import SettingsError

    words: dict[str, str] = {}
    for option in sweep or ():
        setting, values = _swept(option)
        if setting in words:
            raise SettingsError(
                f"--sweep {setting} stands there twice; put its values into one: "
                f"--sweep {setting}=1,2"
            )
        words[setting] = f"study.sweep.{setting}={_json(values)}"
    groups = [[name.strip() for name in option.split(",")] for option in together or ()]
    lists = {
        "together": groups,
        "only": [_condition("--only", option) for option in only or ()],
        "without": [_condition("--without", option) for option in without or ()],
    }
    told = [f"study.{name}={_json(values)}" for name, values in lists.items() if values]
    return [*words.values(), *told]


def _swept(option: str) -> tuple[str, list[Any]]:
    """Read ``SETTING=VALUE,...``."""
    from sim.settings import SettingsError

    setting, sign, text = (part.strip() for part in option.partition("="))
    if not sign or not setting:
        raise SettingsError(f"--sweep is written SETTING=VALUE,VALUE,..., got {option!r}")
    pieces = _split(text)
    if not all(piece.strip() for piece in pieces):
        where = "no value" if not text else "an empty value"
        raise SettingsError(
            f"--sweep {setting} has {where}, got {option!r}; write {setting}=1,2, and \"''\" for "
            "an empty text"
        )
    values = [_value(f"--sweep {option}", setting, piece) for piece in pieces]
    if len(values) == 1 and isinstance(values[0], list):
        raise SettingsError(
            f"--sweep {option} is a single value, a list; values are written without brackets: "
            f"--sweep {setting}={text.strip('[]')}"
        )
    return setting, values


def _condition(name: str, option: str) -> dict[str, Any]:
    """Read ``SETTING=VALUE,SETTING=[VALUE,VALUE]``."""
    from sim.settings import SettingsError

    condition: dict[str, Any] = {}
    for piece in _split(option):
        setting, sign, text = (part.strip() for part in piece.partition("="))
        if not sign or not setting or not text:
            raise SettingsError(
                f"{name} is written SETTING=VALUE,SETTING=[VALUE,VALUE], got {option!r}"
            )
        if setting in condition:
            raise SettingsError(
                f"{name} {option} names {setting} twice; values of which any will do are written "
                f"{setting}=[1,2]"
            )
        condition[setting] = _value(f"{name} {option}", setting, text)
    return condition


def _value(told: str, setting: str, text: str) -> Any:
    from sim.settings import SettingsError
    from sim.settings.tables import read_word

    try:
        return read_word(f"{setting}={text.strip()}")[1]
    except ValueError as error:
        raise SettingsError(f"{told}: {error}") from None


def _split(text: str) -> list[str]:
    """Split at the commas that are in no brackets and no quotes."""
    pieces, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and not depth:
            pieces.append("")
            continue
        pieces[-1] += letter
    return pieces


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
