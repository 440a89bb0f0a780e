"""A wide teacher and a thin student, in the manner of PyTorch's distillation tutorial.

Source: https://docs.pytorch.org/tutorials/beginner/knowledge_distillation_tutorial.html
Differs from the tutorial: the teacher's convolutions have 64, 64, 128 and 128 filters with
BatchNorm, the student has a single convolution of 6 filters, and both classifiers are one
linear layer without dropout.
"""

from typing import ClassVar

from torch import nn

from fedkd.inputs import InputShape
from fedkd.models.options import ModelOptions


def _convolution(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    ]


class TutorialTeacherOptions(ModelOptions):
    """Options of ``tutorial_teacher``: none."""

    source: ClassVar[str] = "PyTorch distillation tutorial, deep network (64-64-128-128, BatchNorm)"

    @property
    def channels_last(self) -> bool:  # noqa: D102
        return True

    def build(self, input_shape: InputShape, num_classes: int) -> nn.Module:
        """Two convolutions, halve, two convolutions, halve, then one linear layer."""
        channels, height, width = input_shape
        return nn.Sequential(
            *_convolution(channels, 64),
            *_convolution(64, 64),
            nn.MaxPool2d(2),
            *_convolution(64, 128),
            *_convolution(128, 128),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128 * (height // 4) * (width // 4), num_classes),
        )


class TutorialStudentOptions(ModelOptions):
    """Options of ``tutorial_student``: none."""

    source: ClassVar[str] = "PyTorch distillation tutorial, light network (one 3x3 convolution)"

    def build(self, input_shape: InputShape, num_classes: int) -> nn.Module:
        """One convolution of 6 filters, halve, then one linear layer."""
        channels, height, width = input_shape
        return nn.Sequential(
            nn.Conv2d(channels, 6, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(6 * (height // 2) * (width // 2), num_classes),
        )
