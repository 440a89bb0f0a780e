"""What a model costs: parameters, arithmetic, bytes and time, each measured on the model itself."""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fedkd.compression.pruning import dense_state
from fedkd.compression.quantisation import quantised_header
from fedkd.compression.storage import plain_tensors
from fedkd.inputs import Shape
from fedkd.threads import computing_threads
from fedkd.training.work import RowFlops


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Cost of one model.

    Attributes:
        parameters: weights and biases, trainable or not, int8 or float; shared ones count once.
        flops: floating-point operations of one input's forward pass: matrix products,
            convolutions and attention, one multiply-add = 2; additions of biases, activations and
            normalisation are not counted. Zeros of a pruned layer are: dense kernels multiply
            them too.
        size_bytes: what the model takes as a safetensors file.
        latency_s: seconds of one forward pass by batch size; median over repeats, one CPU thread.
    """

    parameters: int
    flops: int
    size_bytes: int
    latency_s: Mapping[int, float]


def measure_cost(
    module: nn.Module,
    input_shape: Shape,
    *,
    batch_sizes: Sequence[int] = (1, 64),
    warm_up: int = 3,
    repeats: int = 20,
) -> ModelCost:
    """Measure a model in evaluation mode; its mode and torch's own switches are put back.

    Counts and bytes repeat exactly. Latency is a stop-watch's: it belongs to the machine and to
    what else ran on it.

    Args:
        module: maps inputs to logits, on the CPU.
        input_shape: of one input.
        batch_sizes: for the latency, each >= 1.
        warm_up: forward passes before the watch starts, >= 0.
        repeats: forward passes timed, >= 1.

    Raises:
        ValueError: if a number is out of its range.
    """
    if min(batch_sizes, default=1) < 1 or warm_up < 0 or repeats < 1:
        raise ValueError(
            "need batch_sizes >= 1, warm_up >= 0 and repeats >= 1, "
            f"got {list(batch_sizes)}, {warm_up} and {repeats}"
        )
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            flops = _count_flops(module, torch.zeros(1, *input_shape))
            with computing_threads(1):
                latency_s = {
                    size: _median_seconds(module, torch.zeros(size, *input_shape), warm_up, repeats)
                    for size in batch_sizes
                }
    finally:
        for part, training in modes.items():
            part.training = training
    return ModelCost(
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        flops=flops,
        size_bytes=len(model_file(module)),
        latency_s=latency_s,
    )


def row_flops(module: nn.Module, input_shape: Shape) -> RowFlops:
    """Count what a row costs to learn from and to predict: a model's forward and backward pass.

    The backward pass goes to every parameter that learns, and no further than it has to: the first
    layer's gradient by its inputs is not computed. Losses and optimizers are not counted, nor what
    `ModelCost.flops` leaves out; the same rows cost the same however they are cut into batches.

    Args:
        module: maps images to logits, on the CPU; its mode is put back.
        input_shape: of one row.
    """
    modes = {part: part.training for part in module.modules()}
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    # In evaluation mode: BatchNorm cannot train on one row, and its arithmetic is not counted.
    module.eval()
    row = torch.zeros(1, *input_shape)
    try:
        with torch.no_grad():
            predicted = _count_flops(module, row)
        counter = _OperationCounter()
        with torch.enable_grad(), _separate_products(), counter:
            logits = module(row)
            if logits.requires_grad:
                torch.autograd.grad(logits.sum(), learning, allow_unused=True)
        return RowFlops(counter.total, predicted)
    finally:
        for part, training in modes.items():
            part.training = training


def model_file(module: nn.Module) -> bytes:
    """Return a model as the content of a safetensors file, with plain names.

    Pruned weights are zeros in it; an int8 model can be read with `load_quantised`.
    """
    return safetensors.torch.save(plain_tensors(dense_state(module)), quantised_header(module))


def _count_flops(module: nn.Module, inputs: Tensor) -> int:
    counter = _OperationCounter()
    with _separate_products(), counter:
        module(inputs)
    return counter.total


class _OperationCounter(TorchDispatchMode):
    """Sums what torch's own formulas say of each operation.

    As ``torch.utils.flop_counter.FlopCounterMode`` does, which imports torch's compiler as well: a
    second of every report.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Else the compiler is imported to be told to stay away from here.
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        with self:
            parts = func.decompose(*args, **named)
        if parts is not NotImplemented:
            return parts
        result = func(*args, **named)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **named, out_val=result))
        return result


@contextmanager
def _separate_products() -> Iterator[None]:
    """Take attention and LSTMs apart into the matrix products that torch's counter knows.

    It knows no fused kernel of the CPU, and would count these layers as nothing.
    """
    onednn: Any = torch.backends.mkldnn
    fast_path, fused = torch.backends.mha.get_fastpath_enabled(), onednn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    # Not its context manager "flags": that sets what only Intel's GPUs have, and warns.
    onednn.enabled = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        onednn.enabled = fused
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _median_seconds(module: nn.Module, inputs: Tensor, warm_up: int, repeats: int) -> float:
    for _ in range(warm_up):
        module(inputs)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        module(inputs)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
