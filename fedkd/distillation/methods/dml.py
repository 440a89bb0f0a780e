"""Deep mutual learning: peers of one rank."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from fedkd.distillation.fit.group import Group, GroupStep, fit_group
from fedkd.distillation.fit.method import Method, MethodResult, MethodSettings
from fedkd.distillation.fit.workshop import Workshop
from fedkd.distillation.methods.peers import PeerSettings, build_peers, peer_names, result_of
from fedkd.mutual.averages import leave_one_out_losses
from fedkd.mutual.pairwise import mutual_losses


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

    def run(self, workshop: Workshop) -> MethodResult:
        """Return the first peer as the student, the others and their ensemble beside it."""
        settings = self.settings
        peers = build_peers(workshop, settings.peers, settings.models)
        group = _MutualPeers(workshop, settings, peers, peer_names(settings.peers))
        fit_group(group)
        return result_of(group)
