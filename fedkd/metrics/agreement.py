"""Fidelity: how closely a student, or any model, follows another one.

High accuracy does not imply it, nor the reverse: Stanton et al., 2021,
https://arxiv.org/abs/2106.05945. NaN without rows.
"""

import numpy as np
from jaxtyping import Float

from fedkd.metrics.arrays import Array, as_float64, log_softmax, mean_or_nan


def top1_agreement(
    first_scores: Float[Array, "rows classes"], second_scores: Float[Array, "rows classes"]
) -> float:
    """Return the share of rows on which both models rank the same class first, in [0, 1].

    Logits or probabilities will do; of equally high scores, the first class counts.
    """
    same = as_float64(first_scores).argmax(axis=1) == as_float64(second_scores).argmax(axis=1)
    return mean_or_nan(same.astype(np.float64))


def mean_kl(
    p_logits: Float[Array, "rows classes"], q_logits: Float[Array, "rows classes"]
) -> float:
    """Return ``KL(p || q)`` at temperature 1, averaged over rows, in nats, >= 0.

    For fidelity, p is the teacher and q the student.
    """
    log_p, log_q = log_softmax(p_logits), log_softmax(q_logits)
    divergence = np.sum(np.exp(log_p) * (log_p - log_q), axis=1)
    return max(mean_or_nan(divergence), 0.0) if len(divergence) else float("nan")
