"""Losses that make training images out of a teacher alone, when no real data may be used.

The images, or the generator behind them, are what is trained: here the gradient flows THROUGH the
teacher's outputs into its inputs, so nothing is detached. Freeze the teacher's weights and put it
in evaluation mode. Results are float32 or wider.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkd.losses.response import hard_label_loss
from fedkd.targets import at_least_float32


class DataFreeLosses(NamedTuple):
    """The three parts of the loss of a DAFL generator, before their weights.

    Attributes:
        one_hot: cross-entropy against the teacher's own most likely class; 0 where it is sure.
        activation: minus the mean absolute feature; real images excite a teacher.
        information_entropy: minus the entropy of the batch's mean prediction, in NATURAL
            logarithms (some codes take base 10); -log(classes) where all classes are made alike.
    """

    one_hot: Float[Tensor, ""]
    activation: Float[Tensor, ""]
    information_entropy: Float[Tensor, ""]

    def total(
        self,
        *,
        one_hot_weight: float = 1.0,
        activation_weight: float = 0.1,
        information_entropy_weight: float = 5.0,
    ) -> Float[Tensor, ""]:
        """Return the weighted sum; the defaults are the published weights for MNIST."""
        return (
            one_hot_weight * self.one_hot
            + activation_weight * self.activation
            + information_entropy_weight * self.information_entropy
        )


class InversionLosses(NamedTuple):
    """The parts of the loss of images inverted from a teacher, before their weights.

    Attributes:
        ce: cross-entropy of the teacher's logits against the classes the images shall show.
        batch_norm: sum of the layers' `batch_norm_loss`.
        total_variation: see `total_variation`.
        l2: Euclidean length of the whole batch of images.
    """

    ce: Float[Tensor, ""]
    batch_norm: Float[Tensor, ""]
    total_variation: Float[Tensor, ""]
    l2: Float[Tensor, ""]

    def total(
        self,
        *,
        ce_weight: float = 1.0,
        batch_norm_weight: float = 100.0,
        total_variation_weight: float = 2.5e-5,
        l2_weight: float = 0.0,
    ) -> Float[Tensor, ""]:
        """Return the weighted sum; the defaults are the published weights for CIFAR-10."""
        return (
            ce_weight * self.ce
            + batch_norm_weight * self.batch_norm
            + total_variation_weight * self.total_variation
            + l2_weight * self.l2
        )


def dafl_generator_losses(
    teacher_logits: Float[Tensor, "batch classes"],
    teacher_features: Float[Tensor, "batch width"],
) -> DataFreeLosses:
    """What a generator minimises so that a teacher takes its images for real ones.

    Args:
        teacher_logits: unnormalised scores of generated images; gradients flow through these into
            the images.
        teacher_features: the teacher's embeddings of the same images; gradients flow too.

    Returns:
        The parts by name; ``total()`` adds them with the published weights. All are 0 for an
        empty batch.

    Source:
        Chen et al., 2019, Data-Free Learning of Student Networks, equations 3 to 6.
        https://arxiv.org/abs/1904.01186
    """
    logits, features = at_least_float32(teacher_logits), at_least_float32(teacher_features)
    batch_size = len(logits)
    if batch_size == 0:
        nothing = logits.sum() * 0
        return DataFreeLosses(nothing, features.sum() * 0, nothing)
    log_p = torch.log_softmax(logits, dim=-1)
    # In logarithms: p * log p of a class that underflows has no finite gradient.
    mean_log_p = log_p.logsumexp(dim=0) - math.log(batch_size)
    return DataFreeLosses(
        one_hot=hard_label_loss(logits, logits.detach().argmax(dim=-1)),
        activation=-features.abs().mean(),
        information_entropy=(mean_log_p.exp() * mean_log_p).sum(),
    )


def batch_norm_loss(
    inputs: Float[Tensor, "batch channels *space"],
    running_mean: Float[Tensor, "channels"],
    running_variance: Float[Tensor, "channels"],
) -> Float[Tensor, ""]:
    """How far the statistics of a batch are from those a BatchNorm layer saw in training.

    Computes ``||mean - running_mean|| + ||variance - running_variance||``, lengths over channels;
    the variance of the batch is the biased one.

    Args:
        inputs: what the layer reads, of at least one row; gradients flow through these.
        running_mean: a constant.
        running_variance: a constant.

    Returns:
        Loss in the unit of the features (and of its square), >= 0. Lengths are not squared, so
        the pull does not fade as the statistics come close; it is 0 where they are equal.

    Source:
        Yin et al., 2020, Dreaming to Distill, equation 4. https://arxiv.org/abs/1912.08795
    """
    wide = at_least_float32(inputs)
    values = wide.movedim(1, 0).flatten(1)
    mean, variance = values.mean(dim=1), values.var(dim=1, correction=0)
    mean_gap = mean - running_mean.detach().to(wide.dtype)
    variance_gap = variance - running_variance.detach().to(wide.dtype)
    loss: Tensor = torch.linalg.vector_norm(mean_gap) + torch.linalg.vector_norm(variance_gap)
    return loss


@contextmanager
def batch_norm_losses(model: nn.Module) -> Iterator[Mapping[str, Tensor]]:
    """Record `batch_norm_loss` of every BatchNorm layer in each forward pass inside the block.

    Hooks are removed when the block is left, however it is left; the model is not changed.

    Args:
        model: a teacher in evaluation mode; in training mode its statistics would follow the
            images.

    Yields:
        Losses by module path, empty before the first forward pass; each pass overwrites them.

    Raises:
        ValueError: if no layer keeps running statistics, or the model is in training mode.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if not layers:
        raise ValueError(
            "inversion needs a teacher with BatchNorm layers that keep running statistics; "
            f"{type(model).__name__} has none"
        )
    training = [name for name, module in layers.items() if module.training]
    if training:
        raise ValueError(
            f"inversion needs a teacher in evaluation mode; in training mode: {', '.join(training)}"
        )
    losses: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(partial(_record, losses, name))
        for name, module in layers.items()
    ]
    try:
        yield losses
    finally:
        for handle in handles:
            handle.remove()


