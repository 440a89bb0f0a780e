"""Rewrite the tables in the pages beside this file from the settings models and the algorithms.

``python docs/generate_settings.py`` rewrites them, ``--check`` says with exit status 1 whether a
page is stale. A table stands between ``<!-- generated: <name> -->`` and ``<!-- end -->``; the
prose around it is written by hand.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedkd.data.feature_shift import SHIFTS
from fedkd.data.partition_settings import PARTITIONS, OwnPartition, PartitionSettings
from fedkd.distillation.methods import METHODS
from fedkd.distillation.settings import DistillSettings
from fedkd.exchange.adversaries import ADVERSARIES, Adversary, Controlling, Lying
from fedkd.exchange.codecs import CODECS, Codec
from fedkd.exchange.kinds import Stage
from fedkd.exchange.mechanisms import MECHANISMS
from fedkd.exchange.payload import Asked
from fedkd.exchange.release import ReleaseRule, Where
from fedkd.exchange.views import VIEWS, View
from fedkd.models import _MODELS as MODELS
from fedkd.models import ModelSettings, describe_models
from fedkd.objectives import Objective
from fedkd.schedules import Between, Schedule
from sim.adversity.faults import FaultRule
from sim.commands.algorithms import algorithms
from sim.contract.toy import toy_data, toy_parts, toy_settings
from sim.server.privacy import unsound
from sim.settings import Settings
from sim.settings.shorthand import shorthand
from strategies import STRATEGIES
from strategies.contract import Strategy

DOCS = Path(__file__).parent
PAGES = ("adversaries.md", "algorithms.md", "privacy.md", "settings.md", "strategies.md")
BLOCK = re.compile(r"(<!-- generated: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)

SCHEDULES = get_args(get_args(Schedule)[0])
MEANINGS = {
    "seed": "of every random draw of the run",
    "rounds": "rounds of the run",
    "clients.count": "number of clients",
    "clients.batch_size": "private rows of a step",
    "optimizer.name": "PyTorch's optimizer, with its defaults for what is not listed here",
    "optimizer.lr": "learning rate",
    "optimizer.weight_decay": "decoupled with `adamw`, else added to the gradient",
    "student.model": "what learns; the twin has the same",
}
"""What keys mean whose model does not say so, by the whole key or its end."""

CHOSEN = {
    "strategy": (STRATEGIES, "the algorithm; its other settings: [strategies.md](strategies.md)"),
    "method": (METHODS, "the way to distil; its other settings: `fedkd distill --list`"),
}
"""Sections whose keys depend on their name: the table of names, and where the keys are."""


STAGES: dict[type[Stage], Any] = {
    Codec: CODECS,
    View: VIEWS,
    ReleaseRule: MECHANISMS,
    Adversary: ADVERSARIES,
}
"""Stages of the exchange: the table of their kinds."""


class Key(NamedTuple):
    """One line of a table."""

    name: str
    default: str
    values: str
    meaning: str


def settings_keys() -> Iterator[Key]:
    """Every key of `Settings`, sections opened, except those of the strategies."""
    yield from _keys(Settings, Settings(), "")


def distill_keys() -> Iterator[Key]:
    """Every key of `DistillSettings`, sections opened, except those of the methods."""
    yield from _keys(DistillSettings, DistillSettings(), "")


def _keys(model: type[BaseModel], defaults: BaseModel, prefix: str) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        value = getattr(defaults, name)
        if key in CHOSEN:
            names, meaning = CHOSEN[key]
            yield Key(f"{key}.name", f"`{value.name}`", _choices(names), meaning)
        elif isinstance(value, Stage):
            kinds = next(known for base, known in STAGES.items() if isinstance(value, base))
            yield Key(key, f"`{value.kind}`", _choices(kinds), field.description or "")
        elif isinstance(value, PartitionSettings):
            yield from _partition_keys(value, f"{key}.")
        elif isinstance(value, BaseModel) and not _is_leaf(value):
            yield from _keys(type(value), value, f"{key}.")
        else:
            end = ".".join(key.split(".")[-2:])
            meaning = field.description or MEANINGS.get(key) or MEANINGS.get(end)
            if not meaning:
                raise ValueError(f"{key} has no meaning: add a description to its field")
            yield Key(key, _default(field, value), _values(field), meaning)


def _partition_keys(default: PartitionSettings, prefix: str) -> Iterator[Key]:
    """The kinds of partition, then what the default one has."""
    kinds = "; ".join(f"{name}: {_meaning(kind)}" for name, kind in PARTITIONS.items())
    choices = f"{_choices(PARTITIONS)}, `package.module:callable`"
    yield Key(f"{prefix}kind", f"`{default.kind}`", choices, kinds)
    for name, field in type(default).model_fields.items():
        if name != "kind":
            meaning = field.description or ""
            if name not in PartitionSettings.model_fields:
                meaning = f"of `{default.kind}`: {meaning}; others have others, see below"
            yield Key(f"{prefix}{name}", _default(field, field.default), _values(field), meaning)


def partition_keys() -> Iterator[Key]:
    """What each kind of partition has besides ``kind`` and ``min_rows``."""
    for kind, model in [*PARTITIONS.items(), ("package.module:callable", OwnPartition)]:
        for name, field in model.model_fields.items():
            if name not in PartitionSettings.model_fields:
                value = field.get_default(call_default_factory=True)
                default = _default(field, value)
                yield Key(f"{kind}: {name}", default, _values(field), field.description or "")


def shift_keys() -> Iterator[Key]:
    """What each kind of feature shift has besides ``kind``."""
    for kind, model in SHIFTS.items():
        for name, field in model.model_fields.items():
            if name != "kind":
                default = _default(field, field.default)
                yield Key(f"{kind}: {name}", default, _values(field), field.description or "")


def adversary_keys() -> Iterator[Key]:
    """What adversaries have besides ``kind``: first what several share, then each kind's own."""
    for base, named in ((Controlling, "all"), (Lying, "all that lie about answers")):
        for name, field in base.model_fields.items():
            if name != "kind" and name not in base.__base__.model_fields:
                default = _default(field, field.default)
                yield Key(f"{named}: {name}", default, _values(field), field.description or "")
    for kind, model in ((kind, ADVERSARIES.find(kind)) for kind in ADVERSARIES):
        for name, field in model.model_fields.items():
            if name not in Lying.model_fields:
                default = _default(field, field.default)
                yield Key(f"{kind}: {name}", default, _values(field), field.description or "")


