"""Progressive mutual learning: a fresh teacher leads, the student gains influence."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedkd.bounds import Share
from fedkd.distillation.fit.group import Group, GroupStep, SoftenedSettings, fit_group
from fedkd.distillation.fit.method import Method, MethodResult, MethodSettings
from fedkd.distillation.fit.workshop import Workshop
from fedkd.distillation.methods.peers import result_of
from fedkd.models import ModelSettings
from fedkd.mutual.two_way import progressive_weights, two_way_losses


class MutualSettings(SoftenedSettings):
    """Settings under ``method:`` when ``name: mutual``."""

    name: Literal["mutual"] = "mutual"
    teacher: ModelSettings = Field(
        ModelSettings(name="mlp", options={"hidden": [256, 256]}),
        description="architecture of the teacher, which starts fresh; the section teacher has no "
        "part in this method",
    )
    teacher_rows: Literal["all", "labelled"] = Field(
        "all",
        description="whose labels the teacher sees: all transfer rows, or those that the student "
        "sees as well",
    )
    final_share: Share = Field(
        0.5,
        description="the student's share of kd_weight at the end; 0: the teacher never listens",
    )


class _TwoWay(Group[MutualSettings]):
    def losses(self, step: GroupStep) -> dict[str, Tensor]:
        if step.exchange is None:
            return {}
        student, teacher = step.exchange.logits
        terms = two_way_losses(
            student,
            teacher,
            None,
            weights=progressive_weights(
                step.progress,
                kd_weight=step.values.kd_weight,
                final_share=self.settings.final_share,
            ),
            temperature=self.settings.temperature.at(step.progress),
        )
        return {"kd": torch.stack([terms["kd_student"], terms["kd_teacher"]])}


class ProgressiveMutual(Method[MutualSettings]):
    """Teacher and student start fresh and teach each other; the student's influence grows.

    At the start the teacher leads as in one-way distillation; the share of the student rises along
    half a cosine wave to ``final_share``.
    """

    Settings: ClassVar[type[MethodSettings]] = MutualSettings
    source: ClassVar[str] = (
        "Zhang et al., 2018, equations 3-6, with a weight for each direction, "
        "https://arxiv.org/abs/1706.00384"
    )
    needs_teacher: ClassVar[bool] = False

    def run(self, workshop: Workshop) -> MethodResult:
        """Return the student, the teacher beside it."""
        rows = workshop.rows
        models = [workshop.new_student(), workshop.build(self.settings.teacher, 1, 0)]
        group = _TwoWay(workshop, self.settings, models, ["student", "teacher"])
        if self.settings.teacher_rows == "all":
            ids = torch.arange(len(rows.inputs), device=rows.device)
            group.own_rows = [ids[: rows.labelled], ids]
        fit_group(group)
        return result_of(group)
