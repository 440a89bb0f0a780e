"""Was this row among those that a model was trained on? Scores, higher for a likely member.

Shadows are models trained like the attacked one on known rows: ``inside[s, r]`` says that shadow s
was trained on row r. Figures of scores are in `fedkd.privacy.attacks.figures`.
"""

import numpy as np
from jaxtyping import Bool, Float, Integer

from fedkd.metrics.arrays import as_classes, log_softmax

_FARTHEST = 700.0
"""How far below its row's largest a logit counts, in nats: e^-700 is still a number in float64.

So a class of probability 0 has a finite score.
"""

_ENOUGH_SHADOWS = 32
"""Of one side, for a variance of each row's own; below, Carlini et al. take one for all rows."""

_LEAST_DEVIATION = 1e-3
"""Of a shadow's scores: where all are alike, a difference in the last digit is no evidence."""

_LEAST_PROBABILITY = 1e-30
"""Below which a probability counts as this, so that a ratio is a number."""


def confidence_logit(
    logits: Float[np.ndarray, "*models rows classes"], labels: Integer[np.ndarray, " rows"]
) -> Float[np.ndarray, "*models rows"]:
    """Return ``log p_y - log(1 - p_y)``, which is about normal over models.

    Computed as ``z_y - log sum over j != y of e^z_j``, which keeps its digits where ``p_y`` rounds
    to 1. A logit counts as no lower than 700 below the largest of its row, so that all scores are
    finite, also of logarithms of probabilities that are 0.

    Args:
        logits: or logarithms of probabilities; minus infinity may occur.
        labels: the class y of each row.

    Returns:
        Scores in nats; 0 is a probability of one half.

    Raises:
        ValueError: if a label is no class, there are fewer than two classes, or a logit is NaN or
            plus infinity.

    Source:
        Carlini et al., 2022 (phi, the scaled confidence). https://arxiv.org/abs/2112.03570
    """
    scores = _bounded(logits)
    at_label = _at_labels(scores, labels)
    others = scores.copy()
    others[..., np.arange(len(labels)), labels] = -np.inf
    largest = others.max(-1)
    return np.asarray(at_label - largest - np.log(np.exp(others - largest[..., None]).sum(-1)))


def loss_scores(
    logits: Float[np.ndarray, "*models rows classes"], labels: Integer[np.ndarray, " rows"]
) -> Float[np.ndarray, "*models rows"]:
    """Return ``log p_y``: minus the cross-entropy, since members have the lower loss.

    Args:
        logits: as for `confidence_logit`.
        labels: the class y of each row.

    Raises:
        ValueError: as `confidence_logit`.

    Source:
        Yeom et al., 2018 (a threshold on the loss). https://arxiv.org/abs/1709.01604
    """
    return _at_labels(log_softmax(_bounded(logits)), labels)


def lira_scores(
    target: Float[np.ndarray, " rows"],
    shadows: Float[np.ndarray, "shadows rows"],
    inside: Bool[np.ndarray, "shadows rows"],
    *,
    online: bool,
    fixed_variance: bool | None = None,
) -> Float[np.ndarray, " rows"]:
    """Compare a row's score with the scores that it has in models which did, or did not, see it.

    Both kinds of shadows are taken for normal. Online: ``log N(t; mu_in, s_in) - log N(t; mu_out,
    s_out)``. Offline, without shadows that saw the row: ``log Phi((t - mu_out) / s_out)``.
    Means are a row's own. So are variances where every row has at least 32 shadows of the side;
    else it is one for all rows, pooled: squared deviations from each row's own mean, summed over
    all rows, over their number less one for each row. A standard deviation counts as at least
    0.001.

    Args:
        target: scores of the attacked model, see `confidence_logit`.
        shadows: scores of the shadows.
        inside: which shadow was trained on which row.
        online: whether to use the shadows that saw a row.
        fixed_variance: one for all rows (true), each row's own (false), or by the number of
            shadows.

    Raises:
        ValueError: if a row has fewer than two shadows of a side that is asked for.

    Source:
        Carlini et al., 2022, algorithm 1. https://arxiv.org/abs/2112.03570
    """
    mean, deviation = _normal(shadows, ~inside, "outside", fixed_variance, online)
    from_outside = (target - mean) / deviation
    if not online:
        from scipy.special import log_ndtr  # imported late: no training needs it

        return np.asarray(log_ndtr(from_outside))
    mean_in, deviation_in = _normal(shadows, inside, "inside", fixed_variance, online)
    from_inside = (target - mean_in) / deviation_in
    return np.asarray(
        (from_outside**2 - from_inside**2) / 2 + np.log(deviation) - np.log(deviation_in)
    )


