"""Terms on relations among the rows of a step; models of any two widths can be compared."""

from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from fedkd.bounds import Count, ShareBelowOne, Temperature, Width
from fedkd.losses.reduction import Loss, WholeStep
from fedkd.losses.relation import (
    ContrastiveMemory,
    pkt_loss,
    rkd_angle_loss,
    rkd_distance_loss,
    similarity_preserving_loss,
)
from fedkd.objectives.taps import vector_width, vectors
from fedkd.objectives.terms import (
    LayerPairs,
    LayerTerm,
    Need,
    Parts,
    Shapes,
    default_weight,
    total_of,
)
from fedkd.objectives.view import View
from fedkd.randomness import Purpose, torch_generator, torch_seed_for
from fedkd.schedules import NonNegativeSchedule


class RelationTerm(LayerTerm):
    """A term that compares the rows of a step with each other.

    All of them take part and count alike: weights of single rows say nothing about pairs.
    """

    weighs_rows: ClassVar[bool] = False

    on: Literal["layers", "logits"] = Field(
        "layers",
        description="what a row is: its features, or its logits, which need no layers of the "
        "teacher and so work where only predictions travel",
    )

    @model_validator(mode="after")
    def _layers_are_compared(self) -> "RelationTerm":
        if self.on == "logits" and self.layers is not None:
            raise ValueError(f"layers has no say with on: logits, got {self.layers!r}")
        return self

    @property
    def needs(self) -> tuple[Need, ...]:
        """What it cannot do without: the teacher's logits, or features of both models."""
        return ("teacher",) if self.on == "logits" else ("features",)

    def layer_pairs(self) -> LayerPairs:
        """Return the layers that are compared; none where logits are."""
        return () if self.on == "logits" else super().layer_pairs()

    def embeddings(
        self, view: View, pairs: LayerPairs
    ) -> list[tuple[Float[Tensor, "rows _"], Float[Tensor, "rows _"]]]:
        """Return vectors of the rows: the student's and the teacher's, of each pair of layers."""
        if self.on == "logits":
            return [view.pair()]
        return [
            (self.flattened(student), self.flattened(teacher))
            for student, teacher in self.features(view, pairs)
        ]

    def flattened(self, features: Tensor) -> Float[Tensor, "rows _"]:
        """Return one vector a row: maps are averaged over space."""
        return vectors(features)


class RkdDistance(RelationTerm):
    """Rows as far from each other as in the teacher's space (RKD)."""

    source: ClassVar[str] = (
        "Park, Kim, Lu, Cho, 2019, equations 4 to 6, https://arxiv.org/abs/1904.05068"
    )

    kind: Literal["rkd_distance"] = "rkd_distance"
    weight: NonNegativeSchedule = default_weight(25.0)

    def value(self, view: View, parts: Parts, pairs: LayerPairs) -> Loss:
        """Return the sum over the pairs of layers, each a mean over pairs of rows."""
        return WholeStep(
            total_of([rkd_distance_loss(*pair) for pair in self.embeddings(view, pairs)])
        )


class RkdAngle(RelationTerm):
    """Three rows form the angles that they form in the teacher's space (RKD)."""

    source: ClassVar[str] = (
        "Park, Kim, Lu, Cho, 2019, equations 7 to 9, https://arxiv.org/abs/1904.05068"
    )

    kind: Literal["rkd_angle"] = "rkd_angle"
    weight: NonNegativeSchedule = default_weight(50.0)

    def value(self, view: View, parts: Parts, pairs: LayerPairs) -> Loss:
        """Return the sum over the pairs of layers, each a mean over triplets of rows."""
        return WholeStep(total_of([rkd_angle_loss(*pair) for pair in self.embeddings(view, pairs)]))


class SimilarityPreserving(RelationTerm):
    """Rows that excite the teacher alike excite the student alike (SP)."""

    source: ClassVar[str] = (
        "Tung and Mori, 2019, equations 3 and 4, https://arxiv.org/abs/1907.09682"
    )

    kind: Literal["sp"] = "sp"
    weight: NonNegativeSchedule = default_weight(
        3000.0, "published for features; on logits 100 is plenty"
    )

    def value(self, view: View, parts: Parts, pairs: LayerPairs) -> Loss:
        """Return the sum over the pairs of layers, each a mean over pairs of rows."""
        losses = [similarity_preserving_loss(*pair) for pair in self.embeddings(view, pairs)]
        return WholeStep(total_of(losses))

    def flattened(self, features: Tensor) -> Float[Tensor, "rows _"]:
        """Return one vector a row: maps as they are, as published."""
        return features.flatten(1)


