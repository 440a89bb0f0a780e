"""Be your own teacher: a model's last layer teaches classifiers on its inner layers."""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from fedkd.bounds import Weight
from fedkd.distillation.fit.group import (
    Group,
    GroupOutputs,
    GroupStep,
    SoftenedSettings,
    fit_group,
    parts_seed,
)
from fedkd.distillation.fit.method import Method, MethodResult, MethodSettings
from fedkd.distillation.fit.workshop import Workshop
from fedkd.losses.self_distillation import be_your_own_teacher_losses
from fedkd.objectives import PENULTIMATE, layer_shapes, tapped, vectors
from fedkd.objectives.taps import resolved_layer
from fedkd.objectives.terms import LayerName
from fedkd.randomness import seeded_torch
from fedkd.schedules import ConstantSchedule, NonNegativeSchedule, PositiveSchedule
from fedkd.targets import Targets, mean_probability


class BeYourOwnTeacherSettings(SoftenedSettings):
    """Settings under ``method:`` when ``name: be_your_own_teacher``."""

    name: Literal["be_your_own_teacher"] = "be_your_own_teacher"
    layers: tuple[LayerName, ...] = Field(
        (),
        description="layers of the student that get a classifier, shallow ones first; none: the "
        "end of every block of layers but the last one",
    )
    ce_weight: NonNegativeSchedule = Field(
        ConstantSchedule(value=1.0), description="weight of the labels, of every classifier"
    )
    shallow_ce_weight: Weight = Field(
        0.7,
        description="weight of the labels for the shallow classifiers, on top of ce_weight",
    )
    kd_weight: NonNegativeSchedule = Field(
        ConstantSchedule(value=0.3),
        description="weight of what the deepest classifier tells the shallow ones; while this and "
        "feature_weight are 0, only labels teach",
    )
    feature_weight: Weight = Field(
        0.03,
        description="weight of the squared distance of the shallow classifiers' features from the "
        "deepest one's",
    )
    temperature: PositiveSchedule = Field(
        ConstantSchedule(value=3.0),
        description="softens what the deepest classifier says; not squared into the loss",
    )


class ShallowClassifier(nn.Module):
    """A classifier on what an inner layer puts out.

    Maps go through a 3x3 convolution with stride 2 and are averaged over space, anything else goes
    through a linear layer; both end in ReLU and have the width of the deepest embedding, so that
    the two can be compared.
    """

    def __init__(self, shape: Sequence[int], *, width: int, num_classes: int) -> None:
        super().__init__()
        self.bottleneck: nn.Module
        if len(shape) == 3:
            self.bottleneck = nn.Conv2d(shape[0], width, kernel_size=3, stride=2, padding=1)
        else:
            self.bottleneck = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), width))
        self.classifier = nn.Linear(width, num_classes)

    def forward(
        self, inputs: Float[Tensor, "rows *shape"]
    ) -> tuple[Float[Tensor, "rows features"], Float[Tensor, "rows classes"]]:
        """Return the features and the logits."""
        features = vectors(torch.relu(self.bottleneck(inputs)))
        return features, self.classifier(features)


class BranchLogits(nn.Module):
    """A student and classifiers on its inner layers, run in one pass.

    Attributes:
        student: has no classifier inside.
        layers: what the classifiers read, by module path.
        classifiers: from shallow to deep.
    """

    def __init__(self, student: nn.Module, classifiers: Mapping[str, ShallowClassifier]) -> None:
        super().__init__()
        self.student = student
        self.layers = list(classifiers)
        self.classifiers = nn.ModuleList(classifiers.values())

    def everything(
        self, inputs: Float[Tensor, "rows *shape"]
    ) -> tuple[Float[Tensor, "branches rows features"], Float[Tensor, "branches rows classes"]]:
        """Return features and logits of every branch, the student's own last."""
        with tapped(self.student, [*self.layers, PENULTIMATE]) as tap:
            deepest = self.student(inputs)
        branches = [
            classifier(tap[layer])
            for layer, classifier in zip(self.layers, self.classifiers, strict=True)
        ]
        branches.append((vectors(tap[PENULTIMATE]), deepest))
        features, logits = zip(*branches, strict=True)
        return torch.stack(features), torch.stack(logits)

    def forward(self, inputs: Float[Tensor, "rows *shape"]) -> Float[Tensor, "rows classes"]:
        """Return the student's logits."""
        logits: Tensor = self.student(inputs)
        return logits


class Branch(nn.Module):
    """One of the branches as a model of its own."""

    def __init__(self, network: BranchLogits, number: int) -> None:
        super().__init__()
        self.network, self._number = network, number
        self.eval()

    def forward(self, inputs: Float[Tensor, "rows *shape"]) -> Float[Tensor, "rows classes"]:
        """Return this branch's logits."""
        return self.network.everything(inputs)[1][self._number]


class BranchEnsemble(nn.Module):
    """All branches as one model: the mean of their probabilities, from one pass."""

    def __init__(self, network: BranchLogits) -> None:
        super().__init__()
        self.network = network
        self.eval()

    def forward(self, inputs: Float[Tensor, "rows *shape"]) -> Float[Tensor, "rows classes"]:
        """Return logits whose softmax is the branches' mean."""
        _, logits = self.network.everything(inputs)
        return Targets.softened(mean_probability(logits), temperature=1.0).logits()