def total_variation(images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, ""]:
    """How rough images are: lengths of the differences between neighbouring pixels.

    Neighbours are to the right, below, and on both diagonals; each kind's differences are one long
    vector over the WHOLE batch, as in the published code, so it grows with the root of the batch.

    Args:
        images: gradients flow through these; images of one pixel have no neighbours and cost 0.

    Returns:
        Loss in the pixels' unit, >= 0; 0 with a zero gradient for images of one colour.

    Source:
        Published code of Yin et al., 2020. https://arxiv.org/abs/1912.08795
    """
    wide = at_least_float32(images)
    differences = (
        wide[..., :, :-1] - wide[..., :, 1:],
        wide[..., :-1, :] - wide[..., 1:, :],
        wide[..., 1:, :-1] - wide[..., :-1, 1:],
        wide[..., :-1, :-1] - wide[..., 1:, 1:],
    )
    return torch.stack([torch.linalg.vector_norm(kind) for kind in differences]).sum()


def inversion_losses(
    images: Float[Tensor, "batch channels height width"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
    layer_losses: Mapping[str, Tensor],
) -> InversionLosses:
    """What images minimise to look like a teacher's training images of given classes.

    Args:
        images: what is trained, at least one.
        teacher_logits: the teacher's unnormalised scores of these images; gradients flow through.
        labels: classes that the images shall show, in [0, classes).
        layer_losses: from `batch_norm_losses`, after the forward pass that made the logits.

    Returns:
        The parts by name; ``total()`` adds them with the published weights.

    Raises:
        ValueError: if no layer reported a loss.

    Source:
        Yin et al., 2020, Dreaming to Distill, equations 2 to 5. https://arxiv.org/abs/1912.08795
    """
    if not layer_losses:
        raise ValueError("no BatchNorm loss: run the teacher inside batch_norm_losses first")
    return InversionLosses(
        ce=hard_label_loss(at_least_float32(teacher_logits), labels),
        batch_norm=torch.stack(list(layer_losses.values())).sum(),
        total_variation=total_variation(images),
        l2=torch.linalg.vector_norm(at_least_float32(images)),
    )


def _record(
    losses: dict[str, Tensor], name: str, module: nn.Module, inputs: tuple[Tensor, ...]
) -> None:
    mean, variance = module.get_buffer("running_mean"), module.get_buffer("running_var")
    losses[name] = batch_norm_loss(inputs[0], mean, variance)
