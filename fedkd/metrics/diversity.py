"""How much peers differ from each other, and how undecided their common target is.

What fewer than two peers, or no rows, do not determine is NaN.
"""

import numpy as np
from jaxtyping import Float, Integer

from fedkd.metrics.arrays import (
    Array,
    as_classes,
    as_int64,
    as_probabilities,
    entropy,
    log_softmax,
    mean_or_nan,
)


class VoteCounter:
    """Counts the peers' predicted classes for each row, one peer at a time.

    Holds rows x classes numbers however many peers there are.

    Args:
        num_rows: rows that every peer predicts, in the same order.
        num_classes: classes they choose from.
    """

    def __init__(self, num_rows: int, num_classes: int) -> None:
        self.votes = np.zeros((num_rows, num_classes), dtype=np.int64)
        self.num_peers = 0

    def add(self, predictions: Integer[Array, " rows"]) -> None:
        """Count one peer's predicted class for every row.

        Raises:
            ValueError: if the rows are not as many as announced, or a class is out of range.
        """
        num_rows, num_classes = self.votes.shape
        if len(predictions) != num_rows:
            raise ValueError(
                f"predictions must have one class for each of the {num_rows} rows, "
                f"got {len(predictions)}"
            )
        classes = as_classes("predictions", predictions, num_classes)
        self.votes[np.arange(num_rows), classes] += 1
        self.num_peers += 1

    def disagreement(self) -> float:
        """Return the share of rows on which two peers differ, averaged over pairs, in [0, 1].

        Of K peers, the v that chose one class agree in v (v - 1) of K (K - 1) ordered pairs, so
        no pair is ever formed.
        """
        if self.num_peers < 2:
            return float("nan")
        agreeing_pairs = (self.votes * (self.votes - 1)).sum(axis=1)
        return mean_or_nan(1 - agreeing_pairs / (self.num_peers * (self.num_peers - 1)))

    def vote_entropy(self) -> float:
        """Return the entropy of a row's vote shares in nats, averaged over rows.

        From 0 (all agree) to ln(min(peers, classes)).

        Source:
            Dagan, Engelson, 1995, section 3 (without its normalisation).
        """
        if self.num_peers < 1:
            return float("nan")
        return mean_or_nan(entropy(self.votes / self.num_peers))


def pairwise_disagreement(predicted_classes: Integer[Array, "clients rows"]) -> float:
    """Return the share of rows on which two clients differ, averaged over pairs, in [0, 1].

    Raises:
        ValueError: if a class is negative.
    """
    classes = as_int64(predicted_classes)
    if not classes.size:
        return float("nan")
    counter = VoteCounter(classes.shape[1], max(int(classes.max()) + 1, 1))
    for predictions in classes:
        counter.add(predictions)
    return counter.disagreement()


def target_entropy(probabilities: Float[Array, "rows classes"]) -> float:
    """Return how undecided a target is: the mean entropy of its rows, in nats.

    From 0 (one-hot) to ln(classes) (uniform).

    Raises:
        ValueError: if a row is no probability distribution.
    """
    return mean_or_nan(entropy(as_probabilities(probabilities)))


def jensen_shannon(
    scores: Float[Array, "clients rows classes"], *, from_logits: bool = False
) -> float:
    """Return ``H(mean p) - mean H(p)`` over clients, averaged over rows, in nats.

    From 0 (all predict the same) to ln(min(clients, classes)). It is what the mean of the KL
    losses to single peers exceeds the KL loss to their mean probability by.

    Args:
        scores: each client's class probabilities, or its logits.
        from_logits: whether ``scores`` are logits.

    Raises:
        ValueError: if a row is no probability distribution.

    Source:
        Lin, 1991, section IV. https://doi.org/10.1109/18.61115
    """
    probabilities = np.exp(log_softmax(scores)) if from_logits else as_probabilities(scores)
    if not probabilities.size:
        return float("nan")
    divergence = entropy(probabilities.mean(axis=0)) - entropy(probabilities).mean(axis=0)
    # Rounding may leave -1e-17 where all clients are equal.
    return max(mean_or_nan(divergence), 0.0)
