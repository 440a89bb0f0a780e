"""A model as a safetensors file: its tensors under plain names, and what its header must say."""

from collections.abc import Mapping

import safetensors.torch
from torch import Tensor


def plain_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the CPU, contiguous and without shared memory, as safetensors wants them."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()
    }


def stored_bytes(state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """Return the size of a safetensors file with these tensors, its header included."""
    return len(safetensors.torch.save(plain_tensors(state), dict(metadata) if metadata else None))
