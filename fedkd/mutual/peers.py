"""What the rules of mutual learning share: means, cross-entropies and divergences peer by peer."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor

from fedkd.targets import at_least_float32, check_temperature
from fedkd.tensors import as_tensor

Terms = dict[str, Float[Tensor, ""]]

PeerTable = Float[Tensor, "rows classes"] | Float[np.ndarray, "rows classes"]
"""What one peer says about some rows."""

PeerTables = Float[Tensor, "peers rows classes"] | Float[np.ndarray, "peers rows classes"]
"""What all peers say about the same rows."""

PeerShares = Float[Tensor, " rows"] | Float[np.ndarray, " rows"]
"""How much one peer counts for each row."""

RowLabels = Int[Tensor, " rows"] | Integer[np.ndarray, " rows"]
"""The class of each row."""


def constants(values: Tensor | np.ndarray) -> Tensor:
    """Return what peers say, an array or a tensor, as a tensor that gets no gradient.

    Half precision becomes float32.
    """
    tensor = as_tensor(values) if isinstance(values, np.ndarray) else values.detach()
    return at_least_float32(tensor)


def known_labels(labels: RowLabels) -> Int[Tensor, " rows"]:
    """Return labels, an array or a tensor, as a tensor of whole numbers that can index."""
    return (as_tensor(labels) if isinstance(labels, np.ndarray) else labels).long()


def peer_kl(
    logits: Float[Tensor, "peers batch classes"],
    targets: Float[Tensor, "peers batch classes"] | Float[Tensor, "batch classes"],
    temperature: float,
    scale_by_t2: bool,
    sample_weights: Float[Tensor, "batch"] | None,
) -> Float[Tensor, "peers"]:
    """KL of every peer to one common or to its own target probabilities, which are NOT detached."""
    check_temperature(temperature)
    log_p = torch.log_softmax(at_least_float32(logits) / temperature, dim=2)
    target_p = targets.to(log_p.dtype)
    # Where attention made the target it gets a gradient, and that of 0 * log 0 would be NaN.
    target_log_p = target_p.clamp_min(torch.finfo(target_p.dtype).tiny).log()
    row_losses = (target_p * (target_log_p - log_p)).sum(dim=-1)
    return peer_means(row_losses, sample_weights) * (temperature**2 if scale_by_t2 else 1.0)


def check_counts(**counts: int) -> None:
    """Refuse numbers, given by name, below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be >= 1, got {count}")


def peer_cross_entropies(
    logits: Float[Tensor, "peers batch classes"],
    labels: Int[Tensor, "batch"],
    sample_weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, "peers"]:
    """Return every peer's cross-entropy, in nats per example.

    Args:
        logits: unnormalised scores of all peers on the same batch.
        labels: class of each example, in [0, classes).
        sample_weights: >= 0, one per row, as in `fedkd.losses.response.soft_target_kl`.
    """
    num_peers, batch_size, _ = logits.shape
    row_losses = F.cross_entropy(
        at_least_float32(logits).flatten(0, 1), labels.long().repeat(num_peers), reduction="none"
    )
    return peer_means(row_losses.reshape(num_peers, batch_size), sample_weights)


def peer_means(
    row_losses: Float[Tensor, "peers batch"], sample_weights: Float[Tensor, "batch"] | None
) -> Float[Tensor, "peers"]:
    """Average each peer's row losses as `fedkd.losses.rows.row_mean` does one model's."""
    if sample_weights is None:
        return row_losses.sum(dim=1) / max(row_losses.shape[1], 1)
    weights = sample_weights.detach().to(row_losses.dtype)
    total = weights.sum()
    return (row_losses * weights).sum(dim=1) / torch.where(total > 0, total, torch.ones_like(total))
