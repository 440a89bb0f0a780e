"""Deep mutual learning across clients: each distils from the other clients' soft labels.

Source: Zhang, Xiang, Hospedales, Lu, 2018, section 3. https://arxiv.org/abs/1706.00384
The paper's networks share one labelled data set and exchange predictions at every step. Here
labels are private, so cross-entropy is taken on private rows and the mutual term on public
rows, in the same step; predictions are exchanged once a round, which ``clients.local.steps: 1``
makes once a step. The peers' term is the mean over peers, as in the paper (the authors'
published code sums); with detached targets that equals the divergence to their mean
probability up to a constant, which is why one averaged target is all that travels.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from fedkd.schedules import ConstantSchedule, CosineSchedule, NonNegativeSchedule, PositiveSchedule
from fedkd.targets import StreamingMean
from fedkd.training import Cohort, distilled, supervised
from strategies.base import (
    DistillationStrategy,
    RoundPlan,
    Server,
    StrategySettings,
    predictions_of,
    upload_logits,
)
from strategies.knowledge import Broadcast, ClientUpload, Knowledge, Predictions


class DMLSettings(StrategySettings):
    """Settings under ``strategy:`` when ``name: dml``.

    Attributes:
        temperature: softens peers and student; a number or a schedule over the run.
        ce_weight, kd_weight: weights of the private and the mutual term; numbers or schedules.
        scale_by_t2: multiply the mutual term by the temperature's square.
        include_self: let a client's own predictions count among its teachers.
        average: ``probability`` averages softened predictions, ``logit`` averages logits.
        public_epochs: passes over the round's public rows, spread over its steps.
        confidence_threshold: leave out public rows whose target is less sure, in [0, 1).
    """

    name: Literal["dml"] = "dml"
    temperature: PositiveSchedule = CosineSchedule(start=4.0, end=1.0)
    ce_weight: NonNegativeSchedule = ConstantSchedule(value=1.0)
    kd_weight: NonNegativeSchedule = ConstantSchedule(value=1.0)
    scale_by_t2: bool = True
    include_self: bool = False
    average: Literal["probability", "logit"] = "probability"
    public_epochs: int = Field(1, ge=1)
    confidence_threshold: float = Field(0.0, ge=0, lt=1)


class DML(DistillationStrategy[DMLSettings]):
    """Learn from own labels and from the peers at once; then show the peers what was learnt."""

    Settings: ClassVar[type[StrategySettings]] = DMLSettings
    uploads = "predictions"
    needs_public = True

    def client_round(
        self, cohort: Cohort, received: Knowledge | None, plan: RoundPlan
    ) -> Sequence[Knowledge]:
        """Minimise both terms in every step; then predict the round's public rows."""
        settings = self.settings
        ce_weight, kd_weight = (
            weight.at(plan.progress) for weight in (settings.ce_weight, settings.kd_weight)
        )
        if isinstance(received, Predictions) and kd_weight > 0:
            objective = partial(
                distilled,
                temperature=received.temperature,
                targets_are_logits=received.kind == "mean_logit",
                ce_weight=ce_weight,
                kd_weight=kd_weight,
                scale_by_t2=settings.scale_by_t2,
                confidence_threshold=settings.confidence_threshold,
            )
            lesson = plan.public(received, epochs=settings.public_epochs)
            cohort.fit(objective, private=plan.local, public=lesson)
        else:
            cohort.fit(partial(supervised, weight=ce_weight), private=plan.local)
        return upload_logits(cohort, plan.public_rows)

    def aggregate(
        self, uploads: Iterable[ClientUpload], plan: RoundPlan, server: Server
    ) -> Broadcast:
        """Give each participant the mean of the others, and everybody else the mean of all."""
        temperature = self.settings.temperature.at(plan.next().progress)
        mean = StreamingMean()
        own: dict[int, torch.Tensor] = {}
        for upload, predictions in predictions_of(uploads):
            values = torch.from_numpy(predictions.values)
            if self.settings.average == "probability":
                values = F.softmax(values / temperature, dim=-1)
            mean.add(values)
            own[upload.client] = values
        if not mean.count:
            return Broadcast()

        def target(values: torch.Tensor) -> Predictions:
            return Predictions(
                kind="mean_probability" if self.settings.average == "probability" else "mean_logit",
                rows=plan.public_rows,
                values=values.float().numpy(),
                temperature=temperature,
            )

        shared = target(mean.mean())
        if self.settings.include_self:
            return Broadcast(shared)
        if len(own) == 1:
            # A lone participant has no peers; the next round's others still learn from it.
            return Broadcast(shared, personal=dict.fromkeys(own))
        others = {client: target(mean.without(values)) for client, values in own.items()}
        return Broadcast(shared, personal=others)
