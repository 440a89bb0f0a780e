"""PCL: an ensemble classifier and the peers' running means."""

import copy
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedkd.bounds import ShareBelowOne
from fedkd.distillation.fit.group import (
    GroupStep,
    fit_group,
    parts_seed,
)
from fedkd.distillation.fit.method import Method, MethodResult, MethodSettings
from fedkd.distillation.fit.workshop import Workshop
from fedkd.distillation.methods.embeddings import EmbeddingGroup
from fedkd.distillation.methods.peers import PeerSettings, build_peers, result_of
from fedkd.distillation.methods.ramp import RAMP, RAMP_DESCRIPTION
from fedkd.mutual.mean_teacher import update_mean_teacher
from fedkd.mutual.pcl import pcl_losses
from fedkd.randomness import seeded_torch
from fedkd.schedules import ConstantSchedule, NonNegativeSchedule, PositiveSchedule


class PCLSettings(PeerSettings):
    """Settings under ``method:`` when ``name: pcl``."""

    name: Literal["pcl"] = "pcl"
    decay: ShareBelowOne = Field(
        0.999, description="largest share of the past in a running mean, per step"
    )
    kd_weight: NonNegativeSchedule = Field(RAMP, description=RAMP_DESCRIPTION)
    temperature: PositiveSchedule = Field(
        ConstantSchedule(value=3.0), description="softens what the peers learn"
    )


class _PeersWithMeans(EmbeddingGroup[PCLSettings]):
    def __init__(
        self,
        workshop: Workshop,
        settings: PCLSettings,
        models: Sequence[nn.Module],
        names: Sequence[str],
    ) -> None:
        super().__init__(workshop, settings, models, names)
        self.judged = [copy.deepcopy(model).requires_grad_(False).eval() for model in models]
        with seeded_torch(parts_seed(workshop)):
            classifier = nn.Linear(sum(self.widths()), workshop.rows.num_classes)
        self.classifier = classifier.to(workshop.rows.device)
        self.parts["classifier"] = self.classifier

    def after_step(self, steps: int) -> None:
        for mean, model in zip(self.judged, self.models, strict=True):
            update_mean_teacher(mean, model, step=steps - 1, decay=self.settings.decay)

    def losses(self, step: GroupStep) -> dict[str, Tensor]:
        joined = torch.cat(list(step.own_beside.values()), dim=1)
        # While the peers train alone, the classifier that joins them moves only itself.
        ensemble = self.classifier(joined.detach() if step.exchange is None else joined)
        ce = self.label_loss(step.own[0]._replace(logits=ensemble))
        losses = {"ce_ensemble": step.values.ce_weight * ce}
        if step.exchange is None:
            return losses
        exchange = step.exchange
        with torch.no_grad():
            means = [mean(seen) for mean, seen in zip(self.judged, exchange.inputs, strict=True)]
        return losses | pcl_losses(
            exchange.logits,
            self.classifier(torch.cat(list(exchange.beside.values()), dim=1)),
            torch.stack(means),
            None,
            kd_weight=step.values.kd_weight,
            temperature=self.settings.temperature.at(step.progress),
        )


class PeerCollaborative(Method[PCLSettings]):
    """Peers learn from a classifier on all their embeddings and from each other's running means.

    The running mean of the first peer is the student; embeddings may differ in width.
    """

    Settings: ClassVar[type[MethodSettings]] = PCLSettings
    source: ClassVar[str] = "Wu and Gong, 2021 (PCL), https://arxiv.org/abs/2006.04147"
    needs_teacher: ClassVar[bool] = False

    def run(self, workshop: Workshop) -> MethodResult:
        """Return the first running mean as the student, the others and their ensemble beside it."""
        settings = self.settings
        peers = build_peers(workshop, settings.peers, settings.models)
        names = ["student", *(f"mean teacher {n}" for n in range(2, settings.peers + 1))]
        group = _PeersWithMeans(workshop, settings, peers, names)
        fit_group(group)
        return result_of(group)
