"""Pure functions of labels and predictions: accuracy, calibration, diversity, fidelity."""

from fedkd.metrics.agreement import mean_kl, top1_agreement
from fedkd.metrics.classification import (
    accuracy,
    confusion_counts,
    expected_calibration_error,
    macro_recall,
    negative_log_likelihood,
    per_class_recall,
    personal_accuracy,
    worst_class_recall,
)
from fedkd.metrics.diversity import (
    VoteCounter,
    jensen_shannon,
    pairwise_disagreement,
    target_entropy,
)

__all__ = [
    "VoteCounter",
    "accuracy",
    "confusion_counts",
    "expected_calibration_error",
    "jensen_shannon",
    "macro_recall",
    "mean_kl",
    "negative_log_likelihood",
    "pairwise_disagreement",
    "per_class_recall",
    "personal_accuracy",
    "target_entropy",
    "top1_agreement",
    "worst_class_recall",
]
