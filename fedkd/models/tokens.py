"""Texts on their way into a model: numbers of tokens, which travel as floats."""

from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from fedkd.inputs import PADDING


class TokenNumbers(nn.Module):
    """Turns floats that hold numbers of tokens into whole numbers, which an embedding looks up."""

    def forward(self, tokens: Float[Tensor, "batch length"]) -> Int64[Tensor, "batch length"]:
        """Return the same as int64."""
        return tokens.long()


def is_filling(tokens: Int64[Tensor, "batch length"]) -> Bool[Tensor, "batch length"]:
    """Tell which tokens only fill a text up to its length."""
    return tokens == PADDING
