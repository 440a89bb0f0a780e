"""`algorithms`: what each federated algorithm does, sends and differs in, read from the code."""

from collections.abc import Mapping
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from sim.server.observers import Row
from sim.settings.shorthand import shorthand
from strategies import STRATEGIES, strategy_class
from strategies.contract.card import Description, description_of


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One algorithm.

    Attributes:
        name: what ``strategy.name`` calls it.
        description: its card, its source, how it differs.
        directions: from whom each learner learns, by what ``strategy.directions`` calls it.
        defaults: of its settings, as a settings file would write them.
    """

    name: str
    description: Description
    directions: Mapping[str, str]
    defaults: Mapping[str, str]

    @property
    def command(self) -> str:
        """What runs it."""
        return " ".join(["fedkd run", f"strategy.name={self.name}", *self.description.card.needs])

    def to_row(self) -> Row:
        """Return all of it as plain values."""
        title, card, source, differs = self.description
        return {
            "name": self.name,
            "title": title,
            "learns": card.learns,
            "up": card.up,
            "down": card.down,
            "equation": card.equation,
            "directions": dict(self.directions),
            "source": source,
            "differs": differs,
            "defaults": dict(self.defaults),
            "command": self.command,
        }

    def lines(self) -> list[str]:
        """Return all of it as sentences, one a line."""
        row = self.to_row()
        told = [
            ("learns", row["learns"]),
            ("up", row["up"]),
            ("down", row["down"]),
            ("equation", row["equation"]),
            ("directions", "; ".join(f"{who}: {whom}" for who, whom in self.directions.items())),
            ("source", row["source"]),
            ("differs", row["differs"]),
            ("defaults", ", ".join(f"{key}={of}" for key, of in self.defaults.items())),
            ("run", row["command"]),
        ]
        return [row["title"], *(f"{name:<10} {text}" for name, text in told if text)]


def algorithms(name: str | None = None) -> tuple[Algorithm, ...]:
    """Return one algorithm, or all of the table in its order.

    Args:
        name: a row of the table, or ``package.module:Class``.

    Raises:
        ValueError: for a name that is none, with the nearest that is.

    Examples:
        >>> from sim.commands.algorithms import algorithms
        >>> algorithms("dml")[0].command
        'fedkd run strategy.name=dml'
    """
    return tuple(_algorithm(each) for each in ([name] if name else STRATEGIES))


def _algorithm(name: str) -> Algorithm:
    found = strategy_class(name)
    defaults = {
        key: "required"
        if field.is_required()
        else shorthand(field.get_default(call_default_factory=True))
        for key, field in found.Settings.model_fields.items()
        if key != "name"
    }
    return Algorithm(name, description_of(found), found.directions, defaults)


def algorithms_table(shown: tuple[Algorithm, ...]) -> Table:
    """Return who learns from whom and what travels, a line an algorithm; cells may be folded."""
    table = Table(
        box=None,
        title="n public rows of a round, n_k private rows, C classes, P parameters, "
        "d numbers of a feature",
        title_justify="left",
    )
    for name, share in (("name", None), ("learns", 3), ("up", 2), ("down", 2)):
        table.add_column(name, ratio=share, no_wrap=share is None)
    for each in shown:
        card = each.description.card
        table.add_row(*map(escape, (each.name, card.learns, card.up, card.down)))
    return table
