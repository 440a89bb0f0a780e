"""Sign flips: the three one-hot answers that stand for a turned sign where scores are bounded."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from jaxtyping import Float, Int64
from pydantic import Field

from fedkd.exchange.adversaries.base import Seen
from fedkd.exchange.adversaries.scores import (
    SCORES,
    SHARED_SCORES,
    Scores,
    one_hot,
    rewritten,
)
from fedkd.exchange.adversaries.together import Chosen
from fedkd.exchange.payload import Payload


def second_class(
    mean: Float[np.ndarray, "rows classes"],
) -> Int64[np.ndarray, "rows"]:
    """Return the second most likely class of each row; of equal ones the first is more likely."""
    order = np.argsort(-mean, axis=1, kind="stable")
    return np.asarray(order[:, min(1, mean.shape[1] - 1)], np.int64)


class SignFlip(Chosen):
    """Each client says of every row that it is surely of one class.

    ``naive``: a class that is drawn for each row; ``fixed``: the first class; ``adversarial``: the
    second most likely class of the honest mean, which needs the answers of others.

    Source:
        Roux, Zimmer, Pokutta, 2025, On the Byzantine-resilience of distillation-based federated
        learning, ICLR. https://arxiv.org/abs/2402.12265
    """

    kind: Literal["sign_flip"] = "sign_flip"
    mode: Literal["naive", "fixed", "adversarial"] = Field(
        default="naive",
        description="naive: a random class; fixed: the first class; adversarial: the second most "
        "likely class of the honest mean",
    )

    @property
    def together(self) -> bool:
        """Whether the honest mean is needed."""
        return self.mode == "adversarial"

    @property
    def lies_about(self) -> tuple[type[Payload], ...]:
        """Where a mean is needed, scores that all clients have."""
        return SHARED_SCORES if self.together else SCORES

    def replaces(self, seen: Seen, rng: np.random.Generator) -> Mapping[int, Payload]:
        """Send a class for every row."""
        if self.together:
            return super().replaces(seen, rng)

        def lie(scores: Scores) -> np.ndarray:
            rows, classes = scores.values.shape
            number = classes if self.mode == "naive" else 1
            chosen = np.asarray(rng.integers(number, size=rows))
            return one_hot(scores.values, chosen, scores.scale)

        return {client: rewritten(honest, lie) for client, honest in seen.own.items()}

    def chosen(self, mean: Float[np.ndarray, "rows classes"]) -> Int64[np.ndarray, "rows"]:
        """The second most likely class."""
        return second_class(mean)
