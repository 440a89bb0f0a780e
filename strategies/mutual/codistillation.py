"""Codistillation: clients learn from what the others said of public rows some rounds ago.

Source: Anil et al., 2018, Large scale distributed neural network training through online
distillation, Algorithm 1. https://arxiv.org/abs/1804.03235
After a burn-in, in which a client learns from its labels alone, it learns as well from the mean of
the other clients' softened predictions, renewed every ``interval`` rounds and stale in between.

Differs from the paper: workers there exchange checkpoints, and each makes its peers' predictions of
its own rows by itself; here models may differ and data are private, so that predictions of public
rows are exchanged instead, and a client learns from those of the last exchange until the next. The
second term is the divergence from the mean, whose gradient is that of the paper's cross-entropy.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from fedkd.bounds import Count
from fedkd.exchange.payload import Asked, Payload, expect
from fedkd.exchange.payloads import Predictions
from fedkd.exchange.values import Value
from fedkd.mutual.averages import entering
from fedkd.schedules import ConstantSchedule, PositiveSchedule
from fedkd.training import Cohort
from strategies.contract import (
    Call,
    Card,
    Received,
    Round,
    ServerTools,
    StrategySettings,
    Upload,
    payloads_of,
)
from strategies.mutual.taught_by_peers import Peers, TaughtByPeers, lesson
from strategies.shared.robust import Consensus, TrustingSettings
from strategies.shared.taught import TaughtSettings

ROWS, LOGITS = "stale/rows", "stale/logits"
"""What a client calls the public rows of the last exchange, and what its peers said of them."""


class CodistillationSettings(TaughtSettings, TrustingSettings):
    """Settings under ``strategy:`` when ``name: codistillation``.

    Attributes:
        burn_in: rounds in which clients learn from their labels alone; the last of them ends with
            the first exchange.
        interval: rounds from one exchange to the next; 1 exchanges in every round.
    """

    name: Literal["codistillation"] = "codistillation"
    temperature: PositiveSchedule = ConstantSchedule(value=1.0)
    burn_in: Count = Field(1)
    interval: Count = Field(2)


@dataclass(frozen=True)
class StalePeers(Peers):
    """What the peers teach since the last exchange.

    Attributes:
        told: who is known to have it.
    """

    told: tuple[int, ...] = ()


class Codistillation(TaughtByPeers[CodistillationSettings, StalePeers]):
    """Learn alone at first; then from own labels and from what the peers said some rounds ago."""

    card = Card(
        learns="each client from the other clients as they were some rounds ago",
        up="n x C logits, every interval-th round",
        down="n x C, each client its own, once after an exchange",
        equation=(
            "CE on private rows + kd_weight * T^2 KL(mean of the others at the last exchange || "
            "own) on public rows"
        ),
    )
    Settings: ClassVar[type[StrategySettings]] = CodistillationSettings
    takes_views = True
    State: ClassVar[type[Value]] = StalePeers

    @property
    def learns_alone(self) -> bool:
        """Whether what is received never counts, or the burn-in lasts for the whole run."""
        return super().learns_alone or self.settings.burn_in >= self.federation.rounds

    def exchanges(self, round: Round) -> bool:
        """Tell whether predictions are exchanged at the end of a round."""
        since = round.number - self.settings.burn_in
        return since >= 0 and since % self.settings.interval == 0

    # -- client half ---------------------------------------------------------------------

    def client(self, cohort: Cohort, received: Received, call: Call) -> Sequence[Payload]:
        """Learn from what was received last, now or before; predict where it is time to."""
        self.study(cohort, self._stale(cohort, received, call), call)
        rows = self.asked_rows(call)
        return [Predictions(rows=rows, values=own) for own in cohort.predict_public(rows)]

    def _stale(self, cohort: Cohort, received: Received, call: Call) -> Received:
        """Keep what came, and return what each member keeps; no rows where that is nothing."""
        rows, logits = list(cohort.kept(ROWS)), list(cohort.kept(LOGITS))
        for place, piece in enumerate(received):
            if piece is not None:
                stale = expect(piece, Predictions)
                rows[place], logits[place] = stale.rows, stale.targets.logits().numpy()
        cohort.keep(ROWS, rows)
        cohort.keep(LOGITS, logits)
        if all(kept is None for kept in logits):
            return Received([None] * len(logits))
        temperature = self.settings.softening(call.progress)
        none = np.empty((0, self.federation.num_classes), np.float32)
        return Received(
            [
                Predictions(
                    rows=np.empty(0, np.int64) if ids is None else ids,
                    values=none if values is None else values,
                    temperature=temperature,
                    averaged=True,
                )
                for ids, values in zip(rows, logits, strict=True)
            ]
        )

    # -- server half ---------------------------------------------------------------------

    def asked_rows(self, round: Round) -> np.ndarray:
        """Return the public rows that clients predict: the round's, or none."""
        return round.public_rows if self.exchanges(round) else round.public_rows[:0]

    def asks(self, state: StalePeers, client: int, round: Round, server: ServerTools) -> Asked:
        """Logits where it is time to; of no row, an answer says that the client was there."""
        return Predictions.asked(self.asked_rows(round), self.federation.num_classes)

    def receives(self, state: StalePeers, client: int, round: Round) -> Hashable | None:
        """What the others taught at the last exchange, until the client is known to have it."""
        return None if client in state.told else super().receives(state, client, round)

    def forget(self, state: StalePeers, clients: Sequence[int]) -> StalePeers:
        """Whoever lost what its peers taught is sent it again."""
        return replace(state, told=tuple(who for who in state.told if who not in clients))

    def aggregate(
        self, state: StalePeers, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> StalePeers:
        """Note who was there; where predictions were exchanged, give everybody the others' mean."""
        settings = self.settings
        # Until the next exchange targets are softened anew by whoever learns from them.
        temperature = settings.softening(round.next().progress)
        there, rows = [], round.public_rows
        with Consensus(
            settings,
            scale="probabilities",
            trust=state.trust,
            clients=self.federation.num_clients,
        ) as heard:
            for upload, sent in payloads_of(uploads, Predictions):
                there.append(upload.client)
                if len(sent.rows):
                    said = entering(sent.values, temperature=temperature)
                    heard.add(upload.client, said, among_others=True)
            if not heard.clients:
                if state.shared is None:
                    return state
                return replace(state, told=tuple(sorted({*state.told, *there})))
            shared = lesson(rows, heard.of_all(), "probabilities", temperature)
            others: dict[int, Predictions | None] = dict.fromkeys(heard.clients)
            if len(others) > 1:
                for client in others:
                    taught = heard.of_others(client)
                    others[client] = lesson(rows, taught, "probabilities", temperature)
            return StalePeers(shared, others, trust=heard.trust)
