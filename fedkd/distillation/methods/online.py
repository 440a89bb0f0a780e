"""Online distillation: peers that train together and make one teacher out of what they all know."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from fedkd.bounds import Count, Few, PositiveWeight, ShareBelowOne
from fedkd.distillation.method import Distilled, Method, MethodSettings
from fedkd.distillation.peers import (
    Group,
    GroupStep,
    Outputs,
    PeerSettings,
    SettingsT,
    SoftenedSettings,
    build_peers,
    distilled,
    fit_group,
    parts_seed,
    peer_names,
)
from fedkd.distillation.predicting import predict_logits
from fedkd.distillation.workshop import Workshop
from fedkd.mutual.kdcl import (
    kdcl_general,
    kdcl_general_weights,
    kdcl_linear,
    kdcl_losses,
    kdcl_minlogit,
    kdcl_naive,
)
from fedkd.mutual.mean_teacher import update_mean_teacher
from fedkd.mutual.native_ensemble import BranchGate, gated_logits, one_losses
from fedkd.mutual.okddip import PeerAttention, okddip_losses
from fedkd.mutual.pcl import pcl_losses
from fedkd.mutual.stale import StalePeers, codistillation_loss
from fedkd.objectives import PENULTIMATE, layer_shapes, tapped, vectors
from fedkd.objectives.terms import LayerName
from fedkd.randomness import seeded_torch
from fedkd.schedules import ConstantSchedule, NonNegativeSchedule, PositiveSchedule, RampUpSchedule

RAMP = RampUpSchedule(end=1.0, until=0.27)
"""The weight of ONE, OKDDip and PCL as published: a Gaussian rise over 80 of 300 epochs."""

RAMP_DESCRIPTION = "weight of what the models tell each other; the published ramp over 27 %"

# --- ONE: branches of one network, and a gate ------------------------------------------------


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
        self, inputs: Float[Tensor, "rows channels height width"]
    ) -> tuple[Float[Tensor, "branches rows classes"], Float[Tensor, "rows branches"]]:
        """Return every branch's logits and the gate's shares, from one pass through the trunk."""
        shared = self.trunk(inputs)
        return torch.stack([branch(shared) for branch in self.branches]), self.gate(shared)

    def forward(
        self, inputs: Float[Tensor, "rows channels height width"]
    ) -> Float[Tensor, "rows classes"]:
        """Return the student's logits."""
        logits: Tensor = self.branches[0](self.trunk(inputs))
        return logits


class GatedEnsemble(nn.Module):
    """All branches of a network, combined by its gate."""

    def __init__(self, network: BranchedNetwork) -> None:
        super().__init__()
        self.network = network
        self.eval()

    def forward(
        self, inputs: Float[Tensor, "rows channels height width"]
    ) -> Float[Tensor, "rows classes"]:
        """Return the gated sum of the branches' logits."""
        return gated_logits(*self.network.everything(inputs))


class _Branches(Group[ONESettings]):
    def __init__(self, workshop: Workshop, settings: ONESettings, network: BranchedNetwork) -> None:
        super().__init__(workshop, settings, [network], ["student"])
        self.network = network

    def exchanges(self, progress: float) -> bool:
        return self.kd_weight(progress) > 0

    def run(self, inputs: Sequence[Tensor]) -> Outputs:
        branches, gates = self.network.everything(inputs[0])
        return Outputs((branches[0],), {"branches": branches.transpose(0, 1), "gates": gates})

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

    def run(self, workshop: Workshop) -> Distilled:
        """Return trunk and first branch as the student, the gated ensemble beside it."""
        students = build_peers(workshop, self.settings.branches)
        inputs = workshop.rows.inputs[:2]
        with seeded_torch(parts_seed(workshop)):
            network = BranchedNetwork(students, self.settings.split, inputs).to(inputs.device)
        fit_group(_Branches(workshop, self.settings, network))
        return Distilled(students[0].eval(), {"ensemble": GatedEnsemble(network)})


# --- KDCL: one common target out of all peers' logits ----------------------------------------


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

    def run(self, workshop: Workshop) -> Distilled:
        """Return the first peer as the student, the others and their ensemble beside it."""
        settings = self.settings
        peers = build_peers(workshop, settings.peers, settings.models)
        group = _Collaborators(workshop, settings, peers, peer_names(settings.peers))
        fit_group(group)
        if settings.rule == "general" and settings.peers > 1:
            group.before_epoch()
            return distilled(group, weights=group.shares.tolist())
        return distilled(group)


# --- Methods that look at the peers' embeddings ----------------------------------------------


class _EmbeddingGroup(Group[SettingsT]):
    """Peers whose embeddings, what their last linear layers read, are put out too."""

    def widths(self) -> list[int]:
        """Return how many numbers each model's embedding has."""
        inputs = self.workshop.rows.inputs[:2]
        return [
            vectors(torch.zeros(1, *layer_shapes(model, inputs)[PENULTIMATE])).shape[1]
            for model in self.models
        ]

    @contextmanager
    def tapping(self) -> Iterator[None]:
        with ExitStack() as stack:
            self._features = [
                stack.enter_context(tapped(model, [PENULTIMATE])) for model in self.models
            ]
            yield

    def run(self, inputs: Sequence[Tensor]) -> Outputs:
        logits = super().run(inputs).logits
        return Outputs(
            logits,
            {
                f"embedding {number}": vectors(features[PENULTIMATE])
                for number, features in enumerate(self._features)
            },
        )


# --- OKDDip: diverse peers teach a leader ----------------------------------------------------


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


class _DiversePeers(_EmbeddingGroup[OKDDipSettings]):
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

    def run(self, workshop: Workshop) -> Distilled:
        """Return the leader as the student, the auxiliary peers and the ensemble beside it."""
        count = self.settings.peers
        names = ["student", *(f"peer {number}" for number in range(1, count + 1))]
        models = build_peers(workshop, count + 1)
        group = _DiversePeers(workshop, self.settings, models, names)
        fit_group(group)
        return distilled(group)


# --- PCL: an ensemble classifier and the peers' running means ---------------------------------


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


class _PeersWithMeans(_EmbeddingGroup[PCLSettings]):
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

    def run(self, workshop: Workshop) -> Distilled:
        """Return the first running mean as the student, the others and their ensemble beside it."""
        settings = self.settings
        peers = build_peers(workshop, settings.peers, settings.models)
        names = ["student", *(f"mean teacher {n}" for n in range(2, settings.peers + 1))]
        group = _PeersWithMeans(workshop, settings, peers, names)
        fit_group(group)
        return distilled(group)


# --- Codistillation: peers as they were some steps ago ----------------------------------------


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

    def run(self, workshop: Workshop) -> Distilled:
        """Return the first peer as the student, the others and their ensemble beside it."""
        settings = self.settings
        peers = build_peers(workshop, settings.peers, settings.models)
        group = _StaleReaders(workshop, settings, peers, peer_names(settings.peers))
        fit_group(group)
        return distilled(group)
