"""Multilayer perceptron on the flattened image."""

from itertools import pairwise
from math import prod
from typing import ClassVar

from pydantic import Field
from torch import nn

from fedkd.bounds import ShareBelowOne, Width
from fedkd.models.options import ImageShape, ModelOptions


class MLPOptions(ModelOptions):
    """Options of ``mlp``."""

    source: ClassVar[str] = "fully connected layers with ReLU"
    smallest_side: ClassVar[int] = 1

    hidden: tuple[Width, ...] = Field(
        default=(64,),
        max_length=100,
        description="width of each hidden layer; empty for a linear model",
    )
    dropout: ShareBelowOne = Field(default=0.0, description="share of hidden units dropped")

    def build(self, input_shape: ImageShape, num_classes: int) -> nn.Module:
        """Flatten, then one linear layer with ReLU per hidden width, then the class scores."""
        widths = (prod(input_shape), *self.hidden)
        layers: list[nn.Module] = [nn.Flatten()]
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
            if self.dropout > 0:
                layers.append(nn.Dropout(self.dropout))
        return nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))
