"""DAFL: a generator is trained to make what a teacher takes for its data; a student learns on it.

No row of the run reaches the student or the generator.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fedkd.bounds import Count, LearningRate, Weight, Width
from fedkd.distillation.fit.epochs import EpochRow, FitRecord, epoch_means
from fedkd.distillation.fit.feeding import validated
from fedkd.distillation.fit.method import Method, MethodResult, MethodSettings
from fedkd.distillation.fit.workshop import Workshop
from fedkd.distillation.task.teachers import Teacher
from fedkd.inputs import Kind, Shape
from fedkd.losses.data_free import dafl_generator_losses
from fedkd.models.dropout import connect_dropout, step_keys
from fedkd.objectives import PENULTIMATE, Objective, View, tapped, vectors
from fedkd.objectives.taps import last_linear
from fedkd.randomness import (
    Purpose,
    seeded_everything,
    seeded_torch,
    torch_generator,
    torch_seed_for,
)
from fedkd.training.optimizers import OptimizerSettings
from fedkd.training.steps import RatedOptimizer, Steps

GENERATOR = 10
"""Key of the generator's first weights and of what it starts from in every step."""

SEEN_IMAGES = 1000
"""Images that the notes at the end are about."""


class DAFLSettings(MethodSettings):
    """Settings under ``method:`` when ``name: dafl``.

    The three weights are those of the paper for MNIST. A run has ``training.epochs`` times
    ``steps_per_epoch`` steps; ``training.batch_size`` has no part in it, because the generator
    needs batches that can show all classes.
    """

    name: Literal["dafl"] = "dafl"
    steps_per_epoch: Count = Field(
        50, description="steps between two validations: an epoch, where rows have no part"
    )
    batch_size: Count = Field(128, ge=2, description="images made in a step")
    latent: Width = Field(64, description="numbers that an image is made from")
    width: Width = Field(32, ge=2, description="channels of the generator's first maps")
    generator_lr: LearningRate = Field(0.003, description="learning rate of the generator's Adam")
    one_hot_weight: Weight = Field(1.0, description="weight of the teacher being sure")
    activation_weight: Weight = Field(0.1, description="weight of exciting the teacher's embedding")
    information_entropy_weight: Weight = Field(
        5.0, description="weight of making all classes alike often"
    )


