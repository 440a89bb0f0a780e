"""SCARLET: DS-FL in which soft labels that are still fresh are neither asked for nor sent again.

Source: Azuma, Nishio, Kitagawa, Nakano, Tanimura, 2025. https://arxiv.org/abs/2504.19602
Differs from the authors' code: a label is used as long as ``round - made < cache`` and replaced in
the round in which it is asked for, so that server and clients always learn equal labels (theirs
leaves the clients a stale one in the round between); the server knows which labels each client
has, so whoever was away gets those it missed.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from fedkd.bounds import Count
from fedkd.exchange.payload import Asked, Payload, expect
from fedkd.exchange.payloads import Orders, Predictions
from fedkd.exchange.values import Value
from fedkd.training import Cohort, supervised, towards_targets
from strategies.contract import (
    Call,
    Card,
    Fault,
    Received,
    Round,
    ServerModel,
    ServerModelSettings,
    ServerTools,
    Step,
    Strategy,
    StrategySettings,
    Upload,
    payloads_of,
)
from strategies.public_predictions.dsfl import (
    SERVER,
    SoftLabelSettings,
    soft_labels,
    steps_on_public_rows,
)
from strategies.shared.robust import Consensus

CACHE = "cache"
"""What a client calls the labels that it keeps: float32 ``[public, classes]``, a row of zeros for
each that it never got."""


class SCARLETSettings(SoftLabelSettings):
    """Settings under ``strategy:`` when ``name: scarlet``.

    Attributes:
        cache: rounds in which a soft label is used before it is asked for anew; 1 asks in every
            round, as DS-FL does.
    """

    name: Literal["scarlet"] = "scarlet"
    sharpening: Literal["sa", "era", "enhanced_era"] = "enhanced_era"
    cache: Count = Field(5)


@dataclass(frozen=True)
class Cache(Value):
    """What the server remembers.

    Attributes:
        labels: float32 ``[public, classes]``, a soft label of each public row that has one.
        made: int64 ``[public]``, the round in which it was made; 0 where there is none; negative,
            by the fault ``stale_cache``, where it is used once and not kept.
        held: bool ``[clients, public]``, whether a client is known to have a row's label.
        lesson: the round whose rows are learnt next; 0 where none of them has a label.
        model: the server's own, where it has one.
        trust: float64 ``[clients]`` that sums to 1, how much each client is trusted; None while all
            are trusted alike.
    """

    labels: np.ndarray
    made: np.ndarray
    held: np.ndarray
    lesson: int = 0
    model: ServerModel | None = None
    trust: np.ndarray | None = None


FAULTS = {
    "stale_cache": Fault(
        does="lets clients learn an old label in the round in which the server gets the new one, "
        "and keeps an expired one's successor only at the next request",
        read_in="kitsuyaazuma/SCARLET main: get_next_indices, update_global_cache",
        right="a label that is asked for is replaced at once, for server and clients",
        shows_with=("strategy.cache=2",),
    ),
}


class SCARLET(Strategy[SCARLETSettings, Cache]):
    """Ask for labels that are not fresh, send those that are missing, distil all of the round's."""

    card = Card(
        learns="as in dsfl",
        up="n x C probabilities of rows without a fresh label, 1 bit a row",
        down="n x C of new labels, 1 bit a row",
        equation="target = p^beta / sum p^beta of the mean p, kept for cache rounds",
    )
    Settings: ClassVar[type[StrategySettings]] = SCARLETSettings
    takes_views = True
    State: ClassVar[type[Value]] = Cache
    up = (Predictions,)
    down = (Predictions,)
    needs_public = True
    has_ensemble = True
    faults: ClassVar[Mapping[str, Fault]] = FAULTS

    # -- client half ---------------------------------------------------------------------

    def client(self, cohort: Cohort, received: Received, call: Call) -> Sequence[Payload]:
        """Note the labels that came, distil the lesson's, train at home, predict what is asked."""
        orders = expect(call.orders[0], Orders)
        caches = self._caches(cohort, received)
        cohort.keep(CACHE, caches)
        if orders.phase:
            rows = self.federation.round(int(orders.phase)).public_rows
            lessons = Received([_labels_of(cache, rows) for cache in caches])
            lesson = call.lesson(lessons, epochs=self.settings.distil_epochs)
            cohort.fit(towards_targets, public=lesson)
        cohort.fit(supervised, private=call.local)
        return soft_labels(cohort, call.rows_of(0))

    def _caches(self, cohort: Cohort, received: Received) -> list[np.ndarray]:
        """Return what each member keeps from now on."""
        caches = []
        for kept, piece in zip(cohort.kept(CACHE), received, strict=True):
            cache = self._no_labels() if kept is None else kept
            if piece is not None:
                missed = expect(piece, Predictions)
                cache = cache.copy()
                cache[missed.rows] = missed.values
            caches.append(cache)
        return caches

    def _no_labels(self) -> np.ndarray:
        return np.zeros((self.federation.public_size, self.federation.num_classes), np.float32)

    # -- server half ---------------------------------------------------------------------

    def begin(self, server: ServerTools) -> Cache:
        """Nobody has a label yet."""
        clients, rows = self.federation.num_clients, self.federation.public_size
        return Cache(
            labels=self._no_labels(),
            made=np.zeros(rows, np.int64),
            held=np.zeros((clients, rows), bool),
            model=server.new(SERVER) if self.settings.server_model else None,
        )

    def learnt(self, state: Cache) -> np.ndarray:
        """Return the public rows that server and clients learn next, whose labels there are."""
        if not state.lesson:
            return np.empty(0, np.int64)
        rows = self.federation.round(state.lesson).public_rows
        known: np.ndarray = rows[state.made[rows] != 0]
        return known

    def asked_rows(self, state: Cache, round: Round) -> np.ndarray:
        """Return the round's rows that have no fresh label."""
        rows, made = round.public_rows, state.made[round.public_rows]
        stale: np.ndarray = rows[(made <= 0) | (round.number - made >= self.settings.cache)]
        return stale

    def receives(self, state: Cache, client: int, round: Round) -> bytes | None:
        """The labels of the lesson that the client lacks; those who lack the same share them."""
        rows = self.learnt(state)
        missing = rows[~state.held[client, rows]]
        return missing.tobytes() if len(missing) else None

    def payload(self, state: Cache, key: bytes) -> Predictions:
        """Labels of these rows; which of the lesson's rows they are costs a bit for each."""
        missing = np.frombuffer(key, np.int64)
        planned = len(self.federation.round(state.lesson).public_rows)
        labels = _labels_of(state.labels, missing)
        return replace(labels, averaged=True, ids="subset", planned=planned)

    def orders(self, state: Cache, client: int, round: Round) -> Orders:
        """Which of the round's rows to predict, and which round's rows to learn."""
        rows, planned = self.asked_rows(state, round), len(round.public_rows)
        return Orders(rows=rows, planned=planned, phase=str(state.lesson or ""))

    def asks(self, state: Cache, client: int, round: Round, server: ServerTools) -> Asked:
        """Probabilities of the rows without a fresh label; of none, an answer says it was heard."""
        rows = self.asked_rows(state, round)
        return Predictions.asked(rows, self.federation.num_classes, scale="probabilities")

    def aggregate(
        self, state: Cache, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Cache:
        """Replace the labels that were asked for, and let the server's model distil the lesson.

        A client that answered has got what it was sent; one that did not may have, and is sent it
        again. Where nobody answers, old labels stay in use, and are asked for in the next round.
        """
        asked = self.asked_rows(state, round)
        labels, made, held = state.labels.copy(), state.made.copy(), state.held.copy()
        clients = self.federation.num_clients
        with Consensus(
            self.settings, scale="probabilities", trust=state.trust, clients=clients
        ) as consensus:
            for upload, sent in payloads_of(uploads, Predictions):
                held[upload.client, self.learnt(state)] = True
                if len(asked):
                    consensus.add(upload.client, sent.values)
            told = labels
            if consensus.clients:
                new = self.settings.sharpened(consensus.of_all())
                replaced, noted = self._replaced(made[asked], round)
                labels[asked[replaced]] = new[replaced]
                made[asked[replaced]] = noted[replaced]
                held[:, asked[replaced]] = False
                # What the server's model learns; clients learn the same, but for a fault.
                told = labels.copy()
                told[asked] = new
            trust = consensus.trust
        after = Cache(labels, made, held, round.number, state.model, trust)
        rows = self.learnt(after)
        if not len(rows):
            return replace(after, lesson=0)
        target = _labels_of(told, rows)
        return replace(after, model=self.settings.taught(state.model, target, round, server))

    def _replaced(self, made: np.ndarray, round: Round) -> tuple[np.ndarray, np.ndarray]:
        """Return which labels that were asked for are replaced, and what is noted for the new ones.

        All, and the round. By ``stale_cache`` those that have just become stale are not, and those
        that were replaced a round late are noted as not kept.
        """
        noted = np.full(len(made), round.number, np.int64)
        if not self.commits("stale_cache"):
            return np.ones(len(made), bool), noted
        age = round.number - made
        late = (made > 0) & (age > self.settings.cache)
        return (made <= 0) | late, np.where(late, -noted, noted)

    def forget(self, state: Cache, clients: Sequence[int]) -> Cache:
        """Whoever lost its cache lacks every label."""
        held = state.held.copy()
        held[list(clients)] = False
        return replace(state, held=held)

    def smallest_steps(self) -> Iterator[Step]:
        """Public rows have steps of their own."""
        yield from super().smallest_steps()
        yield from steps_on_public_rows(self, self.settings)

    def server_models(self) -> Mapping[str, ServerModelSettings]:
        """The server's model, if there is one."""
        return self.settings.server_models

    def judged_models(self, state: Cache) -> Mapping[str, ServerModel]:
        """The server's model, if there is one."""
        return {} if state.model is None else {SERVER: state.model}


def _labels_of(cache: np.ndarray, rows: np.ndarray) -> Predictions:
    """Return those of these rows that have a label, with it."""
    known = rows[cache[rows].any(axis=1)]
    return Predictions(rows=known, values=cache[known], scale="probabilities")
