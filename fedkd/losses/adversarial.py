"""Adversarial distillation: a discriminator tells the teacher's logits from the student's.

Each side minimises its own loss on scores, the discriminator's log-odds that a row of logits is
the teacher's. Whoever trains steps them separately: `Discriminator.loss` leaves the student
without a gradient, `Discriminator.fooling_loss` the discriminator. Results are float32 or wider;
an empty batch costs 0.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fedkd.losses.rows import row_mean
from fedkd.targets import at_least_float32


def discriminator_loss(
    student_scores: Float[Tensor, "batch"],
    teacher_scores: Float[Tensor, "batch"],
    *,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """What the discriminator minimises: ``-log D(teacher) - log(1 - D(student))``.

    Args:
        student_scores: log-odds it gives to the student's logits being the teacher's; made from
            DETACHED student logits.
        teacher_scores: the same for the teacher's logits of the same rows.
        sample_weights: >= 0, one per row; the loss is then the weighted mean.

    Returns:
        Loss in nats per row, >= 0; 2 log 2 for one that cannot tell them apart.

    Source:
        Goodfellow et al., 2014, equation 1. https://arxiv.org/abs/1406.2661
        Used on logits by Xu, Hsu, Huang, 2018. https://arxiv.org/abs/1709.00513
    """
    student, teacher = at_least_float32(student_scores), at_least_float32(teacher_scores)
    # softplus(-x) is -log sigmoid(x), finite for every score.
    return row_mean(F.softplus(-teacher) + F.softplus(student), sample_weights)


def generator_loss(
    student_scores: Float[Tensor, "batch"],
    *,
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """What the student adds to its objective: ``-log D(student)``.

    The form that does not saturate: its gradient is largest where the discriminator is surest.

    Args:
        student_scores: log-odds the discriminator gives to the student's logits being the
            teacher's; gradients flow through these into the student.
        sample_weights: >= 0, one per row; the loss is then the weighted mean.

    Returns:
        Loss in nats per row, >= 0. Usual weights lie in [0.01, 0.1], beside the other terms.

    Source:
        Goodfellow et al., 2014, section 3. https://arxiv.org/abs/1406.2661
        Used on logits by Xu, Hsu, Huang, 2018. https://arxiv.org/abs/1709.00513
    """
    return row_mean(F.softplus(-at_least_float32(student_scores)), sample_weights)


def discriminator_accuracy(
    student_scores: Float[Tensor, "batch"], teacher_scores: Float[Tensor, "batch"]
) -> Float[Tensor, ""]:
    """Share of all rows that the discriminator attributes to the right model, in [0, 1].

    A score of exactly 0 is a wrong answer for the teacher's row and a right one for the student's,
    so equal scores on both sides give 1/2. An empty batch gives 0.
    """
    right_teacher = (teacher_scores > 0).float().sum()
    right_student = (student_scores <= 0).float().sum()
    return (right_teacher + right_student) / max(2 * len(student_scores), 1)


class Discriminator(nn.Module):
    """Multilayer perceptron from a row of logits to the log-odds that they are the teacher's.

    Weights are drawn from torch's global generator: build it inside
    ``fedkd.randomness.seeded_torch``.

    Args:
        num_classes: width of the logits, >= 1.
        width: units of each hidden layer, >= 1.
        num_layers: hidden layers, >= 0; with none the score is linear in the logits.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, num_classes: int, *, width: int = 64, num_layers: int = 2) -> None:
        super().__init__()
        for name, value, least in (
            ("num_classes", num_classes, 1),
            ("width", width, 1),
            ("num_layers", num_layers, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        widths = [num_classes] + [width] * num_layers
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def forward(self, logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch"]:
        """Return the log-odds that each row is the teacher's."""
        parameter = next(self.parameters())
        scores: Tensor = self.layers(logits.to(parameter.dtype))
        return scores.squeeze(-1)

    def loss(
        self,
        student_logits: Float[Tensor, "batch classes"],
        teacher_logits: Float[Tensor, "batch classes"],
        *,
        sample_weights: Float[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return `discriminator_loss`; no gradient reaches either model, only this module."""
        return discriminator_loss(
            self(student_logits.detach()),
            self(teacher_logits.detach()),
            sample_weights=sample_weights,
        )

    def fooling_loss(
        self,
        student_logits: Float[Tensor, "batch classes"],
        *,
        sample_weights: Float[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return `generator_loss`; the gradient reaches the student, not this module's weights."""
        constants = {name: weight.detach() for name, weight in self.named_parameters()}
        scores: Tensor = torch.func.functional_call(self, constants, (student_logits,))
        return generator_loss(scores, sample_weights=sample_weights)
