"""Distillation losses on what a layer puts out: pure functions of two layers' features.

Conventions of every loss here: the student's features get the gradient, the teacher's are
constants; the result is averaged over the batch, in float32 or wider, and has no unit; an empty
batch costs 0. One call compares one pair of layers; the sum over several is the caller's. All of
them work under ``torch.func.vmap`` and ``torch.func.grad``.

Axis 0 is the batch and axis 1 the channels; what follows is space (or time).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fedkd.losses.rows import cosine_similarity, row_mean
from fedkd.targets import at_least_float32


def hint_loss(
    student_features: Float[Tensor, "batch student_channels *student_space"],
    teacher_features: Float[Tensor, "batch teacher_channels *teacher_space"],
    *,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared difference of features, over the batch and all elements of a row.

    A student of another width goes through a projector first, trained with it.

    Args:
        student_features: gradients flow through these.
        teacher_features: of the same shape; treated as constants.
        sample_weights: >= 0, one per row, as in `fedkd.losses.response.soft_target_kl`.

    Raises:
        ValueError: if the shapes differ.

    Source:
        Romero et al., 2015, FitNets, equation 3. https://arxiv.org/abs/1412.6550. The paper takes
        half the sum where the mean is taken here.
    """
    return row_mean(hint_rows(student_features, teacher_features), sample_weights)


def hint_rows(
    student_features: Float[Tensor, "batch student_channels *student_space"],
    teacher_features: Float[Tensor, "batch teacher_channels *teacher_space"],
) -> Float[Tensor, "batch"]:
    """Return what `hint_loss` averages, a number for each row."""
    student, teacher = _of_one_shape(student_features, teacher_features, "hint_loss")
    return (student - teacher).square().flatten(1).mean(dim=1)


