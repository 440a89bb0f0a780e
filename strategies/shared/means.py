"""Weights that travel: means of what clients upload, and what members received."""

from collections.abc import Callable, Hashable, Iterable

from fedkd.exchange.payloads import Bundle, Weights
from fedkd.exchange.views import RunningMean, Weighting
from fedkd.training.cohort import WeightsForMembers
from strategies.contract import Received, Upload, payloads_of


def mean_weights(
    uploads: Iterable[Upload],
    weighting: Weighting,
    group: Callable[[int], Hashable] = lambda _: None,
) -> dict[Hashable, Weights]:
    """Average uploaded weights, in each group of clients by itself.

    Args:
        uploads: weights.
        weighting: ``examples`` weights a client by its private rows; ``equal`` counts each once.
        group: of a client; weights of different architectures have no mean.

    Returns:
        A mean for each group that sent any.
    """
    means: dict[Hashable, RunningMean[Weights]] = {}
    for upload, sent in payloads_of(uploads, Weights):
        mean = means.setdefault(group(upload.client), RunningMean())
        mean.add(sent, upload.weight(weighting))
    return {key: mean.mean() for key, mean in means.items()}


def received_part(received: Received, name: str) -> Received:
    """Return one part of each bundle that was received; what came alone stands for itself."""
    return Received([p[name] if isinstance(p, Bundle) else p for p in received])


def received_weights(received: Received) -> WeightsForMembers:
    """Return what was received: one set of weights for all members, or one for each."""
    if isinstance(received.shared, Weights):
        return received.shared.arrays
    return [own.arrays for own in received.all(Weights)]
