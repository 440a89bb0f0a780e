"""Multilayer perceptron on flattened pictures, on features, or on a text's embedded tokens."""

from itertools import pairwise
from math import prod
from typing import ClassVar

from pydantic import Field
from torch import nn

from fedkd.bounds import ShareBelowOne, Width
from fedkd.inputs import InputShape, Kind
from fedkd.models.options import ModelOptions
from fedkd.models.tokens import TokenNumbers


class MLPOptions(ModelOptions):
    """Options of ``mlp``."""

    source: ClassVar[str] = "fully connected layers with ReLU; of tokens, Bengio et al., 2003"
    takes: ClassVar[tuple[Kind, ...]] = ("pictures", "features", "text")
    smallest_side: ClassVar[int] = 1

    hidden: tuple[Width, ...] = Field(
        default=(64,),
        max_length=100,
        description="width of each hidden layer; empty for a linear model",
    )
    dropout: ShareBelowOne = Field(default=0.0, description="share of hidden units dropped")
    embedding: Width = Field(default=16, description="of texts: numbers that stand for a token")

    def build(self, input_shape: InputShape, num_classes: int) -> nn.Module:
        """Flatten, then one linear layer with ReLU per hidden width, then the class scores.

        The tokens of a text are embedded first, those that fill it up with the others.

        Source:
            Bengio, Ducharme, Vincent, Jauvin, 2003, section 2, without its direct connections and
            with ReLU. https://www.jmlr.org/papers/v3/bengio03a.html
        """
        layers: list[nn.Module] = [nn.Flatten()]
        numbers = prod(input_shape)
        if input_shape.vocabulary is not None:
            layers = [TokenNumbers(), nn.Embedding(input_shape.vocabulary, self.embedding), *layers]
            numbers *= self.embedding
        widths = (numbers, *self.hidden)
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
            if self.dropout > 0:
                layers.append(nn.Dropout(self.dropout))
        return nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))
