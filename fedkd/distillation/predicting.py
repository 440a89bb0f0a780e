"""Predictions in evaluation mode, in chunks."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedkd.randomness import seeded_everything

CHUNK_ROWS = 1024


class Predictions:
    """Logits of finished models, each computed once however many measures ask for them.

    Known by the model and by the tensor of inputs, both of which are kept alive; models must not
    change any more.

    Attributes:
        training: inputs of some rows of the training, by kind.
    """

    def __init__(self, training: Mapping[str, Tensor]) -> None:
        self.training = dict(training)
        self._known: dict[tuple[int, int], tuple[nn.Module, Tensor, Tensor]] = {}

    def logits(
        self, model: nn.Module, inputs: Float[Tensor, "rows channels height width"]
    ) -> Float[Tensor, "rows classes"]:
        """Return what `predict_logits` returns."""
        key = id(model), id(inputs)
        if key not in self._known:
            self._known[key] = model, inputs, predict_logits(model, inputs)
        return self._known[key][2]


@torch.no_grad()
def predict_logits(
    model: nn.Module, inputs: Float[Tensor, "rows channels height width"]
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
