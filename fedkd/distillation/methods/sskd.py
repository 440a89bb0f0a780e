"""Self-supervised distillation: imitate how a teacher relates turned images to the others."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from fedkd.bounds import CountOrZero, Share, Temperature, Weight
from fedkd.distillation.fit.epochs import EpochRow, FitRecord, epoch_means
from fedkd.distillation.fit.feeding import transfer_batches
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
from fedkd.distillation.task.predicting import CHUNK_ROWS
from fedkd.distillation.task.teachers import Teacher
from fedkd.inputs import Kind
from fedkd.losses.self_distillation import (
    contrastive_view_loss,
    rotated_views,
    self_supervised_losses,
)
from fedkd.objectives import PENULTIMATE, layer_shapes, tapped, vectors
from fedkd.randomness import Purpose, seeded_torch, torch_seed_for
from fedkd.schedules import ConstantSchedule, NonNegativeSchedule, PositiveSchedule
from fedkd.training.steps import RatedOptimizer, Steps

TEACHER_HEAD = 9
"""Key of the batches and first weights of the teacher's head."""


class SSKDSettings(SoftenedSettings):
    """Settings under ``method:`` when ``name: sskd``; the published weights are the defaults."""

    name: Literal["sskd"] = "sskd"
    kd_weight: NonNegativeSchedule = Field(
        ConstantSchedule(value=0.9), description="weight of the teacher's word on upright images"
    )
    ss_weight: Weight = Field(
        10.0,
        description="weight of the teacher's similarities of turned to upright images",
    )
    tf_weight: Weight = Field(2.7, description="weight of its word on turned images")
    temperature: PositiveSchedule = Field(
        ConstantSchedule(value=4.0), description="softens the teacher's word on upright images"
    )
    ss_temperature: Temperature = Field(0.5, description="divides the similarities")
    tf_temperature: Temperature = Field(4.0, description="softens its word on turned images")
    ss_wrong_share: Share = Field(
        0.75,
        description="share kept of the turned images that the teacher relates wrongly, the least "
        "wrong first",
    )
    tf_wrong_share: Share = Field(1.0, description="share kept of those whose class it gets wrong")
    head_epochs: CountOrZero = Field(
        30, description="passes over the rows in which the teacher's head is trained"
    )


