"""A term in which a discriminator tells the teacher's logits from the student's."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from fedkd.bounds import LearningRate, Whole, Width
from fedkd.losses.adversarial import (
    Discriminator,
    discriminator_accuracy,
    discriminator_loss,
    generator_loss,
)
from fedkd.losses.reduction import Loss, WholeStep
from fedkd.objectives.terms import LayerPairs, Parts, Shapes, Term, default_weight
from fedkd.objectives.view import View
from fedkd.schedules import NonNegativeSchedule

FIRST_DECAY, SECOND_DECAY, SMALL = 0.9, 0.999, 1e-8
"""Adam's usual decay rates of its two moments, and what keeps it from dividing by 0."""


class Adversarial(Term):
    """Logits that a discriminator, trained alongside, takes for the teacher's."""

    source: ClassVar[str] = (
        "Goodfellow et al., 2014, https://arxiv.org/abs/1406.2661; on logits: Xu, Hsu, Huang, "
        "2018, https://arxiv.org/abs/1709.00513"
    )
    stateful: ClassVar[bool] = True

    kind: Literal["adversarial"] = "adversarial"
    weight: NonNegativeSchedule = default_weight(0.05)
    width: Width = Field(64, description="units of each hidden layer of the discriminator")
    num_layers: Whole = Field(2, ge=0, le=100, description="hidden layers of the discriminator")
    discriminator_lr: LearningRate = Field(
        1e-3, description="step size of the discriminator's Adam"
    )

    def build_parts(
        self, pairs: LayerPairs, student: Shapes, teacher: Shapes, *, num_classes: int, rows: int
    ) -> dict[str, nn.Module]:
        """Make the discriminator."""
        discriminator = Discriminator(num_classes, width=self.width, num_layers=self.num_layers)
        return {"adversary": Adversary(discriminator, lr=self.discriminator_lr)}

    def value(self, view: View, parts: Parts, pairs: LayerPairs) -> Loss:
        """Train the discriminator on the step, then return how well the student is found out."""
        student, teacher = view.pair()
        return WholeStep(parts.call("adversary", student, teacher, view.weights))

    def notes(self, view: View, parts: Parts) -> dict[str, Float[Tensor, ""]]:
        """Return the discriminator's accuracy: 0.5 where it cannot tell the models apart."""
        adversary = None if parts.modules is None else parts.modules["adversary"]
        if not isinstance(adversary, Adversary):
            return {}
        return {"accuracy": adversary.accuracy(*view.pair())}


class Adversary(nn.Module):
    """A discriminator with an optimizer of its own.

    Its weights and the optimizer's moments are buffers: they are kept and put back with the
    module's state, but whoever optimises ``parameters()`` does not get hold of them.

    Args:
        discriminator: its weights are the first ones.
        lr: step size of Adam, > 0.
    """

    weights: Tensor
    first_moment: Tensor
    second_moment: Tensor
    steps: Tensor

    def __init__(self, discriminator: Discriminator, *, lr: float) -> None:
        super().__init__()
        # Within a tuple it is no submodule, whose parameters would be this module's.
        self._skeleton = (discriminator,)
        self._shapes = {name: p.shape for name, p in discriminator.named_parameters()}
        self._lr = lr
        weights = nn.utils.parameters_to_vector(discriminator.parameters()).detach()
        self.register_buffer("weights", weights)
        self.register_buffer("first_moment", torch.zeros_like(weights))
        self.register_buffer("second_moment", torch.zeros_like(weights))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        student_logits: Float[Tensor, "rows classes"],
        teacher_logits: Float[Tensor, "rows classes"],
        sample_weights: Float[Tensor, " rows"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return `generator_loss`; in training mode, take a step of the discriminator before.

        The gradient of what is returned reaches the student alone, that of the step neither model.
        """
        if self.training:
            self._learn(student_logits.detach(), teacher_logits.detach(), sample_weights)
        # The next step overwrites the weights in place, so the graph gets a copy.
        scores = self._scores(self.weights.clone(), student_logits)
        return generator_loss(scores, sample_weights=sample_weights)

    def accuracy(
        self,
        student_logits: Float[Tensor, "rows classes"],
        teacher_logits: Float[Tensor, "rows classes"],
    ) -> Float[Tensor, ""]:
        """Return the share of rows, of both models, that the discriminator gets right."""
        return discriminator_accuracy(
            self._scores(self.weights, student_logits), self._scores(self.weights, teacher_logits)
        )

    def _learn(
        self,
        student_logits: Float[Tensor, "rows classes"],
        teacher_logits: Float[Tensor, "rows classes"],
        sample_weights: Float[Tensor, " rows"] | None,
    ) -> None:
        with torch.enable_grad():
            weights = self.weights.clone().requires_grad_()
            loss = discriminator_loss(
                self._scores(weights, student_logits),
                self._scores(weights, teacher_logits),
                sample_weights=sample_weights,
            )
            (gradient,) = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            self.steps += 1
            self.first_moment.lerp_(gradient, 1 - FIRST_DECAY)
            self.second_moment.lerp_(gradient.square(), 1 - SECOND_DECAY)
            first = self.first_moment / (1 - FIRST_DECAY**self.steps)
            second = self.second_moment / (1 - SECOND_DECAY**self.steps)
            self.weights -= self._lr * first / (second.sqrt() + SMALL)

    def _scores(
        self, weights: Float[Tensor, " all"], logits: Float[Tensor, "rows classes"]
    ) -> Float[Tensor, " rows"]:
        scores: Tensor = torch.func.functional_call(
            self._skeleton[0], dict(self._named(weights)), (logits,)
        )
        return scores

    def _named(self, weights: Float[Tensor, " all"]) -> Mapping[str, Tensor]:
        pieces = weights.split([shape.numel() for shape in self._shapes.values()])
        return {
            name: piece.view(shape)
            for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)
        }
