"""Mutual learning: models of the same rank, or a teacher and a student that both learn."""

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fedkd.bounds import Share
from fedkd.distillation.method import Distilled, Method, MethodSettings
from fedkd.distillation.peers import (
    Group,
    GroupStep,
    PeerSettings,
    SoftenedSettings,
    build_peers,
    distilled,
    fit_group,
    peer_names,
)
from fedkd.distillation.workshop import Workshop
from fedkd.models import ModelSettings
from fedkd.mutual.averages import leave_one_out_losses
from fedkd.mutual.pairwise import mutual_losses
from fedkd.mutual.two_way import progressive_weights, two_way_losses

# --- Deep mutual learning: peers of one rank -------------------------------------------------


class DMLSettings(PeerSettings):
    """Settings under ``method:`` when ``name: dml``."""

    name: Literal["dml"] = "dml"
    target: Literal["pairwise", "ensemble"] = Field(
        "pairwise",
        description="pairwise: a KL to each other peer; ensemble: one KL to the others' mean "
        "prediction, which has the same gradient as the mean of the pairs",
    )
    peer_reduction: Literal["mean", "sum"] = Field(
        "mean",
        description="of the pairs: mean as in the paper; sum as in its code, where the weight "
        "grows with the number of peers",
    )

    @model_validator(mode="after")
    def _a_sum_is_of_pairs(self) -> "DMLSettings":
        if self.target == "ensemble" and self.peer_reduction == "sum":
            raise ValueError(
                "method.peer_reduction must be mean with method.target: ensemble, where there is "
                "one target and nothing to sum, got 'sum'"
            )
        return self


class _MutualPeers(Group[DMLSettings]):
    def losses(self, step: GroupStep) -> dict[str, Tensor]:
        if step.exchange is None:
            return {}
        logits, settings = step.exchange.logits, self.settings
        temperature = settings.temperature.at(step.progress)
        if settings.target == "pairwise":
            kd = mutual_losses(
                logits, temperature=temperature, peer_reduction=settings.peer_reduction
            )
        else:
            kd = leave_one_out_losses(logits, temperature=temperature)
        return {"kd": step.values.kd_weight * kd}


class DeepMutualLearning(Method[DMLSettings]):
    """Peers train together; each learns the labels and the other peers' predictions."""

    Settings: ClassVar[type[MethodSettings]] = DMLSettings
    source: ClassVar[str] = "Zhang et al., 2018 (DML), https://arxiv.org/abs/1706.00384"
    needs_teacher: ClassVar[bool] = False

    def run(self, workshop: Workshop) -> Distilled:
        """Return the first peer as the student, the others and their ensemble beside it."""
        settings = self.settings
        peers = build_peers(workshop, settings.peers, settings.models)
        group = _MutualPeers(workshop, settings, peers, peer_names(settings.peers))
        fit_group(group)
        return distilled(group)


# --- Progressive mutual learning: a fresh teacher leads, the student gains influence ---------


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

    def run(self, workshop: Workshop) -> Distilled:
        """Return the student, the teacher beside it."""
        rows = workshop.rows
        models = [workshop.new_student(), workshop.build(self.settings.teacher, 1, 0)]
        group = _TwoWay(workshop, self.settings, models, ["student", "teacher"])
        if self.settings.teacher_rows == "all":
            ids = torch.arange(len(rows.inputs), device=rows.device)
            group.own_rows = [ids[: rows.labelled], ids]
        fit_group(group)
        return distilled(group)
