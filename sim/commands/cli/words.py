"""Settings of federated runs as commands are given them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

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
