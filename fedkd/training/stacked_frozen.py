"""Models that stand beside those that learn, for all members of a stack: frozen ones, averages."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedkd.training.cohort import Average
from fedkd.training.frozen import fold_in
from fedkd.training.stacking import Skeleton, Stack


class StackedFrozen:
    """A model that never trains, for all members.

    Attributes:
        skeleton: its module, always in evaluation mode.
        own: tensors ``[members, ...]`` where each member has its own.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        shared: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
        own_code: bool,
    ) -> None:
        self.skeleton, self.own = skeleton, own
        self._shared = shared
        self._own_code = own_code

    def logits(self, own: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """Return what it says about one member's rows."""
        tensors = own or self._shared
        if self._own_code:
            # Somebody else's module may write to its buffers in evaluation mode as well.
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        with torch.no_grad():
            self.skeleton.module.eval()
            return self.skeleton.logits(tensors, inputs)


class StackedAverage:
    """All members' running averages of one model while it trains.

    Attributes:
        model: whose weights.
        tensors: ``[members, ...]`` by name, as the model's stack keeps its own.
        updates: how many there were, ``[members]``.
    """

    def __init__(
        self, average: Average, model: str, tensors: dict[str, Tensor], updates: np.ndarray
    ) -> None:
        self.model, self.tensors, self.updates = model, tensors, updates
        self._average = average

    def update(self, stack: Stack, here: slice) -> None:
        """Follow the members that have just taken a step."""
        shares = [self._average.share_of_new(int(count)) for count in self.updates[here]]
        device = next(iter(self.tensors.values())).device
        fold_in(
            {name: tensor[here] for name, tensor in self.tensors.items()},
            {name: tensor[here] for name, tensor in stack.tensors.items()},
            torch.tensor(shares, dtype=torch.float64, device=device),
        )
        self.updates[here] += 1
