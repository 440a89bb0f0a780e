"""A kind of payload of one's own, and an algorithm that exchanges it: all in one file.

Clients vote for the class of those public rows of which they are sure, also of none; everybody
learns the classes that won so far.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedkd.exchange.payload import INT64, Asked, AtMost, Limit, Payload, RowIds, ids_bytes
from fedkd.exchange.values import Value
from fedkd.targets import Targets, soften
from fedkd.training import (
    Batch,
    Cohort,
    Losses,
    Outputs,
    PublicLesson,
    as_tensor,
    supervised,
    towards_targets,
)
from strategies.contract import (
    Call,
    Received,
    Round,
    ServerTools,
    Strategy,
    StrategySettings,
    Upload,
    payloads_of,
)


@dataclass(frozen=True, kw_only=True)
class Ballot(Payload):
    """The class of some public rows.

    Attributes:
        rows: int64 positions in the public set, strictly increasing.
        classes: int64, one a row; a byte each.
        sureness: float32 in [0, 1], one a row.
        planned: rows that were planned.
    """

    kind: ClassVar[str] = "ballot"
    lies: ClassVar = {
        "other_rows": lambda sent: replace(sent, rows=sent.rows + 10**6, planned=sent.planned + 1)
    }

    rows: np.ndarray
    classes: np.ndarray
    sureness: np.ndarray
    planned: int

    @property
    def payload_bytes(self) -> int:
        ids: RowIds = "subset"
        return (
            len(self.classes) + self.sureness.nbytes + ids_bytes(ids, len(self.rows), self.planned)
        )

    @classmethod
    def asked(cls, rows: np.ndarray, classes: int) -> Asked:
        some = AtMost(len(rows), "rows")
        limits = {
            "rows": Limit(shape=(some,), dtype=INT64),
            "classes": Limit(
                shape=(some,), dtype=INT64, smallest=0, largest=classes - 1, subject="a class"
            ),
            "sureness": Limit(shape=(some,), smallest=0.0, largest=1.0, subject="a sureness"),
        }
        return Asked(kind=cls, limits=limits, about={"rows": rows})

    def problem(self, asked: Asked) -> str | None:
        rows = asked.about["rows"]
        if self.planned != len(rows):
            return f"a ballot on {self.planned} rows, expected one on {len(rows)}"
        reason = super().problem(asked)
        if reason is not None:
            return reason
        known = bool(np.isin(self.rows, rows).all()) and bool((np.diff(self.rows) > 0).all())
        return None if known else "votes on rows that are not the round's, or not in order"

    def votes(self) -> tuple[np.ndarray, np.ndarray]:
        return self.rows, self.classes


class BallotsSettings(StrategySettings):
    """Settings: from which probability on a client is sure, and which slip it makes."""

    name: str
    sure: float = 0.4
    slip: str = ""


@dataclass(frozen=True)
class Votes(Value):
    """How sure all together have been so far: float64 ``[public, classes]``."""

    counted: np.ndarray


def learn(outputs: Outputs, batch: Batch) -> Losses:
    """Labels of private rows and, where there are any, the classes that won on public ones."""
    losses = supervised(outputs, batch)
    return losses if batch.targets is None else {**losses, **towards_targets(outputs, batch)}


class Ballots(Strategy[BallotsSettings, Votes]):
    """Learn the classes that won; vote for those of which one is sure."""

    Settings: ClassVar[type[StrategySettings]] = BallotsSettings
    State: ClassVar[type[Value]] = Votes
    up = (Ballot,)
    down = (Ballot,)
    needs_public = True

    def _slip(self, where: str) -> None:
        """Be wrong there, if the settings say so."""
        if self.settings.slip == where:
            {}["there is no such key"]

    def client(self, cohort: Cohort, received: Received, call: Call) -> Sequence[Payload]:
        self._slip("client")
        lesson = None
        if received:
            won = received.all(Ballot)[0]
            labels = np.eye(self.federation.num_classes, dtype=np.float32)[won.classes]
            lesson = PublicLesson(
                rows=won.rows, targets=Targets(labels, scale="probabilities"), passes=call.passes(1)
            )
        cohort.fit(learn, private=call.local, public=lesson)
        rows = call.public_rows
        return [self._vote(rows, logits) for logits in cohort.predict_public(rows)]

    def _vote(self, rows: np.ndarray, logits: np.ndarray) -> Ballot:
        soft = soften(as_tensor(logits), temperature=1.0).numpy()
        sure = soft.max(-1) >= self.settings.sure
        return Ballot(
            rows=rows[sure],
            classes=soft[sure].argmax(-1),
            sureness=soft[sure].max(-1),
            planned=len(rows),
        )

    def before_evaluation(self, cohort: Cohort, received: Received, call: Call) -> None:
        self._slip("judging")

    def begin(self, server: ServerTools) -> Votes:
        self._slip("begin")
        return Votes(np.zeros((self.federation.public_size, self.federation.num_classes)))

    def participants(self, state: Votes, round: Round) -> tuple[int, ...]:
        self._slip("participants")
        return super().participants(state, round)

    def receives(self, state: Votes, client: int, round: Round) -> str | None:
        self._slip("receives")
        return "won" if state.counted.any() else None

    def payload(self, state: Votes, key: str) -> Ballot:
        self._slip("payload")
        rows = np.flatnonzero(state.counted.any(-1))
        counted = state.counted[rows]
        share = counted.max(-1) / counted.sum(-1)
        return Ballot(
            rows=rows,
            classes=counted.argmax(-1),
            sureness=share.astype(np.float32),
            planned=len(state.counted),
        )

    def asks(self, state: Votes, client: int, round: Round, server: ServerTools) -> Asked:
        self._slip("asks")
        return Ballot.asked(round.public_rows, self.federation.num_classes)

    def aggregate(
        self, state: Votes, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Votes:
        counted = state.counted.copy()
        for _, sent in payloads_of(uploads, Ballot):
            self._slip("aggregate")
            counted[sent.rows, sent.classes] += sent.sureness
        return Votes(counted)

    def judged_models(self, state: Votes):
        self._slip("judged_models")
        return super().judged_models(state)
