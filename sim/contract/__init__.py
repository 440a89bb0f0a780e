"""The contract test: what is asked of every algorithm, of the table or of one's own package."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sim.contract.claims import CLAIMS, BrokenError, Case
from sim.server.validation import AuthorError
from sim.settings import SettingsError, merge_tables
from sim.settings.reading import nested_table
from sim.settings.tables import read_word
from strategies import strategy_class

__all__ = ["ContractError", "check_strategy"]


class ContractError(AssertionError):
    """An algorithm does not keep to the contract; one line for each claim that is broken."""


def check_strategy(name: str, *variants: Mapping[str, Any], words: Sequence[str] = ()) -> None:
    """Hold an algorithm to every claim of `sim.contract.claims`, in a toy federation.

    It takes about half a minute for each variant.

    Args:
        name: what ``strategy.name`` would be: ``my_package.my_module:MyMethod``.
        variants: settings under ``strategy:`` to try, each on its own; its defaults without any.
        words: other settings to try it with, beside those that its card says it needs, such as
            ``clients.models=mlp``.

    Raises:
        SettingsError: it cannot be found, or these settings cannot work.
        ContractError: what is broken; of an exception in its code, the exception is the cause.
    """
    broken: dict[str, list[str]] = {}
    first: Exception | None = None
    for options in variants or ({},):
        case = Case(name, options, sections_of([*_needs(name), *words]))
        _let_it_refuse(case)
        variant = f" with {dict(options)}" if options else ""
        for said, error in _broken_by(case):
            first = first or error
            broken.setdefault(_told(error), []).append(f"{said}{variant}")
    if broken:
        # What keeps an algorithm from running at all breaks every claim in the same way.
        lines = [
            f"  {said}{f' (and {len(others)} more claims)' if others else ''}: {told}"
            for told, (said, *others) in broken.items()
        ]
        raise ContractError(
            f"{name} does not keep to the contract:\n" + "\n".join(lines)
        ) from first


def _needs(name: str) -> tuple[str, ...]:
    try:
        return strategy_class(name).card.needs
    except ValueError:
        # Its settings will tell.
        return ()


def _let_it_refuse(case: Case) -> None:
    """Ask the algorithm whether it can work here at all, as a run would before it starts.

    Raises:
        SettingsError: it cannot.
    """
    settings = case.settings()
    try:
        strategy, server = case.parts(settings)
        strategy.check(server.data.input_shape)
    except ValueError as error:
        raise SettingsError(
            f"{case.strategy} refuses the toy federation, so nothing was tried: {error}; settings "
            'that it needs go into words, such as words=["clients.models=mlp"]'
        ) from error
    # Whatever else it raises is the claims' to tell.
    except Exception:  # noqa: S110
        pass


def sections_of(words: Sequence[str]) -> dict[str, Any]:
    """Return ``key=value`` words as tables of settings."""
    table: dict[str, Any] = {}
    for word in words:
        try:
            path, value = read_word(word)
        except ValueError as error:
            raise SettingsError(str(error)) from None
        table = merge_tables(table, nested_table(path, value))
    return table


def _broken_by(case: Case) -> Iterator[tuple[str, Exception]]:
    for name, claim in CLAIMS.items():
        try:
            claim(case)
        # Somebody else's code may fail in any way.
        except Exception as error:
            yield name.replace("_", " "), error


def _told(error: Exception) -> str:
    if isinstance(error, BrokenError):
        return str(error)
    last = (str(error).strip().splitlines() or [""])[-1]
    # Its text is the traceback of what happened, whose last line says of which kind that was.
    return last if isinstance(error, AuthorError) else f"{type(error).__name__}: {last}"
