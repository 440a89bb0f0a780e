"""What an algorithm says about itself: who learns from whom, what travels, where it is from."""

import inspect
import re
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

from fedkd.names import printable

SOURCE = re.compile(r"Source: (.*?https?://\S+)", re.DOTALL)
DIFFERS = re.compile(r"Differs from (the [^:]+): (.*?)(?:\n\n|\Z)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a reader compares algorithms by, in a few words each.

    Sizes are told in ``n`` public rows of a round, ``n_k`` private rows of a client, ``C`` classes,
    ``K`` clients, ``P`` parameters (buffers included), ``d`` numbers of a feature; all of them
    float32 unless said.

    Attributes:
        learns: who learns from whom.
        up: what a client sends in a round, with its size.
        down: what a client receives in a round, with its size.
        equation: what is minimised and how knowledge is put together, as plain text.
        needs: settings without which it refuses to run, as ``key=value``.
    """

    learns: str
    up: str
    down: str
    equation: str
    needs: tuple[str, ...] = ()


NO_CARD = Card(learns="", up="", down="", equation="")
"""Of an algorithm that says nothing."""


class Description(NamedTuple):
    """An algorithm as it stands in the docs.

    Attributes:
        title: one line.
        card: what it does and sends.
        source: authors, year, link; empty where nobody else's.
        differs: how it differs from its source; empty where it does not say.
    """

    title: str
    card: Card
    source: str
    differs: str


def description_of(strategy: type[Any]) -> Description:
    """Return what an algorithm's card and the docstring of its module say.

    The docstring's first line is the title; ``Source:`` ends with a link, ``Differs from the
    paper:`` with its paragraph.
    """
    text = inspect.getdoc(sys.modules[strategy.__module__]) or inspect.getdoc(strategy) or ""
    title, _, rest = text.partition("\n")
    source, differs = SOURCE.search(rest), DIFFERS.search(rest)
    return Description(
        title=printable(title.strip()),
        card=strategy.card,
        source=_line(source[1]) if source else "",
        differs=_line(differs[2]) if differs else "",
    )


def _line(text: str) -> str:
    return printable(" ".join(text.split())).replace("``", "`")
