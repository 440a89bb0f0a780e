"""One-way distillation: knowledge flows in one direction, for comparison with mutual learning.

``teacher_to_clients``: a teacher is trained before the first round, then fixed, and every
client distils from it (Hinton, Vinyals, Dean, 2015. https://arxiv.org/abs/1503.02531).
``server_to_clients``: the clients' ensemble teaches a server model on the public rows, and the
clients distil from the server model.
``clients_to_server``: the ensemble teaches the server model, which does not teach back (as the
distillation step of Lin, Kong, Stich, Jaggi, 2020, Algorithm 1, with predictions uploaded in
place of weights. https://arxiv.org/abs/2006.07242).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch.nn.functional as F

from fedkd.bounds import Count, CountOrZero, PathText
from fedkd.exchange.payload import Asked, Payload
from fedkd.exchange.payloads import Predictions
from fedkd.exchange.values import Value
from fedkd.models import ModelSettings
from fedkd.training import (
    Cohort,
    ComposedObjective,
    as_tensor,
    supervised,
    supervised_public,
)
from strategies.contract import (
    Brought,
    Call,
    Card,
    Federation,
    PrivateUse,
    Received,
    Round,
    ServerModel,
    ServerModelSettings,
    ServerTools,
    Step,
    Strategy,
    StrategySettings,
    Upload,
    payloads_of,
    upload_logits,
)
from strategies.shared.robust import Consensus, TrustingSettings
from strategies.shared.taught import (
    TaughtSettings,
    apart_steps,
    check_public_labels,
    composed_of,
    knowledge_of,
    learn,
    lesson_of,
    never_taught,
    rows_of_step,
)

TEACHER = "teacher"
"""The name of the server's model."""


class OneWaySettings(TaughtSettings, TrustingSettings):
    """Settings under ``strategy:`` when ``name: one_way``.

    Attributes:
        direction: who teaches whom; see the module's first lines.
        model: the teacher's or the server's model.
        teacher_data: what the teacher is trained on. ``public``: the labelled public set;
            ``largest_client``: the private rows of the client that has most (it plays the
            teacher as well); ``pooled``: everybody's private rows, an upper bound that no
            federation has; ``auto``: ``public`` where it is labelled, else ``largest_client``.
        teacher_epochs: passes of the teacher over its rows; 0: it stays as it is at first, for a
            ``strategy.model`` of your own that comes trained.
        teacher_weights: safetensors file of a teacher that was trained elsewhere, such as a model
            that a run kept; it is fixed and not trained. null: it is trained here.
        server_epochs: passes of the server model over a round's public rows.
    """

    name: Literal["one_way"] = "one_way"
    direction: Literal["teacher_to_clients", "server_to_clients", "clients_to_server"] = (
        "teacher_to_clients"
    )
    model: ModelSettings = ModelSettings(name="cnn")
    teacher_data: Literal["auto", "public", "largest_client", "pooled"] = "auto"
    teacher_epochs: CountOrZero = 30
    teacher_weights: PathText | None = None
    server_epochs: Count = 1


@dataclass(frozen=True)
class Teaching(Value):
    """What the server remembers.

    Attributes:
        model: the teacher's or the server's.
        lesson: what it teaches in the next round; None where it has nothing to teach.
        taught: whether the model has learnt anything yet.
        trust: float64 ``[clients]`` that sums to 1, how much each client is trusted; None while all
            are trusted alike.
    """

    model: ServerModel
    lesson: Predictions | None = None
    taught: bool = False
    trust: np.ndarray | None = None