class ImageGenerator(nn.Module):
    """A small convolutional network from noise to images of zero mean and unit variance.

    It starts with maps of a quarter of the image's sides and doubles them twice. The last layer
    normalises each channel over the batch, as rows are normalised, so nothing needs to be known
    about real rows.

    Source:
        Chen et al., 2019 (DAFL), published code, with fewer channels.
        https://arxiv.org/abs/1904.01186
    """

    def __init__(self, shape: Shape, *, latent: int, width: int) -> None:
        super().__init__()
        channels, height, width_px = shape
        self._sides = [(-(-height // part), -(-width_px // part)) for part in (4, 2, 1)]
        self._width = width
        first_height, first_width = self._sides[0]
        half = width // 2
        self.project = nn.Linear(latent, width * first_height * first_width)
        self.first = nn.BatchNorm2d(width)
        self.middle = nn.Sequential(
            nn.Conv2d(width, width, kernel_size=3, padding=1), nn.BatchNorm2d(width)
        )
        self.last = nn.Sequential(
            nn.Conv2d(width, half, kernel_size=3, padding=1), nn.BatchNorm2d(half)
        )
        self.image = nn.Sequential(
            nn.Conv2d(half, channels, kernel_size=3, padding=1),
            nn.Tanh(),
            nn.BatchNorm2d(channels, affine=False),
        )

    def forward(
        self, noise: Float[Tensor, "batch latent"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Return an image for each row of standard normal noise."""
        maps = self.first(self.project(noise).unflatten(1, (self._width, *self._sides[0])))
        maps = self.middle(functional.interpolate(maps, size=self._sides[1]))
        maps = functional.interpolate(functional.leaky_relu(maps, 0.2), size=self._sides[2])
        images: Tensor = self.image(functional.leaky_relu(self.last(maps), 0.2))
        return images


def check_no_rows(workshop: Workshop, *, method: str) -> Teacher:
    """Return the teacher, and refuse settings by which rows would reach the student.

    Raises:
        ValueError: naming the setting and what works.
    """
    if workshop.teacher is None:
        raise ValueError(f"method {method!r} needs a teacher, got none")
    workshop.teacher.check_inputs_suffice(method)
    if workshop.selection.is_on:
        raise ValueError(
            f"targets choose transfer rows, and method {method!r} uses none: remove targets"
        )
    pruning = workshop.student.prune
    if pruning is not None and pruning.when == "end" and pruning.finetune_epochs:
        raise ValueError(
            "student.prune.finetune_epochs trains on the run's rows, and the student of method "
            f"{method!r} must not see them: set it to 0, or student.prune.when=start; got "
            f"{pruning.finetune_epochs}"
        )
    return workshop.teacher


def without_labels(objective: Objective, *, method: str) -> Objective:
    """Return the terms that need a teacher only, for images that nobody labelled.

    The cross-entropy against labels is left out.

    Raises:
        ValueError: if no term is left, or one needs what such images do not have.
    """
    kept = {name: term for name, term in objective.terms.items() if "labels" not in term.needs}
    if not kept:
        raise ValueError(
            f"method {method!r} has no labels and needs a term of objective that learns from the "
            f"teacher, such as kd; got {', '.join(objective.terms)}"
        )
    for name, term in kept.items():
        for need, what in (("transfer_labels", "labels"), ("rows", "ids that come back")):
            if need in term.needs:
                raise ValueError(
                    f"objective.{name} needs rows with {what}, which the images of method "
                    f"{method!r} do not have: remove it, or use a term such as kd"
                )
    return Objective(kept)


class _DataFreeFit:
    """Generator and student in alternation, on one batch of images a step."""

    def __init__(
        self, workshop: Workshop, settings: DAFLSettings, teacher: Teacher, student: nn.Module
    ) -> None:
        self._workshop, self._settings = workshop, settings
        self._teacher, self._student = teacher, student
        rows, seed = workshop.rows, workshop.seed
        with seeded_torch(torch_seed_for(seed, Purpose.DISTILL, 0, GENERATOR, 1)):
            generator = ImageGenerator(
                rows.input_shape, latent=settings.latent, width=settings.width
            )
        self.generator = generator.to(rows.device)
        self._noise = torch_generator(torch_seed_for(seed, Purpose.DISTILL, 0, GENERATOR, 2))
        self._bound = without_labels(workshop.objective, method="dafl").bind(
            student,
            teacher.first,
            torch.zeros(2, *rows.input_shape, device=rows.device),
            num_classes=rows.num_classes,
            rows=0,
            seed=torch_seed_for(seed, Purpose.DISTILL, 0, 1),
        )

    def run(self) -> None:
        workshop, settings, student = self._workshop, self._settings, self._student
        training = workshop.training
        record = FitRecord(training, partial(workshop.observe, "student"))
        workshop.histories["student"] = record.history
        count = training.epochs * settings.steps_per_epoch
        if not count:
            student.eval()
            return
        seed = torch_seed_for(workshop.seed, Purpose.DISTILL, 0, 2)
        of_student, of_generator = (
            RatedOptimizer(chosen.build(parameters), chosen, count)
            for chosen, parameters in (
                (training.optimizer, [*student.parameters(), *self._bound.parts.parameters()]),
                (
                    OptimizerSettings(name="adam", lr=settings.generator_lr),
                    self.generator.parameters(),
                ),
            )
        )
        steps = Steps(
            [of_generator, of_student],
            count,
            epochs=training.epochs,
            dropout=[connect_dropout(student)],
            keys=torch.from_numpy(step_keys(seed, count)),
        )
        with (
            seeded_everything(seed),
            tapped(self._teacher.first, [PENULTIMATE]) as embeddings,
            self._bound.tapping(student, self._teacher.first) as features,
        ):
            student.train()
            self._bound.parts.train()
            for step in steps:
                # The student's images are constants: one pass gives each side its own gradient.
                steps.descend(self._losses(embeddings, features, step.progress))
                if step.epoch is not None:
                    row = self._epoch_row(step.epoch, steps.records.take(), step.progress)
                    row["learning_rate"] = of_student.rate
                    record.close_epoch(row, student)
                    if record.stopped:
                        break
        record.restore_best(student)
        student.eval()

    @torch.no_grad()
    def seen_by_teacher(self) -> dict[str, float]:
        """Return how sure the first teacher is about new images, and how evenly they are classed.

        ``confidence`` is the mean of its largest probability; ``class_entropy`` the entropy of its
        mean prediction over that of all classes alike: 1 where every class is made as often.
        """
        self.generator.eval()
        noise = torch.randn(SEEN_IMAGES, self._settings.latent, generator=self._noise)
        images = self.generator(noise.to(self._workshop.rows.device))
        probabilities = self._teacher.first(images).softmax(-1)
        entropy = torch.special.entr(probabilities.mean(0)).sum()
        return {
            "confidence": float(probabilities.max(-1).values.mean()),
            "class_entropy": float(entropy) / math.log(probabilities.shape[1]),
        }

    def _losses(
        self,
        embeddings: Mapping[str, Tensor],
        features: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
        progress: float,
    ) -> dict[str, Float[Tensor, ""]]:
        """Make a batch of images; return what the generator and what the student minimise."""
        settings, rows = self._settings, self._workshop.rows
        noise = torch.randn(settings.batch_size, settings.latent, generator=self._noise)
        images = self.generator(noise.to(rows.device))
        each = torch.stack([member(images) for member in self._teacher.members])
        made = dafl_generator_losses(each[0], vectors(embeddings[PENULTIMATE]))
        temperature = self._bound.target_temperature(progress)
        view = View(
            logits=self._student(images.detach()),
            targets=self._teacher.combine(each.detach(), temperature=temperature),
            features=features[0],
            teacher_features={name: tensor.detach() for name, tensor in features[1].items()},
            progress=progress,
        )
        return {
            **self._bound.losses(view),
            "one_hot": settings.one_hot_weight * made.one_hot,
            "activation": settings.activation_weight * made.activation,
            "information_entropy": settings.information_entropy_weight * made.information_entropy,
        }

    def _epoch_row(self, epoch: int, recorded: Mapping[str, Tensor], progress: float) -> EpochRow:
        row: EpochRow = {"epoch": epoch, **epoch_means(recorded)}
        row |= validated(self._student, self._workshop.rows)
        self._student.train()
        return row | self._bound.in_force(progress)


class DataFree(Method[DAFLSettings]):
    """A generator makes images that the teacher is sure about; the student learns on them alone.

    In every step the generator follows the frozen teacher's word on a batch of its images, and the
    student minimises on the same batch the terms of the objective that need no labels. Rows of the
    run serve for validation and the test only. Of several teachers the images are the first's,
    and all of them teach.
    """

    takes: ClassVar[tuple[Kind, ...]] = ("pictures",)
    Settings: ClassVar[type[MethodSettings]] = DAFLSettings
    source: ClassVar[str] = (
        "Chen et al., 2019, Data-Free Learning of Student Networks, "
        "https://arxiv.org/abs/1904.01186"
    )

    def check(self, workshop: Workshop) -> None:
        """Refuse settings that have no part here, and an objective that needs labels."""
        teacher = check_no_rows(workshop, method="dafl")
        augmentation = workshop.training.augmentation
        if augmentation != type(augmentation)():
            raise ValueError(
                "training.augmentation changes rows, and method 'dafl' uses none: remove it"
            )
        last_linear(teacher.first)
        without_labels(workshop.objective, method="dafl")

    def run(self, workshop: Workshop) -> MethodResult:
        """Return the distilled student; ``notes`` say what the teacher sees in new images."""
        self.check(workshop)
        teacher, student = check_no_rows(workshop, method="dafl"), workshop.new_student()
        fit = _DataFreeFit(workshop, self.settings, teacher, student)
        fit.run()
        return MethodResult(student, notes=fit.seen_by_teacher())
