"""Similarity of what two networks compute inside: linear centred kernel alignment (CKA).

CKA compares how two layers arrange the SAME rows. Features are flattened per row, so axis 0 has to
be the rows, and layers may differ in width and shape. Rotating, permuting or uniformly scaling the
features of either side changes nothing; shuffling the rows of one side does.

Source:
    Kornblith, Norouzi, Lee, Hinton, 2019. https://arxiv.org/abs/1905.00414
    Nguyen, Raghu, Kornblith, 2021 (minibatches). https://arxiv.org/abs/2010.15327
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Num

from fedkd.metrics.arrays import Array, as_float64

LayerFeatures = Mapping[str, Array]
"""A layer's name -> its features, one row per sample on axis 0."""


def linear_cka(
    first: Num[Array, "rows *first_features"],
    second: Num[Array, "rows *second_features"],
    *,
    unbiased: bool = False,
) -> float:
    """Return the linear CKA of two layers' features on the same rows.

    ``HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))`` of the Gram matrices K and L.

    Args:
        first: features of one layer; axes after the first are flattened.
        second: features of the other on the same rows in the same order; any width.
        unbiased: take the unbiased estimate of HSIC. The plain one grows towards 1 when features
            outnumber rows, even for unrelated layers.

    Returns:
        1 for layers that are the same up to rotation and scale. The plain estimate lies in
        [0, 1], the unbiased one in [-1, 1] and around 0 for unrelated layers. NaN if the features
        of a layer are the same for all rows.

    Raises:
        ValueError: if the rows differ in number, are fewer than 2 (4 for the unbiased estimate),
            or a feature is not finite.

    Source:
        Kornblith et al., 2019, section 3. https://arxiv.org/abs/1905.00414
    """
    return float(cka_matrix({"first": first}, {"second": second}, unbiased=unbiased)[0, 0])


def cka_matrix(
    first: LayerFeatures, second: LayerFeatures, *, unbiased: bool = False
) -> Float[np.ndarray, "first_layers second_layers"]:
    """Return the linear CKA of every layer of one network with every layer of another.

    Needs rows x rows numbers for each layer; for more than a few thousand rows see `MinibatchCKA`.

    Args:
        first: features by layer, all on the same rows.
        second: features by layer of the other network, on the same rows.
        unbiased: as in `linear_cka`.

    Raises:
        ValueError: as `linear_cka`.
    """
    rows = _centred_grams(first, unbiased)
    columns = _centred_grams(second, unbiased)
    return _alignment(_products(rows, columns), _squares(rows), _squares(columns))


class MinibatchCKA:
    """Linear CKA between the layers of two networks, summed up over batches of rows.

    Averages the unbiased HSIC of the batches, so the expected sums do not depend on the size of a
    batch; averaging the CKA of batches would not have that property.

    Source:
        Nguyen, Raghu, Kornblith, 2021, equations 2 and 3. https://arxiv.org/abs/2010.15327
    """

    def __init__(self) -> None:
        self.first_layers: tuple[str, ...] = ()
        self.second_layers: tuple[str, ...] = ()
        self._num_batches = 0
        self._crossed = self._first_own = self._second_own = np.zeros(0)

    def add(self, first: LayerFeatures, second: LayerFeatures) -> None:
        """Add a batch of at least 4 rows; every batch has the same layers in the same order.

        Raises:
            ValueError: if the layers are not those of the first batch, or as `linear_cka`.
        """
        names = tuple(first), tuple(second)
        if self._num_batches and names != (self.first_layers, self.second_layers):
            raise ValueError(
                f"every batch must have the layers {self.first_layers} and "
                f"{self.second_layers}, got {names[0]} and {names[1]}"
            )
        rows, columns = _centred_grams(first, unbiased=True), _centred_grams(second, unbiased=True)
        crossed = _products(rows, columns)
        sums = crossed, _squares(rows), _squares(columns)
        if self._num_batches:
            sums = self._crossed + sums[0], self._first_own + sums[1], self._second_own + sums[2]
        self._crossed, self._first_own, self._second_own = sums
        self.first_layers, self.second_layers = names
        self._num_batches += 1

    def matrix(self) -> Float[np.ndarray, "first_layers second_layers"]:
        """Return the CKA of every two layers so far, in [-1, 1]; NaN for a constant layer.

        Raises:
            ValueError: if no batch was added.
        """
        if not self._num_batches:
            raise ValueError("CKA needs at least 1 batch, got 0")
        return _alignment(self._crossed, self._first_own, self._second_own)


def _centred_grams(
    layers: LayerFeatures, unbiased: bool
) -> Float[np.ndarray, "layers rows_times_rows"]:
    """Return each layer's centred Gram matrix as a row, scaled so that products are HSIC."""
    if not layers:
        raise ValueError("CKA needs at least 1 layer, got 0")
    return np.stack([_centred_gram(name, layers[name], unbiased).ravel() for name in layers])


def _centred_gram(
    name: str, features: Num[Array, "rows *features"], unbiased: bool
) -> Float[np.ndarray, "rows rows"]:
    table = as_float64(features)
    num_rows, least = len(table), 4 if unbiased else 2
    if num_rows < least:
        estimate = "unbiased CKA" if unbiased else "CKA"
        raise ValueError(f"{estimate} needs at least {least} rows, got {num_rows} in {name!r}")
    if not np.isfinite(table).all():
        raise ValueError(f"features of {name!r} must be finite")
    table = table.reshape(num_rows, -1)
    # Centring the features first costs nothing and keeps large offsets out of the products; the
    # unbiased estimate does not depend on where the features' origin is. Equal rows are set to
    # exactly 0, which their rounded mean would miss.
    table = np.zeros_like(table) if (table == table[0]).all() else table - table.mean(axis=0)
    gram: np.ndarray = table @ table.T
    if not unbiased:
        return gram / (num_rows - 1)
    # The unbiased HSIC is the mean product of Gram matrices that are centred without their
    # diagonals (Székely, Rizzo, 2014, section 3): the same number as equation 3 of Nguyen et al.
    np.fill_diagonal(gram, 0.0)
    row_sums = gram.sum(axis=1) / (num_rows - 2)
    gram += gram.sum() / ((num_rows - 1) * (num_rows - 2)) - row_sums - row_sums[:, None]
    np.fill_diagonal(gram, 0.0)
    gram /= np.sqrt(num_rows * (num_rows - 3))
    return gram


def _products(
    first: Float[np.ndarray, "first cells"], second: Float[np.ndarray, "second others"]
) -> Float[np.ndarray, "first second"]:
    if first.shape[1] != second.shape[1]:
        rows, others = (int(np.sqrt(grams.shape[1])) for grams in (first, second))
        raise ValueError(f"both networks need features of the same rows, got {rows} and {others}")
    products: np.ndarray = first @ second.T
    return products


def _squares(grams: Float[np.ndarray, "layers cells"]) -> Float[np.ndarray, " layers"]:
    squares: np.ndarray = np.square(grams).sum(axis=1)
    return squares


def _alignment(
    crossed: Float[np.ndarray, "first second"],
    first_own: Float[np.ndarray, " first"],
    second_own: Float[np.ndarray, " second"],
) -> Float[np.ndarray, "first second"]:
    scale = np.sqrt(np.outer(first_own, second_own))
    alignment = np.full(scale.shape, np.nan)
    np.divide(crossed, scale, out=alignment, where=scale > 0)
    return alignment