def rmia_scores(
    target_prob: Float[np.ndarray, " rows"],
    shadow_probs: Float[np.ndarray, "shadows rows"],
    inside: Bool[np.ndarray, "shadows rows"],
    population_target: Float[np.ndarray, " population"],
    population_shadows: Float[np.ndarray, "shadows population"],
    *,
    gamma: int | float = 1.0,
    offline_scale: int | float | None = None,
) -> Float[np.ndarray, " rows"]:
    """Return the share of the population that is less likely a member than each row.

    Of rows z that nobody trained on, those with ``(p(x | model) / p(x)) / (p(z | model) / p(z))
    >= gamma``. ``p(x)`` is what a model gives that may or may not have seen the row: the mean of
    the mean over shadows inside and of that over shadows outside. Without shadows inside it is
    ``((1 + a) p_out(x) + (1 - a)) / 2``, for rows and population alike.

    Args:
        target_prob: of each row's label, from the attacked model, in [0, 1].
        shadow_probs: the same from the shadows.
        inside: which shadow was trained on which row.
        population_target: of labels of rows that neither the model nor a shadow was trained on.
        population_shadows: the same from the shadows.
        gamma: how much more likely, > 0.
        offline_scale: a, in [0, 1]; none uses the shadows inside.

    Returns:
        Shares in [0, 1], in steps of one over the size of the population.

    Raises:
        ValueError: if a row has no shadow of a side that is asked for, there is no population, or a
            number is out of range.

    Source:
        Zarifzadeh, Liu, Shokri, 2024 (relative membership inference).
        https://arxiv.org/abs/2312.03262
    """
    if not gamma > 0:
        raise ValueError(f"gamma must be > 0, got {gamma}")
    if not len(population_target):
        raise ValueError("there must be rows that nobody was trained on, got none")
    _check_shadows(~inside, "outside", 1)
    outside_mean = shadow_probs.mean(0, where=~inside)
    if offline_scale is None:
        _check_shadows(inside, "inside", 1)
        expected = (shadow_probs.mean(0, where=inside) + outside_mean) / 2
        expected_of_population = population_shadows.mean(0)
    else:
        if not 0 <= offline_scale <= 1:
            raise ValueError(f"offline_scale must be in [0, 1], got {offline_scale}")
        expected = ((1 + offline_scale) * outside_mean + (1 - offline_scale)) / 2
        expected_of_population = (
            (1 + offline_scale) * population_shadows.mean(0) + (1 - offline_scale)
        ) / 2
    ratios = np.sort(_ratio(population_target, expected_of_population))
    least = _ratio(target_prob, expected) / gamma
    return np.asarray(np.searchsorted(ratios, least, side="right") / len(ratios))


def _ratio(
    probabilities: Float[np.ndarray, " rows"], expected: Float[np.ndarray, " rows"]
) -> Float[np.ndarray, " rows"]:
    least = _LEAST_PROBABILITY
    return np.asarray(np.maximum(probabilities, least) / np.maximum(expected, least))


def _normal(
    shadows: Float[np.ndarray, "shadows rows"],
    chosen: Bool[np.ndarray, "shadows rows"],
    side: str,
    fixed_variance: bool | None,
    online: bool,
) -> tuple[Float[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
    """Return mean and standard deviation of each row's scores on one side."""
    _check_shadows(chosen, side, 2, offline_helps=online and side == "inside")
    counts = chosen.sum(0)
    mean = shadows.mean(0, where=chosen)
    squares = np.square(shadows - mean).sum(0, where=chosen)
    pooled = squares.sum() / (counts - 1).sum()
    if fixed_variance is None:
        # The same for all rows: of a shadow that is attacked in its turn, members are in one
        # shadow less than others, and must not be told by that.
        fixed_variance = counts.min(initial=_ENOUGH_SHADOWS) < _ENOUGH_SHADOWS
    variance = np.where(fixed_variance, pooled, squares / (counts - 1))
    return mean, np.maximum(np.sqrt(variance), _LEAST_DEVIATION)


def _check_shadows(
    chosen: Bool[np.ndarray, "shadows rows"], side: str, least: int, offline_helps: bool = False
) -> None:
    counts = chosen.sum(0)
    if len(counts) and counts.min() < least:
        row = int(counts.argmin())
        raise ValueError(
            f"each row must be {side} of at least {least} shadows, row {row} is so of "
            f"{counts[row]} of {len(chosen)}: train more shadows, with each row in half of them"
            + (", or attack offline" if offline_helps else "")
        )


def _bounded(
    logits: Float[np.ndarray, "*models rows classes"],
) -> Float[np.ndarray, "*models rows classes"]:
    if logits.shape[-1] < 2:
        raise ValueError(f"there must be at least 2 classes, got {logits.shape[-1]}")
    if np.isnan(logits).any() or np.isposinf(logits).any() or np.isneginf(logits).all(-1).any():
        raise ValueError("logits must be numbers or minus infinity, one a row finite at least")
    scores = logits.astype(np.float64)
    return np.asarray(np.maximum(scores, scores.max(-1, keepdims=True) - _FARTHEST))


def _at_labels(
    values: Float[np.ndarray, "*models rows classes"], labels: Integer[np.ndarray, " rows"]
) -> Float[np.ndarray, "*models rows"]:
    classes = as_classes("labels", labels, values.shape[-1])
    return np.asarray(values[..., np.arange(len(classes)), classes])
