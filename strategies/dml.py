"""Deep mutual learning across clients: each distils from the other clients' soft labels.

Source: Zhang, Xiang, Hospedales, Lu, 2018, section 3. https://arxiv.org/abs/1706.00384
The paper's networks share one labelled data set and exchange predictions at every step. Here
labels are private, so cross-entropy is taken on private rows and the mutual term on public
rows, in the same step; predictions are exchanged once a round, which ``clients.local.steps: 1``
makes once a step. The peers' term is the mean over peers, as in the paper (the authors'
published code sums); with detached targets that equals the divergence to their mean
probability up to a constant, which is why one averaged target is all that travels.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, Literal

import torch

from fedkd.mutual.averages import PeerMean
from fedkd.training import Cohort, ComposedObjective
from strategies.base import (
    DistillationStrategy,
    Step,
    StrategySettings,
    predictions_of,
    upload_logits,
)
from strategies.knowledge import Broadcast, ClientUpload, Knowledge, Predictions
from strategies.plan import Federation, RoundPlan
from strategies.server import Server
from strategies.taught import (
    TaughtSettings,
    apart_steps,
    check_public_labels,
    composed_of,
    learn,
    never_taught,
    rows_of_step,
)


class DMLSettings(TaughtSettings):
    """Settings under ``strategy:`` when ``name: dml``; the peers are the teachers.

    Attributes:
        include_self: let a client's own predictions count among its teachers.
        average: ``probability`` averages softened predictions, ``logit`` averages logits.
    """

    name: Literal["dml"] = "dml"
    include_self: bool = False
    average: Literal["probability", "logit"] = "probability"


class DML(DistillationStrategy[DMLSettings]):
    """Learn from own labels and from the peers at once; then show the peers what was learnt."""

    Settings: ClassVar[type[StrategySettings]] = DMLSettings
    uploads = "predictions"
    needs_public = True

    def __init__(self, settings: DMLSettings, federation: Federation) -> None:
        super().__init__(settings, federation)
        check_public_labels(settings, federation)

    @property
    def learns_alone(self) -> bool:
        """Whether what is received never counts."""
        return never_taught(self.settings, self.federation)

    def composed(self) -> ComposedObjective | None:
        """The terms of ``strategy.objective``, where it is set."""
        return composed_of(self.settings, self.federation)

    def rows_of_step(self, private_rows: int) -> int:
        """Private and public rows go through the model together."""
        return rows_of_step(self.federation, self.settings, private_rows)

    def smallest_steps(self) -> Iterator[Step]:
        """Public rows may have a forward pass of their own."""
        yield from super().smallest_steps()
        yield from apart_steps(self, self.settings)

    def client_round(
        self, cohort: Cohort, received: Knowledge | None, plan: RoundPlan
    ) -> Sequence[Knowledge]:
        """Minimise both terms in every step; then predict the round's public rows."""
        learn(cohort, received, plan, self.settings)
        return upload_logits(cohort, plan.public_rows)

    def aggregate(
        self, uploads: Iterable[ClientUpload], plan: RoundPlan, server: Server
    ) -> Broadcast:
        """Give each participant the mean of the others, and everybody else the mean of all."""
        temperature = self.settings.softening(plan.next().progress)
        mean = PeerMean(temperature=temperature, average=self.settings.average)
        own = {
            upload.client: mean.add(predictions.values)
            for upload, predictions in predictions_of(uploads)
        }
        if not mean.count:
            return Broadcast()

        def target(values: torch.Tensor) -> Predictions:
            return Predictions(
                kind="mean_probability" if self.settings.average == "probability" else "mean_logit",
                rows=plan.public_rows,
                values=values.float().numpy(),
                temperature=temperature,
            )

        shared = target(mean.of_all())
        if self.settings.include_self:
            return Broadcast(shared)
        if len(own) == 1:
            # A lone participant has no peers; the next round's others still learn from it.
            return Broadcast(shared, personal=dict.fromkeys(own))
        others = {client: target(mean.of_others(values)) for client, values in own.items()}
        return Broadcast(shared, personal=others)