def _meaning(kind: type) -> str:
    """Return the first sentence of a docstring as the meaning of a kind."""
    sentence = (inspect.getdoc(kind) or "").partition("\n")[0].removesuffix(".")
    return sentence[0].lower() + sentence[1:]


def strategy_keys(name: str) -> list[Key]:
    """The settings of one algorithm, except its name; their meaning is in the class docstring."""
    model = STRATEGIES[name].Settings
    meanings: dict[str, str] = {}
    for base in reversed(model.__mro__):
        meanings |= documented_attributes(base)
    keys = []
    for field_name, field in model.model_fields.items():
        if field_name == "name":
            continue
        if field_name not in meanings:
            raise ValueError(f"{model.__name__}: Attributes does not list {field_name}")
        default = _default(field, field.get_default(call_default_factory=True))
        keys.append(Key(field_name, default, _values(field), meanings[field_name]))
    return keys


def documented_attributes(kind: type) -> dict[str, str]:
    """Return what the ``Attributes:`` section of a docstring says, by name."""
    text = inspect.cleandoc(kind.__dict__.get("__doc__") or "")
    _, _, section = text.partition("Attributes:\n")
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \S)", section.split("\n\n")[0]):
        names, colon, meaning = entry.strip().partition(": ")
        if colon:
            clean = " ".join(meaning.split()).replace("``", "`").removesuffix(".")
            found |= dict.fromkeys(names.split(", "), clean)
    return found


def schedule_keys() -> Iterator[Key]:
    """The kinds of schedules with their keys."""
    for model in SCHEDULES:
        kind = model.model_fields["kind"].default
        for name, field in model.model_fields.items():
            if name != "kind":
                default = "required" if field.is_required() else _default(field, field.default)
                yield Key(f"{kind}: {name}", default, "", field.description or "")


def model_rows() -> Iterator[tuple[str, ...]]:
    """A line for each option of each built-in model."""
    for description in describe_models():
        fields = MODELS[description.name].model_fields
        if not fields:
            yield f"`{description.name}`", description.source, "no options", "", ""
        first = True
        for name, field in fields.items():
            start = (f"`{description.name}`", description.source) if first else ("", "")
            default = _yaml(description.options[name])
            values = _values(field)
            yield *start, f"`{name}`", default, f"{field.description} ({values})"
            first = False


def _is_leaf(value: object) -> bool:
    return isinstance(value, (*SCHEDULES, ModelSettings, Objective))


def _default(field: FieldInfo, value: object) -> str:
    return "required" if field.is_required() else _yaml(value)


