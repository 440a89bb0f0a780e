"""What an algorithm is written against: settings, a state, a server half and a client half.

An algorithm is one file. Its client half runs on workers over a cohort of clients; its server
half runs once, beside the round loop. Both are built from the same settings. What the server
remembers is a value that it is handed and returns; nothing is changed on the algorithm itself.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedkd.bounds import shown
from fedkd.data import FederatedData
from fedkd.exchange.payload import Asked, Payload, expect
from fedkd.exchange.payloads import Orders, Predictions
from fedkd.exchange.values import Value
from fedkd.exchange.views import Upload, Weighting
from fedkd.inputs import Shape
from fedkd.models import ModelSettings
from fedkd.training import Architecture, Cohort, ComposedObjective, Passes, stacking_of
from fedkd.training.binding import Stacking
from fedkd.training.cohort import named_models
from strategies.contract.card import NO_CARD, Card
from strategies.contract.faults import Fault
from strategies.contract.private_use import PrivateUse
from strategies.contract.round import Call, Federation, Received, Round
from strategies.contract.server import (
    Brought,
    FinishedModel,
    ServerModel,
    ServerModelSettings,
    ServerTools,
)


class StrategySettings(BaseModel):
    """Settings under ``strategy:``; each algorithm adds its own.

    Attributes:
        directions: who learns from others, by the names that the algorithm gives its learners,
            such as ``[private, meme]``; one that is left out learns from its labels alone, as in
            `local`. None: all.
        as_published: faults read in published code that the algorithm is to commit, by the names
            of `Strategy.faults`, such as ``[kl_mean]``; to measure what they cost. Empty: none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    directions: tuple[str, ...] | None = Field(
        None, description="who learns from others; the rest learn as in local; null: all"
    )
    as_published: tuple[str, ...] = Field(
        (), description="faults of published code to commit on purpose; see docs/museum.md"
    )


CLIENTS = "clients"
"""What most algorithms call the direction in which clients learn from what they receive."""


@dataclass(frozen=True)
class Nothing(Value):
    """The state of a server that remembers nothing."""


class Step(NamedTuple):
    """The smallest step of some kind that a model takes.

    Attributes:
        setting: what names the model.
        model: the model.
        rows: how many go through it together, >= 1; None where it does not train.
        remedy: who would train on a single row, and what helps, where it is one.
        input_shape: of one row, where that is no input of the run.
        view: of which view its rows are; 0: of ``data.source``.
    """

    setting: str
    model: ModelSettings
    rows: int | None
    remedy: str
    input_shape: Shape | None = None
    view: int = 0


SettingsT = TypeVar("SettingsT", bound=StrategySettings)
StateT = TypeVar("StateT", bound=Value)


