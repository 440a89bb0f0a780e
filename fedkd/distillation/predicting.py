"""Predictions in evaluation mode, in chunks."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

CHUNK_ROWS = 1024


@torch.no_grad()
def predict_logits(
    model: nn.Module, inputs: Float[Tensor, "rows channels height width"]
) -> Float[Tensor, "rows classes"]:
    """Return a model's logits; its modes are put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return torch.cat([model(chunk) for chunk in inputs.split(CHUNK_ROWS)])
    finally:
        for module, training in modes:
            module.training = training
