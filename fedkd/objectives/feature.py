"""Terms on what inner layers put out; a student of other widths gets projectors."""

from abc import abstractmethod
from typing import ClassVar, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from fedkd.losses.feature import attention_rows, cosine_feature_rows, hint_rows, pool_maps
from fedkd.losses.reduction import Loss
from fedkd.objectives.taps import LAST_MAP, vector_width, vectors
from fedkd.objectives.terms import LayerPairs, LayerTerm, Parts, Shapes, default_weight, total_of
from fedkd.objectives.view import View
from fedkd.schedules import NonNegativeSchedule


class Projector(nn.Module):
    """A linear layer, or a 1x1 convolution of maps, from the student's width to the teacher's.

    Weights are drawn from torch's global generator.
    """

    def __init__(self, student_width: int, teacher_width: int, *, maps: bool) -> None:
        super().__init__()
        self.layer: nn.Conv2d | nn.Linear
        if maps:
            self.layer = nn.Conv2d(student_width, teacher_width, kernel_size=1)
        else:
            self.layer = nn.Linear(student_width, teacher_width)

    def forward(
        self, features: Float[Tensor, "batch student_width *space"]
    ) -> Float[Tensor, "batch teacher_width *space"]:
        """Project features, in the projector's own precision."""
        projected: Tensor = self.layer(features.to(self.layer.weight.dtype))
        return projected


class ProjectedTerm(LayerTerm):
    """A term on features of one shape, which those of two models need not have.

    Maps of two sizes are averaged down to the smaller height and the smaller width; where only
    one side has maps, they are averaged over space. What then differs in width is projected from
    the student's to the teacher's, by a projector that is trained with the student.
    """

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor) -> Float[Tensor, " rows"]:
        """Return each row's loss of one pair of layers, of one shape."""

    def build_parts(
        self, pairs: LayerPairs, student: Shapes, teacher: Shapes, *, num_classes: int, rows: int
    ) -> dict[str, nn.Module]:
        """Make a projector for every pair of unequal width."""
        parts: dict[str, nn.Module] = {}
        for number, (ours, theirs) in enumerate(pairs):
            own, other = student[ours], teacher[theirs]
            maps = len(own) == len(other) == 3
            widths = (own[0], other[0]) if maps else (vector_width(own), vector_width(other))
            if own != other and widths[0] != widths[1]:
                parts[_projector(number)] = Projector(*widths, maps=maps)
        return parts

    def value(self, view: View, parts: Parts, pairs: LayerPairs) -> Loss:
        """Return each transfer row's sum over the pairs of layers."""
        losses = []
        for number, features in enumerate(self.features(view, pairs)):
            student, teacher = _matched(*features)
            if student.shape != teacher.shape:
                student = parts.call(_projector(number), student)
            losses.append(self.compare(student, teacher))
        return view.of_transfer(total_of(losses))


class Hint(ProjectedTerm):
    """Mean squared difference of features (FitNets)."""

    source: ClassVar[str] = "Romero et al., 2015, equation 3, https://arxiv.org/abs/1412.6550"

    kind: Literal["hint"] = "hint"
    weight: NonNegativeSchedule = default_weight(
        1.0, "ports that train in one stage use 100 with wide networks"
    )

    def compare(self, student: Tensor, teacher: Tensor) -> Float[Tensor, " rows"]:
        """Return the mean over the elements of each row."""
        return hint_rows(student, teacher)


class CosineFeatures(ProjectedTerm):
    """One minus the cosine of a row's features in the student and in the teacher."""

    source: ClassVar[str] = (
        "PyTorch's knowledge distillation tutorial, "
        "https://docs.pytorch.org/tutorials/beginner/knowledge_distillation_tutorial.html"
    )

    kind: Literal["cosine"] = "cosine"
    weight: NonNegativeSchedule = default_weight(0.25, "published beside 0.75 for ce")

    def compare(self, student: Tensor, teacher: Tensor) -> Float[Tensor, " rows"]:
        """Return one minus the cosine of each row."""
        return cosine_feature_rows(student, teacher)


class AttentionTransfer(LayerTerm):
    """Where in the image the feature maps are large (AT); maps may have any width and size."""

    source: ClassVar[str] = (
        "Zagoruyko and Komodakis, 2017, equation 2 and published code, "
        "https://arxiv.org/abs/1612.03928"
    )
    default_layer: ClassVar[str] = LAST_MAP

    kind: Literal["at"] = "at"
    weight: NonNegativeSchedule = default_weight(
        1000.0, "published for mode code; paper wants about 1"
    )
    mode: Literal["code", "paper"] = Field(
        "code",
        description="code: mean squared difference of the attention vectors; paper: their "
        "distance, which is larger by orders of magnitude",
    )

    def build_parts(
        self, pairs: LayerPairs, student: Shapes, teacher: Shapes, *, num_classes: int, rows: int
    ) -> dict[str, nn.Module]:
        """Make nothing, but refuse layers without maps."""
        for pair in pairs:
            for whose, layer, shapes in zip(
                ("student", "teacher"), pair, (student, teacher), strict=True
            ):
                if len(shapes[layer]) != 3:
                    raise ValueError(
                        f"needs layers that put out maps [channels, height, width], but the "
                        f"{whose}'s layer {layer!r} puts out {list(shapes[layer])}; name a "
                        "convolutional layer, or use hint or cosine"
                    )
        return {}

    def value(self, view: View, parts: Parts, pairs: LayerPairs) -> Loss:
        """Return each transfer row's sum over the pairs of layers."""
        rows = [
            attention_rows(student, teacher, mode=self.mode)
            for student, teacher in self.features(view, pairs)
        ]
        return view.of_transfer(total_of(rows))


def _projector(number: int) -> str:
    return f"projector_{number}"


def _matched(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Bring features of two models to shapes that differ in nothing but the width."""
    if student.shape == teacher.shape:
        return student, teacher
    if student.ndim == teacher.ndim == 4:
        size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
        return _averaged_down(student, size), _averaged_down(teacher, size)
    return vectors(student), vectors(teacher)


def _averaged_down(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return maps if maps.shape[2:] == size else pool_maps(maps, size)
