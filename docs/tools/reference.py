"""The reference: every public name, with its signature and docstring, as pages of the site.

``python docs/tools/reference.py`` names what is public and not documented, and ends with exit
status 1 where there is something. The code is read, not imported.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import griffe

ROOT = Path(__file__).parents[2]
FLOORS = ("fedkd", "strategies", "sim")


class Room(NamedTuple):
    """One page.

    Attributes:
        title: of the page.
        modules: whose public names stand on it, in this order.
        about: what comes before them, beside the first module's docstring.
    """

    title: str
    modules: tuple[str, ...]
    about: str = ""


ROOMS: dict[str, dict[str, Room]] = {
    "Commands": {
        "commands": Room("fedkd", ("fedkd",), "Every command is a function."),
        "settings": Room("Settings", ("sim.settings",)),
        "reports": Room("Reports", ("sim.reports",)),
        "observers": Room("Observers of a run", ("sim.server.observers",)),
        "trackers": Room("Trackers", ("sim.trackers",)),
    },
    "What is learnt": {
        "losses": Room("Losses", ("fedkd.losses",)),
        "targets": Room("Targets", ("fedkd.targets",)),
        "mutual": Room("Rules of mutual learning", ("fedkd.mutual",)),
        "objectives": Room("Objectives", ("fedkd.objectives",)),
        "schedules": Room("Schedules", ("fedkd.schedules",)),
        "closed_forms": Room("Closed forms", ("fedkd.closed_forms",)),
    },
    "What is measured": {
        "metrics": Room("Metrics", ("fedkd.metrics",)),
        "figures": Room("Figures", ("fedkd.figures",)),
    },
    "Data and models": {
        "data": Room("Data", ("fedkd.data", "fedkd.data.partitions")),
        "models": Room("Models", ("fedkd.models",)),
        "training": Room("Training", ("fedkd.training",)),
        "trained": Room("Trained models", ("fedkd.trained",)),
        "compression": Room("Compression", ("fedkd.compression",)),
        "distillation": Room("Distillation methods", ("fedkd.distillation.methods",)),
    },
    "What travels": {
        "payloads": Room(
            "Payloads",
            ("fedkd.exchange.payload", "fedkd.exchange.values", "fedkd.exchange.payloads"),
        ),
        "codecs": Room("Codecs", ("fedkd.exchange.codecs",)),
        "pipeline": Room("The pipeline", ("fedkd.exchange.pipeline",)),
        "adversaries": Room("Adversaries", ("fedkd.exchange.adversaries",)),
    },
    "Privacy": {
        "privacy": Room("Accounting", ("fedkd.privacy",)),
        "mechanisms": Room("Mechanisms", ("fedkd.exchange.mechanisms",)),
        "attacks": Room("Attacks", ("fedkd.privacy.attacks",)),
    },
    "Algorithms of your own": {
        "strategies": Room("The table of algorithms", ("strategies",)),
        "contract": Room("The contract", ("strategies.contract", "sim.contract")),
    },
}
"""The pages by group and file name."""

WITHOUT_PAGE = {"sim", "sim.commands.cli", "sim.reports.html"}
"""Packages that offer what ``fedkd`` offers, or offer it to other code of ours alone."""


LONGEST_VALUE = 60
"""Characters of a constant that is shown with its value."""


class Name(NamedTuple):
    """A public name.

    Attributes:
        path: what one imports, such as ``fedkd.targets.entropy``.
        found: where it is defined; none where it is nowhere.
    """

    path: str
    found: griffe.Object | None


@cache
def floors() -> Mapping[str, griffe.Module]:
    """Return the packages, read."""
    loader = griffe.GriffeLoader(search_paths=[str(ROOT)], docstring_parser=griffe.Parser.google)
    read = {name: loader.load(name) for name in FLOORS}
    return {name: module for name, module in read.items() if isinstance(module, griffe.Module)}


def module_of(path: str) -> griffe.Module:
    """Return a module by its dotted path."""
    root, _, rest = path.partition(".")
    found = floors()[root][rest] if rest else floors()[root]
    if not isinstance(found, griffe.Module):
        raise TypeError(f"{path} is no module")
    return found


def public_names(path: str) -> Iterator[Name]:
    """Return what a module offers: ``__all__``, else what it or its modules define."""
    module = module_of(path)
    if module.exports is not None:
        for name in map(str, module.exports):
            yield Name(f"{path}.{name}", _definition(module, name))
        return
    for name, member in module.members.items():
        if member.is_alias or name.startswith("_") or isinstance(member, griffe.Module):
            continue
        if isinstance(member, griffe.Object) and not _is_trivial(member):
            yield Name(f"{path}.{name}", member)
    for name, member in sorted(module.members.items()):
        if isinstance(member, griffe.Module) and not member.is_init_module:
            yield from public_names(f"{path}.{name}")


def _is_trivial(member: griffe.Object) -> bool:
    """Whether a module without ``__all__`` has a name for itself: a constant that says nothing."""
    return member.is_attribute and member.docstring is None


def _definition(module: griffe.Module, name: str) -> griffe.Object | None:
    member = module.members.get(name)
    if member is None:
        return None
    if isinstance(member, griffe.Alias):
        try:
            target = member.final_target
        except griffe.AliasResolutionError:
            return None
        return target if isinstance(target, griffe.Object) else None
    return member if isinstance(member, griffe.Object) else None


def packages() -> Iterator[str]:
    """Return every package that says what it offers."""

    def walk(module: griffe.Module) -> Iterator[griffe.Module]:
        yield module
        for member in module.members.values():
            if isinstance(member, griffe.Module):
                yield from walk(member)

    for floor in floors().values():
        for module in walk(floor):
            if module.is_init_module and module.exports:
                yield module.path


def rooms() -> Iterator[tuple[str, str, Room]]:
    """Return group, file name and page."""
    return ((group, name, room) for group, of in ROOMS.items() for name, room in of.items())


@cache
def anchors() -> Mapping[str, str]:
    """Return where each name stands, by each way to write it: ``page.md#anchor``."""
    found: dict[str, str] = {}
    for _, page, room in rooms():
        for module in room.modules:
            for path, definition in public_names(module):
                where = f"{page}.md#{path}"
                short = path.rpartition(".")[2]
                own = () if definition is None else (definition.path,)
                for name in (path, *own, short):
                    found.setdefault(name, where)
    return found


