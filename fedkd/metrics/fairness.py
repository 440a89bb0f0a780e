"""How clients fare beside each other, and beside what they were: fairness and forgetting.

Values that are NaN belong to clients that have none and are left out; what is left without any
value is NaN.
"""

import math
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float

from fedkd.metrics.arrays import mean_or_nan

WORST_SHARE = 0.1
"""Of clients, how many are the worst: Li et al., 2020, report the mean of their lowest 10 %."""


def spread(values: Iterable[int | float]) -> float:
    """Return the standard deviation of clients' accuracies; 0: all fare alike.

    Of these clients themselves (divided by their number, not by one less), so it is the root of the
    variance that defines fairness there, in the unit of the accuracies.

    Source:
        Li, Sanjabi, Beirami, Smith, 2020 (q-FFL), definition 1. https://arxiv.org/abs/1905.10497
    """
    known = _known(values)
    return float(known.std()) if len(known) else float("nan")


def worst_mean(values: Iterable[int | float], *, share: int | float = WORST_SHARE) -> float:
    """Return the mean over the clients that fare worst.

    Args:
        values: one a client.
        share: of the clients, in (0, 1]; rounded up to whole clients, so that one is the worst of
            ten or fewer.

    Raises:
        ValueError: if ``share`` is not in (0, 1].

    Source:
        Li, Sanjabi, Beirami, Smith, 2020 (q-FFL), section 4.1. https://arxiv.org/abs/1905.10497
        The worst client alone is what Mohri, Sivek, Suresh, 2019 (AFL), look at.
        https://arxiv.org/abs/1902.00146

    Examples:
        >>> from fedkd.metrics.fairness import worst_mean
        >>> worst_mean([0.5, 0.75, 1.0, 1.0], share=0.25)
        0.5
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    known = np.sort(_known(values))
    # 0.1 * 30 is a little more than 3.
    return mean_or_nan(known[: math.ceil(round(share * len(known), 9))])


def forgetting(before: Iterable[int | float], now: int | float) -> float:
    """Return by how much a client is worse now than at its best, in [-1, 1].

    The largest accuracy before minus that of now; negative where it never was as good. A largest of
    values that scatter lies above what they scatter around, so a client that stays as it is
    forgets a little by this figure, and more so the fewer test rows there are.

    Args:
        before: its accuracies on one and the same task, at earlier times.
        now: its accuracy on that task.

    Returns:
        NaN without any accuracy before, or now.

    Source:
        Chaudhry, Dokania, Ajanthan, Torr, 2018, equation 3. https://arxiv.org/abs/1801.10112
        Lee et al., 2022 (FedNTD), measure forgetting of a federation in this way.
        https://arxiv.org/abs/2106.03097

    Examples:
        >>> from fedkd.metrics.fairness import forgetting
        >>> forgetting([0.5, 1.0], 0.75)
        0.25
    """
    known = _known(before)
    return float(known.max()) - now if len(known) else float("nan")


def _known(values: Iterable[int | float]) -> Float[np.ndarray, " known"]:
    array = np.fromiter(values, dtype=np.float64)
    return array[~np.isnan(array)]
