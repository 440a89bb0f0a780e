"""What finished models say, asked once."""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from fedkd.distillation.task.predicting import predict_logits


class FinishedLogits:
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
        self, model: nn.Module, inputs: Float[Tensor, "rows *shape"]
    ) -> Float[Tensor, "rows classes"]:
        """Return what `predict_logits` returns."""
        key = id(model), id(inputs)
        if key not in self._known:
            self._known[key] = model, inputs, predict_logits(model, inputs)
        return self._known[key][2]
