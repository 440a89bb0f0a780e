"""FedDF: the server averages its clients' weights, then lets all their models teach the average.

Source: Lin, Kong, Stich, Jaggi, 2020, Algorithms 1 and 3. https://arxiv.org/abs/2006.07242
Each architecture has a student, which starts from the average of those who have it. The teachers
are the models of all clients, whatever their architecture; they teach the softmax of their mean
logits on unlabelled public rows.

Differs from the published code: the learning rate does not follow a cosine, gradients are not
clipped, and ``drop_worst`` is without the test for outliers that follows where no teacher is below
chance.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar, Literal

import numpy as np
from pydantic import field_validator, model_validator

from fedkd.bounds import Count
from fedkd.exchange.payloads import Predictions, Weights
from fedkd.exchange.views import RunningMean
from fedkd.models import ModelSettings
from fedkd.training import (
    Cohort,
    OptimizerSettings,
    Passes,
    PublicLesson,
    supervised,
    towards_targets,
)
from strategies.baselines.fedavg import Averaging, AveragingSettings, GlobalModels
from strategies.contract import (
    Call,
    Card,
    Fault,
    PrivateUse,
    Received,
    Round,
    ServerModelSettings,
    ServerTools,
    Step,
    StrategySettings,
    Upload,
    payloads_of,
)
from strategies.shared.as_published import train_mode_logits
from strategies.shared.robust import Consensus, RobustSettings


class FedDFSettings(AveragingSettings, RobustSettings):
    """Settings under ``strategy:`` when ``name: feddf``.

    Attributes:
        weighting: of the averages that students start from: ``examples`` weights a client by its
            private rows; ``equal`` counts every client once.
        teachers: ``equal`` counts every client's logits once, as in the paper; ``accuracy``
            weights them by the share of validation rows that the client's model gets right.
        drop_worst: let no client teach whose model gets fewer validation rows right than chance
            would.
        optimizer: of the students; it begins every round without memory.
        server_steps: steps that a student takes in a round at most; the paper allows 10000.
        patience: steps without a better validation accuracy after which it stops; the student that
            was best is kept. The paper waits for 1000.
        validate_every: steps between two looks at the validation rows.
    """

    name: Literal["feddf"] = "feddf"
    teachers: Literal["equal", "accuracy"] = "equal"
    drop_worst: bool = False
    optimizer: OptimizerSettings = OptimizerSettings(name="adam", lr=1e-3)
    server_steps: Count = 500
    patience: Count = 100
    validate_every: Count = 50

    @field_validator("optimizer")
    @classmethod
    def _keeps_its_rate(cls, optimizer: OptimizerSettings) -> OptimizerSettings:
        # A schedule would begin anew with every look at the validation rows.
        if not optimizer.constant:
            raise ValueError(
                "strategy.optimizer of feddf must have a constant rate, got warm_up "
                f"{optimizer.warm_up} and decay {optimizer.decay}"
            )
        return optimizer

    @model_validator(mode="after")
    def _robust_rules_count_teachers_once(self) -> "FedDFSettings":
        if self.teachers == "accuracy":
            self.check_no_defence(
                "strategy.teachers: accuracy", "it counts each teacher once; use teachers: equal"
            )
        return self


FAULTS = {
    "teacher_in_train_mode": Fault(
        does="asks the teachers in training mode: BatchNorm by the batch at hand, dropout on",
        read_in="WenkeHuang/FCCL, models/feddf.py",
        right="teachers are in evaluation mode",
        shows_with=(
            "clients.models=[{name: cnn, options: {norm: batch}}]",
            "strategy.server_steps=100",
        ),
    ),
}


class FedDF(Averaging[FedDFSettings, GlobalModels]):
    """Weights up, averages that all clients' models teach, weights down."""

    card = Card(
        learns="the server's models from all clients' models; clients start from the server's",
        up="P",
        down="P",
        equation=(
            "student starts from the average; KL(softmax(mean_k z_k) || student) on public rows"
        ),
    )
    Settings: ClassVar[type[StrategySettings]] = FedDFSettings
    needs_public = True
    faults: ClassVar[Mapping[str, Fault]] = FAULTS

    @property
    def private_use(self) -> PrivateUse:
        """Students stop by validation rows, and teachers may count by them."""
        return super().private_use._replace(validation="how long students learn")

    @property
    def sums(self) -> None:
        """The server looks at each model."""
        return

    def learn(self, cohort: Cohort, received: Received, call: Call) -> None:
        """Train on private rows."""
        cohort.fit(supervised, private=call.local)

    def aggregate(
        self, state: GlobalModels, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> GlobalModels:
        """Average each architecture and the logits of all clients; let the latter teach the former.

        One upload at a time is held. An architecture without uploads starts from what it was.
        """
        averages: dict[str, RunningMean[Weights]] = {}
        lesson: PublicLesson | None = None
        with Consensus(self.settings, scale="logits") as ensemble:
            for upload, sent in payloads_of(uploads, Weights):
                model = self.federation.models[upload.client]
                logits = self._predicted(model, upload.client, sent, round, server)
                # Huge weights are numbers, and what they make of a picture need not be one.
                if not np.isfinite(logits).all():
                    continue
                mean = averages.setdefault(model.key, RunningMean())
                mean.add(sent, upload.weight(self.settings.weighting))
                say = self._say(model, sent, server)
                if say > 0:
                    ensemble.add(upload.client, logits, say)
            if ensemble.clients:
                lesson = self._lesson(ensemble.pop_of_all().numpy(), round)
        starts = {key: mean.mean() for key, mean in averages.items()}
        models = {**state.models, **starts}
        if lesson is not None:
            models = {key: self._taught(key, models[key], lesson, round, server) for key in models}
        return GlobalModels(models)

    def _predicted(
        self, model: ModelSettings, client: int, sent: Weights, round: Round, server: ServerTools
    ) -> np.ndarray:
        """Return what a teacher says of the round's public rows."""
        if not self.commits("teacher_in_train_mode"):
            return server.predict_with(model, sent.arrays, round.public_rows)
        return train_mode_logits(
            model,
            sent.arrays,
            server.data.public_inputs[round.public_rows],
            input_shape=server.data.input_shape,
            num_classes=self.federation.num_classes,
            batch_size=round.local.batch_size,
            seed=int(round.random(client).integers(2**31)),
        )

    def _say(self, model: ModelSettings, sent: Weights, server: ServerTools) -> float:
        """Return how much a client's model counts among the teachers; 0: it is none."""
        settings = self.settings
        if settings.teachers == "equal" and not settings.drop_worst:
            return 1.0
        return teachers_say(
            server.accuracy_with(model, sent.arrays),
            chance=1 / self.federation.num_classes,
            by_accuracy=settings.teachers == "accuracy",
            drop_worst=settings.drop_worst,
        )

    def _lesson(self, logits: np.ndarray, round: Round) -> PublicLesson:
        """Return the public rows and the teachers' mean logits on them."""
        return PublicLesson(
            rows=round.public_rows,
            targets=Predictions(rows=round.public_rows, values=logits).targets,
            passes=Passes(batch_size=round.local.batch_size, steps=self.settings.server_steps),
        )

    def _taught(
        self, key: str, start: Weights, lesson: PublicLesson, round: Round, server: ServerTools
    ) -> Weights:
        """Return a student after it has learnt from the ensemble."""
        student = server.fit_while_better(
            server.new(key, start.arrays),
            towards_targets,
            round=round,
            public=lesson,
            patience=self.settings.patience,
            every=self.settings.validate_every,
        )
        return Weights(arrays=student.model.weights)

    def server_models(self) -> Mapping[str, ServerModelSettings]:
        """A student of each architecture."""
        return {
            model.key: ServerModelSettings(model, self.settings.optimizer)
            for model in self.federation.models
        }

    def smallest_steps(self) -> Iterator[Step]:
        """Students have the clients' architectures and learn from public rows alone."""
        yield from super().smallest_steps()
        yield from self.clients_public_steps(self.federation.rows_per_round)


def teachers_say(accuracy: float, *, chance: float, by_accuracy: bool, drop_worst: bool) -> float:
    """Return how much a model counts among the teachers.

    Args:
        accuracy: share of validation rows that it gets right.
        chance: what guessing would get right.
        by_accuracy: count it by its accuracy, and not once.
        drop_worst: leave it out where guessing is better.
    """
    if drop_worst and accuracy < chance:
        return 0.0
    return accuracy if by_accuracy else 1.0
