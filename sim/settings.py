"""Settings of a run: YAML and ``key=value`` text turned once into frozen, checked objects.

Below this line code takes typed objects or plain values, never a table of text.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from fedkd.data import DataSettings
from fedkd.models import ModelSettings
from fedkd.names import check_name
from fedkd.objectives import Objective
from fedkd.training import OptimizerSettings, Passes
from sim.faults import PROCESS_FAULTS, FaultRule
from sim.hints import colon_hint, foreign_hint, section_hint, setting_hint, setting_paths
from strategies import STRATEGIES
from strategies.base import StrategySettings

if TYPE_CHECKING:
    # A federated run, and every worker of it, does without the library of distillation.
    from fedkd.distillation.settings import DistillSettings

SettingsT = TypeVar("SettingsT", bound=BaseModel)


class SettingsError(ValueError):
    """A setting that cannot work; the text is one readable line that names it."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LocalSettings(_Section):
    """How long a client trains on its private rows in a round (``clients.local``)."""

    epochs: int = Field(5, ge=0, description="passes over the private rows")
    steps: int | None = Field(
        None, ge=1, description="optimizer steps instead of epochs; 1 exchanges at every step"
    )


class ClientsSettings(_Section):
    """Who takes part and how they learn (``clients``)."""

    count: int = Field(10, ge=1, description="registered clients")
    participation: float = Field(1.0, gt=0, le=1, description="fraction drawn each round")
    participants: int | None = Field(None, ge=1, description="number drawn each round instead")
    models: tuple[ModelSettings, ...] = Field(
        tuple(ModelSettings(name=name) for name in ("mlp", "cnn", "gru", "transformer")),
        description="dealt out in turn: client i gets models[i % len(models)]",
    )
    batch_size: int = Field(32, ge=1, description="private rows in a step")
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

    rows_per_round: int | None = Field(
        None, ge=1, description="public rows drawn anew each round; none: the whole public set"
    )


class EngineSettings(_Section):
    """What runs the clients (``engine``)."""

    backend: Literal["ray", "inline"] = Field(
        "ray", description="ray: worker processes; inline: this process, for debugging"
    )
    cpus_per_worker: float = Field(
        1.0, gt=0, description="workers = CPUs // this; a worker computes with one thread"
    )
    gpus_per_worker: float = Field(0.0, ge=0, description="may be a fraction; 0 trains on the CPU")
    address: str | None = Field(
        None,
        description="auto or HOST:PORT joins a running Ray cluster; none: this machine only",
    )
    vectorize: Literal["auto", "measure", "loop", "vmap"] = Field(
        "auto",
        description="loop: one client's model after the other; vmap: a cohort's models stacked; "
        "auto: by a fixed rule; measure: by timing both once in a run",
    )
    cohort_size: int = Field(
        32, ge=1, description="most clients of one architecture whose models are stacked"
    )
    deadline_s: float = Field(
        3600.0, gt=0, description="a cohort that takes longer is given up and its clients named"
    )
    retries: int = Field(
        2, ge=0, description="how often clients whose worker died are tried again, then excluded"
    )
    quorum: float = Field(
        0.5,
        ge=0,
        le=1,
        description="fraction of the clients asked that must answer, in training and in judging",
    )
    below_quorum: Literal["retry", "skip", "abort"] = Field(
        "retry",
        description="retry: ask those who failed again, then abort; skip: leave the round out",
    )
    round_retries: int = Field(1, ge=1, description="how often a round below the quorum is asked")