def problems() -> list[str]:
    """Return what is public and stands nowhere or says nothing, one line each."""
    told = []
    shown = {module for _, _, room in rooms() for module in room.modules}
    for package in packages():
        if package not in shown | WITHOUT_PAGE:
            told.append(f"{package} offers names and is on no page: add it to ROOMS")
    for module in sorted(shown):
        for path, found in public_names(module):
            if found is None:
                told.append(f"{path} is offered and defined nowhere")
            else:
                told += [f"{path} {what}" for what in _missing(found)]
    return told


def _missing(found: griffe.Object) -> Iterator[str]:
    text = found.docstring
    if text is None or not text.value.strip():
        yield "has no docstring"
        return
    if isinstance(found, griffe.Function):
        told = {
            argument.name.lstrip("*")
            for section in text.parsed
            if section.kind is griffe.DocstringSectionKind.parameters
            for argument in section.value
        }
        has = {each.name for each in found.parameters} - {"self", "cls"}
        if told and told != has:
            yield f"describes other arguments than it has: {', '.join(sorted(told ^ has))}"


def pages() -> Iterator[tuple[str, str, str]]:
    """Return group, file name and text of each page."""
    for group, name, room in rooms():
        yield group, name, _page(room)


def _page(room: Room) -> str:
    docstring = module_of(room.modules[0]).docstring
    parts = [f"# {room.title}"]
    parts += [room.about] if room.about else []
    parts += [_prose(docstring.value)] if docstring else []
    for module in room.modules:
        if len(room.modules) > 1:
            parts.append(f"## {module}")
        # A room without `__all__` is read module by module.
        last = None
        for name in public_names(module):
            home = name.path.rpartition(".")[0]
            if home not in (last, module):
                of_home = module_of(home).docstring
                parts.append(f"## {home}")
                parts += [_prose(of_home.value)] if of_home else []
            last = home
            if name.found is not None:
                parts.append(_entry(name.path, name.found))
    return "\n\n".join(parts) + "\n"


def _entry(path: str, found: griffe.Object) -> str:
    short = path.rpartition(".")[2]
    parts = [f'### `{short}` {{ #{path} data-toc-label="{short}" }}', _signature(short, found)]
    parts += list(_sections(found))
    if isinstance(found, griffe.Class):
        parts += list(_methods(path, found))
    parts.append(f"`{found.relative_package_filepath}`{{ .where }}")
    return "\n\n".join(parts)


def _methods(path: str, found: griffe.Class) -> Iterator[str]:
    for name, member in found.members.items():
        if name.startswith("_") or member.is_alias or not isinstance(member, griffe.Object):
            continue
        is_property = member.is_attribute and "property" in member.labels
        if member.docstring is None or not (member.is_function or is_property):
            continue
        yield f'#### `{name}` {{ #{path}.{name} data-toc-label="{name}" }}'
        yield _signature(name, member)
        yield from _sections(member)


