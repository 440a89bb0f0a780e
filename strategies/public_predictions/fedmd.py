"""FedMD: clients agree on class scores for public samples and never share weights.

Source: Li and Wang, 2019, Algorithm 1. https://arxiv.org/abs/1910.03581
Transfer learning on public rows of classes that no client holds (the paper's public MNIST beside
private letters, and CIFAR-10 beside subsets of CIFAR-100) takes a ``data.public.source``: models
have outputs for its classes too, as in the published code.
Differs from the paper: transfer learning runs for a set number of epochs instead of to
convergence, in whichever round a client is first; its public half is left out where the public set
has no labels, and its private half unless ``private_transfer_epochs`` asks for it, since the first
round trains on private rows anyway.
``digest_loss`` is the mean absolute error of the published code by default; the paper leaves
it open.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import model_validator

from fedkd.bounds import CountOrZero
from fedkd.exchange.payload import Payload
from fedkd.exchange.payloads import Predictions
from fedkd.exchange.views import Weighting
from fedkd.losses.distances import logit_l1_rows, logit_mse_rows
from fedkd.losses.reduction import PerRow
from fedkd.losses.response import soft_target_rows
from fedkd.training import Batch, Cohort, Losses, Outputs, Passes, supervised, supervised_public
from strategies.contract import (
    CLIENTS,
    Call,
    Card,
    Fault,
    Received,
    Round,
    ServerTools,
    Step,
    StrategySettings,
    Upload,
    payloads_of,
    upload_logits,
)
from strategies.shared.lessons import Lesson, SharedLesson
from strategies.shared.robust import Consensus, TrustingSettings

TRANSFERRED = "transferred"
"""What a client keeps once it has begun: that it has."""


class FedMDSettings(TrustingSettings):
    """Settings under ``strategy:`` when ``name: fedmd``.

    Attributes:
        digest_epochs: passes over the round's public rows towards the consensus.
        digest_loss: ``l1`` or ``mse`` on logits, or ``kl`` between their softmaxes.
        transfer_epochs: passes over the labelled public set before a client's first round, rows
            of classes included that the client, or no client, has.
        private_transfer_epochs: passes over private rows between these and the first round.
        weighting: ``equal`` as in the paper; ``examples`` weights clients by private rows.
    """

    name: Literal["fedmd"] = "fedmd"
    digest_epochs: CountOrZero = 1
    digest_loss: Literal["l1", "mse", "kl"] = "l1"
    transfer_epochs: CountOrZero = 10
    private_transfer_epochs: CountOrZero = 0
    weighting: Literal["equal", "examples"] = "equal"

    @model_validator(mode="after")
    def _robust_rules_count_clients_once(self) -> "FedMDSettings":
        if self.weighting == "examples":
            self.check_no_defence(
                "strategy.weighting: examples", "it counts each client once; use weighting: equal"
            )
        return self


FAULTS = {
    "revisit_first": Fault(
        does="trains on private rows before it digests the consensus",
        read_in="shaojiawei07/Selective-FD, its FedMD baseline (issue #1)",
        right="digest first, then revisit private rows",
    ),
    "no_pretraining": Fault(
        does="leaves out transfer learning on the labelled public set",
        read_in="shaojiawei07/Selective-FD, its FedMD baseline (issue #1)",
        right="a client begins on the labelled public set, where it has labels",
        shows_with=("data.public.labelled=true",),
        stands_for="strategy.transfer_epochs=0",
    ),
}


class FedMD(SharedLesson[FedMDSettings, Lesson]):
    """Transfer; then communicate, aggregate, distribute, digest, revisit, round after round."""

    card = Card(
        learns="clients from the clients' mean logits",
        up="n x C logits",
        down="n x C logits",
        equation="digest |z_k - mean_k z_k| on public rows, then revisit CE on private rows",
    )
    Settings: ClassVar[type[StrategySettings]] = FedMDSettings
    takes_views = True
    directions: ClassVar[Mapping[str, str]] = {
        CLIENTS: "from the consensus, and from public labels"
    }
    faults: ClassVar[Mapping[str, Fault]] = FAULTS

    @property
    def sums(self) -> Weighting | None:
        """A mean is all that is needed; a robust consensus looks at each client."""
        return self.settings.sums(self.settings.weighting)

    @property
    def learns_alone(self) -> bool:
        """Whether clients neither digest nor begin on the public set."""
        return not self.learns(CLIENTS) or not (self.settings.digest_epochs or self._transfers)

    @property
    def _transfers(self) -> bool:
        """Whether a client begins on the labelled public set."""
        wanted = self.settings.transfer_epochs > 0 and not self.commits("no_pretraining")
        return self.federation.public_labelled and wanted

    def smallest_steps(self) -> Iterator[Step]:
        """Clients learn from public rows alone, too: before the first round and in the digest."""
        yield from super().smallest_steps()
        federation = self.federation
        if self.learns_alone:
            return
        lessons = [federation.rows_per_round] if self.settings.digest_epochs else []
        if self._transfers:
            lessons.append(federation.public_size)
        for rows in lessons:
            yield from self.clients_public_steps(rows)

    def private_passes(self, *, first: bool) -> tuple[Passes, ...]:
        """Before its first round a client may train at home."""
        epochs = self.settings.private_transfer_epochs
        once = (self.federation.round(1).passes(epochs),) if first and epochs else ()
        return (*super().private_passes(first=first), *once)

    def client(self, cohort: Cohort, received: Received, call: Call) -> Sequence[Payload]:
        """Digest the consensus first, then revisit private data, then communicate scores."""
        epochs = self.settings.digest_epochs
        if self.learns(CLIENTS):
            self._transfer(cohort, call)
        if self.commits("revisit_first"):
            cohort.fit(supervised, private=call.local)
        if self.learns(CLIENTS) and received and epochs:
            cohort.fit(self._digest, public=call.lesson(received, epochs=epochs))
        if not self.commits("revisit_first"):
            cohort.fit(supervised, private=call.local)
        return upload_logits(cohort, call)

    def _transfer(self, cohort: Cohort, call: Call) -> None:
        """Let members that are new learn from labelled public rows, then from their own.

        Every call has these fits, so that the draws of those after them do not depend on company.
        """
        settings = self.settings
        if not (self._transfers or settings.private_transfer_epochs):
            return
        is_new = [known is None for known in cohort.kept(TRANSFERRED)]
        if self._transfers:
            every = call.labelled_public(epochs=settings.transfer_epochs)
            rows = np.arange(self.federation.public_size)
            lessons = [rows if new else rows[:0] for new in is_new]
            cohort.fit(supervised_public, public=replace(every, rows=lessons))
        if settings.private_transfer_epochs:
            each = [settings.private_transfer_epochs if new else 0 for new in is_new]
            cohort.fit(supervised, private=[call.passes(epochs) for epochs in each])
        cohort.keep(TRANSFERRED, [np.ones(1, np.int8)] * len(is_new))

    def _digest(self, outputs: Outputs, batch: Batch) -> Losses:
        """Approach the consensus: the distance of a member's logits to the mean logits."""
        if outputs.public is None or batch.targets is None:
            raise ValueError("a digest needs public rows with targets")
        student, targets = outputs.public, batch.targets
        match self.settings.digest_loss:
            case "l1":
                rows = logit_l1_rows(student, targets.logits())
            case "mse":
                rows = logit_mse_rows(student, targets.logits())
            case "kl":
                rows = soft_target_rows(student, targets.probabilities(1.0), temperature=1.0)
        return {"digest": PerRow(rows, of="public")}

    def aggregate(
        self, state: Lesson, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Lesson:
        """Take the (weighted or robust) mean of the clients' logits as the consensus."""
        clients = self.federation.num_clients
        with Consensus(
            self.settings, scale="logits", trust=state.trust, clients=clients
        ) as consensus:
            for upload, sent in payloads_of(uploads, Predictions):
                weight = upload.weight(self.settings.weighting)
                consensus.add(upload.client, sent.values, weight)
            if not consensus.clients:
                return Lesson(trust=state.trust)
            values = consensus.pop_of_all().numpy()
            told = Predictions(rows=round.public_rows, values=values, averaged=True)
            return Lesson(told, trust=consensus.trust)
