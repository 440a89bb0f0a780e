"""Dropout whose mask is a function of the client, the step and the row, not of a shared stream.

Every bit is hashed from (key of the step, number of the dropout call, row of the batch, position
in the row), in integer arithmetic. So a client drops the same units whether it trains alone or
stacked with others, with or without padded rows, on whatever device.
"""

from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

# SplitMix64: Steele, Lea, Flood, 2014, https://doi.org/10.1145/2660193.2660195, as written by
# Vigna, https://prng.di.unimi.it/splitmix64.c. Constants as signed 64-bit numbers; products wrap.
_STEP = -7046029254386353131
_FIRST = -4658895280553007687
_SECOND = -7723592293110705685
_BITS = 24
"""Bits of a hash that decide about one unit: all a float32 can tell apart."""


class DropoutStream:
    """Where the dropout layers of one model get their randomness while a trainer is at work.

    Attributes:
        key: int64 scalar, one per client and step; None leaves the layers to torch's generator.
        rows: number of each row within the client's own batch, where padding moved rows; None
            numbers them from 0.
        calls: dropout calls so far in this step, which keeps layers apart.
    """

    def __init__(self) -> None:
        self.key: Int64[Tensor, ""] | None = None
        self.rows: Int64[Tensor, " batch"] | None = None
        self.calls = 0

    def begin(
        self,
        key: Int64[Tensor, ""],
        *,
        rows: Int64[Tensor, " batch"] | None = None,
        model: int = 0,
    ) -> None:
        """Start a step of one model; ``model`` tells apart the models that a client trains."""
        self.key, self.rows, self.calls = key, rows, model << 20

    def end(self) -> None:
        """Leave the layers to torch's generator again."""
        self.key = self.rows = None

    def keep(self, shape: torch.Size, share: float) -> Tensor:
        """Return a Boolean mask of ``shape``, first dimension rows, True with probability share."""
        assert self.key is not None  # noqa: S101
        key = _mix(self.key + _signed(self.calls * _STEP))
        self.calls += 1
        device, features = self.key.device, prod(shape[1:])
        rows = torch.arange(shape[0], device=device) if self.rows is None else self.rows
        counters = rows[:, None] * features + torch.arange(features, device=device)
        hashed = _mix(key + counters * _STEP)
        kept: Tensor = _shifted(hashed, 64 - _BITS) < round(share * 2**_BITS)
        return kept.reshape(shape)


class SeededDropout(nn.Dropout):
    """``nn.Dropout``, except that a trainer may give it a `DropoutStream`.

    The first dimension of its input is the batch's rows.
    """

    stream: DropoutStream | None = None

    def forward(self, input: Float[Tensor, "batch *features"]) -> Float[Tensor, "batch *features"]:
        """Zero a share ``p`` of the units in training and scale up the others."""
        if self.stream is None or self.stream.key is None:
            return F.dropout(input, self.p, self.training)
        if not self.training or self.p == 0:
            return input
        if self.p == 1:
            return 0.0 * input
        kept = self.stream.keep(input.shape, 1 - self.p)
        return torch.where(kept, input / (1 - self.p), 0.0)


def seed_dropout(module: nn.Module) -> None:
    """Put a `SeededDropout` in the place of every plain ``nn.Dropout`` inside ``module``."""
    for parent in module.modules():
        for name, child in parent._modules.items():
            # Not subclasses: what they do is their own business.
            if type(child) is nn.Dropout:
                parent._modules[name] = SeededDropout(child.p).train(child.training)


def connect_dropout(module: nn.Module) -> DropoutStream | None:
    """Let the dropout layers of ``module`` draw from one new stream; None if there are none."""
    layers = [part for part in module.modules() if isinstance(part, SeededDropout) and part.p > 0]
    if not layers:
        return None
    stream = DropoutStream()
    for layer in layers:
        layer.stream = stream
    return stream


def step_keys(seed: int, steps: int) -> Int64[np.ndarray, " steps"]:
    """Return the key of each step of a fit; ``seed`` is the client's for this fit, < 2**63."""
    seeds = torch.full((steps,), seed, dtype=torch.int64)
    return _mix(_mix(seeds) + torch.arange(1, steps + 1) * _STEP).numpy()


def _mix(state: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Scatter 64-bit numbers: SplitMix64's output function."""
    state = (state ^ _shifted(state, 30)) * _FIRST
    state = (state ^ _shifted(state, 27)) * _SECOND
    return state ^ _shifted(state, 31)


def _signed(number: int) -> int:
    """Wrap a whole number to signed 64 bits."""
    return (number + 2**63) % 2**64 - 2**63


def _shifted(numbers: Int[Tensor, "*shape"], places: int) -> Int[Tensor, "*shape"]:
    """Shift right without the sign: torch has no unsigned 64-bit arithmetic."""
    return (numbers >> places) & ((1 << (64 - places)) - 1)