class OneWay(Strategy[OneWaySettings, Teaching]):
    """A teacher that never learns from its students in the round in which it teaches them."""

    card = Card(
        learns=(
            "clients from a fixed teacher, or from a server model, or a server model from the "
            "clients"
        ),
        up="n x C logits, or nothing",
        down="n x C, or nothing",
        equation="CE on private rows + kd_weight * T^2 KL(teacher || own) on public rows",
    )
    Settings: ClassVar[type[StrategySettings]] = OneWaySettings
    State: ClassVar[type[Value]] = Teaching
    down = (Predictions,)
    needs_public = True

    def __init__(self, settings: OneWaySettings, federation: Federation) -> None:
        super().__init__(settings, federation)
        if settings.teacher_data == "public":
            federation.check_public_labels(
                "strategy.teacher_data: public", "largest_client or pooled, which do without"
            )
        if settings.teacher_weights is not None and settings.direction != "teacher_to_clients":
            raise ValueError(
                "strategy.teacher_weights is for strategy.direction: teacher_to_clients, got "
                f"{settings.direction}, whose server model learns from the clients"
            )
        if settings.direction == "teacher_to_clients":
            settings.check_no_defence(
                "strategy.direction: teacher_to_clients",
                "clients send nothing; use server_to_clients or clients_to_server",
            )
        check_public_labels(settings, federation)

    @property
    def up(self) -> tuple[type[Payload], ...]:
        """Predictions, where clients teach the server."""
        return (Predictions,) if self.has_ensemble else ()

    @property
    def has_ensemble(self) -> bool:
        """Whether clients send anything."""
        return self.settings.direction != "teacher_to_clients"

    @property
    def learns_alone(self) -> bool:
        """Whether what is received never counts."""
        one_sided = self.settings.direction == "clients_to_server"
        return one_sided or never_taught(self.settings, self.federation)

    def composed(self) -> ComposedObjective:
        """The settings' terms."""
        return composed_of(self.settings, self.federation)

    def rows_of_step(self, private_rows: int) -> int:
        """Private and public rows go through the model together."""
        return rows_of_step(self.federation, self.settings, private_rows)

    def smallest_steps(self) -> Iterator[Step]:
        """The server trains a model as well: its teacher, or the one that the clients teach."""
        yield from super().smallest_steps()
        yield from apart_steps(self, self.settings)
        federation, settings = self.federation, self.settings
        setting = "strategy.model"
        if self._comes_trained:
            yield Step(setting, settings.model, None, "")
        elif settings.direction != "teacher_to_clients":
            yield from self.public_steps(setting, settings.model, federation.rows_per_round)
        elif self._teacher_source == "public":
            yield from self.public_steps(setting, settings.model, federation.public_size)
        else:
            largest = federation.num_examples.index(max(federation.num_examples))
            yield from self.private_steps(setting, settings.model, largest)

    @property
    def _comes_trained(self) -> bool:
        """Whether the teacher takes no step here."""
        settings = self.settings
        brought = settings.teacher_weights is not None or not settings.teacher_epochs
        return brought and settings.direction == "teacher_to_clients"

    @property
    def _teacher_source(self) -> str:
        source = self.settings.teacher_data
        if source == "auto":
            federation = self.federation
            usable = federation.public_labelled and not federation.other_classes
            return "public" if usable else "largest_client"
        return source

    @property
    def private_use(self) -> PrivateUse:
        """A teacher may have learnt from private rows, at the server."""
        trained = self.settings.direction == "teacher_to_clients" and not self._comes_trained
        pools = trained and self._teacher_source != "public"
        return super().private_use._replace(
            pooled="the teacher learns from private rows at the server" if pools else ""
        )

    def client(self, cohort: Cohort, received: Received, call: Call) -> Sequence[Payload]:
        """Learn from own labels and, where something was received, from the teacher."""
        learn(cohort, received, call, self.settings)
        return upload_logits(cohort, call) if self.has_ensemble else ()

    def server_models(self) -> Mapping[str, ServerModelSettings]:
        """The teacher, or the model that the clients teach."""
        return {TEACHER: ServerModelSettings(self.settings.model)}

    def begin(self, server: ServerTools) -> Teaching:
        """Train the teacher, or make the server's model."""
        model = server.new(TEACHER)
        if self.settings.direction != "teacher_to_clients":
            return Teaching(model)
        teacher = self._train_teacher(model, server)
        if teacher is None:
            return Teaching(model)
        return Teaching(teacher, self._lesson_for(teacher, self.federation.round(1), server), True)

    @property
    def brought(self) -> Mapping[str, Brought]:
        """The teacher's weights, where they come from a file."""
        settings = self.settings
        if settings.teacher_weights is None:
            return {}
        return {"strategy.teacher_weights": Brought(settings.teacher_weights, settings.model)}

    def _train_teacher(self, model: ServerModel, server: ServerTools) -> ServerModel | None:
        """Return the teacher; None where there is nobody left whose rows it may learn from."""
        for setting, brought in self.brought.items():
            return server.with_weights(model, server.read(brought, setting))
        if not self.settings.teacher_epochs:
            return model
        first, epochs = self.federation.round(1), self.settings.teacher_epochs
        source = self._teacher_source
        if source == "public":
            lesson = first.labelled_public(epochs=epochs)
            return server.fit(model, supervised_public, round=None, public=lesson).model
        rows = server.data.client_rows
        chosen = max(rows, key=len) if source == "largest_client" else np.concatenate(rows)
        if not len(chosen):
            return None
        passes = first.passes(epochs)
        return server.fit(model, supervised, round=None, private=passes, rows=np.sort(chosen)).model

    def receives(self, state: Teaching, client: int, round: Round) -> str | None:
        """What the teacher teaches, for everybody."""
        return None if state.lesson is None else "lesson"

    def payload(self, state: Teaching, key: str) -> Payload:
        """What the teacher teaches."""
        assert state.lesson is not None  # noqa: S101
        return state.lesson

    def asks(self, state: Teaching, client: int, round: Round, server: ServerTools) -> Asked | None:
        """Logits of the round's rows, where clients send anything."""
        return round.asked_logits if self.has_ensemble else None

    def aggregate(
        self, state: Teaching, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Teaching:
        """Keep the teacher as it is; or let the ensemble teach the server model."""
        following = round.next()
        if self.settings.direction == "teacher_to_clients":
            if not state.taught:
                return state
            return Teaching(state.model, self._lesson_for(state.model, following, server), True)
        temperature = self.settings.softening(round.progress)
        model, taught, trust = state.model, state.taught, state.trust
        ensemble: Predictions | None = None
        with Consensus(
            self.settings,
            scale="probabilities",
            trust=trust,
            clients=self.federation.num_clients,
        ) as consensus:
            for upload, predictions in payloads_of(uploads, Predictions):
                soft = F.softmax(as_tensor(predictions.values) / temperature, dim=-1)
                consensus.add(upload.client, soft)
            if consensus.clients:
                ensemble = Predictions(
                    rows=round.public_rows,
                    values=consensus.pop_of_all().numpy(),
                    scale="probabilities",
                    temperature=temperature,
                    averaged=True,
                )
                trust = consensus.trust
        if ensemble is not None:
            objective = self._server_objective(ensemble, round)
            if objective is not None:
                lesson = round.lesson(ensemble, epochs=self.settings.server_epochs)
                fitted = server.fit(model, objective, round=round, public=lesson)
                model, taught = fitted.model, True
        if self.settings.direction == "clients_to_server" or not taught:
            return Teaching(model, taught=taught, trust=trust)
        return Teaching(model, self._lesson_for(model, following, server), taught, trust)

    def _server_objective(self, ensemble: Predictions, round: Round) -> ComposedObjective | None:
        """What the server distils by; it has no private rows, so terms on labels have no say."""
        knowledge = knowledge_of(self.settings.terms, round.progress)
        return None if knowledge is None else lesson_of(knowledge, ensemble, self.settings, round)

    def _lesson_for(self, model: ServerModel, round: Round, server: ServerTools) -> Predictions:
        return Predictions(
            rows=round.public_rows,
            values=server.predict_public(model, round.public_rows),
            temperature=self.settings.softening(round.progress),
        )

    def judged_models(self, state: Teaching) -> Mapping[str, ServerModel]:
        """The teacher or the server's model."""
        return {TEACHER: state.model}
