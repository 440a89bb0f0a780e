"""OKDDip across clients: each learns from a mixture of all that attention chooses for it.

Source: Chen, Mei, Wang, Feng, Chen, 2020, Online Knowledge Distillation with Diverse Peers.
https://arxiv.org/abs/1912.00350
Two linear maps turn each client's features of a row into a query and a key; how well a client's
query meets another's key says how much it learns from it. So each client has a teacher of its own
for every row, and clients stay different. A leader learns from the plain mean.

Differs from the paper: its peers are branches of one network, or networks that train side by side,
with a group leader among them that is kept in the end. Clients share no trunk: what they predict of
public rows travels in the place of branches, once a round, and with it what both maps read: each
row's features, pooled to ``features`` numbers, which costs bytes. The maps are the server's: only
there all peers' logits meet, from which the maps learn, so queries and keys are made there. The
leader is a model of the server's; without one, those who were away learn from the mean alone.
``average: logit`` is the published code's; the paper's text mixes probabilities.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedkd.bounds import Count, CountOrZero, LearningRate, Width
from fedkd.exchange.payload import INT64, Asked, Limit, Payload, expect
from fedkd.exchange.payloads import Bundle, Predictions
from fedkd.exchange.payloads.prototypes import LARGEST_FEATURE
from fedkd.exchange.values import Value
from fedkd.models import ModelSettings
from fedkd.mutual.averages import ensemble_target, entering
from fedkd.mutual.okddip import PeerAttention, okddip_losses, peer_mixtures
from fedkd.objectives.taps import PENULTIMATE
from fedkd.randomness import seeded_torch
from fedkd.schedules import (
    ConstantSchedule,
    NonNegativeSchedule,
    PositiveSchedule,
    RampUpSchedule,
)
from fedkd.targets.softening import soften
from fedkd.training import Arrays, Cohort, as_tensor
from fedkd.training.state import to_arrays
from fedkd.training.steps import FixedRate, Steps
from strategies.contract import (
    Call,
    Card,
    Federation,
    Received,
    Round,
    ServerModel,
    ServerModelSettings,
    ServerTools,
    Step,
    StrategySettings,
    Upload,
    payloads_of,
)
from strategies.mutual.taught_by_peers import Peers, TaughtByPeers, lesson
from strategies.shared.features import feature_widths, features_of
from strategies.shared.robust import CheckedSettings, checked
from strategies.shared.taught import TaughtSettings, knowledge_of, lesson_of

LEADER, PEERS = "leader", "peers"
LOGITS, FEATURES = "logits", "features"
MOST_FEATURES = 16
"""Numbers of a row's features that travel, where settings do not say how many."""


class OKDDipSettings(TaughtSettings, CheckedSettings):
    """Settings under ``strategy:`` when ``name: okddip``.

    Attributes:
        features: numbers of each public row's features that travel; models with more of them have
            neighbours averaged. None: as many as the narrowest model has, at most 16.
        reduction: queries and keys have so many times fewer numbers than features.
        include_self: let a client attend to itself, as in the paper; the more it does, the less it
            learns from the others.
        average: ``logit`` mixes logits, as the published code; ``probability`` softened
            predictions, as the paper.
        attention_steps: of the attention, in a round, each on all of the round's rows; 0 leaves
            it as it was drawn.
        attention_lr: its learning rate, with Adam.
        leader: a model of the server's, which learns from the mean of the peers and is judged;
            None: none.
        leader_epochs: its passes over the round's public rows.
    """

    name: Literal["okddip"] = "okddip"
    temperature: PositiveSchedule = ConstantSchedule(value=3.0)
    kd_weight: NonNegativeSchedule = RampUpSchedule(end=1.0, until=0.27)
    features: Width | None = None
    reduction: Count = Field(2)
    include_self: bool = True
    average: Literal["logit", "probability"] = "logit"
    attention_steps: CountOrZero = Field(10)
    attention_lr: LearningRate = 0.001
    leader: ModelSettings | None = None
    leader_epochs: Count = Field(1)


