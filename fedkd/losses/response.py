"""Distillation losses on a model's response, its logits: pure functions, no state, no I/O.

Conventions of every loss here: the student's logits get the gradient, whatever they are compared
with is a constant; the result is in nats per example (KL, cross-entropy) or squared or absolute
logits, averaged over the batch, in float32 or wider; an empty batch costs 0. All of them work
under ``torch.func.vmap`` and ``torch.func.grad``.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedkd.targets import at_least_float32, check_temperature, soften


def hard_label_loss(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
    *,
    sample_weights: Float[Tensor, "batch"] | None = None,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Cross-entropy against class labels, in nats per example.

    Args:
        logits: unnormalised scores; gradients flow through these.
        labels: class of each row, in [0, classes).
        sample_weights: >= 0, one per row, as in `soft_target_kl`.
        label_smoothing: share of the target's probability that is spread over all classes, in
            [0, 1). Szegedy et al., 2016, section 7. https://arxiv.org/abs/1512.00567
    """
    if sample_weights is None and len(logits) > 0 and not _classes_first(logits):
        return F.cross_entropy(at_least_float32(logits), labels, label_smoothing=label_smoothing)
    log_p = _log_softmax(at_least_float32(logits))
    row_losses = -log_p.gather(1, labels[:, None]).squeeze(1)
    if label_smoothing:
        row_losses = (1 - label_smoothing) * row_losses - label_smoothing * log_p.mean(dim=-1)
    return row_mean(row_losses, sample_weights)


