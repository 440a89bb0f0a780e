"""How much peers differ from each other, and how undecided their common target is.

What fewer than two peers, or no rows, do not determine is NaN.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer

from fedkd.metrics.arrays import (
    Array,
    as_classes,
    as_int64,
    as_probabilities,
    by_class,
    entropy,
    log_softmax,
    mean_or_nan,
)


class VoteCounter:
    """Counts the peers' predicted classes for each row, one peer at a time.

    Holds rows x classes numbers however many peers there are. Peers may predict some of the rows
    only: what a row says is said by those that predicted it.

    Args:
        num_rows: rows that peers predict.
        num_classes: classes they choose from.
    """

    def __init__(self, num_rows: int, num_classes: int) -> None:
        self.votes = np.zeros((num_rows, num_classes), dtype=np.int64)

    def add(
        self,
        predictions: Integer[Array, " predicted"],
        rows: Integer[Array, " predicted"] | None = None,
    ) -> None:
        """Count one peer's predicted classes.

        Args:
            predictions: the class of each row that the peer predicted.
            rows: which these are, all different; None: all of them, in order.

        Raises:
            ValueError: if there are not as many as there are rows, or a class is out of range.
        """
        num_rows, num_classes = self.votes.shape
        places = np.arange(num_rows) if rows is None else as_int64(rows)
        if len(predictions) != len(places):
            raise ValueError(
                f"predictions must have one class for each of the {len(places)} rows, "
                f"got {len(predictions)}"
            )
        classes = as_classes("predictions", predictions, num_classes)
        self.votes[places, classes] += 1

    def disagreement(self) -> float:
        """Return the share of rows on which two peers differ, averaged over pairs, in [0, 1].

        Of K peers that predicted a row, the v that chose one class agree in v (v - 1) of K (K - 1)
        ordered pairs, so no pair is ever formed. Rows with fewer than two peers say nothing.
        """
        peers = self.votes.sum(axis=1)
        compared = peers > 1
        agreeing_pairs = (self.votes * (self.votes - 1)).sum(axis=1)[compared]
        return mean_or_nan(1 - agreeing_pairs / (peers * (peers - 1))[compared])

    def vote_entropy(self) -> float:
        """Return the entropy of a row's vote shares in nats, averaged over rows with votes.

        From 0 (all agree) to ln(min(peers, classes)).

        Source:
            Dagan, Engelson, 1995, section 3 (without its normalisation).
        """
        peers = self.votes.sum(axis=1, keepdims=True)
        voted = peers[:, 0] > 0
        return mean_or_nan(entropy(self.votes[voted] / peers[voted]))


class PeerAnswers:
    """Sums up peers' soft labels for each row, one peer at a time.

    Holds rows x classes numbers however many peers there are. Peers may answer some of the rows
    only: what a row says is said by those that answered it.

    Args:
        num_rows: rows that peers answer.
        num_classes: classes that an answer is about.
    """

    def __init__(self, num_rows: int, num_classes: int) -> None:
        self.sums = np.zeros((num_rows, num_classes))
        self.entropies = np.zeros(num_rows)
        self.peers = np.zeros(num_rows, dtype=np.int64)

    def add(
        self,
        scores: Float[Array, "answered classes"],
        rows: Integer[Array, " answered"] | None = None,
        *,
        from_logits: bool = False,
    ) -> None:
        """Take in one peer's soft labels.

        Args:
            scores: class probabilities of each row that the peer answered, or its logits.
            rows: which these are, all different; None: all of them, in order.
            from_logits: whether ``scores`` are logits, then taken at temperature 1.

        Raises:
            ValueError: if a row is no probability distribution.
        """
        places = slice(None) if rows is None else as_int64(rows)
        if from_logits:
            probabilities, entropies = _softmax_with_entropy(scores)
        else:
            probabilities = as_probabilities(scores)
            entropies = entropy(probabilities)
        self.sums[places] += probabilities
        self.entropies[places] += entropies
        self.peers[places] += 1

    def peer_entropy(self) -> float:
        """Return how undecided single peers are, in nats: their mean on a row, averaged over rows.

        From 0 (one-hot) to ln(classes); with all peers on all rows, the mean of
        ``ensemble_entropy(...).peers``. NaN without answers.
        """
        answered = self.peers > 0
        return mean_or_nan(self.entropies[answered] / self.peers[answered])

    def diversity(self) -> float:
        """Return ``H(mean p) - mean H(p)`` over a row's peers, in nats, averaged over rows.

        From 0 (all answer the same) to ln(min(peers, classes)); with all peers on all rows,
        `jensen_shannon`. Rows with fewer than two peers say nothing; NaN without others.
        """
        compared = self.peers > 1
        peers = self.peers[compared]
        of_mean = entropy(self.sums[compared] / peers[:, None])
        divergence = of_mean - self.entropies[compared] / peers
        return max(mean_or_nan(divergence), 0.0) if len(divergence) else float("nan")


def _softmax_with_entropy(
    logits: Float[Array, "rows classes"],
) -> tuple[Float[np.ndarray, "rows classes"], Float[np.ndarray, " rows"]]:
    """Return both with a single pass of ``exp``: it runs for every upload of every round."""
    scores = by_class(logits)
    shifted = scores - scores.max(axis=0)
    powers = np.exp(shifted)
    totals = powers.sum(axis=0)
    probabilities = powers / totals
    return probabilities.T, np.log(totals) - (probabilities * shifted).sum(axis=0)


def pairwise_disagreement(predicted_classes: Integer[Array, "clients rows"]) -> float:
    """Return the share of rows on which two clients differ, averaged over pairs, in [0, 1].

    Raises:
        ValueError: if a class is negative.

    Examples:
        >>> import numpy as np
        >>> from fedkd.metrics import pairwise_disagreement
        >>> pairwise_disagreement(np.array([[0, 1, 2, 2], [0, 1, 1, 2]]))
        0.25
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


