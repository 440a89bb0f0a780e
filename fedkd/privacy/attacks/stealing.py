"""How much of a client's model is in another's hands: a student of its soft labels against it."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from fedkd.metrics.agreement import mean_kl
from fedkd.metrics.arrays import as_float64
from fedkd.privacy.attacks.figures import Interval, clopper_pearson


@dataclass(frozen=True, slots=True)
class Agreement:
    """How alike a stolen model and its original are, on rows that neither was trained on.

    Attributes:
        top1: share of rows with the same top class, with Clopper-Pearson's 95 % interval.
        kl: ``KL(original || stolen)`` in nats per row.
    """

    top1: Interval
    kl: float


def agreement(
    stolen_logits: Float[np.ndarray, "rows classes"], own_logits: Float[np.ndarray, "rows classes"]
) -> Agreement:
    """Compare a stolen model with its original.

    Args:
        stolen_logits: of the student of what the client sent.
        own_logits: of the client's model, for the same rows.

    Raises:
        ValueError: if there is no row.
    """
    # Of equally high scores the first class counts, as for `fedkd.metrics.top1_agreement`.
    same = int((as_float64(stolen_logits).argmax(1) == as_float64(own_logits).argmax(1)).sum())
    low, high = clopper_pearson(same, len(own_logits))
    return Agreement(
        Interval(same / len(own_logits), low, high), mean_kl(own_logits, stolen_logits)
    )
