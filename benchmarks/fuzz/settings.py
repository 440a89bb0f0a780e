"""Invalid settings, made from the settings' own types, as words, as files and as whole commands.

Each value is invalid by construction: of a wrong type, beyond a bound that the type states, not a
choice, an unknown key, text that is no YAML, references that lead nowhere, on and on or into the
environment, code that nobody allowed.
"""

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import numpy as np
import yaml
from harness import PATIENCE_S, Case
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedkd.distillation.methods import METHODS
from fedkd.distillation.settings import DistillSettings
from fedkd.models import ModelSettings
from fedkd.objectives import Objective
from fedkd.objectives.table import TERMS
from fedkd.schedules import Between, ConstantSchedule
from sim.settings import Settings, SettingsError, load_distill_settings, load_settings
from sim.settings.tables import yaml_text
from strategies import STRATEGIES

Load = Callable[..., object]

SECRET = "hush-hush-6f1c"  # noqa: S105 - bait
"""Stands in the environment, and must stand nowhere else."""

COMMAND_SHARE = 0.01
"""Of all cases: tried as whole commands, which take seconds each."""


class Leaf(NamedTuple):
    """A setting that is no section: who reads it, where it stands, what it takes."""

    load: Load
    path: tuple[str, ...]
    annotation: Any
    metadata: tuple[Any, ...]
    around: dict[str, Any]
    """The table that it stands in, by the path's first part, where that needs a name."""

    @property
    def name(self) -> str:
        return ".".join(self.path)


def leaves() -> list[Leaf]:
    """Return every setting of both commands, with those of strategies, methods and terms."""
    found = [
        *_leaves(load_settings, Settings, (), {}),
        *_leaves(load_distill_settings, DistillSettings, (), {}),
    ]
    for name, strategy in STRATEGIES.items():
        around = {"strategy": {"name": name}}
        found += _leaves(load_settings, strategy.Settings, ("strategy",), around)
    for name, method in METHODS.items():
        around = {"method": {"name": name}}
        found += _leaves(load_distill_settings, method.Settings, ("method",), around)
    for name, term in TERMS.items():
        around = {"objective": {name: {}}}
        found += _leaves(load_distill_settings, term, ("objective", name), around)
    return [leaf for leaf in found if leaf.path[-1] not in ("kind", "name")]


def _leaves(
    load: Load, model: type[BaseModel], path: tuple[str, ...], around: dict[str, Any]
) -> Iterator[Leaf]:
    for name, field in model.model_fields.items():
        here = (*path, name)
        if here in (("strategy",), ("method",)):
            continue
        section = next(iter(_sections(field.annotation)), None)
        if section is not None:
            yield from _leaves(load, section, here, around)
        elif field.annotation is not Objective:
            yield Leaf(load, here, field.annotation, tuple(field.metadata), around)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """Return the section that a field is, if it is one; lists and schedules are leaves."""
    if get_origin(annotation) in (Union, UnionType):
        parts = [part for part in get_args(annotation) if part is not NoneType]
        return _sections(parts[0]) if len(parts) == 1 else []
    plain = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return [annotation] if plain and annotation not in (ModelSettings, Objective) else []


# --- values that a type refuses ---------------------------------------------------------------

ODD_TEXT = ("", "a\0b", "a\x1b[31mb", "a\nb", "x" * 5000, "caf\udce9", "\u2028")
HUGE = (10**20, -(10**20), 2**63, 1e30, -1e30, 1e300)


def wrong_values(leaf: Leaf, rng: np.random.Generator) -> Any:
    """Return one value that the setting cannot take."""
    kinds = set(_kinds(leaf.annotation))
    nonsense: list[Any] = [[[1]], {"no": {"such": 1}}, *HUGE, float("inf"), float("nan")]
    if kinds & {"int", "float", "schedule"} and not kinds & {"text"}:
        nonsense += ["12:30", "three", True, "0x10", *_beyond(leaf)]
    if "int" in kinds and "float" not in kinds and "schedule" not in kinds:
        nonsense += [2.5, 1e17]
    if kinds <= {"float", "none", "int"} or kinds == {"schedule"}:
        nonsense += [1e-300] if _lowest(leaf) not in (0, None) and _lowest(leaf) > 0 else []
    if kinds <= {"choice", "none"}:
        nonsense += ["no such", 7, True, ["a"], "a\0b"]
    if kinds <= {"bool", "none"}:
        nonsense += ["maybe", 7, [True], 2.5]
    if kinds & {"text", "path"}:
        nonsense += [*ODD_TEXT[1:], True, 7, ["a", ["b"]]]
    if "none" not in kinds:
        nonsense += [None]
    return nonsense[rng.integers(len(nonsense))]


