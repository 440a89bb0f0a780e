"""Shared test settings: one thread, as in every worker, so that bits depend on no core count."""

import torch

torch.set_num_threads(1)
