"""Settings of a run: YAML and ``key=value`` text turned once into frozen, checked objects.

Below this line code takes typed objects or plain values, never a table of text.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    field_validator,
    model_validator,
)

from fedkd import own_code
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
from fedkd.exchange.adversaries import AdversaryField, Controlling, NoAdversary
from fedkd.exchange.budget import Allocation
from fedkd.exchange.codecs import CodecField, Float32
from fedkd.exchange.kinds import Stage
from fedkd.exchange.mechanisms import MECHANISMS, MechanismField
from fedkd.exchange.pipeline import Stages
from fedkd.exchange.release import NoRelease, Unit, Where
from fedkd.exchange.spending import PrivacyBudget
from fedkd.exchange.views import All, ViewField
from fedkd.models import ModelSettings
from fedkd.names import check_name
from fedkd.training import OptimizerSettings, Passes
from sim.adversity.faults import PROCESS_FAULTS, FaultRule
from sim.attacks.settings import AttackSettings
from sim.devices.clock import ClockSettings
from sim.devices.presence import PresenceSettings
from sim.settings.combinations import check_condition, check_together
from sim.settings.tables import yaml_text
from sim.trackers import TrackerField
from strategies import STRATEGIES, strategy_class
from strategies.contract import StrategySettings

_Client = Annotated[Whole, Field(ge=0, le=99_999)]
LEAST_CANARIES = 20
MOST_SEEDS = 1000
MOST_ARMS = 1000


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
    first_weights: tuple[PathText | None, ...] = Field(
        (),
        max_length=1000,
        description="safetensors files that clients start from in the place of random weights: one "
        "for each of clients.models, null for random ones; a single one is for all models",
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

    @field_validator("first_weights", mode="before")
    @classmethod
    def _one_file_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str | Path) else value

    @property
    def beginnings(self) -> tuple[Path | None, ...]:
        """The file that each of the models starts from; None: random weights."""
        files = self.first_weights
        return files * len(self.models) if len(files) == 1 else files or (None,) * len(self.models)

    @model_validator(mode="after")
    def _beginnings_fit(self) -> "ClientsSettings":
        if len(self.first_weights) not in (0, 1, len(self.models)):
            raise ValueError(
                "clients.first_weights needs one file, or one for each of clients.models "
                f"({len(self.models)}), got {len(self.first_weights)}"
            )
        seen: dict[str, Path | None] = {}
        for model, file in zip(self.models, self.beginnings, strict=True):
            if seen.setdefault(model.key, file) != file:
                raise ValueError(
                    f"clients.first_weights: model {model.label} is there twice and starts from "
                    f"{seen[model.key]} and from {file}: clients of one model start alike, or all "
                    "from random weights"
                )
        return self

    @model_validator(mode="after")
    def _participants_exist(self) -> "ClientsSettings":
        if self.participants is not None and self.participants > self.count:
            raise ValueError(
                f"clients.participants must be at most clients.count ({self.count}), "
                f"got {self.participants}"
            )
        return self


class ExchangeSettings(_Section):
    """What is exchanged, and how it travels (``exchange``)."""

    rows_per_round: Rows | None = Field(
        None, description="public rows drawn anew each round; none: the whole public set"
    )
    up: CodecField = Field(
        Float32(),
        description="codec of what clients send: float32, float16, int8, top_k, one_bit or "
        "hard_label, cfd, cfd_delta, low_rank",
    )
    down: CodecField = Field(Float32(), description="codec of what the server sends")
    view: ViewField = Field(
        All(), description="what the server sees of the answers: all of them, or a sum"
    )
    budget_kb: Real | None = Field(
        None,
        ge=0.001,
        le=1e12,
        description="bytes for the whole run, both ways, all clients, in 1000; chooses the bits of "
        "every transfer",
    )
    allocation: Allocation = Field(
        "greedy",
        description="how a budget is shared out: greedy, by expected error; uniform, alike",
    )
    keep: bool = Field(
        False,
        description="keep what travels, and every client's last model, in the run's folder: "
        "for fedkd attack, which else repeats the run",
    )

    @model_validator(mode="after")
    def _a_budget_chooses_codecs(self) -> "ExchangeSettings":
        if self.budget_kb is not None:
            for way, codec in (("up", self.up), ("down", self.down)):
                if not isinstance(codec, Float32):
                    raise ValueError(
                        f"exchange.{way} must be left out under exchange.budget_kb, which chooses "
                        f"the codec of every transfer, got {codec.kind}"
                    )
        elif self.allocation != "greedy":
            raise ValueError(
                f"exchange.allocation shares out exchange.budget_kb, which is not set, got "
                f"{self.allocation}"
            )
        return self


class AuditSettings(_Section):
    """A lower bound on epsilon, from rows that are there by lot (``privacy.audit``)."""

    canaries: Whole = Field(
        0,
        ge=0,
        le=10_000_000,
        description="rows of one client that get a wrong label, and stay with probability 1/2; "
        "from how many of these its model gives away follows what epsilon is at least; 0: none",
    )
    client: _Client = Field(0, description="whose rows, and whose model is looked at")

    @field_validator("canaries")
    @classmethod
    def _enough(cls, canaries: int) -> int:
        if 0 < canaries < LEAST_CANARIES:
            raise ValueError(
                f"must be 0 or at least {LEAST_CANARIES}, since fewer prove next to nothing, got "
                f"{canaries}"
            )
        return canaries


class PrivacySettings(_Section):
    """How what is released is protected (``privacy``).

    Settings of the mechanism stand beside its name: ``{mechanism: dp_sgd, epsilon: 8, clip: 1}``.
    """

    mechanism: MechanismField = Field(
        NoRelease(),
        description="none; dp_sgd: clients learn by DP-SGD; gaussian, laplace: noise on what is "
        "sent; votes: noisy counts of classes; randomized_response: classes told at random",
    )
    where: Where = Field(
        "client",
        description="client: each protects its answer, the server is curious; server: it is "
        "trusted, and protects the mean of all answers",
    )
    unit: Unit | None = Field(
        None,
        description="whose presence is protected: example, one row of a client's (dp_sgd), or "
        "client, all of its rows; none: what the mechanism can promise",
    )
    delta: Real = Field(1e-5, ge=1e-12, lt=1, description="of the guarantee")
    budget: Real | None = Field(
        None,
        ge=1e-6,
        le=1e6,
        description="epsilon after which the run ends; none: the wanted epsilon, if there is one",
    )

    audit: AuditSettings = AuditSettings()

    @model_validator(mode="before")
    @classmethod
    def _beside_its_name(cls, given: object) -> object:
        """Hand the mechanism its own settings, which stand beside its name."""
        if not isinstance(given, Mapping):
            return given
        own = {key: value for key, value in given.items() if key not in cls.model_fields}
        if not own:
            return given
        named = given.get("mechanism", "none")
        table = {"kind": named} if isinstance(named, str) else named
        if not isinstance(table, Mapping) or table.get("kind") == "none":
            strangers = [key for key in own if key not in _of_any_mechanism()]
            if "mechanism" in given and not strangers:
                # The twin without a mechanism, of a file that says what it would be.
                return {key: value for key, value in given.items() if key in cls.model_fields}
            first = next(iter(strangers or own))
            raise ValueError(
                f"{first} belongs to a mechanism, and privacy.mechanism is none: set "
                f"privacy.mechanism to one of {', '.join(list(MECHANISMS)[1:])} as well, or leave "
                "it out"
            )
        rest = {key: value for key, value in given.items() if key in cls.model_fields}
        own = _one_noise(dict(table), own)
        return {**rest, "mechanism": own}

    @model_validator(mode="after")
    def _unit_is_kept(self) -> "PrivacySettings":
        if self.unit == "client" and self.mechanism.learns:
            raise ValueError(
                "unit must be example under privacy.mechanism: dp_sgd, which protects a row of a "
                "client's, got client: gaussian, laplace, votes and randomized_response protect "
                "clients"
            )
        return self

    @property
    def on(self) -> bool:
        """Whether anything is promised."""
        return not isinstance(self.mechanism, NoRelease)

    @property
    def promised(self) -> Unit:
        """Whose presence is protected."""
        return self.unit or ("example" if self.mechanism.learns else "client")

    @property
    def limit(self) -> PrivacyBudget | None:
        """The epsilon that no client may exceed."""
        wanted = getattr(self.mechanism, "epsilon", None)
        epsilon = wanted if self.budget is None else self.budget
        return None if epsilon is None else PrivacyBudget(epsilon, self.delta)


def _of_any_mechanism() -> set[str]:
    """Return the names of settings that some mechanism has."""
    return {field for name in MECHANISMS for field in MECHANISMS.find(name).model_fields}


def _one_noise(table: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Put settings over those of a mechanism; of epsilon and noise the last one counts."""
    for one, other in (("epsilon", "noise"), ("noise", "epsilon")):
        if own.get(one) is not None and own.get(other) is None:
            table.pop(other, None)
    return {**table, **own}


