"""Augmentation of image batches on tensors: every row draws for itself from a generator handed in.

Images are [batch, channels, height, width] with values in [0, 1]; where a change could leave that
range, the result is clamped to it. Numbers are drawn on the generator's device and then moved, so
a CPU generator gives the same views whatever device the images are on. One generator state and
one batch give one result: a step that is repeated sees the same views again.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedkd.bounds import Real, Share, Whole
from fedkd.inputs import Kind

__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "AugmentationSettings",
    "Mix",
    "TeacherView",
    "Views",
    "add_gaussian_noise",
    "cutout",
    "flip_horizontally",
    "jitter_colours",
    "mixup",
    "pad_and_crop",
    "rotate_quarter_turns",
    "teacher_student_views",
]

TeacherView = Literal["same", "clean", "independent"]

_LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in what the eye sees as grey: ITU-R BT.601."""


def flip_horizontally(
    inputs: Float[Tensor, "batch channels height width"],
    generator: torch.Generator,
    *,
    probability: int | float = 0.5,
) -> Float[Tensor, "batch channels height width"]:
    """Mirror each image left to right with some probability.

    Args:
        inputs: images.
        generator: one number is drawn per image.
        probability: in [0, 1].

    Raises:
        ValueError: if ``probability`` is outside [0, 1].

    Source:
        Krizhevsky, Sutskever, Hinton, 2012, section 4.1. https://doi.org/10.1145/3065386
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must be in [0, 1], got {probability}")
    flipped = _uniform(inputs, generator) < probability
    return torch.where(flipped[:, None, None, None], inputs.flip(-1), inputs)


def pad_and_crop(
    inputs: Float[Tensor, "batch channels height width"],
    generator: torch.Generator,
    *,
    padding: int = 4,
) -> Float[Tensor, "batch channels height width"]:
    """Shift each image by up to ``padding`` pixels in both directions; zeros move in.

    Args:
        inputs: images.
        generator: two offsets are drawn per image, each one of 2 * padding + 1 equally often.
        padding: pixels of zeros put around the image before it is cut to its old size, >= 0.

    Raises:
        ValueError: if ``padding`` is negative.

    Source:
        He, Zhang, Ren, Sun, 2015, section 4.2 (padding 4 on 32x32). https://arxiv.org/abs/1512.03385
    """
    if padding < 0:
        raise ValueError(f"padding must be >= 0, got {padding}")
    batch, channels, height, width = inputs.shape
    offsets = _integers(inputs, generator, 2 * padding + 1, columns=2)
    device = inputs.device
    rows = offsets[:, :1] + torch.arange(height, device=device)
    columns = offsets[:, 1:] + torch.arange(width, device=device)
    padded = F.pad(inputs, (padding, padding, padding, padding))
    return padded[
        torch.arange(batch, device=device)[:, None, None, None],
        torch.arange(channels, device=device)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def rotate_quarter_turns(
    inputs: Float[Tensor, "batch channels height width"], generator: torch.Generator
) -> Float[Tensor, "batch channels height width"]:
    """Turn each square image by 0, 90, 180 or 270 degrees counter-clockwise, equally often.

    Args:
        inputs: images, height equal to width.
        generator: one number is drawn per image.

    Raises:
        ValueError: if the images are not square.

    Source:
        Cohen, Welling, 2016, section 8.2 (the turns of the group p4). https://arxiv.org/abs/1602.07576
    """
    height, width = inputs.shape[-2:]
    if height != width:
        raise ValueError(f"quarter turns need square images, got {height}x{width}")
    turned = torch.stack([inputs.rot90(turns, dims=(-2, -1)) for turns in range(4)])
    turns = _integers(inputs, generator, 4, columns=1)[:, 0]
    return turned[turns, torch.arange(len(inputs), device=inputs.device)]


def jitter_colours(
    inputs: Float[Tensor, "batch channels height width"],
    generator: torch.Generator,
    *,
    brightness: int | float = 0.4,
    contrast: int | float = 0.4,
    saturation: int | float = 0.4,
) -> Float[Tensor, "batch channels height width"]:
    """Change brightness, then contrast, then saturation of each image by random factors.

    With a factor f, uniform in [1 - strength, 1 + strength]: brightness is ``f * image``,
    contrast ``f * image + (1 - f) * mean grey``, saturation ``f * image + (1 - f) * grey image``,
    each clamped to [0, 1]. A strength of 0 leaves its step out and draws nothing.

    Args:
        inputs: images in [0, 1] with one channel (grey) or three (red, green, blue). A grey image
            has no saturation to change.
        generator: one number is drawn per image and step.
        brightness: strength, in [0, 1].
        contrast: strength, in [0, 1].
        saturation: strength, in [0, 1].

    Raises:
        ValueError: if a strength is outside [0, 1], or on neither one nor three channels.

    Source:
        Howard, 2013, section 2.2. https://arxiv.org/abs/1312.5402. The formulas are those of
        torchvision's ColorJitter, which changes the order of the steps at random and has a hue.
    """
    for name, strength in (
        ("brightness", brightness),
        ("contrast", contrast),
        ("saturation", saturation),
    ):
        if not 0 <= strength <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {strength}")
    if inputs.shape[1] not in (1, 3):
        raise ValueError(f"colour jitter needs 1 or 3 channels, got {inputs.shape[1]}")
    images = inputs
    if brightness:
        images = _blend(images, torch.zeros_like(images), brightness, generator)
    if contrast:
        mean_grey = _grey(images).mean(dim=(-3, -2, -1), keepdim=True)
        images = _blend(images, mean_grey, contrast, generator)
    if saturation and inputs.shape[1] == 3:
        images = _blend(images, _grey(images), saturation, generator)
    return images


def add_gaussian_noise(
    inputs: Float[Tensor, "batch channels height width"],
    generator: torch.Generator,
    *,
    std: int | float = 0.1,
) -> Float[Tensor, "batch channels height width"]:
    """Add independent Gaussian noise to every value and clamp the result to [0, 1].

    Args:
        inputs: images in [0, 1].
        generator: one number is drawn per value.
        std: standard deviation of the noise, in units of the values, >= 0.

    Raises:
        ValueError: if ``std`` is negative.

    Source:
        Sietsma, Dow, 1991. https://doi.org/10.1016/0893-6080(91)90033-2
    """
    if std < 0:
        raise ValueError(f"std must be >= 0, got {std}")
    noise = torch.randn(inputs.shape, generator=generator, device=generator.device)
    return (inputs + std * noise.to(inputs)).clamp(0, 1)


def cutout(
    inputs: Float[Tensor, "batch channels height width"],
    generator: torch.Generator,
    *,
    size: int = 8,
) -> Float[Tensor, "batch channels height width"]:
    """Set one square of each image to zero; its centre is any pixel, the border may cut it.

    Args:
        inputs: images.
        generator: two numbers are drawn per image.
        size: side of the square in pixels, >= 1 and at most the image's shorter side. An even
            square reaches half its side above and left of its centre, one less below and right.

    Raises:
        ValueError: if ``size`` does not fit the image.

    Source:
        DeVries, Taylor, 2017, section 3.2. https://arxiv.org/abs/1708.04552
    """
    height, width = inputs.shape[-2:]
    if not 1 <= size <= min(height, width):
        raise ValueError(
            f"cutout size must be in [1, {min(height, width)}] on {height}x{width} images, "
            f"got {size}"
        )
    top = _integers(inputs, generator, height, columns=1) - size // 2
    left = _integers(inputs, generator, width, columns=1) - size // 2
    rows = torch.arange(height, device=inputs.device)
    columns = torch.arange(width, device=inputs.device)
    in_rows = (rows >= top) & (rows < top + size)
    in_columns = (columns >= left) & (columns < left + size)
    hole = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    return inputs.masked_fill(hole, 0.0)


@dataclass(frozen=True, slots=True)
class Mix:
    """How one batch was mixed; whatever belongs to its rows is mixed alike.

    Attributes:
        permutation: the partner of each row.
        share: weight of the row itself, in [0, 1]; the partner has the rest.
    """

    permutation: Int[Tensor, " batch"]
    share: float

    def apply(self, values: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch *rest"]:
        """Return ``share * values + (1 - share) * values[permutation]``.

        For images and for probabilities. Not for logits: the softmax of mixed logits is another
        distribution than the mixture.
        """
        return self.share * values + (1 - self.share) * values[self.permutation]

    def apply_to_labels(
        self, labels: Int[Tensor, " batch"], *, num_classes: int
    ) -> Float[Tensor, "batch {num_classes}"]:
        """Return class probabilities that follow the mix.

        Cross-entropy against them equals ``share * CE(labels) + (1 - share) * CE(partners')``.

        Args:
            labels: class of each row before the mix, in [0, num_classes).
            num_classes: classes of the model.
        """
        return self.apply(F.one_hot(labels.long(), num_classes).to(torch.get_default_dtype()))


def mixup(
    inputs: Float[Tensor, "batch *shape"],
    generator: torch.Generator,
    *,
    alpha: int | float = 0.2,
) -> tuple[Float[Tensor, "batch *shape"], Mix]:
    """Mix each row with another one of the batch; one share for the whole batch.

    Args:
        inputs: pictures or features.
        generator: draws the share from Beta(alpha, alpha), and the partners.
        alpha: > 0; small values leave one of the two nearly alone, 1 is uniform.

    Returns:
        The mixed rows, and the `Mix` that labels and targets must follow.

    Raises:
        ValueError: if ``alpha`` is not positive and finite.

    Source:
        Zhang, Cisse, Dauphin, Lopez-Paz, 2017, equation 1. https://arxiv.org/abs/1710.09412
        One share per batch, as in the authors' code.
    """
    if not 0 < alpha < float("inf"):
        raise ValueError(f"mixup alpha must be > 0 and finite, got {alpha}")
    # torch has no public Beta sampler that takes a generator; NumPy's gets its seed from ours.
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    share = float(np.random.default_rng(int(seed)).beta(alpha, alpha))
    permutation = torch.randperm(len(inputs), generator=generator, device=generator.device)
    mix = Mix(permutation.to(inputs.device), share)
    return mix.apply(inputs), mix


class Augmentation(NamedTuple):
    """One line of a listing of augmentations."""

    function: Callable[..., Any]
    source: str
    """Where the idea comes from."""
    defaults: dict[str, int | float]
    """Each parameter of the function with its default."""


def _listed(function: Callable[..., Any], source: str) -> Augmentation:
    parameters = inspect.signature(function).parameters.values()
    keywords = {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}
    return Augmentation(function, source, keywords)


AUGMENTATIONS: dict[str, Augmentation] = {
    "horizontal_flip": _listed(flip_horizontally, "Krizhevsky et al., 2012"),
    "pad_and_crop": _listed(pad_and_crop, "He et al., 2015"),
    "quarter_turns": _listed(rotate_quarter_turns, "Cohen and Welling, 2016"),
    "colour_jitter": _listed(jitter_colours, "Howard, 2013"),
    "gaussian_noise": _listed(add_gaussian_noise, "Sietsma and Dow, 1991"),
    "cutout": _listed(cutout, "DeVries and Taylor, 2017"),
    "mixup": _listed(mixup, "Zhang et al., 2017"),
}
"""Every augmentation by name."""


FOR_PICTURES = frozenset(
    {
        *("horizontal_flip", "pad_and_crop", "quarter_turns", "brightness", "contrast"),
        *("saturation", "gaussian_noise", "cutout"),
    }
)
"""Changes of pixels, which are in [0, 1] and have neighbours."""


class AugmentationSettings(BaseModel):
    """Which changes each training image gets, in the order of the fields; all off by default.

    What is off draws no number, so it does not move the draws of the others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    horizontal_flip: Share = Field(
        default=0.0, description="probability of a mirror image; 0 is off"
    )
    pad_and_crop: Whole = Field(
        default=0, ge=0, le=1024, description="largest shift in pixels, zeros move in; 0 is off"
    )
    quarter_turns: bool = Field(
        default=False, description="turn square images by a random multiple of 90 degrees"
    )
    brightness: Share = Field(
        default=0.0, description="strength: factor in [1 - s, 1 + s]; 0 is off"
    )
    contrast: Share = Field(default=0.0, description="strength: factor in [1 - s, 1 + s]; 0 is off")
    saturation: Share = Field(
        default=0.0,
        description="strength: factor in [1 - s, 1 + s]; nothing to change on grey; 0 is off",
    )
    gaussian_noise: Real = Field(
        default=0.0,
        ge=0,
        le=100,
        description="standard deviation, on pixel values in [0, 1]; 0 is off",
    )
    cutout: Whole = Field(
        default=0, ge=0, le=65_536, description="side of the erased square, pixels; 0 is off"
    )
    mixup: Real = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="alpha of the Beta(alpha, alpha) share of two mixed images; 0 is off",
    )
    teacher_view: TeacherView = Field(
        default="same",
        description=(
            "what the teacher sees: same: the student's view; clean: the image as it is; "
            "independent: a view of its own"
        ),
    )

    def check(self, kind: Kind, setting: str) -> None:
        """Refuse changes that make no sense on some kind of inputs.

        Features can be mixed; numbers of tokens cannot be changed at all.

        Args:
            kind: of the inputs.
            setting: what the augmentation is called, such as ``training.augmentation``.

        Raises:
            ValueError: naming the first change that is on and cannot be.
        """
        possible = {"pictures": FOR_PICTURES | {"mixup"}, "features": {"mixup"}, "text": set()}
        for name in (*sorted(FOR_PICTURES), "mixup"):
            value = getattr(self, name)
            if value and name not in possible[kind]:
                what = "pictures" if name in FOR_PICTURES else "pictures and features"
                raise ValueError(
                    f"{setting}.{name} is for {what}, and data.source holds {kind}: leave it out, "
                    f"got {value}"
                )

    def apply(
        self, inputs: Float[Tensor, "batch *shape"], generator: torch.Generator
    ) -> Float[Tensor, "batch *shape"]:
        """Return one view of each image: every change that is on, except ``mixup``.

        ``mixup`` changes labels too, see `teacher_student_views`. With everything off, these are
        the inputs themselves.

        Raises:
            ValueError: if a change cannot work on images of this shape.
        """
        images = inputs
        if self.horizontal_flip:
            images = flip_horizontally(images, generator, probability=self.horizontal_flip)
        if self.pad_and_crop:
            images = pad_and_crop(images, generator, padding=self.pad_and_crop)
        if self.quarter_turns:
            images = rotate_quarter_turns(images, generator)
        if self.brightness or self.contrast or self.saturation:
            images = jitter_colours(
                images,
                generator,
                brightness=self.brightness,
                contrast=self.contrast,
                saturation=self.saturation,
            )
        if self.gaussian_noise:
            images = add_gaussian_noise(images, generator, std=self.gaussian_noise)
        if self.cutout:
            images = cutout(images, generator, size=self.cutout)
        return images