class NodesSettings(_Section):
    """Clients that are nodes of Flower's own runtimes (``nodes``); ``fedkd run`` has none."""

    wait_s: float = Field(
        120.0,
        gt=0,
        allow_inf_nan=False,
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

    every: int = Field(1, ge=1, description="rounds between evaluations; the last is always judged")
    clients: Literal["all", "participants"] | Annotated[int, Field(ge=1)] = Field(
        "all",
        description="whose models: all; participants: the round's; a number: so many, drawn once",
    )

    @field_validator("clients", mode="before")
    @classmethod
    def _known_choice(cls, clients: object) -> object:
        if clients in ("all", "participants") or (type(clients) is int and clients >= 1):
            return clients
        raise ValueError(f"must be all, participants or a number >= 1, got {clients!r}")


class CheckpointSettings(_Section):
    """How a run is kept so that it can be resumed (``checkpoints``); changes no result."""

    every: int | None = Field(
        None,
        ge=1,
        description="rounds between checkpoints; none: as often as costs at most 5 % of the time",
    )
    keep: int = Field(2, ge=1, description="checkpoints kept; an older one serves if one is bad")


class StudySettings(_Section):
    """What ``fedkd compare`` runs (``study``)."""

    arms: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="by name, the settings in which an arm differs; a strategy replaces the whole",
    )
    seeds: int = Field(3, ge=1, description="paired seeds: seed, seed + 1, ...")
    baseline: str | None = Field(
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
    seed: int = Field(0, ge=0, lt=2**32, description="decides every draw of the run")
    rounds: int = Field(20, ge=1, description="communication rounds")
    output: Path = Field(Path("runs"), description="where run folders are made")
    data: DataSettings = DataSettings()
    clients: ClientsSettings = ClientsSettings()
    strategy: StrategyField = Field(STRATEGIES["dml"].Settings(name="dml"))
    exchange: ExchangeSettings = ExchangeSettings()
    engine: EngineSettings = EngineSettings()
    nodes: NodesSettings = NodesSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoints: CheckpointSettings = CheckpointSettings()
    faults: tuple[FaultRule, ...] = Field((), description="faults to inject, a list of rules")
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
        if name not in STRATEGIES:
            raise ValueError(
                f"unknown strategy {name!r}; known: {', '.join(STRATEGIES)}"
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


def yaml_text(table: Mapping[str, Any]) -> str:
    """Write plain values as YAML, in their order."""
    return yaml.safe_dump(dict(table), sort_keys=False, allow_unicode=True)


def nearest(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """Return ``"; did you mean 'x'?"``, or nothing where no known word is near."""
    names = {name.casefold(): name for name in known}
    matches = get_close_matches(word.casefold(), list(names), n=1, cutoff=0.6)
    return f"; did you mean {names[matches[0]]!r}?" if matches else ""


def load_settings(
    config: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()
) -> Settings:
    """Read settings: defaults, then the file, then ``key=value`` overrides.

    Args:
        config: a YAML file; ``${...}`` may refer to other keys of the file.
        overrides: such as ``strategy.temperature=2`` or ``clients.models=[mlp,cnn]``. Naming
            another strategy than the file does drops the file's strategy settings.

    Raises:
        SettingsError: a file that cannot be read, an unknown key, a value that cannot work.
    """
    return settings_from_table(_read_table(config, overrides, _objectives_of_strategy))


def load_distill_settings(
    config: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()
) -> "DistillSettings":
    """Read the settings of ``fedkd distill`` by the rules of `load_settings`.

    Args:
        config: a YAML file.
        overrides: such as ``student.model=cnn``. ``objective.kd.temperature=2`` changes one
            setting of the objective of the file, or of the default one; ``objective={ce: 1}``
            replaces the objective whole.

    Raises:
        SettingsError: a file that cannot be read, an unknown key, a value that cannot work.
    """
    from fedkd.distillation.settings import DistillSettings

    objective = DistillSettings().objective.model_dump(mode="json")
    return distill_settings_from_table(
        _read_table(config, overrides, lambda _: {("objective",): objective})
    )


Defaults = Callable[[Mapping[str, Any]], Mapping[tuple[str, ...], Mapping[str, Any]]]
"""For settings as they were given: defaults of tables whose keys are free, by their path."""


def _read_table(
    config: str | os.PathLike[str] | None, overrides: Sequence[str], defaults: Defaults
) -> dict[str, Any]:
    """Merge file and overrides.

    Args:
        config: the file.
        overrides: words.
        defaults: of tables whose keys are free, so that a word may change one of them.
    """
    table = _read_yaml(Path(config)) if config is not None else {}
    patch = _read_overrides(overrides)
    keys = [override.partition("=")[0].split(".") for override in overrides]
    given = {tuple(path) for path in keys}
    for place, default in defaults(merge_tables(table, patch)).items():
        changed = any(path[: len(place)] == place and path != place for path in given)
        if changed and place not in given and not _has(table, place):
            patch = merge_tables(_nested(place, default), patch)
    for path in keys:
        # An objective is a sum: one that is written whole would gain the old one's terms.
        if path[-1].endswith("objective"):
            table = _without(table, path)
    return _resolve(merge_tables(table, patch))


def _objectives_of_strategy(
    table: Mapping[str, Any],
) -> Mapping[tuple[str, ...], Mapping[str, Any]]:
    """Return the default objectives of the strategy that a table names."""
    strategy = _named("strategy", table.get("strategy", {}))
    name = strategy.get("name") if isinstance(strategy, Mapping) else None
    if name not in STRATEGIES:
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


def _nested(path: Sequence[str], value: Mapping[str, Any]) -> dict[str, Any]:
    return reduce(lambda inner, key: {key: inner}, reversed(path), dict(value))


def _without(table: Mapping[str, Any], path: Sequence[str]) -> dict[str, Any]:
    key, *rest = path
    if not rest:
        return {name: value for name, value in table.items() if name != key}
    inner = table.get(key)
    return {**table, key: _without(inner, rest)} if isinstance(inner, Mapping) else dict(table)


def _read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    patch: dict[str, Any] = {}
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise SettingsError(f"overrides are written key=value, got {override!r}")
        try:
            word = _plain(OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
            raise SettingsError(f"cannot read {override!r}: {_one_line(error)}") from None
        patch = merge_tables(patch, word)
    return patch


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
            old = _named(key, old)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            merged[key] = merge_tables(old, value, nested=True)
        else:
            merged[key] = value
    return merged


NAMED = ("strategy", "method", "model", "meme")
"""Sections that may be written as their name alone."""


def _named(key: str, value: Any) -> Any:
    """Return a section that was written as its name alone as a table, which can be added to."""
    return {"name": value} if key in NAMED and isinstance(value, str) else value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        table = OmegaConf.load(path)
    except FileNotFoundError:
        raise SettingsError(f"config {str(path)!r} does not exist") from None
    except IsADirectoryError:
        raise SettingsError(f"config {str(path)!r} is a folder, need a YAML file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise SettingsError(f"cannot read config {str(path)!r}: {_one_line(error)}") from None
    if not isinstance(table, DictConfig):
        raise SettingsError(f"config {str(path)!r} must be a table of keys and values")
    return _plain(table)


def _plain(table: DictConfig) -> dict[str, Any]:
    """Return the table with ``${...}`` left as it is."""
    return {str(key): value for key, value in OmegaConf.to_container(table).items()}  # type: ignore[union-attr]


def _resolve(table: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in ``${...}``, after overrides had their say."""
    try:
        plain = OmegaConf.to_container(
            OmegaConf.create(dict(table)), resolve=True, throw_on_missing=True
        )
    except OmegaConfBaseException as error:
        raise SettingsError(_one_line(error)) from None
    return {str(key): value for key, value in plain.items()}  # type: ignore[union-attr]


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
    unknown = [str(each["loc"][0]) for each in error.errors() if _is_unknown_outermost(each)]
    if foreign := foreign_hint(kind, unknown, _commands()):
        return [foreign]
    for problem in error.errors(include_url=False, include_context=False):
        path, known = _place(kind, problem["loc"])
        where = ".".join(path)
        message = problem["msg"].removeprefix("Value error, ")
        message = message.replace("Input should be", "must be")
        if problem["type"] == "extra_forbidden":
            known_there = f"; known there: {', '.join(known)}" if known else ""
            hint = setting_hint(kind, path, problem["input"])
            lines.append(f"unknown setting {where!r}{hint or known_there}")
        elif problem["type"] == "model_type":
            keys = ", ".join(_keys(kind, path))
            hint = section_hint(where, problem["input"]) or f"; known there: {keys}"
            lines.append(f"{where} is a section of settings, got {problem['input']!r}{hint}")
        elif problem["type"] == "value_error" or "got " in message:
            # A check of several settings names them itself; one of a single value does not.
            if len(path) > 1 and message.startswith(f"{path[-1]}."):
                message = ".".join([*path[:-1], message])
            message += colon_hint(problem["input"])
            lines.append(message if message.startswith(where) else f"{where}: {message}")
        else:
            message += f", got {problem['input']!r}{colon_hint(problem['input'])}"
            lines.append(f"{where}: {message[0].lower()}{message[1:]}")
    return lines


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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
