"""Numbers -> shares: the nearest ones that are >= 0 and sum to 1."""

import numpy as np
from jaxtyping import Float


def nearest_shares(values: Float[np.ndarray, "*rows parts"]) -> Float[np.ndarray, "*rows parts"]:
    """Return, for each row, the nearest point (L2) whose numbers are >= 0 and sum to 1.

    A row that is one already stays as it is, up to rounding; adding a constant to all numbers of a
    row changes nothing.

    Args:
        values: finite; at least one part.

    Returns:
        float64 of the same shape.

    Source:
        Duchi, Shalev-Shwartz, Singer, Chandra, 2008, figure 1. https://doi.org/10.1145/1390156.1390191
    """
    wide = np.asarray(values, np.float64)
    descending = -np.sort(-wide, axis=-1)
    excess = np.cumsum(descending, axis=-1) - 1
    places = np.arange(1, wide.shape[-1] + 1)
    # The largest numbers stay positive; the first of them always does.
    positive = np.maximum((descending * places > excess).sum(axis=-1, keepdims=True), 1)
    taken_off = np.take_along_axis(excess, positive - 1, axis=-1) / positive
    shares: np.ndarray = np.maximum(wide - taken_off, 0.0)
    return shares
