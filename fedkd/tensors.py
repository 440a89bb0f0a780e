"""NumPy arrays as tensors, without copies."""

import warnings

import numpy as np
import torch
from torch import Tensor

# PyTorch has no read-only tensors and says so once in a process. It says it here, to nobody: to
# silence it at every array takes longer than to make the tensor.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(b"0", np.uint8))


def as_tensor(array: np.ndarray) -> Tensor:
    """View an array as a tensor without a copy; arrays in shared memory are read-only, so is this.

    Nothing here ever writes to a data tensor.
    """
    return torch.from_numpy(array)
