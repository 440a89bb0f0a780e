"""MyMethod, to be changed: on each public row, clients that are surer count for more.

Source: Cho, Manoel, Joshi, Sim, Dimitriadis, 2022 (Fed-ET): a client's weight on a row is the
variance of its logits over the classes. https://arxiv.org/abs/2204.12703
Differs from the paper: clients learn from the ensemble themselves, not from a server's model.

`certainty` is the idea; put yours there first. `Settings` are what a user may choose, `Ensemble` is
what the server remembers, and the rest says who sends what and when.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from fedkd.exchange.payload import Asked, Payload
from fedkd.exchange.payloads import Predictions
from fedkd.exchange.values import Value
from fedkd.training import Cohort
from strategies.contract import (
    Call,
    Received,
    Round,
    ServerTools,
    Strategy,
    Upload,
    payloads_of,
    upload_logits,
)
from strategies.shared.taught import TaughtSettings, learn


class Settings(TaughtSettings):
    """Settings under ``strategy:``; the ensemble is the teacher.

    Attributes:
        power: of the variance; 0 is the plain mean.
    """

    power: float = Field(1.0, ge=0, le=100)


@dataclass(frozen=True)
class Ensemble(Value):
    """What the server remembers.

    Attributes:
        taught: its soft labels; None before the first answers.
    """

    taught: Predictions | None = None


def certainty(logits: np.ndarray, power: float) -> np.ndarray:
    """Return how much each row of logits ``[rows, classes]`` counts, ``[rows, 1]``."""
    return logits.var(axis=-1, keepdims=True, dtype=np.float64) ** power


class MyMethod(Strategy[Settings, Ensemble]):
    """Learn from own labels and from the ensemble; then predict the public rows again."""

    Settings = Settings
    State = Ensemble
    up = (Predictions,)
    down = (Predictions,)
    needs_public = True
    has_ensemble = True

    def client(self, cohort: Cohort, received: Received, call: Call) -> Sequence[Payload]:
        """Train, then predict the round's public rows."""
        learn(cohort, received, call, self.settings)
        return upload_logits(cohort, call)

    def receives(self, state: Ensemble, client: int, round: Round) -> str | None:
        """Everybody receives the same, once there is something."""
        return None if state.taught is None else "ensemble"

    def payload(self, state: Ensemble, key: str) -> Payload:
        """The ensemble's soft labels."""
        return state.taught

    def asks(self, state: Ensemble, client: int, round: Round, server: ServerTools) -> Asked:
        """Each client's logits of the round's rows."""
        return round.asked_logits

    def aggregate(
        self, state: Ensemble, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Ensemble:
        """Average soft labels, each row weighted by how sure its client is of it."""
        temperature = self.settings.softening(round.next().progress)
        total, weights = 0.0, 0.0
        for _, sent in payloads_of(uploads, Predictions):
            weight = certainty(sent.values, self.settings.power)
            total += weight * sent.targets.probabilities(temperature).numpy()
            weights += weight
        if not np.all(weights):
            # Nobody answered, or all are equally unsure of a row.
            return state
        taught = Predictions(
            rows=round.public_rows,
            values=(total / weights).astype(np.float32),
            scale="probabilities",
            temperature=temperature,
            averaged=True,
        )
        return Ensemble(taught)