class SelfSupervisionHead(nn.Sequential):
    """Two linear layers of the embedding's width, with ReLU between them."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


def embedding_width(model: nn.Module, inputs: Float[Tensor, "rows *shape"], *, whose: str) -> int:
    """Return how many numbers the last linear layer of a model reads.

    Raises:
        ValueError: if it has no linear layer; ``whose`` names it.
    """
    shapes = layer_shapes(model, inputs)
    if PENULTIMATE not in shapes:
        raise ValueError(f"method 'sskd' needs a {whose} whose last layer is linear")
    return vectors(torch.zeros(1, *shapes[PENULTIMATE])).shape[1]


@torch.no_grad()
def view_embeddings(
    model: nn.Module, inputs: Float[Tensor, "rows channels height width"]
) -> Float[Tensor, "views rows features"]:
    """Return what a model in evaluation mode makes of the four turns of every row."""
    chunks = []
    with tapped(model, [PENULTIMATE]) as tap:
        for chunk in inputs.split(CHUNK_ROWS):
            views = []
            for turned in rotated_views(chunk):
                model(turned)
                views.append(vectors(tap[PENULTIMATE]))
            chunks.append(torch.stack(views))
    return torch.cat(chunks, dim=1)


def train_head(workshop: Workshop, teacher: Teacher, epochs: int) -> SelfSupervisionHead:
    """Train a self-supervision head on the embeddings of a teacher, which does not change.

    A turned image is to be nearest to its own upright one. No labels are needed, so all transfer
    rows take part, as they are, without augmentation.

    Args:
        workshop: rows, batch size and optimizer of the students; the history is kept under
            ``teacher's head``.
        teacher: of several models the first has the embeddings.
        epochs: passes over the transfer rows.

    Returns:
        The head in evaluation mode, frozen.
    """
    name, key = "teacher's head", (0, TEACHER_HEAD)
    embeddings = view_embeddings(teacher.first, workshop.rows.inputs)
    with seeded_torch(torch_seed_for(workshop.seed, Purpose.DISTILL, *key, 1)):
        head = SelfSupervisionHead(embeddings.shape[-1]).to(embeddings.device)
    training = workshop.training.model_copy(update={"epochs": epochs})
    batches = transfer_batches(workshop.rows, training, seed=workshop.seed, key=key)
    record = FitRecord(
        training.model_copy(update={"early_stopping": None}), partial(workshop.observe, name)
    )
    workshop.histories[name] = record.history
    optimizer = RatedOptimizer(
        training.optimizer.build(head.parameters()), training.optimizer, len(batches)
    )
    steps = Steps([optimizer], len(batches), epochs=epochs)
    for step in steps:
        views = embeddings[:, batches[step.number]]
        steps.descend({"contrastive": contrastive_view_loss(head(views))})
        if step.epoch is not None:
            row: EpochRow = {"epoch": step.epoch, **epoch_means(steps.records.take())}
            row["learning_rate"] = optimizer.rate
            record.close_epoch(row, head)
    head.eval().requires_grad_(False)
    return head


class _SelfSupervised(Group[SSKDSettings]):
    mixes: ClassVar[bool] = False

    def __init__(
        self,
        workshop: Workshop,
        settings: SSKDSettings,
        student: nn.Module,
        teacher: Teacher,
        teacher_head: nn.Module,
    ) -> None:
        super().__init__(workshop, settings, [student], ["student"])
        self._student, self._teacher, self._teacher_head = student, teacher, teacher_head
        width = embedding_width(student, workshop.rows.inputs[:2], whose="student")
        with seeded_torch(parts_seed(workshop)):
            self.parts["head"] = SelfSupervisionHead(width).to(workshop.rows.device)

    def exchanges(self, progress: float) -> bool:
        settings = self.settings
        return max(self.kd_weight(progress), settings.ss_weight, settings.tf_weight) > 0

    @contextmanager
    def tapping(self) -> Iterator[None]:
        with ExitStack() as stack:
            self._ours = stack.enter_context(tapped(self._student, [PENULTIMATE]))
            self._theirs = stack.enter_context(tapped(self._teacher.first, [PENULTIMATE]))
            yield

    def extra_inputs(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Turn the transfer rows by 90, 180 and 270 degrees."""
        return (rotated_views(inputs[0])[1:].flatten(0, 1),)

    def run(self, inputs: Sequence[Tensor]) -> GroupOutputs:
        logits = super().run(inputs).logits
        self._embeddings = vectors(self._ours[PENULTIMATE])
        return GroupOutputs(logits)

    def losses(self, step: GroupStep) -> dict[str, Tensor]:
        if step.exchange is None:
            return {}
        settings, exchange = self.settings, step.exchange
        (upright,), (turned,) = exchange.logits, exchange.extra_logits
        rows = len(upright)
        # The batch is the transfer rows, perhaps labelled rows, and the turned rows at its end.
        embeddings = torch.cat([self._embeddings[:rows], self._embeddings[-len(turned) :]])
        each = self._teacher.member_logits(rotated_views(exchange.inputs[0]).flatten(0, 1))
        taught = vectors(self._theirs[PENULTIMATE])
        temperature = settings.temperature.at(step.progress)
        said = self._teacher.combine(each, temperature=temperature)
        said = said.logits().unflatten(0, (4, rows))
        # Only the first rows have labels; for the others the teacher's word on the upright image
        # says which class a turned one should have.
        labelled = exchange.ids < self.workshop.rows.labelled
        labels = self.workshop.rows.labels[exchange.ids]
        labels = torch.where(labelled, labels, said[0].argmax(-1))
        parts = self_supervised_losses(
            torch.cat([upright, turned]).unflatten(0, (4, rows)),
            said,
            self.parts["head"](embeddings).unflatten(0, (4, rows)),
            self._teacher_head(taught).unflatten(0, (4, rows)),
            labels,
            kd_temperature=temperature,
            ss_temperature=settings.ss_temperature,
            tf_temperature=settings.tf_temperature,
            ss_wrong_share=settings.ss_wrong_share,
            tf_wrong_share=settings.tf_wrong_share,
        )
        return {
            "kd": step.values.kd_weight * parts.kd,
            "ss": settings.ss_weight * parts.ss,
            "tf": settings.tf_weight * parts.tf,
        }


class SelfSupervised(Method[SSKDSettings]):
    """The student learns labels, and from the teacher its classes and its similarities.

    First a head on the frozen teacher learns to find a turned image's upright one among the others
    of a batch; then the student, with a head of its own, imitates the teacher's classes of upright
    and turned images and the similarities between them. Where the teacher is most wrong, it is not
    imitated. Of the run's objective only ``ce`` takes part; weights are the method's own.
    """

    takes: ClassVar[tuple[Kind, ...]] = ("pictures",)
    Settings: ClassVar[type[MethodSettings]] = SSKDSettings
    source: ClassVar[str] = (
        "Xu, Liu, Li, Loy, 2020, Knowledge Distillation Meets Self-Supervision, "
        "https://arxiv.org/abs/2006.07114"
    )

    def check(self, workshop: Workshop) -> None:
        """Refuse images that are not square, and settings that have no part here."""
        self._checked_teacher(workshop)

    def run(self, workshop: Workshop) -> MethodResult:
        """Return the distilled student; its head is not part of it."""
        teacher = self._checked_teacher(workshop)
        student = workshop.new_student()
        head = train_head(workshop, teacher, self.settings.head_epochs)
        fit_group(_SelfSupervised(workshop, self.settings, student, teacher, head))
        return MethodResult(student)

    @staticmethod
    def _checked_teacher(workshop: Workshop) -> Teacher:
        inputs = workshop.rows.inputs[:2]
        if workshop.teacher is None:
            raise ValueError("method 'sskd' needs a teacher, got none")
        workshop.teacher.check_inputs_suffice("sskd")
        rotated_views(inputs)
        if workshop.selection.is_on:
            raise ValueError(
                "targets have no part in method 'sskd', which leaves out rows by its own ranks: "
                "remove targets, or use method=offline"
            )
        augmentation = workshop.training.augmentation
        if augmentation.teacher_view != "same":
            raise ValueError(
                "training.augmentation.teacher_view must be same with method 'sskd', whose teacher "
                f"speaks of the same turned images, got {augmentation.teacher_view!r}"
            )
        embedding_width(workshop.teacher.first, inputs, whose="teacher")
        embedding_width(workshop.new_student(), inputs, whose="student")
        return workshop.teacher
