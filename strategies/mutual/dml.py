"""Deep mutual learning across clients: each distils from the other clients' soft labels.

Source: Zhang, Xiang, Hospedales, Lu, 2018, section 3. https://arxiv.org/abs/1706.00384
The paper's networks share one labelled data set and exchange predictions at every step. Here
labels are private, so cross-entropy is taken on private rows and the mutual term on public
rows, in the same step; predictions are exchanged once a round, which ``clients.local.steps: 1``
makes once a step. The peers' term is the mean over peers, as in the paper (the authors'
published code sums); with detached targets that equals the divergence to their mean
probability up to a constant, which is why one averaged target is all that travels.
In the paper everybody hears everybody; ``peers`` draws other graphs.
"""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor

from fedkd.bounds import Count
from fedkd.exchange.payload import Payload, expect
from fedkd.exchange.payloads import Predictions
from fedkd.exchange.values import Value
from fedkd.metrics.agreement import agreement_matrix
from fedkd.mutual.averages import entering
from fedkd.mutual.graphs import (
    PeerGraph,
    before,
    best_peers,
    exponentially_before,
    random_peers,
)
from fedkd.mutual.peers import constants
from fedkd.targets import Scale
from strategies.contract import Card, Round, ServerTools, StrategySettings, Upload, payloads_of
from strategies.mutual.taught_by_peers import Peers, TaughtByPeers, lesson
from strategies.shared.robust import Consensus, TrustingSettings
from strategies.shared.taught import TaughtSettings


class DMLSettings(TaughtSettings, TrustingSettings):
    """Settings under ``strategy:`` when ``name: dml``; the peers are the teachers.

    Attributes:
        peers: whom a client hears of those that sent something last: ``all`` others; ``ring``: the
            one before it; ``exponential``: the one 1, 2, 4, ... before it, in turn by the round;
            ``random-k``: so many, drawn anew in every round; ``best-k``: those it agrees with most,
            by the share of the public rows that both give the same class.
        k: how many, of ``random-k`` and ``best-k``.
        include_self: let a client's own predictions count among its teachers.
        average: ``probability`` averages softened predictions, ``logit`` averages logits.
    """

    name: Literal["dml"] = "dml"
    peers: PeerGraph = "all"
    k: Count = Field(2)
    include_self: bool = False
    average: Literal["probability", "logit"] = "probability"

    @model_validator(mode="after")
    def _enough_are_heard(self) -> "DMLSettings":
        if self.peers in ("ring", "exponential"):
            self.check_no_defence(
                f"strategy.peers: {self.peers}",
                "of a single peer every rule makes what it said; use all, random-k or best-k",
            )
        if self.peers != "all" and self.trust_rate:
            self.check_no_defence(
                f"strategy.peers: {self.peers}",
                "what clients learn there is made of few, and trust would be of all; use all, or "
                "trust_rate: 0",
            )
        return self

    @property
    def scale(self) -> Scale:
        """What an average is of."""
        return "probabilities" if self.average == "probability" else "logits"


@dataclass(frozen=True)
class HeardPeers(Peers):
    """What the peers teach, where not everybody hears everybody.

    Attributes:
        own: what each that sent something would put into an average.
        best: of ``best-k``, whom each of them hears.
    """

    own: Mapping[int, Predictions] = field(default_factory=dict)
    best: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


class DML(TaughtByPeers[DMLSettings, HeardPeers]):
    """Learn from own labels and from the peers at once; then show the peers what was learnt."""

    card = Card(
        learns="each client from the other clients, or from some of them",
        up="n x C logits",
        down="n x C, each client its own",
        equation=(
            "CE on private rows + kd_weight * T^2 KL(mean of the others || own) on public rows"
        ),
    )
    Settings: ClassVar[type[StrategySettings]] = DMLSettings
    takes_views = True
    State: ClassVar[type[Value]] = HeardPeers

    @property
    def leaves_one_out(self) -> bool:
        """Means of the others' logits are made of their sum."""
        settings = self.settings
        sums = settings.sums() is not None and settings.average == "logit"
        return sums and settings.peers == "all" and not settings.include_self

    def receives(self, state: HeardPeers, client: int, round: Round) -> Hashable | None:
        """What those taught that the client hears; those who hear the same share it."""
        if self.settings.peers == "all" or self.learns_alone:
            return super().receives(state, client, round)
        if self.settings.peers == "best-k" and client not in state.best:
            # It has shown nothing that anybody could agree with.
            return None if state.shared is None else "shared"
        heard = self.heard(state, client, round)
        if self.settings.include_self and client in state.own:
            heard = tuple(sorted({client, *heard}))
        return heard or None

    def heard(self, state: HeardPeers, client: int, round: Round) -> tuple[int, ...]:
        """Return which of those that sent something a client hears in a round."""
        senders = tuple(state.own)
        match self.settings.peers:
            case "ring":
                return before(client, senders)
            case "exponential":
                # Counted by the rounds in which something was sent, of which this is the next.
                return exponentially_before(client, senders, max(round.number - 1, 1))
            case "random-k":
                return random_peers(client, senders, self.settings.k, round.random(client))
            case _:
                return state.best[client]

    def payload(self, state: HeardPeers, key: Any) -> Payload:
        """The mean of all, of the others of one client, or of those that it hears."""
        if not isinstance(key, tuple):
            return super().payload(state, key)
        scale, first = self.settings.scale, state.own[key[0]]
        with Consensus(self.settings, scale=scale) as heard:
            for client in key:
                heard.add(client, state.own[client].values)
            return lesson(first.rows, heard.of_all(), scale, first.temperature)

    def aggregate(
        self, state: HeardPeers, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> HeardPeers:
        """Give each participant the mean of those it hears, and everybody else the mean of all."""
        settings = self.settings
        temperature = settings.softening(round.next().progress)
        leaves_out = settings.peers == "all" and not settings.include_self
        own: dict[int, Tensor] = {}
        of_all: Payload | None = None

        def taught(values: Tensor) -> Predictions:
            return lesson(round.public_rows, values, settings.scale, temperature)

        with Consensus(
            settings, scale=settings.scale, trust=state.trust, clients=self.federation.num_clients
        ) as heard:
            for upload, sent in payloads_of(uploads, Predictions):
                own[upload.client] = entering(
                    sent.values, temperature=temperature, average=settings.average
                )
                heard.add(upload.client, own[upload.client], among_others=leaves_out)
                of_all = upload.of_all
            if not own:
                return HeardPeers(trust=state.trust)
            released = None if of_all is None else constants(expect(of_all, Predictions).values)
            shared = taught(heard.of_all() if released is None else released)
            if settings.peers != "all":
                tables = {client: taught(values) for client, values in own.items()}
                best = {}
                if settings.peers == "best-k":
                    agreement = agreement_matrix(np.stack([t.values for t in tables.values()]))
                    best = best_peers(agreement, tuple(own), settings.k)
                return HeardPeers(shared, own=tables, best=best)
            others: dict[int, Predictions | None] = {}
            if leaves_out:
                # A lone participant has no peers; the next round's others still learn from it.
                others = dict.fromkeys(own)
                if len(own) > 1:
                    others = {client: taught(heard.of_others(client)) for client in own}
            return HeardPeers(shared, others, trust=heard.trust)
