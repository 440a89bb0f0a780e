"""Fidelity: how closely a student, or any model, follows another one.

High accuracy does not imply it, nor the reverse: Stanton et al., 2021,
https://arxiv.org/abs/2106.05945. NaN without rows.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer

from fedkd.metrics.arrays import Array, as_classes, as_float64, log_softmax, mean_or_nan


def top1_agreement(
    first_scores: Float[Array, "rows classes"], second_scores: Float[Array, "rows classes"]
) -> float:
    """Return the share of rows on which both models rank the same class first, in [0, 1].

    Logits or probabilities will do; of equally high scores, the first class counts.
    """
    same = as_float64(first_scores).argmax(axis=1) == as_float64(second_scores).argmax(axis=1)
    return mean_or_nan(same.astype(np.float64))


def mean_kl(
    p_logits: Float[Array, "rows classes"], q_logits: Float[Array, "rows classes"]
) -> float:
    """Return ``KL(p || q)`` at temperature 1, averaged over rows, in nats, >= 0.

    For fidelity, p is the teacher and q the student.
    """
    log_p, log_q = log_softmax(p_logits), log_softmax(q_logits)
    divergence = np.sum(np.exp(log_p) * (log_p - log_q), axis=1)
    return max(mean_or_nan(divergence), 0.0) if len(divergence) else float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """How closely a student follows its teacher on some rows.

    Attributes:
        rows: how many.
        agreement: share of rows with the same top class, see `top1_agreement`.
        kl: ``KL(teacher || student)`` in nats per row, see `mean_kl`.
    """

    rows: int
    agreement: float
    kl: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelitySplit:
    """Fidelity where following the teacher helps, and where it hurts.

    Attributes:
        teacher_right: on the rows whose top class is the label for the teacher.
        teacher_wrong: on the others; high agreement here is the teacher's mistakes passed on.
    """

    teacher_right: Fidelity
    teacher_wrong: Fidelity


def fidelity(
    teacher_logits: Float[Array, "rows classes"], student_logits: Float[Array, "rows classes"]
) -> Fidelity:
    """Return top-1 agreement and mean KL together; NaN without rows."""
    return Fidelity(
        rows=len(teacher_logits),
        agreement=top1_agreement(teacher_logits, student_logits),
        kl=mean_kl(teacher_logits, student_logits),
    )


def fidelity_by_correctness(
    teacher_logits: Float[Array, "rows classes"],
    student_logits: Float[Array, "rows classes"],
    labels: Integer[Array, " rows"],
) -> FidelitySplit:
    """Split `fidelity` by whether the teacher is right.

    Raises:
        ValueError: if a label is no class of the logits.
    """
    teacher, student = as_float64(teacher_logits), as_float64(student_logits)
    right = teacher.argmax(axis=1) == as_classes("labels", labels, teacher.shape[1])
    return FidelitySplit(
        teacher_right=fidelity(teacher[right], student[right]),
        teacher_wrong=fidelity(teacher[~right], student[~right]),
    )


def agreement_matrix(
    scores: Float[Array, "models rows classes"],
) -> Float[np.ndarray, "models models"]:
    """Return `top1_agreement` of every two models on the same rows: symmetric, 1 on the diagonal.

    NaN without rows.

    Examples:
        >>> import numpy as np
        >>> from fedkd.metrics import agreement_matrix
        >>> scores = np.array([[[2.0, 1.0], [0.0, 1.0]], [[3.0, 0.0], [1.0, 0.0]]])
        >>> agreement_matrix(scores)  # 2 models, 2 rows, 2 classes
        array([[1. , 0.5],
               [0.5, 1. ]])
    """
    top_classes = as_float64(scores).argmax(axis=2)
    num_models, num_rows = top_classes.shape
    if not num_rows:
        return np.full((num_models, num_models), np.nan)
    matrix: np.ndarray = np.array([(top_classes == own).mean(axis=1) for own in top_classes])
    return matrix


def kl_matrix(
    logits: Float[Array, "models rows classes"],
) -> Float[np.ndarray, "models models"]:
    """Return ``KL(p_i || p_j)`` of every two models at [i, j], in nats per row, >= 0.

    Not symmetric; 0 on the diagonal. One matrix a round shows whether peers grow alike: entries
    that all fall to 0 are a collapse into one model. NaN without rows.
    """
    log_p = log_softmax(logits)
    num_models, num_rows, _ = log_p.shape
    if not num_rows:
        return np.full((num_models, num_models), np.nan)
    # One model against all others at a time: no table of models x models x rows x classes.
    divergences: np.ndarray = np.array(
        [(np.exp(own) * (own - log_p)).sum(axis=2).mean(axis=1) for own in log_p]
    )
    np.clip(divergences, 0.0, None, out=divergences)
    return divergences