def _signature(name: str, found: griffe.Object) -> str:
    if isinstance(found, griffe.Function):
        code = _call(f"def {name}", found.parameters, found.returns)
    elif isinstance(found, griffe.Class):
        bases = ", ".join(str(base) for base in found.bases)
        code = f"class {name}({bases})" if bases else f"class {name}"
    elif isinstance(found, griffe.Attribute):
        kind = f": {found.annotation}" if found.annotation is not None else ""
        value = str(found.value) if found.value is not None else ""
        short = (
            f" = {value}" if value and len(value) <= 60 and "property" not in found.labels else ""
        )
        code = f"{name}{kind}{short}"
    else:
        code = name
    return f"```python\n{code}\n```"


def _call(start: str, parameters: griffe.Parameters, returns: object) -> str:
    words = []
    kinds = [each.kind for each in parameters]
    keyword_only = griffe.ParameterKind.keyword_only
    for index, each in enumerate(parameters):
        if each.name in ("self", "cls"):
            continue
        stars = {
            griffe.ParameterKind.var_positional: "*",
            griffe.ParameterKind.var_keyword: "**",
        }.get(each.kind or keyword_only, "")
        if each.kind is keyword_only and not {
            keyword_only,
            griffe.ParameterKind.var_positional,
        } & {*kinds[:index]}:
            words.append("*")
        word = f"{stars}{each.name}"
        word += f": {each.annotation}" if each.annotation is not None else ""
        if each.default is not None and not stars:
            word += f" = {each.default}" if each.annotation is not None else f"={each.default}"
        words.append(word)
    end = f") -> {returns}" if returns is not None else ")"
    line = f"{start}({', '.join(words)}{end}"
    if len(line) <= 80:
        return line
    return f"{start}(\n" + "".join(f"    {word},\n" for word in words) + end


def _sections(found: griffe.Object) -> Iterator[str]:
    if found.docstring is None:
        return
    kinds = griffe.DocstringSectionKind
    for section in found.docstring.parsed:
        value = section.value
        if section.kind is kinds.text:
            yield _prose(value)
        elif section.kind in (kinds.parameters, kinds.other_parameters):
            yield _listed("Arguments", [(each.name, each.description) for each in value])
        elif section.kind is kinds.attributes:
            yield _listed("Attributes", [(each.name, each.description) for each in value])
        elif section.kind in (kinds.raises, kinds.warns):
            title = "Raises" if section.kind is kinds.raises else "Warns"
            yield _listed(title, [(str(each.annotation), each.description) for each in value])
        elif section.kind in (kinds.returns, kinds.yields):
            title = "Returns" if section.kind is kinds.returns else "Yields"
            text = "\n".join(_returned(found, each) for each in value)
            yield f"**{title}**{{ .part }}\n\n{_prose(text)}"
        elif section.kind is kinds.examples:
            yield "**Example**{ .part }"
            for kind, text in value:
                yield f"```pycon\n{text}\n```" if kind is kinds.examples else _prose(text)
        elif section.kind is kinds.admonition:
            yield f"**{section.title}**{{ .part }}\n\n{_prose(value.description)}"
        else:
            raise ValueError(f"{found.path}: a section {section.kind.value!r}")


def _returned(found: griffe.Object, told: griffe.DocstringReturn) -> str:
    """Return the sentence: types stand in signatures, so a word before a colon is part of it."""
    types = found.returns if isinstance(found, griffe.Function) else found.annotation
    word = "" if str(told.annotation) == str(types) else f"{told.annotation}: "
    return word + told.description


def _listed(title: str, items: Sequence[tuple[str, str]]) -> str:
    lines = [
        f"- `{name}`: {_prose(text).replace(chr(10), chr(10) + '    ')}" for name, text in items
    ]
    return f"**{title}**{{ .part }}\n\n" + "\n".join(lines)


def _prose(text: str) -> str:
    """Return a docstring's text as Markdown: literal blocks, and links to names."""
    text = re.sub(r"::(?=\n)", ":", text)

    def linked(code: re.Match[str]) -> str:
        where = anchors().get(code[1]) or anchors().get(code[1].rpartition(".")[2])
        whole = "." in code[1] or code[1][:1].isupper() or "_" in code[1]
        return f"[`{code[1]}`]({where})" if where and whole else code[0]

    return re.sub(r"(?<!`)`([A-Za-z_][\w.]*)`(?!`)", linked, text)


def main() -> int:
    """Say what is missing."""
    told = problems()
    for line in told:
        print(line)
    return int(bool(told))


if __name__ == "__main__":
    sys.exit(main())
