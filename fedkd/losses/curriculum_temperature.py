"""A temperature that is learned against the student, so that the lesson gets harder with time."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedkd.losses.rows import row_mean
from fedkd.targets import at_least_float32

LOWEST, SPAN = 1.0, 20.0
"""The temperature lies between LOWEST and LOWEST + SPAN, as in the published code."""


class LearnedTemperature(nn.Module):
    """One temperature for all rows, ``1 + 20 * sigmoid(theta)``, with a reversed gradient.

    The student descends on the loss while theta ascends on it. The reversal grows from 0 to 1
    along half a cosine over the first ``until`` of the training.

    Source:
        Li et al., 2023, Curriculum Temperature for Knowledge Distillation (CTKD), section 3.
        https://arxiv.org/abs/2211.16231. Theta starts at 1 as in the published code, which is a
        temperature of 15.62.
    """

    def __init__(self, *, until: float = 0.04) -> None:
        super().__init__()
        if not 0 < until <= 1:
            raise ValueError(f"until must be in (0, 1], got {until}")
        self.until = until
        self.theta = nn.Parameter(torch.ones(()))

    def forward(self, progress: float) -> Float[Tensor, ""]:
        """Return the temperature in force; its gradient with respect to theta is reversed.

        Args:
            progress: how much of the training is done, in [0, 1].
        """
        share = min(1.0, progress / self.until)
        reversal = (1 - math.cos(math.pi * share)) / 2
        # The value of theta with the gradient of -reversal * theta.
        theta = -reversal * self.theta + ((1 + reversal) * self.theta).detach()
        return LOWEST + SPAN * torch.sigmoid(theta)


def learned_temperature_kl(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    temperature: Float[Tensor, ""],
    *,
    scale_by_t2: bool = True,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """``T^2 * KL(teacher || student)`` where the temperature gets a gradient as well.

    At a constant temperature this is `fedkd.losses.response.soft_target_loss`. The teacher's
    logits are constants; its softened distribution still depends on the temperature.

    Args:
        student_logits: unnormalised scores; gradients flow through these.
        teacher_logits: unnormalised scores; treated as constants.
        temperature: softening divisor, > 0; gradients flow through it.
        scale_by_t2: False leaves the factor ``temperature**2`` out.
        sample_weights: >= 0, one per row, as in `fedkd.losses.response.soft_target_kl`.

    Returns:
        Loss in nats per example, >= 0.

    Source:
        Li et al., 2023, equation 4. https://arxiv.org/abs/2211.16231
    """
    loss = row_mean(
        learned_temperature_rows(student_logits, teacher_logits, temperature), sample_weights
    )
    return loss * temperature**2 if scale_by_t2 else loss


def learned_temperature_rows(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    temperature: Float[Tensor, ""],
) -> Float[Tensor, "batch"]:
    """Return what `learned_temperature_kl` averages, without its factor ``temperature**2``."""
    student_log_p = torch.log_softmax(at_least_float32(student_logits) / temperature, dim=-1)
    constants = at_least_float32(teacher_logits.detach()).to(student_log_p.dtype)
    teacher_log_p = torch.log_softmax(constants / temperature, dim=-1)
    return (teacher_log_p.exp() * (teacher_log_p - student_log_p)).sum(dim=-1)
