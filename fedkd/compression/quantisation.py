"""A trained student with int8 weights: smaller on disk and on the wire, and how much it changed.

Weights are rounded to whole multiples of one step per output channel, symmetric around zero. The
layers here are our own small modules: PyTorch's ``torch.ao.quantization`` is deprecated and warns,
and what is left of a format must be plain tensors that safetensors can hold. They save bytes, not
time: a layer turns its weights back into floats at every forward pass.

Source:
    Jacob et al., 2018, section 2.1, with zero point 0. https://arxiv.org/abs/1712.05877
    Per output channel: Krishnamoorthi, 2018, section 3.1. https://arxiv.org/abs/1806.08342
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.utils import prune

from fedkd.compression.storage import plain_tensors, stored_bytes

_LARGEST = 127
"""Largest whole number; -128 is left out, so the range is symmetric."""

_FLOAT32_EXACT = 2**24
"""Up to here float32 adds whole numbers without rounding."""

Activations = Literal["float", "int8"]


class QuantisationSettings(BaseModel):
    """What becomes int8: the weights of linear and 2-d convolution layers always do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    activations: Activations = Field(
        default="float",
        description=(
            "inputs of linear layers: float leaves them; int8 rounds each row with a step of its "
            "own (dynamic quantisation)"
        ),
    )


class _QuantisedLayer(nn.Module):
    """Weight in int8 with one float32 step per output channel; for inference only."""

    weight_int8: nn.Parameter
    weight_step: Tensor
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        values, step = _quantise(weight.detach().float(), kept_dims=1)
        # A parameter, so that whoever counts a model's parameters counts these.
        self.weight_int8 = nn.Parameter(values, requires_grad=False)
        self.register_buffer("weight_step", step)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), False)

    def float_weight(self, like: Tensor) -> Tensor:
        """Return the weights as multiples of their steps, in the type of ``like``."""
        return self.weight_int8.to(like.dtype) * self.weight_step.to(like.dtype)


