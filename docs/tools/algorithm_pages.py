"""A page for each algorithm, put together from what stands elsewhere: nothing is written twice.

The entry of docs/strategies.md (what happens in a round, how it differs from its source, its
settings), the algorithm's card, the faults that it declares, and its rows of the tables of
docs/algorithms.md, docs/museum.md and docs/closed-forms.md.
"""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from sim.commands.algorithms import Algorithm, algorithms
from strategies import STRATEGIES

DOCS = Path(__file__).parents[1]
FAMILIES = {
    "baselines": "Baselines",
    "mutual": "Mutual learning across clients",
    "public_predictions": "Predictions of public rows",
    "server_models": "Models at the server",
    "data_free": "Without public data",
    "two_models": "Two models at each client",
    "regularised": "Weights, with a term that holds",
}
"""Titles of the packages in strategies/."""

SIZES = (
    "Sizes: `n` public rows of a round, `n_k` private rows of a client, `C` classes, `K` clients, "
    "`P` parameters (buffers included), `d` numbers of a feature; float32 unless said."
)
TABLE = re.compile(r"<!-- generated: strategy (\w+) -->\n(.*?)<!-- end -->\n?", re.DOTALL)


@cache
def _text(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


@cache
def entries() -> Mapping[str, str]:
    """Return what docs/strategies.md says of each algorithm, by its name."""
    parts = re.split(r"^## (\w+)\n", _text("strategies.md"), flags=re.MULTILINE)
    found = dict(zip(parts[1::2], parts[2::2], strict=True))
    # The next heading of several words ends an entry, too.
    return {
        name: re.split(r"^## ", text, maxsplit=1, flags=re.MULTILINE)[0].strip()
        for name, text in found.items()
        if name in STRATEGIES
    }


def by_family() -> Mapping[str, list[str]]:
    """Return the names of the algorithms by the title of their package."""
    found: dict[str, list[str]] = {title: [] for title in FAMILIES.values()}
    for name, strategy in STRATEGIES.items():
        found[FAMILIES[strategy.__module__.split(".")[1]]].append(name)
    return found


def pages() -> Iterator[tuple[str, str]]:
    """Return name and text of each page."""
    for algorithm in algorithms():
        yield algorithm.name, _page(algorithm)


def _page(algorithm: Algorithm) -> str:
    name = algorithm.name
    entry = entries()[name]
    settings = TABLE.search(entry)
    if settings is None:
        raise ValueError(f"docs/strategies.md has no table of settings for {name}")
    title, card, source, differs = algorithm.description
    flow = [
        ("learns", card.learns),
        ("goes up, per client", card.up),
        ("comes down, per client", card.down),
        ("minimises", card.equation),
        *((f"direction `{who}`", whom) for who, whom in algorithm.directions.items()),
    ]
    parts = [
        f"# {name}",
        title,
        "| | |\n|---|---|\n" + "\n".join(f"| **{what}** | {_cell(text)} |" for what, text in flow),
        f"```\n{algorithm.command}\n```",
        SIZES,
        "## What happens",
        TABLE.sub("", entry).strip(),
        "## Settings",
        "Under `strategy:`; [number or schedule](settings.md#schedules).",
        settings[2].strip(),
        *_faults(name),
        *_closed_form(name),
        *_measured(name),
        "## Where it is from",
        f"Source: {source}" if source else "Nobody's in particular.",
        f"Differs: {differs}" if differs else "",
        f"Code: `{STRATEGIES[name].__module__.replace('.', '/')}.py`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _faults(name: str) -> Iterator[str]:
    faults = STRATEGIES[name].faults
    if not faults:
        return
    yield "## Faults of published code"
    yield (
        "What published code of this algorithm does wrong, as switches of "
        f"`strategy.as_published`; what each costs is measured in [the museum](museum.md) "
        f"(`fedkd museum --only {name}`)."
    )
    costs = _rows("museum.md", name, "## What they cost")
    cost = {cells[1].strip("` "): cells[4] for cells in costs}
    yield "| switch | published code | right | costs, points |\n|---|---|---|---|\n" + "\n".join(
        f"| `{fault}` | {_cell(told.does)} ({_cell(told.read_in)}) | {_cell(told.right)} | "
        f"{cost.get(fault, 'not measured')} |"
        for fault, told in faults.items()
    )


def _closed_form(name: str) -> Iterator[str]:
    (table,) = re.findall(r"\| students \| rules \|.*?\n\n", _text("closed-forms.md"), re.DOTALL)
    if re.search(rf"\b{name}\b", table):
        yield "## Closed form"
        yield (
            "With students whose training has a closed form, where this rule ends can be computed: "
            "[what averaging soft labels converges to](closed-forms.md). Its server half is held "
            "against it to 1e-6 ([with which settings](closed-forms.md#fedkd-against-it))."
        )


def _measured(name: str) -> Iterator[str]:
    rows = _rows("algorithms.md", f"[`{name}`](#{name})", "## All of them on one setting")
    if not rows:
        return
    head = [
        line
        for line in _text("algorithms.md").split("## All of them on one setting")[1].splitlines()
        if line.startswith("|")
    ][:2]
    yield "## On one setting"
    yield (
        "Digits, ten clients, ten rounds, three seeds; all algorithms beside each other: "
        "[the whole table](algorithms.md#all-of-them-on-one-setting)."
    )
    yield "\n".join([*head, *(f"| {' | '.join([f'`{name}`', *cells[1:]])} |" for cells in rows)])


def _rows(page: str, first: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table under a heading whose first cell is this one."""
    lines = iter(_text(page).split(heading, 1)[1].splitlines())
    table = []
    for line in lines:
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip("|").split(" | ")])
        elif table:
            break
    return [cells for cells in table if cells[0].strip("`| ") == first.strip("`")]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def overview() -> str:
    """Return the list of all pages, by family."""
    titles = {each.name: each.description.title for each in algorithms()}
    parts = []
    for family, names in by_family().items():
        rows = "\n".join(f"- [`{name}`](algorithms/{name}.md): {titles[name]}" for name in names)
        parts.append(f"**{family}**\n\n{rows}")
    return "\n\n".join(parts) + "\n"
