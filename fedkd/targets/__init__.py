"""Many predictions -> one target: what a student shall agree with, and how much each row counts.

Everything is computed in float64 inside the averages and returned in float32 or wider, so half
precision uploads lose nothing further. Averages of probabilities, of logits and entropy reduction
are different targets; each has its own name and none is a default for another.
"""

from fedkd.targets.averages import (
    coordinate_median,
    entropy_reduction,
    entropy_reduction_by_power,
    leave_one_out,
    mean_logit,
    mean_probability,
    trimmed_mean,
)
from fedkd.targets.clusters import centroids_by_row, clusters_by_row, nearest_centroid
from fedkd.targets.density import density_ratio, density_weights
from fedkd.targets.robust import (
    filtered_mean,
    geometric_median,
    kept_by_filter,
    kept_within,
    less_trusted,
    norm_checked_mean,
    outlier_checked_mean,
    outlier_scores,
    squared_deviations,
    squared_distances,
)
from fedkd.targets.scale import Scale, Targets
from fedkd.targets.selection import (
    ambiguity,
    certainty_weights,
    confidence,
    confidence_mask,
    confidence_weights,
    curriculum_mask,
    difficulty,
    difficulty_weights,
    entropy,
    hardest_mask,
    kept_fraction,
)
from fedkd.targets.simplex import nearest_shares
from fedkd.targets.softening import at_least_float32, check_temperature, soften
from fedkd.targets.streaming import PredictionSpool, StreamingMean
from fedkd.targets.teachers import (
    HEAD_PADDING,
    mean_by_row,
    route_to_heads,
    shares_by_confidence,
    shares_by_entropy,
)

__all__ = [
    "HEAD_PADDING",
    "PredictionSpool",
    "Scale",
    "StreamingMean",
    "Targets",
    "ambiguity",
    "at_least_float32",
    "centroids_by_row",
    "certainty_weights",
    "check_temperature",
    "clusters_by_row",
    "confidence",
    "confidence_mask",
    "confidence_weights",
    "coordinate_median",
    "curriculum_mask",
    "density_ratio",
    "density_weights",
    "difficulty",
    "difficulty_weights",
    "entropy",
    "entropy_reduction",
    "entropy_reduction_by_power",
    "filtered_mean",
    "geometric_median",
    "hardest_mask",
    "kept_by_filter",
    "kept_fraction",
    "kept_within",
    "leave_one_out",
    "less_trusted",
    "mean_by_row",
    "mean_logit",
    "mean_probability",
    "nearest_centroid",
    "nearest_shares",
    "norm_checked_mean",
    "outlier_checked_mean",
    "outlier_scores",
    "route_to_heads",
    "shares_by_confidence",
    "shares_by_entropy",
    "soften",
    "squared_deviations",
    "squared_distances",
    "trimmed_mean",
]
