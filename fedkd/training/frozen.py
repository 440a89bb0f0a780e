"""Models that never train: those brought in for a call, and running averages of weights.

A running average stays with its client, as named arrays of the state:
``average/<average>/<model>/weights/<weight>`` and ``average/<average>/<model>/updates``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedkd.tensors import as_tensor
from fedkd.training.cohort import (
    WeightsForMembers,
    check_weights,
    weights_of_each,
)
from fedkd.training.state import AVERAGE, Arrays, ClientState, check_named_array

RESERVED = (AVERAGE, "exchange/")
"""How names begin that an algorithm cannot give: a codec's memory stays in the same place."""


@dataclass(frozen=True, slots=True)
class FrozenModel:
    """Weights of a model that never trains.

    Attributes:
        like: the model whose architecture it has.
        weights: one set for all members, or one for each.
    """

    like: str
    weights: WeightsForMembers

    @property
    def is_shared(self) -> bool:
        """Whether all members have the same weights."""
        return isinstance(self.weights, Mapping)

    def own(self, position: int) -> Mapping[str, np.ndarray]:
        """Return one member's weights."""
        return self.weights if isinstance(self.weights, Mapping) else self.weights[position]


def frozen_model(
    name: str,
    weights: WeightsForMembers,
    like: str,
    *,
    models: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    members: int,
) -> FrozenModel:
    """Return a model that never trains, with copies of its weights.

    Raises:
        ValueError: if a model of the members has that name, or the weights do not fit.
    """
    if name in models or not name or "/" in name:
        raise ValueError(
            f"a frozen model needs a name without '/' that no model of the clients has, got "
            f"{name!r}; the clients have {', '.join(models)}"
        )
    each = weights_of_each(weights, members)
    for own in each[:1] if isinstance(weights, Mapping) else each:
        check_weights(own, shapes)
    if isinstance(weights, Mapping):
        return FrozenModel(like, {key: array.copy() for key, array in weights.items()})
    return FrozenModel(like, [{key: a.copy() for key, a in own.items()} for own in each])


class KeptArrays:
    """What an algorithm keeps with each client, by name, in the order of the members."""

    def __init__(self, states: Sequence[ClientState]) -> None:
        self._arrays: list[Arrays] = [dict(state.arrays) for state in states]

    def keep(self, name: str, values: Sequence[np.ndarray | None]) -> None:
        """Keep copies of these arrays; None forgets what there was."""
        if len(values) != len(self._arrays):
            raise ValueError(
                f"kept array {name!r} needs one array for each of {len(self._arrays)} members, "
                f"got {len(values)}"
            )
        if name.startswith(RESERVED):
            raise ValueError(
                f"names that begin with {' or '.join(RESERVED)} are those of running averages and "
                f"codecs, got {name!r}"
            )
        for value in values:
            check_named_array(name, np.zeros(0) if value is None else value)
        for own, value in zip(self._arrays, values, strict=True):
            if value is None:
                own.pop(name, None)
            else:
                own[name] = _read_only(value)

    def kept(self, name: str) -> list[np.ndarray | None]:
        """Return what each member keeps under a name."""
        found = [own.get(name) for own in self._arrays]
        return [None if array is None else _view(array) for array in found]

    def of(self, position: int) -> Arrays:
        """Return all that one member keeps."""
        return dict(self._arrays[position])

    # -- running averages ------------------------------------------------------------------

    def averaged_model(self, average: str) -> str | None:
        """Return the model that every member has an average of; None where one has not."""
        models = [
            {
                name.removeprefix(f"{AVERAGE}{average}/").split("/", 1)[0]
                for name in own
                if name.startswith(f"{AVERAGE}{average}/")
            }
            for own in self._arrays
        ]
        common = set.intersection(*models) if models else set()
        return min(common) if common else None

    def average(self, average: str, model: str, position: int) -> tuple[Arrays, int] | None:
        """Return a member's average weights and how often they were updated; None: never."""
        prefix = f"{AVERAGE}{average}/{model}/"
        own = self._arrays[position]
        if f"{prefix}updates" not in own:
            return None
        weights = {
            name.removeprefix(f"{prefix}weights/"): array
            for name, array in own.items()
            if name.startswith(f"{prefix}weights/")
        }
        return weights, int(own[f"{prefix}updates"])

    def keep_average(
        self, average: str, model: str, position: int, weights: Arrays, updates: int
    ) -> None:
        """Keep a member's average weights."""
        prefix = f"{AVERAGE}{average}/{model}/"
        own = self._arrays[position]
        own[f"{prefix}updates"] = np.array(updates, np.int64)
        for name, array in weights.items():
            own[f"{prefix}weights/{name}"] = array


def fold_in(
    average: Mapping[str, Tensor], weights: Mapping[str, Tensor], share_of_new: float | Tensor
) -> None:
    """Move average weights towards the newest ones, in place.

    Args:
        average: tensors by name, of one model or of stacked ones.
        weights: the same of the model that is averaged.
        share_of_new: a number, or ``[members]`` of them for stacked models.
    """
    with torch.no_grad():
        for name, mean in average.items():
            newest = weights[name]
            if not mean.is_floating_point():
                mean.copy_(newest)
            elif isinstance(share_of_new, Tensor):
                share = share_of_new.to(mean.dtype).reshape(-1, *[1] * (mean.ndim - 1))
                mean.lerp_(newest, share.expand_as(mean))
            else:
                mean.lerp_(newest, share_of_new)


def copied_tensors(weights: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Return weights as tensors of their own."""
    return {name: as_tensor(array).to(device, copy=True) for name, array in weights.items()}


def _read_only(array: np.ndarray) -> np.ndarray:
    copied = np.array(array, order="C")
    copied.flags.writeable = False
    return copied


def _view(array: np.ndarray) -> np.ndarray:
    seen = array.view()
    seen.flags.writeable = False
    return seen
