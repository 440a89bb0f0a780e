"""FedMD: clients agree on class scores for public samples and never share weights.

Source: Li and Wang, 2019, Algorithm 1. https://arxiv.org/abs/1910.03581
Differs from the paper: transfer learning runs for a set number of epochs instead of to
convergence, and its public half is left out where the public set has no labels.
``digest_loss`` is the mean absolute error of the published code by default; the paper leaves
it open.
"""

from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from fedkd.losses.response import logit_l1, logit_mse, soft_target_loss
from fedkd.targets import StreamingMean
from fedkd.training import Batch, Cohort, Losses, Outputs, supervised, supervised_public
from strategies.base import DistillationStrategy, StrategySettings, predictions_of, upload_logits
from strategies.knowledge import Broadcast, ClientUpload, Knowledge, Predictions
from strategies.plan import RoundPlan
from strategies.server import Server


class FedMDSettings(StrategySettings):
    """Settings under ``strategy:`` when ``name: fedmd``.

    Attributes:
        digest_epochs: passes over the round's public rows towards the consensus.
        digest_loss: ``l1`` or ``mse`` on logits, or ``kl`` between their softmaxes.
        transfer_epochs: passes over the labelled public set before the first round.
        weighting: ``equal`` as in the paper; ``examples`` weights clients by private rows.
    """

    name: Literal["fedmd"] = "fedmd"
    digest_epochs: int = Field(1, ge=0)
    digest_loss: Literal["l1", "mse", "kl"] = "l1"
    transfer_epochs: int = Field(10, ge=0)
    weighting: Literal["equal", "examples"] = "equal"


class FedMD(DistillationStrategy[FedMDSettings]):
    """Transfer; then communicate, aggregate, distribute, digest, revisit, round after round."""

    Settings: ClassVar[type[StrategySettings]] = FedMDSettings
    uploads = "predictions"
    needs_public = True

    def client_round(
        self, cohort: Cohort, received: Knowledge | None, plan: RoundPlan
    ) -> Sequence[Knowledge]:
        """Digest the consensus first, then revisit private data, then communicate scores."""
        settings = self.settings
        if plan.round == 1 and plan.federation.public_labelled and settings.transfer_epochs:
            lesson = plan.labelled_public(epochs=settings.transfer_epochs)
            cohort.fit(supervised_public, public=lesson)
        if isinstance(received, Predictions):
            cohort.fit(self._digest, public=plan.public(received, epochs=settings.digest_epochs))
        cohort.fit(supervised, private=plan.local)
        return upload_logits(cohort, plan.public_rows)

    def _digest(self, outputs: Outputs, batch: Batch) -> Losses:
        """Approach the consensus: the distance of a member's logits to the mean logits."""
        if outputs.public is None or batch.targets is None:
            raise ValueError("a digest needs public rows with targets")
        match self.settings.digest_loss:
            case "l1":
                return {"digest": logit_l1(outputs.public, batch.targets)}
            case "mse":
                return {"digest": logit_mse(outputs.public, batch.targets)}
            case "kl":
                return {"digest": soft_target_loss(outputs.public, batch.targets, temperature=1.0)}

    def aggregate(
        self, uploads: Iterable[ClientUpload], plan: RoundPlan, server: Server
    ) -> Broadcast:
        """Take the (weighted) mean of the clients' logits as the consensus."""
        mean = StreamingMean()
        for upload, predictions in predictions_of(uploads):
            weight = upload.num_examples if self.settings.weighting == "examples" else 1
            mean.add(predictions.values, weight)
        if not mean.count:
            return Broadcast()
        consensus = mean.mean().float().numpy()
        return Broadcast(Predictions(kind="mean_logit", rows=plan.public_rows, values=consensus))
