"""Settings of a run: YAML and ``key=value`` text turned once into frozen, checked objects.

Below this line code takes typed objects or plain values, never a table of text.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from fedkd.bounds import (
    LAST_SEED,
    Count,
    CountOrZero,
    Few,
    PathText,
    PositiveShare,
    Real,
    Rows,
    Seed,
    Share,
    Text,
    Whole,
    shown,
)
from fedkd.data import DataSettings
from fedkd.models import ModelSettings
from fedkd.names import check_name, nearest
from fedkd.objectives import Objective
from fedkd.training import OptimizerSettings, Passes
from sim.faults import PROCESS_FAULTS, FaultRule
from sim.hints import colon_hint, foreign_hint, section_hint, setting_hint, setting_paths
from sim.permission import (
    ALLOW_VARIABLE,
    callables_in,
    is_permitted,
    package_of,
    permitted,
    words_name,
)
from sim.tables import fill_in, read_word, read_yaml, yaml_text
from strategies import STRATEGIES
from strategies.base import StrategySettings

if TYPE_CHECKING:
    # A federated run, and every worker of it, does without the library of distillation.
    from fedkd.distillation.settings import DistillSettings

MOST_SEEDS = 1000
MOST_PROBLEMS = 5
"""So many problems of one file are told at once."""
LONGEST_LINE = 600
"""Characters of one of them."""

SettingsT = TypeVar("SettingsT", bound=BaseModel)


class SettingsError(ValueError):
    """A setting that cannot work; the text is one readable line that names it."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LocalSettings(_Section):
    """How long a client trains on its private rows in a round (``clients.local``)."""

    epochs: CountOrZero = Field(5, description="passes over the private rows")
    steps: Count | None = Field(
        None, description="optimizer steps instead of epochs; 1 exchanges at every step"
    )


class ClientsSettings(_Section):
    """Who takes part and how they learn (``clients``)."""

    count: Whole = Field(10, ge=1, le=100_000, description="registered clients")
    participation: PositiveShare = Field(1.0, description="fraction drawn each round")
    participants: Count | None = Field(None, description="number drawn each round instead")
    models: tuple[ModelSettings, ...] = Field(
        tuple(ModelSettings(name=name) for name in ("mlp", "cnn", "gru", "transformer")),
        max_length=1000,
        description="dealt out in turn: client i gets models[i % len(models)]",
    )
    batch_size: Count = Field(
        32,
        description="private rows in a step; a lone last row of a pass joins the batch before it",
    )
    optimizer: OptimizerSettings = OptimizerSettings()
    local: LocalSettings = LocalSettings()

    @field_validator("models", mode="before")
    @classmethod
    def _one_model_or_many(cls, value: object) -> object:
        if value in ([], ()):
            raise ValueError("need at least one model, got none")
        if isinstance(value, str) and "," in value:
            raise ValueError(f"several models are a list: clients.models=[{value}], got {value!r}")
        return [value] if isinstance(value, str | dict) else value

    @model_validator(mode="after")
    def _participants_exist(self) -> "ClientsSettings":
        if self.participants is not None and self.participants > self.count:
            raise ValueError(
                f"clients.participants must be at most clients.count ({self.count}), "
                f"got {self.participants}"
            )
        return self


class ExchangeSettings(_Section):
    """What is exchanged (``exchange``)."""

    rows_per_round: Rows | None = Field(
        None, description="public rows drawn anew each round; none: the whole public set"
    )


