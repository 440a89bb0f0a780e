"""ONE: branches of one network, and a gate that combines them."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from fedkd.bounds import Few
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
from fedkd.distillation.methods.peers import build_peers
from fedkd.distillation.methods.ramp import RAMP, RAMP_DESCRIPTION
from fedkd.mutual.native_ensemble import BranchGate, gated_logits, one_losses
from fedkd.objectives.terms import LayerName
from fedkd.randomness import seeded_torch
from fedkd.schedules import ConstantSchedule, NonNegativeSchedule, PositiveSchedule


class ONESettings(SoftenedSettings):
    """Settings under ``method:`` when ``name: one``."""

    name: Literal["one"] = "one"
    branches: Few = Field(3, ge=2, description="ends of the network, the student's among them")
    split: LayerName | None = Field(
        None,
        description="first layer that every branch has for itself, a child of the student's model; "
        "none: its last layer with weights",
    )
    kd_weight: NonNegativeSchedule = Field(RAMP, description=RAMP_DESCRIPTION)
    temperature: PositiveSchedule = Field(
        ConstantSchedule(value=3.0), description="softens what the branches learn"
    )


class BranchedNetwork(nn.Module):
    """Several ends on one trunk, and a gate that looks at what they share.

    The first branch with the trunk is the student: it shares their modules.

    Attributes:
        trunk: layers before the split.
        branches: layers from the split on, one copy each.
        gate: how much each branch counts for a row.
    """

    def __init__(
        self, students: Sequence[nn.Module], split: str | None, inputs: Float[Tensor, "rows *image"]
    ) -> None:
        """Cut the first model in two; of the others only the part from the split on is used.

        Args:
            students: equal models with weights of their own, each a chain of layers.
            split: name of a child; None: the last one with weights.
            inputs: a few rows for a dry run.

        Raises:
            ValueError: if the model is no chain of layers, or has no such child.
        """
        super().__init__()
        first = students[0]
        if not isinstance(first, nn.Sequential):
            raise ValueError(
                "method 'one' cuts student.model in two and needs a chain of layers "
                f"(nn.Sequential) such as mlp, cnn or lenet, got {type(first).__name__}: use one "
                "of these, or method=okddip, whose peers share nothing"
            )
        names = [name for name, _ in first.named_children()]
        if split is None:
            split = [name for name, child in first.named_children() if [*child.parameters()]][-1]
        if split not in names:
            raise ValueError(
                f"method.split must be a child of student.model ({', '.join(names)}), got {split!r}"
            )
        cut = names.index(split)
        self.trunk = first[:cut]
        self.branches = nn.ModuleList(student[cut:] for student in students)  # type: ignore[index]
        self.trunk.eval()  # a dry run is no step: BatchNorm must not count it
        with torch.no_grad():
            width = self.trunk(inputs).shape[1]
        self.gate = BranchGate(width, len(students))

    def everything(
        self, inputs: Float[Tensor, "rows *shape"]
    ) -> tuple[Float[Tensor, "branches rows classes"], Float[Tensor, "rows branches"]]:
        """Return every branch's logits and the gate's shares, from one pass through the trunk."""
        shared = self.trunk(inputs)
        return torch.stack([branch(shared) for branch in self.branches]), self.gate(shared)

    def forward(self, inputs: Float[Tensor, "rows *shape"]) -> Float[Tensor, "rows classes"]:
        """Return the student's logits."""
        logits: Tensor = self.branches[0](self.trunk(inputs))
        return logits


class GatedEnsemble(nn.Module):
    """All branches of a network, combined by its gate."""

    def __init__(self, network: BranchedNetwork) -> None:
        super().__init__()
        self.network = network
        self.eval()

    def forward(self, inputs: Float[Tensor, "rows *shape"]) -> Float[Tensor, "rows classes"]:
        """Return the gated sum of the branches' logits."""
        return gated_logits(*self.network.everything(inputs))


class _Branches(Group[ONESettings]):
    def __init__(self, workshop: Workshop, settings: ONESettings, network: BranchedNetwork) -> None:
        super().__init__(workshop, settings, [network], ["student"])
        self.network = network

    def exchanges(self, progress: float) -> bool:
        return self.kd_weight(progress) > 0

    def run(self, inputs: Sequence[Tensor]) -> GroupOutputs:
        branches, gates = self.network.everything(inputs[0])
        return GroupOutputs((branches[0],), {"branches": branches.transpose(0, 1), "gates": gates})

    def losses(self, step: GroupStep) -> dict[str, Tensor]:
        (own,) = step.own
        branches, gates = step.own_beside["branches"].transpose(0, 1), step.own_beside["gates"]
        ce_branches = torch.stack(
            [self.label_loss(own._replace(logits=logits)) for logits in branches[1:]]
        ).sum()
        ce_ensemble = self.label_loss(own._replace(logits=gated_logits(branches, gates)))
        losses = {
            "ce_branches": step.values.ce_weight * ce_branches,
            "ce_ensemble": step.values.ce_weight * ce_ensemble,
        }
        if step.exchange is None:
            return losses
        return losses | one_losses(
            step.exchange.beside["branches"].transpose(0, 1),
            step.exchange.beside["gates"],
            None,
            kd_weight=step.values.kd_weight,
            temperature=self.settings.temperature.at(step.progress),
        )


class NativeEnsemble(Method[ONESettings]):
    """Branches on one trunk learn from their gated ensemble; the first of them is kept.

    The branches are the student's own layers from ``split`` on, each with first weights of its
    own; the trunk is shared and runs once a step. That needs a model that is a chain of layers.
    With the default split a branch is one linear layer; the paper splits before the last block.
    """

    Settings: ClassVar[type[MethodSettings]] = ONESettings
    source: ClassVar[str] = "Lan, Zhu, Gong, 2018 (ONE), https://arxiv.org/abs/1806.04606"
    needs_teacher: ClassVar[bool] = False

    def run(self, workshop: Workshop) -> MethodResult:
        """Return trunk and first branch as the student, the gated ensemble beside it."""
        students = build_peers(workshop, self.settings.branches)
        inputs = workshop.rows.inputs[:2]
        with seeded_torch(parts_seed(workshop)):
            network = BranchedNetwork(students, self.settings.split, inputs).to(inputs.device)
        fit_group(_Branches(workshop, self.settings, network))
        return MethodResult(students[0].eval(), {"ensemble": GatedEnsemble(network)})
