"""One-way distillation: knowledge flows in one direction, for comparison with mutual learning.

``teacher_to_clients``: a teacher is trained before the first round, then fixed, and every
client distils from it (Hinton, Vinyals, Dean, 2015. https://arxiv.org/abs/1503.02531).
``server_to_clients``: the clients' ensemble teaches a server model on the public rows, and the
clients distil from the server model.
``clients_to_server``: the ensemble teaches the server model, which does not teach back (as the
distillation step of Lin, Kong, Stich, Jaggi, 2020, Algorithm 1, with predictions uploaded in
place of weights. https://arxiv.org/abs/2006.07242).
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import torch.nn.functional as F

from fedkd.bounds import Count
from fedkd.models import ModelSettings
from fedkd.targets import StreamingMean
from fedkd.training import (
    Cohort,
    ComposedObjective,
    Objective,
    Passes,
    as_tensor,
    distilled,
    supervised,
    supervised_public,
)
from strategies.base import (
    DistillationStrategy,
    Step,
    StrategySettings,
    predictions_of,
    upload_logits,
)
from strategies.knowledge import Broadcast, ClientUpload, Knowledge, Predictions
from strategies.memory import Memory
from strategies.plan import Federation, RoundPlan
from strategies.server import Server, ServerModel
from strategies.taught import (
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


class OneWaySettings(TaughtSettings):
    """Settings under ``strategy:`` when ``name: one_way``.

    Attributes:
        direction: who teaches whom; see the module's first lines.
        model: the teacher's or the server's model.
        teacher_data: what the teacher is trained on. ``public``: the labelled public set;
            ``largest_client``: the private rows of the client that has most (it plays the
            teacher as well); ``pooled``: everybody's private rows, an upper bound that no
            federation has; ``auto``: ``public`` where it is labelled, else ``largest_client``.
        teacher_epochs: passes of the teacher over its rows.
        server_epochs: passes of the server model over a round's public rows.
    """

    name: Literal["one_way"] = "one_way"
    direction: Literal["teacher_to_clients", "server_to_clients", "clients_to_server"] = (
        "teacher_to_clients"
    )
    model: ModelSettings = ModelSettings(name="cnn")
    teacher_data: Literal["auto", "public", "largest_client", "pooled"] = "auto"
    teacher_epochs: Count = 30
    server_epochs: Count = 1


class OneWay(DistillationStrategy[OneWaySettings]):
    """A teacher that never learns from its students in the round in which it teaches them."""

    Settings: ClassVar[type[StrategySettings]] = OneWaySettings
    needs_public = True

    def __init__(self, settings: OneWaySettings, federation: Federation) -> None:
        super().__init__(settings, federation)
        if settings.teacher_data == "public" and not federation.public_labelled:
            raise ValueError(
                "strategy.teacher_data: public needs data.public.labelled: true; "
                "largest_client or pooled do without"
            )
        check_public_labels(settings, federation)
        taught_from_outside = settings.direction == "teacher_to_clients"
        self.uploads = "nothing" if taught_from_outside else "predictions"
        self._model: ServerModel | None = None
        self._taught = False

    @property
    def learns_alone(self) -> bool:
        """Whether what is received never counts."""
        one_sided = self.settings.direction == "clients_to_server"
        return one_sided or never_taught(self.settings, self.federation)

    def composed(self) -> ComposedObjective | None:
        """The terms of ``strategy.objective``, where it is set."""
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
        if settings.direction != "teacher_to_clients":
            yield from self.public_steps(setting, settings.model, federation.rows_per_round)
        elif self._teacher_source == "public":
            yield from self.public_steps(setting, settings.model, federation.public_size)
        else:
            largest = federation.num_examples.index(max(federation.num_examples))
            yield from self.private_steps(setting, settings.model, largest)

    @property
    def _teacher_source(self) -> str:
        source = self.settings.teacher_data
        if source == "auto":
            return "public" if self.federation.public_labelled else "largest_client"
        return source

    def client_round(
        self, cohort: Cohort, received: Knowledge | None, plan: RoundPlan
    ) -> Sequence[Knowledge]:
        """Learn from own labels and, where something was received, from the teacher."""
        learn(cohort, received, plan, self.settings)
        if self.settings.direction == "teacher_to_clients":
            return ()
        return upload_logits(cohort, plan.public_rows)

    def prepare(self, server: Server) -> Broadcast:
        """Train the teacher, or make the server's model."""
        if self.settings.direction != "teacher_to_clients":
            self._model = server.model(self.settings.model)
            return Broadcast()
        self._model = self._train_teacher(server)
        return Broadcast(self._lesson_for(self.federation.plan(1)))

    def _train_teacher(self, server: Server) -> ServerModel:
        passes = Passes(
            batch_size=self.federation.local.batch_size, epochs=self.settings.teacher_epochs
        )
        source = self._teacher_source
        if source == "public":
            teacher = server.model(self.settings.model)
            lesson = self.federation.plan(1).labelled_public(epochs=self.settings.teacher_epochs)
            teacher.fit(supervised_public, plan=None, public=lesson)
            return teacher
        rows = server.data.client_rows
        chosen = max(rows, key=len) if source == "largest_client" else np.concatenate(rows)
        teacher = server.model(self.settings.model, train_rows=np.sort(chosen))
        teacher.fit(supervised, plan=None, private=passes)
        return teacher

    def aggregate(
        self, uploads: Iterable[ClientUpload], plan: RoundPlan, server: Server
    ) -> Broadcast:
        """Keep the teacher as it is; or let the ensemble teach the server model."""
        if self.settings.direction == "teacher_to_clients":
            return Broadcast(self._lesson_for(plan.next()))
        temperature = self.settings.softening(plan.progress)
        mean = StreamingMean()
        for _, predictions in predictions_of(uploads):
            mean.add(F.softmax(as_tensor(predictions.values) / temperature, dim=-1))
        assert self._model is not None  # noqa: S101
        if mean.count:
            ensemble = Predictions(
                kind="mean_probability",
                rows=plan.public_rows,
                values=mean.mean().float().numpy(),
                temperature=temperature,
            )
            self._teach_server(self._model, ensemble, plan)
        if self.settings.direction == "clients_to_server" or not self._taught:
            return Broadcast()
        return Broadcast(self._lesson_for(plan.next()))

    def _teach_server(self, model: ServerModel, ensemble: Predictions, plan: RoundPlan) -> None:
        """Distil the ensemble: the server has no private rows, so terms on labels have no say."""
        settings = self.settings
        objective: Objective | ComposedObjective = partial(
            distilled, temperature=ensemble.temperature, scale_by_t2=settings.scale_by_t2
        )
        if settings.objective is not None:
            knowledge = knowledge_of(settings.objective, plan.progress)
            if knowledge is None:
                return
            objective = lesson_of(knowledge, ensemble, settings, plan)
        lesson = plan.public(ensemble, epochs=settings.server_epochs)
        model.fit(objective, plan=plan, public=lesson)
        self._taught = True

    def _lesson_for(self, plan: RoundPlan) -> Predictions:
        assert self._model is not None  # noqa: S101
        return Predictions(
            kind="logits",
            rows=plan.public_rows,
            values=self._model.predict_public(plan.public_rows),
            temperature=self.settings.softening(plan.progress),
        )

    def server_model(self) -> ServerModel | None:
        """The teacher or the server's model."""
        return self._model

    def memory(self) -> Memory:
        """Remember the model, and whether it has something to teach."""
        arrays = {} if self._model is None else self._model.to_arrays()
        return Memory(arrays, {"taught": self._taught, "model": self._model is not None})

    def recall(self, memory: Memory, server: Server) -> None:
        """Take the model back."""
        self._taught = memory.values["taught"]
        self._model = None
        if memory.values["model"]:
            self._model = server.model_from(self.settings.model, memory.arrays)
