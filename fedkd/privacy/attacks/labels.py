"""Which labels does a client hold? Estimated from what it predicts on public rows.

Source:
    Shi, Ouyang, Wang, 2025, for the attack and its figure, the divergence from the true shares.
    https://arxiv.org/abs/2502.08001
"""

import numpy as np
from jaxtyping import Float

from fedkd.metrics.arrays import as_probabilities, log_softmax

_LEAST = 1e-6
"""A probability below counts as this: of float32 and of codecs, zeros are what was rounded away."""


def mean_prediction(
    probabilities: Float[np.ndarray, "rows classes"],
) -> Float[np.ndarray, " classes"]:
    """Return the share of each class in what a client predicts: its estimate, as it stands.

    Raises:
        ValueError: if there is no row, or a row is no distribution.
    """
    if not len(probabilities):
        raise ValueError("there must be public rows, got none")
    return np.asarray(as_probabilities(probabilities).mean(0))


def against_consensus(
    own: Float[np.ndarray, "rows classes"],
    consensus: Float[np.ndarray, "rows classes"],
    prior: Float[np.ndarray, " classes"],
    *,
    from_logits: bool,
) -> Float[np.ndarray, " classes"]:
    """Estimate a client's label shares from how its predictions differ from everybody's.

    ``softmax(log prior + mean over rows of (log p_own - log p_consensus))``. If both models are
    right, each for its own shares of labels, and images of a class look alike everywhere, then
    ``log p_own(y | x) - log p_consensus(y | x)`` is ``log share_own(y) - log share(y)`` and a term
    that is the same for all classes, so this is exact. The rule is ours; the public rows may be of
    any mix.

    Args:
        own: the client's answers; a probability below 1e-6 counts as that.
        consensus: what everybody answers together.
        prior: shares of labels that the consensus stands for, such as those of public rows.
        from_logits: whether both are logits (at temperature 1), or probabilities.

    Returns:
        Shares that sum to 1.

    Raises:
        ValueError: if there is no row, or what should be a distribution is none.
    """
    if not len(own):
        raise ValueError("there must be public rows, got none")
    if from_logits:
        own, consensus = np.exp(log_softmax(own)), np.exp(log_softmax(consensus))
    difference = (_logs(own) - _logs(consensus)).mean(0)
    return np.asarray(np.exp(log_softmax(_logs(prior) + difference)))


def kl(true: Float[np.ndarray, " classes"], estimated: Float[np.ndarray, " classes"]) -> float:
    """Return ``KL(true || estimated)`` in nats, >= 0: 0 is a client that has no secret left.

    An estimate below 1e-6 counts as that, and the estimate is scaled to sum to 1 again: a class
    that is said to be absent and is not would cost infinitely much, whatever else was found.

    Raises:
        ValueError: if one of them is no distribution.
    """
    true, estimated = as_probabilities(true), np.maximum(as_probabilities(estimated), _LEAST)
    held = true > 0
    ratio = np.log(true[held] / true.sum()) - np.log(estimated[held] / estimated.sum())
    return max(float((true[held] / true.sum() * ratio).sum()), 0.0)


def _logs(values: Float[np.ndarray, "*rows classes"]) -> Float[np.ndarray, "*rows classes"]:
    return np.asarray(np.log(np.maximum(as_probabilities(values), _LEAST)))