def _yaml(value: object) -> str:
    return f"`{shorthand(value)}`"


def _choices(values: Any) -> str:
    return ", ".join(f"`{value}`" for value in values)


def _values(field: FieldInfo) -> str:
    """Say which values a field takes, as far as its type does."""
    annotation = field.annotation
    if get_origin(annotation) in (Union, UnionType):
        parts = get_args(annotation)
        kinds = [part for part in parts if part is not type(None)]
        if all(kind in SCHEDULES for kind in kinds):
            return _bounded("number or schedule", field.metadata)
        named = " or ".join(map(_name, kinds))
        return _bounded(named, field.metadata) + (" or `null`" if len(kinds) < len(parts) else "")
    return _bounded(_name(annotation), field.metadata)


def _name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return _choices(get_args(annotation))
    if get_origin(annotation) is tuple:
        if type(None) in get_args(get_args(annotation)[0]):
            return "list of paths or `null`"
        kind, *bounds = _name(get_args(annotation)[0]).split(" from ")
        return " from ".join([f"list of {kind}s", *bounds])
    if get_origin(annotation) in (dict, Union, UnionType):
        return "table"
    if hasattr(annotation, "__metadata__"):
        metadata = [
            part
            for given in annotation.__metadata__
            for part in (given.metadata if isinstance(given, FieldInfo) else [given])
        ]
        return _bounded(_name(get_args(annotation)[0]), metadata)
    names = {
        bool: "`true`, `false`",
        float: "number",
        int: "whole number",
        str: "text",
        Path: "path",
        ModelSettings: "model",
        Objective: "terms by name",
        FaultRule: "fault rule",
    }
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return names.get(annotation, "table")
    return names[annotation]


def _bounded(text: str, metadata: Sequence[Any]) -> str:
    """Add the tightest bounds of each kind."""
    for between in metadata:
        if isinstance(getattr(between, "func", None), Between):
            return f"{text} from {between.func.low:g} to {_number(between.func.high)}"
    limits = {
        sign: choose(found)
        for sign, choose in (("ge", max), ("le", min), ("lt", min))
        if (
            found := [
                limit for part in metadata if (limit := getattr(part, sign, None)) is not None
            ]
        )
    }
    if not limits:
        return text
    end = f"to {_number(limits['le'])}" if "le" in limits else f"to below {_number(limits['lt'])}"
    return f"{text} from {_number(limits['ge'])} {end}"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"


def table(keys: Iterator[Key] | list[Key]) -> str:
    """Write keys as a Markdown table."""
    keys = list(keys)
    if not keys:
        return "No settings."
    lines = ["| key | default | values | meaning |", "|---|---|---|---|"]
    return "\n".join(
        [*lines, *(f"| `{k.name}` | {k.default} | {k.values} | {k.meaning} |" for k in keys)]
    )


def model_table() -> str:
    """Write the models as a Markdown table."""
    lines = ["| model | what it is | option | default | meaning |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in model_rows())])


def _strategy_table(name: str) -> str:
    return table(strategy_keys(name))


def algorithm_table() -> str:
    """Write who learns from whom, and what travels, as a Markdown table."""
    lines = ["| name | learns | up, per client | down, per client |", "|---|---|---|---|"]
    for each in algorithms():
        card = each.description.card
        cells = (f"[`{each.name}`](#{each.name})", card.learns, card.up, card.down)
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines)


def algorithm_cards() -> str:
    """Write what each algorithm says about itself, one after the other."""
    cards = []
    for each in algorithms():
        title, card, source, differs = each.description
        lines = [f"### {each.name}", "", title, "", f"- **Minimises**: {card.equation}"]
        lines += [f"- **Source**: {source}"] * bool(source)
        lines += [f"- **Differs**: {differs}"] * bool(differs)
        defaults = ", ".join(f"`{key}: {value}`" for key, value in each.defaults.items())
        lines += [f"- **Defaults**: {defaults}"] * bool(defaults)
        lines.append(f"- **Run**: `{each.command}`")
        cards.append("\n".join(lines))
    return "\n\n".join(cards)


def direction_table() -> str:
    """Write what each direction of a mutual algorithm is as a Markdown table."""
    lines = ["| name | direction | learns |", "|---|---|---|"]
    for each in algorithms():
        for learner, source in each.directions.items():
            lines.append(f"| `{each.name}` | `{learner}` | {_cell(source)} |")
    return "\n".join(lines)


