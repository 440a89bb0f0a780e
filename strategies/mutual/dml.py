"""Deep mutual learning across clients: each distils from the other clients' soft labels.

Source: Zhang, Xiang, Hospedales, Lu, 2018, section 3. https://arxiv.org/abs/1706.00384
The paper's networks share one labelled data set and exchange predictions at every step. Here
labels are private, so cross-entropy is taken on private rows and the mutual term on public
rows, in the same step; predictions are exchanged once a round, which ``clients.local.steps: 1``
makes once a step. The peers' term is the mean over peers, as in the paper (the authors'
published code sums); with detached targets that equals the divergence to their mean
probability up to a constant, which is why one averaged target is all that travels.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from fedkd.exchange.payload import Asked, Payload
from fedkd.exchange.payloads import Predictions
from fedkd.exchange.values import Value
from fedkd.mutual.averages import PeerMean
from fedkd.training import Cohort, ComposedObjective
from strategies.contract import (
    Call,
    Card,
    Federation,
    Received,
    Round,
    ServerTools,
    Step,
    Strategy,
    StrategySettings,
    Upload,
    payloads_of,
    upload_logits,
)
from strategies.shared.taught import (
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


@dataclass(frozen=True)
class Peers(Value):
    """What the peers teach.

    Attributes:
        shared: the mean of all that sent something; None before anybody did.
        others: for each of them the mean of the others; None where there was no other.
    """

    shared: Predictions | None = None
    others: Mapping[int, Predictions | None] = field(default_factory=dict)


class DML(Strategy[DMLSettings, Peers]):
    """Learn from own labels and from the peers at once; then show the peers what was learnt."""

    card = Card(
        learns="each client from the other clients",
        up="n x C logits",
        down="n x C, each client its own",
        equation=(
            "CE on private rows + kd_weight * T^2 KL(mean of the others || own) on public rows"
        ),
    )
    Settings: ClassVar[type[StrategySettings]] = DMLSettings
    State: ClassVar[type[Value]] = Peers
    up = (Predictions,)
    down = (Predictions,)
    needs_public = True
    has_ensemble = True

    def __init__(self, settings: DMLSettings, federation: Federation) -> None:
        super().__init__(settings, federation)
        check_public_labels(settings, federation)

    @property
    def learns_alone(self) -> bool:
        """Whether what is received never counts."""
        return never_taught(self.settings, self.federation)

    def composed(self) -> ComposedObjective:
        """The settings' terms."""
        return composed_of(self.settings, self.federation)

    def rows_of_step(self, private_rows: int) -> int:
        """Private and public rows go through the model together."""
        return rows_of_step(self.federation, self.settings, private_rows)

    def smallest_steps(self) -> Iterator[Step]:
        """Public rows may have a forward pass of their own."""
        yield from super().smallest_steps()
        yield from apart_steps(self, self.settings)

    def client(self, cohort: Cohort, received: Received, call: Call) -> Sequence[Payload]:
        """Minimise both terms in every step; then predict the round's public rows."""
        learn(cohort, received, call, self.settings)
        return upload_logits(cohort, call)

    def receives(self, state: Peers, client: int, round: Round) -> str | int | None:
        """What the others taught, or what all did where the client is none of them."""
        if client in state.others:
            return None if state.others[client] is None else client
        return None if state.shared is None else "shared"

    def payload(self, state: Peers, key: str | int) -> Payload:
        """The mean of all, or of the others of one client."""
        taught = state.shared if isinstance(key, str) else state.others[key]
        assert taught is not None  # noqa: S101
        return taught

    def asks(self, state: Peers, client: int, round: Round, server: ServerTools) -> Asked:
        """Logits of the round's rows."""
        return round.asked_logits

    def aggregate(
        self, state: Peers, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Peers:
        """Give each participant the mean of the others, and everybody else the mean of all."""
        temperature = self.settings.softening(round.next().progress)
        soft = self.settings.average == "probability"
        mean = PeerMean(temperature=temperature, average=self.settings.average)
        own = {
            upload.client: mean.add(sent.values)
            for upload, sent in payloads_of(uploads, Predictions)
        }
        if not mean.count:
            return Peers()

        def target(values: torch.Tensor) -> Predictions:
            return Predictions(
                rows=round.public_rows,
                values=values.float().numpy(),
                scale="probabilities" if soft else "logits",
                temperature=temperature,
                averaged=True,
            )

        shared = target(mean.of_all())
        if self.settings.include_self:
            return Peers(shared)
        if len(own) == 1:
            # A lone participant has no peers; the next round's others still learn from it.
            return Peers(shared, dict.fromkeys(own))
        others = {client: target(mean.of_others(values)) for client, values in own.items()}
        return Peers(shared, others)