def _kinds(annotation: Any) -> Iterator[str]:
    simple = {int: "int", float: "float", bool: "bool", str: "text", Path: "path", NoneType: "none"}
    if annotation in simple:
        yield simple[annotation]
    elif get_origin(annotation) is Literal:
        yield "choice"
    elif hasattr(annotation, "__metadata__") or get_origin(annotation) in (Union, UnionType):
        parts = get_args(annotation)
        for part in parts[:1] if hasattr(annotation, "__metadata__") else parts:
            yield from _kinds(part)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield "schedule" if annotation.__module__ == ConstantSchedule.__module__ else "section"
    else:
        yield "list" if get_origin(annotation) in (tuple, list) else "table"


def _constraints(leaf: Leaf) -> Iterator[Any]:
    def within(annotation: Any) -> Iterator[Any]:
        for given in getattr(annotation, "__metadata__", ()):
            yield from given.metadata if isinstance(given, FieldInfo) else [given]
        if get_origin(annotation) is not Literal:
            for part in get_args(annotation):
                if part not in (int, float, NoneType):
                    yield from within(part)

    yield from leaf.metadata
    yield from within(leaf.annotation)


def _beyond(leaf: Leaf) -> list[float]:
    """Return numbers just outside the bounds that the type states, and far outside."""
    values: list[float] = []
    for part in _constraints(leaf):
        between = getattr(part, "func", None)
        if isinstance(between, Between):
            values += [between.high * 1.01 + 1, between.low - 0.001, -between.high - 1]
        values += [part.ge - 1] if hasattr(part, "ge") else []
        values += [part.le + 1] if hasattr(part, "le") else []
        values += [part.lt] if hasattr(part, "lt") else []
    return values


def _lowest(leaf: Leaf) -> float | None:
    lows = [
        part.func.low if isinstance(getattr(part, "func", None), Between) else part.ge
        for part in _constraints(leaf)
        if hasattr(part, "ge") or isinstance(getattr(part, "func", None), Between)
    ]
    return max(lows, default=None)


# --- cases --------------------------------------------------------------------------------------


def refused(load: Load, *arguments: Any, naming: str = "") -> str:
    """Load settings that nobody should accept; return what is wrong with the answer."""
    try:
        accepted = load(*arguments)
    except SettingsError as error:
        return judged(str(error), naming)
    return f"accepted: {str(accepted)[:200]}"


def judged(line: str, naming: str) -> str:
    """Return what is wrong with a message; "" if nothing is."""
    if len(line.splitlines()) != 1 or not line.isprintable():
        return f"not one line: {line[:300]!r}"
    if len(line) > 4000:
        return f"{len(line)} characters: {line[:100]!r}"
    if SECRET in line:
        return f"tells a secret: {line!r}"
    if naming and naming.lower() not in line.lower():
        return f"does not name {naming!r}: {line[:300]!r}"
    return ""


def nested(path: tuple[str, ...], value: Any, around: dict[str, Any]) -> dict[str, Any]:
    """Return a table with one setting, beside what its section needs."""
    table = deepcopy(around)
    inner = table
    for part in path[:-1]:
        inner = inner.setdefault(part, {})
    inner[path[-1]] = value
    return table


def cases(rng: np.random.Generator, count: int, folder: Path) -> Iterator[Case]:
    """Yield so many cases."""
    os.environ["FEDKD_FUZZ_SECRET"] = SECRET
    known = leaves()
    makers = {
        "a value of a known setting, in a file": (0.4, partial(_value_in_file, known)),
        "a value of a known setting, as a word": (0.24, partial(_value_as_word, known)),
        "an unknown key": (0.08, partial(_unknown_key, known)),
        "text that is no settings file": (0.08, _broken_file),
        "references and aliases": (0.08, _references),
        "lists and tables for names": (0.06, _names),
        "code that nobody allowed": (0.05, _code),
        "a whole command": (COMMAND_SHARE, partial(_command, known)),
    }
    shares = np.array([share for share, _ in makers.values()])
    kinds = rng.choice(len(makers), size=count, p=shares / shares.sum())
    for number, kind in enumerate(kinds):
        name, (_, make) = list(makers.items())[kind]
        text, attempt = make(rng, folder / f"{number}.yaml")
        yield Case(name, text, attempt)