def inner_layers(model: nn.Module, inputs: Float[Tensor, "rows *shape"]) -> list[str]:
    """Return the ends of a model's blocks, in the order they run, without the last two.

    A block is a layer with a matrix of weights and the layers after it that have none, such as
    normalisation and ReLU; chains of layers (``nn.Sequential``) are looked into. The last block
    makes the logits, and the one before it the embedding, which is the deepest classifier's own;
    it is returned only where the model has no other.

    Args:
        model: any module; it is not changed.
        inputs: a few rows for a dry run.
    """
    units = dict(_units(model, ""))
    ran = [name for name in layer_shapes(model, inputs) if name in units]
    starts = [
        number
        for number, name in enumerate(ran)
        if any(parameter.ndim >= 2 for parameter in units[name].parameters())
    ]
    ends = [ran[start - 1] for start in starts[1:]]
    return ends[:-1] or ends


def _units(module: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    units = []
    for name, child in module.named_children():
        inside = f"{path}{name}"
        if isinstance(child, nn.Sequential):
            units += _units(child, f"{inside}.")
        else:
            units.append((inside, child))
    return units


class _Branches(Group[BeYourOwnTeacherSettings]):
    def __init__(
        self, workshop: Workshop, settings: BeYourOwnTeacherSettings, network: BranchLogits
    ) -> None:
        super().__init__(workshop, settings, [network.student], ["student"])
        self.network = network
        # The best weights of the student are kept with those of the classifiers of that time.
        self.judged = [network]
        self.parts["classifiers"] = network.classifiers

    def exchanges(self, progress: float) -> bool:
        return self.kd_weight(progress) > 0 or self.settings.feature_weight > 0

    def run(self, inputs: Sequence[Tensor]) -> GroupOutputs:
        features, logits = self.network.everything(inputs[0])
        beside = {"features": features.transpose(0, 1), "branches": logits.transpose(0, 1)}
        return GroupOutputs((logits[-1],), beside)

    def losses(self, step: GroupStep) -> dict[str, Tensor]:
        settings, (own,) = self.settings, step.own
        *shallow, _ = step.own_beside["branches"].transpose(0, 1)
        ce = torch.stack([self.label_loss(own._replace(logits=logits)) for logits in shallow]).sum()
        losses = {"ce_shallow": step.values.ce_weight * settings.shallow_ce_weight * ce}
        if step.exchange is None:
            return losses
        branches = step.exchange.beside["branches"].transpose(0, 1)
        losses["kd_shallow"] = be_your_own_teacher_losses(
            branches,
            None,
            kd_weight=step.values.kd_weight,
            temperature=settings.temperature.at(step.progress),
        ).sum()
        if settings.feature_weight > 0:
            losses["features"] = be_your_own_teacher_losses(
                branches,
                None,
                features=step.exchange.beside["features"].transpose(0, 1),
                kd_weight=0.0,
                feature_weight=settings.feature_weight,
            ).sum()
        return losses


class BeYourOwnTeacher(Method[BeYourOwnTeacherSettings]):
    """Classifiers on inner layers learn labels and what the model's own last layer says.

    What they learn reaches the layers below them, which is how the student gains. They are trained
    with the student and are no part of it. The deepest classifier is a constant for them, on the
    rows without labels too.
    """

    Settings: ClassVar[type[MethodSettings]] = BeYourOwnTeacherSettings
    source: ClassVar[str] = (
        "Zhang et al., 2019, Be Your Own Teacher, https://arxiv.org/abs/1905.08094"
    )
    needs_teacher: ClassVar[bool] = False

    def check(self, workshop: Workshop) -> None:
        """Refuse a layer that the student does not have, and a student without inner layers."""
        self._network(workshop)

    def run(self, workshop: Workshop) -> MethodResult:
        """Return the student; every shallow classifier and the mean of all branches beside it."""
        network = self._network(workshop)
        fit_group(_Branches(workshop, self.settings, network))
        others: dict[str, nn.Module] = {
            f"classifier on {layer}": Branch(network, number)
            for number, layer in enumerate(network.layers)
        }
        return MethodResult(network.student, others | {"ensemble": BranchEnsemble(network)})

    def _network(self, workshop: Workshop) -> BranchLogits:
        rows, student = workshop.rows, workshop.new_student()
        shapes = layer_shapes(student, rows.inputs[:2])
        if PENULTIMATE not in shapes:
            raise ValueError(
                "method 'be_your_own_teacher' needs a student whose last layer is linear, got "
                f"student.model {workshop.student.model.label!r}"
            )
        layers = self.settings.layers or inner_layers(student, rows.inputs[:2])
        if not layers:
            raise ValueError(
                "method 'be_your_own_teacher' found no inner layer in student.model "
                f"{workshop.student.model.label!r}: name some in method.layers"
            )
        width = vectors(torch.zeros(1, *shapes[PENULTIMATE])).shape[1]
        classifiers = {}
        with seeded_torch(parts_seed(workshop)):
            for layer in layers:
                path = resolved_layer(layer, shapes, whose="student")
                classifiers[path] = ShallowClassifier(
                    shapes[path], width=width, num_classes=rows.num_classes
                )
        return BranchLogits(student, classifiers).to(rows.device)
