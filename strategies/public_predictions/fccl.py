"""FCCL: clients agree on which classes go together, and do not forget what they were.

Source: Huang, Ye, Du, 2022, Learn from Others and Be Yourself in Heterogeneous Federated Learning
(CVPR), in the form of the authors' code. https://github.com/WenkeHuang/FCCL
The target of everybody, ITSELF INCLUDED, is the mean of all clients' logits.
Differs from the authors' code: predictions are exchanged once a public epoch, where theirs are
exchanged once a batch of public rows, which over a network would be a message each; a client trains
by its one optimizer throughout; a class with the same score in all rows of a batch is uncorrelated,
where theirs is NaN.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal

from pydantic import Field

from fedkd.bounds import Count, CountOrZero
from fedkd.exchange.payload import Payload
from fedkd.exchange.payloads import Predictions
from fedkd.exchange.views import Weighting
from fedkd.losses.cross_correlation import cross_correlation_loss
from fedkd.losses.reduction import PerRow, WholeStep
from fedkd.losses.response import soft_target_rows
from fedkd.schedules import ConstantSchedule, NonNegativeSchedule
from fedkd.targets import soften
from fedkd.training import (
    MODEL,
    Arrays,
    Batch,
    Cohort,
    Losses,
    Outputs,
    Passes,
    PublicLesson,
    supervised,
)
from strategies.contract import (
    CLIENTS,
    Call,
    Card,
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

PREVIOUS, PRETRAINED = "previous", "pretrained"
"""What a client calls its model as the round found it, and as it was before it met the others."""


class FCCLSettings(TrustingSettings):
    """Settings under ``strategy:`` when ``name: fccl``.

    Attributes:
        public_epochs: passes over the round's public rows towards the mean of all clients; 0: none.
        public_batch: public rows of a step, over which classes are correlated.
        off_diagonal_weight: of pairs of different classes in the correlation.
        pretrain_epochs: passes over private rows before a client's first round.
        previous_weight: of the divergence from the model that the round found, on private rows.
        pretrained_weight: of the divergence from the pretrained model there.
    """

    name: Literal["fccl"] = "fccl"
    public_epochs: CountOrZero = 1
    public_batch: Count = Field(256, ge=2)
    off_diagonal_weight: NonNegativeSchedule = ConstantSchedule(value=0.0051)
    pretrain_epochs: Count = 50
    previous_weight: NonNegativeSchedule = ConstantSchedule(value=1.0)
    pretrained_weight: NonNegativeSchedule = ConstantSchedule(value=1.0)


def with_others(outputs: Outputs, batch: Batch, *, off_diagonal_weight: float) -> Losses:
    """Correlate each class's logits with the mean of all clients' for it, and with no other."""
    assert outputs.public is not None and batch.targets is not None  # noqa: S101, PT018
    loss = cross_correlation_loss(
        outputs.public, batch.targets.logits(), off_diagonal_weight=off_diagonal_weight
    )
    return {"correlation": WholeStep(loss)}


def as_before(
    outputs: Mapping[str, Outputs], batch: Batch, *, weights: Mapping[str, float]
) -> Losses:
    """Cross-entropy, and the divergence from each earlier model by its weight."""
    own = outputs[MODEL]
    losses = dict(supervised(own, batch))
    for name, weight in weights.items():
        known = outputs[name].private
        assert own.private is not None and known is not None  # noqa: S101, PT018
        target = soften(known, temperature=1.0)
        rows = soft_target_rows(own.private, target, temperature=1.0)
        losses[name] = weight * PerRow(rows, of="private")
    return losses


class FCCL(SharedLesson[FCCLSettings, Lesson]):
    """Go with the others on public rows, and with one's own past at home; then show the scores."""

    card = Card(
        learns="clients from the mean of all clients' logits, themselves included",
        up="n x C logits",
        down="n x C logits",
        equation=(
            "sum_i (c_ii - 1)^2 + 0.0051 sum_{i != j} (c_ij + 1)^2 of the correlation c of own and "
            "mean logits on public rows; then CE + KL(previous || own) + KL(pretrained || own) on "
            "private rows"
        ),
    )
    Settings: ClassVar[type[StrategySettings]] = FCCLSettings
    takes_views = True
    directions: ClassVar[Mapping[str, str]] = {CLIENTS: "from the mean of all clients"}

    @property
    def sums(self) -> Weighting | None:
        """A mean is all that is needed; other rules look at each client."""
        return self.settings.sums()

    @property
    def learns_alone(self) -> bool:
        """Whether clients learn as in `local`."""
        return not self.learns(CLIENTS)

    def smallest_steps(self) -> Iterator[Step]:
        """Public rows have steps of their own."""
        yield from super().smallest_steps()
        if self.learns(CLIENTS) and self.settings.public_epochs:
            yield from self.clients_public_steps(self.federation.rows_per_round)

    def private_passes(self, *, first: bool) -> tuple[Passes, ...]:
        """Before its first round a client is pretrained at home."""
        once = (self.federation.round(1).passes(self.settings.pretrain_epochs),)
        own = once if first and self.learns(CLIENTS) else ()
        return (*super().private_passes(first=first), *own)

    def client(self, cohort: Cohort, received: Received, call: Call) -> Sequence[Payload]:
        """Pretrain once; go with the others; train at home beside what one was; send scores."""
        if not self.learns(CLIENTS):
            cohort.fit(supervised, private=call.local)
            return upload_logits(cohort, call)
        settings = self.settings
        earlier = {PRETRAINED: self._pretrained(cohort, call), PREVIOUS: cohort.weights()}
        if received and settings.public_epochs:
            weight = settings.off_diagonal_weight.at(call.progress)
            objective = partial(with_others, off_diagonal_weight=weight)
            cohort.fit(objective, public=self._lesson(received, call))
        weights = {
            PREVIOUS: settings.previous_weight.at(call.progress),
            PRETRAINED: settings.pretrained_weight.at(call.progress),
        }
        weights = {name: weight for name, weight in weights.items() if weight}
        for name in weights:
            cohort.freeze(name, earlier[name])
        at_home = partial(as_before, weights=weights) if weights else supervised
        cohort.fit(at_home, private=call.local, frozen=list(weights))
        return upload_logits(cohort, call)

    def _lesson(self, received: Received, call: Call) -> PublicLesson:
        passes = Passes(batch_size=self.settings.public_batch, epochs=self.settings.public_epochs)
        return replace(call.lesson(received), passes=passes)

    def _pretrained(self, cohort: Cohort, call: Call) -> list[Arrays]:
        """Return each member's pretrained model; those that have none yet train it first.

        Every call has this fit, so that the draws of those after it do not depend on company.
        """
        names = list(cohort.weights()[0])
        kept = {name: cohort.kept(f"{PRETRAINED}/{name}") for name in names}
        is_new = [array is None for array in kept[names[0]]]
        epochs = [self.settings.pretrain_epochs if new else 0 for new in is_new]
        cohort.fit(supervised, private=[call.passes(each) for each in epochs])
        now = cohort.weights()
        models: list[Arrays] = [{} for _ in now]
        for name in names:
            for model, own, known in zip(models, now, kept[name], strict=True):
                model[name] = own[name] if known is None else known
            if any(is_new):
                cohort.keep(f"{PRETRAINED}/{name}", [model[name] for model in models])
        return models

    def aggregate(
        self, state: Lesson, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Lesson:
        """Average the logits of all; without any the old mean stays."""
        clients = self.federation.num_clients
        with Consensus(
            self.settings, scale="logits", trust=state.trust, clients=clients
        ) as consensus:
            for upload, sent in payloads_of(uploads, Predictions):
                consensus.add(upload.client, sent.values, upload.weight("equal"))
            if not consensus.clients:
                return state
            values = consensus.pop_of_all().numpy()
            told = Predictions(rows=round.public_rows, values=values, averaged=True)
            return Lesson(told, trust=consensus.trust)
