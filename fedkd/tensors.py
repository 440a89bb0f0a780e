"""NumPy arrays as tensors, without copies."""

import warnings

import numpy as np
import torch
from torch import Tensor


def as_tensor(array: np.ndarray) -> Tensor:
    """View an array as a tensor without a copy; arrays in shared memory are read-only, so is this.

    PyTorch has no read-only tensors and warns; nothing here ever writes to a data tensor.
    """
    if array.flags.writeable:
        # Most arrays are, and to silence a warning takes longer than to make the tensor.
        return torch.from_numpy(array)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
