"""Free riders: clients that send back what they were taught, and hope that nobody sees it."""

from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from fedkd.bounds import Real
from fedkd.exchange.adversaries.base import Lying, Seen
from fedkd.exchange.adversaries.scores import (
    SHARED_SCORES,
    Scores,
    rewritten,
    scores_in,
)
from fedkd.exchange.payload import Payload
from fedkd.targets.simplex import nearest_shares

LARGEST_NOISE = 100.0


class FreeRider(Lying):
    """Each client sends what it has just received, with noise, instead of what it learnt.

    Of a row, or of everything, that it did not receive it sends uniform scores with noise. Received
    soft labels become logits where those are asked for, at the temperature that they were softened
    with, and received logits soft labels at temperature 1. Noisy soft labels are moved to the
    nearest distribution.

    Source:
        Fraboni, Vidal, Lorenzi, 2021, Free-rider attacks on model aggregation in federated
        learning: a disguised free rider returns what it received, with Gaussian noise.
        https://arxiv.org/abs/2006.11901 (there for weights.)
    """

    kind: Literal["free_rider"] = "free_rider"
    std: Annotated[Real, Field(ge=0, le=LARGEST_NOISE)] = Field(
        default=0.1, description="standard deviation of the noise in each score"
    )

    @property
    def lies_about(self) -> tuple[type[Payload], ...]:
        """Scores that it may receive again."""
        return SHARED_SCORES

    def replaces(self, seen: Seen, rng: np.random.Generator) -> Mapping[int, Payload]:
        """Send back what came."""
        lies: dict[int, Payload] = {}
        for client, honest in seen.own.items():
            received = seen.received.get(client)
            came = [] if received is None else list(scores_in(received))

            def lie(scores: Scores, came: list[Scores] = came) -> np.ndarray:
                values = _echoed(scores, came)
                noisy = values + self.std * rng.standard_normal(values.shape)
                return noisy if scores.scale == "logits" else nearest_shares(noisy)

            lies[client] = rewritten(honest, lie, SHARED_SCORES)
        return lies


def _echoed(asked: Scores, came: list[Scores]) -> np.ndarray:
    """Return what was received of the rows that are asked for; uniform scores of others."""
    rows, classes = asked.values.shape
    is_logits = asked.scale == "logits"
    values = np.full((rows, classes), 0.0 if is_logits else 1 / classes)
    alike = [s for s in came if s.of is asked.of and s.values.shape[1] == classes and len(s.ids)]
    if alike:
        # What stands in the same place is the answer to the same question.
        best = next((scores for scores in alike if scores.place == asked.place), alike[0])
        places = np.minimum(np.searchsorted(best.ids, asked.ids), len(best.ids) - 1)
        known = best.ids[places] == asked.ids
        echo = best.logits if is_logits else best.probabilities
        values[known] = echo[places[known]]
    return values
