"""OKDDip: diverse peers teach a leader."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedkd.bounds import Few
from fedkd.distillation.fit.group import GroupStep, SoftenedSettings, fit_group, parts_seed
from fedkd.distillation.fit.method import Method, MethodResult, MethodSettings
from fedkd.distillation.fit.workshop import Workshop
from fedkd.distillation.methods.embeddings import EmbeddingGroup
from fedkd.distillation.methods.peers import build_peers, result_of
from fedkd.distillation.methods.ramp import RAMP, RAMP_DESCRIPTION
from fedkd.mutual.okddip import PeerAttention, okddip_losses
from fedkd.randomness import seeded_torch
from fedkd.schedules import ConstantSchedule, NonNegativeSchedule, PositiveSchedule


class OKDDipSettings(SoftenedSettings):
    """Settings under ``method:`` when ``name: okddip``."""

    name: Literal["okddip"] = "okddip"
    peers: Few = Field(3, ge=2, description="auxiliary peers besides the leader, the student")
    average: Literal["prob", "logit"] = Field(
        "prob", description="what the peers' targets average: prob as the paper, logit as its code"
    )
    learned_attention: bool = Field(
        True,
        description="attention learns from the peers' loss, as published, and may end with every "
        "peer listening to itself; false: it keeps its first weights",
    )
    kd_weight: NonNegativeSchedule = Field(RAMP, description=RAMP_DESCRIPTION)
    temperature: PositiveSchedule = Field(
        ConstantSchedule(value=3.0), description="softens what the models learn"
    )


class _DiversePeers(EmbeddingGroup[OKDDipSettings]):
    def __init__(
        self,
        workshop: Workshop,
        settings: OKDDipSettings,
        models: Sequence[nn.Module],
        names: Sequence[str],
    ) -> None:
        super().__init__(workshop, settings, models, names)
        with seeded_torch(parts_seed(workshop)):
            self.attention = PeerAttention(self.widths()[0]).to(workshop.rows.device)
        self.parts["attention"] = self.attention

    def losses(self, step: GroupStep) -> dict[str, Tensor]:
        if step.exchange is None:
            return {}
        leader, *peers = step.exchange.logits
        embeddings = list(step.exchange.beside.values())[1:]
        attention = self.attention(torch.stack(embeddings))
        to_itself = attention.detach().diagonal(dim1=1, dim2=2).mean()
        self.noted = {"attention_to_itself": to_itself}
        return okddip_losses(
            torch.stack(peers),
            leader,
            attention if self.settings.learned_attention else attention.detach(),
            None,
            kd_weight=step.values.kd_weight,
            temperature=self.settings.temperature.at(step.progress),
            average=self.settings.average,
        )


class DiversePeers(Method[OKDDipSettings]):
    """Auxiliary peers choose by attention whom they learn from; a leader learns from their mean.

    The leader is the student. All models have its architecture, because attention compares their
    embeddings; they share nothing, as in the paper's network-based form.
    """

    Settings: ClassVar[type[MethodSettings]] = OKDDipSettings
    source: ClassVar[str] = "Chen et al., 2020 (OKDDip), https://arxiv.org/abs/1912.00350"
    needs_teacher: ClassVar[bool] = False

    def run(self, workshop: Workshop) -> MethodResult:
        """Return the leader as the student, the auxiliary peers and the ensemble beside it."""
        count = self.settings.peers
        names = ["student", *(f"peer {number}" for number in range(1, count + 1))]
        models = build_peers(workshop, count + 1)
        group = _DiversePeers(workshop, self.settings, models, names)
        fit_group(group)
        return result_of(group)
