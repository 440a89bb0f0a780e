"""DeepInversion: images are optimised until a teacher recognises its training data in them.

No row of the run reaches the student or the images.
"""

from dataclasses import replace
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from fedkd.bounds import Count, LearningRate, Rows, Weight, Whole
from fedkd.distillation.fit.epochs import EpochRow, FitHistory
from fedkd.distillation.fit.method import Method, MethodResult, MethodSettings
from fedkd.distillation.fit.workshop import Workshop
from fedkd.distillation.methods.dafl import check_no_rows
from fedkd.inputs import Kind, Shape
from fedkd.losses.data_free import batch_norm_losses, inversion_losses
from fedkd.models import uses_batch_norm
from fedkd.randomness import Purpose, torch_generator, torch_seed_for
from fedkd.training.optimizers import OptimizerSettings
from fedkd.training.steps import RatedOptimizer, Steps

INVERSION = 11
"""Key of the noise, the classes and the jitter of the images."""


class DeepInversionSettings(MethodSettings):
    """Settings under ``method:`` when ``name: deep_inversion``.

    Weights and learning rate are those of the published code for CIFAR-10, which takes 2000
    iterations and a jitter of 2 on images of 32 x 32.
    """

    name: Literal["deep_inversion"] = "deep_inversion"
    images: Rows = Field(1024, ge=2, description="images made, of all classes alike often")
    batch_size: Count = Field(256, ge=2, description="images optimised together")
    iterations: Count = Field(250, description="steps of the images' optimizer")
    lr: LearningRate = Field(0.1, description="learning rate of its Adam")
    jitter: Whole = Field(
        1,
        ge=0,
        le=1024,
        description="pixels by which a batch is rolled at most in each direction, anew in "
        "every step",
    )
    ce_weight: Weight = Field(1.0, description="weight of showing the class that was asked for")
    batch_norm_weight: Weight = Field(100.0, description="weight of the BatchNorm statistics")
    total_variation_weight: Weight = Field(2.5e-5, description="weight of being smooth")
    l2_weight: Weight = Field(0.0, description="weight of the images' length")


class Inverted(NamedTuple):
    """Images made from a teacher.

    Attributes:
        images: a copy of those with the smallest loss on the way.
        loss: theirs, weighted.
        parts: the same by part, not weighted.
    """

    images: Float[Tensor, "batch channels height width"]
    loss: float
    parts: dict[str, float]


def invert(
    teacher: nn.Module,
    labels: Int[Tensor, " batch"],
    settings: DeepInversionSettings,
    *,
    shape: Shape,
    generator: torch.Generator,
) -> Inverted:
    """Optimise noise until a teacher finds given classes in it and its usual statistics.

    The images are in the unit of the rows that the teacher was trained on.

    Args:
        teacher: frozen, in evaluation mode, with BatchNorm layers; no hook stays on it.
        labels: the class that each image shall show.
        settings: of the optimisation.
        shape: of an image.
        generator: draws the first noise, and how far each step rolls the images.

    Raises:
        ValueError: if the teacher has no BatchNorm statistics.

    Source:
        Yin et al., 2020, Dreaming to Distill, section 3.2. https://arxiv.org/abs/1912.08795
    """
    start = torch.randn(len(labels), *shape, generator=generator)
    images = start.to(labels.device).requires_grad_()
    adam = OptimizerSettings(name="adam", lr=settings.lr)
    steps = Steps(
        [RatedOptimizer(adam.build([images]), adam, settings.iterations)], settings.iterations
    )
    rolls = torch.randint(
        -settings.jitter, settings.jitter + 1, (settings.iterations, 2), generator=generator
    ).tolist()
    best: Inverted | None = None
    with batch_norm_losses(teacher) as layer_losses:
        for step in steps:
            rolled = images.roll(rolls[step.number], dims=(2, 3))
            parts = inversion_losses(rolled, teacher(rolled), labels, layer_losses)
            loss = parts.total(
                ce_weight=settings.ce_weight,
                batch_norm_weight=settings.batch_norm_weight,
                total_variation_weight=settings.total_variation_weight,
                l2_weight=settings.l2_weight,
            )
            value = float(loss.detach())
            if best is None or value < best.loss:
                # A copy: the optimizer goes on changing the images in place.
                best = Inverted(
                    images.detach().clone(),
                    value,
                    {name: float(part.detach()) for name, part in parts._asdict().items()},
                )
            steps.descend({"images": loss})
    assert best is not None  # noqa: S101
    return best


class DeepInversion(Method[DeepInversionSettings]):
    """Images are made from the teacher, class by class; the student learns on them alone.

    They start as noise and are changed until the teacher finds the classes asked for in them and
    its BatchNorm layers see the statistics that they remember from training. Then the student
    minimises the objective on them; their labels are the classes asked for. Rows of the run serve
    for validation and the test only. Of several teachers the images are the first's, and all teach.
    """

    takes: ClassVar[tuple[Kind, ...]] = ("pictures",)
    Settings: ClassVar[type[MethodSettings]] = DeepInversionSettings
    source: ClassVar[str] = (
        "Yin et al., 2020, Dreaming to Distill, https://arxiv.org/abs/1912.08795"
    )

    def check(self, workshop: Workshop) -> None:
        """Refuse a teacher without BatchNorm, and settings by which rows would be used."""
        teacher = check_no_rows(workshop, method="deep_inversion")
        if not uses_batch_norm(teacher.first):
            raise ValueError(
                "method 'deep_inversion' needs a teacher with BatchNorm layers, whose statistics "
                "the images follow; the first of teacher.models has none: use for example "
                "teacher.models=[{name: cnn, options: {norm: batch}}], or method=dafl"
            )

    def run(self, workshop: Workshop) -> MethodResult:
        """Return the distilled student.

        ``notes`` have the number of images and ``recognised``, the share of them in which the
        first teacher finds the class asked for.
        """
        self.check(workshop)
        rows, settings = workshop.rows, self.settings
        teacher = check_no_rows(workshop, method="deep_inversion")
        generator = torch_generator(torch_seed_for(workshop.seed, Purpose.DISTILL, 0, INVERSION))
        classes = torch.arange(settings.images) % rows.num_classes
        labels = classes[torch.randperm(settings.images, generator=generator)].to(rows.device)
        name, made = "inverted images", []
        history = workshop.histories[name] = FitHistory()
        batches = labels.split(settings.batch_size)
        for number, batch in enumerate(batches, start=1):
            inverted = invert(
                teacher.first, batch, settings, shape=rows.input_shape, generator=generator
            )
            made.append(inverted.images)
            row: EpochRow = {"epoch": number}
            row |= {f"loss/{part}": value for part, value in inverted.parts.items()}
            history.epochs.append(row)
            workshop.observe(name, {"epochs": len(batches), **row})
        images = torch.cat(made)
        found = teacher.member_logits(images)[0].argmax(-1)
        student = workshop.new_student()
        workshop.fit(
            student,
            name="student",
            teacher=teacher,
            rows=replace(rows, inputs=images, labels=labels, labelled=len(images)),
        )
        return MethodResult(
            student,
            notes={
                "images": len(images),
                "recognised": float((found == labels).double().mean()),
            },
        )
