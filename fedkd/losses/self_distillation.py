"""Self-distillation and self-supervision: a model's own depth, or views it made, as the teacher.

Teachers are constants, results float32 or wider, averaged over the batch; an empty batch costs 0.
All losses work under ``torch.func.vmap`` and ``torch.func.grad``.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from fedkd.losses.response import hard_label_loss, soft_cross_entropy, soft_target_loss
from fedkd.losses.rows import row_mean
from fedkd.targets import at_least_float32, check_temperature, soften


class SelfSupervisedLosses(NamedTuple):
    """The four parts of self-supervised distillation, before their weights.

    Attributes:
        ce: cross-entropy of the normal views against the labels.
        kd: divergence from the teacher on the normal views.
        ss: divergence from the teacher's similarities of rotated to normal views.
        tf: divergence from the teacher on the rotated views.
    """

    ce: Float[Tensor, ""]
    kd: Float[Tensor, ""]
    ss: Float[Tensor, ""]
    tf: Float[Tensor, ""]

    def total(
        self,
        *,
        ce_weight: float = 1.0,
        kd_weight: float = 0.9,
        ss_weight: float = 10.0,
        tf_weight: float = 2.7,
    ) -> Float[Tensor, ""]:
        """Return the weighted sum, in nats per example; the published weights are the defaults."""
        return ce_weight * self.ce + kd_weight * self.kd + ss_weight * self.ss + tf_weight * self.tf


def be_your_own_teacher_losses(
    logits: Float[Tensor, "branches batch classes"],
    labels: Int[Tensor, "batch"] | None,
    *,
    features: Float[Tensor, "branches batch width"] | None = None,
    ce_weight: float = 0.7,
    kd_weight: float = 0.3,
    feature_weight: float = 0.0,
    temperature: float = 3.0,
    scale_by_t2: bool = False,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, "branches"]:
    """Classifiers at several depths of one network learn from its deepest one.

    The deepest branch pays the plain cross-entropy against the labels. Every other pays
    ``ce_weight`` of that, ``kd_weight`` of the soft cross-entropy against the deepest branch and,
    if asked, ``feature_weight`` of its features' squared distance from the deepest branch's.

    Args:
        logits: unnormalised scores of every branch, the DEEPEST LAST; as a target that one is a
            constant.
        labels: class of each row, in [0, classes); None leaves out what needs labels, and the
            deepest branch then pays nothing.
        features: one vector per branch and row, brought to a common width; needed with
            ``feature_weight``.
        ce_weight: weight of the labels for the shallow branches, >= 0.
        kd_weight: weight of the deepest branch's soft labels, >= 0.
        feature_weight: weight of the distance, summed over the width and averaged over the
            batch, >= 0; the published code takes 0.03.
        temperature: softening divisor of both sides of the soft cross-entropy, > 0.
        scale_by_t2: True multiplies the soft cross-entropy by ``temperature**2``; the published
            code does not.
        sample_weights: >= 0, one per row, as in `soft_target_loss`.

    Returns:
        One loss per branch, in nats per example; send their sum back. A network with a single
        branch pays the plain cross-entropy.

    Raises:
        ValueError: if a weight or ``temperature`` is out of range, there is no branch, or
            ``feature_weight`` has no features to weigh.

    Source:
        Zhang et al., 2019, Be Your Own Teacher, equations 3 to 6.
        https://arxiv.org/abs/1905.08094
    """
    for name, weight in (
        ("ce_weight", ce_weight),
        ("kd_weight", kd_weight),
        ("feature_weight", feature_weight),
    ):
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be >= 0 and finite, got {weight}")
    if len(logits) == 0:
        raise ValueError("self-distillation needs at least 1 branch, got 0")
    if feature_weight > 0 and features is None:
        raise ValueError(f"feature_weight {feature_weight} needs features of every branch")
    target = soften(logits[-1].detach(), temperature=temperature)
    losses = []
    for branch, scores in enumerate(logits):
        wide = at_least_float32(scores)
        if labels is None:
            loss = wide.new_zeros(())
        else:
            loss = hard_label_loss(wide, labels, sample_weights=sample_weights)
        if branch < len(logits) - 1:
            soft = soft_cross_entropy(
                wide,
                target,
                temperature=temperature,
                scale_by_t2=scale_by_t2,
                sample_weights=sample_weights,
            )
            loss = ce_weight * loss + kd_weight * soft
            if features is not None and feature_weight > 0:
                own, deepest = features[branch], features[-1].detach()
                distance = (at_least_float32(own) - at_least_float32(deepest)).square().sum(dim=-1)
                loss = loss + feature_weight * row_mean(distance, sample_weights)
        losses.append(loss)
    return torch.stack(losses)


def rotated_views(
    images: Shaped[Tensor, "batch channels height width"],
) -> Shaped[Tensor, "views batch channels height width"]:
    """Turn square images by 0, 90, 180 and 270 degrees.

    Args:
        images: any dtype; height and width are equal.

    Returns:
        Four views, the first the images as they are. Flatten the first two axes for a model.

    Raises:
        ValueError: if the images are not square.
    """
    height, width = images.shape[-2:]
    if height != width:
        raise ValueError(f"rotated views need square images, got {height} x {width}")
    return torch.stack([torch.rot90(images, turns, dims=(-2, -1)) for turns in range(4)])


def view_similarities(
    embeddings: Float[Tensor, "views batch width"],
) -> Float[Tensor, "pairs batch"]:
    """Cosine of every transformed row's embedding to the embeddings of all normal rows.

    Args:
        embeddings: view 0 is the normal one; gradients flow through all of these.

    Returns:
        Row v * batch + b is row b of transformed view v + 1, column c the normal row c; values
        in [-1, 1], a zero vector at cosine 0 to all.
    """
    wide = at_least_float32(embeddings)
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    # Dividing by infinity gives a zero vector a direction of 0 and a gradient of 0.
    unit = wide / torch.where(length > 1e-12, length, math.inf)
    with torch.autocast(embeddings.device.type, enabled=False):
        return unit[1:].flatten(0, 1) @ unit[0].t()


def contrastive_view_loss(
    embeddings: Float[Tensor, "views batch width"], *, temperature: float = 0.5
) -> Float[Tensor, ""]:
    """Train a self-supervision head: a transformed row is to be nearest its own normal row.

    Args:
        embeddings: view 0 is the normal one; gradients flow through all of these.
        temperature: divisor of the cosines, > 0.

    Returns:
        Cross-entropy over the rows of the batch, in nats per transformed row; 0 for one row.

    Raises:
        ValueError: if ``temperature`` is not positive and finite.

    Source:
        Xu, Liu, Li, Loy, 2020, section 3.1. https://arxiv.org/abs/2006.07114
    """
    check_temperature(temperature)
    similarities = view_similarities(embeddings)
    return hard_label_loss(similarities / temperature, _own_rows(embeddings))


def error_level_mask(
    scores: Float[Tensor, "rows classes"], targets: Int[Tensor, "rows"], *, wrong_share: float
) -> Float[Tensor, "rows"]:
    """Mark with 1 all rows a teacher gets right and the least wrong share of the others.

    A row's error level is the number of classes the teacher scores above the target; rows of the
    same level are ordered by the target's probability, so the order of rows decides nothing. A
    tie with the target counts as right.

    Args:
        scores: the teacher's, of any monotone kind; treated as constants.
        targets: class of each row, in [0, classes).
        wrong_share: share of the wrong rows that is kept, in [0, 1], rounded down to whole rows.

    Raises:
        ValueError: if ``wrong_share`` is out of range.

    Source:
        Xu, Liu, Li, Loy, 2020, section 3.2. https://arxiv.org/abs/2006.07114
    """
    if not 0 <= wrong_share <= 1:
        raise ValueError(f"wrong_share must be in [0, 1], got {wrong_share}")
    wide = at_least_float32(scores.detach())
    of_target = wide.gather(1, targets[:, None])
    level = (wide > of_target).sum(dim=1)
    num_wrong = (level > 0).sum()
    # 0.29 of 100 rows are 29, although the product is 28.999999999999996.
    num_kept = len(wide) - num_wrong + (num_wrong.double() * wrong_share + 1e-9).floor()
    unlikely = 1 - soften(wide.double(), temperature=1.0).gather(1, targets[:, None]).squeeze(1)
    place = (level + 0.5 * unlikely).argsort().argsort()
    return (place < num_kept).to(wide.dtype)


def self_supervised_losses(
    student_logits: Float[Tensor, "views batch classes"],
    teacher_logits: Float[Tensor, "views batch classes"],
    student_embeddings: Float[Tensor, "views batch student_width"],
    teacher_embeddings: Float[Tensor, "views batch teacher_width"],
    labels: Int[Tensor, "batch"],
    *,
    kd_temperature: float = 4.0,
    ss_temperature: float = 0.5,
    tf_temperature: float = 4.0,
    ss_wrong_share: float = 0.75,
    tf_wrong_share: float = 1.0,
    scale_by_t2: bool = True,
) -> SelfSupervisedLosses:
    """Self-supervised distillation: imitate predictions AND similarities among rotated views.

    Where the teacher is wrong about a transformed row, `error_level_mask` decides whether the row
    counts; the average is over the rows that do, and 0 where none does.

    Args:
        student_logits: unnormalised scores, view 0 the normal one (see `rotated_views`);
            gradients flow through these.
        teacher_logits: scores for the same views; treated as constants.
        student_embeddings: what the student's self-supervision head makes of the same views;
            gradients flow through these.
        teacher_embeddings: the same of the teacher, of any width; treated as constants.
        labels: class of each normal row, in [0, classes).
        kd_temperature: softening divisor of the normal views' logits, > 0.
        ss_temperature: divisor of the cosines, > 0.
        tf_temperature: softening divisor of the transformed views' logits, > 0.
        ss_wrong_share: share kept of the rows whose similarities the teacher ranks wrong, in
            [0, 1].
        tf_wrong_share: share kept of the rows whose class the teacher gets wrong, in [0, 1].
        scale_by_t2: False leaves the square of each part's temperature out.

    Returns:
        The parts by name, each in nats per row, >= 0; ``total()`` adds them with the published
        weights.

    Raises:
        ValueError: if a temperature or share is out of range, or there are fewer than two views.

    Source:
        Xu, Liu, Li, Loy, 2020, Knowledge Distillation Meets Self-Supervision.
        https://arxiv.org/abs/2006.07114
    """
    num_views = len(student_logits)
    if num_views < 2:
        raise ValueError(f"self-supervision needs at least 2 views, got {num_views}")
    for name, value in (
        ("kd_temperature", kd_temperature),
        ("ss_temperature", ss_temperature),
        ("tf_temperature", tf_temperature),
    ):
        check_temperature(value, name)
    normal = at_least_float32(student_logits[0])
    transformed_teacher = teacher_logits[1:].flatten(0, 1)
    teacher_similarities = view_similarities(teacher_embeddings.detach())
    return SelfSupervisedLosses(
        ce=hard_label_loss(normal, labels),
        kd=soft_target_loss(
            normal, teacher_logits[0], temperature=kd_temperature, scale_by_t2=scale_by_t2
        ),
        ss=soft_target_loss(
            view_similarities(student_embeddings),
            teacher_similarities,
            temperature=ss_temperature,
            scale_by_t2=scale_by_t2,
            sample_weights=error_level_mask(
                teacher_similarities,
                _own_rows(teacher_embeddings),
                wrong_share=ss_wrong_share,
            ),
        ),
        tf=soft_target_loss(
            student_logits[1:].flatten(0, 1),
            transformed_teacher,
            temperature=tf_temperature,
            scale_by_t2=scale_by_t2,
            sample_weights=error_level_mask(
                transformed_teacher,
                labels.repeat(num_views - 1),
                wrong_share=tf_wrong_share,
            ),
        ),
    )


def _own_rows(embeddings: Float[Tensor, "views batch width"]) -> Int[Tensor, "pairs"]:
    num_views, batch_size, _ = embeddings.shape
    return torch.arange(batch_size, device=embeddings.device).repeat(num_views - 1)
