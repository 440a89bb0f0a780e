"""Surest: of each public row clients learn what the client says that is surest of it."""

from collections.abc import Iterable
from typing import Literal

import numpy as np
from pydantic import Field

from fedkd.exchange.payloads import Predictions
from strategies.contract import Round, ServerTools, Upload, payloads_of
from strategies.public_predictions.fedmd import FedMD, FedMDSettings
from strategies.shared.lessons import Lesson


def surest(logits: np.ndarray) -> np.ndarray:
    """Return, for each row, the logits of the client whose best class leads by most.

    Args:
        logits: of all clients, [clients, rows, classes].
    """
    first, second = np.sort(logits, axis=-1)[..., :-3:-1].transpose(2, 0, 1)
    return logits[(first - second).argmax(0), np.arange(logits.shape[1])]


class SurestSettings(FedMDSettings):
    """Those of FedMD, without its other rules of aggregation."""

    name: str = "surest:Surest"
    digest_loss: Literal["l1", "mse", "kl"] = "mse"
    aggregation: Literal["mean"] = "mean"
    trust_rate: float = Field(0.0, ge=0, le=0)


class Surest(FedMD):
    """FedMD with another consensus; who does what in a round is FedMD's."""

    Settings = SurestSettings
    sums = None  # it has to see every client's answer, not their sum

    def aggregate(
        self, state: Lesson, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Lesson:
        """Take each row's answer from the surest client."""
        answers = [sent.values for _, sent in payloads_of(uploads, Predictions)]
        if not answers:
            return state
        values = surest(np.stack(answers))
        return Lesson(Predictions(rows=round.public_rows, values=values))