@dataclass(frozen=True, slots=True)
class Views:
    """What the student and the teacher see of one batch.

    Attributes:
        student: the student's images, mixed where ``mixup`` is on.
        teacher: the teacher's images; mixed only where they are the student's.
        mix: how the student's images were mixed; None where they were not. Labels follow it.
        teacher_is_mixed: whether the teacher's images went through the same mix.
    """

    student: Float[Tensor, "batch *shape"]
    teacher: Float[Tensor, "batch *shape"]
    mix: Mix | None
    teacher_is_mixed: bool

    def targets(
        self, teacher_probabilities: Float[Tensor, "batch classes"]
    ) -> Float[Tensor, "batch classes"]:
        """Return the targets that belong to the student's images.

        A teacher that saw the mixed images has answered for them already. What it says about
        single images (a clean or independent view, or a cache of clean outputs) is mixed.

        Args:
            teacher_probabilities: softened class probabilities for ``teacher``.
        """
        if self.mix is None or self.teacher_is_mixed:
            return teacher_probabilities
        return self.mix.apply(teacher_probabilities)


def teacher_student_views(
    inputs: Float[Tensor, "batch *shape"],
    settings: AugmentationSettings,
    generator: torch.Generator,
) -> Views:
    """Return the student's and the teacher's view of a batch.

    The student's view is drawn first, so ``teacher_view`` does not change what the student sees.

    Args:
        inputs: images in [0, 1] as the data holds them; never changed.
        settings: the changes, and what the teacher sees.
        generator: of this batch.

    Source:
        Beyer et al., 2022, section 3.1: a teacher that sees what the student sees ("consistent
        teaching") against fixed or independent views. https://arxiv.org/abs/2106.05237
    """
    student = settings.apply(inputs, generator)
    mix = None
    if settings.mixup:
        student, mix = mixup(student, generator, alpha=settings.mixup)
    match settings.teacher_view:
        case "same":
            teacher = student
        case "clean":
            teacher = inputs
        case "independent":
            teacher = settings.apply(inputs, generator)
    return Views(student, teacher, mix, teacher_is_mixed=settings.teacher_view == "same")


def _uniform(inputs: Tensor, generator: torch.Generator) -> Float[Tensor, " batch"]:
    """Draw one number in [0, 1) per image."""
    return torch.rand(len(inputs), generator=generator, device=generator.device).to(inputs.device)


def _integers(
    inputs: Tensor, generator: torch.Generator, below: int, *, columns: int
) -> Int[Tensor, "batch columns"]:
    """Draw whole numbers in [0, below), ``columns`` per image."""
    drawn = torch.randint(
        below, (len(inputs), columns), generator=generator, device=generator.device
    )
    return drawn.to(inputs.device)


def _blend(
    images: Tensor, other: Tensor, strength: int | float, generator: torch.Generator
) -> Tensor:
    factor = 1 + strength * (2 * _uniform(images, generator) - 1)
    factor = factor.to(images.dtype)[:, None, None, None]
    return (factor * images + (1 - factor) * other).clamp(0, 1)


def _grey(images: Tensor) -> Float[Tensor, "batch 1 height width"]:
    if images.shape[1] == 1:
        return images
    shares = torch.tensor(_LUMA, dtype=images.dtype, device=images.device)
    return (images * shares[:, None, None]).sum(dim=1, keepdim=True)