Made = tuple[str, Callable[[], str]]


def _drawn(known: list[Leaf], rng: np.random.Generator) -> tuple[Leaf, Any]:
    leaf = known[rng.integers(len(known))]
    return leaf, wrong_values(leaf, rng)


def _value_in_file(known: list[Leaf], rng: np.random.Generator, path: Path) -> Made:
    leaf, value = _drawn(known, rng)
    try:
        path.write_text(yaml_text(nested(leaf.path, value, leaf.around)), encoding="utf-8")
    except UnicodeEncodeError:
        # A name of a file in an encoding of long ago; YAML has no way to write it.
        path.write_bytes(b"name: caf\xe9\n")
        return str(path.read_bytes()), partial(refused, leaf.load, path, naming="config")
    return path.read_text(), partial(refused, leaf.load, path, naming=leaf.path[-1])


def _value_as_word(known: list[Leaf], rng: np.random.Generator, _: Path) -> Made:
    leaf, value = _drawn(known, rng)
    text = yaml_text({"v": value}).removeprefix("v:").strip()
    if isinstance(value, dict | list):
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
    words = [f"{key}={_flow(table)}" for key, table in leaf.around.items()]
    words.append(f"{leaf.name}={text}")
    return " ".join(words), partial(refused, leaf.load, None, words, naming=leaf.path[-1])


def _flow(value: Any) -> str:

    return yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()


def _unknown_key(known: list[Leaf], rng: np.random.Generator, _: Path) -> Made:
    leaf = known[rng.integers(len(known))]
    letters = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz_"), size=rng.integers(1, 12)))
    # No setting ends in this, whatever the letters are.
    key = (*leaf.path[:-1], f"{letters}_qq")
    words = [f"{name}={_flow(table)}" for name, table in leaf.around.items()]
    word = f"{'.'.join(key)}=1"
    return word, partial(refused, leaf.load, None, [*words, word], naming=key[-1])


def _broken_file(rng: np.random.Generator, path: Path) -> Made:
    texts: list[bytes] = [
        b"[" * 100_000,
        b"{a: " * 50_000,
        b"- " * 50_000,
        b"rounds: " + b"9" * 5000,
        b"rounds: 0x" + b"f" * 5000,
        b"rounds: 1\nrounds: 2\n",
        b"? [a, b]\n: 1\n",
        b"a: [1\n",
        b"\t- a",
        b"a: &a [*a]\n",
        b"rounds: !!python/object/apply:os.system ['true']\n",
        b"rounds: !!binary aGk=\n",
        b"rounds: !!timestamp 2026-01-01\n",
        b"clients: !!set {a, b}\n",
        b"<<: {rounds: 3}\n",
        b"- 1\n",
        b"just text\n",
        b"rounds: 3\n---\nrounds: 4\n",
        b"%YAML 9.9\n---\nrounds: 3\n",
        b"name: caf\xe9\n",
        b"\xff\xfe\x00",
        b"rounds: \x00\n",
        b'name: "a\\0b"\n',
        b"a: " + b"x" * 600_000,
        b"#" * 600_000,
        b"rounds: @\n",
        b"clients: *nobody\n",
    ]
    if rng.random() < 0.5:
        # A valid file, cut or with a byte flipped to what YAML never takes.
        text = bytearray(Settings().to_yaml().encode())
        text[rng.integers(len(text))] = int(rng.choice([0x00, 0x07, 0x1B, 0xFF, 0xC3]))
        content = bytes(text)
    else:
        content = texts[rng.integers(len(texts))]
    path.write_bytes(content)
    return repr(content[:200]), partial(refused, load_settings, path)