def target_entropies(probabilities: Float[Array, "targets rows classes"]) -> list[float]:
    """Return `target_entropy` of each of several targets of at least one row, with its bits.

    Raises:
        ValueError: if a row is no probability distribution.
    """
    means: list[float] = entropy(as_probabilities(probabilities)).mean(axis=-1).tolist()
    return means


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
    probabilities = _probabilities(scores, from_logits=from_logits)
    if not probabilities.size:
        return float("nan")
    divergence = entropy(probabilities.mean(axis=0)) - entropy(probabilities).mean(axis=0)
    # Rounding may leave -1e-17 where all clients are equal.
    return max(mean_or_nan(divergence), 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsembleEntropy:
    """How undecided an ensemble's target is, and each peer on its own, in nats per row.

    Attributes:
        target: entropy of the mean probability.
        peers: entropy of each peer's own probabilities.
    """

    target: float
    peers: Float[np.ndarray, " clients"]


def ensemble_entropy(
    scores: Float[Array, "clients rows classes"], *, from_logits: bool = False
) -> EnsembleEntropy:
    """Return the entropy of the peers' mean probability and of every peer, averaged over rows.

    The target's minus the mean of the peers' is `jensen_shannon`: averaging peers that differ
    makes a target that is softer than any of them. NaN without rows.

    Args:
        scores: each client's class probabilities, or its logits.
        from_logits: whether ``scores`` are logits, then taken at temperature 1.

    Raises:
        ValueError: if a row is no probability distribution.
    """
    probabilities = _probabilities(scores, from_logits=from_logits)
    num_clients, num_rows, _ = probabilities.shape
    if not num_clients or not num_rows:
        return EnsembleEntropy(target=float("nan"), peers=np.full(num_clients, np.nan))
    return EnsembleEntropy(
        target=mean_or_nan(entropy(probabilities.mean(axis=0))),
        peers=entropy(probabilities).mean(axis=1),
    )


def ensemble_gain(
    scores: Float[Array, "clients rows classes"],
    labels: Integer[Array, " rows"],
    *,
    from_logits: bool = False,
) -> float:
    """Return the accuracy of the mean probability minus the clients' mean accuracy, in [-1, 1].

    What diversity is worth: 0 for equal clients. NaN without rows or clients.

    Args:
        scores: each client's class probabilities, or its logits.
        labels: true class of each row.
        from_logits: whether ``scores`` are logits, then taken at temperature 1.

    Raises:
        ValueError: if a row is no probability distribution or a label is none of its classes.
    """
    probabilities = _probabilities(scores, from_logits=from_logits)
    true_classes = as_classes("labels", labels, probabilities.shape[2])
    if not len(probabilities) or not len(true_classes):
        return float("nan")
    ensemble = (probabilities.mean(axis=0).argmax(axis=1) == true_classes).mean()
    individual = (probabilities.argmax(axis=2) == true_classes).mean()
    return float(ensemble - individual)


def error_correlation(
    predicted_classes: Integer[Array, "clients rows"], labels: Integer[Array, " rows"]
) -> float:
    """Return how far clients err on the same rows: correlation of their errors, mean over pairs.

    Pearson's correlation of two clients' right/wrong indicators, from -1 (one is right exactly
    where the other is wrong) over 0 (independent) to 1 (same mistakes). A pair in which a client
    is always right or always wrong has none and is left out; NaN if that leaves no pair.

    Source:
        Kuncheva, Whitaker, 2003, section 3.1.2. https://doi.org/10.1023/A:1022859003006
    """
    both, only_first, only_second, neither = _pair_counts(predicted_classes, labels)
    spread = (both + only_first) * (only_second + neither)
    spread *= (both + only_second) * (only_first + neither)
    return _mean_ratio(both * neither - only_first * only_second, np.sqrt(spread))


def q_statistic(
    predicted_classes: Integer[Array, "clients rows"], labels: Integer[Array, " rows"]
) -> float:
    """Return Yule's Q of the clients' right answers, averaged over pairs, in [-1, 1].

    With a and d the numbers of rows that both or neither get right, b and c those that only one
    does: ``(ad - bc) / (ad + bc)``. 0 for independent clients; its sign is that of
    `error_correlation` and its size is never smaller. A pair with ``ad + bc = 0`` is left out;
    NaN if that leaves no pair.

    Source:
        Kuncheva, Whitaker, 2003, section 3.1.1. https://doi.org/10.1023/A:1022859003006
    """
    both, only_first, only_second, neither = _pair_counts(predicted_classes, labels)
    same, different = both * neither, only_first * only_second
    return _mean_ratio(same - different, same + different)


def _pair_counts(
    predicted_classes: Integer[Array, "clients rows"], labels: Integer[Array, " rows"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Count, for every pair, the rows right for both, only the first, only the second, neither."""
    # Whole numbers in float64 are exact: a client without errors has a spread of exactly 0.
    right = (as_int64(predicted_classes) == as_int64(labels)).astype(np.float64)
    wrong = 1 - right
    first, second = np.triu_indices(len(right), k=1)
    tables = (right @ right.T, right @ wrong.T, wrong @ right.T, wrong @ wrong.T)
    both, only_first, only_second, neither = (table[first, second] for table in tables)
    return both, only_first, only_second, neither


def _mean_ratio(numerators: np.ndarray, denominators: np.ndarray) -> float:
    defined = denominators > 0
    return mean_or_nan(numerators[defined] / denominators[defined])


def _probabilities(
    scores: Float[Array, "clients rows classes"], *, from_logits: bool
) -> Float[np.ndarray, "clients rows classes"]:
    return np.exp(log_softmax(scores)) if from_logits else as_probabilities(scores)
