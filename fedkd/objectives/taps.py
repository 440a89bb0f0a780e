"""Taps: what the inner layers of a model put out, by module path, without touching the model."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

PENULTIMATE = "penultimate"
"""Name of the layer whose output the last linear layer reads: the usual embedding."""

LAST_MAP = "last_map"
"""Name of the last layer that puts out feature maps ``[batch, channels, height, width]``."""

SPECIAL_LAYERS: Mapping[str, str] = {
    PENULTIMATE: "what the last linear layer reads",
    LAST_MAP: "the last feature maps",
}


class Features(dict[str, Tensor]):
    """What tapped layers put out in the last forward pass, by the names they were asked by."""


@contextmanager
def tapped(model: nn.Module, layers: Sequence[str]) -> Iterator[Features]:
    """Record what ``layers`` put out in every forward pass inside the block.

    Hooks are removed when the block is left, however it is left.

    Args:
        model: any module; it is not changed.
        layers: module paths such as ``"2"`` or ``"layer1.0.bn2"``, or `PENULTIMATE`.

    Yields:
        A table that each forward pass overwrites. Tensors keep their graph; a layer that runs
        several times in one pass leaves what it put out last.

    Raises:
        ValueError: naming a path that the model does not have and the ones it has.
    """
    features = Features()
    handles = []
    try:
        for layer in layers:
            if layer == PENULTIMATE:
                hook = partial(_keep_input, features, layer)
                handles.append(last_linear(model).register_forward_pre_hook(hook))
            else:
                module = _module_at(model, layer)
                handles.append(module.register_forward_hook(partial(_keep, features, layer)))
        yield features
    finally:
        for handle in handles:
            handle.remove()


def last_linear(model: nn.Module) -> nn.Linear:
    """Return the last linear layer of a model, in the order of its modules.

    Raises:
        ValueError: if it has none.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError(
            f"layer {PENULTIMATE!r} needs a model with a linear layer; name a module path instead: "
            f"{_paths(model)}"
        )
    return layers[-1]


def head_layer(model: nn.Module, inputs: Tensor, *, whose: str) -> str:
    """Return the module path of a model's head: the linear layer that makes logits.

    That is its last linear layer, where the model returns what this layer puts out as it is and
    runs it once. A dry run in evaluation mode and without gradients; the model's modes are put
    back.

    Args:
        model: any module.
        inputs: a batch of at least one row.
        whose: whose model it is, for the message.

    Raises:
        ValueError: if the head cannot be told apart from the rest of the model.
    """
    last = last_linear(model)
    put_out: list[object] = []

    def note(_module: nn.Module, _inputs: object, output: object) -> None:
        put_out.append(output)

    modes = [(module, module.training) for module in model.modules()]
    handle = last.register_forward_hook(note)
    try:
        model.eval()
        with torch.no_grad():
            logits = model(inputs)
    finally:
        handle.remove()
        for module, training in modes:
            module.training = training
    path: str = next(path for path, module in model.named_modules() if module is last)
    if len(put_out) != 1 or put_out[0] is not logits:
        raise ValueError(
            f"the head of {whose!r} cannot be told apart: it does not return what its last linear "
            f"layer {path!r} puts out; use a model that ends in a linear layer, such as mlp or cnn"
        )
    return path


def layer_shapes(model: nn.Module, inputs: Tensor) -> dict[str, tuple[int, ...]]:
    """Return the shape, without the batch, that every layer puts out, in the order they ran.

    A dry run in evaluation mode and without gradients; the model's modes are put back.

    Args:
        model: any module.
        inputs: a batch of at least one row.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str, _module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim >= 2:
            shapes.pop(name, None)
            shapes[name] = tuple(output.shape[1:])

    modes = [(module, module.training) for module in model.modules()]
    handles = [
        module.register_forward_hook(partial(note, name))
        for name, module in model.named_modules()
        if name
    ]
    try:
        model.eval()
        with torch.no_grad(), tapped_penultimate(model) as features:
            model(inputs)
        if PENULTIMATE in features:
            shapes[PENULTIMATE] = tuple(features[PENULTIMATE].shape[1:])
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return shapes


@contextmanager
def tapped_penultimate(model: nn.Module) -> Iterator[Features]:
    """Tap the embedding where the model has one."""
    has_linear = any(isinstance(module, nn.Linear) for module in model.modules())
    with tapped(model, [PENULTIMATE] if has_linear else []) as features:
        yield features


def resolved_layer(layer: str, shapes: Mapping[str, tuple[int, ...]], *, whose: str) -> str:
    """Turn a layer's name into one that `tapped` knows.

    Args:
        layer: a module path or a special name.
        shapes: from `layer_shapes`.
        whose: "student" or "teacher", for the message.

    Raises:
        ValueError: naming the layer and the layers that there are.
    """
    if layer == LAST_MAP:
        maps = [name for name, shape in shapes.items() if len(shape) == 3]
        if not maps:
            raise ValueError(
                f"layer {LAST_MAP!r}: the {whose} has no layer that puts out feature maps "
                f"[channels, height, width]; it has {_known(shapes)}"
            )
        return maps[-1]
    if layer not in shapes:
        raise ValueError(f"the {whose} has no layer {layer!r}; it has {_known(shapes)}")
    return layer


def vectors(features: Tensor) -> Tensor:
    """Return ``[batch, width]``: maps are averaged over space, anything else is flattened."""
    return features.mean((2, 3)) if features.ndim == 4 else features.flatten(1)


def vector_width(shape: tuple[int, ...]) -> int:
    """Return the width of `vectors` of features of this shape, the batch left out."""
    return shape[0] if len(shape) == 3 else math.prod(shape)


def _known(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())


def _keep(
    features: Features, layer: str, _module: nn.Module, _inputs: object, output: object
) -> None:
    if not isinstance(output, Tensor):
        raise ValueError(f"layer {layer!r} must put out a tensor, got {type(output).__name__}")
    features[layer] = output


def _keep_input(features: Features, layer: str, _module: nn.Module, inputs: object) -> None:
    if isinstance(inputs, tuple) and inputs and isinstance(inputs[0], Tensor):
        features[layer] = inputs[0]


def _module_at(model: nn.Module, path: str) -> nn.Module:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"the model has no layer {path!r}; it has {_paths(model)}") from None
    return module


def _paths(model: nn.Module) -> str:
    return ", ".join(name for name, _ in model.named_modules() if name)
