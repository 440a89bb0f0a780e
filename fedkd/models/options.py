"""What the model families share: typed options that know how to build, and normalisation layers."""

from abc import abstractmethod
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from torch import nn

from fedkd.inputs import InputShape, Kind

Normalisation = Literal["none", "group", "batch"]


class ModelOptions(BaseModel):
    """Settings under ``options:`` of one model; a subclass lists them and builds the network."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: ClassVar[str]
    """Where the architecture comes from, one line for listings."""
    takes: ClassVar[tuple[Kind, ...]] = ("pictures",)
    """The kinds of inputs that it is for."""
    smallest_side: ClassVar[int] = 8
    """Pixels that a picture needs at least in each direction."""

    @property
    def channels_last(self) -> bool:
        """Whether a processor trains it faster with the channels of a pixel side by side."""
        return False

    @abstractmethod
    def build(self, input_shape: InputShape, num_classes: int) -> nn.Module:
        """Return a fresh network that maps [batch, *input_shape] to [batch, num_classes] logits.

        Weights are drawn from torch's global generator, so the caller seeds it.
        """


def normalisation_layer(kind: Normalisation, channels: int, *, groups: int) -> nn.Module:
    """Return the layer that normalises ``channels`` feature maps.

    GroupNorm sees one example at a time. BatchNorm mixes the examples of a batch and keeps
    running statistics, which are wrong for everybody once clients with different labels share
    them, and it refuses a batch of one value per channel. ``groups`` divides ``channels``.
    """
    if kind == "none":
        return nn.Identity()
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(groups, channels)
