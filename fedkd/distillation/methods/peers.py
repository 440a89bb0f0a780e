"""Peers that a method builds side by side, and what they leave."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from fedkd.bounds import Few
from fedkd.distillation.fit.group import Group, SoftenedSettings
from fedkd.distillation.fit.method import MethodResult
from fedkd.distillation.fit.workshop import Workshop
from fedkd.distillation.task.predicting import predict_logits
from fedkd.metrics.diversity import pairwise_disagreement
from fedkd.models import ModelSettings
from fedkd.targets import Targets, mean_probability


class Ensemble(nn.Module):
    """Several models as one: the mean of their probabilities.

    Attributes:
        members: the models; their outputs must have the same classes.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.eval()

    def forward(self, inputs: Float[Tensor, "rows *shape"]) -> Float[Tensor, "rows classes"]:
        """Return logits whose softmax is the members' mean."""
        logits = torch.stack([member(inputs) for member in self.members])
        return Targets.softened(mean_probability(logits), temperature=1.0).logits()


def disagreement(models: Sequence[nn.Module], workshop: Workshop) -> float:
    """Return the share of transfer rows on which two of the models differ, mean over pairs."""
    inputs = workshop.rows.inputs
    classes = [predict_logits(model, inputs).argmax(-1).cpu().numpy() for model in models]
    return pairwise_disagreement(np.stack(classes))


class PeerSettings(SoftenedSettings):
    """The same where a number of peers learn side by side."""

    peers: Few = Field(2, ge=2, description="models that learn together, the student among them")
    models: tuple[ModelSettings, ...] = Field(
        (), description="architectures from the second peer on; none: all as the student"
    )


def peer_names(count: int) -> list[str]:
    """Return what ``count`` peers are called; the first is the student."""
    return ["student", *(f"peer {number}" for number in range(2, count + 1))]


def build_peers(
    workshop: Workshop, count: int, models: Sequence[ModelSettings] = ()
) -> list[nn.Module]:
    """Return the student and its peers, each with first weights of its own.

    Args:
        workshop: builds them.
        count: how many, the student included.
        models: architectures from the second on; empty: all as the student.

    Raises:
        ValueError: if there is not one architecture for each peer besides the student.
    """
    if models and len(models) != count - 1:
        raise ValueError(
            f"method.models needs one model for each peer besides the student ({count - 1}), got "
            f"{len(models)}"
        )
    peers = [workshop.new_student()]
    for number in range(1, count):
        peers.append(
            workshop.build(models[number - 1], 0, number)
            if models
            else workshop.new_student(number)
        )
    return peers


def result_of(group: Group[Any], ensemble: nn.Module | None = None, **notes: Any) -> MethodResult:
    """Return what a group leaves: its student, the others, their ensemble and their disagreement.

    Args:
        group: trained.
        ensemble: of a method that has its own; None: the mean of the judged models' probabilities.
        notes: numbers of the method's own.
    """
    student, *others = group.judged
    named = dict(zip(group.names[1:], others, strict=True))
    if len(group.judged) > 1:
        named["ensemble"] = Ensemble(group.judged) if ensemble is None else ensemble
        notes = {"disagreement": disagreement(group.judged, group.workshop), **notes}
    return MethodResult(student, named, notes)
