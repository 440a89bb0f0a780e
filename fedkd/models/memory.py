"""How much memory a model takes, told before any of it is taken."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedkd.inputs import Shape
from fedkd.models import ModelSettings, build_model

TRAINED_COPIES = 2
"""A model in training is there twice: its weights and their gradients."""

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@lru_cache(maxsize=256)
def weight_bytes(model: ModelSettings, input_shape: Shape, num_classes: int) -> int:
    """Return the bytes of a model's parameters and buffers without making them; 0 if unknown.

    A model of one's own may be built in a way that works with real numbers only.
    """
    try:
        with torch.device("meta"), _LeftBlank():
            network = build_model(model, input_shape=input_shape, num_classes=num_classes, seed=0)
    except ValueError:
        return 0
    return _bytes_of(network)


class _LeftBlank(TorchFunctionMode):
    """Draws no normal numbers where none are kept: torch would import its compiler to do so."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (nn.init.normal_, Tensor.normal_):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _bytes_of(network: nn.Module) -> int:
    tensors = [*network.parameters(), *network.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors if t.device.type == "meta")


@lru_cache(maxsize=1)
def machine_bytes() -> int:
    """Return the memory of this machine, or what this process may have of it."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for place in CGROUP_LIMITS:
        try:
            limits.append(int(Path(place).read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue
    return min(limits)


def check_memory(
    model: ModelSettings,
    *,
    input_shape: Shape,
    num_classes: int,
    slots: int,
    states: int = 0,
) -> None:
    """Refuse a model that this machine cannot hold.

    Args:
        model: what to train.
        input_shape: of an input.
        num_classes: logits an input.
        slots: numbers that the optimizer keeps for each weight.
        states: how many clients' weights and slots are kept here beside it.

    Raises:
        ValueError: naming the model, what it needs and what there is.
    """
    one = weight_bytes(model, input_shape, num_classes)
    there = machine_bytes()
    needed = one * (TRAINED_COPIES + slots)
    if needed > there:
        raise ValueError(
            f"model {model.label!r} has {_size(one)} of weights and needs {_size(needed)} to be "
            f"trained, but there are {_size(there)} of memory: make it smaller"
        )
    kept = needed + states * one * (1 + slots)
    if kept > there:
        raise ValueError(
            f"model {model.label!r} has {_size(one)} of weights, which {states} clients keep with "
            f"what their optimizers remember: {_size(kept)}, but there are {_size(there)} of "
            "memory: use a smaller model, fewer clients or optimizer.name: sgd"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
