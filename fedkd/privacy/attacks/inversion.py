"""What does a class look like in a client's data? Images from pairs of answers on public rows.

Paired-logits inversion: a server knows, for each public row, what the client answers and what all
agree on, and learns the way back from both answers to the image. Then it asks what image a client
would be sure of where the others are not: private data make the difference.

Differs from the paper: the decoder is kernel ridge regression on both answers, in closed form,
where theirs is a network trained by gradient descent (with prior data and several candidates). The
pair that is decoded is theirs: one-hot from the client, and a consensus that gives the class some
probability and all others the same. That the consensus gives it as much as it does on average where
it leads is ours; in theirs it follows from a setting.

Source:
    Takahashi, Liu, Liu, 2023. https://arxiv.org/abs/2304.11436
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from fedkd.metrics.arrays import as_probabilities

_WINDOW, _SPREAD = 11, 1.5
"""Pixels a side of SSIM's Gaussian window, and its standard deviation (Wang et al., 2004)."""

_RIDGE = 1e-4
"""Of kernel ridge regression, for each row; kernels are 1 on the diagonal."""

_MOST_ROWS = 4000
"""Public rows that a decoder is fitted to: the system has as many unknowns for each pixel."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """From a pair of answers to an image; see `fit_decoder`.

    Attributes:
        pairs: answers of the client and of the consensus, side by side, that it was fitted to.
        weights: of each row, for each pixel.
        mean: image of the public rows.
        width: distance at which the kernel has fallen to ``e^(-1/2)``.
    """

    pairs: Float[np.ndarray, "rows answers"]
    weights: Float[np.ndarray, "rows height width channels"]
    mean: Float[np.ndarray, "height width channels"]
    width: float

    def __call__(
        self,
        own: Float[np.ndarray, "queries classes"],
        consensus: Float[np.ndarray, "queries classes"],
    ) -> Float[np.ndarray, "queries height width channels"]:
        """Return the image for each pair of answers, probabilities."""
        kernel = _kernel(np.concatenate([own, consensus], axis=1), self.pairs, self.width)
        return np.asarray(self.mean + np.tensordot(kernel, self.weights, axes=1))


@dataclass(frozen=True, slots=True)
class Inversion:
    """How well one class was reconstructed.

    Attributes:
        success: of the means of all classes, private and public, the target's private one is the
            most like the reconstruction.
        ssim: likeness to the target's private mean, see `ssim`.
        too_close_to_public: the most like it is the target's public mean, which the server knew: it
            does not count.
    """

    success: bool
    ssim: float
    too_close_to_public: bool


def fit_decoder(
    own: Float[np.ndarray, "rows classes"],
    consensus: Float[np.ndarray, "rows classes"],
    images: Float[np.ndarray, "rows height width channels"],
    *,
    ridge: int | float = _RIDGE,
) -> Decoder:
    """Fit images to pairs of answers by kernel ridge regression, in closed form.

    ``weights = (K + rows ridge I)^-1 (images - mean)``, ``K_ij = exp(-|a_i - a_j|^2 / (2 w^2))``,
    a the two answers side by side, w the median distance of two rows. Of more than 4,000 rows the
    first 4,000 are used.

    Args:
        own: probabilities that the client gives to public rows.
        consensus: those that the server sent or would send.
        images: the public rows, as the models see them.
        ridge: > 0; more of it and reconstructions are closer to the mean.

    Raises:
        ValueError: if there are fewer than two rows, ``ridge`` is not positive, or an answer is no
            distribution.
    """
    if len(own) < 2:
        raise ValueError(f"there must be at least 2 public rows, got {len(own)}")
    if not ridge > 0:
        raise ValueError(f"ridge must be > 0, got {ridge}")
    pairs = np.concatenate([as_probabilities(own), as_probabilities(consensus)], axis=1)
    pairs, images = pairs[:_MOST_ROWS], images[:_MOST_ROWS].astype(np.float64)
    some = pairs[:: -(-len(pairs) // 500)]
    squares = _squared_distances(some, some)[np.triu_indices(len(some), 1)]
    width = float(np.sqrt(np.median(squares))) or 1.0
    kernel = _kernel(pairs, pairs, width)
    kernel[np.diag_indices(len(pairs))] += len(pairs) * ridge
    mean = images.mean(0)
    weights = np.linalg.solve(kernel, (images - mean).reshape(len(images), -1))
    return Decoder(pairs, weights.reshape(images.shape), mean, width)


def reconstruct(
    decoder: Decoder, consensus: Float[np.ndarray, "rows classes"]
) -> Float[np.ndarray, "classes height width channels"]:
    """Return what each class would look like where the client is sure of it, and the others less.

    The client's answer is one-hot. The consensus gives the class what it gives its top class on
    average over the public rows that have that class on top (over all rows, where none has), and
    the rest of the classes share what is left.

    Args:
        decoder: see `fit_decoder`.
        consensus: the consensus' probabilities for public rows.
    """
    probabilities = as_probabilities(consensus)
    classes = probabilities.shape[1]
    top, sure = probabilities.argmax(1), probabilities.max(1)
    own = np.eye(classes)
    pair = np.empty((classes, classes))
    for target in range(classes):
        leads = top == target
        level = float(sure[leads].mean() if leads.any() else sure.mean())
        pair[target] = (1 - level) / (classes - 1)
        pair[target, target] = level
    return decoder(own, pair)


def ssim(
    first: Float[np.ndarray, "height width channels"],
    second: Float[np.ndarray, "height width channels"],
    *,
    data_range: int | float = 1.0,
) -> float:
    """Return the structural similarity of two images, in [-1, 1]; 1 for equal ones.

    ``(2 mu_a mu_b + C1)(2 s_ab + C2) / ((mu_a^2 + mu_b^2 + C1)(s_a^2 + s_b^2 + C2))``, ``C1 =
    (0.01 L)^2``, ``C2 = (0.03 L)^2``, averaged over windows and channels. Windows are Gaussian, 11
    x 11 pixels of deviation 1.5, wherever one fits; an image with a side below 11 is one window, of
    equal weights (as 8 x 8 digits are).

    Args:
        first: an image.
        second: one of the same shape.
        data_range: L, the largest minus the smallest value a pixel can have, > 0.

    Raises:
        ValueError: if ``data_range`` is not positive.

    Source:
        Wang, Bovik, Sheikh, Simoncelli, 2004, equation 13.
        https://doi.org/10.1109/TIP.2003.819861
    """
    if not data_range > 0:
        raise ValueError(f"data_range must be > 0, got {data_range}")
    a, b = first.astype(np.float64), second.astype(np.float64)
    mean_a, mean_b = _local_mean(a), _local_mean(b)
    # Rounding must not make a variance negative.
    variance_a = np.maximum(_local_mean(a * a) - mean_a**2, 0)
    variance_b = np.maximum(_local_mean(b * b) - mean_b**2, 0)
    covariance = _local_mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    likeness /= (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    return float(likeness.mean())


def judge(
    reconstruction: Float[np.ndarray, "height width channels"],
    private_means: Float[np.ndarray, "classes height width channels"],
    public_means: Float[np.ndarray, "classes height width channels"],
    target: int,
    *,
    data_range: int | float = 1.0,
) -> Inversion:
    """Say whether a reconstruction shows the private data of a class, or only public ones.

    Args:
        reconstruction: of the class.
        private_means: mean private image of each class; NaN for a class without rows.
        public_means: mean public image of each class; NaN for a class without rows.
        target: the class.
        data_range: see `ssim`.

    Raises:
        ValueError: if the target has no private row.

    Source:
        Takahashi, Liu, Liu, 2023, whose control the public means are. Both lists of likenesses are
        joined here; a published program of theirs adds them up, and then sees no public hit.
    """
    means = np.concatenate([private_means, public_means])
    held = ~np.isnan(means).any(axis=(1, 2, 3))
    if not held[target]:
        raise ValueError(f"class {target} has no private row: there is nothing to reconstruct")
    found = np.full(len(means), -np.inf)
    for one in np.flatnonzero(held):
        found[one] = ssim(reconstruction, means[one], data_range=data_range)
    best = int(found.argmax())
    return Inversion(
        success=best == target,
        ssim=float(found[target]),
        too_close_to_public=best == target + len(private_means),
    )


def _local_mean(
    image: Float[np.ndarray, "height width channels"],
) -> Float[np.ndarray, "rows columns channels"]:
    if min(image.shape[:2]) < _WINDOW:
        return np.asarray(image.mean((0, 1), keepdims=True))
    offsets = np.arange(_WINDOW) - _WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * _SPREAD**2))
    weights /= weights.sum()
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(image, _WINDOW, axis=axis)
        image = windows @ weights
    return image


def _squared_distances(
    first: Float[np.ndarray, "rows answers"], second: Float[np.ndarray, "others answers"]
) -> Float[np.ndarray, "rows others"]:
    squares = (first**2).sum(1)[:, None] + (second**2).sum(1) - 2 * first @ second.T
    return np.asarray(np.maximum(squares, 0))


def _kernel(
    first: Float[np.ndarray, "rows answers"],
    second: Float[np.ndarray, "others answers"],
    width: float,
) -> Float[np.ndarray, "rows others"]:
    return np.asarray(np.exp(-_squared_distances(first, second) / (2 * width**2)))
