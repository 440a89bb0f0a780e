"""Codistillation: peers learn from each other as they were some steps ago."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedkd.bounds import Count, ShareBelowOne
from fedkd.distillation.fit.group import Group, GroupStep, fit_group
from fedkd.distillation.fit.method import Method, MethodResult, MethodSettings
from fedkd.distillation.fit.workshop import Workshop
from fedkd.distillation.methods.peers import PeerSettings, build_peers, peer_names, result_of
from fedkd.mutual.stale import StalePeers, codistillation_loss


class CodistillationSettings(PeerSettings):
    """Settings under ``method:`` when ``name: codistillation``."""

    name: Literal["codistillation"] = "codistillation"
    interval: Count = Field(10, description="steps between two exchanges of weights")
    burn_in: ShareBelowOne = Field(
        0.2, description="share of the training in which every peer trains alone"
    )
    labelled_rows: Literal["shared", "disjoint"] = Field(
        "shared",
        description="shared: every peer sees all labels; disjoint: each its own part of them",
    )


class _StaleReaders(Group[CodistillationSettings]):
    def __init__(
        self,
        workshop: Workshop,
        settings: CodistillationSettings,
        models: Sequence[nn.Module],
        names: Sequence[str],
    ) -> None:
        super().__init__(workshop, settings, models, names)
        self.stale = StalePeers(self.models, interval=settings.interval)
        rows = workshop.rows
        if settings.labelled_rows == "disjoint":
            if rows.labelled < settings.peers:
                raise ValueError(
                    "method.labelled_rows: disjoint needs a labelled row for each of the "
                    f"{settings.peers} peers, but data.private_rows is {rows.labelled}"
                )
            ids = torch.arange(rows.labelled, device=rows.device)
            self.own_rows = [ids[number :: settings.peers] for number in range(settings.peers)]

    def kd_weight(self, progress: float) -> float:
        return 0.0 if progress < self.settings.burn_in else super().kd_weight(progress)

    def after_step(self, steps: int) -> None:
        self.stale.refresh(self.models, step=steps)

    def losses(self, step: GroupStep) -> dict[str, Tensor]:
        exchange = step.exchange
        if exchange is None:
            return {}
        kd = [
            codistillation_loss(
                logits,
                self.stale.others(seen, leave_out=number),
                temperature=self.settings.temperature.at(step.progress),
            )
            for number, (logits, seen) in enumerate(
                zip(exchange.logits, exchange.inputs, strict=True)
            )
        ]
        return {"kd": step.values.kd_weight * torch.stack(kd)}


class Codistillation(Method[CodistillationSettings]):
    """After a time alone, peers learn from the others as they were some steps ago."""

    Settings: ClassVar[type[MethodSettings]] = CodistillationSettings
    source: ClassVar[str] = "Anil et al., 2018, https://arxiv.org/abs/1804.03235"
    needs_teacher: ClassVar[bool] = False

    def run(self, workshop: Workshop) -> MethodResult:
        """Return the first peer as the student, the others and their ensemble beside it."""
        settings = self.settings
        peers = build_peers(workshop, settings.peers, settings.models)
        group = _StaleReaders(workshop, settings, peers, peer_names(settings.peers))
        fit_group(group)
        return result_of(group)