def cosine_feature_loss(
    student_features: Float[Tensor, "batch student_channels *student_space"],
    teacher_features: Float[Tensor, "batch teacher_channels *teacher_space"],
    *,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """One minus the cosine between a row's features in the student and in the teacher.

    The size of the features does not matter, only their direction. A row of zeros has none: it
    costs 1 and has no gradient.

    Args:
        student_features: gradients flow through these; each row is flattened.
        teacher_features: of the same shape; treated as constants.
        sample_weights: >= 0, one per row, as in `fedkd.losses.response.soft_target_kl`.

    Returns:
        Loss in [0, 2].

    Raises:
        ValueError: if the shapes differ.

    Source:
        The hidden-layer loss of PyTorch's knowledge distillation tutorial.
        https://docs.pytorch.org/tutorials/beginner/knowledge_distillation_tutorial.html
    """
    return row_mean(cosine_feature_rows(student_features, teacher_features), sample_weights)


def cosine_feature_rows(
    student_features: Float[Tensor, "batch student_channels *student_space"],
    teacher_features: Float[Tensor, "batch teacher_channels *teacher_space"],
) -> Float[Tensor, "batch"]:
    """Return what `cosine_feature_loss` averages, a number for each row."""
    student, teacher = _of_one_shape(student_features, teacher_features, "cosine_feature_loss")
    return 1 - cosine_similarity(student.flatten(1), teacher.flatten(1))


def attention_transfer(
    student_maps: Float[Tensor, "batch student_channels *student_space"],
    teacher_maps: Float[Tensor, "batch teacher_channels *teacher_space"],
    *,
    mode: Literal["code", "paper"] = "code",
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """Make the student look where the teacher looks, whatever the number of channels.

    A row's attention map is the sum over channels of the squared features, as one vector over
    space of length 1. Where the spatial sizes differ, the larger features are first averaged
    down to the smaller height and the smaller width.

    Args:
        student_maps: 4-D features (batch, channels, height, width); gradients flow through these.
        teacher_maps: the same, of any channels, height and width; treated as constants.
        mode: "code" is the authors' released code, the squared difference of the attention
            vectors averaged over their elements; "paper" is equation 2, the distance of the
            vectors. They differ in size by orders of magnitude (published weight of "code":
            1000), and only "code" fades as the vectors come close.
        sample_weights: >= 0, one per row, as in `fedkd.losses.response.soft_target_kl`.

    Returns:
        Loss in [0, 2 / (height * width)] for "code" and in [0, sqrt(2)] for "paper".

    Raises:
        ValueError: if features have no height and width, or ``mode`` is unknown.

    Source:
        Zagoruyko and Komodakis, 2017, Paying More Attention to Attention, equation 2.
        https://arxiv.org/abs/1612.03928
    """
    return row_mean(attention_rows(student_maps, teacher_maps, mode=mode), sample_weights)


def attention_rows(
    student_maps: Float[Tensor, "batch student_channels *student_space"],
    teacher_maps: Float[Tensor, "batch teacher_channels *teacher_space"],
    *,
    mode: Literal["code", "paper"] = "code",
) -> Float[Tensor, "batch"]:
    """Return what `attention_transfer` averages, a number for each row."""
    if mode not in ("code", "paper"):
        raise ValueError(f"unknown mode {mode!r}; known: code, paper")
    for side, maps in (("student", student_maps), ("teacher", teacher_maps)):
        if maps.ndim != 4:
            raise ValueError(
                f"attention_transfer needs features of shape (batch, channels, height, width), "
                f"got {tuple(maps.shape)} from the {side}; name a convolutional layer, or use "
                "hint_loss or cosine_feature_loss"
            )
    student = at_least_float32(student_maps)
    teacher = at_least_float32(teacher_maps.detach()).to(student.dtype)
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    difference = _attention(student, size) - _attention(teacher, size)
    if mode == "code":
        return difference.square().mean(dim=1)
    norms: Tensor = torch.linalg.vector_norm(difference, dim=1)
    return norms


def pool_maps(
    maps: Float[Tensor, "batch channels height width"], size: tuple[int, int]
) -> Float[Tensor, "batch channels pooled_height pooled_width"]:
    """Average maps down to a height and a width: adaptive pooling as two matrix products.

    The library's kernel adds up its gradient on a GPU in whatever order its threads arrive, so
    there a seed would not repeat a run.
    """
    rows = _averages(maps.shape[2], size[0], maps)
    columns = _averages(maps.shape[3], size[1], maps)
    # Under autocast a matrix product runs in half precision.
    with torch.autocast(maps.device.type, enabled=False):
        return rows @ maps @ columns.t()


def _of_one_shape(
    student_features: Float[Tensor, "batch student_channels *student_space"],
    teacher_features: Float[Tensor, "batch teacher_channels *teacher_space"],
    loss: str,
) -> tuple[Tensor, Tensor]:
    if student_features.shape != teacher_features.shape:
        raise ValueError(
            f"{loss} needs features of one shape, got {tuple(student_features.shape)} from the "
            f"student and {tuple(teacher_features.shape)} from the teacher; put a projector on "
            "the student's features"
        )
    student = at_least_float32(student_features)
    return student, at_least_float32(teacher_features.detach()).to(student.dtype)


def _attention(
    maps: Float[Tensor, "batch channels height width"], size: tuple[int, int]
) -> Float[Tensor, "batch pixels"]:
    if maps.shape[2:] != size:
        maps = pool_maps(maps, size)
    return F.normalize(maps.square().mean(dim=1).flatten(1), dim=1)


def _averages(length: int, pooled: int, like: Tensor) -> Float[Tensor, "pooled length"]:
    """Row i averages over [floor(i * length / pooled), ceil((i + 1) * length / pooled))."""
    matrix = torch.zeros(pooled, length, dtype=like.dtype, device=like.device)
    for i in range(pooled):
        start, end = i * length // pooled, -(-(i + 1) * length // pooled)
        matrix[i, start:end] = 1 / (end - start)
    return matrix
