"""What every federated algorithm is made of: a plan for each round, a client half, a server half.

An algorithm is one file. Its client half runs on workers over a cohort of clients; its server
half runs once, beside the round loop. Both are built from the same settings, so the only thing
that travels in a round is its number, what a client receives and what it uploads.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, Generic, Literal, NamedTuple, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from fedkd.data import FederatedData
from fedkd.models import ModelSettings
from fedkd.models.options import ImageShape
from fedkd.training import Architecture, Arrays, Cohort, ComposedObjective, stacking_of
from fedkd.training.binding import Stacking
from fedkd.training.cohort import named_models
from strategies.knowledge import Broadcast, ClientUpload, Knowledge, Predictions
from strategies.memory import Memory
from strategies.plan import Federation, RoundPlan
from strategies.server import Server, ServerModel


class StrategySettings(BaseModel):
    """Settings under ``strategy:``; each algorithm adds its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str


class Step(NamedTuple):
    """The smallest step of some kind that a model takes.

    Attributes:
        setting: what names the model.
        model: the model.
        rows: how many go through it together, >= 1; None where it does not train.
        remedy: who would train on a single row, and what helps, where it is one.
    """

    setting: str
    model: ModelSettings
    rows: int | None
    remedy: str


UploadKind = Literal["nothing", "predictions", "parameters"]

SettingsT = TypeVar("SettingsT", bound=StrategySettings)


class DistillationStrategy(ABC, Generic[SettingsT]):
    """One federated algorithm.

    Subclasses name their settings class, say what clients upload, and implement both halves.
    """

    Settings: ClassVar[type[StrategySettings]]
    uploads: UploadKind = "nothing"
    """What clients send; where they send predictions, the ensemble's accuracy is measured."""

    judges_received: ClassVar[bool] = False
    """Whether `before_evaluation` needs what the server last sent."""
    needs_public: ClassVar[bool] = False
    """Whether the algorithm cannot run without a public set."""

    def __init__(self, settings: SettingsT, federation: Federation) -> None:
        self.settings = settings
        self.federation = federation

    @property
    def learns_alone(self) -> bool:
        """Whether nothing that is exchanged reaches what is judged of a client, in any round.

        Such clients are trained by the backend that trains them in `local`, whatever else the
        algorithm could do, and have its bits. Decides only how clients are trained.
        """
        return False

    def composed(self) -> ComposedObjective | None:
        """Return what clients minimise where it is made of terms.

        Decides only how clients are trained (stacked or not), never on what; its progress and
        temperature have no say.
        """
        return None

    def check(self, input_shape: ImageShape) -> None:
        """Refuse, before any worker starts, objectives that do not fit the clients' models.

        Raises:
            ValueError: naming the setting, what it got and what would work.
        """
        self.stackings(input_shape)

    def stackings(self, input_shape: ImageShape) -> dict[str, Stacking]:
        """Tell for each architecture whether stacked clients can learn by `composed`.

        Empty where clients minimise nothing that is made of terms.

        Raises:
            ValueError: naming the setting of an objective that does not fit the clients' models.
        """
        composed = self.composed()
        if composed is None:
            return {}
        architectures = self.federation.architectures
        return {
            architecture: stacking_of(
                composed,
                tuple(named_models(self.architecture(architectures.index(architecture))).items()),
                input_shape=input_shape,
                num_classes=self.federation.num_classes,
            )
            for architecture in dict.fromkeys(architectures)
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
        )

    def public_steps(self, setting: str, model: ModelSettings, rows: int) -> Iterator[Step]:
        """The steps on public rows alone, of which there are so many."""
        yield Step(
            setting,
            model,
            min(rows, self.federation.local.batch_size),
            "a step on public rows would; use norm: group, or a larger clients.batch_size, "
            "data.public.size or exchange.rows_per_round",
        )

    # -- server half ---------------------------------------------------------------------

    def participants(self, plan: RoundPlan) -> tuple[int, ...]:
        """Choose who takes part in a round."""
        return plan.participants()

    def prepare(self, server: Server) -> Broadcast:
        """Do what comes before the first round and say what clients receive in it."""
        return Broadcast()

    @abstractmethod
    def aggregate(
        self, uploads: Iterable[ClientUpload], plan: RoundPlan, server: Server
    ) -> Broadcast:
        """Fold a round's uploads, in client order, into what the next round receives."""

    def uploaded_weights(self, client: int, server: Server) -> Arrays:
        """Return weights like those that a client uploads: what counts is names and shapes."""
        return server.initial_weights(client)

    def server_model(self) -> ServerModel | None:
        """Return the server's own model, where the algorithm has one to evaluate."""
        return None

    def memory(self) -> Memory:
        """Return everything that `prepare` and `aggregate` have left in this object.

        A round that is left out and a run that is resumed go on from it; what is not in it is
        lost then.
        """
        return Memory()

    def recall(self, memory: Memory, server: Server) -> None:
        """Take back what `memory` returned, here or in another process; `prepare` is not run."""

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
    def client_round(
        self, cohort: Cohort, received: Knowledge | None, plan: RoundPlan
    ) -> Sequence[Knowledge]:
        """Learn and answer: one piece of knowledge a member, or an empty sequence."""

    def before_evaluation(self, cohort: Cohort, received: Knowledge | None) -> None:
        """Put the model to be judged in place; by default it is the client's own."""


def upload_logits(cohort: Cohort, rows: np.ndarray) -> list[Knowledge]:
    """Let each member predict public rows and send the logits."""
    return [
        Predictions(kind="logits", rows=rows, values=values)
        for values in cohort.predict_public(rows)
    ]


def predictions_of(uploads: Iterable[ClientUpload]) -> Iterable[tuple[ClientUpload, Predictions]]:
    """Pass on uploads that must be predictions."""
    for upload in uploads:
        if not isinstance(upload.knowledge, Predictions):
            raise TypeError(f"expected predictions from client {upload.client}")
        yield upload, upload.knowledge