class PKT(RelationTerm):
    """Each row finds the others as likely as in the teacher's space."""

    source: ClassVar[str] = (
        "Passalis and Tefas, 2018, equations 3 to 6, https://arxiv.org/abs/1803.10837"
    )

    kind: Literal["pkt"] = "pkt"
    weight: NonNegativeSchedule = default_weight(
        30000.0,
        "published for features, large because of the mean over rows^2; on logits 1000 is plenty",
    )

    def value(self, view: View, parts: Parts, pairs: LayerPairs) -> Loss:
        """Return the sum over the pairs of layers, each a mean over pairs of rows."""
        return WholeStep(total_of([pkt_loss(*pair) for pair in self.embeddings(view, pairs)]))


class RowContrast(RelationTerm):
    """Tell a row's own embedding from those of other rows, in banks by row id (CRD)."""

    source: ClassVar[str] = (
        "Tian, Krishnan, Isola, 2020, section 3, https://arxiv.org/abs/1910.10699"
    )
    stateful: ClassVar[bool] = True

    kind: Literal["crd"] = "crd"
    weight: NonNegativeSchedule = default_weight(0.8)
    dim: Width = Field(128, description="width of the embeddings that are compared")
    num_negatives: Count = Field(
        16384, description="rows to tell each row from; never more than there are others"
    )
    temperature: Temperature = Field(0.07, description="divisor of the inner products")
    momentum: ShareBelowOne = Field(0.5, description="share of a row's old embedding kept")

    @property
    def needs(self) -> tuple[Need, ...]:
        """What it cannot do without; ids of the transfer rows besides."""
        return (*super().needs, "rows")

    def build_parts(
        self, pairs: LayerPairs, student: Shapes, teacher: Shapes, *, num_classes: int, rows: int
    ) -> dict[str, nn.Module]:
        """Make projections and banks for every pair of layers."""
        widths = [
            (vector_width(student[ours]), vector_width(teacher[theirs])) for ours, theirs in pairs
        ]
        if self.on == "logits":
            widths = [(num_classes, num_classes)]
        return {
            _memory(number): RowMemory(
                ContrastiveMemory(
                    *own,
                    rows,
                    dim=self.dim,
                    num_negatives=self.num_negatives,
                    temperature=self.temperature,
                    momentum=self.momentum,
                )
            )
            for number, own in enumerate(widths)
        }

    def value(self, view: View, parts: Parts, pairs: LayerPairs) -> Loss:
        """Return the sum over the pairs of layers, each a mean over the transfer rows, in nats."""
        if view.rows is None:
            raise ValueError("this step has no ids of the transfer rows")
        losses = [
            parts.call(_memory(number), student, teacher, view.rows)
            for number, (student, teacher) in enumerate(self.embeddings(view, pairs))
        ]
        return WholeStep(total_of(losses))


class RowMemory(nn.Module):
    """Banks of embeddings that draw what to contrast with from a stream of their own.

    The stream is part of the state, so that whoever puts the state back gets the same draws.

    Args:
        memory: projections and banks.
    """

    seed: Tensor
    steps: Tensor

    def __init__(self, memory: ContrastiveMemory) -> None:
        super().__init__()
        self.memory = memory
        self.register_buffer("seed", torch.randint(2**62, ()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        student_embedding: Float[Tensor, "rows student_width"],
        teacher_embedding: Float[Tensor, "rows teacher_width"],
        rows: Int[Tensor, " rows"],
    ) -> Float[Tensor, ""]:
        """Return the loss of a step; in training mode, remember its rows afterwards."""
        seed = torch_seed_for(int(self.seed), Purpose.DISTILL, int(self.steps))
        generator = torch_generator(seed, rows.device)
        if self.training:
            self.steps += 1
        loss: Tensor = self.memory(student_embedding, teacher_embedding, rows, generator=generator)
        return loss


def _memory(number: int) -> str:
    return f"memory_{number}"
