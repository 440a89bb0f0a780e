"""A running mean of a model's weights."""

import torch
from torch import nn


@torch.no_grad()
def update_mean_teacher(
    mean_teacher: nn.Module, model: nn.Module, *, step: int, decay: float = 0.999
) -> None:
    """Move a mean teacher's weights towards those of the model it averages.

    ``mean = d * mean + (1 - d) * model`` with ``d = min(1 - 1 / (step + 1), decay)``: the plain
    average of all steps so far until the exponential one has seen enough. Floating-point buffers,
    such as BatchNorm's statistics, are averaged like weights; counters are copied.

    Args:
        mean_teacher: changed in place; a module of its own, such as ``copy.deepcopy(model)``.
        model: left as it is.
        step: number of updates before this one, >= 0; at 0 the mean teacher becomes a copy.
        decay: largest share of the past, in [0, 1).

    Raises:
        ValueError: if ``step`` or ``decay`` is out of range, the modules differ in the names or
            shapes of their tensors, or they share one.

    Source:
        Tarvainen and Valpola, 2017, Mean teachers. https://arxiv.org/abs/1703.01780; used by Wu
        and Gong, 2021 (PCL). https://arxiv.org/abs/2006.04147
    """
    if step < 0:
        raise ValueError(f"step must be >= 0, got {step}")
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}")
    means, currents = mean_teacher.state_dict(), model.state_dict()
    unlike = list(means.keys() ^ currents.keys())
    unlike += [
        name for name in means.keys() & currents.keys() if means[name].shape != currents[name].shape
    ]
    if unlike:
        raise ValueError(f"mean teacher and model differ in {', '.join(sorted(unlike))}")
    for name, mean in means.items():
        if mean.numel() and mean.data_ptr() == currents[name].data_ptr():
            raise ValueError(f"mean teacher and model share the tensor {name}; average a copy")
    share_of_new = 1 - min(1 - 1 / (step + 1), decay)
    for name, mean in means.items():
        current = currents[name].to(mean.device, mean.dtype)
        if mean.is_floating_point():
            mean.lerp_(current, share_of_new)
        else:
            mean.copy_(current)
