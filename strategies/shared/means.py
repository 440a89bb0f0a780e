"""Weights that travel: running means of what clients upload, and what members received."""

from collections.abc import Callable, Hashable, Iterable, Mapping

import numpy as np

from fedkd.exchange.payloads import Bundle, Weights
from fedkd.exchange.views import Weighting
from fedkd.training import Arrays
from fedkd.training.cohort import WeightsForMembers
from strategies.contract import Received, Upload, payloads_of


class WeightedMean:
    """A running weighted mean of models: memory of one model, whatever the number of clients."""

    def __init__(self) -> None:
        self._sums: Arrays = {}
        self._dtypes: dict[str, np.dtype] = {}
        self._weight = 0.0

    def add(self, arrays: Mapping[str, np.ndarray], weight: int | float) -> None:
        """Fold one client's model in; ``weight`` > 0."""
        if not weight > 0:
            raise ValueError(f"weight must be > 0, got {weight}")
        for name, array in arrays.items():
            # Of an array without dimensions NumPy's products are scalars, which torch refuses.
            term = np.asarray(weight * array.astype(np.float64))
            self._sums[name] = self._sums[name] + term if name in self._sums else term
            self._dtypes[name] = array.dtype
        self._weight += weight

    @property
    def weight(self) -> float:
        """How much was added so far; 0: nothing was."""
        return self._weight

    def mean(self) -> Arrays:
        """Return the mean in the models' own types; counters and flags are rounded."""
        means: Arrays = {}
        for name, total in self._sums.items():
            mean = np.asarray(total / self._weight)
            if self._dtypes[name].kind in "iub":
                mean = np.rint(mean)
            means[name] = np.asarray(mean, self._dtypes[name])
        return means


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
    means: dict[Hashable, WeightedMean] = {}
    for upload, sent in payloads_of(uploads, Weights):
        mean = means.setdefault(group(upload.client), WeightedMean())
        mean.add(sent.arrays, upload.weight(weighting))
    return {key: Weights(arrays=mean.mean()) for key, mean in means.items()}


def received_part(received: Received, name: str) -> Received:
    """Return one part of each bundle that was received; what came alone stands for itself."""
    return Received([p[name] if isinstance(p, Bundle) else p for p in received])


def received_weights(received: Received) -> WeightsForMembers:
    """Return what was received: one set of weights for all members, or one for each."""
    if isinstance(received.shared, Weights):
        return received.shared.arrays
    return [own.arrays for own in received.all(Weights)]