class EngineSettings(_Section):
    """What runs the clients (``engine``)."""

    backend: Literal["ray", "inline"] = Field(
        "ray", description="ray: worker processes; inline: this process, for debugging"
    )
    cpus_per_worker: Real = Field(
        1.0,
        ge=0.01,
        le=1024,
        description="workers = CPUs // this; a worker computes with one thread",
    )
    gpus_per_worker: Real = Field(
        0.0, ge=0, le=1024, description="may be a fraction; 0 trains on the CPU"
    )
    address: Text | None = Field(
        None,
        description="auto or HOST:PORT joins a running Ray cluster; none: this machine only",
    )
    vectorize: Literal["auto", "measure", "loop", "vmap"] = Field(
        "auto",
        description="loop: one client's model after the other; vmap: a cohort's models stacked; "
        "auto: by a fixed rule; measure: by timing both once in a run",
    )
    cohort_size: Whole = Field(
        32,
        ge=1,
        le=100_000,
        description="most clients of one architecture whose models are stacked",
    )
    deadline_s: Real = Field(
        3600.0,
        ge=1e-6,
        le=2_592_000,
        description="a cohort that takes longer is given up and its clients named",
    )
    retries: Whole = Field(
        2,
        ge=0,
        le=1000,
        description="how often clients whose worker died are tried again, then excluded",
    )
    quorum: Share = Field(
        0.5,
        description="fraction of the clients asked that must answer, in training and in judging",
    )
    below_quorum: Literal["retry", "skip", "abort"] = Field(
        "retry",
        description="retry: ask those who failed again, then abort; skip: leave the round out",
    )
    round_retries: Few = Field(1, description="how often a round below the quorum is asked")


class NodesSettings(_Section):
    """Clients that are nodes of Flower's own runtimes (``nodes``); ``fedkd run`` has none."""

    wait_s: Real = Field(
        120.0,
        ge=0.001,
        le=2_592_000,
        description="how long to wait for nodes that are not there: before round 1 for all "
        "clients', before a later round only while fewer than a quorum's are there",
    )
    restarted: Literal["accept", "refuse"] = Field(
        "accept",
        description="a node that was restarted has lost its client's state; accept: the client "
        "starts anew from the weights that the seed gives; refuse: it is not heard again",
    )


class EvaluationSettings(_Section):
    """When models are judged (``evaluation``)."""

    every: Count = Field(1, description="rounds between evaluations; the last is always judged")
    clients: Literal["all", "participants"] | Count = Field(
        "all",
        description="whose models: all; participants: the round's; a number: so many, drawn once",
    )

    @field_validator("clients", mode="before")
    @classmethod
    def _known_choice(cls, clients: object) -> object:
        is_number = isinstance(clients, int | float) and not isinstance(clients, bool)
        if is_number or clients in ("all", "participants"):
            return clients
        raise ValueError(f"must be all, participants or a number >= 1, got {clients!r}")


class CheckpointSettings(_Section):
    """How a run is kept so that it can be resumed (``checkpoints``); changes no result."""

    every: Count | None = Field(
        None,
        description="rounds between checkpoints; none: as often as costs at most 5 % of the time",
    )
    keep: Few = Field(2, description="checkpoints kept; an older one serves if one is bad")