class Strategy(ABC, Generic[SettingsT, StateT]):
    """One federated algorithm.

    Subclasses name the classes of their settings and of their state, and implement both halves.
    """

    Settings: ClassVar[type[StrategySettings]]
    State: ClassVar[type[Value]] = Nothing
    """What the server remembers: a frozen dataclass that is a `fedkd.exchange.values.Value`."""

    judges_received: ClassVar[bool] = False
    """Whether `before_evaluation` or `scores` needs what the server last sent."""
    needs_public: ClassVar[bool] = False
    """Whether the algorithm cannot run without a public set."""

    takes_views: ClassVar[bool] = False
    """Whether clients may have inputs of different kinds (``data.views``): nothing that its server
    does depends on what rows look like."""

    card: ClassVar[Card] = NO_CARD
    """What stands in the table of algorithms: who learns from whom, what travels."""
    directions: ClassVar[Mapping[str, str]] = {}
    """From whom each learner learns, by the learner's name: what ``strategy.directions`` switches.

    Empty where there are no directions to be told apart.
    """
    faults: ClassVar[Mapping[str, Fault]] = {}
    """What published code does wrong that this algorithm can do too: ``strategy.as_published``."""

    def __init__(self, settings: SettingsT, federation: Federation) -> None:
        self.settings = settings
        self.federation = federation

    # -- what it needs and does -------------------------------------------------------------------

    def learns(self, learner: str) -> bool:
        """Return whether a learner, by its name in `directions`, learns from others at all."""
        given = self.settings.directions
        return given is None or learner in given

    def commits(self, fault: str) -> bool:
        """Return whether a fault of published code, by its name in `faults`, is asked for."""
        if fault not in self.faults:
            raise KeyError(f"{type(self).__name__}.faults has no {fault!r}")
        return fault in self.settings.as_published

    @property
    def up(self) -> tuple[type[Payload], ...]:
        """The kinds of payloads that clients may send."""
        return ()

    @property
    def down(self) -> tuple[type[Payload], ...]:
        """The kinds of payloads that clients may receive."""
        return ()

    @property
    def has_ensemble(self) -> bool:
        """Whether clients send predictions, so that the accuracy of their mean is of interest."""
        return False

    @property
    def scores_are_logits(self) -> bool:
        """Whether `scores` are logits, so that their softmax is what a client believes.

        Else, as with distances to prototypes, nothing can be said of its calibration.
        """
        return True

    @property
    def sums(self) -> Weighting | None:
        """How a client is weighted where `aggregate` uses nothing but the weighted mean of uploads.

        ``examples`` or ``equal``; None: it looks at each upload, and cannot do with their sum.
        """
        return None

    @property
    def learns_alone(self) -> bool:
        """Whether nothing that is exchanged reaches what is judged of a client, in any round.

        Such clients are trained by the backend that trains them in `local`, whatever else the
        algorithm could do, and have its bits. Decides only how clients are trained.
        """
        return False

    @property
    def leaves_one_out(self) -> bool:
        """Whether `aggregate` makes nothing of uploads but, for each client, the others' mean.

        In the numbers that are sent: then one noise on their sum protects all of them. Who sent
        nothing may have the mean of all, which is ``Upload.of_all`` where there is one.
        """
        return False

    @property
    def private_use(self) -> PrivateUse:
        """What it does with private rows beside learning from them by `Cohort.fit`.

        Guarantees rest on it: what is not told here is refused when it happens under DP-SGD.
        """
        counted = getattr(self.settings, "weighting", "equal")
        by_rows = counted in ("examples", "count") or self.sums == "examples"
        return PrivateUse(counts=f"strategy.weighting: {counted}" if by_rows else "")

    def private_passes(self, *, first: bool) -> tuple[Passes, ...]:
        """Return the passes over its private rows that a client takes in a call, at most.

        Args:
            first: whether it is the first call of that client.
        """
        return (self.federation.local,)

    def composed(self) -> ComposedObjective | None:
        """Return what clients minimise where it is made of terms.

        Decides only how clients are trained (stacked or not), never on what; its progress and
        temperature have no say.
        """
        return None

    def check(self, input_shape: Shape) -> None:
        """Refuse, before any worker starts, objectives that do not fit the clients' models.

        Raises:
            ValueError: naming the setting, what it got and what would work.
        """
        self._check_directions()
        self._check_as_published()
        if self.federation.view_shapes and not self.takes_views:
            raise ValueError(
                f"data.views: {self.settings.name} cannot do with clients whose inputs differ; "
                "algorithms that exchange predictions of public rows can, such as dml or fedmd"
            )
        self.stackings(input_shape)

    def _check_directions(self) -> None:
        odd = [name for name in self.settings.directions or () if name not in self.directions]
        if self.settings.directions is None or (self.directions and not odd):
            return
        told = shown(list(self.settings.directions))
        if not self.directions:
            raise ValueError(
                f"strategy.directions of {self.settings.name} must be null, got {told}: it has no "
                "two directions to be told apart"
            )
        known = ", ".join(f"{name} ({source})" for name, source in self.directions.items())
        raise ValueError(
            f"strategy.directions of {self.settings.name} must be some of {known}, got {told}"
        )

    def _check_as_published(self) -> None:
        told = list(self.settings.as_published)
        if not told or all(name in self.faults for name in told):
            return
        if not self.faults:
            raise ValueError(
                f"strategy.as_published of {self.settings.name} must be empty, got {shown(told)}: "
                "no fault of published code is known that it could commit"
            )
        raise ValueError(
            f"strategy.as_published of {self.settings.name} must be some of "
            f"{', '.join(self.faults)}, got {shown(told)}"
        )

    def stackings(self, input_shape: Shape) -> dict[str, Stacking]:
        """Tell for each architecture whether stacked clients can learn by `composed`.

        Empty where clients minimise nothing that is made of terms.

        Raises:
            ValueError: naming the setting of an objective that does not fit the clients' models.
        """
        composed = self.composed()
        if composed is None:
            return {}
        return {
            architecture: stacking_of(
                composed,
                tuple(named_models(self.architecture(client)).items()),
                input_shape=self.federation.shape_of(client) if client else input_shape,
                num_classes=self.federation.num_classes,
            )
            for architecture, client in self.federation.first_clients.items()
        }

    def smallest_steps(self) -> Iterator[Step]:
        """Name every model that is trained, with the smallest step that it takes.

        The same model may come several times.
        """
        for client, model in enumerate(self.federation.models):
            yield from self.private_steps("clients.models", model, client)

    def private_steps(self, setting: str, model: ModelSettings, client: int) -> Iterator[Step]:
        """The steps of a client on its private rows."""
        federation = self.federation
        yield Step(
            setting,
            model,
            federation.local.smallest(federation.num_examples[client]),
            f"client {client} would; use norm: group, a larger clients.batch_size or "
            "data.partition.min_rows",
            view=federation.view_of(client),
        )

    def public_steps(
        self, setting: str, model: ModelSettings, rows: int, *, view: int = 0
    ) -> Iterator[Step]:
        """The steps on public rows alone, of which there are so many."""
        yield Step(
            setting,
            model,
            min(rows, self.federation.local.batch_size),
            "a step on public rows would; use norm: group, or a larger clients.batch_size, "
            "data.public.size or exchange.rows_per_round",
            view=view,
        )

    def clients_public_steps(self, rows: int) -> Iterator[Step]:
        """The steps of every client's model on so many public rows alone."""
        federation = self.federation
        for client in federation.first_clients.values():
            model, view = federation.models[client], federation.view_of(client)
            yield from self.public_steps("clients.models", model, rows, view=view)

    # -- server half ---------------------------------------------------------------------

    def server_models(self) -> Mapping[str, ServerModelSettings]:
        """Name the models that the server has, if any; it makes them with `ServerTools.new`."""
        return {}

    def begin(self, server: ServerTools) -> StateT:
        """Return the state before the first round; by default an empty `State`."""
        state: Any = self.State()
        return state  # type: ignore[no-any-return]

    def participants(self, state: StateT, round: Round) -> tuple[int, ...]:
        """Choose who takes part in a round: sorted partition ids, none only where nobody is there.

        Who is not among `Round.present` is not asked, whoever is chosen.
        """
        return round.drawn()

    def receives(self, state: StateT, client: int, round: Round) -> Hashable | None:
        """Name what a client receives in a round; None: nothing.

        `payload` makes it from the name. Clients with equal names receive one object, which is
        encoded once and travels once to each machine.
        """
        return None

    def payload(self, state: StateT, key: Any) -> Payload:
        """Return what clients receive that are named so."""
        raise NotImplementedError(f"{type(self).__name__}.receives needs payload as well")

    def orders(self, state: StateT, client: int, round: Round) -> Orders | None:
        """Return what the server decided for a client in a round, such as its rows or peers.

        None: what both sides derive from the settings. Orders cost bytes.
        """
        return None

    def asks(self, state: StateT, client: int, round: Round, server: ServerTools) -> Asked | None:
        """Say what a client has to answer in a round; None: nothing."""
        return None

    @abstractmethod
    def aggregate(
        self, state: StateT, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> StateT:
        """Fold a round's uploads, in client order, into the next state.

        ``uploads`` is a stream: it is read once, while clients still train.
        """

    def forget(self, state: StateT, clients: Sequence[int]) -> StateT:
        """Return the state once clients are known to have lost all that they kept.

        In Flower's own runtimes a node may be restarted; it says so with its next answer. Called
        after `aggregate`, also where that answer was no use, and after clients were judged. By
        default nothing changes: only who remembers what its clients have needs to forget it.
        """
        return state

    def judged_models(self, state: StateT) -> Mapping[str, ServerModel]:
        """Return the server's own models that are judged, by name; the first one leads."""
        return {}

    @property
    def brought(self) -> Mapping[str, Brought]:
        """Name the files of weights that were trained elsewhere, by the settings that name them.

        They are tried before the run; `ServerTools.read` reads them.
        """
        return {}

    @property
    def has_server_models(self) -> bool:
        """Whether the server has models that take the run's inputs: what `finished_models` names.

        Known before the first round.
        """
        return any(each.input_shape is None for each in self.server_models().values())

    def finished_models(self, state: StateT) -> Mapping[str, FinishedModel]:
        """Return the server's models that a run may keep, by name; by default those it judges.

        Models that go on from a client's features are none of them.
        """
        known = self.server_models()
        return {
            name: FinishedModel(known[model.name].model, model.weights)
            for name, model in self.judged_models(state).items()
            if known[model.name].input_shape is None
        }

    # -- client half ---------------------------------------------------------------------

    def architecture(self, client: int) -> Architecture:
        """Return what a client trains: one model, or several by name, the first of them judged."""
        return self.federation.models[client]

    def private_rows(self, client: int, data: FederatedData) -> np.ndarray:
        """Return the row ids that this client trains on."""
        return data.client_rows[client]

    def rows_of_step(self, private_rows: int) -> int:
        """Return about how many rows a step of a client with so many private rows takes.

        Decides only how clients are trained (stacked or not), never on what.
        """
        return self.federation.local.batch_size

    @abstractmethod
    def client(self, cohort: Cohort, received: Received, call: Call) -> Sequence[Payload]:
        """Learn and answer: one payload a member, or an empty sequence."""

    def before_evaluation(self, cohort: Cohort, received: Received, call: Call) -> None:
        """Put the model to be judged in place; by default it is the client's own."""

    def scores(self, cohort: Cohort, received: Received, inputs: Tensor) -> np.ndarray:
        """Return what clients are judged by: logits ``[members, rows, classes]``, any scores."""
        return cohort.predict(inputs)


def upload_logits(cohort: Cohort, call: Call) -> list[Payload]:
    """Let each member predict the round's public rows and send the logits."""
    rows = call.public_rows
    return [Predictions(rows=rows, values=values) for values in cohort.predict_public(rows)]


def payloads_of(
    uploads: Iterable[Upload], kind: type["PayloadT"]
) -> Iterator[tuple[Upload, "PayloadT"]]:
    """Pass on uploads together with their payloads, which have to be of one kind."""
    for upload in uploads:
        yield upload, expect(upload.payload, kind)


PayloadT = TypeVar("PayloadT", bound=Payload)
