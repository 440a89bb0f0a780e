"""Residual networks for small images, with GroupNorm unless BatchNorm is asked for.

Source: He, Zhang, Ren, Sun, 2016, section 4.2 (CIFAR-10). https://arxiv.org/abs/1512.03385
Differs from the paper: GroupNorm by default. Clients that see few classes have batch statistics
of their own, and BatchNorm then loses accuracy (Hsieh et al., 2020, section 5,
https://arxiv.org/abs/1910.00189). ``norm: batch`` gives the paper's network.
"""

from typing import ClassVar, Literal

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from fedkd.bounds import Width
from fedkd.inputs import InputShape
from fedkd.models.options import ModelOptions, normalisation_layer


class _ResNetOptions(ModelOptions):
    blocks_per_stage: ClassVar[int]

    norm: Literal["group", "batch"] = Field(
        default="group", description="layer after each convolution"
    )
    width: Width = Field(
        default=16, description="filters of the first stage; the next two have 2x and 4x"
    )
    groups: Width = Field(default=8, description="groups of GroupNorm, divides width")

    @model_validator(mode="after")
    def _groups_divide_width(self) -> "_ResNetOptions":
        if self.norm == "group" and self.width % self.groups:
            raise ValueError(
                f"groups must divide width, got groups={self.groups} and width={self.width}"
            )
        return self

    def build(self, input_shape: InputShape, num_classes: int) -> nn.Module:
        """Three stages of residual blocks on the image, its half and its quarter, then a mean."""
        channels, _, _ = input_shape
        return ResNet(
            channels,
            num_classes,
            blocks_per_stage=self.blocks_per_stage,
            width=self.width,
            norm=self.norm,
            groups=self.groups,
        )


class ResNet8Options(_ResNetOptions):
    """Options of ``resnet8``: one block per stage."""

    source: ClassVar[str] = "He et al., 2016, CIFAR ResNet with n=1"
    blocks_per_stage: ClassVar[int] = 1


class ResNet20Options(_ResNetOptions):
    """Options of ``resnet20``: three blocks per stage."""

    source: ClassVar[str] = "He et al., 2016, CIFAR ResNet with n=3"
    blocks_per_stage: ClassVar[int] = 3


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions added to a shortcut that has no parameters (option A of the paper)."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        stride: int,
        norm: Literal["group", "batch"],
        groups: int,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = channels_out - channels_in
        self.conv1 = nn.Conv2d(
            channels_in, channels_out, kernel_size=3, stride=stride, padding=1, bias=False
        )
        self.norm1 = normalisation_layer(norm, channels_out, groups=groups)
        self.conv2 = nn.Conv2d(channels_out, channels_out, kernel_size=3, padding=1, bias=False)
        self.norm2 = normalisation_layer(norm, channels_out, groups=groups)

    def forward(
        self, images: Float[Tensor, "batch channels_in height width"]
    ) -> Float[Tensor, "batch channels_out height_out width_out"]:
        """Return ``relu(shortcut(images) + residual(images))``."""
        residual = F.relu(self.norm1(self.conv1(images)))
        residual = self.norm2(self.conv2(residual))
        shortcut = images
        if self.stride > 1:
            shortcut = shortcut[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(shortcut + residual)


class ResNet(nn.Module):
    """A 3x3 convolution, three stages of residual blocks, the mean over the image, a linear layer.

    With n blocks per stage it has 6n + 2 weighted layers.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        blocks_per_stage: int,
        width: int,
        norm: Literal["group", "batch"],
        groups: int,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False)
        self.norm = normalisation_layer(norm, width, groups=groups)
        blocks = []
        channels_in = width
        for stage_width in (width, 2 * width, 4 * width):
            for _ in range(blocks_per_stage):
                stride = 1 if stage_width == channels_in else 2
                blocks.append(
                    ResidualBlock(channels_in, stage_width, stride=stride, norm=norm, groups=groups)
                )
                channels_in = stage_width
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # He et al., 2015: keeps the variance of ReLU networks the same at every depth.
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes"]:
        """Return class logits."""
        features = self.blocks(F.relu(self.norm(self.conv(images))))
        # A plain mean: the backward pass of AdaptiveAvgPool2d is not deterministic on CUDA.
        logits: Tensor = self.classifier(features.mean(dim=(2, 3)))
        return logits
