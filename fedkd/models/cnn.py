"""Small convolutional networks: a plain one for quick runs, and LeNet-5 with modern parts."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from torch import nn

from fedkd.bounds import Whole, Width
from fedkd.inputs import InputShape
from fedkd.models.options import ModelOptions, Normalisation, normalisation_layer


class CNNOptions(ModelOptions):
    """Options of ``cnn``."""

    source: ClassVar[str] = "convolutions with ReLU that halve the image, then linear layers"

    channels: tuple[Width, ...] = Field(
        default=(16, 32), min_length=1, max_length=3, description="filters of each convolution"
    )
    norm: Normalisation = Field(default="none", description="layer after each convolution")
    groups: Width = Field(default=8, description="groups of GroupNorm, divides channels")
    kernel: Annotated[Whole, Field(ge=1, le=15)] = Field(
        default=3, description="side of each convolution's window in pixels"
    )
    padding: Literal["same", "none"] = Field(
        default="same",
        description="same: zeros around the image, so that a window of odd side keeps its size",
    )
    halving: Literal["pool", "last", "stride"] = Field(
        default="pool",
        description="pool: the 2x2 maximum after each convolution; last: after the last one alone; "
        "stride: each convolution takes every other pixel",
    )
    hidden: tuple[Width, ...] = Field(
        default=(),
        max_length=3,
        description="width of each linear layer, with ReLU, before the last",
    )
    bias: bool = Field(
        default=True, description="whether linear layers, and convolutions without norm, have one"
    )

    @model_validator(mode="after")
    def _groups_divide_channels(self) -> "CNNOptions":
        if self.norm == "group" and any(filters % self.groups for filters in self.channels):
            raise ValueError(
                "groups must divide every entry of channels, got "
                f"groups={self.groups} and channels={list(self.channels)}"
            )
        return self

    @model_validator(mode="after")
    def _same_needs_an_odd_window(self) -> "CNNOptions":
        if self.padding == "same" and self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd with padding=same, got {self.kernel}")
        return self

    @property
    def channels_last(self) -> bool:  # noqa: D102
        # Measured: pooling gains most; convolutions that take every other pixel lose.
        return self.halving != "stride"

    def build(self, input_shape: InputShape, num_classes: int) -> nn.Module:
        """Convolution, normalisation, ReLU and halving per stage, then linear layers.

        Raises:
            ValueError: if nothing is left of the image.
        """
        channels, height, width = input_shape
        sides = [height, width]
        layers: list[nn.Module] = []
        for stage, filters in enumerate(self.channels):
            layers += [
                nn.Conv2d(
                    channels,
                    filters,
                    kernel_size=self.kernel,
                    padding=self._padding,
                    stride=2 if self.halving == "stride" else 1,
                    bias=self.bias and self.norm == "none",
                ),
                normalisation_layer(self.norm, filters, groups=self.groups),
                nn.ReLU(),
            ]
            pooled = self._pooled(stage)
            if pooled:
                layers.append(nn.MaxPool2d(2))
            channels, sides = filters, [self._side_after(side, pooled=pooled) for side in sides]
        if min(sides) < 1:
            raise ValueError(
                f"nothing is left of an image of {height}x{width} after {len(self.channels)} "
                f"convolutions of kernel={self.kernel}: use padding=same, a smaller kernel, fewer "
                "channels or larger images"
            )
        features = channels * sides[0] * sides[1]
        layers.append(nn.Flatten())
        for hidden in self.hidden:
            layers += [nn.Linear(features, hidden, bias=self.bias), nn.ReLU()]
            features = hidden
        return nn.Sequential(*layers, nn.Linear(features, num_classes, bias=self.bias))

    @property
    def _padding(self) -> int:
        return self.kernel // 2 if self.padding == "same" else 0

    def _pooled(self, stage: int) -> bool:
        last = stage == len(self.channels) - 1
        return self.halving == "pool" or (self.halving == "last" and last)

    def _side_after(self, side: int, *, pooled: bool) -> int:
        """Return a side of the maps that a stage leaves; below 1 where its window does not fit."""
        windows = side + 2 * self._padding - self.kernel + 1
        if self.halving == "stride":
            windows = (windows + 1) // 2
        return windows // 2 if pooled else windows


class LeNetOptions(ModelOptions):
    """Options of ``lenet``: none, the layers are the paper's."""

    source: ClassVar[str] = "LeCun et al., 1998, LeNet-5, with ReLU and maximum pooling"

    @property
    def channels_last(self) -> bool:  # noqa: D102
        return True

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