class CounterfactualSettings(_Section):
    """What is otherwise than in the run that is repeated (``counterfactual``).

    Empty, it is no part of a run's settings: nothing of that run is otherwise.
    """

    without: tuple[_Client, ...] = Field(
        (),
        max_length=100_000,
        description="clients that are left out: they keep their places and their draws and go on "
        "learning, but nothing that they send counts, and nobody else learns from their rows",
    )
    flipped: tuple[_Client, ...] = Field(
        (),
        max_length=100_000,
        description="clients whose private labels are flipped: class c of C becomes C - 1 - c",
    )
    from_round: CountOrZero = Field(
        0,
        description="the round whose checkpoint this goes on from; 0: from the start. Set by fedkd "
        "replay, which brings the checkpoint along",
    )
    run: Text | None = Field(
        None, description="weights_sha256 of the run whose rounds up to from_round these are"
    )

    @field_validator("without", "flipped", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if type(value) is int else value

    @field_validator("without", "flipped")
    @classmethod
    def _each_once(cls, clients: tuple[int, ...]) -> tuple[int, ...]:
        twice = [client for place, client in enumerate(clients) if client in clients[:place]]
        if twice:
            raise ValueError(f"must name each client once, got {twice[0]} twice")
        return tuple(sorted(clients))

    @property
    def on(self) -> bool:
        """Whether anything is otherwise."""
        return self != CounterfactualSettings()

    def check_clients(self, count: int) -> None:
        """Refuse clients that there are not.

        Raises:
            ValueError: naming the setting.
        """
        for name, clients in (("without", self.without), ("flipped", self.flipped)):
            strangers = [client for client in clients if client >= count]
            if strangers:
                raise ValueError(
                    f"counterfactual.{name} must name clients below clients.count ({count}), got "
                    f"{strangers[0]}"
                )


class EngineSettings(_Section):
    """What runs the clients (``engine``)."""

    backend: Literal["auto", "ray", "inline"] = Field(
        "auto",
        description="ray: worker processes that share the clients of a run; inline: one process "
        "for all of them; auto: ray, but several small runs of a study are each made whole by one "
        "of study.parallel processes",
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

    @property
    def on_ray(self) -> bool:
        """Whether a run by itself is on Ray."""
        return self.backend != "inline"


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

    every: Literal["auto"] | Count = Field(
        1,
        description="rounds between evaluations; the last is always judged; auto: as many as keep "
        "judging, by the rows that go through networks, within 20 % of the time",
    )
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
        description="rounds between checkpoints; none: every 2 s, less often where that costs more "
        "than 5 % of the time",
    )
    keep: Few = Field(2, description="checkpoints kept; an older one serves if one is bad")


_NOT_SWEPT = {
    "name": "it names the study's folder",
    "output": "all runs of a study are in one folder",
    "seed": "study.seeds is the number of seeds of every arm",
    "study": "a study is no part of an arm",
}
"""Settings that arms cannot differ in, and why."""

_Kept = Literal["auto", "none", "server", "clients", "best"]


class StudySettings(_Section):
    """What ``fedkd compare`` runs (``study``)."""

    arms: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        max_length=MOST_ARMS,
        description="by name, the settings in which an arm differs; a strategy replaces the whole",
    )
    sweep: dict[str, tuple[Any, ...]] = Field(
        default_factory=dict,
        max_length=20,
        description="by setting, a list of values: every combination of them is an arm, of every "
        "arm there is; combinations that are equal in effect are one",
    )
    together: tuple[tuple[str, ...], ...] = Field(
        (),
        max_length=20,
        description="settings of the sweep that change together: the first value of each, the "
        "second of each, ..., instead of every combination; a list of lists, [[a, b], [c, d]]",
    )
    only: tuple[dict[str, Any], ...] = Field(
        (),
        max_length=MOST_ARMS,
        description="combinations of the sweep that are made; each a table of settings with a "
        "value or a list of values, arm among the keys; none: all",
    )
    without: tuple[dict[str, Any], ...] = Field(
        (),
        max_length=MOST_ARMS,
        description="combinations of the sweep that are left out, as under only",
    )
    match: Literal["none", "steps", "bytes"] = Field(
        "none",
        description="sets the rounds of each arm beforehand, so that all are equal in optimizer "
        "steps (of clients and server, a teacher's training included) or in bytes (up and down), "
        "as near as whole rounds allow",
    )
    match_to: Text | None = Field(
        None, description="the arm whose rounds stay under match; none: the baseline"
    )
    families: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        max_length=MOST_ARMS,
        description="by name, arms that belong to one question: every pair of a family is "
        "compared, corrected for the pairs of the family, and no others; with a sweep a family for "
        "each of its values",
    )
    refused: Literal["stop", "show"] = Field(
        "stop",
        description="arms whose settings cannot work together, such as a guarantee that would be "
        "unsound; stop: nothing runs; show: the others run, and these are listed with the reason",
    )
    seeds: Few = Field(3, description="paired seeds: seed, seed + 1, ...")
    parallel: Literal["auto"] | Annotated[Whole, Field(ge=1, le=1024)] = Field(
        "auto",
        description="small runs that are made at a time, each whole in a warm process with one "
        "thread; auto: as many as there are CPUs, where that is faster; 1: one after the other",
    )
    baseline: Text | None = Field(
        None, description="the arm that the others are compared with; none: the first"
    )
    precision: Real = Field(
        1.0,
        ge=0.001,
        le=100,
        description="points: half the width of the interval that is wanted of a difference; "
        "reports say how many seeds that takes",
    )

    @field_validator("arms")
    @classmethod
    def _names_are_file_names(cls, arms: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name in arms:
            check_name(name, "the name of an arm")
        return arms

    @field_validator("families", mode="before")
    @classmethod
    def _none(cls, families: object) -> object:
        # A word that leaves out those of a file is ``study.families=null``.
        return {} if families is None else families

    @field_validator("families")
    @classmethod
    def _pairs_in_each(cls, families: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for name, arms in families.items():
            if len(set(arms)) < 2 or len(set(arms)) < len(arms):
                raise ValueError(
                    f"families.{name} must name at least two arms, each once, got {shown(arms)}"
                )
        return families

    @field_validator("sweep", mode="before")
    @classmethod
    def _by_dotted_names(cls, sweep: object) -> object:
        """Open tables: ``{adversary: {kind: [lma, cpa]}}`` is ``{adversary.kind: [lma, cpa]}``.

        A word that leaves out the sweep of a file is ``study.sweep=null``.
        """
        if sweep is None:
            return {}
        return dict(_swept(sweep)) if isinstance(sweep, Mapping) else sweep

    @field_validator("sweep")
    @classmethod
    def _can_be_swept(cls, sweep: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        for setting, values in sweep.items():
            section = setting.partition(".")[0]
            if section in _NOT_SWEPT:
                raise ValueError(f"{setting} cannot be swept: {_NOT_SWEPT[section]}")
            if not 1 <= len(values) <= MOST_ARMS:
                raise ValueError(
                    f"sweep.{setting} must have 1 to {MOST_ARMS} values, got {len(values)}"
                )
            inside = [other for other in sweep if other.startswith(f"{setting}.")]
            if inside:
                raise ValueError(
                    f"{inside[0]} is part of {setting}, which is swept as well: put its "
                    f"values into those of {setting}"
                )
        return sweep

    @field_validator("together", mode="before")
    @classmethod
    def _groups(cls, groups: object) -> object:
        """Take one group for a list of one, and null for none."""
        if isinstance(groups, list | tuple) and any(isinstance(each, str) for each in groups):
            return (groups,)
        return () if groups is None else groups

    @field_validator("only", "without", mode="before")
    @classmethod
    def _conditions(cls, conditions: object) -> object:
        """Take one condition for a list of one, and null for none."""
        if isinstance(conditions, Mapping):
            return (conditions,)
        return () if conditions is None else conditions

    @model_validator(mode="after")
    def _fit_the_sweep(self) -> "StudySettings":
        check_together(self.together, self.sweep)
        for name in ("only", "without"):
            for condition in getattr(self, name):
                check_condition(f"study.{name}", condition, self.sweep)
        return self


def _swept(table: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from _swept(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{key}", value
        else:
            raise ValueError(f"sweep.{prefix}{key} must be a list of values, got {shown(value)}")


class UnreadStrategy(StrategySettings):
    """Settings of an algorithm of another package whose code nobody has allowed, as they stand."""

    model_config = ConfigDict(extra="allow")


if TYPE_CHECKING:
    StrategyField = SerializeAsAny[StrategySettings]
else:
    StrategyField = own_code.by_name(STRATEGIES, UnreadStrategy, strategy_class)


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
    privacy: PrivacySettings = PrivacySettings()
    adversary: AdversaryField = Field(
        NoAdversary(),
        description="who controls some of the clients, and what these send or learn from instead; "
        "what each kind has beside its name: docs/adversaries.md",
    )
    counterfactual: CounterfactualSettings = CounterfactualSettings()
    clock: ClockSettings = ClockSettings()
    presence: PresenceSettings = PresenceSettings()
    engine: EngineSettings = EngineSettings()
    nodes: NodesSettings = NodesSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoints: CheckpointSettings = CheckpointSettings()
    keep_models: _Kept | tuple[_Client, ...] = Field(
        "auto",
        max_length=100_000,
        description="models written into the run's folder: server: the server's; clients: every "
        "client's; a list: these clients'; best: that of the client with the best validation "
        "accuracy; auto: the server's where the algorithm has any, else best",
    )
    keep_round: Literal["last", "selected"] = Field(
        "last",
        description="as they are after the last round, or after the judged round with the best "
        "mean validation accuracy",
    )
    faults: tuple[FaultRule, ...] = Field(
        (), max_length=1000, description="faults to inject, a list of rules"
    )
    attacks: AttackSettings = Field(
        AttackSettings(), description="attacks that are made on the run when it is finished"
    )
    trackers: tuple[TrackerField, ...] = Field(
        (),
        max_length=20,
        description="who is told of the run beside its folder: tensorboard, mlflow, wandb, or "
        "package.module:Class; see docs/watching.md",
    )
    study: StudySettings = StudySettings()

    @field_validator("trackers", mode="before")
    @classmethod
    def _one_tracker_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str | Mapping) else value

    @field_validator("trackers")
    @classmethod
    def _each_tracker_once(cls, trackers: tuple[Stage, ...]) -> tuple[Stage, ...]:
        kinds = [tracker.kind for tracker in trackers]
        twice = [kind for place, kind in enumerate(kinds) if kind in kinds[:place]]
        if twice:
            raise ValueError(f"trackers names {twice[0]} twice")
        return trackers

    @field_validator("name")
    @classmethod
    def _name_is_a_file_name(cls, name: str) -> str:
        return check_name(name, "name")

    @field_validator("keep_models", mode="before")
    @classmethod
    def _whose_models(cls, value: object) -> object:
        if isinstance(value, list | tuple) or value in get_args(_Kept):
            return value
        if type(value) is int:
            return [value]
        known = ", ".join(get_args(_Kept))
        raise ValueError(f"must be {known} or a list of clients, got {shown(value)}")

    @field_validator("strategy", mode="before")
    @classmethod
    def _known_strategy(cls, value: object) -> object:
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping):
            return value
        name = value.get("name", "dml")
        if not own_code.is_own_code(name) or own_code.may_load(name, "strategy.name"):
            strategy_class(name)
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
        audit = self.privacy.audit
        if audit.canaries and audit.client >= count:
            raise ValueError(
                f"privacy.audit.client must be below clients.count ({count}), got {audit.client}"
            )
        strangers = [c for c in self.keep_models if isinstance(c, int) and c >= count]
        if strangers:
            raise ValueError(
                f"keep_models must name clients below clients.count ({count}), got {strangers[0]}"
            )
        if isinstance(self.adversary, Controlling):
            self.adversary.check_clients(count)
        self.counterfactual.check_clients(count)
        if self.counterfactual.on and self.privacy.on:
            raise ValueError(
                "counterfactual needs privacy.mechanism: none, got "
                f"{self.privacy.mechanism.kind}: a repetition learns from the same private rows "
                "again, and spends a second time what the ledger of the run has promised once; "
                "its noise is drawn anew wherever a release differs, so nothing would be paired"
            )
        kinds = [rule.kind for rule in self.faults if rule.kind in PROCESS_FAULTS]
        if kinds and not self.engine.on_ray:
            raise ValueError(
                f"faults.kind {kinds[0]!r} would end this process: it needs engine.backend: ray, "
                "got inline"
            )
        return self

    @property
    def keeps_exchange(self) -> bool:
        """Whether what travels is kept, because it is to be or because attacks need it."""
        return self.exchange.keep or bool(self.attacks.kinds)

    @property
    def stages(self) -> Stages:
        """What everything that is exchanged passes."""
        exchange, privacy = self.exchange, self.privacy
        return Stages(
            up=exchange.up,
            down=exchange.down,
            view=exchange.view,
            release=privacy.mechanism,
            where=privacy.where,
            delta=privacy.delta,
            budget=privacy.limit,
            adversary=self.adversary,
            controlled=self.adversary.controlled(self.clients.count, seed=self.seed),
        )

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
        """Return the settings as plain values, all defaults included.

        Where nothing is otherwise, nothing is said of that: the run is the one that it ever was.
        """
        table = self.model_dump(mode="json")
        if not self.counterfactual.on:
            del table["counterfactual"]
        if not self.strategy.as_published:
            # As above: what is not asked for is no part of a run's identity.
            del table["strategy"]["as_published"]
        return table

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
