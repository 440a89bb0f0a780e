"""Pruning: weights that are zero and stay zero, through training, loading and averaging.

`prune_weights` leaves the work to ``torch.nn.utils.prune``: a layer computes with
``weight_orig * weight_mask``, so whatever momentum, weight decay or a loaded state does to
``weight_orig``, the pruned weights act as zeros. An optimizer built before still holds the right
parameters. What leaves the process has the plain names: `dense_state`.

Source:
    Han, Pool, Tran, Dally, 2015, section 3. https://arxiv.org/abs/1506.02626
"""

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.utils import prune

from fedkd.bounds import ShareBelowOne
from fedkd.randomness import seeded_torch

Values = TypeVar("Values", Tensor, np.ndarray)

# Not subclasses: the masks work through a hook on the layer's own call, which torch's attention
# for one goes round.
_PRUNED_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ORIGINAL, _MASK = "weight_orig", "weight_mask"


class PruningSettings(BaseModel):
    """How many weights of linear and convolution layers go, and which."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    amount: ShareBelowOne = Field(
        default=0.5, description="share of the weights not yet pruned that goes"
    )
    method: Literal["magnitude", "random"] = Field(
        default="magnitude", description="magnitude: the smallest absolute values; random: any"
    )
    scope: Literal["global", "layer"] = Field(
        default="global",
        description="global: one ranking over all layers; layer: the same share of each",
    )


class TensorSparsity(NamedTuple):
    """How much of one weight tensor is zero."""

    zeros: int
    size: int

    @property
    def share(self) -> float:
        """Zeros over size, in [0, 1]."""
        return self.zeros / self.size


def prune_weights(module: nn.Module, settings: PruningSettings, *, seed: int) -> None:
    """Prune the weights of all linear and convolution layers in place; biases stay.

    Called again, it prunes ``amount`` of what is left. With ``amount`` 0 it puts masks of ones.

    Args:
        module: model to prune, on any device.
        settings: how many weights, and which.
        seed: of the random choice; magnitude draws nothing.

    Raises:
        ValueError: if there is no linear or convolution layer.
    """
    layers = [part for part in module.modules() if type(part) in _PRUNED_LAYERS]
    if not layers:
        raise ValueError("pruning needs a linear or convolution layer, got a model without one")
    kinds = {"magnitude": prune.L1Unstructured, "random": prune.RandomUnstructured}
    kind = kinds[settings.method]
    # torch's random pruning draws from the global generator and takes no other.
    with seeded_torch(seed):
        if settings.scope == "global":
            prune.global_unstructured(
                [(layer, "weight") for layer in layers], pruning_method=kind, amount=settings.amount
            )
        else:
            for layer in layers:
                kind.apply(layer, "weight", settings.amount)
    for layer in layers:
        # What the layer computes anew at every call; as a constant until then, a model that has
        # not been trained yet can be copied.
        layer.weight = (layer.get_parameter(_ORIGINAL) * _mask(layer)).detach()


def pruning_masks(module: nn.Module) -> dict[str, Bool[Tensor, "..."]]:
    """Return a copy of the mask of each pruned weight, by the plain name; True is kept."""
    return {f"{prefix}weight": _mask(layer).bool() for prefix, layer in _pruned(module)}


def apply_masks(
    state: Mapping[str, Values], masks: Mapping[str, Bool[Tensor, "..."]]
) -> dict[str, Values]:
    """Set the pruned weights of a plain state to zero, for example after averaging clients.

    Clients that pruned differently fill in each other's zeros; the server's masks empty them.

    Args:
        state: tensors or arrays by their plain names; not changed.
        masks: as `pruning_masks` returns them.

    Returns:
        A new table; what has no mask is the same object as before.

    Raises:
        ValueError: if the state lacks a masked weight, or its shape is not the mask's.
    """
    masked = dict(state)
    for name, mask in masks.items():
        if name not in state:
            raise ValueError(f"masked weight {name!r} is not in the state")
        values = state[name]
        if tuple(values.shape) != tuple(mask.shape):
            raise ValueError(
                f"mask of {name!r} has shape {list(mask.shape)}, the weight {list(values.shape)}"
            )
        if isinstance(values, Tensor):
            masked[name] = torch.where(mask.to(values.device), values, torch.zeros_like(values))
        else:
            masked[name] = np.where(mask.cpu().numpy(), values, np.zeros_like(values))
    return masked


def dense_state(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the state under the plain names, with zeros where weights are pruned.

    A model that was never pruned can load it.
    """
    masks = pruning_masks(module)
    plain = {
        _plain_name(name): tensor.detach().clone()
        for name, tensor in module.state_dict().items()
        if not _is_mask(name, masks)
    }
    return apply_masks(plain, masks)


def load_dense_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a state with plain names into a pruned model; its masks stay in force.

    Raises:
        RuntimeError: if names or shapes differ, as ``load_state_dict`` does.
    """
    masks = pruning_masks(module)
    named = {
        name.removesuffix("weight") + _ORIGINAL if name in masks else name: tensor
        for name, tensor in apply_masks(state, masks).items()
    }
    for prefix, layer in _pruned(module):
        named[prefix + _MASK] = _mask(layer)
    module.load_state_dict(named)


def make_permanent(module: nn.Module) -> None:
    """Write the zeros into the weights and take the masks away, in place.

    From then on an optimizer step may change the zeros again. Optimizers built before still hold
    the parameters.
    """
    for layer in dict.fromkeys(layer for _, layer in _pruned(module)):
        prune.remove(layer, "weight")


def measure_sparsity(module: nn.Module) -> dict[str, TensorSparsity]:
    """Count the zeros of every linear and convolution weight by plain name, pruned or not.

    The share over all of them is under the name ``total``.
    """
    counts = {}
    masks = pruning_masks(module)
    for prefix, layer in module.named_modules():
        if type(layer) in _PRUNED_LAYERS:
            name = f"{prefix}.weight" if prefix else "weight"
            # Not the attribute of a pruned layer: that is what the last forward pass computed.
            weight = layer.get_parameter(_ORIGINAL if name in masks else "weight")
            if name in masks:
                weight = weight * masks[name]
            counts[name] = TensorSparsity(int((weight == 0).sum()), weight.numel())
    zeros, sizes = (sum(count[place] for count in counts.values()) for place in range(2))
    return {**counts, "total": TensorSparsity(zeros, sizes)} if counts else {}


def _pruned(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each pruned layer with the prefix of its tensors' names: as often as it has names."""
    for name, layer in module.named_modules(remove_duplicate=False):
        if type(layer) in _PRUNED_LAYERS and _MASK in layer._buffers:
            yield f"{name}." if name else "", layer


def _mask(layer: nn.Module) -> Tensor:
    return layer.get_buffer(_MASK)


def _plain_name(name: str) -> str:
    return name.removesuffix("_orig") if name.split(".")[-1] == _ORIGINAL else name


def _is_mask(name: str, masks: Mapping[str, Tensor]) -> bool:
    return name.split(".")[-1] == _MASK and name.removesuffix("_mask") in masks