class StudySettings(_Section):
    """What ``fedkd compare`` runs (``study``)."""

    arms: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        max_length=1000,
        description="by name, the settings in which an arm differs; a strategy replaces the whole",
    )
    seeds: Few = Field(3, description="paired seeds: seed, seed + 1, ...")
    baseline: Text | None = Field(
        None, description="the arm that the others are compared with; none: the first"
    )

    @field_validator("arms")
    @classmethod
    def _names_are_file_names(cls, arms: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name in arms:
            check_name(name, "the name of an arm")
        return arms


if TYPE_CHECKING:
    StrategyField = SerializeAsAny[StrategySettings]
else:
    StrategyField = Annotated[
        reduce(or_, (strategy.Settings for strategy in STRATEGIES.values())),
        Field(discriminator="name"),
    ]


class Settings(_Section):
    """Everything that decides a run. Without arguments: the digits default."""

    name: str = Field("default", description="names the folder of the run")
    seed: Seed = Field(0, description="decides every draw of the run")
    rounds: Count = Field(20, description="communication rounds")
    output: PathText = Field(Path("runs"), description="where run folders are made")
    data: DataSettings = DataSettings()
    clients: ClientsSettings = ClientsSettings()
    strategy: StrategyField = Field(STRATEGIES["dml"].Settings(name="dml"))
    exchange: ExchangeSettings = ExchangeSettings()
    engine: EngineSettings = EngineSettings()
    nodes: NodesSettings = NodesSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoints: CheckpointSettings = CheckpointSettings()
    faults: tuple[FaultRule, ...] = Field(
        (), max_length=1000, description="faults to inject, a list of rules"
    )
    study: StudySettings = StudySettings()

    @field_validator("name")
    @classmethod
    def _name_is_a_file_name(cls, name: str) -> str:
        return check_name(name, "name")

    @field_validator("strategy", mode="before")
    @classmethod
    def _known_strategy(cls, value: object) -> object:
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping):
            return value
        name = value.get("name", "dml")
        if not isinstance(name, str) or name not in STRATEGIES:
            raise ValueError(
                f"unknown strategy {shown(name)}; known: {', '.join(STRATEGIES)}"
                + nearest(str(name), STRATEGIES)
            )
        return {**value, "name": name}

    @model_validator(mode="after")
    def _sections_fit_together(self) -> "Settings":
        rows, size = self.exchange.rows_per_round, self.data.public.size
        if rows is not None and rows > size:
            raise ValueError(
                f"exchange.rows_per_round must be at most data.public.size ({size}), got {rows}"
            )
        judged, count = self.evaluation.clients, self.clients.count
        if isinstance(judged, int) and judged > count:
            raise ValueError(
                f"evaluation.clients must be at most clients.count ({count}), got {judged}"
            )
        kinds = [rule.kind for rule in self.faults if rule.kind in PROCESS_FAULTS]
        if kinds and self.engine.backend == "inline":
            raise ValueError(
                f"faults.kind {kinds[0]!r} would end this process: it needs engine.backend: ray, "
                "got inline"
            )
        return self

    def model_of(self, client: int) -> ModelSettings:
        """Return the model of one client."""
        return self.clients.models[client % len(self.clients.models)]

    @property
    def local(self) -> Passes:
        """The training on private rows in a round."""
        local = self.clients.local
        return Passes(batch_size=self.clients.batch_size, epochs=local.epochs, steps=local.steps)

    @property
    def participation(self) -> float:
        """The fraction of clients drawn each round."""
        clients = self.clients
        if clients.participants is not None:
            return clients.participants / clients.count
        return clients.participation

    def to_table(self) -> dict[str, Any]:
        """Return the settings as plain values, all defaults included."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Return the settings as YAML that `load_settings` reads back."""
        return yaml_text(self.to_table())


def check_seeds(first: int, count: int) -> None:
    """Refuse a number of paired seeds that there are not, or that nobody has the time for.

    Raises:
        SettingsError: naming what it got.
    """
    if not 1 <= count <= MOST_SEEDS:
        raise SettingsError(f"seeds must be from 1 to {MOST_SEEDS}, got {shown(count)}")
    if first + count > LAST_SEED + 1:
        raise SettingsError(
            f"seeds must end at {LAST_SEED}, got {count} of them from seed = {first} on"
        )


def load_settings(
    config: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    *,
    allow: Sequence[str] = (),
) -> Settings:
    """Read settings: defaults, then the file, then ``key=value`` overrides.

    Args:
        config: a YAML file; ``${...}`` may refer to other keys of the file.
        overrides: such as ``strategy.temperature=2`` or ``clients.models=[mlp,cnn]``. Naming
            another strategy than the file does drops the file's strategy settings.
        allow: packages, or ``package.module:callable``, whose code the file may name.

    Raises:
        SettingsError: a file that cannot be read, an unknown key, a value that cannot work, a
            callable that only the file names.
    """
    settings = read_settings(config, overrides)
    check_permission(settings, overrides, allow)
    return settings


