"""Randomised response: each client says a class of each public row, not always the true one."""

from dataclasses import replace
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np

from fedkd.exchange.ledger import Cost
from fedkd.exchange.mechanisms.sensitivity import (
    as_logits,
    known,
    on_simplex,
    refuses_table,
    voted,
)
from fedkd.exchange.mechanisms.wanted import WantedNoise
from fedkd.exchange.payload import Asked, Payload
from fedkd.exchange.payloads import Predictions
from fedkd.exchange.release import Occasion, Where
from fedkd.privacy import RandomizedResponse, epsilon_for_randomized_response


class RandomizedAnswers(WantedNoise):
    """k-ary randomised response on the class that a client gives each public row.

    The class is told truly with ``p = e^eps0 / (e^eps0 + C - 1)``, any other one with ``q = (1 - p)
    / (C - 1)``; every row of every round is an answer of its own and costs eps0. What a server
    learns from n answers is the unbiased share ``(observed - q) / (p - q)`` of each class, and the
    nearest distribution to it. ``noise`` in the place of ``epsilon`` is ``1 / eps0``.

    Source:
        Kairouz, Oh, Viswanath, 2016, section 4. https://arxiv.org/abs/1407.1338
    """

    kind: Literal["randomized_response"] = "randomized_response"
    codecs: ClassVar[frozenset[str]] = frozenset({"float32", "float16", "int8", "hard_label"})

    def refuses(self, kind: type[Payload], where: Where) -> str | None:
        """It is what a client does with a class that it gives a row."""
        if where == "server":
            return (
                "clients answer at random by themselves; set privacy.where: client, or use "
                "privacy.mechanism: votes for a trusted server"
            )
        if kind is not Predictions:
            return (
                f"it protects the class of each row of predictions, got {kind.kind}; use "
                "privacy.mechanism: dp_sgd"
            )
        return None

    def refuses_asked(self, asked: Asked) -> str | None:
        """Which rows are sent says something, too."""
        return refuses_table(asked)

    def answer(self, occasion: Occasion) -> RandomizedResponse:
        """Return all answers of a release: one for each row that is asked for."""
        rows, classes, _ = known(occasion)
        # An answer of no row, as some rounds have it, is no release; its noise is never used.
        rows = max(rows, 1)
        if self.noise is not None:
            each = 1 / self.noise
        else:
            each = _each(self.epsilon, occasion.delta, rows * occasion.releases, classes)
        return RandomizedResponse(rows, each, classes)

    def travelling(self, asked: Asked) -> Asked:
        """What arrives are classes as distributions, whatever was asked for."""
        return replace(asked, about={**asked.about, "scale": "probabilities"})

    def bounded(self, payload: Payload) -> Payload:
        """Return the class of each row, as a distribution."""
        return voted(payload)

    def release(self, payload: Payload, occasion: Occasion, rng: np.random.Generator) -> Payload:
        """Replace some classes by others, drawn uniformly."""
        if not isinstance(payload, Predictions):
            raise TypeError(f"{self.kind} protects no {payload.kind}")
        answer = self.answer(occasion)
        told = payload.values.argmax(-1)
        lies = rng.random(len(told)) >= answer.keep
        others = (told + rng.integers(1, answer.classes, len(told))) % answer.classes
        told = np.where(lies, others, told)
        return replace(payload, values=np.eye(answer.classes, dtype=np.float32)[told])

    def cost(self, occasion: Occasion) -> Cost | None:
        """As many answers as rows."""
        if not known(occasion).rows:
            return None
        answer = self.answer(occasion)
        return Cost(
            self.kind,
            {"count": answer.count, "epsilon": answer.epsilon, "classes": answer.classes},
        )

    def read(self, released: Payload, occasion: Occasion) -> Payload:
        """Return the unbiased shares of the classes, as the nearest distributions."""
        if not isinstance(released, Predictions):
            return released
        answer = self.answer(occasion)
        shares = on_simplex(unbiased_shares(released.values, answer.keep, answer.other))
        if known(occasion).distributions:
            return replace(released, values=shares)
        return replace(released, values=as_logits(shares), scale="logits")

    def told(self, where: Where) -> str:
        """What is promised to whom."""
        return (
            "randomised response: each client answers with a class for each public row that is not "
            "always its own, so the guarantee holds against the server and against everybody else"
        )


def unbiased_shares(observed: np.ndarray, keep: float, other: float) -> np.ndarray:
    """Return ``(observed - q) / (p - q)``: its expectation are the true shares.

    Args:
        observed: shares of each class among the answers, ``[rows, classes]``.
        keep: p, with which the true class is told.
        other: q, with which any one other class is told.
    """
    shares: np.ndarray = (observed.astype(np.float64) - other) / (keep - other)
    return shares


@lru_cache(maxsize=256)
def _each(epsilon: float, delta: float, count: int, classes: int) -> float:
    return epsilon_for_randomized_response(epsilon, delta, count=count, classes=classes)
