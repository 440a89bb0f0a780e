"""KDCL: one common target out of all peers' logits."""

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from fedkd.bounds import Few, PositiveWeight
from fedkd.distillation.fit.group import Group, GroupStep, fit_group
from fedkd.distillation.fit.method import Method, MethodResult, MethodSettings
from fedkd.distillation.fit.workshop import Workshop
from fedkd.distillation.methods.peers import PeerSettings, build_peers, peer_names, result_of
from fedkd.distillation.task.predicting import predict_logits
from fedkd.mutual.kdcl import (
    kdcl_general,
    kdcl_general_weights,
    kdcl_linear,
    kdcl_losses,
    kdcl_minlogit,
    kdcl_naive,
)
from fedkd.schedules import ConstantSchedule, PositiveSchedule


class KDCLSettings(PeerSettings):
    """Settings under ``method:`` when ``name: kdcl``."""

    name: Literal["kdcl"] = "kdcl"
    peers: Few = Field(2, description="models that learn together, the student among them")
    rule: Literal["general", "naive", "linear", "minlogit"] = Field(
        "general",
        description="the common target. general: a mean with weights from the peers' errors on the "
        "validation split, renewed every epoch; for all transfer rows. naive, linear, minlogit "
        "look at the label of a row, so they teach on labelled rows only",
    )
    ridge: PositiveWeight = Field(0.1, description="general: steadies the weights; large: uniform")
    temperature: PositiveSchedule = Field(
        ConstantSchedule(value=2.0), description="softens the common target"
    )


class _Collaborators(Group[KDCLSettings]):
    own_views: ClassVar[bool] = True
    mixes: ClassVar[bool] = False
    shares: Float[Tensor, " peers"]

    def exchanges(self, progress: float) -> bool:
        return self.settings.rule == "general" and super().exchanges(progress)

    def before_epoch(self) -> None:
        """Weigh the peers anew by their errors on the validation split."""
        if self.settings.rule == "general" and len(self.models) > 1:
            rows = self.workshop.rows
            logits = torch.stack([predict_logits(m, rows.validation_inputs) for m in self.models])
            self.shares = kdcl_general_weights(
                logits, rows.validation_labels, ridge=self.settings.ridge
            )

    def losses(self, step: GroupStep) -> dict[str, Tensor]:
        if len(self.models) < 2 or step.values.kd_weight == 0:
            return {}
        if step.exchange is not None:
            logits = step.exchange.logits
            target = kdcl_general(logits, self.shares)
        else:
            logits, labels = torch.stack([own.logits for own in step.own]), step.own[0].labels
            rules = {"naive": kdcl_naive, "linear": kdcl_linear, "minlogit": kdcl_minlogit}
            target = rules[self.settings.rule](logits, labels)
        return kdcl_losses(
            logits,
            target.to(logits.dtype),
            None,
            kd_weight=step.values.kd_weight,
            temperature=self.settings.temperature.at(step.progress),
        )


class CollaborativeLearning(Method[KDCLSettings]):
    """Peers see their own views of a row and learn one common target made of all their logits."""

    Settings: ClassVar[type[MethodSettings]] = KDCLSettings
    source: ClassVar[str] = (
        "Guo et al., 2020 (KDCL), https://openaccess.thecvf.com/content_CVPR_2020/html/"
        "Guo_Online_Knowledge_Distillation_via_Collaborative_Learning_CVPR_2020_paper.html"
    )
    needs_teacher: ClassVar[bool] = False

    def run(self, workshop: Workshop) -> MethodResult:
        """Return the first peer as the student, the others and their ensemble beside it."""
        settings = self.settings
        peers = build_peers(workshop, settings.peers, settings.models)
        group = _Collaborators(workshop, settings, peers, peer_names(settings.peers))
        fit_group(group)
        if settings.rule == "general" and settings.peers > 1:
            group.before_epoch()
            return result_of(group, weights=group.shares.tolist())
        return result_of(group)
