"""What an input is: a picture, a list of features, or a text. Its shape says which."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Kind = Literal["pictures", "features", "text"]

PADDING = 0
"""Number of the token that fills a text up to its length."""

UNKNOWN = 1
"""Number of the token that stands for all that the vocabulary does not have."""


@dataclass(frozen=True, slots=True)
class InputShape:
    """Shape of one input, and what its numbers are; iterating over it gives its sides.

    Three sides are a picture: channels, height and width. One side is a list of features, or,
    where there is a vocabulary, a text: numbers of tokens, `PADDING` where it has ended. They
    travel as floats like all inputs, which hold whole numbers up to 2**24 exactly.

    Attributes:
        sides: the shape.
        vocabulary: how many tokens there are, with the two above; None where numbers are none.

    Raises:
        ValueError: for any other shape.
    """

    sides: tuple[int, ...]
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        known = (1,) if self.vocabulary is not None else (1, 3)
        if len(self.sides) not in known or min(self.sides) < 1 or (self.vocabulary or 3) < 3:
            raise ValueError(
                "an input has the shape (channels, height, width), (features,), or (length,) with "
                f"a vocabulary of at least 3 tokens, got {self.sides}"
                + ("" if self.vocabulary is None else f" and a vocabulary of {self.vocabulary}")
            )

    def __iter__(self) -> Iterator[int]:
        return iter(self.sides)

    def __len__(self) -> int:
        return len(self.sides)

    def __str__(self) -> str:
        sides = "x".join(map(str, self.sides))
        if self.kind == "features":
            return f"{sides} features"
        return f"texts of {sides} tokens" if self.kind == "text" else f"pictures of {sides}"

    @property
    def kind(self) -> Kind:
        """What it is."""
        if self.vocabulary is not None:
            return "text"
        return "pictures" if len(self.sides) == 3 else "features"


Shape = InputShape | tuple[int, ...]
"""Where somebody builds a model: a bare shape has no vocabulary."""


def input_shape_of(shape: Shape) -> InputShape:
    """Return a shape that says what it is.

    Raises:
        ValueError: if it is that of no input.
    """
    return shape if isinstance(shape, InputShape) else InputShape(tuple(shape))


def per_channel(values: Float[Tensor, " channels"], ndim: int) -> Tensor:
    """Return numbers of each channel, or of each feature, to compute with inputs of ``ndim``.

    Args:
        values: one for each channel or feature.
        ndim: dimensions of one input: 3 for pictures, 1 for features.
    """
    return values.reshape(-1, *(1 for _ in range(ndim - 1)))


def blank(shape: Shape, rows: int) -> Float[Tensor, "rows *shape"]:
    """Return inputs of zeros, to find out shapes with."""
    return torch.zeros(rows, *shape)