def _references(rng: np.random.Generator, path: Path) -> Made:
    depth = int(rng.integers(20, 200))
    chain = "\n".join(f"k{i}: '${{k{i + 1}}}${{k{i + 1}}}'" for i in range(depth))
    lists = "\n".join(f"k{i}: ['${{k{i + 1}}}', '${{k{i + 1}}}']" for i in range(depth))
    tables = "\n".join(f"k{i}: {{a: '${{k{i + 1}}}', b: '${{k{i + 1}}}'}}" for i in range(depth))
    aliases = "\n".join(
        [
            "a0: &a0 [x, x]",
            *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, depth)),
        ]
    )
    texts = [
        *(f"{bomb}\nk{depth}: lol" for bomb in (chain, lists, tables)),
        aliases,
        "name: ${name}",
        "name: ${seed}\nseed: ${rounds}\nrounds: ${name}",
        "clients: {count: '${clients}'}",
        "name: ${no.such}",
        "name: ${" * 1000,
        "name: '${" + "a." * 2000 + "}'",
        "name: ${${name}}",
        *(
            f"{key}: '${{{resolver}}}'"
            for key in ("name", "output", "data: {source", "rounds")
            for resolver in (
                "oc.env:FEDKD_FUZZ_SECRET",
                "oc.env:FEDKD_FUZZ_SECRET,x",
                "oc.decode:${oc.env:FEDKD_FUZZ_SECRET}",
                "oc.create:{a: 1}",
                "env:FEDKD_FUZZ_SECRET",
                "FEDKD_FUZZ_SECRET",
            )
            if "{" not in key
        ),
    ]
    text = texts[rng.integers(len(texts))]
    path.write_text(text)
    return text[:300], partial(refused, load_settings, path)


def _names(rng: np.random.Generator, _: Path) -> Made:
    federated = (
        "strategy",
        "strategy.name",
        "clients.models.name",
        "clients.optimizer.name",
        "data.partition.kind",
        "engine.backend",
        "name",
        "study.arms",
        "faults",
        "strategy.temperature.kind",
    )
    distilled = (
        "method",
        "method.name",
        "teacher.models.name",
        "student.model",
        "student.model.name",
        "objective",
        "objective.kd.kind",
        "objective.kd.weight.kind",
        "teacher.tasks",
        "name",
    )
    values = (
        "[a]",
        "{a: b}",
        "[[a]]",
        "7",
        "true",
        "1.5",
        "[null]",
        "{name: [a]}",
        "no such",
        "a:b c",
    )
    load, keys = [(load_settings, federated), (load_distill_settings, distilled)][rng.integers(2)]
    word = f"{keys[rng.integers(len(keys))]}={values[rng.integers(len(values))]}"
    if word in ("objective={a: b}", "name=7", "name=1.5"):
        word = "name=[a]"
    naming = word.split("=", 1)[0].split(".")[0].rstrip("s")
    return word, partial(refused, load, None, [word], naming=naming)


def _code(rng: np.random.Generator, path: Path) -> Made:
    name = str(
        rng.choice(["mine:net", "a.b.c:d.e", "torch.hub:load", "os:system", "builtins:eval"])
    )
    options = str(rng.choice(["{}", "{a: 1}", "{repo_or_dir: x, model: y}"]))
    model = f"{{name: '{name}', options: {options}}}"
    load, text = [
        (load_settings, f"clients: {{models: {model}}}"),
        (load_settings, f"clients: {{models: [mlp, {model}]}}"),
        (load_settings, f"strategy: {{name: one_way, model: {model}}}"),
        (load_settings, f"strategy: {{name: fml, meme: {model}}}"),
        (load_settings, f"study: {{arms: {{a: {{clients: {{models: {model}}}}}}}}}"),
        (load_distill_settings, f"teacher: {{models: {model}}}"),
        (load_distill_settings, f"student: {{model: {model}}}"),
        (load_distill_settings, f"method: {{name: dml, models: [{model}, mlp]}}"),
    ][rng.integers(8)]
    path.write_text(text)
    return text, partial(refused, load, path, naming=name)


def _command(known: list[Leaf], rng: np.random.Generator, path: Path) -> Made:
    leaf, value = _drawn([leaf for leaf in known if leaf.load is load_settings], rng)
    try:
        path.write_text(yaml_text(nested(leaf.path, value, leaf.around)), encoding="utf-8")
    except UnicodeEncodeError:
        path.write_bytes(b"name: caf\xe9\n")
    name = str(rng.choice(["run", "compare", "data"]))
    command = [sys.executable, "-m", "fedkd", name, str(path)]
    return f"fedkd {name} {path.read_bytes()!r}", partial(_run, command, path.parent)


def _run(command: list[str], folder: Path) -> str:
    before = set(folder.iterdir())
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=100, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    if seconds > PATIENCE_S:
        return f"{seconds:.1f} s of computing"
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode != 2:
        return f"exit status {done.returncode}: {said[-300:]}"
    if set(folder.iterdir()) != before:
        return "left something behind"
    return judged(said, "")