def read_settings(
    config: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()
) -> Settings:
    """Read settings that are only looked at: what `load_settings` does without asking for leave.

    Raises:
        SettingsError: a file that cannot be read, an unknown key, a value that cannot work.
    """
    return settings_from_table(_read_table(config, overrides, _objectives_of_strategy))


def load_distill_settings(
    config: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    *,
    allow: Sequence[str] = (),
) -> "DistillSettings":
    """Read the settings of ``fedkd distill`` by the rules of `load_settings`.

    Args:
        config: a YAML file.
        overrides: such as ``student.model=cnn``. ``objective.kd.temperature=2`` changes one
            setting of the objective of the file, or of the default one; ``objective={ce: 1}``
            replaces the objective whole.
        allow: packages, or ``package.module:callable``, whose code the file may name.

    Raises:
        SettingsError: a file that cannot be read, an unknown key, a value that cannot work, a
            callable that only the file names.
    """
    from fedkd.distillation.settings import DistillSettings

    objective = DistillSettings().objective.model_dump(mode="json")
    settings = distill_settings_from_table(
        _read_table(config, overrides, lambda _: {("objective",): objective})
    )
    check_permission(settings, overrides, allow)
    return settings


def check_permission(
    settings: "Settings | DistillSettings",
    overrides: Sequence[str],
    allow: Sequence[str],
    arms: "Mapping[str, Settings] | None" = None,
) -> None:
    """Refuse callables that nobody but a file named.

    Args:
        settings: as read; arms of a study count.
        overrides: the words among them; what a word names is allowed.
        allow: packages, or ``package.module:callable``; beside those of `ALLOW_VARIABLE`.
        arms: of a study, where they are known; else those that the settings describe.

    Raises:
        SettingsError: naming the first such callable and what to add.
    """
    try:
        allowed, named = permitted(allow), words_name(overrides)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    found = list(callables_in(settings))
    if isinstance(settings, Settings):
        for name, of_arm in (_arms(settings) if arms is None else arms).items():
            found += [(f"study.arms.{name}.{where}", code) for where, code in callables_in(of_arm)]
    for where, code in found:
        if code not in named and not is_permitted(code, allowed):
            raise SettingsError(
                f"{where}: {code!r} is code that only a file names, and does not run unasked: "
                f"add --allow {package_of(code)}, name it among the words, or set "
                f"{ALLOW_VARIABLE}={package_of(code)}"
            )


def _arms(settings: Settings) -> dict[str, Settings]:
    """Return the settings of every arm of a study."""
    table = {key: value for key, value in settings.to_table().items() if key != "study"}
    arms = {}
    for name, patch in settings.study.arms.items():
        try:
            arms[name] = settings_from_table(merge_tables(table, patch))
        except SettingsError as error:
            raise SettingsError(f"study.arms.{name}: {error}") from None
    return arms


Defaults = Callable[[Mapping[str, Any]], Mapping[tuple[str, ...], Mapping[str, Any]]]
"""For settings as they were given: defaults of tables whose keys are free, by their path."""


def _read_table(
    config: str | os.PathLike[str] | None, overrides: Sequence[str], defaults: Defaults
) -> dict[str, Any]:
    """Merge file and overrides; see `_overridden`."""
    return _overridden(read_file(config), overrides, defaults)