class QuantisedLinear(_QuantisedLayer):
    """``nn.Linear`` with int8 weights, and int8 inputs where asked."""

    def __init__(self, layer: nn.Linear, *, activations: Activations = "float") -> None:
        super().__init__(layer.weight, layer.bias)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.activations = activations

    def forward(self, inputs: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch outputs"]:
        """Return ``inputs @ weight.T + bias`` with the rounded weight, and inputs where asked."""
        if self.activations == "float":
            return F.linear(inputs, self.float_weight(inputs), self.bias)
        values, step = _quantise(inputs, kept_dims=inputs.ndim - 1)
        # Whole numbers in floats: torch has no public int8 matrix product for every device. The
        # type is wide enough for every sum to be the one that 32-bit integers would give.
        exact = inputs.shape[-1] * _LARGEST**2 <= _FLOAT32_EXACT
        wide = torch.float32 if exact else torch.float64
        sums = F.linear(values.to(wide), self.weight_int8.to(wide)).to(inputs.dtype)
        outputs = sums * step.to(inputs.dtype) * self.weight_step.squeeze(-1).to(inputs.dtype)
        return outputs if self.bias is None else outputs + self.bias


class QuantisedConv2d(_QuantisedLayer):
    """``nn.Conv2d`` with int8 weights; inputs stay float."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(layer.weight, layer.bias)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride, self.padding = layer.kernel_size, layer.stride, layer.padding
        self.dilation, self.groups = layer.dilation, layer.groups

    def forward(
        self, inputs: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch filters rows columns"]:
        """Return the convolution with the rounded weights."""
        return F.conv2d(
            inputs,
            self.float_weight(inputs),
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )


@dataclass(frozen=True, slots=True)
class QuantisationComparison:
    """A model before and after.

    Attributes:
        agreement: share of the rows on which both predict the same class, in [0, 1].
        max_logit_difference: largest absolute difference of any logit.
        float_bytes: the float model as a safetensors file.
        quantised_bytes: the quantised model as a safetensors file: int8 weights, float32 steps,
            and what stayed float.
    """

    agreement: float
    max_logit_difference: float
    float_bytes: int
    quantised_bytes: int


def quantise(module: nn.Module, settings: QuantisationSettings | None = None) -> nn.Module:
    """Return a copy in evaluation mode whose linear and 2-d convolution layers have int8 weights.

    Subclasses of these layers and convolutions with another padding than zeros stay float, as do
    biases and normalisation; `quantised_layers` lists what was replaced. The copy is for
    inference: its int8 weights have no gradient.

    Args:
        module: trained model; not changed.
        settings: None for the defaults.

    Raises:
        ValueError: if the model is pruned and its masks are not permanent yet, or if it has no
            such layer.
    """
    if prune.is_pruned(module):
        raise ValueError("the model has pruning masks: call make_permanent before quantise")
    settings = settings or QuantisationSettings()
    replaced: dict[nn.Module, nn.Module] = {}
    quantised = _replace(copy.deepcopy(module), settings, replaced)
    if not replaced:
        raise ValueError("quantise needs a linear or 2-d convolution layer, got a model without")
    return quantised.eval()


def quantised_layers(module: nn.Module) -> tuple[str, ...]:
    """Return the paths of the int8 layers."""
    return tuple(name for name, part in module.named_modules() if isinstance(part, _QuantisedLayer))


def compare_quantised(
    module: nn.Module,
    quantised: nn.Module,
    inputs: Float[Tensor, "batch *shape"],
) -> QuantisationComparison:
    """Compare a float model with its quantised copy on images, both in evaluation mode.

    Args:
        module: the float model; left in the mode it had.
        quantised: as `quantise` returned it.
        inputs: images, at least one.

    Raises:
        ValueError: if there is no image.
    """
    if not len(inputs):
        raise ValueError("compare_quantised needs at least one image, got none")
    modes = {part: part.training for part in module.modules()}
    with torch.no_grad():
        before, after = module.eval()(inputs), quantised.eval()(inputs)
    for part, training in modes.items():
        part.training = training
    return QuantisationComparison(
        agreement=float((before.argmax(-1) == after.argmax(-1)).float().mean()),
        max_logit_difference=float((before - after).abs().max()),
        float_bytes=stored_bytes(module.state_dict()),
        quantised_bytes=stored_bytes(quantised.state_dict(), quantised_header(quantised)),
    )


def quantised_header(module: nn.Module) -> dict[str, str] | None:
    """Return what the header of a quantised model's file says; None for a float model."""
    layers = [part for part in module.modules() if isinstance(part, _QuantisedLayer)]
    if not layers:
        return None
    kinds = {part.activations for part in layers if isinstance(part, QuantisedLinear)}
    return {"activations": kinds.pop() if kinds else "float"}


def save_quantised(quantised: nn.Module, path: Path) -> None:
    """Write a quantised model's tensors and its settings to a safetensors file."""
    safetensors.torch.save_file(
        plain_tensors(quantised.state_dict()), path, metadata=quantised_header(quantised)
    )


def load_quantised(path: Path, module: nn.Module) -> nn.Module:
    """Read what `save_quantised` wrote.

    Args:
        path: of the file.
        module: a float model of the same architecture; gives the structure, is not changed.

    Raises:
        ValueError: if the file was not written by `save_quantised`.
        RuntimeError: if its tensors do not fit the architecture.
    """
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if "activations" not in metadata:
        raise ValueError(f"{path} holds no quantised model: its header names no activations")
    settings = QuantisationSettings.model_validate(metadata)
    quantised = quantise(module, settings)
    quantised.load_state_dict(safetensors.torch.load_file(path))
    return quantised


def _quantise(
    values: Float[Tensor, "..."], *, kept_dims: int
) -> tuple[Int8[Tensor, "..."], Float[Tensor, "..."]]:
    """Round to multiples of one step per index of the first ``kept_dims`` dimensions."""
    reduced = tuple(range(kept_dims, values.ndim))
    largest = values.abs().amax(dim=reduced, keepdim=True)
    # A channel of zeros has no largest value; any step gives its zeros back.
    step = torch.where(largest > 0, largest / _LARGEST, torch.ones_like(largest))
    return (values / step).round().clamp(-_LARGEST, _LARGEST).to(torch.int8), step


def _replace(
    module: nn.Module, settings: QuantisationSettings, replaced: dict[nn.Module, nn.Module]
) -> nn.Module:
    """Return ``module`` with its layers replaced in place; a layer used twice stays one."""
    if module in replaced:
        return replaced[module]
    # Not subclasses: what they do with their weight is their own business.
    if type(module) is nn.Linear:
        replaced[module] = QuantisedLinear(module, activations=settings.activations)
        return replaced[module]
    if type(module) is nn.Conv2d and module.padding_mode == "zeros":
        replaced[module] = QuantisedConv2d(module)
        return replaced[module]
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = _replace(child, settings, replaced)
    return module