def soft_target_kl(
    student_logits: Float[Tensor, "batch classes"],
    target_probabilities: Float[Tensor, "batch classes"],
    *,
    temperature: float,
    scale_by_t2: bool = True,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """Pull the student's softened class distribution towards a given one.

    Computes ``temperature**2 * KL(target || softmax(student_logits / temperature))``, averaged
    over the batch. The square keeps the gradient on the scale of a hard-label loss, so one
    learning rate serves every temperature. The gradient with respect to the student's logits is
    ``temperature / batch * (softmax(student_logits / temperature) - target)``.

    Args:
        student_logits: unnormalised scores; gradients flow through these.
        target_probabilities: rows that sum to 1 and are already softened, such as the mean of an
            ensemble; treated as constants. Zeros are allowed.
        temperature: softening divisor of the student, > 0.
        scale_by_t2: False leaves the factor ``temperature**2`` out.
        sample_weights: >= 0, one per row; the loss is then the weighted mean, divided by the SUM
            of the weights. With a 0/1 mask that is the mean over the rows kept, and 0 with a zero
            gradient when none is.

    Returns:
        Loss in nats per example, >= 0.

    Raises:
        ValueError: if ``temperature`` is not positive and finite.

    Source:
        Hinton, Vinyals, Dean, 2015, section 2. https://arxiv.org/abs/1503.02531
    """
    student_log_p = _log_soften(student_logits, temperature)
    target_p = target_probabilities.detach().to(student_log_p.dtype)
    scale = _scale(temperature, scale_by_t2)
    # xlogy: a class the target rules out contributes 0 * log 0 = 0, not NaN.
    if sample_weights is None:
        # Summed at once: fewer nodes in the graph of every step, and the same gradient.
        loss = torch.xlogy(target_p, target_p).sum() - (target_p * student_log_p).sum()
        return loss / max(len(student_log_p), 1) * scale
    row_losses = (torch.xlogy(target_p, target_p) - target_p * student_log_p).sum(dim=-1)
    return row_mean(row_losses, sample_weights) * scale


def soft_target_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    temperature: float,
    teacher_temperature: float | None = None,
    scale_by_t2: bool = True,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """Pull the student's softened class distribution towards the teacher's.

    Computes ``temperature**2 * KL(teacher || student)``, averaged over the batch, with the
    teacher softened by its own temperature T_t and the student by T_s = ``temperature``. The
    scale is T_s**2 also when the two differ, because 1/T_s is what softening the student takes
    off the gradient: it is ``T_s / batch * (student_probabilities - teacher_probabilities)``.
    As T grows, the loss of zero-mean logits tends to half of `logit_mse`.

    Args:
        student_logits: unnormalised scores; gradients flow through these.
        teacher_logits: unnormalised scores; treated as constants.
        temperature: softening divisor of the student, > 0.
        teacher_temperature: softening divisor of the teacher, > 0; None is the student's.
        scale_by_t2: False leaves the factor ``temperature**2`` out.
        sample_weights: >= 0, one per row, as in `soft_target_kl`.

    Returns:
        Loss in nats per example, >= 0.

    Raises:
        ValueError: if a temperature is not positive and finite.

    Source:
        Hinton, Vinyals, Dean, 2015, section 2. https://arxiv.org/abs/1503.02531
    """
    check_temperature(temperature)
    if teacher_temperature is None:
        teacher_temperature = temperature
    check_temperature(teacher_temperature, "teacher_temperature")
    return soft_target_kl(
        student_logits,
        soften(teacher_logits, temperature=teacher_temperature),
        temperature=temperature,
        scale_by_t2=scale_by_t2,
        sample_weights=sample_weights,
    )


def soft_cross_entropy(
    student_logits: Float[Tensor, "batch classes"],
    target_probabilities: Float[Tensor, "batch classes"],
    *,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy against class probabilities instead of labels.

    The gradient is that of `soft_target_kl`; the value is larger by the target's entropy, so it
    does not tend to 0 as the student comes to agree.

    Args:
        student_logits: unnormalised scores; gradients flow through these.
        target_probabilities: rows that sum to 1, already softened; treated as constants.
        temperature: softening divisor of the student, > 0.
        scale_by_t2: False leaves the factor ``temperature**2`` out.
        sample_weights: >= 0, one per row, as in `soft_target_kl`.

    Returns:
        Loss in nats per example, >= 0.

    Raises:
        ValueError: if ``temperature`` is not positive and finite.
    """
    student_log_p = _log_soften(student_logits, temperature)
    target_p = target_probabilities.detach().to(student_log_p.dtype)
    row_losses = -(target_p * student_log_p).sum(dim=-1)
    return row_mean(row_losses, sample_weights) * _scale(temperature, scale_by_t2)


def logit_mse(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared difference of logits, not of probabilities, over batch and classes.

    Args:
        student_logits: unnormalised scores; gradients flow through these.
        teacher_logits: unnormalised scores; treated as constants.
        sample_weights: >= 0, one per row, as in `soft_target_kl`.

    Source:
        Kim et al., 2021. https://arxiv.org/abs/2105.08919
    """
    return row_mean(_differences(student_logits, teacher_logits).square().mean(-1), sample_weights)


def logit_l1(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """Mean absolute difference of logits over batch and classes.

    Args:
        student_logits: unnormalised scores; gradients flow through these.
        teacher_logits: unnormalised scores; treated as constants.
        sample_weights: >= 0, one per row, as in `soft_target_kl`.

    Source:
        The digest loss in the published code of FedMD, Li and Wang, 2019.
        https://arxiv.org/abs/1910.03581
    """
    return row_mean(_differences(student_logits, teacher_logits).abs().mean(-1), sample_weights)


def probability_mse(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    temperature: float = 1.0,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared difference of softened probabilities, over batch and classes.

    Not `logit_mse`: the softmax flattens its gradient, and no factor makes up for the
    temperature, so at 20 next to nothing is learned from it.

    Args:
        student_logits: unnormalised scores; gradients flow through these.
        teacher_logits: unnormalised scores; treated as constants.
        temperature: softening divisor of both, > 0.
        sample_weights: >= 0, one per row, as in `soft_target_kl`.

    Returns:
        Squared probability, in [0, 2 / classes].

    Raises:
        ValueError: if ``temperature`` is not positive and finite.
    """
    student_p = soften(student_logits, temperature=temperature)
    teacher_p = soften(teacher_logits.detach(), temperature=temperature).to(student_p.dtype)
    return row_mean((student_p - teacher_p).square().mean(-1), sample_weights)


def annealing_kd(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    progress: float,
    max_temperature: float = 10.0,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared distance to the teacher's logits, which grow to their full size.

    The teacher's logits are multiplied by ``1 - (T - 1) / max_temperature``, where T falls
    linearly from ``max_temperature`` to 1. This is the first of two stages: afterwards the
    student learns from the labels alone.

    Args:
        student_logits: unnormalised scores; gradients flow through these.
        teacher_logits: unnormalised scores; treated as constants.
        progress: how much of the stage is done, in [0, 1].
        max_temperature: T at the start, >= 1; 1 is `logit_mse`.
        sample_weights: >= 0, one per row, as in `soft_target_kl`.

    Returns:
        Squared logits, >= 0.

    Raises:
        ValueError: if ``progress`` or ``max_temperature`` is out of range.

    Source:
        Jafari et al., 2021, Annealing Knowledge Distillation, stage I.
        https://arxiv.org/abs/2104.07163. The mean over classes is taken where the paper sums.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must be in [0, 1], got {progress}")
    if not 1 <= max_temperature < math.inf:
        raise ValueError(f"max_temperature must be >= 1 and finite, got {max_temperature}")
    shrink = 1 - (max_temperature - 1) * (1 - progress) / max_temperature
    return logit_mse(
        student_logits,
        shrink * at_least_float32(teacher_logits),
        sample_weights=sample_weights,
    )


def decoupled_kd(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    scale_by_t2: bool = True,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """Distil "is it the label?" and "which of the others?" with a weight each (DKD).

    Computes ``temperature**2 * (alpha * TCKD + beta * NCKD)``: TCKD is the divergence of the pair
    (label, any other class), NCKD that of the other classes among themselves. In
    `soft_target_loss` NCKD has the weight ``1 - teacher's probability of the label``, which
    silences it wherever the teacher is sure; here it is the same for every row.

    Args:
        student_logits: unnormalised scores; gradients flow through these.
        teacher_logits: unnormalised scores; treated as constants.
        labels: class of each row, in [0, classes).
        alpha: weight of TCKD, >= 0.
        beta: weight of NCKD, >= 0; the paper tunes it from 0.5 to 10 to the teacher.
        temperature: softening divisor of both, > 0.
        scale_by_t2: False leaves the factor ``temperature**2`` out.
        sample_weights: >= 0, one per row, as in `soft_target_kl`.

    Returns:
        Loss in nats per example, >= 0.

    Raises:
        ValueError: with fewer than 3 classes, or if a weight or ``temperature`` is out of range.

    Source:
        Zhao et al., 2022, Decoupled Knowledge Distillation, section 3.3.
        https://arxiv.org/abs/2203.08679
    """
    _check_other_classes(student_logits, "decoupled_kd")
    _check_weights(alpha=alpha, beta=beta)
    check_temperature(temperature)
    student = at_least_float32(student_logits) / temperature
    teacher = at_least_float32(teacher_logits.detach()).to(student.dtype) / temperature
    student_pair, teacher_pair = (_label_or_not(logits, labels) for logits in (student, teacher))
    label_losses = (teacher_pair.exp() * (teacher_pair - student_pair)).sum(dim=-1)
    row_losses = alpha * label_losses + beta * _other_class_kl(student, teacher, labels)
    return row_mean(row_losses, sample_weights) * _scale(temperature, scale_by_t2)


def normalised_kd(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy of the label, as sure as the teacher is, plus that of the others (NKD).

    Computes ``-t_y log s_y - gamma * temperature**2 * sum_j t'_j log s'_j``, averaged over the
    batch. The first term takes both probabilities of the label at temperature 1; t' and s' are
    the softened probabilities of the other classes, divided by their sum.

    Both are cross-entropies, so a student that equals the teacher pays more than 0, and is still
    pulled towards the label.

    Args:
        student_logits: unnormalised scores; gradients flow through these.
        teacher_logits: unnormalised scores; treated as constants.
        labels: class of each row, in [0, classes).
        gamma: weight of the other classes, >= 0.
        temperature: softening divisor of the other classes, > 0.
        scale_by_t2: False leaves the factor ``temperature**2`` out.
        sample_weights: >= 0, one per row, as in `soft_target_kl`.

    Returns:
        Loss in nats per example, >= 0.

    Raises:
        ValueError: with fewer than 3 classes, or if ``gamma`` or ``temperature`` is out of range.

    Source:
        Yang et al., 2023, From Knowledge Distillation to Self-Knowledge Distillation.
        https://arxiv.org/abs/2303.13005
    """
    _check_other_classes(student_logits, "normalised_kd")
    _check_weights(gamma=gamma)
    check_temperature(temperature)
    student = at_least_float32(student_logits)
    teacher = at_least_float32(teacher_logits.detach()).to(student.dtype)
    label_log_p = _log_softmax(student).gather(1, labels[:, None]).squeeze(1)
    label_target_p = torch.softmax(teacher, dim=-1).gather(1, labels[:, None]).squeeze(1)
    other_target_p = _log_softmax_of_others(teacher / temperature, labels)[0]
    other_log_p = _log_softmax_of_others(student / temperature, labels)[1]
    other_losses = -(other_target_p * other_log_p).sum(dim=-1)
    factor = gamma * _scale(temperature, scale_by_t2)
    return row_mean(factor * other_losses - label_target_p * label_log_p, sample_weights)


def not_true_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
    *,
    temperature: float = 3.0,
    scale_by_t2: bool = False,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """Keep the teacher's view of the classes that are NOT the label (NTD).

    ``KL(teacher || student)`` of the softened distributions over the other classes, without the
    factor ``temperature**2``, as published. The label's own score gets no gradient: what a row's
    label teaches is left to the cross-entropy.

    Args:
        student_logits: unnormalised scores; gradients flow through these.
        teacher_logits: unnormalised scores, such as the global model's; treated as constants.
        labels: class of each row, in [0, classes).
        temperature: softening divisor of both, > 0.
        scale_by_t2: True multiplies by ``temperature**2``.
        sample_weights: >= 0, one per row, as in `soft_target_kl`.

    Returns:
        Loss in nats per example, >= 0.

    Raises:
        ValueError: with fewer than 3 classes, or if ``temperature`` is not positive and finite.

    Source:
        Lee et al., 2022, Preservation of the Global Knowledge by Not-True Distillation (FedNTD).
        https://arxiv.org/abs/2106.03097
    """
    _check_other_classes(student_logits, "not_true_loss")
    check_temperature(temperature)
    student = at_least_float32(student_logits) / temperature
    teacher = at_least_float32(teacher_logits.detach()).to(student.dtype) / temperature
    row_losses = _other_class_kl(student, teacher, labels)
    return row_mean(row_losses, sample_weights) * _scale(temperature, scale_by_t2)


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
    _check_weights(beta=beta, gamma=gamma)
    student_p = soften(student_logits, temperature=temperature)
    teacher_p = soften(teacher_logits.detach(), temperature=temperature).to(student_p.dtype)
    if sample_weights is None:
        row_weights = student_p.new_ones(len(student_p))
    else:
        row_weights = sample_weights.detach().to(student_p.dtype)
    class_weights = student_p.new_ones(1, student_p.shape[1])
    within_rows = cosine_similarity(
        _centred(student_p, class_weights), _centred(teacher_p, class_weights)
    )
    within_classes = cosine_similarity(
        _centred(student_p.t(), row_weights[None]), _centred(teacher_p.t(), row_weights[None])
    )
    any_row = (row_weights.sum() > 0).to(student_p.dtype)
    row_loss = row_mean(1 - within_rows, row_weights)
    class_loss = any_row * (1 - within_classes).mean()
    return (beta * row_loss + gamma * class_loss) * _scale(temperature, scale_by_t2)


def standardise_logits(
    logits: Float[Tensor, "batch classes"],
) -> Float[Tensor, "batch classes"]:
    """Shift and scale each row of logits to mean 0 and standard deviation 1.

    Divides by the unbiased standard deviation plus 1e-7. A row of equal logits becomes zeros,
    through which no gradient flows.

    Args:
        logits: unnormalised scores; gradients flow through these.

    Returns:
        Float32 or wider.

    Raises:
        ValueError: with fewer than 2 classes.

    Source:
        Sun et al., 2024, Logit Standardization in Knowledge Distillation, algorithm 1.
        https://arxiv.org/abs/2403.01427
    """
    if logits.shape[-1] < 2:
        raise ValueError(f"standardise_logits needs at least 2 classes, got {logits.shape[-1]}")
    wide = at_least_float32(logits)
    centred = _centred(wide, wide.new_ones(1, wide.shape[1]))
    deviation: Tensor = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / math.sqrt(
        logits.shape[-1] - 1
    )
    return centred / (deviation + 1e-7)


def standardised_kd(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    temperature: float = 2.0,
    scale_by_t2: bool = True,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """`soft_target_loss` of logits that were standardised row by row.

    The student need not match the size of the teacher's logits, only their pattern. The published
    weights are 9 for this loss and 0.1 for the labels.

    Args:
        student_logits: unnormalised scores; gradients flow through these.
        teacher_logits: unnormalised scores; treated as constants.
        temperature: softening divisor of both once they are standardised, > 0.
        scale_by_t2: False leaves the factor ``temperature**2`` out.
        sample_weights: >= 0, one per row, as in `soft_target_kl`.

    Returns:
        Loss in nats per example, >= 0.

    Raises:
        ValueError: with fewer than 2 classes, or if ``temperature`` is not positive and finite.

    Source:
        Sun et al., 2024, Logit Standardization in Knowledge Distillation, algorithm 1.
        https://arxiv.org/abs/2403.01427
    """
    return soft_target_loss(
        standardise_logits(student_logits),
        standardise_logits(teacher_logits.detach()),
        temperature=temperature,
        scale_by_t2=scale_by_t2,
        sample_weights=sample_weights,
    )


def row_temperature_kl(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    temperatures: Float[Tensor, "batch"],
    *,
    scale_by_t2: bool = True,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """`soft_target_loss` with a temperature, and its square, for every row.

    Args:
        student_logits: unnormalised scores; gradients flow through these.
        teacher_logits: unnormalised scores; treated as constants.
        temperatures: softening divisor of each row, > 0, treated as constants; as
            `disagreement_temperatures` or `confidence_temperatures` give them.
        scale_by_t2: False leaves the factors ``temperatures**2`` out.
        sample_weights: >= 0, one per row, as in `soft_target_kl`.

    Returns:
        Loss in nats per example, >= 0.
    """
    student = at_least_float32(student_logits)
    divisors = temperatures.detach().to(student.dtype)
    student_log_p = torch.log_softmax(student / divisors[:, None], dim=-1)
    teacher = at_least_float32(teacher_logits.detach()).to(student.dtype)
    teacher_log_p = torch.log_softmax(teacher / divisors[:, None], dim=-1)
    row_losses = (teacher_log_p.exp() * (teacher_log_p - student_log_p)).sum(dim=-1)
    return row_mean(row_losses * divisors**2 if scale_by_t2 else row_losses, sample_weights)


def disagreement_temperatures(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    temperature: float,
    beta: float = 1.0,
    gamma: float = 1.0,
    min_temperature: float = 0.5,
) -> Float[Tensor, "batch"]:
    """Lower the temperature of the rows on which student and teacher differ most (FLSW).

    ``temperature + beta * (mean w - w)`` with ``w = (1 - cosine(student, teacher))**gamma``.

    Args:
        student_logits: unnormalised scores; a constant here, like the teacher's.
        teacher_logits: unnormalised scores.
        temperature: what a row of average disagreement gets, > 0.
        beta: how far temperatures spread, >= 0; 0 gives every row the same.
        gamma: exponent of the disagreement, > 0.
        min_temperature: no row gets less, > 0. TextBrewer has no such bound, and there a row's
            temperature can fall below 0.

    Returns:
        One temperature per row, without gradient, for `row_temperature_kl`.

    Raises:
        ValueError: if a setting is out of range.

    Source:
        Wen et al., 2019, Preparing Lessons: Improve Knowledge Distillation with Better
        Supervision. https://arxiv.org/abs/1911.07471. Equations as in TextBrewer's code,
        https://arxiv.org/abs/2002.12620
    """
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma must be > 0 and finite, got {gamma}")
    student = at_least_float32(student_logits.detach())
    teacher = at_least_float32(teacher_logits.detach()).to(student.dtype)
    disagreement = (1 - cosine_similarity(student, teacher)).clamp(min=0) ** gamma
    return _spread(disagreement, temperature, beta, min_temperature)


def confidence_temperatures(
    student_logits: Float[Tensor, "batch classes"],
    *,
    temperature: float,
    beta: float = 1.0,
    min_temperature: float = 0.5,
) -> Float[Tensor, "batch"]:
    """Lower the temperature of the rows on which the student is least sure (CWSM).

    ``temperature + beta * (mean w - w)`` with ``w = 1 / (largest student probability + 0.001)``.

    Args:
        student_logits: unnormalised scores; a constant here.
        temperature: what a row of average confidence gets, > 0.
        beta: how far temperatures spread, >= 0; 0 gives every row the same.
        min_temperature: no row gets less, > 0. TextBrewer has no such bound, and there a row's
            temperature can fall below 0.

    Returns:
        One temperature per row, without gradient, for `row_temperature_kl`.

    Raises:
        ValueError: if a setting is out of range.

    Source:
        Wen et al., 2019, Preparing Lessons: Improve Knowledge Distillation with Better
        Supervision. https://arxiv.org/abs/1911.07471. Equations as in TextBrewer's code,
        https://arxiv.org/abs/2002.12620
    """
    confidence = soften(student_logits.detach(), temperature=1.0).amax(dim=-1)
    return _spread(1 / (confidence + 1e-3), temperature, beta, min_temperature)


def cosine_similarity(
    first: Float[Tensor, "rows width"], second: Float[Tensor, "rows width"]
) -> Float[Tensor, "rows"]:
    """Cosine of the angle between two rows, in [-1, 1].

    A row of zeros has no direction: its cosine is 0, without gradient, where the library
    function divides by 1e-8 and hands back a gradient of that size. A row with NaN has a cosine
    of NaN.
    """
    norms = torch.linalg.vector_norm(first, dim=-1) * torch.linalg.vector_norm(second, dim=-1)
    # Not `> 0`, which NaN fails: it would be taken for a row of zeros.
    defined = norms != 0
    cosines = (first * second).sum(dim=-1) / torch.where(defined, norms, torch.ones_like(norms))
    return torch.where(defined, cosines, torch.zeros_like(cosines))


def _log_soften(
    logits: Float[Tensor, "batch classes"], temperature: float
) -> Float[Tensor, "batch classes"]:
    check_temperature(temperature)
    return _log_softmax(at_least_float32(logits) / temperature)


def _log_softmax(logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
    if _classes_first(logits):
        # With the classes as rows torch works on many examples at once, else on one example's
        # few classes: ten times as long for ten of them.
        return torch.log_softmax(logits.t(), dim=0).t()
    return torch.log_softmax(logits, dim=-1)


def _classes_first(logits: Float[Tensor, "batch classes"]) -> bool:
    """Tell whether a class's scores lie side by side in memory, as stacked models leave them."""
    return logits.stride(0) == 1 and logits.stride(1) > 1


def _differences(
    student_logits: Float[Tensor, "batch classes"], teacher_logits: Float[Tensor, "batch classes"]
) -> Float[Tensor, "batch classes"]:
    student = at_least_float32(student_logits)
    return student - teacher_logits.detach().to(student.dtype)


def _scale(temperature: float, scale_by_t2: bool) -> float:
    return temperature**2 if scale_by_t2 else 1.0


def row_mean(
    row_losses: Float[Tensor, "batch"], sample_weights: Float[Tensor, "batch"] | None
) -> Float[Tensor, ""]:
    """Average over rows, weighted or not; 0 where no row counts.

    Args:
        row_losses: one per row.
        sample_weights: >= 0, one per row, as in `soft_target_kl`.
    """
    if sample_weights is None:
        return row_losses.sum() / max(len(row_losses), 1)
    weights = sample_weights.detach().to(row_losses.dtype)
    total = weights.sum()
    # torch.where, not if: which rows are kept is data, and vmap cannot branch on data.
    return (weights * row_losses).sum() / torch.where(total > 0, total, torch.ones_like(total))


def _label_mask(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, "batch"]
) -> Bool[Tensor, "batch classes"]:
    return torch.arange(logits.shape[1], device=logits.device) == labels[:, None]


def _label_or_not(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, "batch"]
) -> Float[Tensor, "batch 2"]:
    """Log-probabilities of the label and of all other classes together.

    The second is a sum of logarithms, never the logarithm of 1 - p, which is -inf for a model
    that is sure.
    """
    total = torch.logsumexp(logits, dim=-1)
    label = logits.gather(1, labels[:, None]).squeeze(1)
    others = torch.logsumexp(logits.masked_fill(_label_mask(logits, labels), -math.inf), dim=-1)
    return torch.stack([label - total, others - total], dim=-1)


def _log_softmax_of_others(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, "batch"]
) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch classes"]]:
    """Probabilities of the classes that are not the label, and their logarithms.

    Each row of probabilities sums to 1; both are 0 at the label, so it adds nothing to a sum.
    """
    is_label = _label_mask(logits, labels)
    log_p = _log_softmax(logits.masked_fill(is_label, -math.inf))
    return log_p.exp().masked_fill(is_label, 0.0), log_p.masked_fill(is_label, 0.0)


def _other_class_kl(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
) -> Float[Tensor, "batch"]:
    teacher_p, teacher_log_p = _log_softmax_of_others(teacher, labels)
    _, student_log_p = _log_softmax_of_others(student, labels)
    return (teacher_p * (teacher_log_p - student_log_p)).sum(dim=-1)


def _centred(
    values: Float[Tensor, "rows width"], weights: Float[Tensor, "1 width"]
) -> Float[Tensor, "rows width"]:
    """Take the weighted mean of each row off it, so that a cosine becomes a correlation.

    What is left of a constant row is rounding; it becomes exactly 0.
    """
    total = weights.sum()
    mean = (values * weights).sum(dim=-1, keepdim=True) / torch.where(
        total > 0, total, torch.ones_like(total)
    )
    centred = (values - mean) * weights.sqrt()
    size = torch.linalg.vector_norm(values * weights.sqrt(), dim=-1, keepdim=True)
    rounding = 8 * torch.finfo(values.dtype).eps * size
    # Not `> rounding`, which NaN fails: it would be taken for a constant row.
    constant = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) <= rounding
    return torch.where(constant, torch.zeros_like(centred), centred)


def _spread(
    row_weights: Float[Tensor, "batch"], temperature: float, beta: float, min_temperature: float
) -> Float[Tensor, "batch"]:
    check_temperature(temperature)
    check_temperature(min_temperature, "min_temperature")
    _check_weights(beta=beta)
    mean = row_weights.sum() / max(len(row_weights), 1)
    return (temperature + beta * (mean - row_weights)).clamp(min=min_temperature)


def _check_other_classes(logits: Float[Tensor, "batch classes"], loss: str) -> None:
    if logits.shape[1] < 3:
        raise ValueError(
            f"{loss} needs at least 3 classes, got {logits.shape[1]}: next to the label there is "
            "no distribution over the other classes; use soft_target_loss"
        )


def _check_weights(**weights: float) -> None:
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be >= 0 and finite, got {weight}")