PROTECTED: dict[str, tuple[tuple[str, ...], Where]] = {
    "`dp_sgd`": (("dp_sgd",), "client"),
    "`gaussian`, `laplace`; client": (("gaussian", "laplace"), "client"),
    "`gaussian`, `laplace`; server": (("gaussian", "laplace"), "server"),
    "`votes`; server": (("votes",), "server"),
    "`randomized_response`; client": (("randomized_response",), "client"),
}
"""Columns of `mechanism_table`: mechanisms that are refused for the same reasons, and where."""


def mechanism_table() -> str:
    """Write which mechanism can protect which algorithm, and why it cannot, as Markdown.

    Asked of the code that refuses a run, for a toy federation of MLPs. Reasons stand below, each
    once and without what would be sound instead.
    """
    lines = [
        f"| name | sends | {' | '.join(PROTECTED)} |",
        f"|---|---|{'---|' * len(PROTECTED)}",
    ]
    reasons: dict[str, int] = {}
    for name in STRATEGIES:
        strategy, asked, named = _toy_algorithm(name)
        cells = [named, ", ".join(f"`{kind.kind}`" for kind in strategy.up) or "nothing"]
        for kinds, where in PROTECTED.values():
            found = {_refusal(strategy, asked, kind, where) for kind in kinds}
            if len(found) > 1:
                raise ValueError(f"{name}: {' and '.join(kinds)} differ at the {where}: {found}")
            (reason,) = found
            cells.append(
                f"no [{reasons.setdefault(reason, len(reasons) + 1)}]" if reason else "yes"
            )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {_cell(reason)}" for reason, number in reasons.items())]
    return "\n".join(lines)


def _toy_algorithm(name: str) -> tuple[Strategy[Any, Any], Asked | None, str]:
    """Return an algorithm with its defaults, what it asks for first, and its name for the table."""
    options = {}
    if "weighting" in STRATEGIES[name].Settings.model_fields:
        options = {"weighting": "equal"}
    labelled = any("labelled=true" in need for need in _needs(name))
    settings = toy_settings(
        name, options=options, clients={"models": [{"name": "mlp", "options": {"hidden": [8]}}]}
    )
    strategy, server = toy_parts(settings, toy_data(labelled=labelled))
    asked = strategy.asks(strategy.begin(server), 0, strategy.federation.round(1), server)
    return strategy, asked, f"`{name}`" + ("*" if options else "")


def _needs(name: str) -> Sequence[str]:
    return next(each.description.card.needs for each in algorithms() if each.name == name)


def _refusal(
    strategy: Strategy[Any, Any], asked: Asked | None, kind: str, where: Where
) -> str | None:
    """Return why a mechanism cannot protect an algorithm, without the remedy; None: it can."""
    rule = MECHANISMS.read({"kind": kind, "epsilon": 8})
    reason = unsound(strategy, rule, where)
    if reason is None and asked is not None and not rule.learns:
        reason = rule.refuses_asked(asked)
    if reason is None:
        return None
    return re.sub(r"\bgot \w+", "got another kind", reason.partition("; ")[0])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


BLOCKS: dict[str, Callable[[], str]] = {
    "settings": lambda: table(settings_keys()),
    "distill settings": lambda: table(distill_keys()),
    "schedules": lambda: table(schedule_keys()),
    "partitions": lambda: table(partition_keys()),
    "feature shifts": lambda: table(shift_keys()),
    "adversaries": lambda: table(adversary_keys()),
    "models": model_table,
    "algorithms": algorithm_table,
    "algorithm cards": algorithm_cards,
    "directions": direction_table,
    "mechanisms": mechanism_table,
    **{f"strategy {name}": partial(_strategy_table, name) for name in STRATEGIES},
}
"""What can stand between the marks, by name."""


def rewritten(text: str) -> str:
    """Return a page with its generated tables brought up to date."""

    def fresh(block: re.Match[str]) -> str:
        start, name, end = block.groups()
        if name not in BLOCKS:
            raise ValueError(f"unknown table {name!r}; known: {', '.join(BLOCKS)}")
        return f"{start}{BLOCKS[name]()}\n{end}"

    return BLOCK.sub(fresh, text)


def main() -> int:
    """Rewrite the pages, or only check them."""
    stale = []
    for name in PAGES:
        path = DOCS / name
        old = path.read_text(encoding="utf-8")
        new = rewritten(old)
        if new != old:
            stale.append(name)
            if "--check" not in sys.argv[1:]:
                path.write_text(new, encoding="utf-8")
    sys.stdout.write("".join(f"{name}: stale\n" for name in stale) or "up to date\n")
    return int(bool(stale) and "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
