"""Small convolutional networks: a plain one for quick runs, and LeNet-5 with modern parts."""

from typing import ClassVar

from pydantic import Field, model_validator
from torch import nn

from fedkd.bounds import Width
from fedkd.inputs import InputShape
from fedkd.models.options import ModelOptions, Normalisation, normalisation_layer


class CNNOptions(ModelOptions):
    """Options of ``cnn``."""

    source: ClassVar[str] = "3x3 convolutions, each followed by ReLU and a halving of the image"

    channels: tuple[Width, ...] = Field(
        default=(16, 32), min_length=1, max_length=3, description="filters of each convolution"
    )
    norm: Normalisation = Field(default="none", description="layer after each convolution")
    groups: Width = Field(default=8, description="groups of GroupNorm, divides channels")

    @model_validator(mode="after")
    def _groups_divide_channels(self) -> "CNNOptions":
        if self.norm == "group" and any(filters % self.groups for filters in self.channels):
            raise ValueError(
                "groups must divide every entry of channels, got "
                f"groups={self.groups} and channels={list(self.channels)}"
            )
        return self

    def build(self, input_shape: InputShape, num_classes: int) -> nn.Module:
        """Convolution, normalisation, ReLU and 2x2 maximum per stage, then one linear layer."""
        channels, height, width = input_shape
        layers: list[nn.Module] = []
        for filters in self.channels:
            layers += [
                nn.Conv2d(channels, filters, kernel_size=3, padding=1, bias=self.norm == "none"),
                normalisation_layer(self.norm, filters, groups=self.groups),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
            channels, height, width = filters, height // 2, width // 2
        return nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(channels * height * width, num_classes)
        )


class LeNetOptions(ModelOptions):
    """Options of ``lenet``: none, the layers are the paper's."""

    source: ClassVar[str] = "LeCun et al., 1998, LeNet-5, with ReLU and maximum pooling"

    def build(self, input_shape: InputShape, num_classes: int) -> nn.Module:
        """Two 5x5 convolutions (6 and 16 filters), then linear layers of 120, 84 and the classes.

        28x28 and 32x32 both reach the paper's 5x5 maps: the smaller image is padded by two pixels
        as the paper pads MNIST. An image too small for the second 5x5 window is padded there too
        (8x8 ends in 2x2 maps). One 28x28 channel and ten classes make 61,706 parameters.

        Source:
            LeCun, Bottou, Bengio, Haffner, 1998, section II.B.
            http://yann.lecun.com/exdb/publis/pdf/lecun-98.pdf
        """
        channels, height, width = input_shape
        first_rows, second_rows, map_height = _lenet_padding(height)
        first_columns, second_columns, map_width = _lenet_padding(width)
        return nn.Sequential(
            nn.Conv2d(channels, 6, kernel_size=5, padding=(first_rows, first_columns)),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, kernel_size=5, padding=(second_rows, second_columns)),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * map_height * map_width, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, num_classes),
        )


def _lenet_padding(side: int) -> tuple[int, int, int]:
    """Return the padding of both convolutions along one side, and the side of the last maps."""
    first = 0 if side >= 32 else 2
    halved = (side + 2 * first - 4) // 2
    second = 0 if halved >= 10 else 2
    return first, second, (halved + 2 * second - 4) // 2