def read_file(config: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Return what a YAML file says, with ``${...}`` left as it is; nothing where there is none."""
    try:
        return read_yaml(Path(config)) if config is not None else {}
    except ValueError as error:
        raise SettingsError(str(error)) from None


def read_over(table: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Lay words over the settings of a federated run and fill in ``${...}``.

    Raises:
        SettingsError: a word that cannot be read, or that refers to what is not there.
    """
    return _overridden(table, overrides, _objectives_of_strategy)


def _overridden(
    table: Mapping[str, Any], overrides: Sequence[str], defaults: Defaults
) -> dict[str, Any]:
    """Lay words over a table.

    Args:
        table: as a file says it.
        overrides: words.
        defaults: of tables whose keys are free, so that a word may change one of them.
    """
    try:
        words = [read_word(word) for word in overrides]
    except ValueError as error:
        raise SettingsError(str(error)) from None
    patch: dict[str, Any] = {}
    for path, value in words:
        patch = merge_tables(patch, nested_table(path, value))
    given = {path for path, _ in words}
    for place, default in defaults(merge_tables(table, patch)).items():
        changed = any(path[: len(place)] == place and path != place for path in given)
        if changed and place not in given and not _has(table, place):
            patch = merge_tables(nested_table(place, default), patch)
    for path, _ in words:
        # An objective is a sum: one that is written whole would gain the old one's terms.
        if path[-1].endswith("objective"):
            table = _without(table, path)
    try:
        return fill_in(merge_tables(table, patch))
    except ValueError as error:
        raise SettingsError(str(error)) from None


def _objectives_of_strategy(
    table: Mapping[str, Any],
) -> Mapping[tuple[str, ...], Mapping[str, Any]]:
    """Return the default objectives of the strategy that a table names."""
    strategy = named("strategy", table.get("strategy", {}))
    name = strategy.get("name") if isinstance(strategy, Mapping) else None
    if not isinstance(name, str) or name not in STRATEGIES:
        return {}
    fields = STRATEGIES[name].Settings.model_fields
    return {
        ("strategy", key): field.default.model_dump(mode="json")
        for key, field in fields.items()
        if isinstance(field.default, Objective)
    }


def _has(table: object, path: Sequence[str]) -> bool:
    for key in path:
        if not isinstance(table, Mapping) or key not in table:
            return False
        table = table[key]
    return True


def nested_table(path: Sequence[str], value: Any) -> dict[str, Any]:
    """Return a table that holds one value, at a path of at least one key."""
    table: dict[str, Any] = reduce(lambda inner, key: {key: inner}, reversed(path), value)
    return table


def _without(table: Mapping[str, Any], path: Sequence[str]) -> dict[str, Any]:
    key, *rest = path
    if not rest:
        return {name: value for name, value in table.items() if name != key}
    inner = table.get(key)
    return {**table, key: _without(inner, rest)} if isinstance(inner, Mapping) else dict(table)


def merge_tables(
    table: Mapping[str, Any], patch: Mapping[str, Any], *, nested: bool = False
) -> dict[str, Any]:
    """Lay one table over another, key by key.

    A nested table that says what it is (a ``name`` or ``kind``: a strategy, an optimizer, a
    schedule) and says something else than the old one replaces it whole: the old one's other
    keys meant something for the old one only.
    """
    kinds = [key for key in ("name", "kind") if key in table and key in patch]
    if nested and any(table[key] != patch[key] for key in kinds):
        return dict(patch)
    merged = dict(table)
    for key, value in patch.items():
        old = merged.get(key)
        if isinstance(value, Mapping):
            old = named(key, old)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            merged[key] = merge_tables(old, value, nested=True)
        else:
            merged[key] = value
    return merged


NAMED = ("strategy", "method", "model", "meme")
"""Sections that may be written as their name alone."""


def named(key: str, value: Any) -> Any:
    """Return a section that was written as its name alone as a table, which can be added to."""
    return {"name": value} if key in NAMED and isinstance(value, str) else value


def settings_from_table(table: Mapping[str, Any]) -> Settings:
    """Check plain values and return the settings.

    Raises:
        SettingsError: names the first setting that cannot work.
    """
    return _checked(Settings, table)


def distill_settings_from_table(table: Mapping[str, Any]) -> "DistillSettings":
    """Check plain values and return the settings of a distillation.

    Raises:
        SettingsError: names the first setting that cannot work.
    """
    from fedkd.distillation.settings import DistillSettings

    return _checked(DistillSettings, table)


def _checked(kind: type[SettingsT], table: Mapping[str, Any]) -> SettingsT:
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        raise SettingsError("; ".join(_readable(kind, error))) from None


def _readable(kind: type[BaseModel], error: ValidationError) -> list[str]:
    """One line for each problem: the setting, what is wrong, the value it got."""
    lines = []
    problems = _without_echoes(error.errors(include_url=False, include_context=False))
    unknown = [str(each["loc"][0]) for each in problems if _is_unknown_outermost(each)]
    if foreign := foreign_hint(kind, unknown, _commands()):
        return [foreign]
    for problem in problems[:MOST_PROBLEMS]:
        path, known = _place(kind, problem["loc"])
        where = ".".join(path)
        message = " ".join(problem["msg"].removeprefix("Value error, ").split())
        message = message.replace("Input should be", "must be")
        if problem["type"] == "extra_forbidden":
            known_there = f"; known there: {', '.join(known)}" if known else ""
            hint = setting_hint(kind, path, problem["input"])
            lines.append(f"unknown setting {where!r}{hint or known_there}")
        elif problem["type"] == "model_type":
            keys = ", ".join(_keys(kind, path))
            hint = section_hint(where, problem["input"]) or f"; known there: {keys}"
            lines.append(f"{where} is a section of settings, got {shown(problem['input'])}{hint}")
        elif problem["type"] == "value_error" or "got " in message:
            # A check of several settings names them itself; one of a single value does not.
            if len(path) > 1 and message.startswith(f"{path[-1]}."):
                message = ".".join([*path[:-1], message])
            message += colon_hint(problem["input"])
            lines.append(message if message.startswith(where) else f"{where}: {message}")
        else:
            message += f", got {shown(problem['input'])}{colon_hint(problem['input'])}"
            lines.append(f"{where}: {message[0].lower()}{message[1:]}")
    if len(problems) > MOST_PROBLEMS:
        lines.append(f"and {len(problems) - MOST_PROBLEMS} more")
    return [line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..." for line in lines]


def _without_echoes(problems: Sequence[Any]) -> list[Any]:
    """Leave out that a list is too short where it is so only because of an item refused."""
    return [
        each
        for each in problems
        if each["type"] != "too_short"
        or not any(_lies_in(each["loc"], other["loc"]) for other in problems)
    ]


def _lies_in(outer: Sequence[object], inner: Sequence[object]) -> bool:
    return len(inner) > len(outer) and inner[: len(outer)] == outer


def _commands() -> Mapping[str, type[BaseModel]]:
    """Return which command takes which settings."""
    from fedkd.distillation.settings import DistillSettings

    return {"fedkd run or fedkd compare": Settings, "fedkd distill": DistillSettings}


def _is_unknown_outermost(problem: Any) -> bool:
    return problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1


def _keys(kind: type[BaseModel], path: Sequence[str]) -> list[str]:
    """Return the settings of a section."""
    prefix = ".".join(path) + "."
    names = [name.removeprefix(prefix) for name in setting_paths(kind) if name.startswith(prefix)]
    return [name for name in names if "." not in name]


def _place(kind: type[BaseModel], location: Sequence[str | int]) -> tuple[list[str], list[str]]:
    """Return where a problem is, and the keys that are known beside it.

    There are none where several kinds of section fit.
    """
    path: list[str] = []
    sections = [kind]
    beside: list[type[BaseModel]] = []
    for part in location:
        named = [section for section in sections if _tag(section) == part]
        if named and not any(part in section.model_fields for section in sections):
            # The name by which one of several kinds of section was chosen is no key.
            sections = named
            continue
        path.append(str(part))
        beside = sections
        if not isinstance(part, int):
            field = sections[0].model_fields.get(part) if len(sections) == 1 else None
            sections = _models_in(field.annotation) if field is not None else []
    return path, list(beside[0].model_fields) if len(beside) == 1 else []


def _tag(section: type[BaseModel]) -> str | None:
    field = section.model_fields.get("name")
    names = get_args(field.annotation) if field is not None else ()
    return names[0] if len(names) == 1 and isinstance(names[0], str) else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]
