"""Co-training: students that see different views of a row and label rows for each other."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedkd.bounds import Few, Real, Share, Weight
from fedkd.distillation.fit.group import Group, GroupSettings, GroupStep, fit_group
from fedkd.distillation.fit.method import Method, MethodResult, MethodSettings
from fedkd.distillation.fit.workshop import Workshop
from fedkd.distillation.methods.peers import build_peers, result_of
from fedkd.inputs import Kind
from fedkd.losses.co_training import (
    cross_pseudo_label_losses,
    fast_gradient_examples,
    view_difference_loss,
)
from fedkd.schedules import NonNegativeSchedule, RampUpSchedule


class CoTrainingSettings(GroupSettings):
    """Settings under ``method:`` when ``name: co_training``."""

    name: Literal["co_training"] = "co_training"
    views: Few = Field(2, ge=2, description="students, each with a view of its own")
    kd_weight: NonNegativeSchedule = Field(
        RampUpSchedule(end=1.0, until=0.27),
        description="weight of the labels that the students give each other; while it is 0 each "
        "trains alone",
    )
    threshold: Share = Field(
        0.95, description="a row counts where the other student is at least that sure"
    )
    difference_weight: Weight = Field(
        0.5,
        description="weight of resisting the examples that mislead the other student, which keeps "
        "the students different; 0 is off",
    )
    epsilon: Real = Field(
        0.02,
        ge=0,
        le=100,
        description="how far such an example moves each pixel, on pixel values in [0, 1]",
    )


class _Views(Group[CoTrainingSettings]):
    own_views: ClassVar[bool] = True
    mixes: ClassVar[bool] = False

    def extra_inputs(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Give each student the examples that mislead the one before it."""
        if self.settings.difference_weight == 0:
            return ()
        misleading = [
            self._misleading(model, seen) for model, seen in zip(self.models, inputs, strict=True)
        ]
        return tuple(misleading[number - 1] for number in range(len(misleading)))

    def _misleading(self, model: nn.Module, inputs: Tensor) -> Tensor:
        # In evaluation mode: these passes are no steps and must not move BatchNorm's statistics.
        rows = self.workshop.rows
        model.eval()
        pixels = fast_gradient_examples(
            lambda pixels: model((pixels - rows.mean) / rows.std),
            inputs * rows.std + rows.mean,
            epsilon=self.settings.epsilon,
        )
        model.train()
        return (pixels - rows.mean) / rows.std

    def losses(self, step: GroupStep) -> dict[str, Tensor]:
        exchange = step.exchange
        if exchange is None:
            return {}
        unlabelled = exchange.ids >= self.workshop.rows.labelled
        learned = cross_pseudo_label_losses(
            exchange.logits[:, unlabelled], threshold=self.settings.threshold
        )
        self.noted = {"kept": learned.kept_fractions}
        losses = {"pseudo_labels": step.values.kd_weight * learned.losses}
        if exchange.extra_logits:
            difference = view_difference_loss(exchange.logits, torch.stack(exchange.extra_logits))
            losses["difference"] = self.settings.difference_weight * difference
        return losses


class CoTraining(Method[CoTrainingSettings]):
    """Each student labels the rows without labels that it is sure about, for the other one.

    A student's view is its own augmentation of a row (``training.augmentation``) and its own first
    weights; with augmentation off, the weights alone. What keeps the students from becoming one is
    that each resists the adversarial examples of the other.
    """

    takes: ClassVar[tuple[Kind, ...]] = ("pictures",)
    Settings: ClassVar[type[MethodSettings]] = CoTrainingSettings
    source: ClassVar[str] = (
        "Blum and Mitchell, 1998, https://doi.org/10.1145/279943.279962; for networks Qiao et al., "
        "2018 (Deep Co-Training), https://arxiv.org/abs/1803.05984, with the pseudo-labels of Chen "
        "et al., 2021, https://arxiv.org/abs/2106.01226"
    )
    needs_teacher: ClassVar[bool] = False

    def run(self, workshop: Workshop) -> MethodResult:
        """Return the first student, the others and their ensemble beside it.

        Raises:
            ValueError: where every row has a label.
        """
        rows, count = workshop.rows, self.settings.views
        if rows.labelled == len(rows.inputs):
            raise ValueError(
                "method 'co_training' labels rows that have no labels, but data.public.size is 0: "
                "set it to at least 1"
            )
        names = ["student", *(f"view {number}" for number in range(2, count + 1))]
        group = _Views(workshop, self.settings, build_peers(workshop, count), names)
        fit_group(group)
        epochs = workshop.histories["student"].epochs
        return result_of(group, kept=epochs[-1].get("targets/kept") if epochs else None)
