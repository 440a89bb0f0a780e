"""Predictions in evaluation mode, in chunks."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedkd.randomness import seeded_everything

CHUNK_ROWS = 1024


@torch.no_grad()
def predict_logits(
    model: nn.Module, inputs: Float[Tensor, "rows *shape"]
) -> Float[Tensor, "rows classes"]:
    """Return a model's logits; its modes are put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # A model of one's own may draw numbers here, too: the same for the same question.
        with seeded_everything(0):
            return torch.cat([model(chunk) for chunk in inputs.split(CHUNK_ROWS)])
    finally:
        for module, training in modes:
            module.training = training


def finite(logits: Float[Tensor, "rows classes"], whose: str) -> Float[Tensor, "rows classes"]:
    """Return logits that somebody learns from.

    Raises:
        ValueError: naming ``whose`` they are, if one is NaN or infinite: it has no
            probabilities to teach.
    """
    wrong = int((~torch.isfinite(logits).all(dim=-1)).sum())
    if wrong:
        raise ValueError(f"{whose} predicts NaN or infinity for {wrong} of {len(logits)} rows")
    return logits