@dataclass(frozen=True, kw_only=True)
class PublicFeatures(Payload):
    """What a model's last linear layer reads of public rows, pooled.

    Attributes:
        rows: int64 positions in the public set, those of the round; they cost nothing.
        values: float32 ``[rows, features]``.
    """

    kind: ClassVar[str] = "public_features"

    rows: np.ndarray
    values: np.ndarray

    @property
    def payload_bytes(self) -> int:
        """Bytes of the values."""
        return self.values.nbytes

    @classmethod
    def asked(cls, rows: np.ndarray, width: int) -> Asked:
        """Describe one client's features of planned rows, so many numbers each."""
        limits = {
            "rows": Limit(shape=(len(rows),), dtype=INT64, constant=rows, subject="a row's id"),
            "values": Limit(
                shape=(len(rows), width),
                largest=LARGEST_FEATURE,
                subject="a feature",
                where="among the features",
            ),
        }
        return Asked(kind=cls, limits=limits)


@dataclass(frozen=True)
class Attending(Peers):
    """What the peers teach, and how they attend to each other.

    Attributes:
        attention: the two maps, by name.
        leader: the server's model, where there is one.
    """

    attention: Mapping[str, np.ndarray] = field(default_factory=dict)
    leader: ServerModel | None = None


class OKDDip(TaughtByPeers[OKDDipSettings, Attending]):
    """Learn from own labels and from one's own mixture of the peers; the leader from their mean."""

    card = Card(
        learns="each client from its own mixture of all, by attention; a leader from their mean",
        up="n x C logits and n x d pooled features (d <= 16 by default)",
        down="n x C, each client its own",
        equation=(
            "CE on private rows + w(t) T^2 KL(sum_b A_ab z_b || z_a) on public rows; "
            "A = softmax(Q K^T), Q and K linear in the features, trained by the same KL"
        ),
    )
    Settings: ClassVar[type[StrategySettings]] = OKDDipSettings
    State: ClassVar[type[Value]] = Attending
    up = (Bundle,)
    directions: ClassVar[Mapping[str, str]] = {
        PEERS: "each from its mixture of all clients",
        LEADER: "from the clients' mean",
    }
    taught: ClassVar[str] = PEERS

    def __init__(self, settings: OKDDipSettings, federation: Federation) -> None:
        super().__init__(settings, federation)
        self.width = travelling(settings.features, federation)

    # -- client half ---------------------------------------------------------------------

    def client(self, cohort: Cohort, received: Received, call: Call) -> Sequence[Payload]:
        """Learn; then send logits of the round's public rows, and their features."""
        self.study(cohort, received, call)
        rows, sent = call.public_rows, []
        for own in cohort.outputs(on=rows, layers=[PENULTIMATE]):
            features = features_of(own, self.width).numpy()
            parts = {
                LOGITS: Predictions(rows=rows, values=own.logits),
                FEATURES: PublicFeatures(rows=rows, values=features),
            }
            sent.append(Bundle(parts=parts))
        return sent

    # -- server half ---------------------------------------------------------------------

    def begin(self, server: ServerTools) -> Attending:
        """Draw the maps of the attention."""
        with seeded_torch(int(self.federation.round(1).random().integers(2**31))):
            attention = to_arrays(self._attention().state_dict())
        return Attending(
            attention=attention, leader=server.new(LEADER) if self.settings.leader else None
        )

    def asks(self, state: Attending, client: int, round: Round, server: ServerTools) -> Asked:
        """Logits of the round's rows, and features."""
        features = PublicFeatures.asked(round.public_rows, self.width)
        return Bundle.asked(**{LOGITS: round.asked_logits, FEATURES: features})

    def aggregate(
        self, state: Attending, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Attending:
        """Train the attention, mix for each participant, and let the leader learn the mean."""
        rows, settings = round.public_rows, self.settings
        temperature = settings.softening(round.next().progress)

        def said(upload: Upload) -> np.ndarray:
            own = expect(expect(upload.payload, Bundle)[LOGITS], Predictions).values
            return entering(own, temperature=temperature, average=settings.average).numpy()

        kept = checked(settings, uploads, said)
        sent = {upload.client: bundle for upload, bundle in payloads_of(kept, Bundle)}
        if not sent:
            return Attending(attention=state.attention, leader=state.leader)
        logits = _stacked(expect(own[LOGITS], Predictions).values for own in sent.values())
        features = _stacked(expect(own[FEATURES], PublicFeatures).values for own in sent.values())
        mean = ensemble_target(logits, temperature=temperature, average=settings.average)
        scale: Literal["logits", "probabilities"] = (
            "logits" if settings.average == "logit" else "probabilities"
        )
        shared = lesson(rows, mean, scale, temperature)
        leader = self._led(state.leader, shared, round, server)
        if len(sent) == 1:
            return Attending(shared, dict.fromkeys(sent), state.attention, leader)
        arrays, attention = self._attend(state.attention, logits, features, temperature)
        mixtures = peer_mixtures(logits, attention, temperature=temperature, average=self._average)
        others = {
            client: lesson(rows, mixture, "probabilities", temperature)
            for client, mixture in zip(sent, mixtures, strict=True)
        }
        if scale == "logits":
            # In the mixtures' scale: clients that were absent are stacked with those that were not.
            shared = lesson(
                rows, soften(mean, temperature=temperature), "probabilities", temperature
            )
        return Attending(shared, others, arrays, leader)

    @property
    def _average(self) -> Literal["prob", "logit"]:
        return "logit" if self.settings.average == "logit" else "prob"

    def _attention(self, arrays: Mapping[str, np.ndarray] | None = None) -> PeerAttention:
        attention = PeerAttention(self.width, reduction=self.settings.reduction)
        if arrays is not None:
            attention.load_state_dict({name: torch.tensor(own) for name, own in arrays.items()})
        return attention

    def _attend(
        self,
        arrays: Mapping[str, np.ndarray],
        logits: Tensor,
        features: Tensor,
        temperature: float,
    ) -> tuple[Arrays, Tensor]:
        """Minimise the peers' divergence from their mixtures; return the maps and the shares."""
        attention, itself = self._attention(arrays), self.settings.include_self
        optimizer = torch.optim.Adam(attention.parameters(), lr=self.settings.attention_lr)
        training = Steps([FixedRate(optimizer)], self.settings.attention_steps)
        for _ in training:
            terms = okddip_losses(
                logits,
                logits.mean(0),
                attention(features, include_self=itself),
                None,
                temperature=temperature,
                average=self._average,
            )
            training.descend({"kd_peers": terms["kd_peers"]})
        with torch.no_grad():
            return to_arrays(attention.state_dict()), attention(features, include_self=itself)

    # -- the leader ------------------------------------------------------------------------

    def _led(
        self, leader: ServerModel | None, mean: Predictions, round: Round, server: ServerTools
    ) -> ServerModel | None:
        """Return the leader after it has learnt the mean by the terms that need a teacher."""
        knowledge = knowledge_of(self.settings.terms, round.next().progress)
        if leader is None or knowledge is None or not self.learns(LEADER):
            return leader
        objective = lesson_of(knowledge, mean, self.settings, round.next())
        taught = round.lesson(mean, epochs=self.settings.leader_epochs)
        return server.fit(leader, objective, round=round, public=taught).model

    def server_models(self) -> Mapping[str, ServerModelSettings]:
        """The leader, if there is one."""
        leader = self.settings.leader
        return {LEADER: ServerModelSettings(leader)} if leader else {}

    def judged_models(self, state: Attending) -> Mapping[str, ServerModel]:
        """The leader, if there is one."""
        return {} if state.leader is None else {LEADER: state.leader}

    def smallest_steps(self) -> Iterator[Step]:
        """The leader learns on public rows."""
        yield from super().smallest_steps()
        if self.settings.leader is not None:
            rows = self.federation.rows_per_round
            yield from self.public_steps("strategy.leader", self.settings.leader, rows)


@lru_cache(maxsize=64)
def travelling(features: int | None, federation: Federation) -> int:
    """Return how many numbers of a row's features travel.

    Raises:
        ValueError: for more than some client's model has.
    """
    widths = feature_widths(federation, federation.input_shape)
    label, narrowest = min(widths.items(), key=lambda item: item[1])
    if features is not None and features > narrowest:
        raise ValueError(
            f"strategy.features must be at most {narrowest}, which is what {label} of "
            f"clients.models has, got {features}"
        )
    return min(narrowest, MOST_FEATURES) if features is None else features


def _stacked(tables: Iterable[np.ndarray]) -> Tensor:
    return as_tensor(np.stack(list(tables)))
