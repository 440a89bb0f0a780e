"""Pure functions of labels, predictions, features and weights that say what a model has learned.

How good it is (``classification``), whether its confidence can be believed (``calibration``), how
closely it follows a teacher (``agreement``), how much peers differ (``diversity``) and how evenly
they fare (``fairness``), what a confidence threshold keeps (``filtering``), whether two networks
compute alike (``similarity``, ``geometry``), how far its weights may move (``flatness``), whether
two loss terms pull the same way (``gradients``). Figures of these are in `fedkd.figures`.
"""

from fedkd.metrics.agreement import (
    Fidelity,
    FidelitySplit,
    agreement_matrix,
    fidelity,
    fidelity_by_correctness,
    kl_matrix,
    mean_kl,
    top1_agreement,
)
from fedkd.metrics.calibration import (
    ReliabilityBins,
    calibration_error_of_logits,
    expected_calibration_error,
    fit_temperature,
    maximum_calibration_error,
    root_mean_square_calibration_error,
    temperature_scaled_calibration_error,
)
from fedkd.metrics.classification import (
    ClassTable,
    accuracy,
    brier_score,
    class_table,
    confusion_counts,
    macro_recall,
    negative_log_likelihood,
    per_class_precision,
    per_class_recall,
    personal_accuracy,
    worst_class_recall,
)
from fedkd.metrics.diversity import (
    EnsembleEntropy,
    PeerAnswers,
    VoteCounter,
    ensemble_entropy,
    ensemble_gain,
    error_correlation,
    jensen_shannon,
    pairwise_disagreement,
    q_statistic,
    target_entropy,
)
from fedkd.metrics.fairness import (
    forgetting,
    spread,
    worst_mean,
)
from fedkd.metrics.filtering import (
    ConfidenceHistogram,
    ThresholdCurve,
    confidence_histogram,
    kept_by_class,
    threshold_curve,
)
from fedkd.metrics.flatness import (
    LinePoint,
    NoisePoint,
    filter_normalize,
    line_between,
    weight_noise_curve,
)
from fedkd.metrics.geometry import (
    LogitGeometry,
    class_correlation,
    class_correlation_difference,
    logit_geometry,
)
from fedkd.metrics.gradients import (
    GradientComparison,
    compare_gradients,
)
from fedkd.metrics.similarity import (
    MinibatchCKA,
    cka_matrix,
    linear_cka,
)

__all__ = [
    "ClassTable",
    "ConfidenceHistogram",
    "EnsembleEntropy",
    "Fidelity",
    "FidelitySplit",
    "GradientComparison",
    "LinePoint",
    "LogitGeometry",
    "MinibatchCKA",
    "NoisePoint",
    "PeerAnswers",
    "ReliabilityBins",
    "ThresholdCurve",
    "VoteCounter",
    "accuracy",
    "agreement_matrix",
    "brier_score",
    "calibration_error_of_logits",
    "cka_matrix",
    "class_correlation",
    "class_correlation_difference",
    "class_table",
    "compare_gradients",
    "confidence_histogram",
    "confusion_counts",
    "ensemble_entropy",
    "ensemble_gain",
    "error_correlation",
    "expected_calibration_error",
    "fidelity",
    "fidelity_by_correctness",
    "filter_normalize",
    "fit_temperature",
    "forgetting",
    "jensen_shannon",
    "kept_by_class",
    "kl_matrix",
    "line_between",
    "linear_cka",
    "logit_geometry",
    "macro_recall",
    "maximum_calibration_error",
    "mean_kl",
    "negative_log_likelihood",
    "pairwise_disagreement",
    "per_class_precision",
    "per_class_recall",
    "personal_accuracy",
    "q_statistic",
    "root_mean_square_calibration_error",
    "spread",
    "target_entropy",
    "temperature_scaled_calibration_error",
    "threshold_curve",
    "top1_agreement",
    "weight_noise_curve",
    "worst_class_recall",
    "worst_mean",
]
