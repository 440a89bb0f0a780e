"""DIST: correlations of a student's predictions with a teacher's.

Conventions: the student's logits get the gradient, whatever they are compared with is a constant;
the result is averaged over the batch, in float32 or wider; an empty batch costs 0. Everything works
under ``torch.func.vmap`` and ``torch.func.grad``.
"""

from jaxtyping import Float
from torch import Tensor

from fedkd.losses.rows import centre_rows, check_weights, cosine_similarity, row_mean, t2_factor
from fedkd.targets import soften


def dist_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """Match how the teacher ranks classes within a row and rows within a class (DIST).

    Computes ``temperature**2 * (beta * (1 - r_rows) + gamma * (1 - r_classes))``, where r is the
    mean Pearson correlation of the softened probabilities of student and teacher: of each row
    over the classes, and of each class over the rows of the batch. Scores that differ by scale
    and shift are as good as equal, which suits a teacher far stronger than the student.

    A row or a class without variance, such as every class of a batch of one, has no correlation.
    It counts as uncorrelated, so it costs its share and has no gradient.

    Args:
        student_logits: unnormalised scores; gradients flow through these.
        teacher_logits: unnormalised scores; treated as constants.
        beta: weight of the correlation within rows, >= 0.
        gamma: weight of the correlation within classes, >= 0.
        temperature: softening divisor of both, > 0.
        scale_by_t2: False leaves the factor ``temperature**2`` out.
        sample_weights: >= 0, one per row; both the mean over rows and the correlation within a
            class are weighted. With a 0/1 mask that is the loss of the rows kept, and 0 when none
            is.

    Returns:
        Loss in [0, 2 * (beta + gamma) * temperature**2], without unit.

    Raises:
        ValueError: if a weight or ``temperature`` is out of range.

    Source:
        Huang et al., 2022, Knowledge Distillation from A Stronger Teacher.
        https://arxiv.org/abs/2205.10536
    """
    check_weights(beta=beta, gamma=gamma)
    student_p = soften(student_logits, temperature=temperature)
    teacher_p = soften(teacher_logits.detach(), temperature=temperature).to(student_p.dtype)
    if sample_weights is None:
        row_weights = student_p.new_ones(len(student_p))
    else:
        row_weights = sample_weights.detach().to(student_p.dtype)
    class_weights = student_p.new_ones(1, student_p.shape[1])
    within_rows = cosine_similarity(
        centre_rows(student_p, class_weights), centre_rows(teacher_p, class_weights)
    )
    within_classes = cosine_similarity(
        centre_rows(student_p.t(), row_weights[None]), centre_rows(teacher_p.t(), row_weights[None])
    )
    any_row = (row_weights.sum() > 0).to(student_p.dtype)
    row_loss = row_mean(1 - within_rows, row_weights)
    class_loss = any_row * (1 - within_classes).mean()
    return (beta * row_loss + gamma * class_loss) * t2_factor(temperature, scale_by_t2)
