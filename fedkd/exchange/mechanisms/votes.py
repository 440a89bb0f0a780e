"""Votes: a trusted server counts the classes that clients give each public row, with noise."""

import math
from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field

from fedkd.bounds import Real
from fedkd.exchange.ledger import Cost
from fedkd.exchange.mechanisms.sensitivity import as_logits, known, refuses_table, voted
from fedkd.exchange.mechanisms.wanted import WantedNoise, gaussian_noise
from fedkd.exchange.payload import Asked, Payload
from fedkd.exchange.payloads import Predictions
from fedkd.exchange.release import Occasion, Where

SENSITIVITY = math.sqrt(2)
"""Of the counts of a row: a client in another's place takes a vote from one class to another."""


class Votes(WantedNoise):
    """GNMax, and with a threshold confident GNMax: the class with most votes, counted with noise.

    Each public row is a query: ``argmax_j (n_j + N(0, s2^2))``, where n_j are the votes of the
    clients that answered. With ``threshold`` a row is answered only where ``max_j n_j + N(0, s1^2)
    >= threshold * n``; a row that is not gets the uniform distribution. The check costs for *every*
    row, answered or not; answers cost for answered rows.

    ``noise`` is ``s2 / sqrt(2)``, over the sensitivity; a wanted ``epsilon`` plans with every row
    answered, so less is spent where some are not.

    Source:
        Papernot et al., 2018, Scalable Private Learning with PATE, sections 4.1 and 4.2.
        https://arxiv.org/abs/1802.08908
    """

    kind: Literal["votes"] = "votes"

    threshold: Real | None = Field(
        None,
        ge=1e-6,
        le=1,
        description="share of the clients that has to agree; none: every row is answered",
    )
    check_noise: Real = Field(
        2.0,
        ge=0.01,
        le=100,
        description="of the check of the threshold, s1 / s2: how much more noise it has",
    )

    def refuses(self, kind: type[Payload], where: Where) -> str | None:
        """It is what a trusted server does with votes."""
        if where == "client":
            return (
                "somebody has to be trusted to count votes before noise is added; set "
                "privacy.where: server, or use privacy.mechanism: randomized_response"
            )
        if kind is not Predictions:
            return f"it counts the classes of predictions, got {kind.kind}; use gaussian"
        return None

    def refuses_asked(self, asked: Asked) -> str | None:
        """Which rows are sent says something, too."""
        return refuses_table(asked)

    def bounded(self, payload: Payload) -> Payload:
        """Return a client's votes: one for each row."""
        return voted(payload)

    def multiplier(self, occasion: Occasion) -> float:
        """Return ``s2 / sqrt(2)``."""
        if self.noise is not None:
            return float(self.noise)
        rows = max(known(occasion).rows, 1)
        # Of a row's answer 1 / m^2, of its check 1 / (check_noise * sqrt(2) m)^2 = less than that.
        checked = 0.0 if self.threshold is None else 1 / (2 * self.check_noise**2)
        one = gaussian_noise(self.epsilon, occasion.delta, rows * occasion.releases)
        return one * math.sqrt(1 + checked)

    def release(self, payload: Payload, occasion: Occasion, rng: np.random.Generator) -> Payload:
        """Return the class with most votes of each row, or of each that is answered."""
        if not isinstance(payload, Predictions):
            raise TypeError(f"{self.kind} protects no {payload.kind}")
        votes = np.rint(payload.values.astype(np.float64) * occasion.clients)
        rows, classes = votes.shape
        answered = np.ones(rows, bool)
        deviation = self.multiplier(occasion) * SENSITIVITY
        if self.threshold is not None:
            checks = votes.max(-1) + rng.normal(0, self.check_noise * deviation, rows)
            answered = checks >= self.threshold * occasion.clients
        winners = (votes + rng.normal(0, deviation, votes.shape)).argmax(-1)
        values = np.where(answered[:, None], np.eye(classes)[winners], 1 / classes)
        return replace(payload, values=values.astype(np.float32), averaged=True)

    def cost(self, occasion: Occasion) -> Cost | None:
        """What it costs if every row is answered."""
        return self._cost(occasion, known(occasion).rows)

    def cost_of(self, released: Payload, occasion: Occasion) -> Cost | None:
        """What it has cost: all checks, and the answers that there are."""
        if not isinstance(released, Predictions):
            raise TypeError(f"{self.kind} protects no {released.kind}")
        answered = int((released.values.max(-1) == 1).sum())
        return self._cost(occasion, answered)

    def _cost(self, occasion: Occasion, answered: int) -> Cost:
        multiplier = self.multiplier(occasion)
        figures: dict[str, int | float] = {"answered": answered, "noise_multiplier": multiplier}
        if self.threshold is not None:
            figures["checked"] = known(occasion).rows
            # The largest count moves by 1 at most.
            figures["check_multiplier"] = self.check_noise * SENSITIVITY * multiplier
        return Cost(self.kind, figures)

    def read(self, released: Payload, occasion: Occasion) -> Payload:
        """Return the winners as logits, where clients send these."""
        if not isinstance(released, Predictions) or known(occasion).distributions:
            return released
        return replace(released, values=as_logits(released.values), scale="logits")

    def told(self, where: Where) -> str:
        """What is promised to whom."""
        return (
            "noisy votes: the server is trusted and counts the classes that clients give each "
            "public row; the guarantee holds against clients and whoever sees what is made of the "
            "winners. The epsilon does not depend on the votes; a smaller one that does would "
            "itself be private. With a threshold what is reported counts the rows that were "
            "answered, as is seen afterwards; what can be promised before is every row's"
        )
